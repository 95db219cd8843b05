"""The parts every Proto domain stands on: distances, prototypes, losses, metrics, explanations, training glue."""
