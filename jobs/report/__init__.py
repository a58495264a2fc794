"""Draw runs as pictures and HTML pages."""
