# SPDX-License-Identifier: Apache-2.0
"""`lazysnap profile`: record, show, move and forget start-up profiles.

The form of earlier releases, without a subcommand, still works; see `profile_old_form`.
"""

from __future__ import annotations

import click

from lazysnap import log
from lazysnap.cli import profile_actions
from lazysnap.cli.profile_actions import Node, node_options, recording_options
from lazysnap.cli.profile_old_form import old_form

plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
image_argument = click.argument("image", metavar="IMAGE")


class _Group(click.Group):
    """The subcommands; what begins with anything else is the old form.

    `--` before an image that has the name of a subcommand makes it the old form, too.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self._is_old(args) and not (args[0] in ctx.help_option_names and len(args) == 1):
            args = ["--", *args]  # its options are not those of the group
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return ("", old_form, args) if self._is_old(args) else super().resolve_command(ctx, args)

    def _is_old(self, args: list[str]) -> bool:
        return bool(args) and args[0] not in self.commands


@click.group(cls=_Group)
def command() -> None:
    """Learn what an image reads while it starts, so that it is fetched first the next time.

    A node learns profiles by itself (see `learn_profiles` in the configuration). Record one on
    purpose, and push it to the registry or copy it as a file, to give it to nodes that have never
    run the image. IMAGE is the image's name in containerd.

    \b
    Examples:
      lazysnap profile record registry.example/app:1 -- app --version
      lazysnap profile push registry.example/app:1
    """
    log.setup("warning")


@command.command()
@image_argument
@click.argument("run", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@node_options
@recording_options
@json_option
def record(
    image: str, run: tuple[str, ...], node: Node, snapshotter: str, seconds: float, as_json: bool
) -> None:
    """Run CMD in a container of IMAGE, and record what it reads.

    Without CMD, the image's own command is run. What is recorded is joined with the profile that is
    already known. The image has to be pulled before, with lazy layers.

    \b
    Example:
      lazysnap profile record registry.example/app:1 -- app --version
    """
    found = profile_actions.find(node, image)
    profile = profile_actions.record(node, found, run, snapshotter=snapshotter, seconds=seconds)
    profile_actions.show(profile, as_json=as_json)


@command.command()
@image_argument
@node_options
@json_option
def show(image: str, node: Node, as_json: bool) -> None:
    """Show the profile of IMAGE: how many files and bytes of each layer.

    \b
    Example:
      lazysnap profile show registry.example/app:1 --json
    """
    profile_actions.show(profile_actions.known(node, image)[1], as_json=as_json)


@command.command()
@image_argument
@node_options
@plain_http_option
def push(image: str, node: Node, plain_http: bool) -> None:
    """Store the profile of IMAGE in the registry, beside the image.

    It becomes an OCI artifact that refers to the image's manifest. Nodes look for it when they pull
    the image (see `find_profiles` in the configuration).

    \b
    Example:
      lazysnap profile push registry.example/app:1
    """
    found, profile = profile_actions.known(node, image)
    profile_actions.push(found, profile, plain_http=plain_http)


@command.command()
@image_argument
@node_options
@plain_http_option
@json_option
def fetch(image: str, node: Node, plain_http: bool, as_json: bool) -> None:
    """Take the profiles of IMAGE that the registry has.

    They are joined with the profile that is already known.

    \b
    Example:
      lazysnap profile fetch registry.example/app:1
    """
    found = profile_actions.find(node, image)
    profile = profile_actions.fetch(node, found, plain_http=plain_http)
    profile_actions.show(profile, as_json=as_json)


@command.command("import", short_help="Take the profile of IMAGE from a file.")
@image_argument
@click.argument("file", type=click.Path(allow_dash=True))
@node_options
@json_option
def import_(image: str, file: str, node: Node, as_json: bool) -> None:
    """Take the profile of IMAGE from FILE, which `lazysnap profile export` has written.

    It is joined with the profile that is already known. The file must be of the same manifest. With -
    as FILE, the profile is read from standard input.

    \b
    Example:
      lazysnap profile import registry.example/app:1 app.json
    """
    found = profile_actions.find(node, image)
    profile_actions.show(profile_actions.import_(node, found, file), as_json=as_json)


@command.command(short_help="Write the profile of IMAGE to a file.")
@image_argument
@click.argument("file", type=click.Path(allow_dash=True))
@node_options
def export(image: str, file: str, node: Node) -> None:
    """Write the profile of IMAGE to FILE, for `lazysnap profile import` on another node.

    With - as FILE, the profile is written to standard output.

    \b
    Example:
      lazysnap profile export registry.example/app:1 app.json
    """
    profile_actions.export(profile_actions.known(node, image)[1], file)


@command.command()
@image_argument
@node_options
def forget(image: str, node: Node) -> None:
    """Remove the profile of IMAGE from this node.

    \b
    Example:
      lazysnap profile forget registry.example/app:1
    """
    if not profile_actions.forget(node, profile_actions.find(node, image)):
        click.echo(f"no profile of {image} was known", err=True)
