"""The trainer: what one process does."""

__version__ = "0.1.0"  # pyproject.toml reads it; a checkout on PYTHONPATH has no other
