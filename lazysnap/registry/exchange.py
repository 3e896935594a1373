# SPDX-License-Identifier: Apache-2.0
"""A request to a registry, from its name to the head of a usable answer.

Tries the endpoints of the host in order, answers challenges, follows redirects, sorts statuses into
errors, and repeats what another attempt may cure. Does not look at bodies: a body that breaks is
the business of whoever reads it.

Authorization and an endpoint's own headers are sent to the origin of that endpoint only, and never
again once a redirect has led away from it. A redirect from TLS to plain HTTP is followed only for what is
checked against a digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

import msgspec
import trio

from lazysnap.errors import LazysnapError, RegistryError, RegistryNotFound, Unauthorized
from lazysnap.http.urls import join_url, parse_url
from lazysnap.reference import Reference
from lazysnap.registry.auth import TRANSIENT, Authenticator
from lazysnap.registry.hosts import (
    PULL,
    PUSH,
    Endpoint,
    HostTable,
    RegistrySettings,
    TLSOptions,
)
from lazysnap.registry.outages import Outages, Outlook
from lazysnap.registry.retry import (
    Backoff,
    Fault,
    document_seconds,
    parse_retry_after,
    time_limit,
)
from lazysnap.registry.transport import Answer, Transport

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 10
_EXCERPT = 4096
_EXCERPT_SECONDS = 2.0
_PART_UNKNOWN = "MANIFEST_BLOB_UNKNOWN"
PART_UNKNOWN = "part-unknown"
"""Reason of an error: the registry says that it lacks something that a manifest names."""


@dataclass(frozen=True)
class Call:
    """What is asked of a registry.

    Attributes:
        reference: the repository; its tag and digest play no part.
        path: below the repository, e.g. `blobs/sha256:...`; or an absolute URL that a registry
            named, which gets authorization only at the origin of the endpoint.
        what: how errors name it, without the host.
        headers: sent with it, also to where it is redirected.
        accept: statuses that the caller handles; others become errors.
        capability: what an endpoint must offer to be asked. With `PUSH`, only the first such
            endpoint is asked, so that all that belongs together goes to one place.
        method: of HTTP.
        content: body to send.
        checked: what comes is checked against a digest, so that it does not matter who sends it.
    """

    reference: Reference
    path: str
    what: str
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: frozenset[int] = frozenset({200})
    capability: str = PULL
    method: str = "GET"
    content: bytes | None = None
    checked: bool = False

    @property
    def scope(self) -> str:
        """The scope of the token that is needed."""
        actions = "pull,push" if self.capability == PUSH else "pull"
        return f"repository:{self.reference.repository}:{actions}"


@dataclass(frozen=True)
class Target:
    """Where a redirect led, away from the registry."""

    url: str
    tls: TLSOptions


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


@dataclass
class Exchange:
    """Sends calls; shared by all blobs and manifests of a client."""

    settings: RegistrySettings
    transport: Transport
    authenticator: Authenticator
    hosts: HostTable
    outages: Outages = field(default_factory=Outages)

    def backoff(
        self,
        what: str,
        seconds: float | None = None,
        *,
        reference: Reference | None = None,
        hurried: bool = False,
    ) -> Backoff:
        """The patience for one operation.

        Args:
            what: its object and host, for errors.
            seconds: overrides the settings.
            reference: of the repository that is asked, if others are to know whether it works.
            hurried: somebody waits who has something else to do if it fails, so it has less patience
                until something arrives.

        Raises:
            RegistryUnreachable: it is hurried, and the repository has just failed.
        """
        settings = self.settings
        outlook = None if reference is None else self.outlook(reference)
        patience = later = settings.retry_seconds if seconds is None else seconds
        if hurried:
            patience = min(patience, settings.open_retry_seconds)
            if outlook is not None:
                outlook.check(what)
        return Backoff(what, patience, settings.retry_after_seconds, outlook, later=later)

    def outlook(self, reference: Reference) -> Outlook:
        """What is known of the server of a repository."""
        endpoint = self.hosts.endpoints(reference.host)[-1]
        server = endpoint.base_url.partition("://")[2].partition("/")[0]
        return self.outages.outlook(server, f"{reference.host}/{reference.repository}")

    async def open(self, call: Call, backoff: Backoff) -> tuple[Answer, Target | None]:
        """Send a call until an answer with an accepted status comes.

        Returns:
            The answer, whose body is unread, and where it came from if that is not the registry.

        Raises:
            RegistryUnreachable: no endpoint gave a usable answer in time.
            RegistryNotFound, Unauthorized, RegistryError: what the last endpoint said.
        """
        while True:
            try:
                return await self.once(call, backoff)
            except Fault as fault:
                await backoff.pause(fault)

    async def once(self, call: Call, backoff: Backoff) -> tuple[Answer, Target | None]:
        """Send a call to each endpoint until an answer with an accepted status comes.

        Returns:
            As `open` does.

        Raises:
            Fault: no endpoint gave a usable answer, and another attempt may.
            RegistryNotFound, Unauthorized, RegistryError: what the last endpoint said.
        """
        fault: Fault | None = None
        refusal: LazysnapError | None = None
        for endpoint in self._endpoints(call):
            try:
                answer, target = await self._attempt(call, endpoint, backoff)
                backoff.reached()
                return await self.judge(call, answer), target
            except Fault as error:
                fault = error
            except RegistryError as error:
                refusal = error
        if fault is not None:
            raise fault
        assert refusal is not None
        raise refusal

    async def fetch(self, call: Call, limit: int, *, hurried: bool = False) -> tuple[Answer, bytes]:
        """Send a call and read the body of its answer, again if it breaks.

        Args:
            call: what to ask.
            limit: most bytes to hold.
            hurried: as for `backoff`.

        Returns:
            The answer, closed, and its body.

        Raises:
            RegistryError: or one of its kinds; also when the body is longer than `limit`.
        """
        what = f"{call.what} of {call.reference.host}"
        backoff = self.backoff(what, reference=call.reference, hurried=hurried)
        with time_limit(what, document_seconds(self.settings.retry_seconds, limit)):
            while True:
                answer, _ = await self.open(call, backoff)
                try:
                    async with answer:
                        data = await answer.read(limit)
                except Fault as fault:
                    await backoff.pause(fault)
                else:
                    backoff.works()
                    return answer, data

    async def direct(self, call: Call, target: Target, backoff: Backoff) -> Answer:
        """Send a call to where an earlier one was redirected, without authorization.

        Returns:
            The answer, whatever its status.

        Raises:
            Fault: none came.
        """
        return await self.transport.send(
            "GET",
            target.url,
            headers=call.headers,
            tls=target.tls,
            deadline=backoff.deadline,
            repeated=backoff.take_repeat(),
        )

    async def judge(self, call: Call, answer: Answer) -> Answer:
        """Let an answer with an accepted status pass; close any other.

        Raises:
            Fault: the status is one that another attempt may cure.
            RegistryNotFound, Unauthorized, RegistryError: it is final.
        """
        status = answer.status
        if status in call.accept:
            return answer
        said = await _excerpt(answer)
        text = f"{answer.url_host} answers {status} for {call.what}{said}"
        if status in TRANSIENT:
            raise Fault(text, parse_retry_after(answer.headers.get("retry-after")))
        if status == 404:
            raise RegistryNotFound(text)
        if status in (401, 403):
            raise Unauthorized(text, hint=f"log in: docker login {call.reference.host}")
        raise RegistryError(text, reason=PART_UNKNOWN if _PART_UNKNOWN in said else None)

    def _endpoints(self, call: Call) -> list[Endpoint]:
        found = [
            endpoint
            for endpoint in self.hosts.endpoints(call.reference.host)
            if call.capability in endpoint.capabilities
        ]
        if not found:
            raise RegistryError(
                f"no endpoint of {call.reference.host} is configured for {call.capability}"
            )
        return found[:1] if call.capability == PUSH else found

    async def _attempt(
        self, call: Call, endpoint: Endpoint, backoff: Backoff
    ) -> tuple[Answer, Target | None]:
        """One walk from an endpoint along its redirects, with one new login at most."""
        start = _start(call, endpoint)
        here = origin(endpoint.base_url)
        authorization = await self.authenticator.header(endpoint, call.scope, backoff)
        url, home, hops, renewed = start, origin(start) == here, 0, False
        while True:
            headers = dict(call.headers)
            if home:
                headers |= dict(endpoint.headers)
                if authorization:
                    headers["Authorization"] = authorization
            answer = await self.transport.send(
                call.method,
                url,
                headers=headers,
                tls=endpoint.tls if home else _away(endpoint.tls),
                content=call.content,
                deadline=backoff.deadline,
                repeated=backoff.take_repeat(),
            )
            if answer.status in REDIRECTS:
                await answer.drain()
                hops += 1
                url = _location(call, answer, hops)
                home = home and origin(url) == here
            elif answer.status == 401 and home and not renewed:
                await answer.drain()
                authorization = await self.authenticator.answer(
                    endpoint, call.scope, answer, authorization, backoff
                )
                url, hops, renewed = start, 0, True
            else:
                return answer, None if home else Target(url, _away(endpoint.tls))


def _start(call: Call, endpoint: Endpoint) -> str:
    """The URL of a call at an endpoint."""
    if "://" in call.path:
        return call.path
    url = f"{endpoint.base_url}/{call.reference.repository}/{call.path}"
    if endpoint.namespace:
        url += f"{'&' if '?' in call.path else '?'}ns={quote(endpoint.namespace, safe='')}"
    return url


def _location(call: Call, answer: Answer, hops: int) -> str:
    """Where a redirect points to.

    Raises:
        RegistryError: it may not be followed.
    """
    if call.method not in ("GET", "HEAD") and answer.status not in (307, 308):
        # The others turn a request into a GET, by custom (RFC 9110, 15.4).
        raise RegistryError(
            f"{call.what} cannot be sent on by a redirect of status {answer.status}"
        )
    if hops > _MOST_REDIRECTS:
        raise RegistryError(f"more than {_MOST_REDIRECTS} redirects for {call.what}")
    location = answer.headers.get("location", "")
    secure = call.content is not None or not call.checked
    return resolve(call.what, answer, location, secure=secure)


def resolve(what: str, answer: Answer, location: str, *, secure: bool) -> str:
    """A place that an answer names, as an absolute URL.

    Args:
        what: how an error names the operation.
        answer: what names it.
        location: as in its header: absolute, or relative to where the answer came from.
        secure: it needs TLS if the answer came with it: something will be sent there, or what comes from
            there will be believed.

    Raises:
        RegistryError: there is none, or it cannot be used.
    """
    try:
        found = join_url(answer.url, location)
    except RegistryError as error:
        raise RegistryError(f"unusable redirect for {what}: {error}") from None
    if secure and parse_url(answer.url).is_secure and not found.is_secure:
        raise RegistryError(
            f"{answer.url_host} wants {what} to go on without TLS, at {found.text[:200]!r}",
            hint="a registry behind a TLS proxy must know its public URL (X-Forwarded-Proto)",
        )
    return found.text


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what decides whether secrets may be sent along.

    Raises:
        RegistryError: the URL cannot be asked.
    """
    return parse_url(url).origin


def _away(tls: TLSOptions) -> TLSOptions:
    """TLS options for another server: the same trust, without our certificate."""
    return replace(tls, client_certificate=None, client_key=None)


async def _excerpt(answer: Answer) -> str:
    """What an error's body says, cut short, and close the answer."""
    async with answer:
        try:
            deadline = trio.current_time() + _EXCERPT_SECONDS
            data = await answer.read(_EXCERPT, deadline=deadline)
            found = msgspec.json.decode(data, type=_Errors).errors
        except (Fault, RegistryError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return ""
    text = "; ".join(f"{e.code} {e.message}".strip() for e in found[:3])
    return f": {text[:300]!r}" if text else ""
