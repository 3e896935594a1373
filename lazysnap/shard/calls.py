# SPDX-License-Identifier: Apache-2.0
"""The calls of a worker's control socket: what they take and answer, declared once for both sides.

A worker is a `WorkerCalls`, and `handlers` serves it; `remote` is one whose methods send the call. On the
wire (`lazysnap.channel`) arguments and answers are the msgpack forms of the types here.

Both sides may be of different releases, see "Kept between releases" in `lazysnap.shard`: names and forms
stay as they are, fields and arguments that are added later have defaults, and fields that a reader does not
know are ignored. An argument that the caller leaves out is not sent, as an earlier worker may not know it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from types import NoneType
from typing import Any, NamedTuple, cast, get_type_hints

import msgspec

from lazysnap.channel import Handler
from lazysnap.errors import Internal
from lazysnap.fetch.trace import Told
from lazysnap.layers.slots import LayerOrigin
from lazysnap.metrics.counts import Sample
from lazysnap.prefetch.profile import Read

PackedReads = Sequence[Any]
"""The msgpack form of a list of `profile.Read`.

Nobody checks it before it is used: wrong advice must not make a call fail.
"""


class HealthState(StrEnum):
    """Whether a layer can be read."""

    LOCAL = "local"
    """All content is in the cache."""
    REACHABLE = "reachable"
    """The rest can be fetched."""
    DEGRADED = "degraded"
    """The rest cannot be fetched now."""
    UNREACHABLE = "unreachable"
    """Nothing is in the cache, and nothing can be fetched now."""
    FAILED = "failed"
    """Not even the tree can be served."""

    @property
    def usable(self) -> bool:
        """Whether some content can be read."""
        return self in (HealthState.LOCAL, HealthState.REACHABLE, HealthState.DEGRADED)


class Health(msgspec.Struct, frozen=True):
    """The health of one slot.

    Attributes:
        state: of its layer.
        detail: why it is not better; empty if there is nothing to say.
    """

    state: HealthState
    detail: str = ""


class Who(msgspec.Struct, frozen=True, kw_only=True):
    """The process that serves a shard.

    Attributes:
        pid: its process id.
        keeper: process id of its parent.
        version: its release.
        shard: number of the shard.
        uptime_seconds: how long it has served.
        requests: how many requests of each kind the kernel has made.
    """

    pid: int
    keeper: int
    version: str
    shard: int
    uptime_seconds: float = 0.0
    requests: dict[str, int] = {}


class Loaded(msgspec.Struct, frozen=True):
    """A slot that can be served.

    Attributes:
        nodes: how many files and directories its layer has.
    """

    nodes: int = 0


class LayerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a layer is local, what was fetched for it, and how that went.

    Attributes:
        slot: that shows the layer.
        shard: of the slot.
        layer: digest of the compressed blob.
        reference: image reference that the blob is fetched by.
        blob_bytes: size of the compressed blob.
        files: how many files have content.
        local_files: how many of them are in the cache.
        bytes: size of the content of all files.
        local_bytes: how much of it is in the cache.
        requests: how many were made for the layer.
        fetched_bytes: how much they brought.
        fetched_by_class: likewise by `Priority.label`.
        errors: how many requests and reads have failed.
        last_error: the last of these errors; empty if there was none.
        last_read_seconds_ago: None if nothing was read.
    """

    slot: int
    shard: int
    layer: str
    reference: str
    blob_bytes: int
    files: int
    local_files: int
    bytes: int
    local_bytes: int
    requests: int = 0
    fetched_bytes: int = 0
    fetched_by_class: dict[str, int] = {}
    errors: int = 0
    last_error: str = ""
    last_read_seconds_ago: float | None = None


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has counted since it was started.

    Attributes:
        process: differs from that of all other workers.
        started: when the worker was started, by time.monotonic().
        sample: what only grows.
        gauges: what does not, by the names of `metrics.families`.
    """

    process: str
    started: float
    sample: Sample
    gauges: dict[str, float] = {}


class WorkerCalls(ABC):
    """The calls of one worker."""

    @abstractmethod
    async def ping(self) -> Who:
        """Tell who serves the shard. The daemon asks this of workers of all releases."""

    @abstractmethod
    async def restart(self) -> None:
        """End soon, so that the keeper starts a worker of the release that is on disk.

        The daemon asks this of workers of all releases.
        """

    @abstractmethod
    async def expect(self, layer: LayerOrigin, reads: PackedReads = ()) -> None:
        """Begin to fetch ahead of a layer that no slot shows yet.

        Args:
            layer: its index, which is on disk, and where its bytes are.
            reads: as for `attach`.
        """

    @abstractmethod
    async def attach(self, slot: int, reads: PackedReads = (), reachable: bool = False) -> Loaded:
        """Load a slot, so that errors show now and not to a reader, and begin to fetch ahead.

        It may be called again for a slot that is loaded.

        Args:
            slot: whose record is on disk.
            reads: of a profile; without them the layer's landmark counts.
            reachable: the caller has just read from the blob, so it need not be probed soon.
        """

    @abstractmethod
    async def detach(self, slots: Sequence[int], reload: bool = False) -> None:
        """Let go of slots whose records are gone.

        Args:
            slots: which.
            reload: the records are there, and are read again when the slots are asked for.
        """

    @abstractmethod
    async def health(self, slots: Sequence[int]) -> dict[int, Health]:
        """Find out whether slots can be read, and why not."""

    @abstractmethod
    async def status(self, slots: Sequence[int] | None = None) -> list[LayerStatus]:
        """Tell numbers of slots, or of all that are loaded.

        Raises:
            LazysnapError: one of them cannot be loaded.
        """

    @abstractmethod
    async def metrics(self) -> Metrics:
        """Tell what the worker has counted."""

    @abstractmethod
    async def link(self, slot: int, node: int) -> None:
        """Fetch what loading a program or library reads, see `library_prefetch`.

        Args:
            slot: of the shard.
            node: of the file.
        """

    @abstractmethod
    async def drain(self, slots: Sequence[int]) -> None:
        """Begin to fetch all of some slots now; may be called again."""

    @abstractmethod
    async def record(self, slots: Sequence[int], since: float, fresh: bool = False) -> None:
        """Begin to note what is read, see `read_recording`.

        Args:
            slots: of the image.
            since: when the start began, by time.monotonic().
            fresh: have the kernel forget what it has, as reading that would not be seen.
        """

    @abstractmethod
    async def recorded(self, slots: Sequence[int], since: float) -> dict[str, list[Read]]:
        """End `record`; what was read, by layer digest.

        Args:
            slots: of the image.
            since: as it was given to `record`.

        Raises:
            FailedPrecondition: some of the slots were not recorded to the end.
        """

    @abstractmethod
    async def trace(self, slots: Sequence[int], since: float = 0.0) -> list[Told]:
        """Tell what was fetched for slots, and who waited, see `lazysnap.fetch.trace`.

        Args:
            slots: which.
            since: leave out what began before, by time.monotonic().
        """

    @abstractmethod
    async def reload(self) -> int:
        """Take up the settings that are on disk now; the worker's process id."""


Send = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Sends a call by its name with its arguments, and returns the answer; both are msgpack types."""


class _Call(NamedTuple):
    """A method of `WorkerCalls`, as far as the wire is concerned."""

    name: str
    signature: inspect.Signature
    types: Mapping[str, Any]
    answer: Any


def _declared(name: str) -> _Call:
    method = getattr(WorkerCalls, name)
    types = get_type_hints(method)
    answer = types.pop("return")
    return _Call(name, inspect.signature(method), types, answer)


_CALLS = [_declared(name) for name in sorted(WorkerCalls.__abstractmethods__)]


def handlers(calls: WorkerCalls) -> dict[str, Handler]:
    """What `channel.serve` is given for a worker."""

    def handler(call: _Call) -> Handler:
        method = getattr(calls, call.name)

        async def handle(**args: Any) -> Any:
            types = call.types
            given = {k: msgspec.convert(v, types[k]) if k in types else v for k, v in args.items()}
            return msgspec.to_builtins(await method(**given))

        return handle

    return {call.name: handler(call) for call in _CALLS}


def remote(send: Send) -> WorkerCalls:
    """The calls of another process.

    Their methods raise what `send` raises, and Internal if the answer is of an incompatible release.

    Args:
        send: carries a call to the process.
    """
    return cast(WorkerCalls, _Remote(send))


def _remote_method(call: _Call) -> Callable[..., Awaitable[Any]]:
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = call.signature.bind(self, *args, **kwargs).arguments
        packed = {key: msgspec.to_builtins(given[key]) for key in given if key != "self"}
        answer = await self.send(call.name, packed)
        if call.answer is NoneType:
            return None
        try:
            return msgspec.convert(answer, call.answer)
        except msgspec.ValidationError as error:
            raise Internal(f"the worker answers {call.name!r} in another form: {error}") from error

    return method


def _keep_send(self: Any, send: Send) -> None:
    self.send = send


_Remote = type(
    "_Remote",
    (WorkerCalls,),
    {"__init__": _keep_send, **{call.name: _remote_method(call) for call in _CALLS}},
)
