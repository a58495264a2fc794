"""Settings: their schema, their sources, their help."""
