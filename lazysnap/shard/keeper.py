# SPDX-License-Identifier: Apache-2.0
"""The keeper of a shard: holds the FUSE session open and forks the worker that serves it.

Started by exec, as `python -m lazysnap.shard.keeper`. It mounts, lets pyfuse3 answer FUSE_INIT, and
never serves a request itself. A worker that dies is replaced, and the kernel is asked to send again
what was in flight, so that readers only wait. It is single-threaded and imports nothing of lazysnap
but the empty packages around this module: each worker imports the release that is on disk when it is
forked. It knows nothing of layers.

Invariant: as long as this process lives, /dev/fuse stays open, so the mount stays usable.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import traceback

import pyfuse3
import trio

# struct fuse_out_header of a notification (Linux include/uapi/linux/fuse.h): length, the notify code
# in place of the error, unique 0. FUSE_NOTIFY_RESEND = 7 exists since Linux 6.9.
_RESEND = struct.pack("<IiQ", 16, 7, 0)
_MNT_DETACH = 2
# What the worker exits with when the file system was unmounted: there is nothing left to serve.
# Kept between releases, see `lazysnap.shard`; the worker has it, too.
EXIT_UNMOUNTED = 0
# From the start of a worker to that of the next, by how many have ended soon one after the other.
_RESPAWN_DELAYS = (0.0, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_STABLE_SECONDS = 10.0
_LOCK_ATTEMPTS = 25
_NO_WORKER = 71 << 8
_MOST_LOG = 4 << 20


class Handshake(pyfuse3.Operations):
    """Operations that only notice that the kernel's FUSE_INIT has been answered.

    pyfuse3 keeps this object for the life of the session and looks up a handler as its attribute
    when a request comes in. A worker therefore sets its own handlers as attributes of its copy.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.answered = trio.Event()

    def init(self) -> None:
        """Called by pyfuse3 while it answers FUSE_INIT."""
        self.answered.set()


async def _answer_init(operations: Handshake) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await operations.answered.wait()
        # The reply is written right after init() returns, before the next checkpoint of main().
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


def _mount(mountpoint: str, *, writable: bool) -> Handshake:
    _unmount(mountpoint)
    os.makedirs(mountpoint, mode=0o755, exist_ok=True)
    operations = Handshake()
    options = {"fsname=lazysnap", "subtype=lazysnap", "default_permissions"}
    options.add("rw" if writable else "ro")
    if os.geteuid() == 0:  # for others, libfuse asks fusermount3, which refuses these
        # libfuse would add nosuid and nodev, which a bind mount of the tree would inherit.
        options |= {"allow_other", "suid", "dev"}
    pyfuse3.init(operations, mountpoint, options)
    trio.run(_answer_init, operations)
    return operations


def _unmount(mountpoint: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) == 0:
        pass
    if ctypes.get_errno() == errno.EPERM and os.geteuid() != 0:
        command = ["fusermount3", "-u", "-z", "-q", "--", mountpoint]
        with contextlib.suppress(OSError):
            while subprocess.run(command, check=False).returncode == 0:
                pass


def _tune(mountpoint: str, max_background: int, read_ahead_kib: int) -> None:
    """Let the kernel keep more requests in flight and read further ahead than its defaults."""
    # Not by stat(): nobody serves yet, so it would wait for ever.
    with open("/proc/self/mountinfo") as mounts:
        devices = [line.split()[2] for line in mounts if line.split()[4] == mountpoint]
    if not devices:
        return
    connection = devices[-1].partition(":")[2]
    settings = {
        f"/sys/fs/fuse/connections/{connection}/max_background": max_background,
        f"/sys/fs/fuse/connections/{connection}/congestion_threshold": max_background * 3 // 4,
        f"/sys/class/bdi/{devices[-1]}/read_ahead_kb": read_ahead_kib,
    }
    for path, value in settings.items():
        # Only a matter of speed; inside a container these files may be read-only.
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(value))


def _fuse_fd() -> int:
    """The descriptor of the session, which pyfuse3 does not tell."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
    raise RuntimeError("no open /dev/fuse in this process")


def _resend(fuse_fd: int) -> None:
    """Have the kernel queue again what a dead worker had read and not answered."""
    try:
        os.write(fuse_fd, _RESEND)
    except OSError as error:
        if error.errno == errno.EINVAL:
            _say("this kernel cannot resend (before 6.9)")
        else:  # unmounted meanwhile, most likely: then the next worker finds that out
            _say(f"requests in flight cannot be sent again: {error}")


def _serve_in_child(operations: Handshake, arguments: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")
    # What was imported with this module is of the release that the keeper was started from.
    for name in [n for n in sys.modules if n.partition(".")[0] == "lazysnap"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    from lazysnap.shard import worker  # after the fork: see the module's docstring

    # The worker may be of a later release, see "Kept between releases" in `lazysnap.shard`.
    status = worker.run(operations, root=arguments.root, number=arguments.number)
    os._exit(status)


class _Keeper:
    """Forks workers until the file system is unmounted or SIGTERM comes."""

    def __init__(self, arguments: argparse.Namespace, mountpoint: str) -> None:
        self.arguments = arguments
        self.mountpoint = mountpoint
        self.child = 0
        self.stopping = False
        self.fuse_fd = _fuse_fd()

    def stop(self, _signum: int, _frame: object) -> None:
        """SIGTERM: take the mount down; the worker ends because its session does."""
        self.stopping = True
        _unmount(self.mountpoint)
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGTERM)

    def run(self, operations: Handshake) -> int:
        """Keep one worker running; returns the exit status of the keeper."""
        failures = 0
        signal.signal(signal.SIGTERM, self.stop)
        while not self.stopping:
            started = time.monotonic()
            _resend(self.fuse_fd)
            status = self._run_worker(operations)
            code = os.waitstatus_to_exitcode(status)
            if code == EXIT_UNMOUNTED or self.stopping:
                return 0
            _say(f"worker ended with {code}, starting another")
            lived = time.monotonic() - started
            failures = 0 if lived > _STABLE_SECONDS else failures + 1
            time.sleep(pause(failures, lived))
        return 0

    def _run_worker(self, operations: Handshake) -> int:
        """Fork a worker and wait for its end; its wait status."""
        # SIGTERM must find either no child or one that it knows, and the child not our handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if self.stopping:
            return 0
        try:
            self.child = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            _say(f"cannot fork a worker: {error}")
            return _NO_WORKER
        if self.child == 0:
            try:
                _serve_in_child(operations, self.arguments)
            except BaseException:
                with contextlib.suppress(Exception):
                    traceback.print_exc()
            finally:
                os._exit(70)  # a child must never run the keeper's loop
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _, status = os.waitpid(self.child, 0)
        self.child = 0
        return status


def pause(failures: int, lived: float) -> float:
    """How long to wait before the next worker is forked, in seconds.

    One that cannot serve must not take all of a CPU by being started again and again. One that has
    served for a while and was killed, also repeatedly, is replaced at once: readers wait for it.

    Args:
        failures: how many workers have ended soon one after the other.
        lived: for how long the last one lived, in seconds.
    """
    return max(_RESPAWN_DELAYS[min(failures, len(_RESPAWN_DELAYS) - 1)] - lived, 0.0)


def _lock(path: str) -> bool:
    """Take the shard's lock for the life of this process and its workers; leave our id in it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # the daemon holds it for a moment when it looks whether we do
            continue
        os.ftruncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())
        return True
    return False


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"lazysnap-keeper: {message}", file=sys.stderr, flush=True)


def _detach_output(log: str) -> None:
    """Write to a file of our own if standard error is a terminal or a pipe.

    Those go away with whoever started the daemon, and a pipe that we hold open would keep its reader
    waiting for as long as the mount lives. The journal's socket and plain files stay.
    """
    mode = os.fstat(2).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(2)):
        return
    with contextlib.suppress(OSError):
        if os.stat(log).st_size > _MOST_LOG:
            os.rename(log, log + ".old")
    try:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _paths(root: str, number: int) -> tuple[str, str, str]:
    """Where a shard is mounted, its lock and its log."""
    # `lazysnap.paths` says the same. It is not imported, as nothing of lazysnap is, see above.
    mountpoint = os.path.join(root, "shards", str(number))
    return mountpoint, mountpoint + ".lock", mountpoint + ".log"


def main() -> int:
    """Entry point of `python -m lazysnap.shard.keeper`; a daemon of an earlier release starts it, too."""
    parser = argparse.ArgumentParser(prog="lazysnap-keeper")
    parser.add_argument("--root", required=True, help="directory of all of lazysnap's state")
    parser.add_argument("--number", required=True, type=int, help="number of this shard")
    parser.add_argument("--writable", action="store_true", help="let requests that write come")
    parser.add_argument("--max-background", type=int, default=64)
    parser.add_argument("--read-ahead-kib", type=int, default=1024)
    arguments = parser.parse_args()
    os.umask(0o022)
    mountpoint, lock, log = _paths(arguments.root, arguments.number)
    os.makedirs(os.path.dirname(mountpoint), mode=0o711, exist_ok=True)
    if not _lock(lock):
        _say(f"{mountpoint} has a keeper already")
        return 3
    _detach_output(log)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-999")
    operations = _mount(mountpoint, writable=arguments.writable)
    _tune(mountpoint, arguments.max_background, arguments.read_ahead_kib)
    gc.collect()
    gc.freeze()  # a collection in a worker would write to all objects, which it shares with us
    status = _Keeper(arguments, mountpoint).run(operations)
    _unmount(mountpoint)  # libfuse takes an aborted connection for unmounted
    with contextlib.suppress(Exception):
        pyfuse3.close(unmount=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
