# SPDX-License-Identifier: Apache-2.0
"""A group of commands that says which one was meant when a name is mistyped."""

from __future__ import annotations

import click


class Group(click.Group):
    """Like click's, but an unknown command is an error that names the nearest one."""

    def resolve_command(  # noqa: D102 - as in click
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib  # only for this error, as every command loads this module

            near = difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(known)}."
            ctx.fail(f"No such command {name!r}. {advice}")
        return super().resolve_command(ctx, args)
