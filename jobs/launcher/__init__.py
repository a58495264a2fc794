"""Start the ranks of a node and restart them after a failure."""
