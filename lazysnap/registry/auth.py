# SPDX-License-Identifier: Apache-2.0
"""Answering a registry's 401: basic authentication and bearer tokens.

The flow is that of docker's token specification (distribution docs/spec/auth) and of containerd's
authorizer: POST (OAuth2) when there is a secret, GET when the server does not know that. An
Authorization value is made for one endpoint and handed out for that endpoint only; whoever follows
a redirect asks again and gets none for another server.

One token is fetched at a time per endpoint and scope, however many requests wait for it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlencode

import msgspec
import trio

from lazysnap import log
from lazysnap.credentials.docker_config import Credential, CredentialSource
from lazysnap.errors import LazysnapError, RegistryError, Unauthorized
from lazysnap.http.urls import parse_url
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.registry.hosts import Endpoint
from lazysnap.registry.retry import Backoff, Fault, parse_retry_after
from lazysnap.registry.transport import Answer, Transport

_log = log.get(__name__)

CLIENT_ID = "lazysnap"
_ANSWER_LIMIT = 1 << 20
_HEADER_LIMIT = 16 << 10
_DEFAULT_LIFETIME = 60.0
_LONGEST_LIFETIME = 86400.0
_NO_OAUTH = frozenset({400, 401, 404, 405})
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may cure."""

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))\s*', re.DOTALL)
_SCHEME = re.compile(rf"\s*({_WORD})(?:\s+|$|(?=,))")


@dataclass(frozen=True)
class Challenge:
    """One challenge of a WWW-Authenticate header; names are in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Read WWW-Authenticate headers (RFC 9110, 11.6.1); skips what it cannot read."""
    found: list[Challenge] = []
    for value in values:
        text, position = value if len(value) <= _HEADER_LIMIT else "", 0
        while position < len(text):
            parameter = _PARAMETER.match(text, position)
            if parameter and found:
                quoted, plain = parameter[2], parameter[3]
                content = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                found[-1].parameters.setdefault(parameter[1].lower(), content)
                position = parameter.end()
            else:
                scheme = _SCHEME.match(text, position)
                if scheme is None:
                    break
                found.append(Challenge(scheme[1].lower()))
                position = scheme.end()
            while position < len(text) and text[position] in ", \t":
                position += 1
    return found


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


@dataclass
class _Entry:
    """What is known for one endpoint and scope."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    challenge: Challenge | None = None
    header: str | None = None
    expires: float = float("inf")
    attempts: int = 0
    failure: LazysnapError | Fault | None = None

    def current(self) -> str | None:
        """The header, unless it has expired."""
        return self.header if trio.current_time() < self.expires else None


class Authenticator:
    """Authorization values for endpoints, kept until they expire."""

    def __init__(self, transport: Transport, credentials: CredentialSource) -> None:
        self._transport = transport
        self._credentials = credentials
        self._entries: dict[tuple[str, str], _Entry] = {}

    async def header(self, endpoint: Endpoint, scope: str, backoff: Backoff) -> str | None:
        """The Authorization value to send at once, or None if none is needed so far as we know.

        Raises:
            Unauthorized: a value has expired and no new one can be had.
            Fault: the token server does not answer.
        """
        entry = self._entry(endpoint, scope)
        current = entry.current()
        if current is None and entry.challenge is not None:
            return await self._renew(entry, endpoint, scope, entry.header, backoff)
        return current

    async def answer(
        self, endpoint: Endpoint, scope: str, refused: Answer, sent: str | None, backoff: Backoff
    ) -> str:
        """A new Authorization value after a 401.

        Args:
            endpoint: the server that answered it.
            scope: what was to be done, e.g. `repository:library/alpine:pull`.
            refused: the 401.
            sent: the value that was refused.
            backoff: whose deadline limits the fetching of a token.

        Raises:
            Unauthorized: there is nothing, or nothing else, to answer with.
            Fault: the token server does not answer.
        """
        challenges = parse_challenges(refused.headers.get_list("www-authenticate"))
        by_scheme = {c.scheme: c for c in reversed(challenges)}
        challenge = by_scheme.get("bearer") or by_scheme.get("basic")
        if challenge is None:
            raise Unauthorized(f"{endpoint.host} refuses access and offers no way to log in")
        entry = self._entry(endpoint, scope)
        entry.challenge = challenge
        return await self._renew(entry, endpoint, scope, sent, backoff)

    def _entry(self, endpoint: Endpoint, scope: str) -> _Entry:
        return self._entries.setdefault((endpoint.base_url, scope), _Entry())

    async def _renew(
        self, entry: _Entry, endpoint: Endpoint, scope: str, old: str | None, backoff: Backoff
    ) -> str:
        """Make a value other than `old`, or take the one that somebody made while we waited."""
        attempts = entry.attempts
        async with entry.lock:
            current = entry.current()
            if current is not None and current != old:
                return current
            if entry.attempts != attempts and entry.failure is not None:
                raise entry.failure
            entry.attempts += 1
            entry.failure = None
            try:
                assert entry.challenge is not None
                entry.header, lifetime = await self._make(entry.challenge, endpoint, scope, backoff)
            except (LazysnapError, Fault) as error:
                entry.header, entry.failure = None, error
                counts.add(families.RENEWALS, "failed")
                raise
            counts.add(families.RENEWALS, "ok")
            entry.expires = trio.current_time() + lifetime
            return entry.header

    async def _make(
        self, challenge: Challenge, endpoint: Endpoint, scope: str, backoff: Backoff
    ) -> tuple[str, float]:
        """A value, and for how many seconds it can be used."""
        credential = await self._credentials.get(endpoint.host) or Credential()
        if challenge.scheme == "basic":
            if not (credential.username and credential.secret):
                raise _login_needed(endpoint)
            return _basic(credential), float("inf")
        if credential.registry_token:
            return f"Bearer {credential.registry_token}", float("inf")
        request = _TokenRequest(
            transport=self._transport,
            challenge=challenge,
            endpoint=endpoint,
            scope=scope,
            credential=credential,
            backoff=backoff,
        )
        return await request.run()


@dataclass
class _TokenRequest:
    """The exchange with one token server."""

    transport: Transport
    challenge: Challenge
    endpoint: Endpoint
    scope: str
    credential: Credential
    backoff: Backoff

    async def run(self) -> tuple[str, float]:
        """The Authorization value and its lifetime in seconds, with a margin taken off."""
        realm = self._realm()
        data: bytes | None = None
        if self.credential:
            data = await self._post(realm)
        if data is None:
            data = await self._get(realm)
        try:
            answer = msgspec.json.decode(data, type=_TokenAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Unauthorized(f"the token server {realm} answers no token") from None
        token = answer.access_token or answer.token
        if not token or not (token.isascii() and token.isprintable()) or len(token) > 64 << 10:
            raise Unauthorized(f"the token server {realm} answers no usable token")
        lifetime = answer.expires_in if (answer.expires_in or 0) > 0 else _DEFAULT_LIFETIME
        lifetime = min(lifetime or _DEFAULT_LIFETIME, _LONGEST_LIFETIME)
        return f"Bearer {token}", lifetime - min(30.0, lifetime * 0.2)

    def _realm(self) -> str:
        """The token server's URL, if it may be told secrets and believed."""
        try:
            realm = parse_url(self.challenge.parameters.get("realm", ""))
        except RegistryError as error:
            raise Unauthorized(
                f"{self.endpoint.host} names no usable token server: {error}"
            ) from None
        if not realm.is_secure and self.endpoint.base_url.startswith("https:"):
            what = "its password sent to" if self.credential else "a token to be fetched from"
            raise Unauthorized(
                f"{self.endpoint.host} wants {what} {realm.text[:200]} without TLS",
                hint="a registry behind a TLS proxy must know its public URL (X-Forwarded-Proto)",
            )
        return realm.text

    def _scopes(self) -> list[str]:
        """Ours and those of the challenge, sorted, each once."""
        wanted = {self.scope, *self.challenge.parameters.get("scope", "").split(" ")}
        return sorted(wanted - {""})

    async def _post(self, realm: str) -> bytes | None:
        """Ask by OAuth2; None if the server does not know that."""
        credential = self.credential
        form = {"client_id": CLIENT_ID, "scope": " ".join(self._scopes())}
        if "service" in self.challenge.parameters:
            form["service"] = self.challenge.parameters["service"]
        if credential.identity_token or not credential.username:
            form |= {
                "grant_type": "refresh_token",
                "refresh_token": credential.identity_token or credential.secret,
            }
        else:
            form |= {
                "grant_type": "password",
                "username": credential.username,
                "password": credential.secret,
            }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with await self._send("POST", realm, headers, urlencode(form).encode()) as answer:
            if answer.status in _NO_OAUTH and not credential.identity_token:
                await answer.drain()
                return None
            return await self._body(answer, realm)

    async def _get(self, realm: str) -> bytes:
        query = [("scope", scope) for scope in self._scopes()]
        if "service" in self.challenge.parameters:
            query.insert(0, ("service", self.challenge.parameters["service"]))
        query.append(("client_id", CLIENT_ID))
        headers = {}
        if self.credential.username and self.credential.secret:
            headers["Authorization"] = _basic(self.credential)
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        async with await self._send("GET", url, headers, None) as answer:
            return await self._body(answer, realm)

    async def _send(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None
    ) -> Answer:
        return await self.transport.send(
            method,
            url,
            headers={**dict(self.endpoint.headers), **headers, "Accept": "application/json"},
            tls=self.endpoint.tls,
            content=content,
            deadline=self.backoff.deadline,
        )

    async def _body(self, answer: Answer, realm: str) -> bytes:
        if 200 <= answer.status < 300:
            return await answer.read(_ANSWER_LIMIT, deadline=self.backoff.deadline)
        retry_after = parse_retry_after(answer.headers.get("retry-after"))
        status = answer.status
        await answer.drain()
        if status in TRANSIENT:
            raise Fault(f"the token server {realm} answers {status}", retry_after)
        if self.credential:
            raise Unauthorized(
                f"the token server {realm} refuses the credentials for {self.endpoint.host}"
                f" (status {status})",
                hint=f"log in again: docker login {self.endpoint.host}",
            )
        raise _login_needed(self.endpoint)


def _basic(credential: Credential) -> str:
    pair = f"{credential.username}:{credential.secret}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _login_needed(endpoint: Endpoint) -> Unauthorized:
    return Unauthorized(
        f"{endpoint.host} wants a user name and password, and none are known for it",
        hint=f"log in: docker login {endpoint.host}",
    )
