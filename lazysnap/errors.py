# SPDX-License-Identifier: Apache-2.0
"""The one family of errors that lazysnap raises on purpose.

Each class carries the facts that the edges need (errno for FUSE, status name for gRPC, exit code
for the command line, whether trying again can help), so that an edge translates by looking at the
class and never by looking at a message. Knows nothing of grpc, pyfuse3 or httpx.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class LazysnapError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: what happened, naming the thing it happened to.
        hint: what the reader can do about it, if anything.
        reason: short kebab-case code for labels, metrics and logs; defaults to the class's.
    """

    retryable: ClassVar[bool] = False
    errno: ClassVar[int] = _errno.EIO
    grpc_code: ClassVar[str] = "UNKNOWN"
    exit_code: ClassVar[int] = 1
    default_reason: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.reason = reason or self.default_reason

    def __str__(self) -> str:
        return self.message


class InvalidArgument(LazysnapError):
    """The caller passed something that can never be right."""

    errno = _errno.EINVAL
    grpc_code = "INVALID_ARGUMENT"
    exit_code = 2
    default_reason = "invalid-argument"


class NotFound(LazysnapError):
    """The named thing does not exist."""

    errno = _errno.ENOENT
    grpc_code = "NOT_FOUND"
    default_reason = "not-found"


class AlreadyExists(LazysnapError):
    """The named thing exists."""

    errno = _errno.EEXIST
    grpc_code = "ALREADY_EXISTS"
    default_reason = "already-exists"


class FailedPrecondition(LazysnapError):
    """The thing is in a state that does not allow this."""

    grpc_code = "FAILED_PRECONDITION"
    default_reason = "failed-precondition"


class Unavailable(LazysnapError):
    """A part that is needed cannot serve now; trying again later can help."""

    retryable = True
    grpc_code = "UNAVAILABLE"
    default_reason = "unavailable"


class Internal(LazysnapError):
    """The local system refused something that should work (disk, mount, process)."""

    grpc_code = "INTERNAL"
    default_reason = "internal"


class ConfigError(LazysnapError):
    """The configuration is wrong."""

    exit_code = 2
    default_reason = "config"


class FormatError(LazysnapError):
    """Bytes that are not what their format says they must be."""

    grpc_code = "INVALID_ARGUMENT"
    default_reason = "invalid-format"


class DigestMismatch(LazysnapError):
    """Bytes whose digest is not the one that was promised."""

    grpc_code = "DATA_LOSS"
    default_reason = "digest-mismatch"


class NotLazy(LazysnapError):
    """A layer that is well-formed but cannot be mounted lazily; `reason` says why."""

    grpc_code = "FAILED_PRECONDITION"
    default_reason = "not-lazy"


class RegistryError(LazysnapError):
    """A registry answered with an error, and trying again does not help."""

    grpc_code = "UNAVAILABLE"
    default_reason = "registry-error"


class RegistryUnreachable(RegistryError):
    """A registry could not be reached, or kept failing, until the time limit."""

    retryable = True
    default_reason = "registry-unreachable"


class RegistryNotFound(RegistryError):
    """The registry does not have this manifest or blob."""

    grpc_code = "NOT_FOUND"
    default_reason = "not-in-registry"


class Unauthorized(RegistryError):
    """The registry refuses the credentials, or wants some and none are known."""

    grpc_code = "UNAUTHENTICATED"
    default_reason = "unauthorized"


class RangesUnsupported(RegistryError):
    """The server ignores Range headers, so a blob cannot be read in parts."""

    default_reason = "no-ranges"


class ContainerdError(LazysnapError):
    """containerd refused a call, or cannot be reached."""

    default_reason = "containerd"


def rebuilt(kind: str, message: str, hint: str | None, reason: str | None) -> LazysnapError:
    """Make the error that another process has described.

    Args:
        kind: name of its class; `Internal` is taken for one that is not in this module.
        message: what happened.
        hint: what to do.
        reason: its code; the class's if it is empty.
    """
    found = globals().get(kind)
    if not (isinstance(found, type) and issubclass(found, LazysnapError)):
        found = Internal
    return found(message, hint=hint, reason=reason or None)
