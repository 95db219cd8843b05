"""The twelve standard leads, in the order that every model of this package sees them."""

__all__ = ["STANDARD_LEADS"]

STANDARD_LEADS: tuple[str, ...] = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
