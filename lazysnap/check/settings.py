# SPDX-License-Identifier: Apache-2.0
"""containerd's configuration, as far as it concerns a remote snapshotter.

Read from the file that the running containerd was started with. Versions 2 (containerd 1.x), 3 and 4
(2.x) differ in the names of plugins only. What is pure here takes a dict.
"""

from __future__ import annotations

import glob
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lazysnap.check.finding import Context
from lazysnap.check.state import command_line, peer
from lazysnap.errors import ConfigError

DEFAULT_PATH = "etc/containerd/config.toml"
_CRI = {
    "io.containerd.grpc.v1.cri": ("containerd",),  # 1.x
    "io.containerd.cri.v1.images": (),  # 2.x
}
_TRANSFER = "io.containerd.transfer.v1.local"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy plugin.

    Attributes:
        name: of the snapshotter.
        type: of the plugin.
        address: its socket.
        exports: what containerd tells clients of it.
        capabilities: likewise.
    """

    name: str
    type: str
    address: str
    exports: Mapping[str, str]
    capabilities: tuple[str, ...]


def find(context: Context) -> str:
    """The path of containerd's configuration file."""
    if context.containerd_config is not None:
        return context.containerd_config
    try:
        words = command_line(peer(context.containerd))
    except OSError:
        words = []
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config", "-c", "--c"):
            return value if equals else following
    return context.host(DEFAULT_PATH)


def load(path: str) -> dict[str, Any]:
    """A configuration file with what it imports; empty if it is not there, as containerd sees it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            merged = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"containerd's configuration {path} cannot be read: {error}",
            hint="containerd does not start with it either: `containerd config dump`",
        ) from error
    imports = merged.get("imports", [])
    for pattern in imports if isinstance(imports, list) else []:
        for name in sorted(glob.glob(os.path.join(os.path.dirname(path), str(pattern)))):
            if name != path:
                _merge(merged, load_one(name))
    return merged


def load_one(path: str) -> dict[str, Any]:
    """A file that is imported; what it imports itself is left out.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"containerd's configuration {path} cannot be read: {error}") from error


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _table(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        value = config.get(name)
        config = value if isinstance(value, dict) else {}
    return config


def proxies(config: Mapping[str, Any]) -> list[Proxy]:
    """All proxy plugins."""
    found = []
    for name in _table(config, "proxy_plugins"):
        entry = _table(config, "proxy_plugins", name)
        capabilities = entry.get("capabilities", [])
        found.append(
            Proxy(
                name,
                str(entry.get("type", "")),
                str(entry.get("address", "")),
                {key: str(value) for key, value in _table(entry, "exports").items()},
                tuple(map(str, capabilities)) if isinstance(capabilities, list) else (),
            )
        )
    return found


def is_disabled(config: Mapping[str, Any], plugin: str) -> bool:
    """Whether a plugin is among those that are not to be loaded."""
    disabled = config.get("disabled_plugins", [])
    names = {plugin, plugin.rpartition(".")[2]}  # version 1 had short names
    return isinstance(disabled, list) and bool(names & set(map(str, disabled)))


def cri(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of Kubernetes' images; None if that plugin is disabled."""
    enabled = [plugin for plugin in _CRI if not is_disabled(config, plugin)]
    if len(enabled) < len(_CRI):
        return None
    merged: dict[str, Any] = {}
    for plugin in enabled:
        merged |= _table(config, "plugins", plugin, *_CRI[plugin])
    return merged


def unpacked(config: Mapping[str, Any]) -> list[str] | None:
    """The snapshotters that the transfer service unpacks into; None if that is left to defaults."""
    entries = _table(config, "plugins", _TRANSFER).get("unpack_config")
    if not isinstance(entries, list):
        return None
    return [str(entry.get("snapshotter", "")) for entry in entries if isinstance(entry, dict)]
