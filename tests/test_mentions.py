# SPDX-License-Identifier: Apache-2.0
"""What texts name exists: commands and options in code and documents, links, anchors and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lazysnap.cli import main
from lazysnap.formats.location import CONVERT_HINT
from tests.support.mentions import (
    anchors,
    commands_in_lines,
    commands_in_markdown,
    commands_in_python,
    wrong_command,
    wrong_links,
    wrong_paths,
)

_TOP = Path(__file__).parent.parent
_DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "fixtures/**/*.md", "tests/**/*.md")
    for path in _TOP.glob(pattern)
)


def _names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(_TOP)) for path in paths]


def _commands(group: click.Group) -> Iterator[click.Command]:
    context = click.Context(group)
    yield group
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command)
        else:
            yield command


def test_the_code_names_commands_that_exist() -> None:
    mentions = [
        (path.relative_to(_TOP), text)
        for path in (_TOP / "lazysnap").rglob("*.py")
        for text in commands_in_python(path.read_text())
    ]
    assert len(mentions) > 30
    assert [(path, wrong) for path, text in mentions if (wrong := wrong_command(text, main))] == []


def test_examples_in_help_texts_can_be_run() -> None:
    texts = [f"{command.help}\n{command.epilog or ''}" for command in _commands(main)]
    examples = [example for text in texts for example in commands_in_lines(text)]
    assert [wrong for text in examples if (wrong := wrong_command(text, main))] == []


@pytest.mark.parametrize("name", _names(_DOCUMENTS))
def test_documents_name_what_exists(name: str) -> None:
    path = _TOP / name
    text = path.read_text()
    wrong = [
        problem for words in commands_in_markdown(text) if (problem := wrong_command(words, main))
    ]
    assert wrong + wrong_links(path, text) + wrong_paths(text, _TOP) == []


@pytest.mark.parametrize(
    "name", _names([path for path in sorted((_TOP / "systemd").rglob("*")) if path.is_file()])
)
def test_units_run_commands_that_exist(name: str) -> None:
    text = (_TOP / name).read_text()
    mentions = [*commands_in_lines(text), *commands_in_markdown(text)]
    assert [wrong for words in mentions if (wrong := wrong_command(words, main))] == []
    assert name.endswith("lazysnap.service") <= bool(mentions)


def test_the_hint_to_convert_names_no_command_of_ours() -> None:
    assert list(commands_in_python(repr(CONVERT_HINT))) == []
    assert "image convert --estargz --oci" in CONVERT_HINT


# -- the checks themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "lazysnap convert",
        "lazysnap pull --no-such REF",
        "lazysnap pull --namespace NAME --jsn REF",
        "lazysnap cache vrify",
        "lazysnap cache prune --older DURATION",
        "lazysnap cache prune [--al]",
        "lazysnap serve REF",
        "lazysnap --nothing",
        "lazysnap says",
    ],
)
def test_a_wrong_command_is_found(text: str) -> None:
    assert text in wrong_command(text, main)


@pytest.mark.parametrize(
    "text",
    [
        "lazysnap --version",
        "lazysnap COMMAND --help",
        "lazysnap pull -n k8s.io --plain-http REF",
        "lazysnap cache --root DIR prune --older-than=36h --dry-run",
        "lazysnap cache prune [--all]",
        "lazysnap drain [IMAGE...]",
        "lazysnap status --json | jq .totals",
        "lazysnap serve # until SIGTERM",
        "lazysnap config default >FILE 2>&1",
    ],
)
def test_a_right_command_is_not(text: str) -> None:
    assert wrong_command(text, main) == ""


def test_commands_are_found_in_code() -> None:
    source = '''
def f(image, x):
    """Runs `lazysnap
    pull` at once; lazysnap says so."""
    return f"try `lazysnap drain {image}`" + "or `ctr run`" + "`lazysnap cache " "ls`"
'''
    found = list(commands_in_python(source))
    assert sorted(found) == ["lazysnap cache ls", "lazysnap drain VALUE", "lazysnap pull"]


def test_commands_are_found_in_documents() -> None:
    text = (
        "`lazysnap a`\n`x` lazysnap b\n\n    `lazysnap f`\n\n"
        "```sh\n$ lazysnap c \\\n  --d\nsudo lazysnap e\n# lazysnap\n```\n"
        "```\n\u2502\n  lazysnap g\n```\n"
    )
    assert [" ".join(found.split()) for found in commands_in_markdown(text)] == [
        "lazysnap a",
        "lazysnap c --d",
        "lazysnap e",
    ]
    assert list(commands_in_lines("ExecStart=-/opt/bin/lazysnap serve --x\nlazysnapd y\n")) == [
        "lazysnap serve --x"
    ]


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, two\n## `x` of *y*\n# One, two\n")
    text = (
        "# Here\n[a](other.md#one-two) [b](other.md#one-two-1) [c](#here) [d](https://x.org/#y)\n"
        "[e](none.md) [f](other.md#three) [g](#there)\n`[h](quoted.md)`\n```\n[i](code.md)\n```\n"
        "[j]: missing.md\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert anchors((tmp_path / "other.md").read_text()) == {"one-two", "x-of-y", "one-two-1"}
    assert wrong_links(tmp_path / "page.md", text) == [
        "page.md: there is no none.md",
        "page.md: other.md has no heading #three",
        "page.md: it has no heading #there",
        "page.md: there is no missing.md",
    ]


def test_files_that_are_not_there_are_found() -> None:
    right = (
        "`lazysnap/errors.py` `shard/worker.py` `worker.py` `lazysnap/shard/` `tests/*/conftest.py`"
        " `shard/{worker,keeper}.py` `tests/<folder>/conftest.py` `slots/<n>` `/etc/x.py/y`"
        " `tests/test_mentions.py::test_a_right_command_is_not` `python -m x.py` `cache/objects`"
    )
    assert wrong_paths(right, _TOP) == []
    bad = [
        "lazysnap/eroors.py",
        "shard/workr.py",
        "shard/{worker,kept}.py",
        "tests/none/",
        "tests/none*/x",
        "tests/test_mentions.py::test_nothing",
        "workr.py",
    ]
    text = "\n".join(f"`{name}`" for name in bad)
    assert wrong_paths(text, _TOP) == [f"there is no `{name}`" for name in bad]
