# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap import channel, frames
from lazysnap.errors import InvalidArgument, LazysnapError, NotFound, NotLazy, Unavailable


async def _serve(nursery: trio.Nursery, path: Path, **handlers: Any) -> str:
    await nursery.start(channel.serve, str(path), handlers)
    return str(path)


async def test_a_call_returns_what_the_handler_returns(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async def add(a: int, b: int) -> dict[int, int]:
        return {1: a + b}

    path = await _serve(nursery, tmp_path / "s", add=add)
    assert await channel.call(path, "add", timeout=60, a=1, b=2) == {1: 3}


async def test_errors_arrive_as_they_were_raised(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def refuse() -> None:
        raise NotLazy("no", hint="do", reason="because")

    path = await _serve(nursery, tmp_path / "s", refuse=refuse)
    with pytest.raises(NotLazy, match="no") as caught:
        await channel.call(path, "refuse", timeout=60)
    assert (caught.value.hint, caught.value.reason) == ("do", "because")


async def test_a_defect_in_a_handler_ends_only_its_call(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    async def fine() -> str:
        return "fine"

    path = await _serve(nursery, tmp_path / "s", broken=broken, fine=fine)
    with pytest.raises(LazysnapError, match="ZeroDivisionError"):
        await channel.call(path, "broken", timeout=60)
    with pytest.raises(InvalidArgument):
        await channel.call(path, "missing", timeout=60)
    assert await channel.call(path, "fine", timeout=60) == "fine"


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody answers"):
        await channel.call(str(tmp_path / "s"), "ping", timeout=60)


async def test_a_silent_peer_is_unavailable_in_time(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = await _serve(nursery, tmp_path / "s", wait=trio.sleep_forever)
    with pytest.raises(Unavailable, match=r"within 0\.05 s"):
        await channel.call(path, "wait", timeout=0.05)


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\0\0\0\2\xc1\xc1", b"\0\0\0\1\1", b"\0"]
)
async def test_garbage_does_not_stop_the_server(
    tmp_path: Path, nursery: trio.Nursery, garbage: bytes
) -> None:
    async def fine() -> str:
        return "fine"

    path = await _serve(nursery, tmp_path / "s", fine=fine)
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(garbage)
        await stream.send_eof()
        assert await stream.receive_some() == b""
    assert await channel.call(path, "fine", timeout=60) == "fine"


async def test_a_new_server_takes_the_path_over(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def who(name: str) -> str:
        return name

    async def first() -> str:
        return await who("first")

    async def second() -> str:
        return await who("second")

    path = await _serve(nursery, tmp_path / "s", who=first)
    await _serve(nursery, tmp_path / "s", who=second)
    assert await channel.call(path, "who", timeout=60) == "second"


def test_an_unknown_error_class_is_still_an_error() -> None:
    error = frames.unpack_error({"class": "os", "message": "x", "hint": None, "reason": ""})
    assert type(error).__name__ == "Internal"
    assert type(frames.unpack_error(frames.pack_error(NotFound("y")))) is NotFound


async def test_messages_come_before_the_answer(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def count(tell: channel.Tell, to: int) -> str:
        for number in range(to):
            tell({"number": number})
        if to == 3:
            raise NotFound("three")
        return "done"

    path = str(tmp_path / "s")
    await nursery.start(partial(channel.serve, path, {}, telling={"count": count}))
    for to in (2, 3):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(frames.pack({"call": "count", "args": {"to": to}}))
            for number in range(to):
                assert await channel.receive(stream) == {"number": number}
            if to == 2:
                assert await channel.answer_of(stream, path) == "done"
            else:
                with pytest.raises(NotFound, match="three"):
                    await channel.answer_of(stream, path)
            assert await channel.receive(stream) is None


async def test_hanging_up_cancels_a_call_that_tells(tmp_path: Path, nursery: trio.Nursery) -> None:
    ended = trio.Event()

    async def wait(tell: channel.Tell) -> None:
        tell({"ready": True})
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    path = str(tmp_path / "s")
    await nursery.start(partial(channel.serve, path, {}, telling={"wait": wait}))
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(frames.pack({"call": "wait"}))
        assert await channel.receive(stream) == {"ready": True}
        assert not ended.is_set()
    with trio.fail_after(60):
        await ended.wait()
