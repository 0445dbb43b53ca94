"""Measurements on a classifier that need data. No defence sees any of it."""
