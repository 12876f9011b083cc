"""What a run needs before it is begun: memory, computed on tensors without values, and calls."""
