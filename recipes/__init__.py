"""The programs and the command line: thin, on top of `steer` and `rewards`."""
