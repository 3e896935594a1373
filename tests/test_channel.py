# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

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


# Sockets that fail, in each call to the kernel and each time that it is called.


class _Failing:
    """Lets one of our calls to the kernel fail; see `failing`."""

    def __init__(self, name: str, code: int, number: int) -> None:
        self.name = name
        self.hit = False
        self._error = OSError(code, "injected")
        self._left = number
        self._proper = getattr(trio.socket.SocketType.__subclasses__()[0], name)

    async def waiting(self, sock: Any, *arguments: Any) -> Any:
        self._count(sock)
        return await self._proper(sock, *arguments)

    def at_once(self, sock: Any) -> None:
        was_open = sock.fileno() >= 0
        self._proper(sock)
        if was_open:  # the kernel is asked only once
            self._count(sock)

    def _count(self, sock: Any) -> None:
        if sock.family == socket.AF_UNIX:
            self._left -= 1
            if self._left == 0:
                self.hit = True
                raise self._error


@pytest.fixture(params=["ECONNRESET", "ECONNABORTED", "EPIPE", "EBADF", "ENOTCONN", "ENOBUFS"])
def code(request: pytest.FixtureRequest) -> int:
    found: int = getattr(errno, request.param)
    return found


@pytest.fixture(params=["connect", "send", "recv", "close"])
def failing(
    request: pytest.FixtureRequest, code: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], _Failing]:
    """Makes the n-th use of something fail from now on."""

    def begin(number: int) -> _Failing:
        it = _Failing(request.param, code, number)
        kind = trio.socket.SocketType.__subclasses__()[0]
        how = it.at_once if it.name == "close" else it.waiting
        monkeypatch.setattr(kind, it.name, lambda sock, *arguments: how(sock, *arguments))
        return it

    return begin


@pytest.mark.parametrize("name", ["add", "tell"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_a_socket_that_fails_is_unavailable_and_ends_only_its_call(
    tmp_path: Path,
    nursery: trio.Nursery,
    failing: Callable[[int], _Failing],
    name: str,
    number: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def add() -> int:
        return 3

    async def tell(say: channel.Tell) -> int:
        say({"x": 1})
        return 3

    path = str(tmp_path / "s")
    await nursery.start(partial(channel.serve, path, {"add": add}, telling={"tell": tell}))
    failing(number)
    with trio.fail_after(60), contextlib.suppress(Unavailable):
        answer = await channel.call(path, name, timeout=50)
        assert answer == (3 if name == "add" else None)
    await trio.testing.wait_all_tasks_blocked()
    monkeypatch.undo()
    assert await channel.call(path, "add", timeout=60) == 3
    assert [r.getMessage() for r in caplog.records if r.exc_info] == []


def test_frames_that_are_none_of_ours() -> None:
    for body in (b"\x81\x90\x01", b"\x81\x80\x01", b"\x91" * 5000, b"\xc1", b"\x90", b""):
        with pytest.raises(Unavailable):
            frames.unpack(body)
