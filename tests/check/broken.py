# SPDX-License-Identifier: Apache-2.0
"""Ways to break a set-up for real, each of which takes back what it did.

Each function is given a `Site` that is well, breaks one thing about it, and yields how `lazysnap check` is
to be called then. `BROKEN`, at the end, is the table of them with what the command has to say.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixtures.processes import alive
from lazysnap import mounts
from lazysnap.cache import Cache
from tests.support.filesystems import tmpfs
from tests.support.stack import Stack, wait_until

# The daemon's DOCKER_CONFIG, below the directory of the stack.
DOCKER_CONFIG = "docker"


@dataclass(frozen=True)
class Call:
    """How the command is called.

    Attributes:
        options: of `lazysnap check`, before those of the site, which they override.
        prefix: what runs the command.
    """

    options: Sequence[str] = ()
    prefix: Sequence[str] = ()


@dataclass(frozen=True)
class Site:
    """A stack that is well, with a lazy image that was pulled.

    Attributes:
        stack: the stack.
        reference: of the image.
        directory: for what a set-up needs; empty.
    """

    stack: Stack
    reference: str
    directory: Path

    @property
    def root(self) -> Path:
        return self.stack.lazysnap.root

    def containerd_config(self, change: Callable[[str], str]) -> Call:
        """A call with containerd's configuration, changed."""
        path = self.directory / "containerd.toml"
        path.write_text(change((self.stack.containerd.directory / "config.toml").read_text()))
        return Call(["--containerd-config", str(path)])


Breaks = Callable[[Site], contextlib.AbstractContextManager[Call]]


# -- the machine ------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_fuse(_: Site) -> Iterator[Call]:
    script = (
        "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9; "
        'exec "$@"'
    )
    yield Call(prefix=["unshare", "--mount", "sh", "-ec", script, "sh"])


@contextlib.contextmanager
def ordinary_user(_: Site) -> Iterator[Call]:
    """Root of a user namespace without the right to do anything outside."""
    yield Call(prefix=["unshare", "--user"])


@contextlib.contextmanager
def user_namespace(_: Site) -> Iterator[Call]:
    yield Call(prefix=["unshare", "--user", "--map-root-user"])


@contextlib.contextmanager
def full_disk(site: Site) -> Iterator[Call]:
    with tmpfs(site.directory / "disk", "size=1m") as root:
        with contextlib.suppress(OSError):
            (root / "filler").write_bytes(bytes(2 << 20))
        yield Call(["--root", str(root)])


@contextlib.contextmanager
def no_inodes(site: Site) -> Iterator[Call]:
    with tmpfs(site.directory / "disk", "size=64m,nr_inodes=100") as root:
        with contextlib.suppress(OSError):
            for number in range(100):
                (root / f"{number}").touch()
        yield Call(["--root", str(root)])


@contextlib.contextmanager
def root_on_overlay(site: Site) -> Iterator[Call]:
    names = [site.directory / name for name in ("lower", "upper", "work", "root")]
    for path in names:
        path.mkdir()
    lower, upper, work, root = names
    data = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounts.mount("overlay", str(root), "overlay", data=data)
    try:
        yield Call(["--root", str(root)])
    finally:
        mounts.unmount(str(root))


@contextlib.contextmanager
def snapshots_are_open(site: Site) -> Iterator[Call]:
    snapshots = site.root / "snapshots"
    mode = snapshots.stat().st_mode
    snapshots.chmod(0o755)
    try:
        yield Call()
    finally:
        snapshots.chmod(mode)


@contextlib.contextmanager
def unknown_key(site: Site) -> Iterator[Call]:
    path = site.directory / "config.toml"
    path.write_text("[fetch]\nconections = 3\n")
    yield Call(["--config", str(path)])


# -- containerd -------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_containerd(site: Site) -> Iterator[Call]:
    site.stack.containerd.stop()
    try:
        yield Call()
    finally:
        site.stack.containerd.start()


@contextlib.contextmanager
def wrong_address(site: Site) -> Iterator[Call]:
    address = str(site.stack.lazysnap.address)
    yield site.containerd_config(lambda text: text.replace(address, "/run/other.sock"))


@contextlib.contextmanager
def wrong_type(site: Site) -> Iterator[Call]:
    yield site.containerd_config(lambda text: text.replace('type = "snapshot"', 'type = "content"'))


@contextlib.contextmanager
def rebase(site: Site) -> Iterator[Call]:
    yield site.containerd_config(
        lambda text: text.replace(
            'type = "snapshot"', 'type = "snapshot"\ncapabilities = ["rebase"]'
        )
    )


@contextlib.contextmanager
def wrong_root(site: Site) -> Iterator[Call]:
    exports = '\n[proxy_plugins.lazysnap.exports]\nroot = "/elsewhere"\n'
    yield site.containerd_config(lambda text: text + exports)


@contextlib.contextmanager
def no_annotations(site: Site) -> Iterator[Call]:
    table = '\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "lazysnap"\n'
    disabled = '"io.containerd.grpc.v1.cri"'
    yield site.containerd_config(
        lambda text: text.replace(f"{disabled}, ", "").replace(disabled, "") + table
    )


@contextlib.contextmanager
def no_toml(site: Site) -> Iterator[Call]:
    yield site.containerd_config(lambda text: text + "\n[proxy_plugins.lazysnap\n")


@contextlib.contextmanager
def not_restarted(site: Site) -> Iterator[Call]:
    plugin = '[proxy_plugins."lazysnap"'
    yield site.containerd_config(lambda text: text.replace(plugin, '[proxy_plugins."changed"'))


# -- the daemon -------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_daemon(site: Site) -> Iterator[Call]:
    site.stack.lazysnap.stop()
    try:
        yield Call()
    finally:
        site.stack.start_daemon()


@contextlib.contextmanager
def socket_in_use(site: Site) -> Iterator[Call]:
    """Somebody else listens there, and says something that is no gRPC."""
    path = site.directory / "used.sock"
    with _listening(path, "c.send(b'220 mail ready\\r\\n')"):
        yield Call(["--address", str(path)])


@contextlib.contextmanager
def _listening(path: Path, says: str, *prefix: str) -> Iterator[None]:
    """A process that accepts connections at a socket, says something to each, and hangs up."""
    script = (
        "import contextlib, os, socket, sys\n"
        "path, s = sys.argv[1], socket.socket(socket.AF_UNIX)\n"
        "s.bind(path + '.new'); s.listen(); os.rename(path + '.new', path)\n"
        "while True:\n"
        f"  with s.accept()[0] as c, contextlib.suppress(OSError): {says}\n"
    )
    process = subprocess.Popen([*prefix, "/usr/bin/python3", "-c", script, str(path)])
    try:
        wait_until(path.exists)
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def another_socket(site: Site) -> Iterator[Call]:
    yield Call(["--address", str(site.directory / "none.sock")])


@contextlib.contextmanager
def another_root(site: Site) -> Iterator[Call]:
    (site.directory / "root").mkdir()
    yield Call(["--root", str(site.directory / "root")])


@contextlib.contextmanager
def another_mount_namespace(site: Site) -> Iterator[Call]:
    """As with PrivateTmp= in the unit of one of them."""
    path = site.directory / "c.sock"
    # For somebody who says nothing, and does not hang up, gRPC would wait twenty seconds.
    with _listening(path, "pass", "unshare", "--mount"):
        yield Call(["--containerd", str(path)])


# -- what is on the disk ----------------------------------------------------------------------------


@contextlib.contextmanager
def corrupt_database(site: Site) -> Iterator[Call]:
    site.stack.lazysnap.stop()
    database = site.root / "metadata.db"
    copy = site.directory / "metadata.db"
    shutil.copy2(database, copy)
    try:
        with database.open("r+b") as file:
            file.write(b"\xff" * 4096)
        yield Call()
    finally:
        shutil.copy2(copy, database)
        site.stack.start_daemon()


@contextlib.contextmanager
def lost_directory(site: Site) -> Iterator[Call]:
    """An operator who made room with rm."""
    key = f"lost-{os.urandom(4).hex()}"
    snapshots = site.stack.containerd.command("snapshots", "--snapshotter", "lazysnap")
    before = set((site.root / "snapshots").iterdir())
    subprocess.run([*snapshots, "prepare", key], check=True, capture_output=True)
    (made,) = set((site.root / "snapshots").iterdir()) - before
    aside = site.directory / "aside"
    shutil.move(made, aside)
    try:
        yield Call()
    finally:
        shutil.move(aside, made)
        subprocess.run([*snapshots, "rm", key], check=True, capture_output=True)


@contextlib.contextmanager
def stale_mount(site: Site) -> Iterator[Call]:
    """Of a snapshot that there is no more; it can be taken away only without a daemon."""
    site.stack.lazysnap.stop()
    path = site.root / "snapshots/4711/fs"
    path.mkdir(parents=True)
    mounts.bind(str(path), str(path))
    try:
        yield Call()
    finally:
        mounts.unmount_below(str(path.parent))
        shutil.rmtree(path.parent, ignore_errors=True)
        site.stack.start_daemon()


@contextlib.contextmanager
def leftovers(site: Site) -> Iterator[Call]:
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = site.root / f"shards/1.sock.{ended.pid}"
    path.touch()
    try:
        yield Call()
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def damaged_object(site: Site) -> Iterator[Call]:
    """In a cache that no worker looks after, as that would notice at once."""
    root = site.directory / "root"
    Cache(str(root / "cache")).objects.close()
    path = root / f"cache/objects/ab/{'ab' * 32}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"other bytes")
    yield Call(["--root", str(root)])


@contextlib.contextmanager
def lost_indexes(site: Site) -> Iterator[Call]:
    index = site.root / "cache/index"
    aside = site.directory / "index"
    shutil.copytree(index, aside)
    for path in index.iterdir():
        path.unlink()
    try:
        yield Call()
    finally:
        for path in aside.iterdir():
            shutil.copy2(path, index)


# -- registries -------------------------------------------------------------------------------------


def _registry(site: Site) -> int:
    """The process that listens at the registry's port."""
    command = ["ss", "-Hltnp", f"sport = :{site.stack.registry.port}"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(line.split("pid=")[1].split(",")[0])


@contextlib.contextmanager
def registry_down(site: Site) -> Iterator[Call]:
    """It accepts connections and says nothing."""
    pid = _registry(site)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield Call()
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def lost_blobs(site: Site) -> Iterator[Call]:
    blobs = site.stack.directory / "storage/docker/registry/v2/blobs"
    blobs.rename(site.directory / "blobs")
    try:
        yield Call()
    finally:
        (site.directory / "blobs").rename(blobs)


@contextlib.contextmanager
def expired_credential(site: Site) -> Iterator[Call]:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    token = f"{part({'alg': 'none'})}.{part({'exp': int(time.time()) - 60})}.c2ln"
    entry = {"auths": {site.stack.registry.host: {"registrytoken": token}}}
    config = site.stack.directory / DOCKER_CONFIG / "config.json"
    config.write_text(json.dumps(entry))
    try:
        yield Call()
    finally:
        config.unlink()


@contextlib.contextmanager
def unknown_image(site: Site) -> Iterator[Call]:
    yield Call(["--image", f"{site.stack.registry.host}/none:1"])


# -- shards: those that come after are of another start ----------------------------------------------


@contextlib.contextmanager
def hung_worker(site: Site) -> Iterator[Call]:
    """One that does not answer; a daemon would replace it."""
    worker = next(iter(site.stack.lazysnap.workers().values()))
    site.stack.lazysnap.stop()
    os.kill(worker, signal.SIGSTOP)
    try:
        yield Call()
    finally:
        os.kill(worker, signal.SIGCONT)
        site.stack.start_daemon()


@contextlib.contextmanager
def dead_keeper(site: Site) -> Iterator[Call]:
    lazysnap = site.stack.lazysnap
    keeper = next(iter(lazysnap.keepers().values()))
    worker = next(iter(lazysnap.workers().values()))
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not alive(keeper))
    try:
        yield Call()
    finally:
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not alive(worker))
        lazysnap.stop()
        site.stack.start_daemon()


@contextlib.contextmanager
def dead_shards(site: Site) -> Iterator[Call]:
    site.stack.lazysnap.stop()
    site.stack.lazysnap.kill_shards()
    try:
        yield Call()
    finally:
        site.stack.start_daemon()


@dataclass(frozen=True)
class Broken:
    """A broken set-up, and what the command has to say of it.

    Attributes:
        breaks: does it.
        probe: which probe finds it.
        exit_code: 1 or 2.
        cause: words of what is said to be wrong.
        cure: words of what is said to do.
        fix: whether `--fix` mends it.
    """

    breaks: Breaks
    probe: str
    exit_code: int
    cause: str
    cure: str
    fix: bool = False


BROKEN = (
    Broken(no_fuse, "fuse-device", 2, "there is no /dev/fuse", "modprobe fuse"),
    Broken(ordinary_user, "user", 2, "not running as root", "as root"),
    Broken(user_namespace, "overlay-options", 1, "in a user namespace", "first user namespace"),
    Broken(full_disk, "space", 2, "the disk is full", "free some space"),
    Broken(no_inodes, "space", 1, "inodes are free", "remove files"),
    Broken(root_on_overlay, "overlay", 2, "overlay does not work on the root's", "on ext4"),
    Broken(snapshots_are_open, "root", 1, "other users can enter", "chmod 0700"),
    Broken(unknown_key, "config", 2, "no key fetch.conections", "did you mean 'connections'"),
    Broken(no_containerd, "containerd", 2, "containerd", "start it"),
    Broken(wrong_address, "containerd-plugin", 2, "at /run/other.sock", "[proxy_plugins.lazysnap]"),
    Broken(wrong_type, "containerd-plugin", 2, "the type 'content'", 'type = "snapshot"'),
    Broken(rebase, "containerd-plugin", 2, "the capability rebase", "remove it"),
    Broken(wrong_root, "containerd-plugin", 1, "exports the root /elsewhere", "root = "),
    Broken(no_annotations, "containerd-cri", 2, "disable_snapshot_annotations", "set it to false"),
    Broken(no_toml, "containerd-plugin", 2, "containerd.toml", ""),
    Broken(not_restarted, "containerd-plugin", 2, "no snapshotter changed", "restart containerd"),
    Broken(no_daemon, "daemon", 2, "lazysnap serve", "start"),
    Broken(socket_in_use, "daemon", 2, "lazysnap serve", "restart"),
    Broken(another_socket, "daemon", 2, "listens at", "--address"),
    Broken(another_root, "daemon", 1, "does not serve", "--root"),
    Broken(another_mount_namespace, "mount-namespace", 2, "different mount namesp", "PrivateTmp="),
    Broken(corrupt_database, "database", 2, "metadata.db is damaged", ""),
    Broken(lost_directory, "snapshots", 2, "have no directory", "pull"),
    Broken(stale_mount, "unknown-mounts", 2, "belongs to no snapshot", "check --fix", fix=True),
    Broken(leftovers, "leftovers", 1, "1 files are left over", "--fix", fix=True),
    Broken(damaged_object, "cache-sample", 2, "is damaged", "cache verify --fix", fix=True),
    Broken(lost_indexes, "slots", 2, "the index of layer", "restart lazysnap serve"),
    Broken(expired_credential, "credentials", 2, "has expired", "docker login"),
    Broken(unknown_image, "image", 2, "none:1 cannot be read", "name"),
    Broken(hung_worker, "shards", 2, "does not answer", "lazysnap serve"),
    Broken(dead_keeper, "shards", 1, "no keeper", ""),
    Broken(dead_shards, "shards", 2, "no processes", "lazysnap serve"),
    Broken(registry_down, "registries", 2, "cannot be reached", "network"),
    Broken(lost_blobs, "registries", 2, "cannot be fetched", "credentials"),
)
