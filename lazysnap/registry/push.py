# SPDX-License-Identifier: Apache-2.0
"""Sending small blobs and manifests to a registry.

Speaks the OCI distribution specification (spec.md, end-4 to end-7: POST, then one PUT). What is
pushed is at most `oci.MAX_DOCUMENT` bytes and is kept in memory, so that an upload that broke is
begun anew and never continued. Pushing the same bytes again changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urldefrag

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import InvalidArgument, RegistryError
from lazysnap.reference import Reference
from lazysnap.registry.exchange import PART_UNKNOWN, Call, Exchange, resolve
from lazysnap.registry.hosts import PUSH
from lazysnap.registry.retry import Backoff, Fault
from lazysnap.registry.transport import Answer

CREATED = frozenset({200, 201, 204})
"""201 by the specification; the others are seen, and containerd takes them too."""
_LAG_SECONDS = 5.0
"""How long a registry may deny a part that it has just taken. docker-registry does so while another
client pushes the same blob, as it reads its own half-written files."""
_PERHAPS_MISSING = frozenset({400, 403, 404, 405, 501})
"""What servers that do not like HEAD answer to it; the upload that follows will tell."""


async def push_blob(
    exchange: Exchange, reference: Reference, data: bytes, media_type: str
) -> oci.Descriptor:
    """Make sure that a repository has a blob.

    Args:
        exchange: the client's way to send requests.
        reference: any reference of the repository.
        data: all of the blob, at most `oci.MAX_DOCUMENT` bytes.
        media_type: for the descriptor; registries do not keep it.

    Returns:
        The blob's descriptor.

    Raises:
        InvalidArgument: it is too large.
        Unauthorized: this user may not push there.
        RegistryError: or another of its kinds.
    """
    _check_size(data)
    digest = Digest.of(data)
    what = f"blob {digest}"
    backoff = exchange.backoff(f"{what} of {reference.host}/{reference.repository}")
    while True:
        try:
            if not await _has_blob(exchange, reference, digest, backoff):
                await _upload(exchange, reference, digest, data, backoff)
            return oci.Descriptor(media_type=media_type, digest=digest, size=len(data))
        except Fault as fault:
            # The session of an upload does not outlive a failure, hence from the start.
            await backoff.pause(fault)


async def push_manifest(
    exchange: Exchange,
    reference: Reference,
    data: bytes,
    media_type: str,
    *,
    tag: str | None = None,
    headers: Mapping[str, str] | None = None,
    accept: frozenset[int] = CREATED,
) -> Answer:
    """Store a manifest or index, whose parts must be there already.

    Args:
        exchange: the client's way to send requests.
        reference: any reference of the repository.
        data: all of the document, at most `oci.MAX_DOCUMENT` bytes.
        media_type: of the document.
        tag: to be set to it; without one it can be found by its digest only.
        headers: more of them, for conditions.
        accept: statuses that the caller handles.

    Returns:
        The registry's answer, closed.

    Raises:
        InvalidArgument: it is too large.
        Unauthorized: this user may not push there.
        RegistryError: or another of its kinds.
    """
    _check_size(data)
    target = tag or Digest.of(data)
    call = Call(
        reference,
        f"manifests/{target}",
        f"the push of manifest {reference.repository}{':' if tag else '@'}{target}",
        headers={"Content-Type": media_type, **(headers or {})},
        accept=accept,
        capability=PUSH,
        method="PUT",
        content=data,
    )
    what = f"{call.what} to {reference.host}"
    patience = exchange.backoff(what, min(_LAG_SECONDS, exchange.settings.retry_seconds))
    while True:
        try:
            answer, _ = await exchange.open(call, exchange.backoff(what))
            await answer.drain()
            return answer
        except RegistryError as error:
            if error.reason != PART_UNKNOWN:
                raise
            await patience.pause(Fault(error.message))


async def _has_blob(
    exchange: Exchange, reference: Reference, digest: Digest, backoff: Backoff
) -> bool:
    call = Call(
        reference,
        f"blobs/{digest}",
        f"blob {digest}",
        accept=_PERHAPS_MISSING | {200},
        capability=PUSH,
        method="HEAD",
        checked=True,  # by the push of the manifest, to which a lie would not help
    )
    answer, _ = await exchange.once(call, backoff)
    await answer.drain()
    return answer.status == 200


async def _upload(
    exchange: Exchange, reference: Reference, digest: Digest, data: bytes, backoff: Backoff
) -> None:
    """Begin an upload, and send all of it to the place that the registry names."""
    what = f"the push of blob {digest}"
    begin = Call(
        reference,
        "blobs/uploads/",
        what,
        accept=frozenset({202}),
        capability=PUSH,
        method="POST",
        content=b"",
    )
    answer, _ = await exchange.once(begin, backoff)
    await answer.drain()
    # The query that is there already holds the server's state and must stay as it is.
    location = answer.headers.get("location", "")
    url = urldefrag(resolve(what, answer, location, secure=True)).url
    url += f"{'&' if '?' in url else '?'}digest={quote(digest, safe='')}"
    finish = Call(
        reference,
        url,
        what,
        headers={"Content-Type": "application/octet-stream"},
        accept=CREATED | {404},
        capability=PUSH,
        method="PUT",
        content=data,
    )
    answer, _ = await exchange.once(finish, backoff)
    await answer.drain()
    if answer.status == 404:
        raise Fault(f"{answer.url_host} has lost the session of {what}")


def _check_size(data: bytes) -> None:
    if len(data) > oci.MAX_DOCUMENT:
        raise InvalidArgument(f"cannot push {len(data)} bytes, more than {oci.MAX_DOCUMENT}")
