# SPDX-License-Identifier: Apache-2.0
"""A registry that hangs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Protocol

from tests.support.docker_registry import DockerRegistry


class Scene(Protocol):
    """Who has a registry."""

    @property
    def registry(self) -> DockerRegistry: ...


@contextlib.contextmanager
def registry_stopped(it: Scene) -> Iterator[None]:
    """Connections are neither answered nor refused."""
    line = subprocess.run(
        ["ss", "-Hltnp", f"sport = :{it.registry.port}"], capture_output=True, text=True, check=True
    )
    found = re.search(r"pid=(\d+)", line.stdout)
    assert found is not None
    pid = int(found[1])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
