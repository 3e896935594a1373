# SPDX-License-Identifier: Apache-2.0
"""Finds in texts what they name of this project (commands, files, headings), and what is not there.

Commands are looked up in the real click commands, files on the disk, anchors in the headings of the
file that is linked to. Each check returns sentences about what is wrong, so that it can be tested itself.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

_PLACEHOLDER = "VALUE"
_FENCE = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n+)+")
_DRAWN = re.compile("[\u2190-\u25ff]")
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_PATH = re.compile(r"[\w.*<>{},-]+(?:/[\w.*<>{},-]+)*/?(?:::\w+)?")
_TOP_FOLDERS = ("docs", "fixtures", "lazysnap", "systemd", "tests")
_SHELL_END = re.compile(r"[0-9]?[|&;<>#].*")


# -- commands ---------------------------------------------------------------------------------------


def commands_in_python(source: str) -> Iterator[str]:
    """What the string literals of a module have in backquotes after the word `lazysnap`."""
    inner: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(value) for value in node.values}
            parts = [
                str(v.value) if isinstance(v, ast.Constant) else _PLACEHOLDER for v in node.values
            ]
            yield from _quoted("".join(parts))
        elif isinstance(node, ast.Constant) and id(node) not in inner:
            yield from _quoted(node.value if isinstance(node.value, str) else "")


def commands_in_markdown(text: str) -> Iterator[str]:
    """The same of a Markdown file, and the lines of its code blocks that start with `lazysnap`.

    Blocks with arrows and lines drawn are figures, and no code.
    """
    yield from _quoted(_prose(text))
    for block in _FENCE.finditer(text):
        if not _DRAWN.search(block[2]):
            yield from commands_in_lines(block[2])


def _prose(text: str) -> str:
    """A Markdown file without its code blocks."""
    return _INDENTED.sub("", _FENCE.sub("", text))


def commands_in_lines(text: str) -> Iterator[str]:
    """The lines that run `lazysnap`: of a shell, of a unit of systemd, or of a help text."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.fullmatch(
            r"\s*(?:\$ |sudo |ExecStart=[-@:+!]*)?(?:/\S*/)?(lazysnap \S.*)", line
        )
        if command:
            yield command[1]


def _quoted(text: str) -> Iterator[str]:
    for span in _SPAN.finditer(text):
        words = " ".join(span[1].split())
        if words.startswith("lazysnap "):
            yield words


def wrong_command(text: str, main: click.Group) -> str:
    """What is wrong with a command line that starts with `lazysnap`; empty if nothing is.

    Placeholders in capitals, and brackets around what may be left out, may be in it.
    """
    context = click.Context(main, **main.context_settings)
    command: click.Command = main
    # Brackets and the bars between alternatives are no words of the command line.
    words = _words(re.sub(r"[\[\]]|\.\.\.|(?<=\S)\|(?=-)", " ", text))
    at = 1
    while at < len(words) and words[at] != "--" and not _SHELL_END.fullmatch(words[at]):
        word = words[at]
        at += 1
        if word.startswith("-") and word != "-":
            name, equals, _ = word.partition("=")
            option = _option(command, context, name)
            if option is None:
                return f"`{text}`: {command.name} has no option {name}"
            if not (option.is_flag or option.count or equals):
                at += 1
        elif isinstance(command, click.Group):
            if word == "COMMAND":
                return ""
            if word not in command.list_commands(context):
                return f"`{text}`: there is no command {word}"
            found = command.get_command(context, word)
            assert found is not None
            command = found
        elif not any(isinstance(p, click.Argument) for p in command.params):
            return f"`{text}`: {command.name} takes no argument"
    return ""


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _option(command: click.Command, context: click.Context, name: str) -> click.Option | None:
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    return next((o for o in options if name in (*o.opts, *o.secondary_opts)), None)


# -- links and files --------------------------------------------------------------------------------


def wrong_links(path: Path, text: str) -> list[str]:
    """Relative links and anchors of a Markdown file that lead nowhere.

    Args:
        path: of the file, which its links start from.
        text: its content.
    """
    wrong = []
    prose = _SPAN.sub("", _prose(text))
    for link in _LINK.finditer(prose):
        target, _, anchor = (link[1] or link[2]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (path.parent / target) if target else path
        if not there.exists():
            wrong.append(f"{path.name}: there is no {target}")
        elif anchor and anchor not in anchors(text if there == path else there.read_text()):
            wrong.append(f"{path.name}: {target or 'it'} has no heading #{anchor}")
    return wrong


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    found: set[str] = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))
    for heading in _HEADING.findall(_prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(1)))
        found.add(next(name for name in names if name not in found))
    return found


def wrong_paths(text: str, top: Path) -> list[str]:
    """Files of the project that a Markdown file names in backquotes, and that are not there.

    Taken for a file of the project is what begins with one of its folders, and what ends in `.py` or
    `.md`, which may start within the package.

    Args:
        text: of the Markdown file.
        top: the project's directory.
    """
    wrong = []
    for span in _SPAN.finditer(_prose(text)):
        if not _PATH.fullmatch(span[1]):
            continue
        name, _, test = span[1].partition("::")
        folder, slash, _ = name.partition("/")
        ours = name.endswith((".py", ".md")) or (slash and folder in _TOP_FOLDERS)
        found = _found(name, top) if ours else [top]
        if not found or (test and not any(f"def {test}(" in path.read_text() for path in found)):
            wrong.append(f"there is no `{span[1]}`")
    return wrong


def _found(name: str, top: Path) -> Sequence[Path]:
    """The files that a name stands for; one of them is enough for a pattern, not for `{a,b}`."""
    found: list[Path] = []
    for each in _alternatives(re.sub(r"<\w+>", "*", name)):
        places = [top / each, top / "lazysnap" / each] if "*" not in each else []
        paths = [path for path in places if path.exists()]
        if "*" in each:
            paths = [*top.glob(each.rstrip("/")), *(top / "lazysnap").glob(each.rstrip("/"))]
        elif "/" not in each:
            folders = [top / folder for folder in _TOP_FOLDERS]
            paths += [path for folder in folders for path in folder.rglob(each)]
        if not paths:
            return []
        found += paths
    return found


def _alternatives(name: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", name)
    if braces is None:
        yield name
        return
    for word in braces[1].split(","):
        yield from _alternatives(name[: braces.start()] + word + name[braces.end() :])
