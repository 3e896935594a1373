# SPDX-License-Identifier: Apache-2.0
"""What `--help` and the completion of a shell say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lazysnap.cli import main


def _commands(group: click.Group, words: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{words}{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{name} ")


def test_everything_is_explained() -> None:
    for words, command in _commands(main):
        assert command.help, words
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (words, parameter.name)
        if isinstance(command, click.Group):  # no line of its list is cut off
            page = command.get_help(click.Context(command, terminal_width=80))
            _, _, listed = page.partition("Commands:\n")
            assert listed
            assert "..." not in listed, words


def test_bash_completes() -> None:
    """As docs/operating.md says."""
    bash = shutil.which("bash")
    assert bash is not None
    script = """
        eval "$(_LAZYSNAP_COMPLETE=bash_source lazysnap)"
        COMP_WORDS=(lazysnap cache pr) COMP_CWORD=2
        _lazysnap_completion lazysnap
        echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [bash, "--norc", "-euc", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "prune\n"
