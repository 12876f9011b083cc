"""`steer studio`: a page in the browser."""

import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from recipes.studio.guard import Guard
from recipes.studio.session import Studio
from recipes.terminal import console
from rewards.serving.tokens import is_loopback

__all__ = ["application", "studio"]

TOKEN = "FLOWSTEER_STUDIO_TOKEN"

ALONE = 5.0
"""Seconds after which the model is loaded even if the page has not been opened."""


def studio(
    model: str = "emoji",
    root: Path = Path("outputs"),
    host: str = "127.0.0.1",
    port: int = 7860,
    allow_files: bool = False,
    device: str | None = None,
) -> None:
    """Open a page to steer pictures, look at rewards and browse run folders.

    One picture is steered at a time; further tabs wait. A tab that is closed ends its run.

    Args:
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name.
        root: the only folder that the page may read and write.
        host: the address to listen at. Default: this machine alone. Others need a token, which is
            printed, or is the environment variable FLOWSTEER_STUDIO_TOKEN. With that variable set
            it is needed on this machine too, as behind a reverse proxy.
        port: the port.
        allow_files: whether a reward may be a file of code, a module, a picture or a server. Who
            may open the page can then run code as you.
        device: where to compute. Default: where the model is loaded, the CPU.
    """
    import uvicorn

    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    token = os.environ.get(TOKEN) or None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    _free(host, port)
    state = Studio(model, Path(root), allow_files, device)
    app = application(state, host, token)
    named = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    address = f"http://{named}:{port}/" + (f"?token={token}" if token else "")
    console().print(f"open {address} in a browser; Ctrl-C ends it", soft_wrap=True)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))

    def ended() -> None:
        server.should_exit = server.should_exit or state.loading.error is not None

    state.loading.when_done(ended)
    server.run()
    if state.loading.error is not None:
        raise state.loading.error
    if not server.started:  # the address is in use, as uvicorn has reported
        raise SystemExit(1)


def _free(host: str, port: int) -> None:
    """Raise if nothing can listen at an address.

    Raises:
        ValueError: the port is in use, or the address is not this machine's.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"nothing can listen at {host}:{port} ({error.strerror or error}): give another "
                "--port, or --host"
            ) from error


def application(state: Studio, host: str = "127.0.0.1", token: str | None = None) -> Any:
    """Return the page as an ASGI application, with its guard.

    The model starts to load when the page has been loaded, or after some seconds without a
    visitor, because its imports would delay the page.

    Args:
        state: the state behind the page.
        host: the address that is bound.
        token: the token that all requests need, or None.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the studio needs gradio, which is not installed: pip install 'flowsteer[studio]'"
        ) from error
    from contextlib import asynccontextmanager

    from fastapi import FastAPI

    from recipes.studio.pages import CSS, pages, theme

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        late = threading.Timer(ALONE, state.loading.start)
        late.daemon = True
        late.start()
        yield
        late.cancel()
        state.close()

    page = pages(state)
    page.queue(default_concurrency_limit=4)
    made = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan), page, "/",
        server_name=host, footer_links=[], theme=theme(), css=CSS, max_file_size="20mb",
        ssr_mode=False, pwa=False,
    )  # fmt: skip
    return Guard(made, host, token)
