"""`steer.sample`: one request, run by the name of a method, and its result."""
