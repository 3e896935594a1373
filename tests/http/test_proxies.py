# SPDX-License-Identifier: Apache-2.0
"""Which hosts are asked through a proxy; the cases are those of Go's httpproxy."""

from __future__ import annotations

import pytest

from lazysnap.http.proxies import Proxies

_PROXY = "http://proxy.test:3128"


@pytest.mark.parametrize(
    ("listed", "url", "direct"),
    [
        ("", "https://registry.test/v2/", False),
        ("*", "https://registry.test/v2/", True),
        ("registry.test", "https://registry.test/v2/", True),
        ("registry.test", "https://a.registry.test/v2/", True),
        ("registry.test", "https://otherregistry.test/v2/", False),
        (".registry.test", "https://a.registry.test/v2/", True),
        (".registry.test", "https://registry.test/v2/", False),
        ("*.registry.test", "https://a.registry.test/v2/", True),
        (" a.test , Registry.TEST", "https://registry.test/v2/", True),
        ("registry.test:5000", "https://registry.test:5000/v2/", True),
        ("registry.test:5000", "https://registry.test/v2/", False),
        ("registry.test:443", "https://registry.test/v2/", True),
        ("10.0.0.0/8", "https://10.1.2.3:5000/v2/", True),
        ("10.0.0.0/8", "https://11.1.2.3/v2/", False),
        ("10.0.0.0/8", "https://registry.test/v2/", False),
        ("10.1.2.3", "http://10.1.2.3:5000/v2/", True),
        ("10.1.2.3:80", "http://10.1.2.3:5000/v2/", False),
        ("fd00::/8", "http://[fd00::1]:5000/v2/", True),
        ("fd00::1", "http://[fd00::1]/v2/", True),
        ("[fd00::1]:5000", "http://[fd00::1]:5000/v2/", True),
        ("[fd00::1]:5000", "http://[fd00::1]/v2/", False),
        ("10.0.0.0/99,nonsense/,:", "https://registry.test/v2/", False),
        ("", "http://localhost:5000/v2/", True),
        ("", "http://127.0.0.1:5000/v2/", True),
        ("", "http://[::1]:5000/v2/", True),
    ],
)
def test_who_is_asked_directly(listed: str, url: str, direct: bool) -> None:
    proxies = Proxies({"http": _PROXY, "https": _PROXY, "no": listed})
    assert proxies.find(url) == (None if direct else _PROXY)


def test_a_proxy_is_for_a_scheme_or_for_all() -> None:
    assert Proxies({"http": "proxy.test"}).find("http://a.test/") == "http://proxy.test"
    assert Proxies({"http": "proxy.test"}).find("https://a.test/") is None
    assert Proxies({"all": "http://proxy.test"}).find("https://a.test/") == "http://proxy.test"
    assert Proxies({}).find("https://a.test/") is None


def test_the_environment_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", _PROXY)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert Proxies().find("https://a.test/") == _PROXY
    assert Proxies().find("https://10.0.0.1/") is None
