# SPDX-License-Identifier: Apache-2.0
"""`lazysnap profile`: record, show, move and forget start-up profiles."""

from __future__ import annotations

import json
import platform as machine
from pathlib import Path

import click

from lazysnap import config, log, paths
from lazysnap.cli import interrupt, profile_recording
from lazysnap.cli.options import config_option, root_option
from lazysnap.containerd.client import Containerd
from lazysnap.errors import InvalidArgument, NotFound
from lazysnap.filesystem.profile_finder import fetch_profiles
from lazysnap.platforms import Platform
from lazysnap.prefetch.profile import ARTIFACT_TYPE, Profile, parse, serialize
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.reference import Reference
from lazysnap.registry import Registry, push_referrer


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("image", metavar="IMAGE")
@click.argument("run", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@click.option("--address", default=paths.CONTAINERD_ADDRESS, envvar="CONTAINERD_ADDRESS",
              show_default=True, metavar="SOCKET", help="containerd's socket.")  # fmt: skip
@click.option("--namespace", "-n", default="default", envvar="CONTAINERD_NAMESPACE",
              show_default=True, metavar="NAME", help="containerd's namespace.")  # fmt: skip
@click.option("--snapshotter", default="lazysnap", show_default=True, metavar="NAME",
              help="Name of the snapshotter in containerd's configuration.")  # fmt: skip
@config_option
@root_option
@click.option("--seconds", default=60.0, show_default=True, help="End the container after so long.")
@click.option("--export", "export", type=click.Path(), help="Write the profile to a file.")
@click.option("--import", "import_", type=click.Path(), help="Take the profile from a file.")
@click.option("--push", is_flag=True, help="Store the profile in the registry beside the image.")
@click.option("--fetch", is_flag=True, help="Take the profiles that the registry has.")
@click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry.")
@click.option("--forget", is_flag=True, help="Remove what is known of the image.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def command(
    image: str,
    run: tuple[str, ...],
    address: str,
    namespace: str,
    snapshotter: str,
    config_path: str | None,
    root: str | None,
    seconds: float,
    export: str | None,
    import_: str | None,
    push: bool,
    fetch: bool,
    plain_http: bool,
    forget: bool,
    as_json: bool,
) -> None:
    """Learn what IMAGE reads while CMD starts, so that it is fetched first the next time.

    With a command after `--` the command is run in a container, and what it reads is recorded and
    joined with what is known. Without one, the profile that is known is shown or moved.
    """
    log.setup("warning")
    directory = root or config.load(config_path).root
    store = ProfileStore(directory)
    ctr = ["ctr", "--address", address, "--namespace", namespace]

    async def find() -> profile_recording.LocalImage:
        async with Containerd(address, namespace) as containerd:
            here = Platform.parse(f"linux/{machine.machine()}")
            return await profile_recording.find_image(containerd, image, here)

    async def record(found: profile_recording.LocalImage) -> Profile:
        return await profile_recording.record(
            found, run, root=directory, ctr=ctr, snapshotter=snapshotter, seconds=seconds
        )

    found = interrupt.run(find)
    manifest = found.manifest.digest
    if forget:
        store.remove(manifest)
    if import_:
        store.add(_imported(import_, manifest))
    if fetch:
        for each in interrupt.run(lambda: _fetch(found, plain_http)):
            store.add(each)
    if run:
        store.add(interrupt.run(lambda: record(found)))
    profile = store.find(manifest)
    if profile is None:
        if forget:
            return
        raise NotFound(f"no profile of {image} is known", hint=f"lazysnap profile {image} -- CMD")
    if push:
        pushed = profile
        interrupt.run(lambda: _push(found, pushed, plain_http))
    if export:
        Path(export).write_bytes(serialize(profile))
    click.echo(serialize(profile).decode() if as_json else _as_text(profile))


async def _fetch(image: profile_recording.LocalImage, plain_http: bool) -> list[Profile]:
    reference = Reference.parse(image.name)
    async with Registry() as registry:
        if plain_http:
            registry.allow_plain_http(reference.host)
        return await fetch_profiles(registry, reference, image.manifest.digest)


async def _push(image: profile_recording.LocalImage, profile: Profile, plain_http: bool) -> None:
    reference = Reference.parse(image.name)
    async with Registry() as registry:
        if plain_http:
            registry.allow_plain_http(reference.host)
        await push_referrer(
            registry, reference, image.manifest, ARTIFACT_TYPE, serialize(profile), ARTIFACT_TYPE
        )


def _imported(path: str, manifest: str) -> Profile:
    try:
        profile = parse(Path(path).read_bytes())
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    if profile.manifest != manifest:
        raise InvalidArgument(f"{path} is of manifest {profile.manifest}, the image has {manifest}")
    return profile


def _as_text(profile: Profile) -> str:
    lines = [f"manifest {profile.manifest}"]
    if profile.command:
        lines.append(f"command {json.dumps(profile.command)}")
    for digest, reads in profile.layers.items():
        size = sum(read.length for read in reads)
        files = len({read.path for read in reads})
        lines.append(f"{digest[7:19]} {files:6} files {len(reads):6} ranges {size:12} bytes")
    return "\n".join(lines)
