# SPDX-License-Identifier: Apache-2.0
"""Where user names, passwords and tokens for registries come from.

`CredentialSource` is the port; `DockerConfig` reads what `docker login` and its helpers keep
(docker/cli cli/config, docker/docker-credential-helpers), `Chain` asks several sources in turn.
Nothing here writes a secret to a log or an error, and a broken source means no credentials, as a
public image must not fail for it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from lazysnap import log
from lazysnap.reference import DOCKER_HUB

_log = log.get(__name__)

_HUB_KEY = "https://index.docker.io/v1/"
_HUB_HOSTS = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
_FILE_LIMIT = 4 << 20
_OUTPUT_LIMIT = 1 << 20
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TOKEN_USER = "<token>"  # noqa: S105  # the name that marks a token, not a token


@dataclass(frozen=True)
class Credential:
    """What proves who we are to one registry; secrets do not show in its repr.

    Attributes:
        username: with `secret` as its password.
        secret: password, or access token used as one.
        identity_token: exchanged for access tokens at the token server (OAuth2 refresh token).
        registry_token: sent to the registry as it is.
    """

    username: str = ""
    secret: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.secret or self.identity_token or self.registry_token)


class CredentialSource(Protocol):
    """Something that may know a credential for a host."""

    async def get(self, host: str) -> Credential | None:
        """The credential for a host as references name it (`docker.io`, `localhost:5000`)."""
        ...


class Anonymous:
    """Knows none."""

    async def get(self, host: str) -> Credential | None:
        """None."""
        return None


@dataclass
class Fixed:
    """Credentials given directly, by host."""

    by_host: Mapping[str, Credential]

    async def get(self, host: str) -> Credential | None:
        """The credential given for this very host."""
        return self.by_host.get(host)


@dataclass
class Chain:
    """Several sources; the first that knows a credential decides."""

    sources: Sequence[CredentialSource]

    async def get(self, host: str) -> Credential | None:
        """The first credential that a source has."""
        for source in self.sources:
            found = await source.get(host)
            if found:
                return found
        return None


class _Auth(msgspec.Struct, frozen=True, rename="lower"):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""

    def credential(self) -> Credential | None:
        """The credential in this entry, or None if it is empty or malformed."""
        username, password = self.username, self.password
        if self.auth:
            try:
                decoded = base64.b64decode(self.auth, validate=True).decode()
            except (binascii.Error, ValueError):
                return None
            username, _, password = decoded.rstrip("\0").partition(":")
        found = Credential(username, password, self.identitytoken, self.registrytoken)
        return found or None


class _Config(msgspec.Struct, frozen=True):
    auths: dict[str, _Auth] | None = None
    cred_helpers: dict[str, str] | None = msgspec.field(default=None, name="credHelpers")
    creds_store: str | None = msgspec.field(default=None, name="credsStore")

    def auth(self, host: str) -> Credential | None:
        """The entry for a host; keys may be URLs, as old versions of docker wrote them."""
        entries = self.auths or {}
        for key in _keys(host):
            if key in entries and (found := entries[key].credential()):
                return found
        names = _HUB_HOSTS if host in _HUB_HOSTS else {host}
        for key, entry in entries.items():
            if _hostname(key) in names and (found := entry.credential()):
                return found
        return None

    def helper(self, host: str) -> str | None:
        """The suffix of the helper program for a host."""
        helpers = self.cred_helpers or {}
        for key in _keys(host):
            if key in helpers:
                return helpers[key]
        return self.creds_store or None


class _HelperAnswer(msgspec.Struct):
    username: str = msgspec.field(default="", name="Username")
    secret: str = msgspec.field(default="", name="Secret")


class DockerConfig:
    """Docker's config.json and credential helpers.

    The file is read again when it changes, so that a token written by a login or a cron job is used
    at once. DOCKER_AUTH_CONFIG, the JSON itself, goes before the file; DOCKER_CONFIG names the
    directory of the file.

    Args:
        path: the file, instead of the one that the environment names.
        environ: the environment to look at; the process's by default.
        helper_seconds: longest run of a helper program.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        helper_seconds: float = 10.0,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        home = self._environ.get("HOME") or os.path.expanduser("~")
        directory = self._environ.get("DOCKER_CONFIG") or os.path.join(home, ".docker")
        self._path = path or os.path.join(directory, "config.json")
        self._helper_seconds = helper_seconds
        self._stamp: tuple[int, ...] | None = None
        self._config = _Config()
        self._inline: tuple[str, _Config] = ("", _Config())

    async def get(self, host: str) -> Credential | None:
        """The credential for a host, from the environment, a helper, or the file."""
        found = self._from_environment().auth(host)
        if found:
            return found
        config = self._from_file()
        helper = config.helper(host)
        if helper:
            found = await self._ask(helper, host)
        return found or config.auth(host)

    def _from_environment(self) -> _Config:
        text = self._environ.get("DOCKER_AUTH_CONFIG", "")
        if text != self._inline[0]:
            self._inline = (
                text,
                _decode(text.encode(errors="surrogateescape"), "DOCKER_AUTH_CONFIG"),
            )
        return self._inline[1]

    def _from_file(self) -> _Config:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if stamp != self._stamp:
                    self._config = _decode(file.read(_FILE_LIMIT + 1), self._path)
                    self._stamp = stamp
        except FileNotFoundError:
            self._stamp, self._config = None, _Config()
        except OSError as error:
            if self._stamp != ():
                _log.warning("cannot read docker's configuration", path=self._path, error=error)
            self._stamp, self._config = (), _Config()
        return self._config

    async def _ask(self, suffix: str, host: str) -> Credential | None:
        """Run `docker-credential-<suffix> get`."""
        program = f"docker-credential-{suffix}"
        if _SUFFIX.fullmatch(suffix) is None:
            _log.warning("malformed name of a credential helper", host=host)
            return None
        server = _HUB_KEY if host in _HUB_HOSTS else host
        output: bytes | None = None
        with trio.move_on_after(self._helper_seconds):
            try:
                code, output = await _run([program, "get"], server.encode(), self._environ)
            except OSError as error:
                _log.warning("cannot run credential helper", program=program, error=error)
                return None
        if output is None:
            _log.warning(
                "credential helper took too long", program=program, seconds=self._helper_seconds
            )
            return None
        if code != 0:
            # Its text is safe to look at but not to log: helpers are other people's programs.
            if b"credentials not found" not in output:
                _log.warning("credential helper failed", program=program, host=host, code=code)
            return None
        try:
            answer = msgspec.json.decode(output, type=_HelperAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            _log.warning("credential helper answers no JSON", program=program, host=host)
            return None
        if answer.username == _TOKEN_USER:
            return Credential(identity_token=answer.secret) or None
        return Credential(answer.username, answer.secret) or None


def standard(helper_seconds: float = 10.0) -> CredentialSource:
    """What `docker login` has left, and after that what `podman login` has.

    Args:
        helper_seconds: longest run of a helper program.
    """
    docker = DockerConfig(helper_seconds=helper_seconds)
    return Chain(
        [docker, DockerConfig(_containers_path(os.environ), helper_seconds=helper_seconds)]
    )


def _containers_path(environ: Mapping[str, str]) -> str:
    """The file of `podman login`, which is of the same form (containers-auth.json(5))."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    directory = f"{runtime}/containers" if runtime else f"/run/containers/{os.getuid()}"
    return environ.get("REGISTRY_AUTH_FILE") or f"{directory}/auth.json"


async def _run(command: list[str], data: bytes, environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Run a program, feed it `data`, return its exit code and the start of its output."""
    output = bytearray()
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(environ),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout:
            with contextlib.suppress(trio.BrokenResourceError):
                await process.stdin.send_all(data)
            await process.stdin.aclose()
            async for chunk in process.stdout:
                output += chunk[: _OUTPUT_LIMIT - len(output)]
        return await process.wait(), bytes(output)
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def _decode(data: bytes, what: str) -> _Config:
    if not data.strip():
        return _Config()
    try:
        if len(data) > _FILE_LIMIT:
            raise msgspec.ValidationError("too large")
        return msgspec.json.decode(data, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # The text of the error could quote a secret.
        _log.warning("docker's configuration is malformed and is ignored", source=what)
        return _Config()


def _keys(host: str) -> tuple[str, ...]:
    """The keys under which docker, nerdctl and podman keep a host's entry."""
    return (_HUB_KEY, *sorted(_HUB_HOSTS)) if host in _HUB_HOSTS else (host,)


def _hostname(key: str) -> str:
    """The host of a key that is a URL (docker/cli ConvertToHostname)."""
    for scheme in ("https://", "http://"):
        key = key.removeprefix(scheme)
    return key.partition("/")[0]
