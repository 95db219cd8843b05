"""The command proto-vision."""
