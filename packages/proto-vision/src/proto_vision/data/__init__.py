"""Image data sets as they lie on disk, and the built-in digits."""
