# SPDX-License-Identifier: Apache-2.0
"""The layout of the disk: each path that lazysnap uses, and what makes it survive a crash.

`Root` is the directory of all state, the option `--root`. Its properties are the only place where the
names in it are spelled out, but for `lazysnap.shard.keeper`, which imports nothing. Knows nothing of
what the files hold, and imports next to nothing, as processes that must start fast load it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

DEFAULT_ROOT = "/var/lib/lazysnap"
"""All of the daemon's state, if nothing else is configured."""
DEFAULT_STANDALONE_ROOT = "/var/lib/lazysnap-standalone"
"""All state of standalone mounts that root makes."""
DEFAULT_STORE_ROOT = "/var/lib/lazysnap-store"
"""All state of `lazysnap store`, if nothing else is given."""
DEFAULT_ADDRESS = "/run/lazysnap/lazysnap.sock"
"""Where the daemon serves containerd, if nothing else is configured."""
CONTAINERD_ADDRESS = "/run/containerd/containerd.sock"
"""Where containerd serves its clients."""

INDEX_TAIL = ".tail"
"""Suffix of files beside an index, see `CacheDirectory.tail`."""
_LOCK_SUFFIX = ".lock"


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """The layout of the cache.

    Nothing in it is needed for what is true, as all can be fetched or made again. Files are written
    under another name (`...new-<pid>...`) and renamed when they are complete.

    Attributes:
        path: of the directory.
    """

    path: str

    @property
    def indexes(self) -> str:
        """The directory of all indexes."""
        return os.path.join(self.path, "index")

    def index(self, name: str) -> str:
        """The index of a layer, see `lazysnap.index.codec`; its checksum tells whether it is complete.

        Args:
            name: of the layer, see `lazysnap.layers.identity`.
        """
        return os.path.join(self.indexes, name)

    def tail(self, name: str) -> str:
        """Bytes of members that came along with the table of contents, see `lazysnap.layers.blob_tail`.

        Not synced: a digest in it tells whether it is complete.

        Args:
            name: of the layer's index; without that, the bytes are of no use.
        """
        return self.index(name) + INDEX_TAIL

    @property
    def trees(self) -> str:
        """EROFS images of layers' trees, `<index>.<version>`, without the bytes of files.

        A checksum at the end of each tells whether it is complete.
        """
        return os.path.join(self.path, "trees")

    @property
    def objects(self) -> str:
        """Complete contents of files, `<aa>/<digest>`, which the kernel reads by itself.

        Synced together every few seconds and then sealed by their modification time; what is not sealed
        is verified before it is used, see `lazysnap.cache.objects`.
        """
        return os.path.join(self.path, "objects")

    @property
    def aside(self) -> str:
        """Likewise, but out of the kernel's sight: to be verified, or on purpose."""
        return os.path.join(self.path, "aside")

    @property
    def partial(self) -> str:
        """Chunks of files that are not complete, `<key>.data` and `<key>.map`.

        The digest of each chunk is checked when it is read after a restart.
        """
        return os.path.join(self.path, "partial")

    @property
    def boot(self) -> str:
        """After which boot the objects were looked at; without it, they are looked at again."""
        return os.path.join(self.path, "boot")

    @property
    def usage(self) -> str:
        """What the contents take, added up by all processes; only a hint, which is counted anew."""
        return os.path.join(self.path, "usage")

    @property
    def evicted(self) -> str:
        """Empty; its modification time is when something was evicted last."""
        return os.path.join(self.path, "evicted")


@dataclass(frozen=True, slots=True)
class Root:
    """The layout of a root.

    Attributes:
        path: of the directory; absolute, and without links wherever it is compared with mounts.
    """

    path: str

    @property
    def database(self) -> str:
        """Snapshots, labels, layers, slots and reasons (SQLite, WAL, synchronous=FULL).

        It is the truth: what it does not know of snapshots, slots and mounts is removed at the next start.
        """
        return os.path.join(self.path, "metadata.db")

    @property
    def lock(self) -> str:
        """Held (flock) by the one daemon or standalone command that uses the root; never removed."""
        return os.path.join(self.path, "lock")

    @property
    def daemon_facts(self) -> str:
        """Process id, version and socket of the daemon, for `lazysnap check`.

        They count as long as the lock is held.
        """
        return os.path.join(self.path, "daemon.json")

    @property
    def daemon_socket(self) -> str:
        """Where `lazysnap pull` has the daemon pull; replaced at each start."""
        return os.path.join(self.path, "daemon.sock")

    # -- snapshots ----------------------------------------------------------------------------------

    @property
    def snapshots(self) -> str:
        """The directories of all snapshots.

        One is built as `new-*`, gets its number by a rename that is synced, and loses it by a rename to
        `rm-*`. So what has a number is complete, and the rest is removed at the next start.
        """
        return os.path.join(self.path, "snapshots")

    def snapshot(self, number: int) -> str:
        """The directories `fs` and `work` of a snapshot, see `lazysnap.overlay`.

        `fs` of a lazy layer is a mount: of the image of its tree, or a bind of its slot's directory.
        """
        return os.path.join(self.snapshots, str(number))

    @property
    def merged(self) -> str:
        """Where images are mounted that the kernel composes."""
        return os.path.join(self.path, "merged")

    def merged_slot(self, slot: int) -> str:
        """A read-only overlay of an image, by the slot of its uppermost lazy layer.

        A mount: when it is gone, it is made again.
        """
        return os.path.join(self.merged, str(slot))

    # -- shards -------------------------------------------------------------------------------------

    @property
    def shards(self) -> str:
        """The mount points of shards, and the files beside them."""
        return os.path.join(self.path, "shards")

    def shard(self, number: int) -> str:
        """Where the FUSE file system of a shard is mounted, as long as its keeper lives."""
        return os.path.join(self.shards, str(number))

    def shard_slot(self, number: int, slot: int) -> str:
        """The directory in a shard's file system that shows the layer of a slot."""
        return os.path.join(self.shard(number), str(slot))

    def shard_contents(self, number: int, slot: int) -> str:
        """The directory in a shard's file system with the contents of an image, by its uppermost slot."""
        return os.path.join(self.shard(number), "contents", str(slot))

    def shard_socket(self, number: int) -> str:
        """The control socket of a shard's worker; each worker replaces it."""
        return self.shard(number) + ".sock"

    def shard_lock(self, number: int) -> str:
        """Held (flock) by a shard's keeper, which leaves its process id in it; never removed."""
        return self.shard(number) + _LOCK_SUFFIX

    def shard_log(self, number: int) -> str:
        """What a shard's keeper and worker print; the one before, when it is long, is `.log.old`."""
        return self.shard(number) + ".log"

    def shard_numbers(self) -> list[int]:
        """Shards that have a lock file, running or not.

        Raises:
            OSError: they cannot be listed.
        """
        try:
            names = os.listdir(self.shards)
        except FileNotFoundError:
            return []
        found = [n.removesuffix(_LOCK_SUFFIX) for n in names if n.endswith(_LOCK_SUFFIX)]
        return [int(number) for number in found if number.isdecimal()]

    @property
    def shard_settings(self) -> str:
        """What workers have to know (msgpack), see `lazysnap.shard.settings`.

        Replaced by a rename; the daemon writes it at each start.
        """
        return os.path.join(self.shards, "settings")

    @property
    def shard_xattrs(self) -> str:
        """Empty; there if all shards serve extended attributes."""
        return os.path.join(self.shards, "xattrs")

    @property
    def slots(self) -> str:
        """The records of slots."""
        return os.path.join(self.path, "slots")

    def slot(self, slot: int) -> str:
        """Which layer a slot of a shard serves, and from where (msgpack); see `lazysnap.layers.slots`.

        Synced and renamed into place before its directory can be looked up. The database has it too, and
        it is written again if it is lost.
        """
        return os.path.join(self.slots, str(slot))

    # -- contents and profiles ----------------------------------------------------------------------

    @property
    def cache(self) -> CacheDirectory:
        """What was fetched and what was made of it."""
        return CacheDirectory(os.path.join(self.path, "cache"))

    @property
    def profiles(self) -> str:
        """The directory of start-up profiles."""
        return os.path.join(self.path, "profiles")

    def profile(self, manifest: str) -> str:
        """What an image read while it started; advice only. Synced and renamed into place.

        Args:
            manifest: its digest, in hexadecimal, without the algorithm.
        """
        return os.path.join(self.profiles, f"{manifest}.json")

    # -- lazysnap store -----------------------------------------------------------------------------

    @property
    def store_socket(self) -> str:
        """Where workers ask `lazysnap store`; replaced at each start."""
        return os.path.join(self.path, "store.sock")

    @property
    def store(self) -> str:
        """The link that clients are configured with; it leads to `store_layers`."""
        return os.path.join(self.path, "store")

    @property
    def store_layers(self) -> str:
        """The directory of the store in the one shard's file system."""
        return os.path.join(self.shard(0), "layers")

    @property
    def names(self) -> str:
        """What clients call slots: `<slot>` (msgpack), synced and renamed into place."""
        return os.path.join(self.path, "names")

    @property
    def storages(self) -> str:
        """Directories where clients keep their layers, one a line; appended to and synced."""
        return os.path.join(self.path, "storages")

    @property
    def nested(self) -> str:
        """Mount points `<slot>` of trees, until an overlay of each is mounted; emptied at each start."""
        return os.path.join(self.path, "trees")

    def nested_slot(self, slot: int) -> str:
        """The mount point of one of them; removed when the overlay is mounted."""
        return os.path.join(self.nested, str(slot))

    # -- standalone mounts --------------------------------------------------------------------------

    @property
    def standalone_mark(self) -> str:
        """Empty; there if the root is one of standalone mounts."""
        return os.path.join(self.path, "standalone")

    @property
    def empty(self) -> str:
        """An empty directory, which overlay gets as its second layer if there is only one."""
        return os.path.join(self.path, "empty")
