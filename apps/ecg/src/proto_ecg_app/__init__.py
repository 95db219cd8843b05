"""The command proto-ecg."""
