# SPDX-License-Identifier: Apache-2.0
"""Image references: `docker.io/library/alpine:3.20@sha256:...` and the short forms of it.

The grammar is that of the distribution project (github.com/distribution/reference, regexp.go), and
short names are completed as docker, nerdctl and CRI do: no host means docker.io, no namespace there
means `library/`, neither tag nor digest means `latest`. Does no I/O and knows nothing of mirrors.

A `Reference` that exists is well-formed: every part matched its grammar.

An image in an OCI layout on this machine has a reference, too: `oci:/DIRECTORY[:NAME]`, or
`oci-archive:/FILE[:NAME]` for a tar of one, as skopeo writes them (containers-transports(5)).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, InvalidArgument

DOCKER_HUB = "docker.io"
LAYOUT = "oci:"
ARCHIVE = "oci-archive:"

_NAME_LIMIT = 255
_TEXT_LIMIT = 4096
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(
    rf"(?:{_LABEL}(?:\.{_LABEL})*|\[(?P<six>[a-fA-F0-9:]+)\])(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII
)
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_IDENTIFIER = re.compile(r"[a-f0-9]{64}", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """The name of an image in a registry.

    Attributes:
        host: registry with its port if one was named; Docker Hub is always `docker.io`. `LAYOUT` or
            `ARCHIVE` for images on this machine.
        repository: path below the host, without tag and digest; of a local image, its absolute path
            without the first slash.
        tag: at least one of `tag` and `digest` is set, but for local images; when both are, the
            digest decides.
        digest: digest of the manifest or index.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as people type it and as CRI passes it in labels.

        Raises:
            InvalidArgument: it does not follow the grammar; the message names the part.
        """
        if not text or len(text) > _TEXT_LIMIT:
            raise InvalidArgument("an image reference must have 1 to 4096 characters")
        for kind in (LAYOUT, ARCHIVE):
            if text.startswith(f"{kind}/"):
                return _local(text, kind)
        if "://" in text:
            raise InvalidArgument(
                f"image reference {text[:200]!r} has a scheme",
                hint="leave out http:// or https:// and ask for plain HTTP by an option",
            )
        if _IDENTIFIER.fullmatch(text):
            raise _invalid(text, "64 hexadecimal digits are an image id, not a name")
        rest, at, digest_text = text.partition("@")
        digest = _digest(text, digest_text) if at else None
        head, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:
            head, tag = rest, ""
        if colon and head != rest and _TAG.fullmatch(tag) is None:
            raise _invalid(text, "its tag is malformed")
        host, repository = _split(text, head)
        if not tag and digest is None:
            tag = "latest"
        return cls(host, repository, tag or None, digest)

    @property
    def name(self) -> str:
        """The full text, which `parse` reads back to an equal reference."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def is_local(self) -> bool:
        """Whether it names an image on this machine."""
        return self.host in (LAYOUT, ARCHIVE)

    @property
    def path(self) -> str:
        """Where a local image is."""
        return f"/{self.repository}"

    @property
    def api_host(self) -> str:
        """The host that serves the registry API, which for docker.io has another name."""
        return "registry-1.docker.io" if self.host == DOCKER_HUB else self.host

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest if there is one, otherwise the tag."""
        return self.digest or self.tag or "latest"

    def with_digest(self, digest: Digest) -> Reference:
        """The same repository at a digest, without a tag."""
        return Reference(self.host, self.repository, None, digest)

    def with_tag(self, tag: str) -> Reference:
        """The same repository at a tag, without a digest.

        Raises:
            InvalidArgument: the tag is malformed.
        """
        if _TAG.fullmatch(tag) is None:
            raise InvalidArgument(f"malformed tag {tag[:200]!r}")
        return Reference(self.host, self.repository, tag, None)

    def __str__(self) -> str:
        return self.name


def _local(text: str, kind: str) -> Reference:
    """A colon ends the path, and the rest is the image's name in the layout, whatever it is."""
    path, _, tag = text.removeprefix(kind).partition(":")
    if not path.strip("/") or "\0" in text:
        raise _invalid(text, "it names no file or directory")
    return Reference(kind, path[1:], tag or None)


def _split(text: str, name: str) -> tuple[str, str]:
    """Host and repository of a name without tag and digest, with docker's defaults."""
    first, slash, rest = name.partition("/")
    # docker's rule: the first part is a host only if it cannot be a namespace.
    is_host = slash and (
        "." in first or ":" in first or first == "localhost" or first.lower() != first
    )
    host, repository = (first, rest) if is_host else (DOCKER_HUB, name)
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DOCKER_HUB
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 1) not in range(1, 65536) or not _is_six(match["six"]):
        raise _invalid(text, "its host is malformed")
    if repository.lower() != repository:
        raise _invalid(text, "its repository must be lower case")
    if _REPOSITORY.fullmatch(repository) is None:
        raise _invalid(text, "its repository is malformed")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if len(host) + 1 + len(repository) > _NAME_LIMIT:
        raise _invalid(text, "its name has more than 255 characters")
    return host, repository


def _is_six(address: str | None) -> bool:
    """Whether what is between brackets is an address, if there is anything."""
    try:
        return address is None or bool(ipaddress.IPv6Address(address))
    except ValueError:
        return False


def _digest(text: str, digest: str) -> Digest:
    try:
        return Digest.parse(digest)
    except FormatError:
        raise _invalid(text, "its digest is malformed") from None


def _invalid(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"image reference {text[:200]!r}: {why}")
