"""Training objectives, one family a file."""
