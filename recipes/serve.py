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
        name: the reward, as `steer rewards` lists them or as any text that makes one.
        host: the address to listen at. Default: this machine alone. Others need a token.
        port: the port; 0 takes a free one.
        token: what clients must show. Default: the environment variable FLOWSTEER_REWARD_TOKEN,
            which other users of the machine do not see in the list of processes.
        workers: processes, each with a reward of its own, that score side by side.
        device: where to compute. Default: where the reward is loaded, the CPU.
        max_mb: the largest request, in MiB.
        max_rows: the most pictures in a request.
        max_seconds: how long the scoring of a request may take; a worker in which one takes longer
            is replaced.
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
