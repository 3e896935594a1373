# SPDX-License-Identifier: Apache-2.0
"""Learns what images read while they start, and has it fetched first the next time.

The first start of an image on this node is watched, if there is no profile of it yet. A later start, or a
pull after the image was removed, uses the profile. Nothing is learned from a start that was not watched to
its end, because a shard was replaced. Advice only: whatever goes wrong here is logged and changes nothing
else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import msgspec
import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.errors import LazysnapError
from lazysnap.layers.slots import SlotRecord
from lazysnap.prefetch.profile import Profile, from_reads
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.shard.calls import WorkerCalls
from lazysnap.shard.client import end_recording
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_CALL_SECONDS = 10.0
_JUST_TOLD_SECONDS = 60.0


class ProfileLearner:
    """Learns and applies profiles.

    Args:
        root: lazysnap's root directory.
        supervisor: of the shards that serve the layers.
        enabled: learn from starts; known profiles are used anyway.
        seconds: how long a start is watched.
    """

    def __init__(self, root: str, supervisor: Supervisor, *, enabled: bool, seconds: float) -> None:
        self._store = ProfileStore(root)
        self._supervisor = supervisor
        self._enabled = enabled
        self._seconds = seconds
        self._watching: dict[str, trio.Event] = {}
        self._watched: set[str] = set()
        self._told: dict[int, float] = {}  # when a shard was told what to fetch for a slot

    async def reads(self, record: SlotRecord) -> list[object]:
        """What to fetch ahead of a layer, from the profile of its image.

        Args:
            record: of the layer, which will be mounted.
        """
        profile = await self._find(record.manifest)
        if profile is None:
            return []
        now = trio.current_time()
        self._told = {s: t for s, t in self._told.items() if now - t < _JUST_TOLD_SECONDS}
        self._told[record.slot] = now
        return _reads(profile, record.layer_digest)

    async def early_reads(self, manifest: str, layer_digest: str) -> list[object]:
        """The same for a layer that has no slot yet; `reads` is called when it has one.

        Args:
            manifest: digest of the image's manifest.
            layer_digest: of the compressed blob.
        """
        profile = await self._find(manifest)
        return [] if profile is None else _reads(profile, layer_digest)

    async def _find(self, manifest: str) -> Profile | None:
        if not manifest:
            return None
        try:
            return await trio.to_thread.run_sync(self._store.find, manifest)
        except LazysnapError as error:
            _log.warning("profile not used", manifest=manifest, error=error)
            return None

    def watched(self, chain: Iterable[SlotRecord]) -> bool:
        """Whether a start of an image was watched to its end, since this process began."""
        return _manifest(chain) in self._watched

    def starts_again(self, chain: Iterable[SlotRecord]) -> None:
        """A container is about to start: end watching an earlier one of the same image.

        From now on the kernel may read by itself what is local. That is of more use to the second
        container than what else could be learned.
        """
        manifest = _manifest(chain)
        watching = self._watching.get(manifest)
        if watching is not None:
            watching.set()
            self._watched.add(manifest)

    async def started(self, chain: Sequence[SlotRecord]) -> None:
        """A container starts on these layers, nearest first; returns when watching has ended."""
        manifest = _manifest(chain)
        if not manifest or manifest in self._watching:
            return
        self._watching[manifest] = trio.Event()
        try:
            with advice(_log, "start not learned", level=logging.INFO, manifest=manifest):
                known = await self._find(manifest)
                if known is not None:
                    await self._apply(known, chain)
                elif self._enabled:
                    await self._watch(manifest, chain)
        finally:
            del self._watching[manifest]
            self._watched.add(manifest)

    async def _apply(self, profile: Profile, chain: Sequence[SlotRecord]) -> None:
        """Fetch what a start needs of layers that came with other images, or were evicted.

        If the start follows the pull, the bytes are on the way already. The shard would only lose time,
        while the container waits, if it had to look for each of them again.
        """
        now = trio.current_time()
        for record in chain:
            if now - self._told.pop(record.slot, float("-inf")) < _JUST_TOLD_SECONDS:
                continue
            if reads := profile.layers.get(record.layer_digest):
                packed = msgspec.to_builtins(reads)
                await self._worker(record.shard).attach(record.slot, packed)

    def _worker(self, shard: int) -> WorkerCalls:
        return self._supervisor.worker(shard, timeout=_CALL_SECONDS)

    async def _watch(self, manifest: str, chain: Sequence[SlotRecord]) -> None:
        by_shard: dict[int, list[int]] = {}
        for record in chain:
            by_shard.setdefault(record.shard, []).append(record.slot)
        since = time.monotonic()
        for shard, slots in by_shard.items():
            await self._worker(shard).record(slots, since)
        with trio.move_on_after(self._seconds):
            await self._watching[manifest].wait()
        layers = await end_recording(self._worker, by_shard, since)
        profile = from_reads(manifest, (), layers)
        if profile.layers:
            await trio.to_thread.run_sync(self._store.add, profile)
            _log.info("start learned", manifest=manifest, bytes=profile.size())


def _reads(profile: Profile, layer_digest: str) -> list[object]:
    builtins: list[object] = msgspec.to_builtins(profile.layers.get(layer_digest, []))
    return builtins


def _manifest(chain: Iterable[SlotRecord]) -> str:
    """The digest of an image's manifest, if a layer tells it."""
    return next((record.manifest for record in chain if record.manifest), "")
