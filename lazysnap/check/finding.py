# SPDX-License-Identifier: Apache-2.0
"""What a probe is, what it is told, and what it tells. Does no I/O."""

from __future__ import annotations

import enum
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from lazysnap.cache.eviction import CacheLimits
from lazysnap.paths import Root
from lazysnap.reference import Reference
from lazysnap.registry.hosts import RegistrySettings


class Level(enum.StrEnum):
    """How bad something is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Fix:
    """A safe way to fix what was found.

    Attributes:
        action: does it and says what it did; blocks; raises LazysnapError or OSError if it cannot.
        offline: it may only be done while no daemon serves the root.
    """

    action: Callable[[], str]
    offline: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that somebody should know.

    Attributes:
        level: how bad it is.
        summary: what is wrong.
        detail: why it matters, or what exactly was seen.
        hint: what to do.
        id: of the probe; filled in when it is run.
        fix: how it can be fixed, if that is safe.
        fixed: what was done about it.
    """

    level: Level
    summary: str
    detail: str = ""
    hint: str = ""
    id: str = ""
    fix: Fix | None = field(default=None, compare=False)
    fixed: str = ""


def info(summary: str, detail: str = "", hint: str = "") -> Finding:
    """Something that is no trouble, but good to know."""
    return Finding(Level.INFO, summary, detail, hint)


def warning(summary: str, detail: str = "", hint: str = "", fix: Fix | None = None) -> Finding:
    """Something that works now, and may not later or elsewhere."""
    return Finding(Level.WARNING, summary, detail, hint, fix=fix)


UNKNOWN_HINT = "run this as root; what other findings and the kernel log (dmesg) say may explain it"
"""What to do when something could not be looked at, if nobody knows better."""


def unknown(why: object, hint: str | None = "") -> Finding:
    """Something that could not be looked at.

    Args:
        why: an error, or words.
        hint: what to do, if that is known.
    """
    return warning(f"this could not be checked: {why}", hint=hint or UNKNOWN_HINT)


def failure(summary: str, detail: str = "", hint: str = "", fix: Fix | None = None) -> Finding:
    """Something that does not work."""
    return Finding(Level.FAILURE, summary, detail, hint, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is to be checked.

    Attributes:
        root: lazysnap's root directory, without symbolic links; it need not be there.
        address: lazysnap's socket.
        containerd: containerd's socket.
        containerd_config: its configuration file, if not the one that the running process names.
        registry: settings of the registry client.
        cache: limits of the cache.
        lazy: whether layers are to be mounted lazily.
        allow_unverified: whether also those without digests.
        image: to be looked at in its registry.
        system: the directory that `/proc`, `/sys`, `/dev` and `/etc` are looked up in.
        release: of the kernel.
    """

    root: str
    address: str
    containerd: str
    containerd_config: str | None = None
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    cache: CacheLimits = field(default_factory=CacheLimits)
    lazy: bool = True
    allow_unverified: bool = False
    image: Reference | None = None
    system: str = "/"
    release: str = field(default_factory=lambda: os.uname().release)

    @property
    def paths(self) -> Root:
        """The layout of the root directory."""
        return Root(self.root)

    def host(self, path: str) -> str:
        """Where a file of the machine is, such as `proc/locks`."""
        return os.path.join(self.system, path)


Looks = Callable[[Context], Iterable[Finding]] | Callable[[Context], Awaitable[Iterable[Finding]]]


@dataclass(frozen=True, slots=True)
class Probe:
    """One question.

    Attributes:
        id: its name in the output, which scripts rely on.
        title: what is so when nothing is found.
        look: asks it. A plain function runs in a thread and may block, but not on a FUSE mount; an
            async one may wait. Finds nothing, or something; what it raises becomes a finding.
        seconds: how long it may take.
    """

    id: str
    title: str
    look: Looks
    seconds: float = 30.0
