# SPDX-License-Identifier: Apache-2.0
"""`lazysnap check`: options in, findings out. What is looked at stands in `lazysnap.check`.

Works whatever is down. Findings go to standard output, one line each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence

import click
import trio

from lazysnap import config_file, log, paths
from lazysnap.cache_settings import cache_limits
from lazysnap.check.everything import PROBES
from lazysnap.check.finding import Context, Finding, Level, failure
from lazysnap.check.running import exit_code, repair, run
from lazysnap.cli import interrupt
from lazysnap.cli.options import config_option, root_option
from lazysnap.config import Config
from lazysnap.errors import ConfigError
from lazysnap.reference import Reference
from lazysnap.registry.hosts import RegistrySettings


@click.command()
@config_option
@root_option
@click.option("--address", type=click.Path(), help="Socket of lazysnap serve.")
@click.option(
    "--containerd", default=paths.CONTAINERD_ADDRESS, envvar="CONTAINERD_ADDRESS", show_default=True,
    metavar="SOCKET", help="containerd's socket.",
)  # fmt: skip
@click.option(
    "--containerd-config", type=click.Path(),
    help="containerd's configuration file, if not the one that it runs with.",
)  # fmt: skip
@click.option("--image", metavar="REF", help="Also check which layers of this image would be lazy.")
@click.option("--fix", is_flag=True, help="Fix what can be fixed safely.")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    config_path: str | None,
    root: str | None,
    address: str | None,
    containerd: str,
    containerd_config: str | None,
    image: str | None,
    fix: bool,
    as_json: bool,
) -> None:
    """Look for whatever keeps lazysnap from working, and say what to do about it.

    Nothing is changed without --fix.

    Exit status: 0 all is well, 1 there are warnings, 2 something does not work.

    \b
    Examples:
      lazysnap check
      lazysnap check --image registry.example/app:1
    """
    log.setup("error")
    findings: list[Finding] = []
    try:
        settings = config_file.load(config_path)
    except ConfigError as error:
        settings = Config()
        findings.append(_config_failure(error))
    context = Context(
        root=os.path.realpath(root or settings.root),
        address=os.path.abspath(address or settings.address),
        containerd=containerd.removeprefix("unix://"),
        containerd_config=containerd_config,
        registry=RegistrySettings(plain_http_hosts=frozenset(settings.registry.plain_http_hosts)),
        cache=cache_limits(settings),
        lazy=settings.lazy.enabled,
        allow_unverified=settings.lazy.allow_unverified,
        image=None if image is None else Reference.parse(image),
    )

    async def work() -> list[Finding]:
        found = await run(context, PROBES)
        return await trio.to_thread.run_sync(repair, context, found) if fix else found

    findings += interrupt.run(work)
    click.echo(json.dumps(_as_json(findings), indent=2) if as_json else as_text(findings))
    ctx.exit(exit_code(findings))


def _config_failure(error: ConfigError) -> Finding:
    found = failure(error.message, "lazysnap serve does not start with it", error.hint or "")
    return Finding(found.level, found.summary, found.detail, found.hint, id="config")


def _as_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    keys = ("id", "level", "summary", "detail", "hint", "fixed")
    return [{key: str(getattr(finding, key)) for key in keys} for finding in findings]


def as_text(findings: Sequence[Finding]) -> str:
    """One line for each finding that is not `ok`, and a last one that counts them."""
    lines = [_line(finding) for finding in findings if finding.level is not Level.OK]
    levels = Counter(finding.level for finding in findings if not finding.fixed)
    counts = f"{levels[Level.FAILURE]} failures, {levels[Level.WARNING]} warnings"
    fixed = sum(bool(finding.fixed) for finding in findings)
    return "\n".join([*lines, counts + (f", {fixed} fixed" if fixed else "")])


def _line(finding: Finding) -> str:
    text = f"{finding.level:<8} {finding.id}: {finding.summary}"
    if finding.detail:
        text += f"; {finding.detail}"
    if finding.fixed:
        text += f" -- fixed: {finding.fixed}"
    elif finding.hint:
        text += f" -- {finding.hint}"
    # What registries and others say goes to a terminal: one line, and no control characters.
    return "".join(c if c.isprintable() else " " for c in text)
