"""Training a flow map with Lightning."""
