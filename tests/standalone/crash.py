# SPDX-License-Identifier: Apache-2.0
"""Runs a lazysnap command that is killed, as by `kill -9`, at one of the steps that others can see.

    python -m tests.standalone.crash STEP COMMAND...

Steps are counted: files and directories that are made, written, renamed or removed, programs that are
started, and mounts, each before it happens. With step 0 the command runs to its end, and the last line of
its output says how many steps there were.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from lazysnap import fsconfig, mounts
from lazysnap.cli import main

_STEPS = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "subprocess.Popen"}
)
_WRITES = os.O_WRONLY | os.O_RDWR
_MODULES = ("mount", "unmount", "bind")


class _Counter:
    def __init__(self, last: int) -> None:
        self.last = last
        self.count = 0
        self.lock = threading.Lock()

    def step(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def heard(self, event: str, arguments: tuple[object, ...]) -> None:
        """An audit hook (PEP 578)."""
        if event in _STEPS or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        ):
            self.step()


def _run() -> None:
    counter = _Counter(int(sys.argv[1]))

    def counted(name: str, module: object) -> None:
        real = getattr(module, name)

        def call(*arguments: object, **named: object) -> object:
            counter.step()
            result = real(*arguments, **named)
            counter.step()
            return result

        setattr(module, name, call)

    for name in _MODULES:
        counted(name, mounts)
    counted("mount_overlay", fsconfig)
    sys.addaudithook(counter.heard)
    try:
        main(sys.argv[2:])
    finally:
        print(counter.count, flush=True)


if __name__ == "__main__":
    _run()
