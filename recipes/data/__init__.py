"""Data sets, one per module, which builds its file once and loads it without the build tools."""
