# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lazysnap import config, config_file
from lazysnap.cli import main

_TOP = Path(__file__).parent.parent.parent


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["config", *arguments])


def test_the_sample_says_what_is_so_without_it() -> None:
    result = _run("default")
    assert result.exit_code == 0
    assert config_file.parse(result.stdout, "sample") == config.Config()
    document = tomllib.loads(result.stdout)
    for key in config.all_keys():
        table = document[key.section] if key.section else document
        assert table[key.name] == key.default
        assert key.description in result.stdout


def test_the_reference_is_that_of_the_keys() -> None:
    """`lazysnap config default --markdown >docs/configuration.md` makes it so."""
    page = _run("default", "--markdown").stdout
    assert page == (_TOP / "docs" / "configuration.md").read_text()
    assert page.count("\n| `") == len(list(config.all_keys())) + 3  # three commands
    assert "| `count` | integer | `0` | 0 to 64 | restart | number of shards; " in page
    assert "| `connections` | integer | `16` | 1 to 1024 | reload | " in page
    assert '| `eager` | string | `"containerd"` | "containerd", "direct" | restart | ' in page
    assert "| `plain_http_hosts` | list of strings | `[]` |  | reload | " in page


def test_what_is_in_force_and_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[shards]\n\ncount = 3\n[registry]\nplain_http_hosts = [\n"a:5000"]\n')
    shown = json.loads(_run("show", "--config", str(path), "--json").stdout)
    assert shown["shards.count"] == {
        "value": 3,
        "default": 0,
        "origin": f"{path}:3",
        "reloads": False,
    }
    assert shown["registry.plain_http_hosts"]["origin"] == f"{path}:5"
    assert shown["fetch.connections"]["origin"] == "default"
    text = _run("show", "--config", str(path)).stdout
    assert config_file.parse(text, "shown") == config_file.load(str(path))  # it is a file again
    assert f"# {path}:3" in text


def test_odd_characters_in_values_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("root = 'C:\\ä \"quoted\"'\n", encoding="utf-8")
    text = _run("show", "--config", str(path)).stdout
    assert tomllib.loads(text)["root"] == 'C:\\ä "quoted"'


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("[shards]\ncount = 1\n", 0, ": good"),
        (
            "[shards]\ncuont = 1\n",
            2,
            ":2: there is no key shards.cuont\nhint: did you mean 'count'?",
        ),
        ("[shards\n", 2, ":1: "),
    ],
)
def test_a_file_is_checked(tmp_path: Path, text: str, code: int, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    result = _run("check", str(path))
    assert (result.exit_code, f"{path}{message}" in result.output) == (code, True)


def test_a_file_to_check_must_be_there(tmp_path: Path) -> None:
    assert _run("check", str(tmp_path / "none")).exit_code == 2
