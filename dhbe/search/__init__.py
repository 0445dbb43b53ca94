"""Data-free trigger inversion, and what the triggers found say about a classifier. Independent of all defences."""
