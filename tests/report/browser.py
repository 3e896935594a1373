# SPDX-License-Identifier: Apache-2.0
"""What a page is: for a parser, and for a real browser (Debian's chromium), if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium")
_SECONDS = 300


class Page(HTMLParser):
    """The elements of a page.

    Attributes:
        elements: each tag with its attributes, in order.
        titles: text of each `title` element.
        text: all other text, without styles.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "title":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.titles[-1] += data
        elif self._inside != "style":
            self.text += data

    def having(self, attribute: str) -> list[str]:
        """The values of an attribute, of all elements that have it."""
        return [values[attribute] or "" for _, values in self.elements if attribute in values]

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


class Browser:
    """A headless chromium, which is started anew for each page, with a new profile."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _run(self, page: Path, *options: str) -> tuple[str, list[str]]:
        assert CHROMIUM is not None
        profile = tempfile.mkdtemp(prefix="chromium-", dir=self._directory)
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--disable-quic", f"--user-data-dir={profile}"),
                *("--enable-logging=stderr", *options),
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
        return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)

    def dom(self, page: Path) -> tuple[str, list[str]]:
        """The document as the browser has understood it, and what it wrote to its console."""
        return self._run(page, "--dump-dom")

    def screenshot(self, page: Path, image: Path, height: int = 1600) -> list[str]:
        """A picture as PNG; returns what was written to the console."""
        size = f"--window-size=1280,{height}"
        return self._run(page, f"--screenshot={image}", size, "--hide-scrollbars")[1]
