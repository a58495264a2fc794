"""A real, private, throw-away Slurm on one machine."""
