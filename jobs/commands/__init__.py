"""One file for each command of `fnet` (`python -m jobs` without an installation)."""
