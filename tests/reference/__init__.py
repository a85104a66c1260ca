"""Naive float64 versions of the method's mathematics: slow, and obviously right."""
