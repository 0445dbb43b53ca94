"""What a classifier answers without data: triggers sought by gradient, and what they say. It knows no defence."""
