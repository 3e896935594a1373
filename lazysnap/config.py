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
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

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
        Meta(description="wait at each commit of an unpacked layer until the disk has all of it"),
    ] = True
    eager: Annotated[
        Literal["containerd", "direct"],
        Meta(
            description="who unpacks what cannot be lazy: containerd; or the daemon itself, direct"
            " from the registry"
        ),
    ] = "containerd"


class Lazy(_Section, frozen=True):
    """Which layers are mounted lazily, and how."""

    enabled: Annotated[bool, Meta(description="mount layers lazily where that is possible")] = True
    allow_unverified: Annotated[
        bool,
        Meta(
            description="also layers without digests: whoever controls the registry then"
            " controls what containers run"
        ),
    ] = False
    kernel_trees: Annotated[
        bool,
        Meta(description="have the kernel serve names and attributes of files, if it can"),
    ] = True


class Shards(_Section, frozen=True):
    """The processes that serve lazy layers."""

    count: Annotated[
        int,
        Meta(ge=0, le=64, description="how many there are; 0: one for each CPU, at most 4"),
    ] = 0
    max_background: Annotated[
        int,
        Meta(ge=1, le=65535, description="requests that the kernel may have in flight to one"),
    ] = 64
    read_ahead_kib: Annotated[
        int, Meta(ge=0, le=65536, description="how far the kernel reads ahead")
    ] = 1024
    decode_threads: Annotated[
        int,
        Meta(ge=1, le=256, extra=_RELOAD, description="threads of each that inflate and verify"),
    ] = 4


class Fetch(_Section, frozen=True):
    """What is fetched when, and how fast."""

    background: Annotated[
        bool,
        Meta(
            extra=_RELOAD,
            description="fetch all of each layer when there is nothing more urgent to do",
        ),
    ] = True
    background_delay_seconds: Annotated[
        float,
        Meta(ge=0, le=_DAY, extra=_RELOAD, description="after a layer was mounted"),
    ] = 10.0
    connections: Annotated[
        int, Meta(ge=1, le=1024, extra=_RELOAD, description="of one shard to one host")
    ] = 16
    bytes_per_second: Annotated[
        int,
        Meta(ge=0, le=_MOST_BYTES, extra=_RELOAD, description="over all hosts; 0: no limit"),
    ] = 0
    host_bytes_per_second: Annotated[
        int, Meta(ge=0, le=_MOST_BYTES, extra=_RELOAD, description="for each host; 0: no limit")
    ] = 0
    learn_profiles: Annotated[
        bool,
        Meta(description="note what an image reads while it starts; fetch that first next time"),
    ] = True
    learn_seconds: Annotated[
        float, Meta(ge=0.1, le=3600, description="how long a start is watched")
    ] = 30.0
    find_profiles: Annotated[
        bool, Meta(description="ask the registry for a profile beside the image")
    ] = True


class RegistrySection(_Section, frozen=True):
    """How registries are spoken to."""

    plain_http_hosts: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(
            extra=_RELOAD,
            description='hosts ("name" or "name:port") without TLS; loopback addresses always are',
        ),
    ] = []
    retry_seconds: Annotated[
        float,
        Meta(
            ge=0.1,
            le=_DAY,
            extra=_RELOAD,
            description="how long one read keeps trying without getting anywhere",
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
            description="how long a layer counts as reachable after bytes came from it",
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
            description="what the cached contents may take; 0: no limit but the reserve",
        ),
    ] = 0
    reserve_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=_MOST_BYTES,
            extra=_RELOAD,
            description="what stays free on the cache's file system, or",
        ),
    ] = 1 << 30
    reserve_percent: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            extra=_RELOAD,
            description="this share of it, whichever is more; at most a quarter of it",
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
        Meta(extra=_RELOAD, description="debug, info, warning or error"),
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json", "journal"],
        Meta(
            extra=_RELOAD,
            description="text, json or journal; auto: journal if systemd reads standard error",
        ),
    ] = "auto"
    metrics_address: Annotated[
        str,
        Meta(
            pattern=r"^(|unix:/.+|(\[[0-9a-fA-F:.]+\]|[^:/\[\]]+):[0-9]{1,5})$",
            description='for Prometheus: "unix:/run/lazysnap/metrics.sock" or "127.0.0.1:9464";'
            " empty: none",
        ),
    ] = ""
    snapshots: Snapshots = Snapshots()
    lazy: Lazy = Lazy()
    shards: Shards = Shards()
    fetch: Fetch = Fetch()
    registry: RegistrySection = RegistrySection()
    cache: CacheSection = CacheSection()

    def shard_count(self) -> int:
        """How many shards there shall be."""
        return self.shards.count or min(os.cpu_count() or 1, 4)


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        section: its table; empty at the top.
        name: within the table.
        default: its value when the file does not have it.
        description: one line.
        reloads: whether a change is taken up at SIGHUP.
    """

    section: str
    name: str
    default: Any
    description: str
    reloads: bool

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
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            if isinstance(field.default, _Section):
                continue
            default = field.default
            if default is msgspec.NODEFAULT:
                default = field.default_factory()
            notes = getattr(hints[field.name], "__metadata__", ())
            meta = next((note for note in notes if isinstance(note, Meta)), Meta())
            reloads = bool((meta.extra or {}).get("reload"))
            yield Key(section, field.name, default, meta.description or "", reloads)


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
