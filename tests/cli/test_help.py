# SPDX-License-Identifier: Apache-2.0
"""What `--help` and the completion of a shell say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lazysnap.cli import main
from tests.support.mentions import commands_in_lines


def _commands(group: click.Group, words: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{words}{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{words}{name} ")


def test_everything_is_explained() -> None:
    for words, command in _commands(main):
        assert command.help, words
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (words, parameter.name)
        if isinstance(command, click.Group):  # no line of its list is cut off
            context = click.Context(command, terminal_width=80, **main.context_settings)
            page = command.get_help(context)
            _, _, listed = page.partition("Commands:\n")
            assert listed
            assert "..." not in listed, words


def test_the_first_page_groups_all_commands() -> None:
    page = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    sections = re.findall(r"^(\w[^\n]*):\n((?:  \S.*\n)+)", page, re.MULTILINE)
    titles = [title for title, _ in sections if title != "Options"]
    assert titles == ["Daemons", "Images", "State and trouble"]
    listed = [
        line.split()[0]
        for title, lines in sections
        if title in titles
        for line in lines.splitlines()
    ]
    assert sorted(listed) == main.list_commands(click.Context(main))
    assert "Exit status: 0 success; 1 an error; 2 wrong use" in page
    assert all(len(line) <= 80 for line in page.splitlines())


@pytest.mark.parametrize("words", [words for words, _ in _commands(main)])
def test_every_page_has_an_example_of_its_own(words: str) -> None:
    done = CliRunner().invoke(main, [*words.split(), "-h"], terminal_width=100)
    assert done.exit_code == 0
    examples = list(commands_in_lines(done.output.partition("Example")[2].partition("\n\n")[0]))
    assert examples
    for example in examples:
        assert example.startswith(f"lazysnap {words}"), example


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["pul", "app"], "No such command 'pul'. Did you mean 'pull'?"),
        (["cache", "purge"], "No such command 'purge'. Did you mean 'prune'?"),
        (["config", "x"], "No such command 'x'. Known are: check, default, show."),
        (["pull"], "Missing argument 'REF'"),
        (["pull", "--jsn", "app"], "No such option '--jsn'"),
    ],
)
def test_wrong_use_says_what_is_right(words: list[str], advice: str) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert advice in done.stderr
    assert "--help' for help" in done.stderr or "-h' for help" in done.stderr


def test_bash_completes() -> None:
    """As docs/install.md says."""
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
