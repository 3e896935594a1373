# SPDX-License-Identifier: Apache-2.0
"""The keys of the configuration file: names, ranges, defaults, and what they are for.

To add a key: a field here, with its range, a line that explains it, and its unit in the name. From
that follow the checks, the sample, `lazysnap config show`, docs/configuration.md and what a reload
takes up. `lazysnap.config_file` reads the file. Nothing imports this module but the entry points, which
tell the components what they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from lazysnap import paths

_DAY = 86400
_MOST_BYTES = 1 << 60
# Keys with this follow a changed file at SIGHUP; the others need a restart of the daemon.
_RELOAD = {"reload": True}


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Snapshots(_Section, frozen=True):
    """Snapshots that are not lazy."""

    sync_on_commit: Annotated[
        bool,
        Meta(
            description="when an unpacked layer is committed, wait until all of it is on the disk"
        ),
    ] = True
    eager: Annotated[
        Literal["containerd", "direct"],
        Meta(
            description="what unpacks layers that cannot be lazy: containerd, or the daemon direct"
            " from the registry"
        ),
    ] = "containerd"


class Lazy(_Section, frozen=True):
    """Which layers are mounted lazily, and how."""

    enabled: Annotated[bool, Meta(description="mount layers lazily where that is possible")] = True
    allow_unverified: Annotated[
        bool,
        Meta(
            description="allow lazy layers without digests; the registry then decides"
            " what containers run"
        ),
    ] = False
    kernel_trees: Annotated[
        bool,
        Meta(description="let the kernel serve names and attributes of files, if it can"),
    ] = True


class Shards(_Section, frozen=True):
    """The processes that serve lazy layers."""

    count: Annotated[
        int,
        Meta(ge=0, le=64, description="number of shards; 0: one for each CPU, at most 4"),
    ] = 0
    max_background: Annotated[
        int,
        Meta(
            ge=1, le=65535, description="requests that the kernel may send to one shard at a time"
        ),
    ] = 64
    read_ahead_kib: Annotated[
        int, Meta(ge=0, le=65536, description="how far the kernel reads ahead in a file, in KiB")
    ] = 1024
    decode_threads: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            extra=_RELOAD,
            description="threads of each shard that decompress and verify",
        ),
    ] = 4


class Fetch(_Section, frozen=True):
    """What is fetched when, and how fast."""

    background: Annotated[
        bool,
        Meta(
            extra=_RELOAD,
            description="fetch the rest of each layer when there is nothing more urgent to do",
        ),
    ] = True
    background_delay_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=_DAY,
            extra=_RELOAD,
            description="how long after the mount of a layer this begins",
        ),
    ] = 10.0
    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            extra=_RELOAD,
            description="connections that one shard has to one host, at most",
        ),
    ] = 16
    bytes_per_second: Annotated[
        int,
        Meta(
            ge=0,
            le=_MOST_BYTES,
            extra=_RELOAD,
            description="limit for all hosts together; 0: no limit",
        ),
    ] = 0
    host_bytes_per_second: Annotated[
        int,
        Meta(ge=0, le=_MOST_BYTES, extra=_RELOAD, description="limit for each host; 0: no limit"),
    ] = 0
    learn_profiles: Annotated[
        bool,
        Meta(
            description="record what an image reads while it starts, and fetch that first next time"
        ),
    ] = True
    learn_seconds: Annotated[
        float, Meta(ge=0.1, le=3600, description="how long a start is recorded")
    ] = 30.0
    find_profiles: Annotated[
        bool, Meta(description="ask the registry for a profile beside the image")
    ] = True


class RegistrySection(_Section, frozen=True):
    """Access to registries."""

    plain_http_hosts: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(
            extra=_RELOAD,
            description='hosts ("name" or "name:port") to use without TLS; loopback needs no entry',
        ),
    ] = []
    retry_seconds: Annotated[
        float,
        Meta(
            ge=0.1,
            le=_DAY,
            extra=_RELOAD,
            description="how long a read is tried again without any progress, before it fails",
        ),
    ] = 30.0
    stall_seconds: Annotated[
        float,
        Meta(ge=0.1, le=3600, description="longest wait for the next bytes of an answer"),
    ] = 10.0
    probe_valid_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=_DAY,
            extra=_RELOAD,
            description="how long a layer counts as reachable after bytes of it have arrived",
        ),
    ] = 60.0


class CacheSection(_Section, frozen=True):
    """How much of the disk the cache may use."""

    size_limit_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=_MOST_BYTES,
            extra=_RELOAD,
            description="most disk space for contents, indexes and trees; 0: no limit but the reserve",
        ),
    ] = 0
    reserve_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=_MOST_BYTES,
            extra=_RELOAD,
            description="bytes that stay free on the cache's file system",
        ),
    ] = 1 << 30
    reserve_percent: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            extra=_RELOAD,
            description="the same as a percentage; the larger one counts, but at most a quarter of it",
        ),
    ] = 5.0


class Config(_Section, frozen=True):
    """The whole file."""

    root: Annotated[str, Meta(min_length=1, description="directory of all state")] = (
        paths.DEFAULT_ROOT
    )
    address: Annotated[
        str, Meta(min_length=1, description="socket that containerd connects to")
    ] = paths.DEFAULT_ADDRESS
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(
            extra=_RELOAD, description="least severe messages to log: debug, info, warning or error"
        ),
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json", "journal"],
        Meta(
            extra=_RELOAD,
            description="text, json or journal; auto: journal if systemd reads standard error, else text",
        ),
    ] = "auto"
    metrics_address: Annotated[
        str,
        Meta(
            pattern=r"^(|unix:/.+|(\[[0-9a-fA-F:.]+\]|[^:/\[\]]+):[0-9]{1,5})$",
            description='where to serve metrics: "127.0.0.1:9464" or'
            ' "unix:/run/lazysnap/metrics.sock"; empty: nowhere',
        ),
    ] = ""
    snapshots: Snapshots = Snapshots()
    lazy: Lazy = Lazy()
    shards: Shards = Shards()
    fetch: Fetch = Fetch()
    registry: RegistrySection = RegistrySection()
    cache: CacheSection = CacheSection()

    def shard_count(self) -> int:
        """The number of shards that the daemon starts."""
        return self.shards.count or min(os.cpu_count() or 1, 4)


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        section: its table; empty at the top.
        name: within the table.
        default: its value when the file does not have it.
        description: what it is for, in one line.
        reloads: whether a change takes effect at SIGHUP; otherwise at a restart.
        kind: type of its value, as users call it.
        allowed: the values that it may have; empty if that is not limited.
    """

    section: str
    name: str
    default: Any
    description: str
    reloads: bool
    kind: str
    allowed: str

    @property
    def path(self) -> str:
        """Its full name."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def value(self, config: Config) -> Any:
        """Its value in a configuration."""
        return getattr(getattr(config, self.section) if self.section else config, self.name)


def sections() -> Iterator[tuple[str, type[_Section]]]:
    """The tables of the file by name, the top first."""
    yield "", Config
    for field in msgspec.structs.fields(Config):
        if isinstance(field.default, _Section):
            yield field.name, type(field.default)


def all_keys() -> Iterator[Key]:
    """All keys, in the order of the sample."""
    for section, kind in sections():
        types = {field.name: field.type for field in _struct(kind).fields}
        for field in msgspec.structs.fields(kind):
            if isinstance(field.default, _Section):
                continue
            default = field.default
            if default is msgspec.NODEFAULT:
                default = field.default_factory()
            noted = types[field.name]
            assert isinstance(noted, inspect.Metadata), f"{field.name} has no description"
            yield Key(
                section=section,
                name=field.name,
                default=default,
                description=(noted.extra_json_schema or {})["description"],
                reloads=bool((noted.extra or {}).get("reload")),
                kind=_kind(noted.type),
                allowed=_allowed(noted.type),
            )


def _struct(kind: type[_Section]) -> inspect.StructType:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return found


def _kind(type_: inspect.Type) -> str:
    match type_:
        case inspect.BoolType():
            return "boolean"
        case inspect.IntType():
            return "integer"
        case inspect.FloatType():
            return "number"
        case inspect.StrType() | inspect.LiteralType():
            return "string"
        case inspect.ListType():
            return f"list of {_kind(type_.item_type)}s"
    raise TypeError(f"no name for {type_}")


def _allowed(type_: inspect.Type) -> str:
    match type_:
        case inspect.IntType() | inspect.FloatType():
            return f"{_number(type_.ge)} to {_number(type_.le)}"
        case inspect.LiteralType():
            return ", ".join(f'"{value}"' for value in type_.values)
        case inspect.StrType(min_length=1):
            return "not empty"
    return ""


def _number(value: float | None) -> str:
    return "2^60" if value == _MOST_BYTES else f"{value:g}"


def reloaded(old: Config, new: Config) -> Config:
    """The old configuration with those changes that need no restart."""
    for key in changed(old, new):
        if not key.reloads:
            continue
        change = {key.name: key.value(new)}
        if key.section:
            section = msgspec.structs.replace(getattr(old, key.section), **change)
            change = {key.section: section}
        old = msgspec.structs.replace(old, **change)
    return old


def changed(old: Config, new: Config) -> list[Key]:
    """The keys whose values differ."""
    return [key for key in all_keys() if key.value(old) != key.value(new)]
