# SPDX-License-Identifier: Apache-2.0
"""Whatever a registry or a file of credentials says: only our own errors, soon, and in little memory.

`LAZYSNAP_FUZZ=1000 pytest tests/registry/test_fuzz.py` looks at a thousand times as many cases, in hours.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lazysnap import oci
from lazysnap.credentials.docker_config import (
    Anonymous,
    Credential,
    CredentialSource,
    DockerConfig,
)
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError
from lazysnap.http.urls import join_url, parse_url
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings, find_referrers
from lazysnap.registry.auth import parse_challenges
from lazysnap.registry.push import push_blob
from lazysnap.registry.referrers import _entries, _Listing, _with_entry
from lazysnap.registry.retry import parse_retry_after

_FACTOR = int(os.environ.get("LAZYSNAP_FUZZ", "1"))
_DIGEST = Digest.of(b"x")
_DESCRIPTOR = oci.Descriptor(media_type="a/b", digest=_DIGEST, size=1)
_MOST_SECONDS = 5.0
_MOST_BYTES = 256 << 20


def _cases(count: int) -> settings:
    return settings(
        max_examples=count * _FACTOR,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# URLs.

_TRAPS = [
    "http://a..b/",
    "http://[::1/",
    " http://127.0.0.1/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:x/",
    "http://xn--a/",
    "http://xn--/",
    f"http://{'a' * 64}/",
    "http://%00/",
    "http://a b/",
    "http://[::g]/",
    "http://[v1.a]/",
    "http://\u2100.test/",
    "http://x\ud800/",
    "http://u:p\u00e9@/",
    "//",
    "///x",
    "http:",
    "https:///x",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "http://x/\x7f",
    "http://\u0661\u0662\u0667.0.0.1/",
    "?#",
    "",
    "x" * 20_000,
]
_PIECES = st.sampled_from([
    *"/:@?#[]%.&= \\", "http", "https", "://", "xn--", "..", "%zz", "%00", "::1", "127.0.0.1",
    "localhost", ":0", ":80", ":99999", "\u00e9", "\u0663", "\u2100", "\t", "\x1b", "a" * 64,
])  # fmt: skip
_URLS = st.one_of(
    st.sampled_from(_TRAPS),
    st.lists(_PIECES, max_size=8).map("".join),
    st.lists(_PIECES, max_size=8).map(lambda pieces: "http://" + "".join(pieces)),
    st.text(max_size=40),
)


@_cases(800)
@given(_URLS, _URLS)
def test_urls(text: str, base: str) -> None:
    with contextlib.suppress(LazysnapError):
        found = parse_url(text)
        # What resolvers and pools do with it.
        found.origin[1].encode("idna")
        assert found.parsed.raw_host.decode("ascii")
        assert parse_url(found.text).origin == found.origin
        assert found.server.isascii()
        assert found.server.isprintable()
        with contextlib.suppress(LazysnapError):
            join_url(found.text, base)
    with contextlib.suppress(LazysnapError):
        join_url(base, text)


@pytest.mark.parametrize("text", _TRAPS)
def test_urls_that_name_no_server(text: str) -> None:
    with pytest.raises(LazysnapError):
        parse_url(text)


@_cases(300)
@given(st.one_of(st.text(max_size=80), st.lists(_PIECES, max_size=8).map("".join)))
@example("[:::::]/x")
@example("[" + ":" * 200 + "]:1/x")
@example("a" * 100 + ".test/x")
def test_references(text: str) -> None:
    with contextlib.suppress(LazysnapError):
        reference = Reference.parse(text)
        registry = Registry(RegistrySettings(), Anonymous())
        with contextlib.suppress(LazysnapError):
            for endpoint in registry.exchange.hosts.endpoints(reference.host):
                parse_url(endpoint.base_url)


# Headers.

_HEADER = st.one_of(
    st.text(alphabet=[*'Bearrlm="\\,; \t=/:x'], max_size=60),
    st.text(max_size=60),
    _URLS.map(lambda url: f'Bearer realm="{url}",service="x",scope="a b"'),
    _URLS.map(lambda url: f'<{url}>; rel="next"'),
    st.tuples(st.integers(), st.integers(), st.integers()).map(
        lambda n: f"bytes {n[0]}-{n[1]}/{n[2]}"
    ),
    st.sampled_from(
        [
            "Basic",
            "Bearer",
            "bytes 0-0/1",
            "bytes */0",
            "9" * 30,
            "gzip",
            "Bearer " + "x," * 9000,
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "Wed, 21 Oct 0000 99:99:99 -9999",
            "1 jan 1 0:0 +9",
        ]
    ),
)


@_cases(500)
@given(st.lists(_HEADER, max_size=3))
@example(['Bearer realm="' + "\\" * 16_000])
@example(["a=" * 8_000])
@example(["Wed, 01 Jan 99999999999 00:00:00 GMT"])
@example(["1 Jan 1 00:00:00 +2359"])
def test_headers(values: list[str]) -> None:
    began = time.monotonic()
    parse_challenges(values)
    for value in values:
        seconds = parse_retry_after(value)
        assert seconds is None or seconds >= 0
    assert time.monotonic() - began < _MOST_SECONDS


# Documents.

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2, 1 << 63, 10**400, 1e308, str(_DIGEST), "sha256:x", oci.OCI_INDEX]),
    st.floats(allow_nan=True),
    st.text(max_size=10),
)
_SHALLOW = st.one_of(
    _LEAVES,
    st.lists(_LEAVES, max_size=3),
    st.dictionaries(st.text(max_size=5), _LEAVES, max_size=3),
)
_JSON = st.one_of(
    _LEAVES, st.lists(_SHALLOW, max_size=3), st.dictionaries(st.text(max_size=5), _SHALLOW)
)
_POINTER = {"mediaType": oci.OCI_LAYER_GZIP, "digest": str(_DIGEST), "size": 1}
_PLATFORM = {"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "10.0.1"}
_DOCUMENTS: list[Any] = [
    {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {**_POINTER, "annotations": {"a": "b"}},
        "layers": [_POINTER, {**_POINTER, "urls": ["http://x/"], "platform": _PLATFORM}],
        "annotations": {"a": "b"},
        "subject": _POINTER,
        "artifactType": "a/b",
    },
    {
        "schemaVersion": 2,
        "mediaType": oci.OCI_INDEX,
        "manifests": [
            {**_POINTER, "mediaType": oci.OCI_MANIFEST, "platform": _PLATFORM},
            {**_POINTER, "mediaType": oci.OCI_MANIFEST, "artifactType": "a/b"},
            {**_POINTER, "mediaType": oci.OCI_MANIFEST},
        ],
    },
    {
        "architecture": "amd64",
        "os": "linux",
        "os.version": "10",
        "created": "2020-01-01T00:00:00Z",
        "rootfs": {"type": "layers", "diff_ids": [str(_DIGEST), str(_DIGEST)]},
    },
    {"token": "x", "access_token": "y", "expires_in": 300},
    {"errors": [{"code": "X", "message": "y", "detail": None}]},
    {
        "auths": {"host": {"auth": "dTpw", "username": "u"}, "https://host/v1/": {"auth": "eA=="}},
        "credHelpers": {"host": "x"},
        "credsStore": "y",
    },
    {"Username": "u", "Secret": "s"},
]


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner: Any = document.items() if isinstance(document, dict) else ()
    inner = enumerate(document) if isinstance(document, list) else inner
    for key, value in inner:
        yield from _places(value, (*path, key))


def _changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = _changed(document[path[0]], path[1:], value)
    return copy


@st.composite
def _documents(draw: st.DrawFn) -> bytes:
    """Right ones with one or two other values, cut or with another byte, or anything."""
    document = draw(st.sampled_from(_DOCUMENTS))
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(sorted(_places(document), key=str)))
        document = _changed(document, path, draw(_JSON))
    data = json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    match draw(st.integers(0, 5)):
        case 0:
            data = data[: draw(st.integers(0, len(data)))]
        case 1:
            at = draw(st.integers(0, len(data) - 1))
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        case 2:
            data = draw(st.binary(max_size=50))
    return data


_NASTY = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"schemaVersion":2,"manifests":' + b"[" * 100_000,
    b'{"schemaVersion":2,"manifests":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"schemaVersion":2,"manifests":[],"x":' + b"9" * 100_000 + b"}",
    b'{"token":"x","expires_in":' + b"9" * 100_000 + b"}",
    b'{"token":"x","expires_in":1e999}',
    b'{"schemaVersion":1e999}',
    b'{"schemaVersion":2,"mediaType":"\\ud800","manifests":[]}',
    b'{"rootfs":{"diff_ids":["sha256:\\ud800"]}}',
    b'{"token":"\\ud800\\u0000"}',
    b'{"auths":{"host":{"auth":"\xff"}}}',
    b'{"auths":{"host":{"username":"\\ud800","password":"x"}}}',
    b'{"errors":' + b"[" * 4000,
    b"\xff\xfe",
    b"",
]


def _read(data: bytes) -> None:
    platform = Platform.parse("linux/arm64")
    for parse in (oci.parse_manifest, oci.parse_index, oci.parse_document, oci.parse_config):
        with contextlib.suppress(LazysnapError):
            found = parse(data)
            if isinstance(found, oci.Index):
                str(found.choose(platform))
            if isinstance(found, oci.ImageConfig):
                found.chain_ids()
                platform.rank(found.platform)
                manifest = oci.parse_manifest(json.dumps(_DOCUMENTS[0]).encode())
                oci.check_layers(manifest, found)
            if isinstance(found, oci.Manifest):
                for layer in found.layers or ():
                    oci.layer_kind(layer.media_type)
                found.layer(_DIGEST)
    with contextlib.suppress(LazysnapError):
        _entries(data)
        _with_entry(_Listing(data, ""), _DESCRIPTOR)


@_cases(800)
@given(_documents())
def test_documents(data: bytes) -> None:
    _read(data)


@pytest.mark.parametrize("data", _NASTY, ids=range(len(_NASTY)))
def test_nasty_documents(data: bytes) -> None:
    began = time.monotonic()
    tracemalloc.start()
    try:
        _read(data)
        assert tracemalloc.get_traced_memory()[1] < _MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < _MOST_SECONDS


# Files of credentials, and the programs that they name.


def _credential(directory: Path, data: bytes, answer: bytes) -> Credential | None:
    (directory / "config.json").write_bytes(data)
    program = directory / "docker-credential-x"
    if not program.exists():
        program.write_text(f"#!/bin/sh\ncat {directory}/answer\n")
        program.chmod(0o755)
    (directory / "answer").write_bytes(answer)
    inline = os.fsdecode(data) if b"\0" not in data else ""
    environ = {"PATH": f"{directory}:/usr/bin:/bin", "HOME": str(directory)}
    found = None
    for more in ({}, {"DOCKER_AUTH_CONFIG": inline}):
        config = DockerConfig(str(directory / "config.json"), environ=environ | more)
        found = trio.run(config.get, "host") or found
    return found


@_cases(150)
@given(_documents())
@example(json.dumps(_DOCUMENTS[5]).encode())
def test_files_of_credentials(tmp_path: Path, data: bytes) -> None:
    _credential(tmp_path, data, json.dumps(_DOCUMENTS[6]).encode())


@pytest.mark.parametrize("data", _NASTY, ids=range(len(_NASTY)))
def test_nasty_files_of_credentials(tmp_path: Path, data: bytes) -> None:
    _credential(tmp_path, data, b"")
    _credential(tmp_path, b'{"credsStore":"x"}', data)


# All of it, as a server that answers what it likes.

_FIELDS = ["Location", "WWW-Authenticate", "Content-Range", "Retry-After", "Link", "Content-Type"]
_FIELDS += ["Content-Length", "Content-Encoding", "Docker-Content-Digest", "ETag", "OCI-Subject"]
_FIELDS += ["Transfer-Encoding", "Connection"]
_STATUSES = [100, 101, 199, 200, 201, 202, 204, 206, 301, 307, 308, 400, 401, 403, 404, 412, 416]
_STATUSES += [429, 500, 503, 999, 0]


@st.composite
def _answers(draw: st.DrawFn) -> bytes:
    status = draw(st.sampled_from(_STATUSES))
    head = f"HTTP/1.1 {status} x\r\n".encode()
    here = st.just("http://HOST/v2/x/blobs/y")
    usual = {
        "Location": st.one_of(_URLS, here),
        "WWW-Authenticate": st.one_of(_HEADER, here.map(lambda u: f'Bearer realm="{u}"')),
        "Content-Range": _HEADER,
        "Content-Type": st.sampled_from([oci.OCI_INDEX, oci.OCI_MANIFEST, "text/html"]),
        "Link": st.one_of(_HEADER, here.map(lambda u: f"<{u}>; rel=next")),
        "Transfer-Encoding": st.sampled_from(["chunked", "gzip", "x, chunked"]),
    }
    for name in draw(st.lists(st.sampled_from(_FIELDS), unique=True, max_size=4)):
        value = draw(usual.get(name, _HEADER) if draw(st.booleans()) else _HEADER)
        raw = value.encode(errors="surrogatepass")
        head += name.encode() + b": " + raw.replace(b"\r", b"").replace(b"\n", b"") + b"\r\n"
    body = draw(st.one_of(_documents(), st.binary(max_size=30), st.sampled_from(_NASTY[-3:])))
    if draw(st.booleans()):
        head += b"Content-Length: %d\r\n" % len(body)
    answer = head + b"\r\n" + body
    if draw(st.integers(0, 20)) == 0:
        answer = draw(st.binary(max_size=60)) + answer
    return answer


class _Numeric(trio.abc.HostnameResolver):
    """Knows no names."""

    async def getaddrinfo(self, *_arguments: object) -> object:  # type: ignore[override]
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    async def getnameinfo(self, *_arguments: object) -> object:  # type: ignore[override]
        raise NotImplementedError


@contextlib.asynccontextmanager
async def _server(answers: list[bytes]) -> AsyncIterator[str]:
    """Gives the answers in order, the last one again and again, one to a connection."""
    left = list(answers)
    host = ""

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                received = b""
                while b"\r\n\r\n" not in received and (more := await stream.receive_some(65536)):
                    received += more
                answer = left.pop(0) if len(left) > 1 else left[0]
                await stream.send_all(answer.replace(b"HOST", host.encode()))

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield host
        nursery.cancel_scope.cancel()


class Known:
    """Knows the same for every host."""

    def __init__(self, credential: Credential) -> None:
        self._credential = credential

    async def get(self, host: str) -> Credential | None:
        return self._credential


Operation = Callable[[Registry, Reference], Awaitable[object]]


def _operations() -> list[Operation]:
    digest = partial(Digest.of, b"x")
    return [
        lambda registry, image: registry.manifest(image),
        lambda registry, image: registry.manifest(image, digest()),
        lambda registry, image: registry.fetch_image(image, Platform.parse("linux/arm64")),
        lambda registry, image: registry.blob(image, digest()).tail(100),
        lambda registry, image: registry.blob(image, digest(), 1000).read(10, 20),
        lambda registry, image: registry.blob(image, digest(), 1000).probe(),
        lambda registry, image: registry.blob_bytes(image, _DESCRIPTOR, 100),
        lambda registry, image: find_referrers(registry, image, digest(), "a/b"),
        lambda registry, image: push_blob(registry.exchange, image, b"x", "a/b"),
    ]


async def _ask(answers: list[bytes], operation: Operation, credentials: CredentialSource) -> None:
    trio.socket.set_custom_hostname_resolver(_Numeric())
    async with (
        _server(answers) as host,
        Registry(RegistrySettings(), credentials) as registry,
    ):
        with contextlib.suppress(LazysnapError):
            await operation(registry, Reference.parse(f"{host}/x:1"))
        assert trio.current_time() < 400


@_cases(200)
@given(
    st.lists(_answers(), min_size=1, max_size=4),
    st.sampled_from(_operations()),
    st.sampled_from([Anonymous(), Known(Credential("u", "p")), Known(Credential("", "", "token"))]),
)
@example([b'HTTP/1.1 401 x\r\nWWW-Authenticate: Bearer realm=" http://x/"\r\n\r\n'],
         _operations()[0], Anonymous())  # fmt: skip
@example([b"HTTP/1.1 307 x\r\nLocation: http://a..b/\r\n\r\n"], _operations()[3], Anonymous())
def test_whatever_a_server_answers(
    answers: list[bytes], operation: Operation, credentials: CredentialSource
) -> None:
    began = time.monotonic()
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(_ask, answers, operation, credentials, clock=clock)
    assert time.monotonic() - began < _MOST_SECONDS * 2


@pytest.mark.parametrize("number", range(len(_TRAPS)))
@pytest.mark.parametrize("header", ["Location: %s", 'WWW-Authenticate: Bearer realm="%s"', "Link"])
def test_urls_in_headers(number: int, header: str) -> None:
    url = _TRAPS[number].encode(errors="surrogatepass")
    status, operation = b"307", 0
    if header == "Link":
        head = b"HTTP/1.1 200 x\r\nContent-Type: " + oci.OCI_INDEX.encode() + b"\r\n"
        answer = head + b"Link: <" + url + b">; rel=next\r\n\r\n" + b'{"schemaVersion":2}'
        operation = 7
    else:
        status = b"401" if "realm" in header else b"307"
        answer = b"HTTP/1.1 " + status + b" x\r\n" + header.encode() % url + b"\r\n\r\n"
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(_ask, [answer], _operations()[operation], Anonymous(), clock=clock)
