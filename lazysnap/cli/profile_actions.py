# SPDX-License-Identifier: Apache-2.0
"""What the subcommands of `lazysnap profile` do, and the options that they share.

The old form of the command does the same with them, see `profile_old_form`.
"""

from __future__ import annotations

import functools
import json
import platform as machine
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from lazysnap import config_file, paths
from lazysnap.cli import interrupt, profile_recording
from lazysnap.cli.options import config_option, root_option
from lazysnap.cli.profile_recording import LocalImage
from lazysnap.containerd.client import Containerd
from lazysnap.errors import InvalidArgument, NotFound
from lazysnap.filesystem.profile_finder import fetch_profiles
from lazysnap.platforms import Platform
from lazysnap.prefetch.profile import ARTIFACT_TYPE, Profile, parse, serialize
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.reference import Reference
from lazysnap.registry import Registry, push_referrer


@dataclass(frozen=True, slots=True)
class Node:
    """Where this node's images and profiles are.

    Attributes:
        root: lazysnap's root directory.
        address: containerd's socket.
        namespace: of containerd.
    """

    root: str
    address: str
    namespace: str

    @property
    def profiles(self) -> ProfileStore:
        """The profiles that this node has."""
        return ProfileStore(self.root)


def node_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that tell where the node's images and profiles are, as one argument `node`."""

    @functools.wraps(function)
    def with_node(
        address: str, namespace: str, config_path: str | None, root: str | None, **others: Any
    ) -> None:
        directory = root or config_file.load(config_path).root
        function(node=Node(directory, address, namespace), **others)

    options = (
        click.option("--address", default=paths.CONTAINERD_ADDRESS, envvar="CONTAINERD_ADDRESS",
                     show_default=True, metavar="SOCKET", help="containerd's socket."),
        click.option("--namespace", "-n", default="default", envvar="CONTAINERD_NAMESPACE",
                     show_default=True, metavar="NAME",
                     help="containerd's namespace; Kubernetes uses k8s.io."),
        config_option,
        root_option,
    )  # fmt: skip
    return functools.reduce(lambda made, option: option(made), reversed(options), with_node)


def recording_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that tell how a container is run."""
    snapshotter = click.option("--snapshotter", default="lazysnap", show_default=True,
                               metavar="NAME",
                               help="Name of lazysnap in containerd's configuration.")  # fmt: skip
    seconds = click.option("--seconds", default=60.0, show_default=True,
                           help="Kill the container after this time.")  # fmt: skip
    return snapshotter(seconds(function))


def find(node: Node, image: str) -> LocalImage:
    """An image that containerd has, for this machine's platform.

    Raises:
        NotFound: containerd does not have it.
    """

    async def ask() -> LocalImage:
        async with Containerd(node.address, node.namespace) as containerd:
            here = Platform.parse(f"linux/{machine.machine()}")
            return await profile_recording.find_image(containerd, image, here)

    return interrupt.run(ask)


def known(node: Node, image: str) -> tuple[LocalImage, Profile]:
    """An image and its profile.

    Raises:
        NotFound: containerd does not have the image, or the node has no profile of it.
    """
    found = find(node, image)
    return found, stored(node, found, image)


def stored(node: Node, found: LocalImage, image: str) -> Profile:
    """The profile of an image.

    Args:
        node: which has the profile.
        found: the image.
        image: its name, as the user wrote it.

    Raises:
        NotFound: the node has no profile of it.
    """
    profile = node.profiles.find(found.manifest.digest)
    if profile is None:
        raise NotFound(
            f"no profile of {image} is known",
            hint=f"record one with `lazysnap profile record {image} -- CMD`",
        )
    return profile


def record(
    node: Node, image: LocalImage, command: Sequence[str], *, snapshotter: str, seconds: float
) -> Profile:
    """Run a command of an image, and store what it reads.

    Args:
        node: which has the image.
        image: that is run.
        command: and its arguments; empty for the image's own.
        snapshotter: name of lazysnap in containerd's configuration.
        seconds: after which the container is killed.

    Returns:
        The profile, joined with what was known before.

    Raises:
        FailedPrecondition: no layer of the image is mounted lazily here.
        Internal: the container cannot be run, or fails.
    """
    ctr = ["ctr", "--address", node.address, "--namespace", node.namespace]

    async def work() -> Profile:
        return await profile_recording.record(
            image, command, root=node.root, ctr=ctr, snapshotter=snapshotter, seconds=seconds
        )

    return node.profiles.add(interrupt.run(work))


def push(image: LocalImage, profile: Profile, *, plain_http: bool) -> None:
    """Store a profile in the registry, beside its image.

    Raises:
        RegistryError: the registry does not take it.
    """
    reference = Reference.parse(image.name)

    async def work() -> None:
        async with Registry() as registry:
            if plain_http:
                registry.allow_plain_http(reference.host)
            await push_referrer(
                registry,
                reference,
                image.manifest,
                artifact_type=ARTIFACT_TYPE,
                payload=serialize(profile),
                payload_media_type=ARTIFACT_TYPE,
            )

    interrupt.run(work)


def fetch(node: Node, image: LocalImage, *, plain_http: bool) -> Profile:
    """Store the profiles that the registry has of an image.

    Returns:
        The profile, joined with what was known before.

    Raises:
        NotFound: the registry has none.
        RegistryError: the registry cannot be asked.
    """
    reference = Reference.parse(image.name)

    async def work() -> list[Profile]:
        async with Registry() as registry:
            if plain_http:
                registry.allow_plain_http(reference.host)
            return await fetch_profiles(registry, reference, image.manifest.digest)

    joined = None
    for profile in interrupt.run(work):
        joined = node.profiles.add(profile)
    if joined is None:
        raise NotFound(
            f"the registry has no profile of {image.name}",
            hint=f"push one with `lazysnap profile push {image.name}` from a node that has one",
        )
    return joined


def import_(node: Node, image: LocalImage, path: str) -> Profile:
    """Store a profile that is in a file.

    Args:
        node: that gets the profile.
        image: which it is of.
        path: of the file; `-` for standard input.

    Returns:
        The profile, joined with what was known before.

    Raises:
        InvalidArgument: the file cannot be read, or is of another image.
        FormatError: it holds no profile.
    """
    manifest = image.manifest.digest
    try:
        with click.open_file(path, "rb") as file:
            profile = parse(file.read())
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    if profile.manifest != manifest:
        raise InvalidArgument(f"{path} is of manifest {profile.manifest}, the image has {manifest}")
    return node.profiles.add(profile)


def export(profile: Profile, path: str) -> None:
    """Write a profile to a file.

    Args:
        profile: what is written.
        path: of the file; `-` for standard output.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    try:
        with click.open_file(path, "wb") as file:
            file.write(serialize(profile))
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from error


def forget(node: Node, image: LocalImage) -> bool:
    """Remove the profile of an image; whether there was one."""
    manifest = image.manifest.digest
    there = node.profiles.find(manifest) is not None
    node.profiles.remove(manifest)
    return there


def show(profile: Profile, *, as_json: bool) -> None:
    """Print a profile: a line for each layer, or as JSON."""
    click.echo(serialize(profile).decode() if as_json else _as_text(profile))


def _as_text(profile: Profile) -> str:
    lines = [f"manifest {profile.manifest}"]
    if profile.command:
        lines.append(f"command {json.dumps(profile.command)}")
    for digest, reads in profile.layers.items():
        size = sum(read.length for read in reads)
        files = len({read.path for read in reads})
        lines.append(f"{digest[7:19]} {files:6} files {len(reads):6} ranges {size:12} bytes")
    return "\n".join(lines)
