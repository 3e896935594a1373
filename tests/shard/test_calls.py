# SPDX-License-Identifier: Apache-2.0
"""Both sides of the calls of workers, and workers and callers of other releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import pytest

from lazysnap.errors import Internal
from lazysnap.layers.slots import LayerOrigin
from lazysnap.prefetch.profile import Read
from lazysnap.shard.calls import Health, HealthState, Loaded, WorkerCalls, handlers, remote

_PING = {
    "pid": 2, "keeper": 1, "version": "1.0", "shard": 3, "uptime_seconds": 0.5,
    "requests": {"read": 7},
}  # fmt: skip
_STATUS = {
    "slot": 1, "shard": 0, "layer": "sha256:00", "reference": "r", "blob_bytes": 1, "files": 2,
    "local_files": 1, "bytes": 9, "local_bytes": 4, "requests": 1, "fetched_bytes": 4,
    "fetched_by_class": {"demand": 4}, "errors": 0, "last_error": "", "last_read_seconds_ago": None,
}  # fmt: skip
_METRICS = {"process": "1@2.0", "started": 2.0, "sample": {"n": {"": [1.0]}}, "gauges": {"g": 1.0}}
_TRACE = {
    "slot": 1, "fetched": [[0.5, None, 0, 1, 0, 10, 0, 0, 0, False]],
    "waited": [[0.5, 0.1, 3, 0, 10, True]], "forgotten": 0, "started": 0.0, "now": 1.0,
    "round_trip": 0.0, "bandwidth": 0.0, "recording": False,
}  # fmt: skip
_ORIGIN = {"index": "i", "layer_digest": "sha256:00", "reference": "r", "blob_size": 1}
_READS = [["usr/bin/it", 0, 10, 3]]
# By name: what is sent, and what is answered.
_WIRE: dict[str, tuple[dict[str, Any], Any]] = {
    "ping": ({}, _PING),
    "restart": ({}, None),
    "expect": ({"layer": _ORIGIN, "reads": _READS}, None),
    "attach": ({"slot": 1, "reads": _READS, "reachable": True}, {"nodes": 5}),
    "detach": ({"slots": [1], "reload": True}, None),
    "health": ({"slots": [1]}, {1: {"state": "degraded", "detail": "why"}}),
    "status": ({"slots": [1]}, [_STATUS]),
    "metrics": ({}, _METRICS),
    "link": ({"slot": 1, "node": 2}, None),
    "drain": ({"slots": [1]}, None),
    "record": ({"slots": [1], "since": 0.5, "fresh": True}, None),
    "recorded": ({"slots": [1], "since": 0.5}, {"sha256:00": _READS}),
    "trace": ({"slots": [1], "since": 0.5}, [_TRACE]),
    "reload": ({}, 42),
}


class Wire:
    """Carries calls as bytes, and notes them."""

    def __init__(self, answer: Any = None) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.answer = answer
        self.calls = remote(self._send)

    async def _send(self, name: str, args: Mapping[str, Any]) -> Any:
        self.sent.append((name, _carried(args)))
        return _carried(self.answer)


def _carried(value: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(value), strict_map_key=False)


@pytest.mark.parametrize("name", sorted(WorkerCalls.__abstractmethods__))
async def test_the_wire_is_what_it_was(name: str) -> None:
    """A relay is called in the wire's form, calls as a client does, and gives the answer back."""
    sent, answer = _WIRE[name]
    wire = Wire(answer)
    handle = handlers(wire.calls)[name]
    assert _carried(await handle(**_carried(sent))) == answer
    assert wire.sent == [(name, sent)]


async def test_what_the_caller_leaves_out_is_not_sent() -> None:
    wire = Wire({"nodes": 5})
    assert await wire.calls.attach(1) == Loaded(5)
    await wire.calls.detach([2])
    assert wire.sent == [("attach", {"slot": 1}), ("detach", {"slots": [2]})]


async def test_arguments_and_answers_have_the_types_that_are_declared() -> None:
    wire = Wire({1: {"state": "local", "detail": ""}})
    assert await wire.calls.health((1,)) == {1: Health(HealthState.LOCAL)}
    await wire.calls.expect(LayerOrigin(**_ORIGIN), [Read("p", 0, 1, 2)])
    assert wire.sent[1] == ("expect", {"layer": _ORIGIN, "reads": [["p", 0, 1, 2]]})


async def test_fields_of_a_later_release_are_ignored_and_missing_ones_have_defaults() -> None:
    wire = Wire({**_PING, "colour": "red"})
    del wire.answer["requests"]
    who = await wire.calls.ping()
    assert (who.pid, who.requests) == (2, {})


@pytest.mark.parametrize("answer", [None, 7, {1: {"state": "asleep"}}, {"x": {"state": "local"}}])
async def test_an_answer_that_is_not_understood_is_an_error(answer: object) -> None:
    with pytest.raises(Internal, match="'health' in another form"):
        await Wire(answer).calls.health([1])


async def test_reads_that_make_no_sense_reach_the_worker() -> None:
    """As wrong advice must not keep a layer from being attached."""
    wire = Wire({"nodes": 5})
    await handlers(wire.calls)["attach"](slot=1, reads=[["p", "no number"], 7])
    assert wire.sent == [("attach", {"slot": 1, "reads": [["p", "no number"], 7]})]
