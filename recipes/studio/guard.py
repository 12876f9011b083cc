"""Access to the page: only for a browser on this machine, or with the token."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rewards.serving.tokens import is_loopback

__all__ = ["COOKIE", "Guard"]

COOKIE = "flowsteer_token"

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' ws: wss: data: blob:"
)
"""The page loads nothing from other sites."""

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI application behind a check of each request.

    - Without a token, `Host` must name this machine (or the bound address). A foreign name that
      resolves to it would allow another site to read the page (DNS rebinding). Such a page has no
      token, so with a token any host name is accepted: that of a network, or of a reverse proxy.
    - A request from another site (`Origin`, `Sec-Fetch-Site`) is refused. Behind a proxy the site
      is that of `X-Forwarded-Host`, if the proxy sets it.
    - If there is a token, the first request sends it as `?token=...` and gets a cookie, which
      later requests send.

    Args:
        app: the application to guard.
        host: the bound address.
        token: the token that all requests need, or None.
    """

    def __init__(self, app: App, host: str, token: str | None = None) -> None:
        self.app, self.host, self.token = app, host, token

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refused = self._refused(headers)
        query = scope.get("query_string", b"").decode("latin-1")
        shown = parse_qs(query).get("token", [""])[0]
        if refused is None and self.token is not None and not self._known(headers, shown):
            refused = (
                401,
                "this page needs its token: open the address that `steer studio` printed",
            )
        if refused is not None:
            await _answer(scope, send, *refused)
            return

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode())]
                if self.token is not None and shown:
                    cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    more.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, sent)

    def _refused(self, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = _hostname(f"//{host}")
        if name is None:
            return 400, "the request has a Host that is not one"
        if self.token is None and not (is_loopback(name) or name == self.host.lower()):
            return 403, f"this page is not {name!r}: open it by the address that it was started at"
        origin = headers.get("origin")
        ours = {host, headers.get("x-forwarded-host", host)}
        if origin is not None and origin.partition("://")[2] not in ours:
            return 403, "a page of another site may not use this one"
        if headers.get("sec-fetch-site") == "cross-site":
            return 403, "a page of another site may not use this one"
        return None

    def _known(self, headers: dict[str, str], shown: str) -> bool:
        assert self.token is not None
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        given = [shown, "" if cookie is None else cookie.value]
        return any(hmac.compare_digest(g.encode(), self.token.encode()) for g in given)


def _hostname(address: str) -> str | None:
    """Return the host in an address; "" if it has none, None if it cannot be parsed."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return None


async def _answer(scope: Scope, send: Any, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": text.encode()})
