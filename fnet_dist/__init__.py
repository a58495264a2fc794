"""The trainer: what one process does."""
