"""The embedded networks, and reading and writing them."""
