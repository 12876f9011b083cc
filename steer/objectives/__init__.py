"""Training objectives, one family per file."""
