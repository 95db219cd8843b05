"""Explanations as data, and the HTML report that draws them."""

from proto_core.explain.records import Case, Evidence, Explanation

__all__ = ["Case", "Evidence", "Explanation"]
