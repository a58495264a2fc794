"""Check whether this machine, or the nodes of a cluster, can train."""
