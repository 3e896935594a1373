# SPDX-License-Identifier: Apache-2.0
"""Has the kernel serve the trees of layers, where it can, in front of what the shard shows.

On a layer's `diff` an overlay is mounted of the EROFS image of its tree and of where the bytes are (see
`lazysnap.filesystem.kernel_trees`). The client's overlay above has to see what the layer hides. Marks of
opaque directories can be handed on, but whiteouts only in a form that clients do not understand when they
compare layers; so a layer with whiteouts is left to the shard. Who does not see
the mount, in another mount namespace, sees what the shard shows, which is the same. So nothing here has
to succeed, and a mount may go: the kernel takes it away when a client removes the layer's directory, which
is how clients tell that they are done with it. All functions block.
"""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from collections.abc import Iterable

from lazysnap import log, mounts
from lazysnap.cache import Cache
from lazysnap.errors import FormatError, Internal, LazysnapError
from lazysnap.filesystem.kernel_trees import clean, merge_trees, mount_tree, why_not
from lazysnap.index.model import OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import read_slot
from lazysnap.layers.store_names import NamedLayer
from lazysnap.layers.tree_images import ensure_nested_tree, ensure_tree
from lazysnap.layers.view import open_index
from lazysnap.paths import Root
from lazysnap.shard import store_view
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
# of overlay's own attributes, which an overlay does not pass on
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")


class KernelTrees:
    """The mounts in front of layers.

    Args:
        cache: of the root.
        supervisor: of the one shard.
        enabled: try at all.
    """

    def __init__(self, cache: Cache, supervisor: Supervisor, *, enabled: bool) -> None:
        self._cache = cache
        self._root = Root(supervisor.root)
        self._unfit: set[int] = set()
        with contextlib.suppress(LazysnapError, OSError):  # the next start tries again
            clean(cache.root)
        problem = why_not(cache.root) if enabled else "it is switched off"
        self.possible = not problem
        if self.possible:
            cache.recover_after_boot()
        elif enabled:
            _log.info("the kernel cannot serve trees, the shard does", why=problem)

    def start(self) -> None:
        """Remove what a process left that was killed while it mounted something."""
        try:
            mounts.unmount_below(self._root.nested)
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(self._root.nested):
                    os.rmdir(os.path.join(self._root.nested, name))
        except (LazysnapError, OSError) as error:
            _log.warning("a mount is left", path=self._root.nested, error=error)

    def missing(self, layers: Iterable[NamedLayer]) -> list[NamedLayer]:
        """The layers whose trees could be mounted and are not."""
        if not self.possible:
            return []
        try:
            points = {point.path for point in mounts.mount_points()}
        except LazysnapError as error:  # e.g. there are no descriptors left
            _log.warning("the shard serves the trees", why=error)
            return []
        if self._root.shard(0) not in points:
            return []
        return [
            name
            for name in layers
            if name.slot not in self._unfit and self._path(name) not in points
        ]

    def show(self, name: NamedLayer) -> None:
        """Mount the tree of a layer, if that can be done."""
        try:
            self._show(name)
        except FormatError as error:  # e.g. an attribute that EROFS cannot hold
            self._unfit.add(name.slot)
            _log.info("the shard serves the tree", digest=name.digest, why=error)
        except LazysnapError as error:
            _log.warning("the shard serves the tree", digest=name.digest, why=error)

    def _show(self, name: NamedLayer) -> None:
        record = read_slot(self._root.path, name.slot)
        only_below, opaque = _marks(open_index(self._cache.paths.index(record.index)))
        if only_below:
            self._unfit.add(name.slot)
            return
        place = self._root.nested_slot(name.slot)
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
        except OSError as error:
            raise Internal(f"cannot make {place}: {error.strerror}") from error
        view = self._root.shard_contents(0, name.slot)
        try:
            tree = (ensure_nested_tree if opaque else ensure_tree)(self._cache, record.index)
            mount_tree(tree, place)
            data = [self._cache.objects.root, view]
            merge_trees([place], data, "lazysnap", self._path(name))
        finally:
            # The overlay holds what it needs.
            mounts.unmount(place)
            with contextlib.suppress(OSError):
                os.rmdir(place)

    def hide(self, name: NamedLayer) -> None:
        """Undo `show` for a layer.

        A path that has no mount is not looked up, as that can lead back to who asks for this.
        """
        self._unfit.discard(name.slot)
        path = self._path(name)
        try:
            if mounts.mounted_at(path) is not None:
                mounts.unmount(path)
        except LazysnapError as error:
            _log.debug("a tree stays mounted", digest=name.digest, error=error)

    def _path(self, name: NamedLayer) -> str:
        """The directory `diff` of a layer."""
        image = base64.b64encode(name.reference.encode()).decode()
        diff = os.fsdecode(store_view.DIFF_NAME)
        return os.path.join(self._root.store_layers, image, name.digest, diff)


def _marks(index: LayerIndex) -> tuple[bool, bool]:
    """Whether a layer has what no overlay hands on; and whether it has opaque directories."""
    opaque = False
    for node, row in enumerate(index.rows()):
        mode, place, flags = row[0], row[10], row[7]
        opaque = opaque or bool(flags & OPAQUE)
        if flags & WHITEOUT or (stat.S_ISCHR(mode) and index.attributes(node).rdev == 0):
            return True, opaque
        if place and any(key.startswith(_OVERLAY) for key, _ in index.xattrs(node)):
            return True, opaque
    return False, opaque
