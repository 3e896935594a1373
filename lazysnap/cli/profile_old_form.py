# SPDX-License-Identifier: Apache-2.0
"""The form of `lazysnap profile` that had no subcommands: IMAGE, options, and CMD behind `--`.

It is not in the help any more, but does what it did: the modes that its options name, in a fixed
order, and then it prints the profile. A line on standard error names the subcommands to use instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import click

from lazysnap.cli import profile_actions
from lazysnap.cli.profile_actions import Node, node_options, recording_options
from lazysnap.cli.profile_recording import LocalImage
from lazysnap.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class _Modes:
    """What the options ask for, in the order in which it is done."""

    forget: bool
    import_: str | None
    fetch: bool
    run: tuple[str, ...]
    push: bool
    export: str | None

    def instead(self, image: str) -> Iterator[str]:
        """The commands that do the same."""
        if self.forget:
            yield f"`lazysnap profile forget {image}`"
        if self.import_:
            yield f"`lazysnap profile import {image} {self.import_}`"
        if self.fetch:
            yield f"`lazysnap profile fetch {image}`"
        if self.run:
            yield f"`lazysnap profile record {image} -- {' '.join(self.run)}`"
        if self.push:
            yield f"`lazysnap profile push {image}`"
        if self.export:
            yield f"`lazysnap profile export {image} {self.export}`"


@click.command()
@click.argument("image", metavar="IMAGE")
@click.argument("run", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@node_options
@recording_options
@click.option("--export", "export", type=click.Path(), help="Write the profile to a file.")
@click.option("--import", "import_", type=click.Path(), help="Take the profile from a file.")
@click.option("--push", is_flag=True, help="Store the profile in the registry beside the image.")
@click.option("--fetch", is_flag=True, help="Take the profiles that the registry has.")
@click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry.")
@click.option("--forget", is_flag=True, help="Remove what is known of the image.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def old_form(
    image: str,
    run: tuple[str, ...],
    node: Node,
    snapshotter: str,
    seconds: float,
    export: str | None,
    import_: str | None,
    push: bool,
    fetch: bool,
    plain_http: bool,
    forget: bool,
    as_json: bool,
) -> None:
    """The old form of this command; use the subcommands of `lazysnap profile` instead."""
    modes = _Modes(forget=forget, import_=import_, fetch=fetch, run=run, push=push, export=export)
    _note(image, modes)
    found = _find(node, image)
    if forget:
        profile_actions.forget(node, found)
    if import_:
        profile_actions.import_(node, found, import_)
    if fetch:
        # As it was: a registry without a profile is no error if this node has one.
        with contextlib.suppress(NotFound):
            profile_actions.fetch(node, found, plain_http=plain_http)
    if run:
        profile_actions.record(node, found, run, snapshotter=snapshotter, seconds=seconds)
    try:
        profile = profile_actions.stored(node, found, image)
    except NotFound:
        if forget:
            return
        raise
    if push:
        profile_actions.push(found, profile, plain_http=plain_http)
    if export:
        profile_actions.export(profile, export)
    profile_actions.show(profile, as_json=as_json)


def _find(node: Node, image: str) -> LocalImage:
    try:
        return profile_actions.find(node, image)
    except NotFound as error:
        # A full name of an image has one of these. A word without may be a mistyped subcommand.
        if not set(image) & set("/:@"):
            error.hint = "`lazysnap profile --help` lists the subcommands"
        raise


def _note(image: str, modes: _Modes) -> None:
    instead = list(modes.instead(image)) or [f"`lazysnap profile show {image}`"]
    click.echo(f"note: this is the old form of {' and '.join(instead)}", err=True)
