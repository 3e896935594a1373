# SPDX-License-Identifier: Apache-2.0
"""What a pull makes of the daemon's answer to its announcement, also of a wrong one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap import channel
from lazysnap.errors import Unavailable
from lazysnap.pull.announced import answer
from lazysnap.pull.announcement import announce
from lazysnap.reference import Reference
from lazysnap.registry import Image, Registry
from tests.pull.conftest import AMD64, serve
from tests.support.images import busybox_layers, write_layout
from tests.support.registry import FaultyRegistry

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
async def image(tmp_path: Path, server: FaultyRegistry, registry: Registry) -> Image:
    """An image, as the registry has it."""
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers(b"")))
    return await registry.fetch_image(reference, AMD64)


def _documents(image: Image) -> dict[str, Any]:
    documents = [[each.media_type, data] for each, data in image.documents]
    return {"documents": documents, "config": image.config_bytes}


async def _announced(root: Path, reference: Reference, answered: Any) -> Image | None:
    """Announce an image to a daemon that answers so."""
    calls = []

    async def handler(**arguments: str) -> Any:
        calls.append(arguments)
        if isinstance(answered, Exception):
            raise answered
        return answered

    async with trio.open_nursery() as nursery:
        await nursery.start(channel.serve, str(root / "daemon.sock"), {"announce": handler})
        announcement = announce(str(root), reference, AMD64)
        assert announcement is not None
        found = await answer(announcement)
        nursery.cancel_scope.cancel()
    assert calls == [{"reference": reference.name, "platform": "linux/amd64"}]
    return found


async def test_the_daemon_spares_asking_the_registry(tmp_path: Path, image: Image) -> None:
    assert await _announced(tmp_path, image.reference, _documents(image)) == image


def test_without_a_daemon_there_is_no_announcement(tmp_path: Path) -> None:
    reference = Reference.parse("localhost/app:1")
    assert announce(str(tmp_path), reference, AMD64) is None
    (tmp_path / "daemon.sock").touch()
    assert announce(str(tmp_path), reference, AMD64) is None


async def test_a_daemon_that_hangs_up(tmp_path: Path, image: Image) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "daemon.sock"))
        listener.listen()
        announcement = announce(str(tmp_path), image.reference, AMD64)
        assert announcement is not None
        connection, _ = listener.accept()
        connection.close()
        assert await answer(announcement) is None


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
async def test_a_wrong_answer_is_none(tmp_path: Path, image: Image, change: Change) -> None:
    documents = _documents(image)
    change(documents)
    assert await _announced(tmp_path, image.reference, documents) is None


async def test_an_error_is_no_answer(tmp_path: Path, image: Image) -> None:
    assert await _announced(tmp_path, image.reference, Unavailable("no password")) is None


async def test_another_manifest_than_the_digest_names(tmp_path: Path, image: Image) -> None:
    other = image.reference.with_digest(image.manifest.config.digest)
    assert await _announced(tmp_path, other, _documents(image)) is None
