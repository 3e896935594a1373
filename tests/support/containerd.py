# SPDX-License-Identifier: Apache-2.0
"""The fixtures' private containerd for tests, which also tells what ctr shows of it.

    with PrivateContainerd(tmp_path) as containerd:
        containerd.ctr("images", "pull", "--plain-http", reference)      # overlayfs, unpacked
        output = containerd.run(reference, "/bin/cat", "/etc/motd")      # a container by runc

From a trio test that also serves the registry itself, call these blocking methods through
`trio.to_thread.run_sync`. Images come from `tests.support.images`, a registry from
`tests.support.registry`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fixtures.containerd import Containerd


class PrivateContainerd(Containerd):
    """`Containerd` with a log for debugging; its arguments are the same.

    Args:
        work: its directory is made in it.
        proxies: snapshotter name to the socket of its proxy plugin.
        collects_always: garbage is collected after almost each change.
    """

    def __init__(
        self,
        work: Path,
        *,
        proxies: Mapping[str, str | Path] | None = None,
        collects_always: bool = False,
    ) -> None:
        super().__init__(work, proxies=proxies, collects_always=collects_always, log_level="debug")

    def snapshots(self, snapshotter: str = "overlayfs") -> dict[str, tuple[str, str]]:
        """Key to (parent, kind) of each snapshot, as `ctr snapshots ls` tells."""
        header, *lines = self.ctr("snapshots", "--snapshotter", snapshotter, "ls").splitlines()
        # Columns are aligned with the header; a key may hold a space ("extract-1-a sha256:...").
        parent, kind = header.index("PARENT"), header.index("KIND")
        return {
            line[:parent].strip(): (line[parent:kind].strip(), line[kind:].strip())
            for line in lines
        }

    def snapshot_info(self, key: str, snapshotter: str = "overlayfs") -> dict[str, Any]:
        """`ctr snapshots info`: Kind, Name, Parent, Labels, Created, Updated."""
        text = self.ctr("snapshots", "--snapshotter", snapshotter, "info", key)
        result: dict[str, Any] = json.loads(text)
        return result

    def contents(self) -> dict[str, dict[str, str]]:
        """Digest to labels of each blob in the content store."""
        result = {}
        for line in self.ctr("content", "ls").splitlines()[1:]:
            columns = re.split(r"\t+", line.strip())  # short columns are padded with more tabs
            labels = columns[3] if len(columns) > 3 else "-"
            pairs = [] if labels == "-" else labels.split(",")
            result[columns[0].strip()] = dict(_pairs(pairs))
        return result

    def images(self) -> dict[str, tuple[str, str]]:
        """Name to (media type, digest) of each image."""
        lines = self.ctr("images", "ls").splitlines()[1:]
        return {columns[0]: (columns[1], columns[2]) for columns in map(str.split, lines)}

    def leases(self) -> list[str]:
        """The ids of all leases."""
        return self.ctr("leases", "ls", "-q").split()

    def ingests(self) -> list[str]:
        """The refs of all unfinished writes to the content store."""
        return [line.split()[0] for line in self.ctr("content", "active").splitlines()[1:]]


def _pairs(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        key, _, value = text.partition("=")
        yield key, value


@contextmanager
def private_containerd(
    directory: Path, *, proxies: Mapping[str, str | Path] | None = None
) -> Iterator[PrivateContainerd]:
    """`PrivateContainerd` for `yield` fixtures; shows the log's end when the block fails."""
    with PrivateContainerd(directory, proxies=proxies) as containerd:
        try:
            yield containerd
        except BaseException:
            print(containerd.log()[-4000:])
            raise
