# SPDX-License-Identifier: Apache-2.0
"""Where to send requests for a registry: an ordered list of endpoints per host.

The client tries the endpoints of a host in order, so that mirrors (containerd's hosts.toml) are a
matter of returning more of them here. Knows nothing of HTTP requests or credentials.
"""

from __future__ import annotations

import functools
import ipaddress
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lazysnap.errors import ConfigError
from lazysnap.reference import DOCKER_HUB

PULL = "pull"
RESOLVE = "resolve"
PUSH = "push"


@dataclass(frozen=True)
class TLSOptions:
    """How a server's certificate is checked, and which one we show.

    Attributes:
        ca_files: PEM files trusted besides the system's.
        client_certificate: PEM file shown to the server.
        client_key: its key; None if the certificate's file holds both.
        verify: False accepts any certificate.
    """

    ca_files: tuple[str, ...] = ()
    client_certificate: str | None = None
    client_key: str | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """A client context with these options.

        Raises:
            ConfigError: a file cannot be read or is no certificate.
        """
        context = ssl.create_default_context()
        try:
            for path in self.ca_files:
                context.load_verify_locations(path)
            if self.client_certificate:
                context.load_cert_chain(self.client_certificate, self.client_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"cannot load the TLS files {self.ca_files}, {self.client_certificate}: {error}"
            ) from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True)
class Endpoint:
    """One server that can answer for a host.

    Attributes:
        base_url: up to and including `/v2`, without a slash at the end.
        host: the name that credentials are looked up by.
        tls: how its certificate is checked.
        headers: sent with every request to it, also to its token server.
        capabilities: `pull` (content by digest), `resolve` (tags, referrers) and `push`.
        namespace: the host it answers for, sent as `?ns=`, when that is another one.
    """

    base_url: str
    host: str
    tls: TLSOptions = TLSOptions()
    headers: tuple[tuple[str, str], ...] = ()
    capabilities: frozenset[str] = frozenset({PULL, RESOLVE, PUSH})
    namespace: str | None = None


@dataclass(frozen=True)
class RegistrySettings:
    """Settings of the registry client.

    Attributes:
        plain_http_hosts: hosts (with port, if any) that are spoken to without TLS.
        retry_seconds: how long one operation keeps trying without getting anywhere.
        connect_seconds: longest wait for a connection and its TLS handshake.
        stall_seconds: longest wait for the next bytes of an answer, and the time in which the least rate
            is looked at.
        least_bytes_per_second: an answer that arrives more slowly is given up, as if it stood still.
        open_seconds: how long the opening of a layer may wait for its registry, in all.
        open_retry_seconds: how long that, or a download that the client can do itself, keeps trying until
            something arrives.
        retry_after_seconds: longest Retry-After of a server that is honoured.
        max_connections: open connections per TLS setting, over all hosts.
        keep_alive_seconds: how long an unused connection is kept.
        helper_seconds: longest run of a credential helper program.
        local_layouts: read images in OCI layouts on this machine, which a client of the daemon must
            not have it do.
    """

    plain_http_hosts: frozenset[str] = frozenset()
    retry_seconds: float = 30.0
    connect_seconds: float = 5.0
    stall_seconds: float = 10.0
    least_bytes_per_second: int = 512
    open_seconds: float = 15.0
    open_retry_seconds: float = 5.0
    retry_after_seconds: float = 10.0
    max_connections: int = 128
    keep_alive_seconds: float = 30.0
    helper_seconds: float = 10.0
    local_layouts: bool = False


@dataclass
class HostTable:
    """The endpoints of each host, by the settings and what was allowed at run time."""

    settings: RegistrySettings
    _plain: set[str] = field(default_factory=set)

    def allow_plain_http(self, host: str) -> None:
        """Speak plain HTTP to a host from now on, because the user asked for it."""
        self._plain.add(host)

    def endpoints(self, host: str) -> tuple[Endpoint, ...]:
        """The servers to ask for a host, in this order; never empty.

        Args:
            host: as in a reference: `docker.io`, `ghcr.io`, `127.0.0.1:5000`.
        """
        plain = host in self._plain or host in self.settings.plain_http_hosts
        scheme = "http" if plain or _is_loopback(host) else "https"
        server = "registry-1.docker.io" if host == DOCKER_HUB else host
        return (Endpoint(base_url=f"{scheme}://{server}/v2", host=host),)


@functools.lru_cache
def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, where containerd speaks plain HTTP unless the port is 443."""
    parts = urlsplit(f"//{host}")
    name = parts.hostname or ""
    if parts.port == 443:
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
