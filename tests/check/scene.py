# SPDX-License-Identifier: Apache-2.0
"""A root directory with a database, for probes to look at."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from lazysnap.check.finding import Context, Finding, Probe
from lazysnap.check.running import run
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.layers.slots import SlotRecord, write_slot
from lazysnap.overlay import Kind
from lazysnap.store.records import Attachment
from lazysnap.store.snapshots import SnapshotStore
from tests.support import layers
from tests.support.indexes import toc_of

LAYER = "sha256:" + "a" * 64


def context(directory: Path, **changes: Any) -> Context:
    """A context whose root is `directory/r`, where nothing else is."""
    base = Context(
        root=str(directory / "r"),
        address=str(directory / "l.sock"),
        containerd=str(directory / "c.sock"),
        containerd_config=str(directory / "containerd.toml"),
    )
    return replace(base, **changes)


async def look(ctx: Context, probes: Sequence[Probe], probe: str) -> list[Finding]:
    """What one of these probes finds that is not `ok`, run as the command runs it."""
    (chosen,) = [each for each in probes if each.id == probe]
    return [finding for finding in await run(ctx, [chosen]) if finding.level != "ok"]


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Scene:
    """A root as a daemon leaves it, with one ordinary snapshot.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self.context = context(directory)
        self.root = Path(self.context.root)
        for name in ("snapshots", "shards", "slots", "cache/index"):
            (self.root / name).mkdir(parents=True, mode=0o700)
        (self.root / "lock").touch(mode=0o600)
        self.store = SnapshotStore(self.context.paths.database)
        self.plain = self.snapshot("plain")

    def snapshot(self, key: str) -> int:
        """Make an ordinary snapshot with its directory."""
        with self.store.creating(Kind.ACTIVE, key) as number:
            (self.root / f"snapshots/{number}/fs").mkdir(parents=True)
        return number

    def lazy(self, name: str, reference: str = "127.0.0.1:1/r/x:t", layer: str = LAYER) -> int:
        """Make a lazy snapshot with its directory, slot and index, but no mount."""
        made = layers.estargz([])
        slot, layer = self.store.next_slot(), str(layer)  # msgspec encodes no subclasses of str
        record = SlotRecord(
            slot=slot,
            shard=0,
            layer_digest=layer,
            index="i",
            reference=reference,
            blob_size=made.size,
        )
        attachment = Attachment(slot, 0, layer, msgspec.msgpack.encode(record))
        with self.store.committing_remote(name, "", {}, attachment) as number:
            (self.root / f"snapshots/{number}/fs").mkdir(parents=True)
        write_slot(str(self.root), record)
        (self.root / "cache/index/i").write_bytes(encode(build(toc_of(made))))
        return number

    def say_serving(self) -> int:
        """Do what a daemon does to be taken for one, in this process; its descriptor of the lock."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        facts = {"pid": os.getpid(), "version": "1", "address": self.context.address}
        (self.root / "daemon.json").write_bytes(msgspec.json.encode(facts))
        return fd
