"""What measures speed, memory and quality; never part of the tests."""
