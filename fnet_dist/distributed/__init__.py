"""Process group, gradient synchronisation and the watch over ranks."""
