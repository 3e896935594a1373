# SPDX-License-Identifier: Apache-2.0
"""URLs that somebody else wrote: redirects, token servers, further pages, places of uploads.

This is the one place where such a text is read. What it returns can be asked: the scheme is HTTP, the host
is one that can be looked up, the port is one. There is one parser, that of httpx, which also makes the
request, so that no check looks at another host than the one that is asked.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin

import httpx

from lazysnap.errors import RegistryError
from lazysnap.http import PORTS

_MOST_LENGTH = 16 << 10
_SHOWN = 100
_NAME = re.compile(r"(?!.{254})([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?", re.ASCII)


@dataclass(frozen=True)
class Url:
    """An absolute URL that can be asked.

    Attributes:
        text: all of it, in ASCII.
        parsed: the same, as httpx takes it.
        origin: scheme, host and port, which decide whether secrets may be sent along.
        server: host and port as they were written, for people.
    """

    text: str
    parsed: httpx.URL
    origin: tuple[str, str, int]
    server: str

    @property
    def is_secure(self) -> bool:
        """Whether what is asked there goes through TLS."""
        return self.origin[0] == "https"


@lru_cache(maxsize=256)
def parse_url(text: str) -> Url:
    """Read an absolute URL.

    Raises:
        RegistryError: it is too long, not HTTP, or malformed.
    """
    if len(text) > _MOST_LENGTH:
        raise RegistryError(f"refusing a URL of {len(text)} characters: {text[:_SHOWN]!r}...")
    try:
        parsed = httpx.URL(text)
        host = parsed.raw_host.decode("ascii").lower()
        _ = parsed.host  # which is decoded when it is asked for
    except (httpx.InvalidURL, ValueError) as error:
        raise RegistryError(f"refusing a malformed URL: {text[:_SHOWN]!r}: {error}") from None
    if parsed.scheme not in PORTS or not host:
        raise RegistryError(f"refusing a URL that is not http or https: {text[:_SHOWN]!r}")
    port = PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if not 0 < port < 1 << 16 or not _can_be_looked_up(host):
        raise RegistryError(f"refusing a URL that names no server: {text[:_SHOWN]!r}")
    server = parsed.netloc.decode("ascii").rpartition("@")[2]
    return Url(str(parsed), parsed, (parsed.scheme, host, port), server)


def join_url(base: str, location: str) -> Url:
    """Read a URL that may be relative.

    Args:
        base: of the answer that it was in.
        location: what was in it.

    Raises:
        RegistryError: there is none, or it cannot be asked.
    """
    if not location:
        raise RegistryError("there is no Location")
    try:
        joined = urljoin(base, location)
    except ValueError as error:
        raise RegistryError(f"malformed URL {location[:_SHOWN]!r}: {error}") from None
    return parse_url(joined)


def _can_be_looked_up(host: str) -> bool:
    """Whether a host is an address or a name; resolvers raise errors of their own for others."""
    if ":" not in host:
        return _NAME.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return False
    return True
