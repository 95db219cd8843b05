"""ECG systems of Proto."""
