"""What is measured on a classifier by whoever holds data. No defence sees any of it."""
