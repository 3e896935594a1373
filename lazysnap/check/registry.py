# SPDX-License-Identifier: Apache-2.0
"""The registries of the images in use: whether they answer, and what the credentials are good for."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import msgspec
import trio

from lazysnap.check.finding import Context, Finding, Probe, failure, warning
from lazysnap.check.state import environment, slots
from lazysnap.credentials.docker_config import Credential, DockerConfig
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, RegistryUnreachable, Unauthorized
from lazysnap.layers.slots import SlotRecord
from lazysnap.reference import Reference
from lazysnap.registry.blob import RemoteBlob
from lazysnap.registry.client import Registry
from lazysnap.registry.retry import Fault

_PROBE_SECONDS = 10.0
_AT_ONCE = 8
# What registries allow tokens to be off by (docker's distribution: token.Leeway).
_SKEW_SECONDS = 60.0
_SOON_SECONDS = 3600.0
# Hosts that are asked for the time, one after the other until one tells it.
_CLOCKS = 3
_WHY = "files that are not in the cache cannot be read"
_CREDENTIALS = "check the network and the node's credentials"


def _images(context: Context) -> list[tuple[Reference, SlotRecord]]:
    """One layer of each image in use."""
    by_name = {record.reference: record for record in slots(context)[0]}
    return [(Reference.parse(name), record) for name, record in sorted(by_name.items())]


def _blob(registry: Registry, reference: Reference, record: SlotRecord) -> RemoteBlob:
    digest = Digest.parse(record.layer_digest)
    return RemoteBlob(registry.exchange, reference, digest, record.blob_size)


async def reachable(context: Context) -> list[Finding]:
    """Asks for a byte of each image; of a host that does not answer not again and again."""
    found: dict[str, Finding] = {}
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def one(registry: Registry, reference: Reference, record: SlotRecord) -> None:
        async with limit:
            if reference.host in found:
                return
            try:
                await _blob(registry, reference, record).probe(_PROBE_SECONDS)
            except RegistryUnreachable as error:
                text = f"{reference.host} cannot be reached: {error}"
                found[reference.host] = warning(text, _WHY, "check the network")
            except LazysnapError as error:
                kind = failure if isinstance(error, Unauthorized) else warning
                text = f"{record.reference} cannot be fetched: {error}"
                found[record.reference] = kind(text, _WHY, error.hint or _CREDENTIALS)

    credentials = DockerConfig(environ=environment(context))
    async with Registry(context.registry, credentials) as registry, trio.open_nursery() as nursery:
        for reference, record in _images(context):
            nursery.start_soon(one, registry, reference, record)
    return [found[name] for name in sorted(found)]


async def clock(context: Context) -> list[Finding]:
    """Compares our clock with that of the first registry that tells its own."""
    credentials = DockerConfig(environ=environment(context))
    async with Registry(context.registry, credentials) as registry:
        by_host = {reference.host: (reference, record) for reference, record in _images(context)}
        for reference, record in list(by_host.values())[:_CLOCKS]:
            blob = _blob(registry, reference, record)
            before = time.time()
            try:
                answer = await blob.request("bytes=0-0", blob.backoff(_PROBE_SECONDS))
                async with answer:
                    headers = dict(answer.headers)
            except (LazysnapError, Fault):
                continue  # which `reachable` reports
            skew = _skew(headers, before, time.time())
            if skew is not None:
                return list(judge_clock(skew, reference.host))
    return []


def _skew(headers: dict[str, str], before: float, after: float) -> float | None:
    """How far our clock is before (above zero) or behind an answer's, in seconds."""
    try:
        # A cache's answer has the Date of the origin's (RFC 9111, 5.1).
        theirs = parsedate_to_datetime(headers["date"]).timestamp() + int(headers.get("age", "0"))
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    # Theirs has whole seconds, and is of some moment between ours.
    return max(before - theirs - 1, 0.0) or min(after - theirs, 0.0)


def judge_clock(skew: float, host: str) -> Iterator[Finding]:
    """What it means that our clock is `skew` seconds before that of a host."""
    if abs(skew) > _SKEW_SECONDS:
        way = "before" if skew > 0 else "behind"
        yield warning(
            f"the clock is {abs(skew):.0f} s {way} that of {host}",
            "registries refuse tokens, and certificates seem to be expired or not valid yet",
            "set the clock: chronyc makestep, or timedatectl set-ntp true",
        )


class _Claims(msgspec.Struct):
    exp: float | None = None


def expiry(token: str) -> float | None:
    """When a token expires, in seconds since 1970; None if it is no JSON Web Token, or never does.

    Args:
        token: perhaps a JWT (RFC 7519); its signature is the registry's business.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        return msgspec.json.decode(base64.urlsafe_b64decode(padded), type=_Claims).exp
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        return None


async def credentials(context: Context) -> list[Finding]:
    """Looks into the tokens that are kept for the hosts of images in use."""
    hosts = {reference.host for reference, _ in _images(context)}
    if context.image is not None:
        hosts.add(context.image.host)
    source = DockerConfig(environ=environment(context))
    found: list[Finding] = []
    for host in sorted(hosts):
        known = await source.get(host)
        if known is not None:
            found += judge_credential(host, known, time.time())
    return found


def judge_credential(host: str, credential: Credential, now: float) -> Iterator[Finding]:
    """What the earliest end of a credential's tokens means.

    Args:
        host: whose credential it is.
        credential: its tokens.
        now: seconds since 1970.
    """
    tokens = (credential.secret, credential.identity_token, credential.registry_token)
    ends = [end for end in map(expiry, tokens) if end is not None]
    if not ends:
        return
    left = min(ends) - now
    why = "files that are not in the cache cannot be fetched"
    cure = f"run `docker login {host}`, or use a credential helper that renews it"
    if left <= 0:
        yield failure(f"the credential for {host} has expired", why, cure)
    elif left < _SOON_SECONDS:
        text = f"the credential for {host} expires in {left / 60:.0f} minutes"
        yield warning(text, f"{why} after that", cure)


PROBES = (
    Probe("registries", "the registries of images in use answer", reachable, seconds=90),
    Probe("clock", "the clock agrees with a registry's", clock, seconds=60),
    Probe("credentials", "no credential expires soon", credentials),
)
