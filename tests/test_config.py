# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from lazysnap import config, config_file
from lazysnap.errors import ConfigError


def test_an_empty_file_is_the_defaults() -> None:
    assert config_file.parse("", "f") == config.Config()
    assert config.Config().root == "/var/lib/lazysnap"


def test_values_are_taken() -> None:
    read = config_file.parse('root = "/x"\n[shards]\ncount = 3\n[lazy]\nenabled = false', "f")
    assert (read.root, read.shard_count(), read.lazy.enabled) == ("/x", 3, False)


def test_an_unknown_key_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.parse("[shards]\ncuont = 3", "f")
    assert "cuont" in str(caught.value)
    assert caught.value.hint == "did you mean 'count'?"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("root = 1", "f:1: root: "),
        ("x = 1\ny = 1 2", "f:2: "),
        ("x = [", "f: "),
        ("\n[shards]\ncount = -1", "f:3: shards.count: "),
        ("shards = { count = 65 }", "f:1: shards.count: "),
        ("[lazy]\n[shards]\n'count'=1e9", "f:3: shards.count: "),
        ("# count = 1\nshards.count = 99", "f:2: shards.count: "),
        ('log_level = "loud"', "f:1: log_level: "),
        ("fetch = 1", "f:1: fetch: "),
        ('[registry]\nplain_http_hosts = [\n"a",\n1]', "f:2: registry.plain_http_hosts: "),
        ("[fetch]\nconnections = 0", "f:2: fetch.connections: "),
        ("[fetch]\nlearn_seconds = nan", "f:2: fetch.learn_seconds: "),
        ("[registry]\nretry_seconds = inf", "f:2: registry.retry_seconds: "),
        ('metrics_address = "9464"', "f:1: metrics_address: "),
        ('metrics_address = "unix:m.sock"', "f:1: metrics_address: "),
        ("[shards]\nconut = 1", "f:2: there is no key shards.conut"),
    ],
)
def test_wrong_values_are_errors_that_name_key_and_line(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.parse(text, "f")
    assert caught.value.message.startswith(where)
    assert "`" not in caught.value.message


def test_a_key_in_the_wrong_table_is_found() -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.parse("size_limit_bytes = 3", "f")
    assert caught.value.hint == "did you mean 'cache.size_limit_bytes'?"


@pytest.mark.parametrize("address", ["", "unix:/run/m.sock", "127.0.0.1:9464", "[::1]:9464"])
def test_addresses_of_metrics(address: str) -> None:
    assert config_file.parse(f'metrics_address = "{address}"', "f").metrics_address == address


def test_every_key_is_explained_and_there_are_not_too_many() -> None:
    keys = list(config.all_keys())
    assert len(keys) <= 40
    for key in keys:
        assert key.description, f"{key.path} needs a description"
        assert "\n" not in key.description
        assert len(key.description) <= 97, f"{key.path}: the description is longer than a line"


def test_changed_keys_are_told() -> None:
    old = config.Config()
    new = config_file.parse('root = "/x"\n[cache]\nsize_limit_bytes = 5\n', "f")
    assert [(key.path, key.reloads) for key in config.changed(old, new)] == [
        ("root", False),
        ("cache.size_limit_bytes", True),
    ]
    assert config.changed(new, new) == []


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        config_file.load(str(tmp_path / "none"))
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_file.load(str(path))


@pytest.mark.parametrize(
    "text", ["size_limit_bytes = -1", "reserve_bytes = -1", "reserve_percent = 101.0", "size = 1"]
)
def test_limits_of_the_cache_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        config_file.parse(f"[cache]\n{text}\n", "c.toml")
