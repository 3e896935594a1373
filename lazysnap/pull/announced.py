# SPDX-License-Identifier: Apache-2.0
"""An image as the daemon resolved it when it was announced, which spares asking the registry twice."""

from __future__ import annotations

from typing import Any

import trio

from lazysnap import channel, log, oci
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, NotFound
from lazysnap.pull.announcement import Announcement
from lazysnap.registry.image import Image, assemble

_log = log.get(__name__)
_ANSWER_SECONDS = 10.0


async def answer(announcement: Announcement) -> Image | None:
    """Wait for what the daemon answers, and hang up.

    What the reference points to is the daemon's word, as it would otherwise be the registry's; all else
    is checked against its digest.

    Returns:
        None if it cannot tell: it may lack a password that the caller has.
    """
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(announcement.connection))
    async with stream:
        with trio.move_on_after(_ANSWER_SECONDS):
            try:
                return await _image(
                    announcement, await channel.answer_of(stream, announcement.path)
                )
            except (LazysnapError, LookupError, TypeError, ValueError) as error:
                _log.debug("the daemon does not know the image", error=error)
    return None


async def _image(announcement: Announcement, answered: dict[str, Any]) -> Image:
    reference = announcement.reference
    (media_type, data), *others = answered["documents"]
    if reference.digest is not None:
        reference.digest.verify(data, f"manifest {reference}")
    digest = reference.digest or Digest.of(data)
    top = oci.Descriptor(media_type=media_type, digest=digest, size=len(data))
    documents: list[bytes] = [*(data for _, data in others), answered["config"]]
    known = {Digest.of(each): each for each in documents}

    async def read(descriptor: oci.Descriptor) -> bytes:
        if descriptor.digest not in known:
            raise NotFound(f"the daemon has not sent {descriptor.digest}")
        return known[descriptor.digest]

    return await assemble(reference, announcement.platform, (top, data), read)
