# SPDX-License-Identifier: Apache-2.0
"""containerd's content store: blobs by digest, and writes that can be resumed.

`Writer` speaks the lock-step protocol of Content.Write (containerd
api/services/content/v1/content.proto and contrib of the same). A blob that is there already is
success, never an error. Invariant: whoever holds a writer holds the lock of its ref, and a writer
that is left without `commit` or `keep` aborts its ingest before it gives the lock back, so it cannot
take away what another client has begun. Does not know where the bytes come from.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from google.protobuf.empty_pb2 import Empty as _Empty
from google.protobuf.field_mask_pb2 import FieldMask

from lazysnap.containerd._pb import content_pb2 as pb
from lazysnap.containerd.connection import Connection, Exchange, labels_mask
from lazysnap.digest import Digest
from lazysnap.errors import (
    AlreadyExists,
    ContainerdError,
    DigestMismatch,
    FailedPrecondition,
    InvalidArgument,
    LazysnapError,
    NotFound,
    Unavailable,
)

_SERVICE = "containerd.services.content.v1.Content"

CHUNK = 4 << 20
"""Bytes per message: large against a round trip, small against containerd's limit of 16 MiB."""

_COMMIT_SECONDS = 600.0  # containerd syncs the blob to disk
_LOCKED_SECONDS = 3600.0
_CLEANUP_SECONDS = 10.0
_BUSY_SECONDS = 3.0  # a write this fresh is probably going on
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """A blob of the store: its digest, size in bytes, and labels."""

    digest: str
    size: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ingest:
    """A write that is not complete: its ref, and bytes so far and expected (0: unknown)."""

    ref: str
    offset: int
    total: int


class Content:
    """Client of the content service.

    Args:
        connection: an open connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def info(self, digest: str) -> ContentInfo:
        """What is known of a blob.

        Raises:
            NotFound: it is not in the store, or not in this namespace.
        """
        answer = await self._connection.unary(
            f"{_SERVICE}/Info",
            pb.InfoRequest(digest=digest),
            pb.InfoResponse,
            what=f"content {digest}",
        )
        return _info(answer.info)

    async def exists(self, digest: str) -> bool:
        """Whether a blob is in this namespace."""
        try:
            await self.info(digest)
        except NotFound:
            return False
        return True

    async def walk(self, *filters: str) -> list[ContentInfo]:
        """All blobs of the namespace that match one of the filters (containerd's syntax)."""
        answers = await self._connection.collect(
            f"{_SERVICE}/List",
            pb.ListContentRequest(filters=filters),
            pb.ListContentResponse,
            what="list of content",
        )
        return [_info(info) for answer in answers for info in answer.info]

    async def set_labels(self, digest: str, labels: Mapping[str, str]) -> None:
        """Set these labels of a blob and leave its others; an empty value removes one.

        Raises:
            NotFound: the blob is not there.
        """
        request = pb.UpdateRequest(
            info=pb.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=labels_mask(labels)),
        )
        await self._connection.unary(
            f"{_SERVICE}/Update", request, pb.UpdateResponse, what=f"labels of {digest}"
        )

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """A small blob, verified.

        Args:
            digest: of the blob.
            limit: bytes above which it is refused.

        Raises:
            NotFound: it is not there.
            InvalidArgument: it is larger than `limit`.
            DigestMismatch: the store holds other bytes.
        """
        info = await self.info(digest)
        if info.size > limit:
            raise InvalidArgument(f"content {digest} has {info.size} bytes, at most {limit} fit")
        answers = await self._connection.collect(
            f"{_SERVICE}/Read",
            pb.ReadContentRequest(digest=digest, size=info.size),
            pb.ReadContentResponse,
            what=f"content {digest}",
        )
        data = b"".join(answer.data for answer in answers)
        digest.verify(data, "blob in containerd's content store")
        return data

    async def delete(self, digest: str) -> None:
        """Remove a blob.

        Raises:
            NotFound: it is not there.
        """
        await self._connection.unary(
            f"{_SERVICE}/Delete",
            pb.DeleteContentRequest(digest=digest),
            _Empty,
            what=f"delete content {digest}",
        )

    async def ingests(self) -> list[Ingest]:
        """Writes that are not complete."""
        answer = await self._connection.unary(
            f"{_SERVICE}/ListStatuses",
            pb.ListStatusesRequest(),
            pb.ListStatusesResponse,
            what="list of ingests",
        )
        return [Ingest(status.ref, status.offset, status.total) for status in answer.statuses]

    async def abort(self, ref: str) -> None:
        """Throw away an incomplete write.

        Raises:
            NotFound: there is none under this ref.
        """
        for last in (False,) * 4 + (True,):
            try:
                await self._connection.unary(
                    f"{_SERVICE}/Abort", pb.AbortRequest(ref=ref), _Empty, what=f"abort {ref}"
                )
            except ContainerdError:
                # containerd notices in its own time that a stream was dropped, and writes a
                # timestamp into the directory that is being removed.
                if last:
                    raise
                await trio.sleep(_POLL_SECONDS)
            else:
                return

    async def write(self, ref: str, data: bytes, digest: str, labels: Mapping[str, str]) -> None:
        """Store a small blob, or set the labels of the one that is there.

        Args:
            ref: name of the write while it lasts.
            data: all bytes.
            digest: what containerd shall check them against.
            labels: those of the blob; if it exists they are added to its own.
        """
        try:
            async with self.writer(ref, digest, len(data)) as writer:
                # offset 0 also throws away what an earlier, incomplete write left
                await writer.write(data, offset=0)
                await writer.commit(labels)
        except AlreadyExists:
            await self.set_labels(digest, labels)

    @asynccontextmanager
    async def writer(self, ref: str, digest: str, size: int) -> AsyncIterator[Writer]:
        """Begin or resume a write; waits while another client writes under the same ref.

        Args:
            ref: name of the write while it lasts.
            digest: of the whole blob.
            size: of the whole blob in bytes.

        Raises:
            AlreadyExists: the blob is there; no bytes are needed.
            Unavailable: the ref stayed locked for an hour.
        """
        deadline = trio.current_time() + _LOCKED_SECONDS
        pause = 0.016
        while True:
            async with self._connection.exchange(
                f"{_SERVICE}/Write",
                pb.WriteContentRequest,
                pb.WriteContentResponse,
                what=f"write {ref}",
            ) as stream:
                try:
                    status = await stream.ask(
                        pb.WriteContentRequest(action=pb.STAT, ref=ref, total=size, expected=digest)
                    )
                except Unavailable:
                    if trio.current_time() > deadline:
                        raise
                else:
                    writer = Writer(
                        self, stream, ref=ref, digest=digest, size=size, offset=status.offset
                    )
                    async with _aborting(writer):
                        yield writer
                    return
            await self._wait_while_written(ref)
            await trio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - not a secret
            pause = min(2 * pause, 2.048)

    async def _wait_while_written(self, ref: str) -> None:
        # containerd waits for a locked ref within a transaction of its database (half a second,
        # metadata/content.go), which holds up everybody, so ask only when it may have become free.
        while True:
            try:
                answer = await self._connection.unary(
                    f"{_SERVICE}/Status",
                    pb.StatusRequest(ref=ref),
                    pb.StatusResponse,
                    what=f"write {ref}",
                )
            except NotFound:
                return
            # In the future: the clock was set back since.
            if abs(time.time() - answer.status.updated_at.seconds) > _BUSY_SECONDS:
                return
            await trio.sleep(_POLL_SECONDS)


class Writer:
    """An open write; `offset` is the number of bytes that containerd has."""

    def __init__(
        self,
        content: Content,
        stream: Exchange[pb.WriteContentRequest, pb.WriteContentResponse],
        *,
        ref: str,
        digest: str,
        size: int,
        offset: int,
    ) -> None:
        self._content = content
        self._stream = stream
        self.ref = ref
        self.digest = digest
        self.size = size
        self.offset = offset
        self.settled = False

    async def write(self, data: bytes | memoryview, *, offset: int | None = None) -> None:
        """Append bytes.

        Args:
            data: any number of them.
            offset: 0 to begin anew, None to go on at `self.offset`.
        """
        view = memoryview(data)
        position = self.offset if offset is None else offset
        for start in range(0, len(view) or 1, CHUNK):
            chunk = bytes(view[start : start + CHUNK])
            answer = await self._stream.ask(
                pb.WriteContentRequest(action=pb.WRITE, offset=position, data=chunk)
            )
            position += len(chunk)
            if answer.offset != position:
                raise FailedPrecondition(
                    f"write {self.ref}: containerd is at {answer.offset}, expected {position}"
                )
            self.offset = position

    async def restart(self) -> None:
        """Throw away the bytes that containerd has and go on from 0."""
        await self._stream.ask(pb.WriteContentRequest(action=pb.WRITE, offset=0))
        self.offset = 0

    async def commit(self, labels: Mapping[str, str]) -> None:
        """Make the blob visible; containerd checks size and digest.

        Raises:
            DigestMismatch: the bytes are not those of the digest.
        """
        request = pb.WriteContentRequest(
            action=pb.COMMIT,
            total=self.size,
            expected=self.digest,
            offset=self.offset,
            labels=labels,
        )
        try:
            await self._stream.ask(request, timeout=_COMMIT_SECONDS)
        except FailedPrecondition as error:
            raise DigestMismatch(str(error)) from error
        self.settled = True

    def keep(self) -> None:
        """Leave the incomplete write for a later resume."""
        self.settled = True


@asynccontextmanager
async def _aborting(writer: Writer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if not writer.settled:
            with (
                trio.move_on_after(_CLEANUP_SECONDS, shield=True),
                contextlib.suppress(LazysnapError),
            ):
                # While we still hold the lock: nobody else's bytes can be under this ref.
                await writer._content.abort(writer.ref)


def _info(info: pb.Info) -> ContentInfo:
    return ContentInfo(info.digest, info.size, dict(info.labels))
