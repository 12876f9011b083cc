"""Which token goes to which server: each belongs to one host, and is shown to no other."""

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
    """Tell whether a host is this machine, by an address that no other can have.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("127.0.0.1.evil.com")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def token_for(host: str, port: int) -> str | None:
    """Return the token that a server may be shown, or None.

    A server of this machine is shown the environment variable FLOWSTEER_REWARD_TOKEN. Another one
    is shown what ~/.netrc (or the file that the variable NETRC names) holds for its host and port,
    or for its host, under the login flowsteer.

    Args:
        host: the server's.
        port: the server's.

    Raises:
        ValueError: the file cannot be read; says which.
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
    """Say where the token of a server belongs, for a message."""
    if is_loopback(host):
        return f"set the environment variable {TOKEN} to the one it was started with"
    return (
        f"write the line `machine {host}:{port} login {LOGIN} password TOKEN` into ~/.netrc "
        f"(chmod 600); {TOKEN} is sent only to servers of this machine"
    )
