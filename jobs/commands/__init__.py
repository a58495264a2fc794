"""One module for each verb of `fnet` and `python -m jobs`."""
