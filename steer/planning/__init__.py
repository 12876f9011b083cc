"""Plan a run before it starts: memory, computed on tensors without values, and calls."""
