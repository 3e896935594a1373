# SPDX-License-Identifier: Apache-2.0
"""A shard of its own: a real keeper and worker on a private root, without daemon and containerd.

with shard(tmp_path) as s:
    path = s.attach(layer)          # the directory that shows it
    s.registry.log                  # what the worker asked for
    s.call("restart")
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from fixtures.processes import accepts, kill_leftovers, unmount_below
from lazysnap import channel
from lazysnap.cache import Cache
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.layers.slots import SlotRecord, write_slot
from lazysnap.registry.hosts import RegistrySettings
from lazysnap.shard.settings import FIRST_XATTR_SHARD, ShardSettings, write_settings
from tests.support.indexes import toc_of
from tests.support.layers import Layer
from tests.support.registry import FaultyRegistry, faulty_registry
from tests.support.stack import wait_until

# A shard with extended attributes, as they are looked at.
NUMBER = FIRST_XATTR_SHARD


class Shard:
    """What `shard` yields.

    Attributes:
        root: lazysnap's root directory.
        mountpoint: of the shard.
        registry: has the blobs; runs in a thread of its own.
    """

    def __init__(self, root: Path, registry: FaultyRegistry) -> None:
        self.root = root
        self.mountpoint = root / "shards" / str(NUMBER)
        self.registry = registry
        self.process: subprocess.Popen[bytes] | None = None
        self._slots = 0

    @property
    def log(self) -> str:
        return (self.root.parent / "log").read_text()

    def start(self, python_path: Path | None = None) -> None:
        """Start the keeper; from another copy of the package if one is given."""
        environment = dict(os.environ)
        if python_path is not None:
            environment["PYTHONPATH"] = str(python_path)
        with (self.root.parent / "log").open("ab") as log:
            command = [sys.executable, "-P", "-m", "lazysnap.shard.keeper"]
            self.process = subprocess.Popen(
                [*command, "--root", str(self.root), "--number", str(NUMBER)],
                stdout=log,
                stderr=log,
                env=environment,
            )
        wait_until(lambda: self.ended() or accepts(self._socket))
        assert not self.ended(), self.log

    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    @property
    def _socket(self) -> Path:
        return self.mountpoint.with_suffix(".sock")

    def call(self, name: str, **args: Any) -> Any:
        """Call the worker."""

        async def main() -> Any:
            return await channel.call(str(self._socket), name, timeout=60, **args)

        return trio.run(main)

    def index_path(self, slot: int) -> Path:
        return self.root / "cache" / "index" / f"index{slot}"

    def expect(self, layer: Layer, reads: Sequence[Any] = ()) -> None:
        """Write the index of a layer, and tell of it; `attach` of the next layer has to be of this one."""
        self.call("expect", layer=self._origin(layer, self._slots + 1), reads=reads)

    def attach(self, layer: Layer, reads: Sequence[Any] = (), **fields: Any) -> Path:
        """Write index and slot of a layer, and attach it."""
        self._slots += 1
        slot = self._slots
        record = {"slot": slot, "shard": NUMBER, **self._origin(layer, slot)}
        write_slot(str(self.root), SlotRecord(**{**record, **fields}))
        if fields.get("shard", NUMBER) == NUMBER:
            self.call("attach", slot=slot, reads=reads)
        return self.mountpoint / str(slot)

    def _origin(self, layer: Layer, slot: int) -> dict[str, Any]:
        self.registry.add_blob(layer.blob)
        self.index_path(slot).write_bytes(encode(build(toc_of(layer))))
        return {
            "layer_digest": layer.digest,
            "index": f"index{slot}",
            "reference": f"{self.registry.host}/repo:tag",
            "blob_size": layer.size,
        }

    def pids(self) -> tuple[int, int]:
        """Keeper and worker."""
        who = self.call("ping")
        return who["keeper"], who["pid"]

    def wait_for_another_worker(self, than: int) -> None:
        wait_until(lambda: self._worker() not in (0, than))

    def _worker(self) -> int:
        try:
            return int(self.call("ping")["pid"])
        except Exception:
            return 0


@contextlib.contextmanager
def _registry() -> Iterator[FaultyRegistry]:
    """A `FaultyRegistry` for those who block: in a thread of its own."""
    started = threading.Event()
    found: list[tuple[FaultyRegistry, trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with faulty_registry() as server:
                found.append((server, trio.lowlevel.current_trio_token(), scope))
                started.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    started.wait(60)
    server, token, scope = found[0]
    try:
        yield server
    finally:
        token.run_sync_soon(scope.cancel)
        thread.join(60)


@contextlib.contextmanager
def shard(directory: Path, **settings: Any) -> Iterator[Shard]:
    """A running shard.

    Args:
        directory: an empty directory with a short path.
        settings: fields of `ShardSettings`.
    """
    root = directory / "r"
    root.mkdir()
    with _registry() as registry:
        registry_settings = RegistrySettings(
            plain_http_hosts=frozenset({registry.host}), retry_seconds=30
        )
        options = {"background": False, **settings}
        write_settings(str(root), ShardSettings(registry=registry_settings, **options))
        Cache(str(root / "cache"))
        it = Shard(root, registry)
        try:
            it.start()
            yield it
        finally:
            if it.process is not None:
                it.process.terminate()
                try:
                    it.process.wait(60)
                finally:
                    unmount_below(directory)
                    kill_leftovers(directory)
