"""Tasks: each joins an encoder with its head and its loss, and computes evaluation numbers for a batch."""
