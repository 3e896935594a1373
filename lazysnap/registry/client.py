# SPDX-License-Identifier: Apache-2.0
"""The client of container registries: manifests, small blobs, and parts of large ones.

Speaks the OCI distribution specification (spec.md, end-2 and end-3). Keeps nothing on disk; what
pushes is in `push` and `referrers`. Whatever it returns as `bytes` has been checked against a
digest, except what was asked for by tag; streams and ranges are checked by their readers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from lazysnap import log, oci
from lazysnap.credentials.docker_config import CredentialSource, standard
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, InvalidArgument, LazysnapError
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry.auth import Authenticator
from lazysnap.registry.blob import RemoteBlob, Tail
from lazysnap.registry.exchange import Call, Exchange
from lazysnap.registry.hosts import PULL, RESOLVE, HostTable, RegistrySettings
from lazysnap.registry.image import Image, Resolved, assemble
from lazysnap.registry.local import Layout, LocalBlob
from lazysnap.registry.retry import document_seconds, time_limit
from lazysnap.registry.statistics import Statistics
from lazysnap.registry.transport import Answer, Transport

_log = log.get(__name__)

ANY_DOCUMENT = ", ".join(
    (oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST, "*/*")
)
"""Accept header for whatever is under /manifests/."""

_MANIFESTS = 64
Stream = AbstractAsyncContextManager[AsyncIterator[bytes]]


class Blob(Protocol):
    """A blob that is read in parts: `RemoteBlob` of a registry, `LocalBlob` of a layout."""

    digest: Digest

    @property
    def size(self) -> int | None:
        """Size in bytes; None until it was given or learned."""

    @property
    def last_success(self) -> float | None:
        """When bytes last arrived, by time.monotonic(); None if never."""

    def note_success(self) -> None:
        """Remember that bytes can be had."""

    async def tail(self, length: int) -> Tail:
        """The last `length` bytes, and the size."""
        ...

    async def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`."""
        ...

    def read_stream(self, start: int, length: int) -> Stream:
        """Exactly `length` bytes from offset `start`, in pieces as they arrive."""
        ...

    def whole_stream(self, start: int = 0) -> Stream:
        """All bytes from offset `start`."""
        ...

    async def probe(self, seconds: float | None = None) -> None:
        """Check that bytes can be had."""


class Registry:
    """A client for all registries; an async context manager, used from one trio run.

    Args:
        settings: limits and hosts.
        credentials: where passwords come from; the files of docker and podman by default.
        hosts: the endpoints of hosts, if not the hosts themselves.

    Attributes:
        exchange: the way to send requests, for what is built upon this in this package.
    """

    def __init__(
        self,
        settings: RegistrySettings | None = None,
        credentials: CredentialSource | None = None,
        *,
        hosts: HostTable | None = None,
    ) -> None:
        settings = settings or RegistrySettings()
        credentials = credentials or standard(settings.helper_seconds)
        self._hosts = hosts or HostTable(settings)
        self._transport = Transport(settings)
        authenticator = Authenticator(self._transport, credentials)
        self.exchange = Exchange(settings, self._transport, authenticator, self._hosts)
        self._layouts: dict[Reference, Layout] = {}
        self._tag_locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._manifests: dict[Digest, oci.Manifest] = {}  # the one that was fetched last at the end
        self._manifest_locks: WeakValueDictionary[tuple[str, str, Digest], trio.Lock] = (
            WeakValueDictionary()
        )

    async def __aenter__(self) -> Registry:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._transport.aclose()

    def apply(self, settings: RegistrySettings) -> None:
        """Use other settings for what begins from now on.

        Connections that are open keep theirs, and so do the limits on their number.
        """
        self.exchange.outages.forget()  # with other settings it may work
        self._hosts.settings = settings
        self._transport.settings = settings
        self.exchange.settings = settings

    def allow_plain_http(self, host: str) -> None:
        """Speak plain HTTP to a host from now on, because the user asked for it."""
        self._hosts.allow_plain_http(host)

    def statistics(self) -> Statistics:
        """What was sent and received since the start, by host."""
        return self._transport.statistics()

    def tag_lock(self, reference: Reference) -> trio.Lock:
        """To be held by whoever reads a tag in order to change it, so that ours take turns."""
        return self._tag_locks.setdefault(reference.name, trio.Lock())

    async def manifest(
        self, reference: Reference, digest: Digest | None = None, *, hurried: bool = False
    ) -> tuple[oci.Descriptor, bytes]:
        """A manifest or index.

        Args:
            reference: by its digest, or its tag when it has none.
            digest: asked for instead, from the same repository.
            hurried: as for `blob`.

        Raises:
            RegistryNotFound: the registry does not have it.
            DigestMismatch: it is not what the digest promises.
            RegistryError: or another of its kinds.
        """
        if reference.is_local:
            layout = self._layout(reference)
            return await trio.to_thread.run_sync(layout.manifest, reference.tag, digest)
        digest = digest or reference.digest
        target = digest or reference.tag or "latest"
        what = f"manifest {reference.repository}{'@' if digest else ':'}{target}"
        call = Call(
            reference,
            f"manifests/{target}",
            what,
            headers={"Accept": ANY_DOCUMENT},
            capability=PULL if digest else RESOLVE,
            checked=digest is not None,
        )
        answer, data = await self.exchange.fetch(call, oci.MAX_DOCUMENT, hurried=hurried)
        if digest is not None:
            digest.verify(data, what)
        return self._describe(answer, data, digest, what), data

    async def image_manifest(
        self, reference: Reference, digest: Digest, *, hurried: bool = False
    ) -> oci.Manifest:
        """The manifest of an image for one platform, which is asked for again and again.

        Each is fetched once, however many ask for it, and those fetched last are remembered.

        Args:
            reference: any reference of its repository.
            digest: of the manifest.
            hurried: as for `blob`.

        Raises:
            FormatError: it is malformed, or an index.
            RegistryError: or one of its kinds.
        """
        # Not by the digest alone: another registry may be slow to send the same manifest.
        key = (reference.host, reference.repository, digest)
        async with self._manifest_locks.setdefault(key, trio.Lock()):
            found = self._manifests.get(digest)
            if found is None:
                _, data = await self.manifest(reference, digest, hurried=hurried)
                found = oci.parse_manifest(data)
                if len(self._manifests) >= _MANIFESTS:
                    del self._manifests[next(iter(self._manifests))]
                self._manifests[digest] = found
        return found

    async def fetch_image(
        self, reference: Reference, platform: Platform, resolved: Resolved | None = None
    ) -> Image:
        """The manifest for a platform with what leads to it, and its configuration.

        Args:
            reference: of the image.
            platform: to choose for where there is a choice.
            resolved: told the manifest as soon as it is known.

        Raises:
            RegistryNotFound: the registry does not have it, or nothing for the platform.
            FormatError, DigestMismatch: it is malformed or not what it should be.
            RegistryError: or another of its kinds.
        """

        async def read(descriptor: oci.Descriptor) -> bytes:
            if descriptor.is_index or descriptor.is_manifest:
                _, data = await self.manifest(reference, descriptor.digest)
                return data
            return await self.blob_bytes(reference, descriptor, oci.MAX_DOCUMENT)

        top = await self.manifest(reference)
        return await assemble(reference, platform, top, read, resolved)

    async def blob_bytes(
        self, reference: Reference, descriptor: oci.Descriptor, limit: int
    ) -> bytes:
        """All of a small blob, checked.

        Args:
            reference: any reference of its repository.
            descriptor: its digest and size.
            limit: most bytes to hold.

        Raises:
            FormatError: it is larger than `limit`.
            DigestMismatch: it is not what the digest promises.
            RegistryError: or one of its kinds.
        """
        if descriptor.size > limit:
            raise FormatError(
                f"blob {descriptor.digest} of {reference.repository} has {descriptor.size} bytes,"
                f" more than {limit}"
            )
        data = bytearray()
        what = f"blob of {reference.host}/{reference.repository}"
        seconds = document_seconds(self.exchange.settings.retry_seconds, descriptor.size)
        with time_limit(what, seconds):
            async with self.stream_blob(reference, descriptor.digest, descriptor.size) as stream:
                async for chunk in stream:
                    data += chunk
        descriptor.digest.verify(data, what)
        return bytes(data)

    def stream_blob(
        self,
        reference: Reference,
        digest: Digest,
        size: int,
        start: int = 0,
        *,
        hurried: bool = False,
    ) -> Stream:
        """All bytes of a blob from offset `start`; what is received is not checked.

        Continues after a broken connection where it stopped, and works with servers that do not
        support ranges.

        Returns:
            An async context manager that is its own async iterator of bytes.
        """
        return self.blob(reference, digest, size, hurried=hurried).whole_stream(start)

    def blob(
        self,
        reference: Reference,
        digest: Digest,
        size: int | None = None,
        *,
        hurried: bool = False,
        checked: bool = True,
    ) -> Blob:
        """A blob to be read in parts, wherever its image is.

        Keep it, as it remembers where it is served from.

        Args:
            reference: any reference of its repository.
            digest: of the blob.
            size: in bytes, if it is known.
            hurried: whoever reads it has something else to do if that fails: it fails soon if nothing
                comes, and at once if the registry has just failed for others.
            checked: whatever is read is checked against digests, so that it may come without TLS.

        Raises:
            InvalidArgument: the image is local, and the settings do not allow that.
        """
        if reference.is_local:
            return LocalBlob(self._layout(reference), digest, size)
        return RemoteBlob(self.exchange, reference, digest, size, hurried=hurried, checked=checked)

    def note_failure(self, reference: Reference, cause: str, *, since: float) -> None:
        """Note that a registry is too slow, so that hurried operations do not try it again for a while.

        Args:
            reference: of the repository.
            cause: what happened, for people.
            since: when the operation began, by trio's clock. Those that began together are one outage.
        """
        if not reference.is_local:
            self.exchange.outlook(reference).gave_up(since, cause, unreachable="")

    def _layout(self, reference: Reference) -> Layout:
        if not self.exchange.settings.local_layouts:
            raise InvalidArgument(f"{reference} is not in a registry")
        return self._layouts.setdefault(reference, Layout(reference))

    def _describe(
        self, answer: Answer, data: bytes, digest: Digest | None, what: str
    ) -> oci.Descriptor:
        """The descriptor of a manifest that was received."""
        actual = digest or Digest.of(data)
        claimed = answer.headers.get("docker-content-digest")
        if claimed and claimed.partition(":")[0] == actual.algorithm and claimed != actual:
            _log.warning("registry names another digest", what=what, claimed=claimed, actual=actual)
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in oci.MANIFEST_TYPES | oci.INDEX_TYPES:
            media_type = _own_type(data) or media_type
        return oci.Descriptor(media_type=media_type, digest=actual, size=len(data))


def _own_type(data: bytes) -> str:
    """The media type that a document gives itself, for servers that send another."""
    try:
        document = oci.parse_document(data)
    except LazysnapError:
        return ""
    fallback = oci.OCI_INDEX if isinstance(document, oci.Index) else oci.OCI_MANIFEST
    return document.media_type or fallback
