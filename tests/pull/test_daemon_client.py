# SPDX-License-Identifier: Apache-2.0
"""What a pull makes of what the daemon says, also of what is wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap import channel
from lazysnap.channel import Tell
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, NotLazy, Unavailable
from lazysnap.pull.daemon_ask import ask
from lazysnap.pull.daemon_client import Delegation, pack_result
from lazysnap.pull.daemon_server import image_of, pack_documents
from lazysnap.pull.progress import LayerResult, LayerState, Progress, PullResult
from lazysnap.reference import Reference
from lazysnap.registry import Image, Registry
from tests.pull.conftest import AMD64, serve
from tests.support.images import busybox_layers, write_layout
from tests.support.registry import FaultyRegistry

REFERENCE = Reference.parse("localhost/app:1")
PLACE = {"address": "/c.sock", "namespace": "default", "snapshotter": "lazysnap"}
DIGEST = Digest("sha256:" + 64 * "0")
RESULT = PullResult(
    REFERENCE.name,
    DIGEST,
    DIGEST,
    (
        LayerResult(DIGEST, 5, LayerState.LAZY),
        LayerResult(DIGEST, 6, LayerState.PRESENT, "no-toc-digest"),
    ),
    7,
)
Change = Callable[[dict[str, Any]], object]
Handler = Callable[[Tell], Any]


class _Noted(Progress):
    def __init__(self) -> None:
        self.events: list[object] = []

    def resolved(self, layers: Any) -> None:
        self.events.append([(layer.digest, layer.size) for layer in layers])

    def state(self, layer: int, state: LayerState) -> None:
        self.events.append((layer, state))


def _ask(root: Path) -> Delegation:
    connection = ask(str(root), REFERENCE.name, "linux/amd64", **PLACE)
    assert connection is not None
    return Delegation(connection)


async def _follow(
    root: Path, says: Handler
) -> tuple[PullResult | LazysnapError, Any, list[object]]:
    """Ask a daemon that says this: the outcome, the documents, and the events."""
    asked = []
    noted = _Noted()

    async def pull(tell: Tell, **arguments: str) -> Any:
        asked.append(arguments)
        return says(tell)

    async with trio.open_nursery() as nursery:
        path = str(root / "daemon.sock")
        await nursery.start(partial(channel.serve, path, {}, telling={"pull": pull}))
        delegation = _ask(root)
        outcome: PullResult | LazysnapError
        try:
            outcome = await trio.to_thread.run_sync(delegation.follow, noted)
        except LazysnapError as error:
            outcome = error
        nursery.cancel_scope.cancel()
    assert asked == [{"reference": REFERENCE.name, "platform": "linux/amd64", **PLACE}]
    return outcome, delegation.documents, noted.events


async def test_a_pull_is_followed_to_its_result(tmp_path: Path) -> None:
    def says(tell: Tell) -> Any:
        tell({"documents": [["type", b"{}"]], "config": b"{}"})
        tell({"layers": [["type", DIGEST, 5], ["type", DIGEST, 6]]})
        tell({"layer": 1, "state": LayerState.LAZY})
        return pack_result(RESULT)

    outcome, documents, events = await _follow(tmp_path, says)
    assert outcome == RESULT
    assert documents == {"documents": [["type", b"{}"]], "config": b"{}"}
    assert events == [[(DIGEST, 5), (DIGEST, 6)], (1, LayerState.LAZY)]


async def test_documents_outlast_a_refusal(tmp_path: Path) -> None:
    def says(tell: Tell) -> Any:
        tell({"documents": [], "config": b""})
        raise NotLazy("not this one")

    outcome, documents, _ = await _follow(tmp_path, says)
    assert isinstance(outcome, NotLazy)
    assert documents == {"documents": [], "config": b""}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"layers": 5},
        {"layers": [["type"]]},
        {"layer": 0, "state": "nonsense"},
        {"state": LayerState.LAZY},
    ],
)
async def test_a_wrong_message_is_unavailable(tmp_path: Path, message: dict[str, Any]) -> None:
    def says(tell: Tell) -> Any:
        tell(message)
        return pack_result(RESULT)

    outcome, _, _ = await _follow(tmp_path, says)
    assert isinstance(outcome, Unavailable)


@pytest.mark.parametrize("result", [None, {}, {**pack_result(RESULT), "digest": "sha256:12"}])
async def test_a_wrong_result_is_an_error(tmp_path: Path, result: Any) -> None:
    outcome, _, _ = await _follow(tmp_path, lambda tell: result)
    assert isinstance(outcome, LazysnapError)


async def test_hanging_up_ends_the_pull_and_waits_for_its_end(tmp_path: Path) -> None:
    ended = []

    class Stops(Progress):
        def state(self, layer: int, state: LayerState) -> None:
            raise SystemExit(130)  # as the handler of a signal does

    async def pull(tell: Tell, **arguments: str) -> None:
        tell({"layer": 0, "state": LayerState.PREPARING})
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
            ended.append(arguments["reference"])

    async with trio.open_nursery() as nursery:
        path = str(tmp_path / "daemon.sock")
        await nursery.start(partial(channel.serve, path, {}, telling={"pull": pull}))
        delegation = _ask(tmp_path)
        with pytest.raises(SystemExit):
            await trio.to_thread.run_sync(delegation.follow, Stops())
        assert ended == [REFERENCE.name]
        nursery.cancel_scope.cancel()


def test_without_a_daemon_nothing_is_delegated(tmp_path: Path) -> None:
    assert ask(str(tmp_path), REFERENCE.name, "linux/amd64", **PLACE) is None
    (tmp_path / "daemon.sock").touch()
    assert ask(str(tmp_path), REFERENCE.name, "linux/amd64", **PLACE) is None


@contextmanager
def _listening(root: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "daemon.sock"))
        listener.listen()
        yield listener


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", b"\0\0\0\5ab", b"\xff\xff\xff\xff", b"\0\0\0\1\xc1"]
)
def test_a_daemon_that_hangs_up_or_talks_nonsense(tmp_path: Path, sent: bytes) -> None:
    with _listening(tmp_path) as listener:
        delegation = _ask(tmp_path)
        connection, _ = listener.accept()
        connection.sendall(sent)
        connection.close()
        with pytest.raises(Unavailable):
            delegation.follow(Progress())


@pytest.fixture
async def image(tmp_path: Path, server: FaultyRegistry, registry: Registry) -> Image:
    """An image, as the registry has it."""
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers(b"")))
    return await registry.fetch_image(reference, AMD64)


async def test_the_daemon_spares_asking_the_registry(image: Image) -> None:
    assert await image_of(pack_documents(image), image.reference, AMD64) == image


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: documents.pop("config"),
        lambda documents: documents.update(config=documents["config"] + b" "),
        lambda documents: documents.update(documents=[]),
        lambda documents: documents.update(documents=[["application/json", b"{}"]]),
        lambda documents: documents.update(documents="nonsense", config=None),
        lambda documents: documents["documents"][0].append(b"too much"),
    ],
)
async def test_wrong_documents_are_none(image: Image, change: Change) -> None:
    documents = pack_documents(image)
    change(documents)
    assert await image_of(documents, image.reference, AMD64) is None


async def test_another_manifest_than_the_digest_names(image: Image) -> None:
    other = image.reference.with_digest(image.manifest.config.digest)
    assert await image_of(pack_documents(image), other, AMD64) is None
