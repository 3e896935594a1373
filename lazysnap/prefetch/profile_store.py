# SPDX-License-Identifier: Apache-2.0
"""The profiles that a node has learned or was given: one file for each manifest in `profiles/`."""

from __future__ import annotations

import contextlib
import os

from lazysnap import atomic_files, log
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, Internal
from lazysnap.paths import Root
from lazysnap.prefetch.profile import MAX_SIZE, Profile, merge, parse, serialize

_log = log.get(__name__)


class ProfileStore:
    """The directory of profiles.

    Args:
        root: lazysnap's root directory.
    """

    def __init__(self, root: str) -> None:
        self._root = Root(root)
        os.makedirs(self._root.profiles, mode=0o700, exist_ok=True)

    def _path(self, manifest: str) -> str:
        return self._root.profile(Digest.parse(manifest).hex)

    def find(self, manifest: str) -> Profile | None:
        """The profile of a manifest, if there is one that can be used."""
        try:
            with open(self._path(manifest), "rb") as file:
                return parse(file.read(MAX_SIZE + 1))
        except FileNotFoundError:
            return None
        except (OSError, FormatError) as error:
            _log.warning("profile not used", manifest=manifest, error=error)
            return None

    def add(self, profile: Profile) -> Profile:
        """Store a profile, joined with what is known already.

        Raises:
            FormatError: the manifest's digest is not a digest.
            Internal: the disk refuses.
        """
        known = self.find(profile.manifest)
        joined = profile if known is None else merge(known, profile)
        try:
            atomic_files.replace(self._path(profile.manifest), serialize(joined))
        except OSError as error:
            raise Internal(f"cannot store the profile: {error.strerror}") from error
        return joined

    def remove(self, manifest: str) -> None:
        """Forget what was learned; no error if nothing was."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(manifest))

    def manifests(self) -> list[str]:
        """The manifests that have a profile."""
        names = sorted(os.listdir(self._root.profiles))
        return ["sha256:" + name[:-5] for name in names if name.endswith(".json")]
