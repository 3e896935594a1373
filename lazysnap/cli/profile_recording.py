# SPDX-License-Identifier: Apache-2.0
"""Records a start-up profile on purpose: runs a command of an image, and notes what is read.

The image's layers must be mounted lazily on this node. The kernel's cached pages of them are dropped
first, as a read from there would not be seen. Talks to the shards' control sockets, not to the daemon.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from lazysnap import oci
from lazysnap.containerd.client import Containerd
from lazysnap.digest import Digest
from lazysnap.errors import FailedPrecondition, Internal, LazysnapError, NotFound
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot
from lazysnap.paths import Root
from lazysnap.platforms import Platform
from lazysnap.prefetch.profile import Profile, from_reads
from lazysnap.shard.calls import WorkerCalls
from lazysnap.shard.client import connect, end_recording

_DOCUMENT_LIMIT = 8 << 20
_CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image as containerd has it.

    Attributes:
        name: of the image.
        manifest: descriptor of the platform's manifest.
        layers: digests of its layers, bottom first.
    """

    name: str
    manifest: oci.Descriptor
    layers: tuple[Digest, ...]


async def find_image(containerd: Containerd, name: str, platform: Platform) -> LocalImage:
    """Look an image up.

    Raises:
        NotFound: containerd has no such image, or not its manifest.
    """
    image = await containerd.image(name)
    descriptor = oci.Descriptor(
        media_type=image.media_type, digest=Digest.parse(image.digest), size=image.size
    )
    document = await _document(containerd, descriptor)
    if isinstance(document, oci.Index):
        descriptor = document.choose(platform)
        document = await _document(containerd, descriptor)
    if isinstance(document, oci.Index):
        raise NotFound(f"{name} has an index in an index")
    return LocalImage(name, descriptor, tuple(layer.digest for layer in document.layers or ()))


async def _document(containerd: Containerd, descriptor: oci.Descriptor) -> oci.Manifest | oci.Index:
    data = await containerd.content.read(descriptor.digest, limit=_DOCUMENT_LIMIT)
    return oci.parse_document(data, descriptor.media_type)


async def record(
    image: LocalImage,
    command: Sequence[str],
    *,
    root: str,
    ctr: Sequence[str],
    snapshotter: str,
    seconds: float,
) -> Profile:
    """Run a command in a container and note what it reads of lazy layers.

    Args:
        image: whose layers are mounted.
        command: and its arguments; empty for the image's own.
        root: lazysnap's root directory.
        ctr: the `ctr` command with its global options.
        snapshotter: name of lazysnap in containerd's configuration.
        seconds: after so long the container is killed, and what was read until then counts.

    Raises:
        FailedPrecondition: no layer of the image is mounted lazily here.
        Internal: the container cannot be run, or fails.
    """
    shards = _shards(root, image)
    since = time.monotonic()
    try:
        for shard, slots in shards.items():
            await _worker(root, shard).record(slots, since, fresh=True)
        await _run(image.name, command, ctr, snapshotter, seconds)
    except BaseException:
        with trio.CancelScope(shield=True), contextlib.suppress(LazysnapError):
            await end_recording(partial(_worker, root), shards, since)
        raise
    layers = await end_recording(partial(_worker, root), shards, since)
    return from_reads(image.manifest.digest, command, layers)


def _shards(root: str, image: LocalImage) -> dict[int, list[int]]:
    """The slots that show the image's layers, by shard."""
    shards: dict[int, list[int]] = {}
    wanted = set(image.layers)
    for slot in list_slots(root):
        try:
            found: SlotRecord = read_slot(root, slot)
        except LazysnapError:
            continue
        if found.layer_digest in wanted:
            shards.setdefault(found.shard, []).append(slot)
    if not shards:
        raise FailedPrecondition(
            f"no layer of {image.name} is mounted lazily under {root}",
            hint="pull it with `lazysnap pull` first, and check --root",
        )
    return shards


def _worker(root: str, shard: int) -> WorkerCalls:
    return connect(Root(root).shard_socket(shard), timeout=_CALL_SECONDS)


async def _run(
    image: str, command: Sequence[str], ctr: Sequence[str], snapshotter: str, seconds: float
) -> None:
    name = f"lazysnap-profile-{uuid.uuid4().hex[:12]}"
    words = [*ctr, "run", "--rm", "--snapshotter", snapshotter, image, name, *command]
    done = None
    try:
        with trio.move_on_after(seconds):
            done = await trio.run_process(
                words,
                capture_stderr=True,
                stdout=subprocess.DEVNULL,
                check=False,
                deliver_cancel=_kill,
            )
    except OSError as error:
        raise Internal(f"cannot run {words[0]}: {error.strerror}") from error
    finally:
        if done is None:
            with trio.CancelScope(shield=True):
                for clean in (["tasks", "kill", "-s", "KILL", name], ["tasks", "rm", "-f", name]):
                    await _quietly([*ctr, *clean])
                await _quietly([*ctr, "containers", "rm", name])
                await _quietly([*ctr, "snapshots", "--snapshotter", snapshotter, "rm", name])
    if done is not None and done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise Internal(f"the container ended with exit status {done.returncode}: {said}")


async def _kill(process: trio.Process) -> None:
    # Not SIGTERM: ctr passes that on, and a container's first process may ignore it.
    process.kill()


async def _quietly(words: Sequence[str]) -> None:
    await trio.run_process(list(words), capture_stdout=True, capture_stderr=True, check=False)
