# SPDX-License-Identifier: Apache-2.0
"""Which server is asked, and how."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from lazysnap.errors import ConfigError
from lazysnap.registry.hosts import HostTable, RegistrySettings, TLSOptions


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("ghcr.io", "https://ghcr.io/v2"),
        ("example.com:5000", "https://example.com:5000/v2"),
        ("localhost", "http://localhost/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("localhost:443", "https://localhost:443/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("127.9.9.9", "http://127.9.9.9/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("128.0.0.1:5000", "https://128.0.0.1:5000/v2"),
        ("localhost.example.com", "https://localhost.example.com/v2"),
        ("plain.example.com:80", "http://plain.example.com:80/v2"),
        ("plain.example.com", "https://plain.example.com/v2"),
    ],
)
def test_endpoints(host: str, url: str) -> None:
    table = HostTable(RegistrySettings(plain_http_hosts=frozenset({"plain.example.com:80"})))
    (endpoint,) = table.endpoints(host)
    assert endpoint.base_url == url
    assert endpoint.host == host


def test_tls_options(tmp_path: Path) -> None:
    assert TLSOptions().context().verify_mode == ssl.CERT_REQUIRED
    unverified = TLSOptions(verify=False).context()
    assert (unverified.verify_mode, unverified.check_hostname) == (ssl.CERT_NONE, False)
    (tmp_path / "bad.pem").write_text("no certificate")
    for path in ("bad.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=path):
            TLSOptions(ca_files=(str(tmp_path / path),)).context()
