# SPDX-License-Identifier: Apache-2.0
"""Which proxy a request goes through, by the environment, as for containerd.

The rules are those of Go's golang.org/x/net/http/httpproxy: $NO_PROXY may name networks (`10.0.0.0/8`) and
ports, which Python's own urllib does not understand, and this machine is never asked through a proxy. A
node's other programs and lazysnap then go the same ways.
"""

from __future__ import annotations

import contextlib
import ipaddress
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from lazysnap.http import PORTS


class Proxies:
    """The proxies of an environment.

    Args:
        by_scheme: proxies by the scheme of a URL; `all` for any other, and `no` for the list of hosts that
            are asked directly. By default what the environment says now.
    """

    def __init__(self, by_scheme: Mapping[str, str] | None = None) -> None:
        found = urllib.request.getproxies() if by_scheme is None else by_scheme
        self._by_scheme = dict(found)
        listed = self._by_scheme.pop("no", "").lower().split(",")
        self._direct = [item for item in map(str.strip, listed) if item]

    def find(self, url: str) -> str | None:
        """The proxy for a URL; None if it is to be asked directly."""
        if not self._by_scheme:
            return None
        parts = urlsplit(url)
        proxy = self._by_scheme.get(parts.scheme) or self._by_scheme.get("all")
        if not proxy:
            return None
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or PORTS.get(parts.scheme, 0)
        if _is_here(host) or any(_names(item, host, port) for item in self._direct):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _names(item: str, host: str, port: int) -> bool:
    """Whether an item of $NO_PROXY names a host: `*`, a network, an address, or a domain."""
    if item == "*":
        return True
    address = _address(host)
    if "/" in item:
        with contextlib.suppress(ValueError):
            return address is not None and address in ipaddress.ip_network(item, strict=False)
        return False
    if _address(item) is None:
        name, colon, number = item.rpartition(":")
        if colon and number.isdigit():
            if int(number) != port:
                return False
            item = name
    if address is not None:
        return address == _address(item)
    # A domain stands for all below it; one with a dot in front for these alone.
    domain = item.removeprefix("*").rstrip(".")
    return host.endswith("." + domain.removeprefix(".")) or host == domain
