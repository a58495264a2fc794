"""The cluster's side: everything that talks to Slurm. It imports nothing of ours."""
