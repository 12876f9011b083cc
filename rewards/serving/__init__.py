"""A reward behind a URL: the server and its client."""
