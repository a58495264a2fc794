"""Save, verify, find and restore checkpoints; write the final weights."""
