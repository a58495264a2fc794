"""Weights & Biases: client.py runs in rank 0, worker.py in a process beside it, wandb_run.py calls the SDK there."""
