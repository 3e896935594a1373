# SPDX-License-Identifier: Apache-2.0
"""containerd: whether it is there, knows lazysnap, and tells it what it must know."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lazysnap.check import settings
from lazysnap.check.finding import Context, Finding, Probe, failure, info, warning
from lazysnap.check.settings import Proxy
from lazysnap.containerd.client import Containerd, Plugin
from lazysnap.errors import ConfigError, LazysnapError

_OLDEST = (1, 6)
_TRANSFER_LABELS = (2, 1)
_SNAPSHOTTER = "io.containerd.snapshotter.v1"
_TYPES = ("snapshot", _SNAPSHOTTER)
_ANNOTATIONS = "enable_remote_snapshot_annotations"
_SEE = "see `containerd` in lazysnap's docs/install.md"
_NO_LABELS = "lazysnap is not told which image a layer is of, so no layer is lazy (no-image-labels)"


async def reachable(context: Context) -> list[Finding]:
    """Its version, by asking."""
    try:
        async with Containerd(context.containerd) as containerd:
            text = await containerd.version()
    except LazysnapError as error:
        hint = "start it, or name its socket with --containerd"
        return [failure(str(error), "nothing can be pulled or started", hint)]
    version = _version(text)
    if version is not None and version < _OLDEST:
        return [failure(f"containerd {text} is older than 1.6", "lazysnap needs 1.6 or newer")]
    return []


def _version(text: str) -> tuple[int, int] | None:
    match = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


async def _asked(context: Context) -> tuple[tuple[int, int] | None, list[Plugin]]:
    """Version and plugins of the running containerd, as far as they can be had."""
    try:
        async with Containerd(context.containerd) as containerd:
            return _version(await containerd.version()), await containerd.plugins()
    except LazysnapError:
        return None, []  # which `reachable` reports


async def plugin(context: Context) -> list[Finding]:
    """The entry of the proxy plugin, in the file and in the running process."""
    path = settings.find(context)
    try:
        configured = settings.proxies(settings.load(path))
    except ConfigError as error:
        return [failure(str(error), "containerd does not start with it", error.hint or "")]
    version, plugins = await _asked(context)
    mine = ours(context, configured)
    if not mine:
        others = [proxy for proxy in configured if "lazysnap" in proxy.name]
        where = f" (it has {others[0].name} at {others[0].address})" if others else ""
        return [
            failure(
                f"{path} has no proxy plugin at {context.address}{where}",
                "containerd does not know lazysnap",
                f"add [proxy_plugins.lazysnap] and restart containerd: {_SEE}",
            )
        ]
    found = [finding for proxy in mine for finding in judge_proxy(context, proxy, path, version)]
    if plugins:
        found += judge_loaded(mine, plugins)
    return found


def ours(context: Context, proxies: Iterable[Proxy]) -> list[Proxy]:
    """Those that lead to lazysnap's socket."""
    address = os.path.realpath(context.address)
    return [p for p in proxies if os.path.realpath(p.address.removeprefix("unix://")) == address]


def judge_proxy(
    context: Context, proxy: Proxy, path: str, version: tuple[int, int] | None
) -> Iterator[Finding]:
    """What is wrong with the entry of a proxy plugin."""
    where = f"[proxy_plugins.{proxy.name}] in {path}"
    if proxy.type not in _TYPES:
        yield failure(
            f"{where} has the type {proxy.type!r}",
            "containerd does not use it as a snapshotter",
            'set type = "snapshot"',
        )
    if "rebase" in proxy.capabilities:
        yield failure(
            f"{where} has the capability rebase",
            "containerd then unpacks layers side by side and without their parents; images then"
            " have no snapshots",
            "remove it from capabilities",
        )
    root = proxy.exports.get("root")
    if root and os.path.realpath(root) != context.root:
        yield warning(
            f"{where} exports the root {root}, lazysnap's is {context.root}",
            "the kubelet measures the wrong disk",
            f'set root = "{context.root}" in its exports',
        )
    if proxy.exports.get(_ANNOTATIONS) != "true" and version and version >= _TRANSFER_LABELS:
        yield warning(
            f"{where} does not export {_ANNOTATIONS}",
            "pulls through the transfer service (ctr, nerdctl) are not lazy",
            f'set {_ANNOTATIONS} = "true" in its exports',
        )


def judge_loaded(mine: Iterable[Proxy], plugins: Iterable[Plugin]) -> Iterator[Finding]:
    """Whether the running containerd has what the file says."""
    loaded = {plugin.id: plugin for plugin in plugins if plugin.type == _SNAPSHOTTER}
    for proxy in mine:
        running = loaded.get(proxy.name)
        if running is None:
            yield failure(
                f"the running containerd has no snapshotter {proxy.name}",
                "it was started before its configuration was changed",
                "restart containerd; containers go on running",
            )
        elif running.error:
            yield failure(
                f"containerd could not load {proxy.name}: {running.error}",
                "nothing can be pulled or started with it",
                "look for the reason in containerd's log",
            )


def _readable(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Path and content of containerd's configuration; empty if `plugin` reports that it is bad."""
    path = settings.find(context)
    try:
        return path, settings.load(path)
    except ConfigError:
        return path, {}


def cri(context: Context) -> list[Finding]:
    """What Kubernetes needs."""
    path, config = _readable(context)
    mine = [proxy.name for proxy in ours(context, settings.proxies(config))]
    table = settings.cri(config)
    return [] if table is None or not mine else list(judge_cri(table, mine, path))


def judge_cri(table: Mapping[str, Any], mine: Iterable[str], path: str) -> Iterator[Finding]:
    """What the settings of CRI's images mean for lazysnap."""
    snapshotter = table.get("snapshotter", "overlayfs")
    if snapshotter not in mine:
        yield info(
            f"Kubernetes uses the snapshotter {snapshotter}",
            "its images are not lazy",
            f"if they should be, set snapshotter in {path}: {_SEE}",
        )
    elif table.get("disable_snapshot_annotations", True) is not False:
        yield failure(
            f"disable_snapshot_annotations is not false in {path}",
            _NO_LABELS,
            "set it to false beside `snapshotter` and restart containerd",
        )


async def transfer(context: Context) -> list[Finding]:
    """What the transfer service of containerd 2 needs."""
    path, config = _readable(context)
    version, _ = await _asked(context)
    mine = [proxy.name for proxy in ours(context, settings.proxies(config))]
    if not mine or version is None or version[0] < 2:
        return []
    return list(judge_transfer(settings.unpacked(config), mine, path))


def judge_transfer(
    snapshotters: list[str] | None, mine: Iterable[str], path: str
) -> Iterator[Finding]:
    """What the list of snapshotters to unpack into means for lazysnap."""
    if not set(mine) & set(snapshotters or ()):
        yield warning(
            f"no unpack_config in {path} names lazysnap",
            "`ctr images pull` and nerdctl do not unpack into lazysnap, and download everything",
            f"add one for it and one for overlayfs: {_SEE}; `lazysnap pull` needs none",
        )


PROBES = (
    Probe("containerd", "containerd answers", reachable),
    Probe("containerd-plugin", "containerd knows lazysnap", plugin),
    Probe("containerd-cri", "Kubernetes' pulls are set up", cri),
    Probe("containerd-transfer", "the transfer service is set up", transfer),
)
