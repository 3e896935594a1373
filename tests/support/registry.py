# SPDX-License-Identifier: Apache-2.0
"""A registry that misbehaves as it is told. A real one is in `tests.support.docker_registry`.

`FaultyRegistry` is a small HTTP server on trio that serves /v2/ from memory and misbehaves as told:

    async with faulty_registry() as server:
        digest = server.add_blob(b"...")
        image = server.add_image("repo", "tag", [layer_bytes])
        server.faults.append(Break(after=1000))            # next answer of /v2/: reset at 1000 bytes
        server.faults.append(Status(503, {"Retry-After": "1"}, times=2))
        server.redirect = True                             # blobs come from a second port
        server.auth = "bearer"; server.users["user"] = "secret"
        server.uploads.has_referrers = True                # see tests/support/uploads.py
        ...
        server.requests("registry", "/blobs/")             # what was asked, in order

Faults are used up in order, each for the first request that matches it.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import socket
import struct
import tarfile
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from lazysnap import oci
from lazysnap.digest import Digest
from tests.support.uploads import Answer as UploadAnswer
from tests.support.uploads import Uploads

_Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


@dataclass
class Fault:
    """Something that goes wrong with answers.

    Attributes:
        server: `registry`, `storage` or `token`.
        path: only requests whose path contains this.
        times: how many requests it hits.
    """

    server: str = field(default="registry", kw_only=True)
    path: str = field(default="", kw_only=True)
    times: int = field(default=1, kw_only=True)


@dataclass
class Status(Fault):
    """Answer with this instead."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Break(Fault):
    """Send `after` bytes of the body (-1: not even the head) and then `how`: reset, close, stall."""

    after: int = -1
    how: str = "reset"


@dataclass
class Hold(Fault):
    """Answer as usual, but not before this is set.

    Attributes:
        until: an event of trio's.
    """

    until: trio.Event


@dataclass
class Ranges(Fault):
    """Treat Range otherwise.

    Attributes:
        how: `ignore` it, `shift` it by a byte, send a `short` half of it; or treat `bytes=-n` only:
            `ignore-suffix`, `suffix-501`, `suffix-prefix` (the first n bytes).
    """

    how: str = "ignore"


@dataclass
class Headers(Fault):
    """Send these headers as well, or instead of the usual ones of that name."""

    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request as it came, and how many bytes of body were sent back."""

    server: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass
class _Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class FaultyRegistry:
    """See the top of this file; make one with `faulty_registry`.

    Attributes:
        redirect: serve blobs by a redirect (of status `redirect_status`) to the storage server.
        signature: what the query of storage URLs must say; change it to expire the old ones.
        stale_status: what the storage server answers to an old signature.
        auth: None, `basic` or `bearer`.
        oauth: whether the token server knows POST; otherwise it answers 405.
        token_lifetime: seconds, as told to the client; None leaves it out.
        connections: open now.
        accepted: connections since the start.
    """

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.uploads = Uploads(self.blobs, self.manifests)
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.users: dict[str, str] = {}
        self.auth: str | None = None
        self.oauth = True
        self.identity_tokens: set[str] = set()
        self.tokens: set[str] = set()
        self.push_tokens: set[str] = set()
        self.token_lifetime: float | None = 300
        self.redirect = False
        self.redirect_status = 307
        self.redirect_to: str | None = None
        self.signature = "one"
        self.stale_status = 403
        self.stalled = trio.Event()
        self.connections = 0
        self.accepted = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.ports['registry']}"

    @property
    def storage_host(self) -> str:
        return f"127.0.0.1:{self.ports['storage']}"

    def add_blob(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.blobs[digest] = data
        return digest

    def add_manifest(self, repository: str, tag: str, media_type: str, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.manifests[repository, tag] = self.manifests[repository, digest] = (media_type, data)
        return digest

    def add_image(
        self, repository: str, tag: str, layers: list[bytes], **config: str
    ) -> oci.Descriptor:
        """An image of gzip layers made from these tars; returns its manifest's descriptor."""
        rootfs = {"type": "layers", "diff_ids": [Digest.of(tar) for tar in layers]}
        members = {"os": "linux", "architecture": "amd64", **config, "rootfs": rootfs}
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": self._descriptor(oci.OCI_CONFIG, json.dumps(members).encode()),
            "layers": [
                self._descriptor(oci.OCI_LAYER_GZIP, gzip.compress(tar, mtime=0)) for tar in layers
            ],
        }
        data = json.dumps(manifest).encode()
        digest = self.add_manifest(repository, tag, oci.OCI_MANIFEST, data)
        return oci.Descriptor(media_type=oci.OCI_MANIFEST, digest=digest, size=len(data))

    def requests(self, server: str | None = None, path: str = "") -> list[Request]:
        return [r for r in self.log if server in (None, r.server) and path in r.path]

    def _descriptor(self, media_type: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": self.add_blob(data), "size": len(data)}

    async def serve(self, server: str, stream: _Stream) -> None:
        """Answer requests on one connection, of trio.serve_tcp or of TLS, until it ends."""
        self.connections += 1
        self.accepted += 1
        buffer = bytearray()
        try:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                while (request := await _receive(server, stream, buffer)) is not None:
                    self.log.append(request)
                    if not await self._answer(request, stream):
                        break
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    def _fault(self, request: Request) -> Fault | None:
        for index, fault in enumerate(self.faults):
            if fault.server == request.server and fault.path in request.path:
                fault.times -= 1
                if fault.times <= 0:
                    del self.faults[index]
                return fault
        return None

    async def _answer(self, request: Request, stream: _Stream) -> bool:
        """Send one answer; False to end the connection."""
        fault = self._fault(request)
        if isinstance(fault, Hold):
            await fault.until.wait()
        if isinstance(fault, Status):
            reply = _Reply(fault.status, dict(fault.headers), fault.body)
        else:
            reply = getattr(self, f"_{request.server}")(request)
            if reply.status == 200 and request.path.rpartition("/")[2] in self.blobs:
                how = fault.how if isinstance(fault, Ranges) else "honour"
                reply = _ranged(reply, request.range, how)
        if isinstance(fault, Headers):
            reply.headers.update(fault.headers)
        request.status = reply.status
        after, how = (fault.after, fault.how) if isinstance(fault, Break) else (None, "")
        if after is None or after >= 0:
            head = f"HTTP/1.1 {reply.status} Scripted\r\nContent-Length: {len(reply.body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
            body = memoryview(reply.body)[:after] if request.method != "HEAD" else b""
            await stream.send_all(head.encode() + b"\r\n")
            for start in range(0, len(body), 1 << 20):
                # Counted before it is sent, as the client may look at the log at once.
                request.sent += len(body[start : start + (1 << 20)])
                await stream.send_all(body[start : start + (1 << 20)])
        if after is None:
            return True
        if how == "stall":
            self.stalled.set()
            # Until the client hangs up.
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
        if how == "reset":
            assert isinstance(stream, trio.SocketStream)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _registry(self, request: Request) -> _Reply:
        challenge = self._challenge(request)
        if challenge:
            return _Reply(401, {"WWW-Authenticate": challenge})
        match = re.fullmatch(r"/v2/(.+)/(blobs|manifests|referrers)/(.+)", request.path)
        if match is not None and (request.method in ("POST", "PUT") or match[2] == "referrers"):
            return _Reply(*self._upload(request, *match.groups()))
        if match is None:
            return _Reply(200 if request.path == "/v2/" else 404)
        repository, kind, name = match.groups()
        if kind == "manifests":
            found = self.manifests.get((repository, name))
            if found is None:
                return _unknown("MANIFEST_UNKNOWN")
            digest = Digest.of(found[1])
            headers = {"Content-Type": found[0], "Docker-Content-Digest": digest}
            return _Reply(200, headers | {"ETag": f'"{digest}"'}, found[1])
        if name not in self.blobs:
            return _unknown("BLOB_UNKNOWN")
        if self.redirect:
            url = self.redirect_to or (
                f"http://{self.storage_host}/store/{name}?signature={self.signature}"
            )
            return _Reply(self.redirect_status, {"Location": url})
        return _Reply(200, {}, self.blobs[name])

    def _upload(self, request: Request, repository: str, kind: str, name: str) -> UploadAnswer:
        if kind == "referrers":
            return self.uploads.referrers(repository, name, request.query)
        if kind == "manifests":
            return self.uploads.store(repository, name, request.headers, request.body)
        if request.method == "POST":
            return self.uploads.begin(self.host, repository)
        return self.uploads.finish(request.query, request.body)

    def _storage(self, request: Request) -> _Reply:
        if request.authorization:
            return _Reply(400, {}, b"Only one auth mechanism allowed")  # as S3 answers
        if request.query != f"signature={self.signature}":
            return _Reply(self.stale_status)
        return _Reply(200, {}, self.blobs[request.path.rpartition("/")[2]])

    def _challenge(self, request: Request) -> str | None:
        sent = request.authorization
        if self.auth == "basic" and _basic_user(sent, self.users) is None:
            return 'Basic realm="test"'
        writes = request.method in ("POST", "PUT")
        good = self.push_tokens if writes else self.tokens
        if self.auth == "bearer" and (sent or "").removeprefix("Bearer ") not in good:
            repository = re.sub(r"/(blobs|manifests|referrers)/.*", "", request.path)[4:]
            return (
                f'Bearer realm="http://127.0.0.1:{self.ports["token"]}/token",service="test, one",'
                f'scope="repository:{repository}:{"push,pull" if writes else "pull"}"'
            )
        return None

    def _token(self, request: Request) -> _Reply:
        if request.method == "POST":
            if not self.oauth:
                return _Reply(405)
            form = dict(urllib.parse.parse_qsl(request.body.decode()))
            known = form.get("refresh_token") in self.identity_tokens
            if form.get("grant_type") == "password":
                known = self.users.get(form["username"]) == form["password"]
        else:
            known = not self.users or _basic_user(request.authorization, self.users) is not None
        if not known:
            return _Reply(401)
        token = hashlib.sha256(str(len(self.log)).encode()).hexdigest()
        self.tokens.add(token)
        asked = urllib.parse.unquote_plus(f"{request.query}&{request.body.decode()}")
        if re.search(r"scope=[^&]*:\S*push", asked):
            self.push_tokens.add(token)
        answer: dict[str, Any] = {"access_token" if request.method == "POST" else "token": token}
        if self.token_lifetime is not None:
            answer["expires_in"] = self.token_lifetime
        return _Reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())


@contextlib.asynccontextmanager
async def faulty_registry() -> AsyncIterator[FaultyRegistry]:
    """Run a `FaultyRegistry` with its three servers on free loopback ports."""
    registry = FaultyRegistry()
    async with trio.open_nursery() as nursery:
        for server in ("registry", "storage", "token"):
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            registry.ports[server] = listeners[0].socket.getsockname()[1]
            handler = partial(registry.serve, server)
            nursery.start_soon(trio.serve_listeners, handler, listeners)
        yield registry
        nursery.cancel_scope.cancel()


def small_tar(**files: bytes) -> bytes:
    """A tar of regular files, for `FaultyRegistry.add_image`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


async def _receive(server: str, stream: _Stream, buffer: bytearray) -> Request | None:
    """The next request of a connection, or None at its end."""
    while b"\r\n\r\n" not in buffer:
        data = await stream.receive_some(65536)
        if not data:
            return None
        buffer += data
    head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(rest) < length:
        rest += await stream.receive_some(65536)
    buffer[:] = rest[length:]
    path, _, query = target.partition("?")
    return Request(server, method, path, query, headers, rest[:length])


def _ranged(reply: _Reply, value: str | None, how: str) -> _Reply:
    """The part of a body that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", value or "")
    size = len(reply.body)
    if match is None or how == "ignore" or (how == "ignore-suffix" and not match[1]):
        return reply
    if not match[1] and how == "suffix-501":
        return _Reply(501)
    if not match[1] and how == "suffix-prefix":
        match = re.fullmatch(r"(\d*)-(\d*)", f"0-{int(match[2]) - 1}")
        assert match is not None
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first >= size:
        return _Reply(416, {"Content-Range": f"bytes */{size}"})
    if how == "shift":
        first += 1
    if how == "short":
        last = first + (last - first) // 2
    headers = reply.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
    return _Reply(206, headers, reply.body[first : last + 1])


def _unknown(code: str) -> _Reply:
    body = {"errors": [{"code": code, "message": "not here", "detail": None}]}
    return _Reply(404, {"Content-Type": "application/json"}, json.dumps(body).encode())


def _basic_user(header: str | None, users: Mapping[str, str]) -> str | None:
    """The user that an Authorization header proves to be."""
    kind, _, value = (header or "").partition(" ")
    if kind != "Basic":
        return None
    name, _, password = base64.b64decode(value).decode().partition(":")
    return name if users.get(name) == password else None
