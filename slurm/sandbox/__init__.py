"""Start a real Slurm in a private directory of this machine, and remove it."""
