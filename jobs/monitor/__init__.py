"""Read the state of runs and of their Slurm jobs."""
