"""Recipes that come with the package. README.md: how to write your own, outside of it."""
