# SPDX-License-Identifier: Apache-2.0
"""The configuration file: strict TOML, assembled for the components that own the settings.

An unknown key is an error that names the nearest known one, so that a slip is not silently ignored.
Units are in the names. Nothing imports this module but the entry points.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib

import msgspec

from lazysnap.errors import ConfigError

DEFAULT_PATH = "/etc/lazysnap/config.toml"
DEFAULT_ROOT = "/var/lib/lazysnap"
DEFAULT_ADDRESS = "/run/lazysnap/lazysnap.sock"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Snapshots(_Section, frozen=True):
    """`[snapshots]`

    Attributes:
        sync_on_commit: wait at each commit of an unpacked layer until the disk has all of it.
    """

    sync_on_commit: bool = True


class Lazy(_Section, frozen=True):
    """`[lazy]`

    Attributes:
        enabled: mount layers lazily where that is possible.
        allow_unverified: also layers whose manifest promises no digest of a table of contents:
            whoever controls the registry or the way to it then controls the content.
    """

    enabled: bool = True
    allow_unverified: bool = False


class Shards(_Section, frozen=True):
    """`[shards]`

    Attributes:
        count: processes that serve layers; 0 means one for each CPU, at most 4.
        max_background: requests that the kernel may have in flight to one of them.
        read_ahead_kib: how far the kernel reads ahead.
        decode_threads: threads of each that decompress and verify.
    """

    count: int = 0
    max_background: int = 64
    read_ahead_kib: int = 1024
    decode_threads: int = 4


class Fetch(_Section, frozen=True):
    """`[fetch]`

    Attributes:
        background: fetch all of each layer when there is nothing more urgent to do.
        background_delay_seconds: how long after a layer was mounted that begins.
        connections: requests that one shard makes to one host at once.
        bytes_per_second: limit over all hosts and shards; 0 is none.
        host_bytes_per_second: limit for each host over all shards; 0 is none.
        learn_profiles: note what an image reads while it starts, and fetch that first next time.
        learn_seconds: how long a start is watched.
        find_profiles: ask the registry for a profile beside the image when it is pulled.
    """

    background: bool = True
    background_delay_seconds: float = 10.0
    connections: int = 16
    bytes_per_second: int = 0
    host_bytes_per_second: int = 0
    learn_profiles: bool = True
    learn_seconds: float = 30.0
    find_profiles: bool = True


class RegistrySection(_Section, frozen=True):
    """`[registry]`

    Attributes:
        plain_http_hosts: hosts (`name` or `name:port`) that are spoken to without TLS.
        retry_seconds: how long one read keeps trying without getting anywhere.
        stall_seconds: longest wait for the next bytes of an answer.
        probe_valid_seconds: how long a layer counts as reachable after bytes came from it.
    """

    plain_http_hosts: list[str] = []
    retry_seconds: float = 30.0
    stall_seconds: float = 10.0
    probe_valid_seconds: float = 60.0


class CacheSection(_Section, frozen=True):
    """`[cache]`

    Attributes:
        size_limit_bytes: what the cached contents may take on disk; 0 for no limit.
        reserve_bytes: what stays free on the cache's file system, at least.
        reserve_percent: likewise, in percent of the file system; the greater of both counts, but
            never more than a quarter of the file system.
    """

    size_limit_bytes: int = 0
    reserve_bytes: int = 1 << 30
    reserve_percent: float = 5.0


class Config(_Section, frozen=True):
    """The whole file.

    Attributes:
        root: directory of all state.
        address: socket that containerd connects to.
        log_level: debug, info, warning or error.
    """

    root: str = DEFAULT_ROOT
    address: str = DEFAULT_ADDRESS
    log_level: str = "info"
    snapshots: Snapshots = Snapshots()
    lazy: Lazy = Lazy()
    shards: Shards = Shards()
    fetch: Fetch = Fetch()
    registry: RegistrySection = RegistrySection()
    cache: CacheSection = CacheSection()

    def shard_count(self) -> int:
        """How many shards there shall be."""
        return self.shards.count or min(os.cpu_count() or 1, 4)


def parse(text: str, where: str) -> Config:
    """Read a configuration.

    Args:
        text: TOML.
        where: how errors name it.

    Raises:
        ConfigError: it is not TOML, has an unknown key, or a value of the wrong kind.
    """
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}", hint=_suggestion(str(error))) from error
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"{where}: log_level must be debug, info, warning or error")
    if config.shards.count < 0 or config.shards.count > 64:
        raise ConfigError(f"{where}: shards.count must be from 0 to 64")
    if config.cache.size_limit_bytes < 0 or config.cache.reserve_bytes < 0:
        raise ConfigError(f"{where}: sizes in [cache] must not be negative")
    if not 0 <= config.cache.reserve_percent <= 100:
        raise ConfigError(f"{where}: cache.reserve_percent must be from 0 to 100")
    return config


def load(path: str | None) -> Config:
    """Read the configuration file.

    Args:
        path: a file that must be there; None for the default one, which need not be.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    try:
        with open(path or DEFAULT_PATH, encoding="utf-8") as file:
            return parse(file.read(), path or DEFAULT_PATH)
    except FileNotFoundError as error:
        if path is None:
            return Config()
        raise ConfigError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or DEFAULT_PATH} cannot be read: {error}") from error


def _suggestion(message: str) -> str | None:
    unknown = re.search(r"unknown field `(.+?)`", message)
    if unknown is None:
        return None
    kinds = (Config, Snapshots, Lazy, Shards, Fetch, RegistrySection, CacheSection)
    known = [name for kind in kinds for name in kind.__struct_fields__]
    near = difflib.get_close_matches(unknown[1], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
