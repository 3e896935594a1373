# SPDX-License-Identifier: Apache-2.0
"""Notes which ranges of a layer's files are read, while images start.

Images share layers, so several starts may be watched at once: each is a *session* of the same recorder,
known by the time when it began.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lazysnap.index.reader import LayerIndex
from lazysnap.prefetch.profile import Read, coalesce

# A start that reads more often than this is not helped by a profile.
_MOST = 50_000
# A start that reads more than this is not waited for, nor one that reads nothing for so long.
_OVER_SECONDS = 5.0
_STARTS_AT_MOST = 5_000
EXPIRES_SECONDS = 3600.0
"""A session that nobody has ended by then is given up."""
# Reading so many files of so many that lie together is no start, but a walk through the layer. Not
# fewer: `import pandas` reads all 600 time zones.
_WALK_READS = 1024
_WALK_SPAN = 1600
_LOOK_EVERY = 256


class Recorder:
    """Notes of one layer.

    Args:
        place: tells where a file is: files beside each other in the layer have numbers that follow.
        walked: called when somebody seems to read all files of some part of the layer.

    Attributes:
        sessions: those that have not ended.
    """

    def __init__(
        self,
        place: Callable[[int], int] = lambda node: node,
        walked: Callable[[], object] = lambda: None,
    ) -> None:
        self._place = place
        self._walked = walked
        self.sessions: set[float] = set()
        self._over: set[float] = set()
        self._notes: list[tuple[int, int, int, float]] = []
        # By time.monotonic(), when a session was begun here: later than the start, if all was busy.
        self._begun = 0.0

    def begin(self, since: float) -> None:
        """Begin a session.

        Args:
            since: when the start began, by time.monotonic().
        """
        self._begun = time.monotonic()
        expired = self._begun - EXPIRES_SECONDS
        self.sessions = {begun for begun in self.sessions if begun > expired}
        self._over &= self.sessions
        if not self.sessions:
            self._notes = []
        self.sessions.add(since)

    def end(self, since: float) -> list[tuple[int, int, int, float]] | None:
        """End a session.

        Returns:
            Its notes, for `reads`; None if it is not known.
        """
        if since not in self.sessions:
            return None
        self.sessions.remove(since)
        self._over.discard(since)
        return [note for note in self._notes if note[3] >= since]

    def give_up(self, sessions: set[float]) -> None:
        """Take later reads for no start of these sessions, which go on until they are ended."""
        self._over |= sessions & self.sessions

    @property
    def idle(self) -> bool:
        """Whether nobody wants the notes."""
        return not self.sessions

    @property
    def attentive(self) -> bool:
        """Whether what is read belongs to a start, also if that has been quiet for some time."""
        expired = time.monotonic() - EXPIRES_SECONDS
        return any(begun > expired for begun in self.sessions - self._over)

    @property
    def worthwhile(self) -> bool:
        """Whether a start may be going on: something was read lately, and not everything."""
        if not self.attentive:
            return False
        last = self._notes[-1][3] if self._notes else 0.0
        quiet = time.monotonic() - max(last, self._begun)
        return len(self._notes) < _STARTS_AT_MOST and quiet < _OVER_SECONDS

    def note(self, node: int, offset: int, size: int) -> None:
        """A range of a file is read now.

        Args:
            node: of the file.
            offset: in bytes.
            size: in bytes; may reach beyond the end.
        """
        if len(self._notes) < _MOST:
            self._notes.append((node, offset, size, time.monotonic()))
            if len(self._notes) % _LOOK_EVERY == 0 and self.worthwhile and self._is_walk():
                self._walked()

    def _is_walk(self) -> bool:
        places = sorted(map(self._place, {note[0] for note in self._notes}))
        ends = zip(places, places[_WALK_READS - 1 :], strict=False)
        return any(last - first < _WALK_SPAN for first, last in ends)


def reads(index: LayerIndex, notes: list[tuple[int, int, int, float]], since: float) -> list[Read]:
    """The notes, joined, in the order of time; to be called in a thread.

    Args:
        index: of the layer.
        notes: as `Recorder.end` returns them.
        since: of the session.
    """
    found = []
    paths: dict[int, str] = {}
    for node, offset, size, when in notes:
        length = min(size, index.attributes(node).size - offset)
        if length <= 0:
            continue
        path = paths.get(node)
        if path is None:
            try:
                path = paths[node] = index.path(node).decode().strip("/")
            except UnicodeDecodeError:
                path = paths[node] = ""
        if path:  # JSON cannot name the others
            found.append(Read(path, offset, length, max(0, round((when - since) * 1000))))
    return coalesce(found)
