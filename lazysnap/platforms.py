# SPDX-License-Identifier: Apache-2.0
"""Names of platforms, and which of them a machine can run.

Source: containerd's platforms package; the names are those of Go (GOOS, GOARCH).
"""

from __future__ import annotations

import msgspec

from lazysnap.errors import InvalidArgument


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operating system and CPU, in the names of Go (GOOS, GOARCH)."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/architecture[/variant]`, normalised as containerd does.

        Raises:
            InvalidArgument: it is something else.
        """
        parts = text.lower().split("/")
        if len(parts) not in (2, 3) or not all(
            p and p.isascii() and p.isprintable() for p in parts
        ):
            raise InvalidArgument(
                f"malformed platform {text[:100]!r}", hint="write it as linux/amd64 or linux/arm/v7"
            )
        return cls(*parts).normalized()

    def normalized(self) -> Platform:
        """Other spellings (x86_64, aarch64, armhf, arm64/v8) turned into the usual one."""
        arch, variant = self.architecture.lower(), self.variant.lower()
        if variant[:1].isdigit():
            variant = f"v{variant}"
        match arch:
            case "x86_64" | "x86-64" | "amd64":
                arch, variant = "amd64", "" if variant == "v1" else variant
            case "i386" | "386":
                arch, variant = "386", ""
            case "aarch64" | "arm64":
                arch, variant = "arm64", "" if variant == "v8" else variant
            case "armhf":
                arch, variant = "arm", "v7"
            case "armel":
                arch, variant = "arm", "v6"
            case "arm":
                variant = variant or "v7"
        system = "darwin" if self.os.lower() == "macos" else self.os.lower()
        return Platform(system, arch, variant, self.os_version)

    def runs(self) -> tuple[Platform, ...]:
        """What a machine of this platform can run, best first (containerd platforms.Only)."""
        here = self.normalized()
        return tuple(
            Platform(here.os, arch, variant).normalized()
            for arch, variant in _runnable(here.architecture, here.variant)
        )

    def rank(self, other: Platform) -> int | None:
        """How well a machine of this platform runs `other`: 0 is best, None not at all."""
        other = other.normalized()
        wanted = Platform(other.os, other.architecture, other.variant)
        candidates = self.runs()
        return candidates.index(wanted) if wanted in candidates else None

    def __str__(self) -> str:
        return "/".join(p for p in (self.os, self.architecture, self.variant) if p) or "unknown"


def _runnable(arch: str, variant: str) -> list[tuple[str, str]]:
    lower: list[tuple[str, str]]
    level = int(variant[1:]) if variant[:1] == "v" and variant[1:].isdecimal() else 0
    match arch:
        case "amd64":
            lower = [(arch, f"v{n}") for n in range(min(level, 16) - 1, 0, -1)]
            return [(arch, variant), *lower, ("386", "")]
        case "arm":
            lower = [(arch, f"v{n}") for n in range(min(level, 16) - 1, 4, -1)]
            return [(arch, variant), *lower]
        case "arm64":
            lower = [(arch, f"v{n}") for n in range(min(level, 16) - 1, 7, -1)]
            return [(arch, variant), *lower, *_runnable("arm", "v8")]
    return [(arch, variant)]
