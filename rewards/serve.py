"""A server of a reward."""

LIMITS = {"max_bytes": 128 * 2**20, "max_rows": 256, "max_side": 4096}


def serve():
    pass
