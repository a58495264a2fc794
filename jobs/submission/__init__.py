"""Check a job, copy its code and send it to Slurm."""
