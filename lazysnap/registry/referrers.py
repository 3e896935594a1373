# SPDX-License-Identifier: Apache-2.0
"""Artifacts that are stored beside an image and point to it: pushing, finding, fetching.

An artifact is an image manifest with a `subject`, an empty configuration and one layer (OCI
image-spec 1.1, manifest.md, "Guidelines for Artifact Usage"). Registries list those that point to a
digest (distribution-spec 1.1, "Listing Referrers"); for registries that do not, clients keep the
list themselves, as an index under the tag `sha256-<hex>` ("Referrers Tag Schema").

Whoever may push to the repository may add artifacts to any image, so what is found here is as
trustworthy as the repository's writers. What is fetched has been checked against its digests.

Nothing orders two clients that change a list under a tag at one time. Ours take turns within a
process, send conditions, which few registries heed, and look a little later whether their entry is
still there. An entry can be lost when another process is slow enough to write after that look;
pushing again adds it again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import msgspec
import trio

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import (
    FormatError,
    InvalidArgument,
    RegistryError,
    RegistryNotFound,
    RegistryUnreachable,
)
from lazysnap.reference import Reference
from lazysnap.registry.client import ANY_DOCUMENT, Registry
from lazysnap.registry.exchange import Call, origin, resolve
from lazysnap.registry.hosts import PUSH, RESOLVE
from lazysnap.registry.push import CREATED, push_blob, push_manifest
from lazysnap.registry.retry import document_seconds, time_limit

EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"
"""Media type of `{}`, the configuration of what needs none (OCI image-spec 1.1, manifest.md)."""

_NO_API = frozenset({400, 405, 501})
"""Besides 404: what registries without the referrers API answer to it."""
_MOST_PAGES = 32
_LINK_LIMIT = 16 << 10
_NEXT = re.compile(r'<([^<>]*)>\s*;[^<>,]*\brel\s*=\s*"?next\b', re.IGNORECASE)
_CHANGED = 412
_UPDATES = 8
_LONGEST_WAIT = 2.0


def fallback_tag(digest: Digest) -> str:
    """The tag that lists what points to a digest (distribution-spec, "Referrers Tag Schema")."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


async def push_referrer(
    registry: Registry,
    reference: Reference,
    subject: oci.Descriptor,
    artifact_type: str,
    payload: bytes,
    payload_media_type: str,
    annotations: Mapping[str, str] | None = None,
) -> oci.Descriptor:
    """Store an artifact beside an image.

    The same arguments give the same artifact, so pushing it twice leaves one.

    Args:
        registry: the client.
        reference: any reference of the repository that holds the image.
        subject: the image's manifest or index.
        artifact_type: media type that the artifact is found by.
        payload: its content, at most `oci.MAX_DOCUMENT` bytes.
        payload_media_type: of the content.
        annotations: of the artifact; they are shown by `find_referrers`.

    Returns:
        The descriptor of the artifact's manifest, as `find_referrers` returns it.

    Raises:
        InvalidArgument: the payload is too large, or the artifact has no type.
        FormatError: the registry has something else under the fallback tag.
        Unauthorized: this user may not push there.
        RegistryError: or another of its kinds.
    """
    if not artifact_type:
        raise InvalidArgument("an artifact must have a type to be found by")
    exchange = registry.exchange
    layer = await push_blob(exchange, reference, payload, payload_media_type)
    config = await push_blob(exchange, reference, b"{}", EMPTY_CONFIG)
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": _pointer(config),
        "layers": [_pointer(layer)],
        "subject": _pointer(subject),
    }
    if annotations:
        manifest["annotations"] = dict(sorted(annotations.items()))
    data = _encode(manifest)
    answer = await push_manifest(exchange, reference, data, oci.OCI_MANIFEST)
    descriptor = oci.Descriptor(
        media_type=oci.OCI_MANIFEST,
        digest=Digest.of(data),
        size=len(data),
        artifact_type=artifact_type,
        annotations=manifest.get("annotations"),
    )
    if answer.headers.get("oci-subject") != subject.digest:
        await _list_under_tag(
            registry, reference.with_tag(fallback_tag(subject.digest)), descriptor
        )
    return descriptor


async def find_referrers(
    registry: Registry, reference: Reference, digest: Digest, artifact_type: str
) -> list[oci.Descriptor]:
    """The artifacts of one type that point to an image.

    Args:
        registry: the client.
        reference: any reference of the repository that holds the image.
        digest: of the image's manifest or index.
        artifact_type: of the artifacts wanted.

    Returns:
        Descriptors of manifests, each once, in the registry's order; empty if there are none.

    Raises:
        FormatError: the registry's list is malformed.
        RegistryError: or one of its kinds; also when the list is too long.
    """
    patience = registry.exchange.settings.retry_seconds
    with time_limit(
        f"the referrers of {digest}", document_seconds(patience, oci.MAX_DOCUMENT)
    ):  # all pages together
        found = await _listed_by_api(registry, reference, digest, artifact_type)
    if found is None:
        tagged = reference.with_tag(fallback_tag(digest))
        listing = await _read_listing(registry, tagged, RESOLVE)
        found = list(_entries(listing.data)) if listing else []
    wanted = (e for e in found if e.is_manifest and e.artifact_type == artifact_type)
    return list({entry.digest: entry for entry in wanted}.values())


async def fetch_artifact(
    registry: Registry,
    reference: Reference,
    descriptor: oci.Descriptor,
    limit: int,
    *,
    subject: Digest | None = None,
) -> bytes:
    """The content of an artifact, checked against the digests on the way to it.

    Args:
        registry: the client.
        reference: any reference of its repository.
        descriptor: of its manifest, from `find_referrers`.
        limit: most bytes to hold.
        subject: what its manifest must point to, if that matters.

    Raises:
        FormatError: it is not an artifact of one layer, too large, or not what was listed.
        DigestMismatch: it is not what a digest promises.
        RegistryError: or one of its kinds.
    """
    what = f"artifact {descriptor.digest} of {reference.repository}"
    if descriptor.size > oci.MAX_DOCUMENT:
        raise FormatError(f"{what}: its manifest has {descriptor.size} bytes")
    _, data = await registry.manifest(reference, descriptor.digest)
    if len(data) != descriptor.size:
        raise FormatError(f"{what}: its manifest has {len(data)} bytes, not {descriptor.size}")
    manifest = oci.parse_manifest(data)
    actual = manifest.artifact_type or manifest.config.media_type
    if descriptor.artifact_type and actual != descriptor.artifact_type:
        raise FormatError(f"{what} is of type {actual!r}, listed as {descriptor.artifact_type!r}")
    if subject is not None and (manifest.subject is None or manifest.subject.digest != subject):
        raise FormatError(f"{what} does not belong to {subject}")
    layers = manifest.layers or ()
    if len(layers) != 1:
        raise FormatError(f"{what} has {len(layers)} layers, expected one")
    return await registry.blob_bytes(reference, layers[0], limit)


async def _listed_by_api(
    registry: Registry, reference: Reference, digest: Digest, artifact_type: str
) -> list[oci.Descriptor] | None:
    """All entries of the registry's list, or None if it does not keep one."""
    found: list[oci.Descriptor] = []
    path = f"referrers/{digest}?artifactType={quote(artifact_type, safe='')}"
    call = Call(
        reference,
        path,
        f"the referrers of {digest}",
        headers={"Accept": oci.OCI_INDEX},
        accept=_NO_API | {200},
        capability=RESOLVE,
    )
    left = oci.MAX_DOCUMENT
    for _ in range(_MOST_PAGES):
        try:
            answer, data = await registry.exchange.fetch(call, left)
        except RegistryNotFound:
            if call.path != path:
                raise
            return None
        content_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if answer.status != 200 or content_type != oci.OCI_INDEX:
            # Front ends answer 200 with a page for people to paths that they do not know.
            if call.path != path:
                raise RegistryError(f"{answer.url_host} breaks off {call.what}")
            return None
        found += _entries(data)
        left -= len(data)
        match = _NEXT.search(answer.headers.get("link", "")[:_LINK_LIMIT])
        if match is None:
            return found
        following = resolve(call.what, answer, match[1], secure=True)
        if origin(following) != origin(answer.url):
            raise RegistryError(f"{answer.url_host} continues {call.what} on another server")
        call = replace(call, path=following)
    raise RegistryError(f"{call.what} fill more than {_MOST_PAGES} pages")


@dataclass(frozen=True)
class _Listing:
    """The index under a fallback tag, and the ETag that it came with."""

    data: bytes
    etag: str


async def _read_listing(registry: Registry, tagged: Reference, capability: str) -> _Listing | None:
    """What is under a fallback tag; None if there is no such tag.

    docker-registry denies that a tag exists when it holds a kind of document that was not asked
    for; we would overwrite it. Hence any kind is asked for.
    """
    call = Call(
        tagged,
        f"manifests/{tagged.tag}",
        f"the list of referrers {tagged.repository}:{tagged.tag}",
        headers={"Accept": ANY_DOCUMENT, "Cache-Control": "no-cache"},
        capability=capability,
    )
    try:
        answer, data = await registry.exchange.fetch(call, oci.MAX_DOCUMENT)
    except RegistryNotFound:
        return None
    return _Listing(data, answer.headers.get("etag", ""))


async def _list_under_tag(
    registry: Registry, tagged: Reference, descriptor: oci.Descriptor
) -> None:
    """Add an entry to the index under a fallback tag, unless it is there."""
    async with registry.tag_lock(tagged):
        for attempt in range(_UPDATES + 1):
            began = trio.current_time()
            listing = await _read_listing(registry, tagged, PUSH)
            if listing and any(e.digest == descriptor.digest for e in _entries(listing.data)):
                return
            if attempt == _UPDATES:
                break
            await push_manifest(
                registry.exchange,
                tagged,
                _with_entry(listing, descriptor),
                oci.OCI_INDEX,
                tag=tagged.tag,
                headers=_condition(listing),
                accept=CREATED | {_CHANGED},
            )
            # Who has read the list before this write will write within about the time that we
            # needed. Look after that; and not all who lost at the same moment.
            taken = trio.current_time() - began
            seconds = taken * random.uniform(2, 4 + attempt)  # noqa: S311  # no secret
            await trio.sleep(min(seconds, _LONGEST_WAIT))
    raise RegistryUnreachable(
        f"{tagged}: after {_UPDATES} attempts the list still lacks {descriptor.digest}",
        hint="something else changes this tag all the time, or the registry ignores what it is sent",
    )


def _condition(listing: _Listing | None) -> dict[str, str]:
    """Headers that let a write fail if the tag has changed since (RFC 9110, 13.1)."""
    if listing is None:
        return {"If-None-Match": "*"}
    # A weak one never matches.
    return {"If-Match": listing.etag} if listing.etag.startswith('"') else {}


def _entries(data: bytes) -> tuple[oci.Descriptor, ...]:
    """The entries of a list of referrers."""
    index = oci.parse_index(data)
    if index.media_type not in ("", oci.OCI_INDEX):
        raise FormatError(f"expected a list of referrers and got {index.media_type[:100]!r}")
    return index.manifests or ()


def _with_entry(listing: _Listing | None, descriptor: oci.Descriptor) -> bytes:
    """The index with one more entry; what others have put into it stays as it is."""
    index: dict[str, Any] = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []}
    if listing is not None:
        try:
            index |= msgspec.json.decode(listing.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"the list of referrers is malformed: {error}") from None
        index["mediaType"] = oci.OCI_INDEX
    index["manifests"] = [*(index["manifests"] or ()), descriptor]
    return _encode(index)


def _pointer(descriptor: oci.Descriptor) -> oci.Descriptor:
    """The three members that a descriptor cannot do without."""
    return oci.Descriptor(
        media_type=descriptor.media_type, digest=descriptor.digest, size=descriptor.size
    )


def _encode(document: Mapping[str, Any]) -> bytes:
    # Digest is a kind of str, which msgspec does not encode by itself.
    return msgspec.json.encode(document, enc_hook=str)
