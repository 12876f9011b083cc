"""Which token is sent to which server: each belongs to one host, and is sent to no other."""

import ipaddress
import netrc
import os
from pathlib import Path

__all__ = ["LOGIN", "TOKEN", "is_loopback", "line_for", "token_for"]

TOKEN = "FLOWSTEER_REWARD_TOKEN"
"""The environment variable that holds the token, for clients and servers."""

LOGIN = "flowsteer"
"""The login under which ~/.netrc holds the tokens of reward servers."""


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by an address that no other machine can have.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("127.0.0.1.evil.com")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def token_for(host: str, port: int) -> str | None:
    """Return the token that may be sent to a server, or None.

    For a server on this machine it is the environment variable FLOWSTEER_REWARD_TOKEN. For any
    other it is the entry of ~/.netrc (or of the file that the variable NETRC names) for its host
    and port, or for its host, under the login flowsteer.

    Args:
        host: the server's.
        port: the server's.

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    if is_loopback(host):
        return os.environ.get(TOKEN) or None
    file = os.environ.get("NETRC") or None
    try:
        known = netrc.netrc(file).hosts
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        name = file or Path("~/.netrc")
        raise ValueError(
            f"cannot read {name}, where a token for {host} may be ({error}): correct the line, "
            "and make the file private (chmod 600)"
        ) from None
    for name in (f"{host}:{port}", host):
        login, _, password = known.get(name, ("", "", ""))
        if login == LOGIN and password:
            return password
    return None


def line_for(host: str, port: int) -> str:
    """Return a message that says where to put the token of a server."""
    if is_loopback(host):
        return f"set the environment variable {TOKEN} to the one it was started with"
    return (
        f"write the line `machine {host}:{port} login {LOGIN} password TOKEN` into ~/.netrc "
        f"(chmod 600); {TOKEN} is sent only to servers of this machine"
    )
