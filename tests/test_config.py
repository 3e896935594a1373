# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from lazysnap import config
from lazysnap.errors import ConfigError


def test_an_empty_file_is_the_defaults() -> None:
    assert config.parse("", "f") == config.Config()
    assert config.Config().root == "/var/lib/lazysnap"


def test_values_are_taken() -> None:
    read = config.parse('root = "/x"\n[shards]\ncount = 3\n[lazy]\nenabled = false', "f")
    assert (read.root, read.shard_count(), read.lazy.enabled) == ("/x", 3, False)


def test_an_unknown_key_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse("[shards]\ncuont = 3", "f")
    assert "cuont" in str(caught.value)
    assert caught.value.hint == "did you mean 'count'?"


@pytest.mark.parametrize(
    "text",
    ["root = 1", "x = [", "[shards]\ncount = -1", 'log_level = "loud"', "[shards]\ncount=1e9"],
)
def test_wrong_values_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f: "):
        config.parse(text, "f")


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        config.load(str(tmp_path / "none"))
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(str(path))


@pytest.mark.parametrize(
    "text", ["size_limit_bytes = -1", "reserve_bytes = -1", "reserve_percent = 101.0", "size = 1"]
)
def test_limits_of_the_cache_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse(f"[cache]\n{text}\n", "c.toml")
