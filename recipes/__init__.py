"""The programs and the command line, a thin layer on `steer` and `rewards`."""
