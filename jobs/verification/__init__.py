"""Break, repeat and compare runs."""
