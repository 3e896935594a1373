# SPDX-License-Identifier: Apache-2.0
"""The fixtures' private docker-registry (Debian's) for tests: with users, and pushes by skopeo.

with docker_registry(tmp_path, htpasswd={"user": "secret"}) as registry:
    registry.copy(f"oci:{layout}:tag", "repo:tag")
    Reference.parse(f"{registry.host}/repo:tag")
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fixtures.registry import Registry, registry


@dataclass(frozen=True)
class DockerRegistry(Registry):
    """A running docker-registry; `user` is one of its users, or None."""

    user: tuple[str, str] | None = None

    def copy(self, source: str, name: str, *options: str) -> None:
        """Push an image with skopeo.

        Args:
            source: as skopeo writes it, e.g. `oci:DIR:TAG`.
            name: repository and tag here.
            options: more for `skopeo copy`.
        """
        command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]
        command += ["--src-tls-verify=false", *options]
        if self.user:
            command += ["--dest-creds", ":".join(self.user)]
        subprocess.run([*command, source, f"docker://{self.host}/{name}"], check=True)


@contextlib.contextmanager
def docker_registry(
    directory: Path, *, htpasswd: Mapping[str, str] | None = None
) -> Iterator[DockerRegistry]:
    """Run docker-registry with its data in `storage` below `directory`.

    Args:
        directory: existing.
        htpasswd: users and their passwords; without any, all requests are allowed.
    """
    users = directory / "htpasswd" if htpasswd else None
    if users and htpasswd:
        lines = [_htpasswd(name, password) for name, password in htpasswd.items()]
        users.write_text("\n".join(lines) + "\n")
    with registry(directory / "storage", directory, htpasswd=users) as running:
        yield DockerRegistry(running.port, next(iter(htpasswd.items())) if htpasswd else None)


def _htpasswd(name: str, password: str) -> str:
    """A line of htpasswd with bcrypt, which libcrypt knows and docker-registry demands."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    hashed = library.crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    return f"{name}:{hashed.decode()}"
