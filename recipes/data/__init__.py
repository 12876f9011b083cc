"""Data sets: each a module that builds its file once and loads it without the builder's tools."""
