"""Ready data sets and the sampler that shares a global batch among ranks."""
