"""Weights & Biases, in a process beside rank 0."""
