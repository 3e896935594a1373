# SPDX-License-Identifier: Apache-2.0
"""Podman and CRI-O: whether they can use the store of `lazysnap store` that they are told of."""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

from lazysnap.check.finding import Context, Finding, Probe, failure, warning
from lazysnap.paths import Root

_CONFIGURATION = "etc/containers/storage.conf"
_SECONDS = 2.0


def stores(context: Context) -> Iterable[Finding]:
    """The additional layer stores of containers/storage, as far as they are ours."""
    path = context.host(_CONFIGURATION)
    try:
        with open(path, "rb") as file:
            known = tomllib.load(file)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        yield failure(f"{path} cannot be read: {error}", "Podman and CRI-O do not start with it")
        return
    for entry in _entries(known):
        directory, *options = entry.split(":")
        if os.path.lexists(directory) and not _ours(directory):
            continue  # of stargz-store, for example
        yield from _judge(directory, options, path)


def _entries(known: Any) -> Iterator[str]:
    for key in ("storage", "options", "additionallayerstores"):
        known = known.get(key) if isinstance(known, dict) else None
    if isinstance(known, list):
        yield from (entry for entry in known if isinstance(entry, str))


def _ours(directory: str) -> bool:
    """Whether `lazysnap store` has made it; what it leads to is in a FUSE mount, and not looked at."""
    return os.path.islink(directory) and os.readlink(directory).endswith(Root("/").store_layers)


def _judge(directory: str, options: list[str], path: str) -> Iterator[Finding]:
    if not os.path.lexists(directory):
        yield failure(
            f"the additional layer store {directory} of {path} is not there",
            "Podman and CRI-O refuse all work",
            "start lazysnap store with that root, or remove the entry",
        )
        return
    if options != ["ref"]:
        yield failure(
            f"{path} names the store {directory} without :ref",
            "lazysnap is not told which image a layer is of, so no layer is lazy",
            f'write additionallayerstores = ["{directory}:ref"]',
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_SECONDS)
        try:
            probe.connect(Root(os.path.dirname(directory)).store_socket)
        except OSError as error:
            yield warning(
                f"lazysnap store does not answer for {directory}: {error.strerror or error}",
                "new images are pulled as a whole; containers go on working",
                "start it (systemctl start lazysnap-store), and see its log",
            )


PROBES = (Probe("layer-store", "Podman and CRI-O find the store they are told of", stores),)
