# SPDX-License-Identifier: Apache-2.0
"""What is sent, TLS and proxies."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from lazysnap import __version__, oci
from lazysnap.credentials.docker_config import Anonymous, Credential, Fixed
from lazysnap.digest import Digest
from lazysnap.errors import RegistryError, RegistryUnreachable, Unauthorized
from lazysnap.reference import Reference
from lazysnap.registry import HostTable, Registry, RegistrySettings, find_referrers
from lazysnap.registry.hosts import Endpoint, TLSOptions
from lazysnap.registry.push import push_blob
from lazysnap.registry.referrers import fallback_tag
from lazysnap.registry.transport import Transport
from tests.registry.conftest import SETTINGS
from tests.support.registry import FaultyRegistry, Status, small_tar


class Https(HostTable):
    """Hosts behind TLS, loopback or not."""

    def __init__(self, settings: RegistrySettings, tls: TLSOptions) -> None:
        super().__init__(settings)
        self.tls = tls

    def endpoints(self, host: str) -> tuple[Endpoint, ...]:
        return (Endpoint(f"https://{host}/v2", host, self.tls),)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 signed by itself, with its key in the same file."""
    both = tmp_path / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout {both} -out {both}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    both.write_text(both.read_text() + both.with_name("both.pem.crt").read_text())
    return both


@pytest.fixture
async def secure(server: FaultyRegistry, certificate: Path) -> AsyncIterator[str]:
    """Host and port at which `server` is behind TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def handle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await server.serve("registry", stream)

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, handle, 0, context, host="127.0.0.1")
        listeners = await nursery.start(partial(serve, https_compatible=True))
        yield f"127.0.0.1:{listeners[0].transport_listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("method", "content", "headers", "user"),
    [
        ("GET", None, {"Range": "bytes=0-9"}, ""),
        ("GET", None, {"accept": "x/y", "user-agent": "me", "X-Own": "z"}, ""),
        ("GET", None, {}, "user%40x:pass%3Aword@"),
        ("POST", None, {}, ""),
        ("PUT", b"abc", {"Content-Type": "text/plain"}, ""),
        ("PUT", b"", {}, ""),
    ],
)
async def test_same_headers_as_by_the_client_of_httpx(
    server: FaultyRegistry, method: str, content: bytes | None, headers: dict[str, str], user: str
) -> None:
    url = f"http://{user}{server.host}/v2/?a=%2F b#fragment"
    transport = Transport(SETTINGS)
    answer = await transport.send(
        method, url, headers=headers, tls=TLSOptions(), content=content, deadline=float("inf")
    )
    await answer.drain()
    await transport.aclose()
    standard = {"Accept-Encoding": "identity", "User-Agent": f"lazysnap/{__version__}"}
    async with httpx.AsyncClient(headers=standard) as client:
        await client.request(method, url, headers=headers, content=content)
    ours, theirs = server.log
    assert ours == theirs
    assert ours.headers["host"] == server.host


async def test_whose_headers_win(server: FaultyRegistry) -> None:
    transport = Transport(SETTINGS)
    url = f"http://user:password@{server.host}/v2/"
    headers = {"authorization": "Bearer token", "accept-encoding": "gzip"}
    answer = await transport.send(
        "GET", url, headers=headers, tls=TLSOptions(), deadline=float("inf")
    )
    assert answer.url_host == server.host
    await answer.drain()
    await transport.aclose()
    (sent,) = server.log
    assert sent.authorization == "Bearer token"
    assert sent.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("headers", [{"X": "\u20ac"}, {"\u20ac": "x"}])
async def test_headers_that_cannot_be_sent(server: FaultyRegistry, headers: dict[str, str]) -> None:
    with pytest.raises(RegistryError, match="cannot ask"):
        await Transport(SETTINGS).send(
            "GET", f"http://{server.host}/", headers=headers, tls=TLSOptions(), deadline=1e9
        )
    assert server.log == []


@pytest.mark.parametrize("trusted", ["by its CA", "blindly"])
async def test_tls(server: FaultyRegistry, secure: str, certificate: Path, trusted: str) -> None:
    tls = TLSOptions(verify=False)
    if trusted == "by its CA":
        tls = TLSOptions(ca_files=(str(certificate) + ".crt",))
    data = bytes(range(256)) * 10_000
    digest = server.add_blob(data)
    async with Registry(SETTINGS, Anonymous(), hosts=Https(SETTINGS, tls)) as registry:
        blob = registry.blob(Reference.parse(f"{secure}/x:1"), digest)
        assert (await blob.tail(100)).data == data[-100:]
        assert await blob.read(100, 2_000_000) == data[100:2_000_100]
        async with blob.read_stream(0, len(data)) as stream:
            await anext(stream)


async def test_upload_stays_behind_tls(
    server: FaultyRegistry, secure: str, certificate: Path
) -> None:
    tls = TLSOptions(ca_files=(str(certificate) + ".crt",))
    data = bytes(range(256)) * 10_000
    reference = Reference.parse(f"{secure}/x:1")
    async with Registry(SETTINGS, Anonymous(), hosts=Https(SETTINGS, tls)) as registry:
        server.uploads.location = "relative"
        pushed = await push_blob(registry.exchange, reference, data, "a/b")
        assert server.blobs[pushed.digest] == data
        server.uploads.location = f"http://{server.host}"
        with pytest.raises(RegistryError, match="without TLS"):
            await push_blob(registry.exchange, reference, b"secret", "a/b")
    assert all(b"secret" not in r.body for r in server.log)


async def test_untrusted_certificate_is_final(server: FaultyRegistry, secure: str) -> None:
    async with Registry(SETTINGS, Anonymous(), hosts=Https(SETTINGS, TLSOptions())) as registry:
        with pytest.raises(RegistryError, match="not trusted") as caught:
            await registry.manifest(Reference.parse(f"{secure}/x:1"))
        assert not isinstance(caught.value, RegistryUnreachable)
        assert registry.statistics().requests == 1
    assert server.log == []


async def test_proxy_of_the_environment(
    server: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.host)
    server.faults.append(
        Status(200, {"Content-Type": "x"}, b"through the proxy", path="registry.test")
    )
    async with Registry(SETTINGS, Anonymous()) as registry:
        registry.allow_plain_http("registry.test")
        _, data = await registry.manifest(Reference.parse("registry.test/x:1"))
        assert data == b"through the proxy"
        # Not for this machine.
        digest = server.add_blob(b"x" * 1000)
        direct = registry.blob(Reference.parse(f"{server.host}/x:1"), digest)
        assert await direct.read(0, 2) == b"xx"
    assert [r.path for r in server.log] == [
        "http://registry.test/v2/x/manifests/1",
        f"/v2/x/blobs/{digest}",
    ]


# Redirects, and other places that an answer names, from TLS to plain HTTP.


@pytest.fixture
async def guarded(
    server: FaultyRegistry, secure: str, certificate: Path
) -> AsyncIterator[tuple[Registry, Reference]]:
    """A client with a password, and an image behind TLS."""
    tls = TLSOptions(ca_files=(str(certificate) + ".crt",))
    server.users["me"] = "secret"
    credentials = Fixed({secure: Credential("me", "secret")})
    async with Registry(SETTINGS, credentials, hosts=Https(SETTINGS, tls)) as registry:
        yield registry, Reference.parse(f"{secure}/team/app:1")


def _plain(server: FaultyRegistry, path: str) -> dict[str, str]:
    return {"Location": f"http://{server.host}{path}"}


async def test_what_is_believed_comes_through_tls(
    server: FaultyRegistry, guarded: tuple[Registry, Reference]
) -> None:
    registry, image = guarded
    pushed = server.add_image("team/app", "1", [small_tar(a=b"x")])
    await registry.manifest(image)
    asks: dict[str, Callable[[], Awaitable[object]]] = {
        "/v2/team/app/manifests/1": lambda: registry.manifest(image),
        f"/v2/team/app/referrers/{pushed.digest}": lambda: find_referrers(
            registry, image, pushed.digest, "a/b"
        ),
        f"/v2/team/app/manifests/{fallback_tag(pushed.digest)}": lambda: find_referrers(
            registry, image, pushed.digest, "a/b"
        ),
        f"/v2/team/app/blobs/{pushed.digest}": registry.blob(
            image, pushed.digest, 100, checked=False
        ).probe,
    }
    for path, ask in asks.items():
        for first in ([], [Status(307, {"Location": f"{path}?again"}, path=path)]):
            server.faults += [*first, Status(307, _plain(server, path), path=path)]
            before = len(server.log)
            with pytest.raises(RegistryError, match="without TLS"):
                await ask()
            assert server.faults == []
            # It would have been the last one.
            assert path in server.log[-1].path
            assert len(server.log) - before <= 3


async def test_what_is_checked_may_come_without_tls_and_is_asked_for_without_a_password(
    server: FaultyRegistry, guarded: tuple[Registry, Reference]
) -> None:
    registry, image = guarded
    server.auth = "basic"
    pushed = server.add_image("team/app", "1", [small_tar(a=b"x")])
    data = server.manifests["team/app", "1"][1]
    digest = server.add_blob(b"x" * 1000)
    assert (await registry.manifest(image))[1] == data
    server.auth = None  # which the plain server could not get
    for path in (f"/v2/team/app/manifests/{pushed.digest}", f"/v2/team/app/blobs/{digest}"):
        server.faults.append(Status(307, _plain(server, path), path=path))
    del server.log[:]
    assert (await registry.manifest(image, pushed.digest))[1] == data
    assert await registry.blob(image, digest, 1000).read(5, 2) == b"xx"
    assert [bool(r.authorization) for r in server.log] == [True, False, True, False]


@pytest.mark.parametrize("password", [True, False])
async def test_tokens_come_through_tls(
    server: FaultyRegistry, secure: str, certificate: Path, password: bool
) -> None:
    tls = TLSOptions(ca_files=(str(certificate) + ".crt",))
    server.auth = "bearer"
    credentials = Fixed({secure: Credential("me", "secret")} if password else {})
    async with Registry(SETTINGS, credentials, hosts=Https(SETTINGS, tls)) as registry:
        with pytest.raises(Unauthorized, match="without TLS"):
            await registry.manifest(Reference.parse(f"{secure}/x:1"))
    assert server.requests("token") == []


async def test_further_pages_come_through_tls(
    server: FaultyRegistry, guarded: tuple[Registry, Reference]
) -> None:
    registry, image = guarded
    digest = Digest.of(b"x")
    headers = {"Content-Type": oci.OCI_INDEX, "Link": f"<http://{server.host}/x>; rel=next"}
    server.faults.append(Status(200, headers, b'{"schemaVersion":2}', path="/referrers/"))
    with pytest.raises(RegistryError, match="without TLS"):
        await find_referrers(registry, image, digest, "a/b")
    assert len(server.log) == 1
