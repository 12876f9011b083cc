"""Keep passwords and tokens in a reward's text out of files and messages."""

import re

__all__ = ["HIDDEN", "SECRET", "redacted"]

HIDDEN = "<hidden>"
"""The replacement of a secret. As the value of a token it counts as no token."""

_KEY = r"(?:token|password|passwd|pwd|secret|(?:api|access|auth)_?key)"
_QUOTED = r"'[^']*'|\"[^\"]*\""
SECRET = re.compile(
    rf"(?i)(?<![a-z])(?P<key>{_KEY}\s*=\s*)(?!\$\()(?P<value>{_QUOTED}|(?:[^\s,()]|\([^\s,()]*\))+)"
)
"""`token=VALUE` as a reward's text has it; its value ends at a comma, a bracket or a space.

A shell's `$(...)` is no value.
"""

_SHOWN = re.compile(rf"(?i)(?P<key>['\"]{_KEY}['\"]\s*:\s*)(?P<value>{_QUOTED}|[^\s,}}]+)")
_USER = re.compile(r"(?i)(?P<key>\b[a-z][a-z0-9+.-]*://)[^\s,()]*@")
_BEARER = re.compile(r"(?i)(?P<key>\bbearer\s+)[^\s,'\"]+")


def redacted(text: str) -> str:
    """Return a text with its secrets hidden: values of token= and similar options, users in URLs.

    >>> redacted("0.5*remote:url=http://me:pw@localhost:80,token=abc + clip")
    '0.5*remote:url=http://<hidden>@localhost:80,token=<hidden> + clip'
    >>> redacted("cannot take {'token': 'abc', 'batch': 2}")
    "cannot take {'token': '<hidden>', 'batch': 2}"
    """
    text = _USER.sub(rf"\g<key>{HIDDEN}@", text)
    text = _BEARER.sub(rf"\g<key>{HIDDEN}", text)
    text = _SHOWN.sub(rf"\g<key>'{HIDDEN}'", text)
    return SECRET.sub(rf"\g<key>{HIDDEN}", text)
