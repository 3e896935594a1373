# SPDX-License-Identifier: Apache-2.0
"""The database of snapshots, and whether directories, slots and indexes agree with it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from lazysnap.check.finding import Context, Finding, Fix, Probe, failure, info, warning
from lazysnap.check.state import running_daemon, slots
from lazysnap.errors import Internal, LazysnapError
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.view import open_index
from lazysnap.snapshotter.directories import Directories, garbage
from lazysnap.store.reader import SnapshotReader
from lazysnap.store.records import Attachment

_MOST_ERRORS = 3
_SHOWN = 5
# Nothing that the daemon builds or deletes takes so long.
_FORGOTTEN_SECONDS = 3600.0
_AGAIN = "remove the images that use it, and pull them again"


@contextlib.contextmanager
def _opened(context: Context) -> Iterator[SnapshotReader | None]:
    """The database for reading only, or None if there is none."""
    reader = SnapshotReader.open_read_only(context.paths.database)
    try:
        yield reader
    finally:
        if reader is not None:
            reader.close()


def integrity(context: Context) -> Iterator[Finding]:
    """SQLite finds no damage."""
    why = "snapshots are lost or cannot be used"
    cure = "stop lazysnap serve, move metadata.db* and snapshots/ away together, and pull again"
    try:
        with _opened(context) as database:
            if database is None:
                if os.path.isdir(context.root):
                    yield info(
                        "there is no database yet", "lazysnap serve creates it when it starts"
                    )
                return
            found = database.damage(_MOST_ERRORS)
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    if found:
        yield failure(f"metadata.db is damaged: {'; '.join(found)}", why, cure)


def _known(context: Context) -> set[int] | None:
    """Numbers of all snapshots; None if they cannot be told, which `integrity` reports."""
    try:
        with _opened(context) as database:
            return None if database is None else database.ids()
    except (sqlite3.DatabaseError, LazysnapError):
        return None


def attached(context: Context) -> Mapping[int, Attachment] | None:
    """All lazy snapshots by number; None if they cannot be told, which `integrity` reports."""
    try:
        with _opened(context) as database:
            return None if database is None else database.attachments()
    except (sqlite3.DatabaseError, LazysnapError):
        return None


def directories(context: Context) -> Iterator[Finding]:
    """Every snapshot has a directory, and every directory a snapshot."""
    top = context.paths.snapshots
    # In this order: a snapshot gets its directory before the database knows it.
    known, names = _known(context), _listed(top)
    if known is None:
        return
    missing = sorted(known - {int(name) for name in names if name.isdecimal()})
    # One that was removed meanwhile is no loss.
    missing = sorted(set(missing) & (_known(context) or set()))
    if missing:
        yield failure(
            f"{len(missing)} snapshots have no directory: {_some(missing)}",
            "containers of their images cannot be started",
            _AGAIN,
        )
    orphans = [name for name in garbage(names, known) if name.isdecimal() or _temporary(name)]
    if running_daemon(context) is not None:
        orphans = [name for name in orphans if _old(os.path.join(top, name))]
    if orphans:
        yield warning(
            f"{len(orphans)} directories in {top} belong to no snapshot: {_some(sorted(orphans))}",
            "they take space",
            "the next start of lazysnap serve removes them, and so does `lazysnap check --fix`",
            Fix(partial(_dispose, context), True),
        )


def _temporary(name: str) -> bool:
    return name.startswith(("new-", "rm-"))


def _old(path: str) -> bool:
    try:
        return os.lstat(path).st_ctime < time.time() - _FORGOTTEN_SECONDS
    except FileNotFoundError:
        return False


def _dispose(context: Context) -> str:
    """Remove orphans as the daemon would; nothing is known to be one that was not a moment ago."""
    known = _known(context)
    if known is None:
        return "removed nothing: the database cannot be read"
    found = Directories(context.root)
    names = garbage(found.names(), known)
    for name in names:
        found.dispose(found.discard(name) if name.isdecimal() else name)
    return f"removed {len(names)} directories"


def lazy(context: Context) -> Iterator[Finding]:
    """Every lazy snapshot has its slot and its index, and every slot a snapshot."""
    # In this order: a slot gets its record before the database knows it.
    known = attached(context)
    if known is None:
        return
    records, unreadable = slots(context)
    daemon = running_daemon(context)
    restored = "restart lazysnap serve, which writes it anew" if daemon else "start lazysnap serve"
    for slot, problem in sorted(unreadable.items()):
        yield failure(f"slot {slot} is damaged: {problem}", "its layer cannot be read", restored)
    by_slot = {record.slot: record for record in records}
    for number, attachment in sorted(known.items()):
        record = by_slot.get(attachment.slot)
        if attachment.slot in unreadable:
            continue
        if record is None:
            if number in (attached(context) or ()):  # not removed meanwhile
                yield failure(
                    f"lazy snapshot {number} has no record of its slot {attachment.slot}",
                    "its layer cannot be read once its worker is replaced",
                    restored,
                )
        elif problem := _index_problem(context.paths.cache.index(record.index), record):
            yield failure(
                f"the index of layer {record.layer_digest} of {record.reference} {problem}",
                "the layer cannot be read once its worker is replaced",
                f"{restored}, from the registry",
            )
    extra = sorted(by_slot.keys() - {attachment.slot for attachment in known.values()})
    if extra and daemon is None:
        yield warning(
            f"{len(extra)} slots belong to no snapshot: {_some(extra)}",
            "their layers are kept in memory and fetched, but nobody reads them",
            "the next start of lazysnap serve removes them",
        )


def _index_problem(path: str, record: SlotRecord) -> str:
    """What is wrong with the index that a slot needs; empty if nothing is."""
    if not os.path.exists(path):
        return "is gone"
    try:
        size = open_index(path).blob_size
    except Internal:
        return "is damaged"
    if size != record.blob_size:
        return f"is of a blob of {size} bytes, and not of {record.blob_size}"
    return ""


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _some(items: Iterable[object]) -> str:
    shown = [str(item) for item in items]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


PROBES = (
    Probe("database", "the database is sound", integrity),
    Probe("snapshots", "snapshots and their directories agree", directories),
    Probe("slots", "lazy snapshots have what they are served from", lazy),
)
