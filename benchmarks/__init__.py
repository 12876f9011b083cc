"""Measurements of speed, memory and quality, which are not part of the tests."""
