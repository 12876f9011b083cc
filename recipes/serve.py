"""`steer serve-reward NAME`: any reward behind a URL, for runs in another environment."""

from rewards.serving.application import LIMITS
from rewards.serving.serve import serve

__all__ = ["serve_reward"]


def serve_reward(
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    workers: int = 1,
    device: str | None = None,
    max_mb: float = LIMITS["max_bytes"] / 2**20,
    max_rows: int = LIMITS["max_rows"],
    max_seconds: float = LIMITS["max_seconds"],
) -> None:
    """Serve a reward over HTTP until it is stopped; use it with `--reward http://HOST:PORT`.

    Args:
        name: the reward: a name that `steer rewards` lists, or any text that describes a reward.
        host: the address to listen on. Default: this machine only. Other addresses need a token.
        port: the port; 0 chooses a free one.
        token: token that clients must send. Default: the environment variable
            FLOWSTEER_REWARD_TOKEN, which other users of the machine cannot see in the list of
            processes.
        workers: number of processes that score in parallel, each with its own copy of the reward.
        device: device to compute on. Default: where the reward is loaded, the CPU.
        max_mb: maximum size of a request, in MiB.
        max_rows: maximum number of pictures in a request.
        max_seconds: time limit for scoring a request; a worker that exceeds it is replaced.
    """
    serve(
        name,
        host,
        port,
        token=token,
        workers=workers,
        device=device,
        max_bytes=int(max_mb * 2**20),
        max_rows=max_rows,
        max_seconds=max_seconds,
    )
