# SPDX-License-Identifier: Apache-2.0
"""Finds start-up profiles that somebody has pushed to the registry beside an image.

A profile is looked for once, when the first layer of an image is asked for, while that layer is opened. A
registry that is slow to answer, or that has none, delays nothing. Advice only: an error is one line in
the log.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.digest import Digest
from lazysnap.errors import FormatError
from lazysnap.prefetch.profile import ARTIFACT_TYPE, MAX_SIZE, Profile, parse
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.reference import Reference
from lazysnap.registry import Registry, fetch_artifact, find_referrers

_log = log.get(__name__)
_SECONDS = 10.0
# The caller has opened a layer meanwhile, which took about as long as the registry needs to answer. So the
# caller only waits for a registry that answers this more slowly.
_SETTLED_SECONDS = 0.25
# So that a hostile registry cannot have us parse many.
_MOST_REFERRERS = 4
_REMEMBERED = 1024
# The layers of one pull ask once; a later pull may find what was pushed since.
_VALID_SECONDS = 300.0


async def fetch_profiles(
    registry: Registry, reference: Reference, manifest: Digest
) -> list[Profile]:
    """The profiles that the registry has for a manifest.

    Args:
        registry: client.
        reference: image whose repository is asked.
        manifest: digest of the platform's manifest.

    Raises:
        RegistryError: the registry cannot be asked.
    """
    profiles = []
    for found in (await find_referrers(registry, reference, manifest, ARTIFACT_TYPE))[
        :_MOST_REFERRERS
    ]:
        data = await fetch_artifact(registry, reference, found, MAX_SIZE, subject=manifest)
        profile = parse(data)
        if profile.manifest != manifest:
            raise FormatError(f"profile {found.digest} is of another image", reason="bad-profile")
        profiles.append(profile)
    return profiles


class ProfileFinder:
    """Looks for profiles, once for each manifest.

    Args:
        root: lazysnap's root directory.
        registry: client.
        enabled: whether to look at all.
    """

    def __init__(self, root: str, registry: Registry, *, enabled: bool) -> None:
        self._store = ProfileStore(root)
        self._registry = registry
        self._enabled = enabled
        self._looked: OrderedDict[Digest, tuple[float, trio.Event]] = OrderedDict()

    async def look(self, reference: Reference, manifest: Digest) -> None:
        """Look for a profile, and store what is found; what fails is logged."""
        now = trio.current_time()
        if not self._enabled or self._looked.get(manifest, (float("-inf"),))[0] > now:
            return
        done = trio.Event()
        self._looked[manifest] = now + _VALID_SECONDS, done
        if len(self._looked) > _REMEMBERED:
            self._looked.popitem(last=False)
        try:
            with (
                advice(_log, "no profile from the registry", level=logging.INFO, manifest=manifest),
                trio.move_on_after(_SECONDS),
            ):
                if await trio.to_thread.run_sync(self._store.find, manifest) is None:
                    await self._take(reference, manifest)
        finally:
            done.set()

    async def _take(self, reference: Reference, manifest: Digest) -> None:
        for profile in await fetch_profiles(self._registry, reference, manifest):
            await trio.to_thread.run_sync(self._store.add, profile)
            _log.info("profile found in the registry", manifest=manifest, bytes=profile.size())

    async def settled(self, manifest: Digest, seconds: float = _SETTLED_SECONDS) -> None:
        """Wait until `look` has ended for a manifest, but not longer than `seconds`."""
        looking = self._looked.get(manifest)
        if looking is not None:
            with trio.move_on_after(seconds):
                await looking[1].wait()
