"""The run directory: attempts, owners, metrics log, stops and ends."""
