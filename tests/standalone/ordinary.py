# SPDX-License-Identifier: Apache-2.0
"""A scene of an ordinary user, in a mount namespace of its own where that user is known.

`way` tells how the user mounts: by `fusermount`, or in a user namespace that has one id or those of
/etc/subuid (`one id`, `many ids`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fixtures.processes import kill_leftovers
from tests.standalone.scene import TOP, Scene, mounts_below
from tests.support import tree
from tests.support.stack import wait_until

USER = 54321
FIRST_OTHER = 600_000
WAYS = ("fusermount", "one id", "many ids")
_NAMESPACE = {
    "one id": ("unshare", "--user", "--map-root-user", "--mount"),
    "many ids": ("unshare", "--user", "--map-root-user", "--map-auto", "--mount"),
}
# /dev/fuse is everybody's where udev is, and fusermount3 and newuidmap ask who a user is.
_SETUP = f"""
set -e
cd "$1"
mknod -m 666 fuse c 10 229
cp /etc/passwd passwd
echo "tester:x:{USER}:{USER}::$1/home:/bin/sh" >>passwd
echo "tester:{FIRST_OTHER}:65536" >subid
touch /etc/subuid /etc/subgid
mount --bind fuse /dev/fuse
mount --bind passwd /etc/passwd
mount --bind subid /etc/subuid
mount --bind subid /etc/subgid
echo ready
exec cat
"""
_READ_TREE = """
import pickle, sys
from tests.support import tree
sys.stdout.buffer.write(pickle.dumps(tree.read_tree(sys.argv[1])))
"""


class OrdinaryScene(Scene):
    """See the module.

    Args:
        directory: the user's.
        way: how it mounts.
        namespaces: a process in the scene's mount namespace.

    Attributes:
        as_root: words that begin a command of root there.
    """

    def __init__(self, directory: Path, way: str, namespaces: int) -> None:
        super().__init__(directory)
        self.root = directory / "home" / ".local" / "share" / "lazysnap"
        self.way = way
        self._namespaces = namespaces
        self.as_root = ["nsenter", "--target", str(namespaces), "--mount", "--"]
        user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
        self.environment = ["env", "-C", str(TOP), "-u", "XDG_DATA_HOME", f"HOME={directory}/home"]
        self.before = [*self.as_root, *user, *self.environment]

    def enter(self, namespaces: int) -> None:
        """Have commands run as root of a user namespace."""
        self._namespaces = namespaces
        words = ["nsenter", "--target", str(namespaces), "--user", "--mount", "--"]
        self.before = [*words, *self.environment]

    def command(self, name: str, *arguments: object) -> list[str]:
        """The words of a command, without --root."""
        words = super().command(name, *arguments)
        at = words.index("--root")
        return [*words[:at], *words[at + 2 :]]

    def new_point(self) -> Path:
        """Another mount point."""
        path = super().new_point()
        os.chown(path, USER, USER)
        return path

    def call(self, *words: object) -> bytes:
        """Run a program as the user; its output."""
        command = [*self.before, *(str(word) for word in words)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout

    def tree(self, path: Path) -> tree.Tree:
        """A tree as the user sees it."""
        found: tree.Tree = pickle.loads(self.call(sys.executable, "-c", _READ_TREE, path))
        return found

    def names(self, path: Path) -> list[str]:
        """What is in a directory."""
        return sorted(self.call("ls", "-A", path).decode().splitlines())

    def mounts(self) -> list[str]:
        """The mount points below the scene's directory."""
        return mounts_below(self.directory, self._namespaces)

    def owner(self, uid: int) -> int:
        """Who owns, as the user sees it, what belongs to a user or group in an image."""
        return {"fusermount": USER, "one id": 0, "many ids": uid}[self.way]


@contextlib.contextmanager
def _staying(words: list[str]) -> Iterator[int]:
    """A process that says when it is ready, and ends when this does; its number."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.communicate()


@contextlib.contextmanager
def ordinary_scene(way: str) -> Iterator[OrdinaryScene]:
    """A scene, and the end of everything in it.

    Args:
        way: see the module.
    """
    directory = Path(tempfile.mkdtemp(prefix="lazysnap-"))
    directory.chmod(0o755)
    own = ["unshare", "--mount", "--propagation", "private"]
    try:
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(_staying([*own, "sh", "-c", _SETUP, "sh", str(directory)]))
            it = OrdinaryScene(directory, way, inside)
            (directory / "home").mkdir()
            for path in (directory / "home", it.point):
                os.chown(path, USER, USER)
            if way in _NAMESPACE:
                script = ["sh", "-c", "echo ready; exec cat"]
                it.enter(stack.enter_context(_staying([*it.before, *_NAMESPACE[way], *script])))
            try:
                yield it
            finally:
                kill_leftovers(directory)
                wait_until(lambda: not it.processes())
    finally:
        shutil.rmtree(directory)
