# SPDX-License-Identifier: Apache-2.0
"""When starts are watched, and what comes of it; the shards are a stand-in with real recorders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from lazysnap.errors import FailedPrecondition, Unavailable
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.layers.slots import SlotRecord
from lazysnap.prefetch.profile import Profile, Read
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.shard.calls import WorkerCalls, remote
from lazysnap.supervisor import Supervisor
from tests.support.clocks import patient_clock

_MANIFEST = "sha256:" + "ab" * 32
_LAYERS = ["sha256:" + f"{n:02x}" * 32 for n in range(3)]


def _record(slot: int, *, shard: int = 0, manifest: str = _MANIFEST) -> SlotRecord:
    return SlotRecord(
        slot=slot,
        shard=shard,
        layer_digest=_LAYERS[slot - 1],
        index="index",
        reference="registry/image:1",
        blob_size=100,
        manifest=manifest,
    )


class Shards:
    """What `Supervisor.worker` reaches."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, dict[str, Any]]] = []
        self.fault: Callable[[int, str], None] = lambda shard, name: None
        self.answer: Any = None

    def worker(self, shard: int, *, timeout: float) -> WorkerCalls:
        return remote(partial(self._send, shard))

    async def _send(self, shard: int, name: str, args: Mapping[str, Any]) -> Any:
        await trio.lowlevel.checkpoint()
        self.calls.append((shard, name, dict(args)))
        self.fault(shard, name)
        if name != "recorded":
            return {}
        if self.answer is not None:
            return self.answer
        return {_LAYERS[slot - 1]: [[f"f{slot}", 0, 10, slot]] for slot in args["slots"]}

    def names(self) -> list[str]:
        return [name for _, name, _ in self.calls]


Clock = trio.testing.MockClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return patient_clock(monkeypatch)


def _learner(tmp_path: Path, shards: Shards, *, enabled: bool = True) -> ProfileLearner:
    return ProfileLearner(str(tmp_path), cast(Supervisor, shards), enabled=enabled, seconds=30)


def _found(tmp_path: Path) -> Profile | None:
    return ProfileStore(str(tmp_path)).find(_MANIFEST)


async def test_another_start_ends_watching_the_first(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)
    chain = [_record(1)]
    async with trio.open_nursery() as nursery:
        learner.starts_again(chain)
        nursery.start_soon(learner.started, chain)
        await trio.sleep(5)
        assert not learner.watched(chain)
        learner.starts_again(chain)
        assert learner.watched(chain)
    assert trio.current_time() < 10
    assert _found(tmp_path) is not None


async def test_a_start_is_watched_on_all_shards_and_learned(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    chain = [_record(1), _record(2, shard=1), _record(3)]
    await _learner(tmp_path, shards).started(chain)
    assert trio.current_time() == pytest.approx(30)
    assert sorted(shards.names()) == ["record", "record", "recorded", "recorded"]
    slots = {shard: args["slots"] for shard, _, args in shards.calls}
    assert slots == {0: [1, 3], 1: [2]}
    assert len({args["since"] for _, _, args in shards.calls}) == 1
    profile = _found(tmp_path)
    assert profile is not None
    expected = {_LAYERS[n]: [Read(f"f{n + 1}", 0, 10, n + 1)] for n in range(3)}
    assert profile.layers == expected


async def test_two_starts_at_once_are_watched_once(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(learner.started, [_record(1)])
    assert shards.names() == ["record", "recorded"]


async def test_a_known_profile_is_applied_and_not_learned_again(
    tmp_path: Path, clock: Clock
) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)
    await learner.started([_record(1), _record(2)])
    shards.calls.clear()
    await learner.started([_record(1), _record(2), _record(3)])
    assert shards.calls == [
        (0, "attach", {"slot": 1, "reads": [["f1", 0, 10, 1]]}),
        (0, "attach", {"slot": 2, "reads": [["f2", 0, 10, 2]]}),
    ]
    assert await learner.reads(_record(2)) == [["f2", 0, 10, 2]]
    assert await learner.reads(_record(3)) == []


async def test_what_is_told_early_is_told_with_the_layer_as_well(
    tmp_path: Path, clock: Clock
) -> None:
    """The shard that is told may be another process by then, or the profile may have come since."""
    shards = Shards()
    learner = _learner(tmp_path, shards)
    assert await learner.early_reads(_MANIFEST, _LAYERS[0]) == []
    await learner.started([_record(1), _record(2)])
    shards.calls.clear()
    for _ in range(2):
        assert await learner.early_reads(_MANIFEST, _LAYERS[0]) == [["f1", 0, 10, 1]]
    assert await learner.early_reads(_MANIFEST, _LAYERS[2]) == []
    assert await learner.reads(_record(1)) == [["f1", 0, 10, 1]]
    await learner.started([_record(1), _record(2)])
    assert [args["slot"] for _, _, args in shards.calls] == [2]


async def test_what_was_told_with_the_layer_is_not_told_again_by_the_first_start(
    tmp_path: Path, clock: Clock
) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)
    await learner.started([_record(1), _record(2)])
    shards.calls.clear()

    async def attached_by_a_start() -> list[int]:
        shards.calls.clear()
        await learner.started([_record(1), _record(2)])
        return [args["slot"] for _, _, args in shards.calls]

    await learner.reads(_record(1))
    assert await attached_by_a_start() == [2]
    assert await attached_by_a_start() == [1, 2]
    await learner.reads(_record(1))
    await trio.sleep(100)
    assert await attached_by_a_start() == [1, 2]


async def test_without_learning_nothing_is_watched(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    await _learner(tmp_path, shards, enabled=False).started([_record(1)])
    await _learner(tmp_path, shards).started([_record(1, manifest="")])
    await _learner(tmp_path, shards).started([])
    assert shards.calls == []


@pytest.mark.parametrize("when", ["record", "recorded"])
@pytest.mark.parametrize(
    "error", [FailedPrecondition("replaced"), Unavailable("dead"), KeyError(1)]
)
async def test_a_shard_that_dies_while_watched_teaches_nothing_and_the_next_start_is_watched(
    tmp_path: Path, clock: Clock, when: str, error: Exception
) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)

    def fault(shard: int, name: str) -> None:
        if (shard, name) == (0, when):
            raise error

    shards.fault = fault
    await learner.started([_record(1), _record(2, shard=1)])
    assert _found(tmp_path) is None
    if when == "recorded" and not isinstance(error, KeyError):
        assert shards.names().count("recorded") == 2  # none goes on recording
    shards.fault = lambda shard, name: None
    await learner.started([_record(1), _record(2, shard=1)])
    assert _found(tmp_path) is not None


@pytest.mark.parametrize("answer", [[1, 2], {"a": 1}, {"a": [["p", -1, 2, 3]]}, {"a": [["p"]]}, 7])
async def test_an_answer_that_makes_no_sense_ends_nothing(
    tmp_path: Path, clock: Clock, answer: object
) -> None:
    shards = Shards()
    shards.answer = answer
    await _learner(tmp_path, shards).started([_record(1)])
    assert _found(tmp_path) is None


async def test_a_start_that_reads_nothing_is_watched_again(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    shards.answer = {_LAYERS[0]: []}
    learner = _learner(tmp_path, shards)
    for _ in range(2):
        await learner.started([_record(1)])
    assert shards.names() == ["record", "recorded"] * 2
    assert _found(tmp_path) is None


async def test_a_profile_that_cannot_be_read_is_learned_anew(tmp_path: Path, clock: Clock) -> None:
    shards = Shards()
    learner = _learner(tmp_path, shards)
    path = tmp_path / "profiles" / ("ab" * 32 + ".json")
    path.write_bytes(b"[" * 100_000)
    assert await learner.reads(_record(1)) == []
    await learner.started([_record(1)])
    assert _found(tmp_path) is not None
