"""Files on disk: atomic replacement, build records and Arrow helpers."""
