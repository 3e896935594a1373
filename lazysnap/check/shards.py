# SPDX-License-Identifier: Apache-2.0
"""The shards: their processes, their file systems, and the layers that they serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

import lazysnap
from lazysnap import mounts
from lazysnap.check.finding import Context, Finding, Probe, failure, info, warning
from lazysnap.check.state import ask_file_system, running_daemon, runs, slots
from lazysnap.errors import LazysnapError
from lazysnap.layers.slots import SlotRecord
from lazysnap.shard.calls import Health, HealthState, Who, WorkerCalls
from lazysnap.shard.client import connect

# Long: a worker that is busy is not a dead one.
_CALL_SECONDS = 15.0
_HEALTH_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as its files and its worker show it.

    Attributes:
        number: of the shard.
        keeper: process id of its keeper, 0 if it has none.
        who: what its worker answers to `ping`, None if it does not.
        slots: of layers on it.
        problem: why its worker does not answer.
    """

    number: int
    keeper: int
    who: Who | None
    slots: tuple[int, ...]
    problem: str = ""


def _worker(context: Context, shard: int, seconds: float) -> WorkerCalls:
    return connect(context.paths.shard_socket(shard), timeout=seconds)


def _numbers(context: Context, records: Sequence[SlotRecord]) -> set[int]:
    return {*context.paths.shard_numbers(), *(record.shard for record in records)}


async def shards(context: Context) -> list[Shard]:
    """All shards that serve something, or run."""
    records, _ = slots(context)
    found: list[Shard] = []

    async def one(number: int) -> None:
        who, problem = None, ""
        try:
            who = await _worker(context, number, _CALL_SECONDS).ping()
        except LazysnapError as error:
            problem = str(error)
        mine = tuple(record.slot for record in records if record.shard == number)
        shard = Shard(number, _keeper(context, number), who, mine, problem)
        if shard.keeper or shard.who or shard.slots:
            found.append(shard)

    async with trio.open_nursery() as nursery:
        for number in _numbers(context, records):
            nursery.start_soon(one, number)
    return sorted(found, key=lambda shard: shard.number)


def _keeper(context: Context, number: int) -> int:
    """The keeper that has left its number in the lock file, if it lives."""
    try:
        with open(context.paths.shard_lock(number), encoding="ascii") as file:
            pid = int(file.read().strip() or 0)
    except (OSError, ValueError):
        return 0
    return pid if runs(pid, "lazysnap.shard.keeper", context.root, str(number)) else 0


async def processes(context: Context) -> list[Finding]:
    """Each shard has a keeper and a worker of this release."""
    daemon = running_daemon(context)
    return [
        finding
        for shard in await shards(context)
        if (finding := judge(shard, daemon is not None)) is not None
    ]


def judge(shard: Shard, daemon: bool) -> Finding | None:
    """What is wrong with the processes of a shard, if anything.

    Args:
        shard: which.
        daemon: whether a daemon runs that looks after it.
    """
    name, layers = f"shard {shard.number}", f"its {len(shard.slots)} layers cannot be read"
    if shard.who is None and not shard.keeper:
        return failure(
            f"{name} has no processes",
            layers,
            "see the daemon's log for why it does not start" if daemon else "start lazysnap serve",
        )
    if shard.who is None:
        return failure(
            f"the worker of {name} (keeper {shard.keeper}) does not answer: {shard.problem}",
            f"{layers}, or only slowly",
            "lazysnap serve replaces it within half a minute: "
            + ("if it does not, see its log" if daemon else "start it"),
        )
    if shard.keeper != shard.who.keeper:
        return warning(
            f"the worker of {name} (pid {shard.who.pid}) has no keeper",
            "it will not be replaced when it ends, and its containers get errors then",
            "stop its containers when that suits, kill the worker, restart lazysnap serve",
        )
    if shard.who.version != lazysnap.__version__:
        return warning(
            f"{name} runs release {shard.who.version}, installed is {lazysnap.__version__}",
            "what the new release fixes is still broken",
            "restart lazysnap serve: it replaces workers without breaking reads",
        )
    return None


async def file_systems(context: Context) -> list[Finding]:
    """Each shard is mounted, and answers through the kernel."""
    found: list[Finding] = []
    points = mounts.mount_points()

    async def one(number: int, layers: int) -> None:
        path = context.paths.shard(number)
        point = mounts.mounted_at(path, points)
        why = f"its {layers} layers cannot be read"
        if point is None:
            found.append(failure(f"nothing is mounted at {path}", why, "restart lazysnap serve"))
            return
        look = await ask_file_system(path, _CALL_SECONDS)
        if look.answered and not look.problem:
            return
        verb = "fails" if look.answered else "hangs"
        cure = "restart lazysnap serve; if that does not help, restart the containers that use it"
        found.append(failure(f"the file system at {path} {verb}: {look.problem}", why, cure))

    records, _ = slots(context)
    async with trio.open_nursery() as nursery:
        # Workers are not asked first: one that hangs would have to be waited for twice.
        for number in sorted(_numbers(context, records)):
            mine = sum(record.shard == number for record in records)
            if mine or _keeper(context, number):
                nursery.start_soon(one, number, mine)
    return found


async def layers(context: Context) -> list[Finding]:
    """Each layer can be served: from the cache, or from its registry."""
    records = {record.slot: record for record in slots(context)[0]}
    found: list[Finding] = []

    async def one(shard: Shard) -> None:
        worker = _worker(context, shard.number, _HEALTH_SECONDS)
        try:
            health = await worker.health(shard.slots)
        except LazysnapError as error:
            found.append(warning(f"shard {shard.number} does not report its layers: {error}"))
            return
        usable = []
        for slot in shard.slots:
            known = health.get(slot, Health(HealthState.FAILED, "their state is not known"))
            bad = judge_layer(_name(records[slot]), known)
            found.extend(bad)
            if not bad:
                usable.append(slot)
        try:
            # One that cannot be loaded would fail the whole call.
            numbers = await worker.status(usable)
        except LazysnapError as error:
            found.append(warning(f"shard {shard.number} does not report its errors: {error}"))
            return
        for row in numbers:
            if row.errors:
                name = _name(records[row.slot])
                text = f"{name} had {row.errors} errors, the last: {row.last_error}"
                found.append(info(text, "it can be read now, but readers may have seen the errors"))

    async with trio.open_nursery() as nursery:
        for shard in await shards(context):
            if shard.who is not None and shard.slots:
                nursery.start_soon(one, shard)
    return found


def _name(record: SlotRecord) -> str:
    return f"layer {record.layer_digest} of {record.reference}"


def judge_layer(name: str, health: Health) -> list[Finding]:
    """What the health of a layer means."""
    cure = "check the network and the node's credentials (docker login)"
    detail = health.detail
    if health.state is HealthState.FAILED:
        why = "readers get errors"
        return [
            failure(
                f"{name} cannot be served: {detail}", why, "remove the image, and pull it again"
            )
        ]
    if health.state is HealthState.UNREACHABLE:
        return [failure(f"{name} cannot be read: {detail}", "its image cannot be started", cure)]
    if health.state is HealthState.DEGRADED:
        why = "what is in the cache can be read, the rest cannot"
        return [warning(f"{name} cannot be fetched now: {detail}", why, cure)]
    return []


PROBES = (
    Probe("shards", "every shard has a keeper and a worker", processes),
    Probe("shard-mounts", "the file systems of shards answer", file_systems, seconds=60),
    Probe("layers", "all lazy layers can be read", layers, seconds=90),
)
