# SPDX-License-Identifier: Apache-2.0
"""The states of an object, and which verb of `ObjectStore` leads from which to which.

Theory of operation
===================

An object is a content that was verified before it was stored; it appears whole. It is in one of two
places (`object_files.Place`): *shown*, as `objects/<aa>/<digest>`, where the kernel reads it without
asking anybody, or *aside*, as `aside/<aa>/<digest>`, where only our processes do. Storing does not sync,
as that would cost more than the download. Some seconds later, after one sync of the file system for all
that is new, an object is *sealed* (see `stamps`): from then on no process needs to verify it again. An
object without a seal is verified before its first use by each process that has not stored it.

These are the states of one key, as one process (called this process) sees them:

    state         place  seal  what this process knows   who uses it
    ABSENT        -      -     -                         nobody
    UNVERIFIED    shown  no    nothing                   the kernel; this process after `verify`
    NEW           shown  no    it was verified           the kernel and this process
    SEALED        shown  yes   -                         the kernel and all processes
    DISTRUSTED    aside  no    nothing                   this process after `verify`
    HELD_NEW      aside  no    it was verified           this process
    HELD          aside  yes   it is to be shown again   all processes
    ON_PROBATION  aside  yes   nothing                   all processes; the first `open` ends it

An object is *held* while a start is watched (`hold_above` is not None), as what the kernel reads would
not be noticed; `release` shows it again. It is *on probation* when it would be evicted next: whoever uses
it has to open it here, so that the use is known. It is *distrusted* when somebody has changed it, or when
the machine may have lost power since it was stored.

A column is the state before, a cell the state after; `.` stands for no change. `crash` is the end of
this process, and its column's cell what the next process finds. Rows with a star are for the time when
objects are held; `put` then stands for an object that is larger than `hold_above`.

    verb              ABSENT      UNVERIFIED  NEW         SEALED
    put, adopt        NEW         NEW         .           NEW
    put*, adopt*      HELD_NEW    HELD_NEW    HELD_NEW    HELD_NEW
    verify            .           NEW         .           .
    open              .           .           .           .
    seal              .           .           SEALED      .
    seal*             .           .           SEALED      .
    release           .           .           .           .
    release*          .           .           .           .
    hold              .           DISTRUSTED  HELD_NEW    HELD
    put_on_probation  .           DISTRUSTED  HELD_NEW    ON_PROBATION
    distrust          .           DISTRUSTED  DISTRUSTED  DISTRUSTED
    distrust_new      .           .           DISTRUSTED  .
    recover           .           DISTRUSTED  .           .
    remove            .           ABSENT      ABSENT      ABSENT
    crash             .           .           UNVERIFIED  .

    verb              DISTRUSTED  HELD_NEW    HELD        ON_PROBATION
    put, adopt        NEW         NEW         NEW         NEW
    put*, adopt*      HELD_NEW    .           HELD_NEW    HELD_NEW
    verify            HELD_NEW    .           .           HELD
    open              .           .           .           HELD
    seal              .           SEALED      SEALED      .
    seal*             .           HELD        .           .
    release           .           NEW         SEALED      .
    release*          .           .           .           .
    hold              .           .           .           HELD
    put_on_probation  .           .           .           .
    distrust          .           DISTRUSTED  DISTRUSTED  DISTRUSTED
    distrust_new      .           .           .           .
    recover           .           .           .           SEALED
    remove            ABSENT      ABSENT      ABSENT      ABSENT
    crash             .           DISTRUSTED  ON_PROBATION  .

`verify` makes any object ABSENT whose bytes are wrong. Each verb makes a file appear, move or vanish in
one step, so a crash within one is as before or after it; what is left of an unfinished file has a
temporary name, and `pruning` removes it. Other processes work on the same files: what is NEW here may be
put aside by their `recover`, and is then HELD_NEW. Storing removes the file in the other place. A key has
one in both only if two processes store it at the same time: the shown one counts, and `seal` removes the
other one. Knows nothing of files: pure.
"""

from __future__ import annotations

import enum

from lazysnap.cache.object_files import Place


class State(enum.Enum):
    """The states of an object in the eyes of one process, see the table."""

    ABSENT = enum.auto()
    UNVERIFIED = enum.auto()
    NEW = enum.auto()
    SEALED = enum.auto()
    DISTRUSTED = enum.auto()
    HELD_NEW = enum.auto()
    HELD = enum.auto()
    ON_PROBATION = enum.auto()


def state_of(place: Place, *, sealed: bool, verified: bool, held: bool) -> State:
    """The state of an object that has a file.

    Args:
        place: where the file is.
        sealed: whether it has its seal.
        verified: whether this process has verified it since it started.
        held: whether it is noted as one to be shown again.
    """
    if place is Place.SHOWN:
        return State.SEALED if sealed else State.NEW if verified else State.UNVERIFIED
    if sealed:
        return State.HELD if held or verified else State.ON_PROBATION
    return State.HELD_NEW if verified else State.DISTRUSTED
