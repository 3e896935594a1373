# SPDX-License-Identifier: Apache-2.0
"""Starts, finds, watches and repairs the shards, from the daemon.

Shards outlive the daemon, so it uses those that it finds running. Keepers are started by exec, in sessions
of their own, so that nothing that ends the daemon ends them. Knows slots, but not snapshots.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import trio

import lazysnap
from lazysnap import log, mounts
from lazysnap.errors import Internal, LazysnapError, Unavailable
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.paths import Root
from lazysnap.shard.calls import Who, WorkerCalls
from lazysnap.shard.client import connect
from lazysnap.shard.settings import FIRST_XATTR_SHARD

_log = log.get(__name__)
T = TypeVar("T")
_START_SECONDS = 30.0
_PING_SECONDS = 2.0
_WATCH_SECONDS = 5.0
_END_SECONDS = 2.0
# A worker that misses so many pings is stuck: it is killed, and its keeper starts another.
_STUCK_PINGS = 4


@dataclass
class _Shard:
    """What the supervisor knows of one shard."""

    number: int
    worker: int = 0
    silent_pings: int = 0
    slots: int = 0
    reserved: int = 0


class Supervisor:
    """All shards of a root.

    Args:
        root: lazysnap's root directory.
        count: how many shards new layers are spread over.
        max_background: FUSE requests that the kernel may have in flight.
        read_ahead_kib: how far the kernel reads ahead.
        slice_name: of systemd. Keepers are started in scopes of it, so that nothing that is done to
            the daemon's service is done to them. Empty: they stay in the daemon's control group.
        writable: the kernel sends requests that write; shards answer them with an error.
    """

    def __init__(
        self,
        root: str,
        count: int,
        *,
        max_background: int = 64,
        read_ahead_kib: int = 1024,
        slice_name: str = "",
        writable: bool = False,
    ) -> None:
        self.root = root
        self._paths = Root(root)
        self.count = count
        self._slice = slice_name
        self._keeper_options = [
            f"--max-background={max_background}",
            f"--read-ahead-kib={read_ahead_kib}",
            *(["--writable"] if writable else []),
        ]
        self._shards: dict[int, _Shard] = {}
        self._places: dict[str, list[int]] = {}
        self._starting: dict[int, trio.Lock] = {}

    def mountpoint(self, shard: int) -> str:
        """Where a shard's file system is mounted."""
        return self._paths.shard(shard)

    def directory(self, shard: int, slot: int) -> str:
        """The directory of a slot."""
        return self._paths.shard_slot(shard, slot)

    def choose(self, layer: str, *, xattrs: bool) -> int:
        """The shard for the next layer: one that has the layer already, or the one with the fewest.

        Args:
            layer: its digest. Slots of one layer share what they fetch if one process serves them.
            xattrs: it has extended attributes or opaque directories. The shard may have to be
                started first, see `ensure`.
        """
        first = FIRST_XATTR_SHARD if xattrs else 0
        numbers = range(first, first + self.count)
        for placed in self._places.get(layer, ()):
            if placed in numbers:
                return placed
        shards = [self._shards.setdefault(n, _Shard(n)) for n in numbers]
        return min(shards, key=lambda each: (each.slots + each.reserved, each.number)).number

    @contextlib.contextmanager
    def reserved(self, layer: str) -> Iterator[int]:
        """Reserve a shard for the next slot of a layer, unless that turns out to need xattrs.

        Args:
            layer: its digest.
        """
        shard = self.choose(layer, xattrs=False)
        self._shards[shard].reserved += 1
        self._places.setdefault(layer, []).append(shard)
        try:
            yield shard
        finally:
            self._shards[shard].reserved -= 1
            self._leave(layer, shard)

    def note(self, shard: int, layer: str) -> None:
        """Note that a shard has got a layer."""
        self._shards.setdefault(shard, _Shard(shard)).slots += 1
        self._places.setdefault(layer, []).append(shard)

    def note_gone(self, shard: int, layer: str) -> None:
        """Note that a shard has lost a layer."""
        self._shards.setdefault(shard, _Shard(shard)).slots -= 1
        self._leave(layer, shard)

    def _leave(self, layer: str, shard: int) -> None:
        places = self._places.get(layer, [])
        if shard in places:
            places.remove(shard)
        if not places:
            self._places.pop(layer, None)

    def layers(self) -> int:
        """How many layers all shards have together."""
        return sum(shard.slots for shard in self._shards.values())

    async def start(self, used: Iterable[int]) -> None:
        """Make sure that all shards run: those for new layers, and those that layers are on.

        One that does not start is logged, and tried again by `watch`.

        Args:
            used: numbers of shards that have layers.
        """

        async def one(number: int) -> None:
            try:
                await self.ensure(number)
            except LazysnapError as error:
                _log.error("shard does not start", shard=number, error=error)

        wanted = {*used, *range(self.count)}
        async with trio.open_nursery() as nursery:
            for number in wanted:
                nursery.start_soon(one, number)
            for number in self._found():
                if number not in wanted and self._kept(number):
                    _log.info("shard is not needed any more", shard=number)
                    nursery.start_soon(self._end, number)

    async def ensure(self, number: int) -> None:
        """Make sure that a shard runs and is of this release.

        Raises:
            Unavailable: it does not start.
        """
        async with self._starting.setdefault(number, trio.Lock()):
            if not self._kept(number):
                await self._start_keeper(number)
            who = await self._wait(number)
            # Both calls are kept between releases, see `lazysnap.shard`.
            if who.version != lazysnap.__version__:
                _log.info("worker of another release is replaced", shard=number, was=who.version)
                await self.worker(number).restart()
                counts.add(families.SHARD_RESTARTS, "release")
                await self._wait(number, not_pid=who.pid)

    def worker(self, shard: int, *, timeout: float = _PING_SECONDS) -> WorkerCalls:
        """The calls of a shard's worker; they wait for one that was just replaced.

        Args:
            shard: number.
            timeout: seconds until a call must have been answered.
        """
        return connect(self._socket(shard), timeout=timeout, patient=True)

    async def watch(self) -> None:
        """Look after all shards for ever.

        A shard that is mounted anew leaves stale bind mounts behind; they are found when their
        snapshots are checked.
        """
        while True:
            await trio.sleep(_WATCH_SECONDS)
            for shard in list(self._shards.values()):
                try:
                    await self._look_after(shard)
                except LazysnapError as error:
                    _log.error("shard cannot be brought back", shard=shard.number, error=error)

    async def _look_after(self, shard: _Shard) -> None:
        if not self._kept(shard.number) and not await self._answers(shard):
            _log.error("shard is gone, mounting it anew", shard=shard.number)
            counts.add(families.SHARD_RESTARTS, "gone")
            await self.ensure(shard.number)
            return
        if await self._answers(shard):
            shard.silent_pings = 0
            return
        shard.silent_pings += 1
        if shard.silent_pings >= _STUCK_PINGS and shard.worker:
            _log.error("worker does not answer, killing it", shard=shard.number, pid=shard.worker)
            self._signal(shard.number, shard.worker, signal.SIGKILL)
            counts.add(families.SHARD_RESTARTS, "stuck")
            shard.worker = 0
            shard.silent_pings = 0

    async def _answers(self, shard: _Shard) -> bool:
        try:
            who = await self.worker(shard.number).ping()
        except LazysnapError:
            return False
        if shard.worker not in (0, who.pid):
            _log.warning("worker was replaced", shard=shard.number, was=shard.worker)
            counts.add(families.SHARD_RESTARTS, "died")
        shard.worker = who.pid
        return True

    async def ask_all(
        self, ask: Callable[[WorkerCalls], Awaitable[T]], *, timeout: float = _PING_SECONDS
    ) -> dict[int, T | None]:
        """What all shards answer; None for one that does not, or answers an error.

        Args:
            ask: makes the call.
            timeout: longest wait, in seconds.
        """
        answers: dict[int, T | None] = {}

        async def one(number: int) -> None:
            try:
                answers[number] = await ask(self.worker(number, timeout=timeout))
            except LazysnapError as error:
                _log.debug("shard does not answer", shard=number, error=error)
                answers[number] = None

        async with trio.open_nursery() as nursery:
            for number in self._shards:
                nursery.start_soon(one, number)
        return answers

    async def stop(self) -> None:
        """Unmount all shards and wait until their processes have ended."""
        async with trio.open_nursery() as nursery:
            for number in {*self._shards, *self._found()}:
                nursery.start_soon(self._end, number)

    async def _end(self, number: int) -> None:
        """Unmount a shard and end its processes."""
        with contextlib.suppress(LazysnapError):
            await trio.to_thread.run_sync(mounts.unmount, self.mountpoint(number))
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if not self._kept(number):
                break
            self._signal(number, self._keeper(number), signal_number)
            with trio.move_on_after(_END_SECONDS / 2):
                while self._kept(number):
                    await trio.sleep(0.02)
            # The worker holds the lock, too, and without a keeper nothing else ends it.
            self._signal(number, self._shards[number].worker, signal_number)
            with trio.move_on_after(_END_SECONDS / 2):
                while self._kept(number):
                    await trio.sleep(0.02)
        if self._kept(number):
            _log.error("shard does not end", shard=number)

    def _found(self) -> list[int]:
        """As `Root.shard_numbers`; none if they cannot be listed."""
        try:
            return self._paths.shard_numbers()
        except OSError:
            return []

    def _signal(self, number: int, pid: int, signal_number: signal.Signals) -> None:
        """Send a signal to a shard's keeper or worker, but not to another process that has its id now."""
        if pid <= 0:
            return
        try:
            process = os.pidfd_open(pid)
        except OSError:
            return
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            # A worker is forked by its keeper and so has the same command line. It is kept between
            # releases, see `lazysnap.shard`.
            if {b"lazysnap.shard.keeper", os.fsencode(self.root), b"%d" % number} <= set(words):
                signal.pidfd_send_signal(process, signal_number)
        except OSError:
            pass  # it has ended
        finally:
            os.close(process)

    def _socket(self, number: int) -> str:
        return self._paths.shard_socket(number)

    def _keeper(self, number: int) -> int:
        """The process id that a keeper wrote to its lock file, or 0."""
        try:
            with open(self._paths.shard_lock(number)) as file:
                return int(file.read().strip() or 0)
        except (OSError, ValueError):
            return 0

    def _kept(self, number: int) -> bool:
        """Whether a keeper holds the shard's lock."""
        self._shards.setdefault(number, _Shard(number))
        try:
            fd = os.open(self._paths.shard_lock(number), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Internal(f"the lock of shard {number} cannot be opened: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    async def _start_keeper(self, number: int) -> None:
        command = [sys.executable, "-P", "-m", "lazysnap.shard.keeper", "--root", self.root]
        command += ["--number", str(number), *self._keeper_options]
        if self._slice:
            command = _in_scope(command, number, self._slice)
        # Not by trio: the keeper outlives this process, which never waits for it.
        try:
            await trio.to_thread.run_sync(_spawn, command)
        except (OSError, subprocess.SubprocessError) as error:
            raise Internal(f"the keeper of shard {number} cannot be started: {error}") from error

    async def _wait(self, number: int, *, not_pid: int = 0) -> Who:
        with trio.move_on_after(_START_SECONDS):
            while True:
                with contextlib.suppress(Unavailable):
                    who = await self.worker(number, timeout=0.5).ping()
                    if who.pid != not_pid:
                        self._shards[number].worker = who.pid
                        return who
                await trio.sleep(0.01)
        raise Unavailable(
            f"shard {number} does not start",
            hint="the log of the service has the keeper's messages; is /dev/fuse there?",
            reason="shard-down",
        )


def _in_scope(command: list[str], number: int, slice_name: str) -> list[str]:
    """The command line that runs a keeper in a scope (systemd.scope(5)) of its own.

    The name is never used again, as a scope can outlive its keeper for a moment.
    """
    name = f"lazysnap-shard-{number}-{secrets.token_hex(4)}.scope"
    scope = ["systemd-run", "--scope", "--collect", "--quiet"]
    return [*scope, f"--unit={name}", f"--slice={slice_name}", "--", *command]


def _spawn(command: list[str]) -> None:
    # A shell that ends at once makes the keeper init's child, so that it never is a zombie of ours.
    subprocess.run(
        # Somebody may read our output to its end, so the keeper must not keep that pipe open.
        ["/bin/sh", "-c", '"$@" </dev/null >&2 &', "sh", *command],
        check=True,
        start_new_session=True,
        cwd="/",  # where the daemon was started need not stay
    )
