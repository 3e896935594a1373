# SPDX-License-Identifier: Apache-2.0
"""Programs built from containerd's own Go packages (Debian's golang-github-containerd-containerd-dev).

They are kept in `.work/` and built again only when a source has changed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

WORK = Path(__file__).parent.parent.parent / ".work"
CONTAINERD = Path("/usr/share/gocode/src/github.com/containerd/containerd")
_ENVIRONMENT = {
    "GO111MODULE": "off",
    "GOPATH": "/usr/share/gocode",
    "GOCACHE": str(WORK / "go-cache"),
    "GOFLAGS": "",
}


def build(directory: Path, *arguments: str, watch: Iterable[Path] = ()) -> Path:
    """Build the package in a directory.

    Args:
        directory: its Go files.
        arguments: of `go`, such as `build` or `test -c`.
        watch: further files whose change makes a new build necessary.

    Returns:
        The program.
    """
    state = hashlib.sha256(subprocess.check_output(["go", "version"]))
    for source in sorted((*directory.glob("*.go"), *watch)):
        state.update(source.read_bytes())
    built = WORK / f"{directory.name}-{state.hexdigest()[:16]}"
    if not built.exists():
        WORK.mkdir(exist_ok=True)
        for old in WORK.glob(f"{directory.name}-*"):
            old.unlink()
        aside = built.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["go", *arguments, "-o", str(aside), "."],
            cwd=directory,
            env=os.environ | _ENVIRONMENT,
            check=True,
        )
        aside.rename(built)
    return built
