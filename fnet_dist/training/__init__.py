"""The trainer: build the parts, train, evaluate, record."""
