# SPDX-License-Identifier: Apache-2.0
"""Which servers have just failed, so that not everybody finds that out anew.

Somebody who gave up tells it here. For some seconds after that:

- an operation that cannot wait, such as the opening of a layer for a pull, is not even begun. When that
  time is over one of them tries, and the others go on failing meanwhile;
- an operation that can wait tries once, and is not patient again with a server that has failed for as
  long as its patience. So it has looked itself, and reads work as soon as the server does.

A server that cannot be reached is out for all of its repositories; one that answers, but not as it
should, is out for the repository that was asked. Sends nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from lazysnap.errors import RegistryUnreachable

_REMEMBERED_SECONDS = 10.0
_REMEMBERED_MOST_SECONDS = 60.0
_PROBE_SECONDS = 10.0
"""For how long others wait for the one that tries; longer than that takes."""
_MOST = 1024


@dataclass
class _Outage:
    """A server or a repository that has failed.

    Attributes:
        since: when the first operation that gave up had begun to get nothing.
        noted: when an operation last gave up.
        until: when somebody may try again.
        seconds: for how long a failure is remembered; grows from one try to the next.
        cause: what happened, for people.
    """

    since: float
    noted: float
    until: float
    seconds: float
    cause: str


class Outages:
    """What the operations of a client know of servers."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Outage] = {}

    def forget(self) -> None:
        """Let everybody try again."""
        self._known.clear()

    def outlook(self, server: str, repository: str) -> Outlook:
        """What is known of a repository.

        Args:
            server: host and port that are asked for it.
            repository: its path there.
        """
        return Outlook(self._known, server, repository)


class Outlook:
    """What is known of one repository and its server; told and asked by operations."""

    def __init__(self, known: dict[tuple[str, str], _Outage], server: str, repository: str) -> None:
        self._known = known
        self._server = server
        self._keys = ((server, ""), (server, repository))

    def check(self, what: str) -> None:
        """Fail at once if it has just failed, for an operation that does not want to wait.

        Args:
            what: the operation, for the error.

        Raises:
            RegistryUnreachable: it has, and it is not this operation's turn to try.
        """
        now = trio.current_time()
        for outage in self._outages():
            if now < outage.until:
                ago = now - outage.noted
                raise RegistryUnreachable(
                    f"{what}: not asked, as it failed {ago:.0f} s ago: {outage.cause}",
                    hint="check that the registry is up and can be reached from this machine",
                )
        for outage in self._outages():
            outage.until = now + _PROBE_SECONDS

    def failing_seconds(self) -> float:
        """For how long it has failed, as far as that is known for now; 0 if it has not."""
        now = trio.current_time()
        return max((now - o.since for o in self._outages() if now < o.until), default=0.0)

    def gave_up(self, since: float, cause: str, unreachable: str) -> None:
        """Note that an operation failed.

        Args:
            since: from when on it got nothing.
            cause: what happened, for people.
            unreachable: the server that could not be reached, if it was that.
        """
        now = trio.current_time()
        key = self._keys[0 if unreachable == self._server else 1]
        outage = self._known.get(key)
        if outage is None or now > outage.until + outage.seconds:
            if len(self._known) >= _MOST:
                self._known.clear()
            seconds = _REMEMBERED_SECONDS
            self._known[key] = _Outage(since, now, now + seconds, seconds, cause)
            return
        if since >= outage.noted:
            # One that was begun in the knowledge of this, and not one of many at the same time.
            outage.seconds = min(outage.seconds * 2, _REMEMBERED_MOST_SECONDS)
        outage.noted, outage.until, outage.cause = now, now + outage.seconds, cause

    def reached(self) -> None:
        """Note that the server has answered something."""
        self._known.pop(self._keys[0], None)

    def works(self) -> None:
        """Note that the repository has given what it was asked for."""
        for key in self._keys:
            self._known.pop(key, None)

    def _outages(self) -> list[_Outage]:
        return [self._known[key] for key in self._keys if key in self._known]
