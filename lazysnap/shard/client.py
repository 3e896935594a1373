# SPDX-License-Identifier: Apache-2.0
"""Calls the worker of a shard at its control socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from lazysnap import channel
from lazysnap.errors import LazysnapError, Unavailable
from lazysnap.prefetch.profile import Read
from lazysnap.shard.calls import WorkerCalls, remote

_PAUSE_SECONDS = 0.02


def connect(path: str, *, timeout: float, patient: bool = False) -> WorkerCalls:
    """The calls of the worker that listens at a socket.

    They raise Unavailable if there is no answer in time, and what the worker raises.

    Args:
        path: the shard's control socket.
        timeout: seconds until a call must have been answered.
        patient: within the timeout, wait for a worker that takes the place of one that has ended.
    """

    async def once(name: str, args: Mapping[str, Any]) -> Any:
        return await channel.call(path, name, timeout=timeout, **args)

    async def again_and_again(name: str, args: Mapping[str, Any]) -> Any:
        deadline = trio.current_time() + timeout
        while True:
            left = max(deadline - trio.current_time(), 0.01)
            try:
                return await channel.call(path, name, timeout=left, **args)
            except Unavailable:
                if trio.current_time() + 0.05 > deadline:
                    raise
                await trio.sleep(_PAUSE_SECONDS)

    return remote(again_and_again if patient else once)


async def end_recording(
    worker: Callable[[int], WorkerCalls], shards: Mapping[int, Sequence[int]], since: float
) -> dict[str, list[Read]]:
    """End a recording on all shards, also if some do not answer, so that none goes on with it.

    Args:
        worker: the calls of a shard's worker.
        shards: the slots that were recorded, by shard.
        since: as it was given to `record`.

    Returns:
        What was read, by layer digest.

    Raises:
        LazysnapError: a shard did not answer, or has not recorded to the end.
    """
    layers: dict[str, list[Read]] = {}
    failed: LazysnapError | None = None
    for shard, slots in shards.items():
        try:
            layers.update(await worker(shard).recorded(slots, since))
        except LazysnapError as error:
            failed = error
    if failed is not None:
        raise failed
    return layers
