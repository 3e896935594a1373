# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from isal import isal_zlib

from lazysnap.cache import Cache, PartialFile
from lazysnap.cache.stamps import seal_time
from lazysnap.cli import main
from lazysnap.index import layout
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.model import FileContent
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import SlotRecord, write_slot
from tests.support import layers
from tests.support.indexes import resolve, toc_of

BIG = os.urandom(300_000)
CHUNK = 100_000


class Scene:
    """A root with one layer: `/small` is an object, `/big` a partial file with one chunk of three."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = Cache(str(root / "cache"))
        layer = layers.estargz(
            [layers.file("small", b"small"), layers.file("big", BIG)], chunk_size=CHUNK
        )
        packed = encode(build(toc_of(layer)))
        self.index_path = Path(self.cache.index, "an-index")
        self.index_path.write_bytes(packed)
        self.tail_path = Path(self.cache.index, "an-index.tail")
        self.tail_path.write_bytes(b"members")
        index = LayerIndex(packed)
        self.big: FileContent = index.file(resolve(index, "big"))
        assert self.big.partial_key is not None
        partial = PartialFile(self.cache.partial, self.big.partial_key, len(BIG), 3)
        partial.write(1, CHUNK, BIG[CHUNK : 2 * CHUNK])
        self.data = Path(partial.base + ".data")
        partial.close()
        self.key = hashlib.sha256(b"small").digest()
        self.cache.objects.put(self.key, b"small")

    @property
    def object(self) -> Path:
        return Path(self.cache.objects.path(self.key))

    def use_index(self) -> None:
        record = SlotRecord(
            slot=1, shard=0, layer_digest="x", index="an-index", reference="r", blob_size=1
        )
        write_slot(str(self.root), record)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["cache", *arguments, "--root", str(self.root)])

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def _age(path: Path, seconds: float) -> None:
    """Set the time of last use, and of the last write of a partial file."""
    used = time.time_ns() - int(seconds * 1e9)
    sealed = seal_time(bytes.fromhex(path.name)) if "." not in path.name else used
    os.utime(path, ns=(used, sealed))


def test_ls_counts_what_is_there(scene: Scene) -> None:
    shown = scene.json("ls")
    assert shown["objects"]["count"] == 1
    assert shown["objects"]["bytes"] == 5
    assert shown["partials"]["count"] == 1
    assert shown["partials"]["bytes"] == 300_000
    assert CHUNK <= shown["partials"]["diskBytes"] < 2 * CHUNK
    assert shown["indexes"]["count"] == 1
    assert shown["biggest"][0]["kind"] == "partial"
    assert shown["lastUsed"][0] == {"within": "hour", "count": 2, "diskBytes": shown["diskBytes"]}
    text = scene.run("ls").stdout
    assert "objects          1" in text
    assert "size limit none" in text


def test_limits_come_from_the_configuration(scene: Scene) -> None:
    file = scene.root / "config.toml"
    file.write_text("[cache]\nsize_limit_bytes = 5000\nreserve_bytes = 7\nreserve_percent = 0.0\n")
    shown = scene.json("ls", "--config", str(file))
    assert (shown["sizeLimitBytes"], shown["reserveBytes"]) == (5000, 7)


def test_verify_finds_nothing_wrong(scene: Scene) -> None:
    result = scene.run("verify", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["objects"], found["partials"], found["chunks"], found["indexes"]) == (1, 1, 1, 1)
    assert found["bytes"] == 5 + CHUNK
    assert found["unchecked"] == 0


@pytest.mark.parametrize("what", ["object", "partial", "index"])
def test_verify_finds_what_is_wrong_and_removes_it_when_told(scene: Scene, what: str) -> None:
    path = {"object": scene.object, "partial": scene.data, "index": scene.index_path}[what]
    offset = {"object": 1, "partial": CHUNK + 1, "index": 100}[what]
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk would change it
    result = scene.run("verify")
    assert result.exit_code == 2
    assert f"{what} " in result.stdout
    assert "1 wrong" in result.stdout
    assert path.exists()
    assert scene.run("verify", "--fix").exit_code == 1
    assert not path.exists()
    assert scene.run("verify").exit_code == 0


@pytest.mark.parametrize("what", ["table", "size"])
def test_verify_finds_an_index_that_is_true_of_no_blob(scene: Scene, what: str) -> None:
    """Whole and with a right checksum, but its parts are not where it says."""
    packed = bytearray(scene.index_path.read_bytes())
    facts = list(layout.FACTS.unpack_from(packed, layout.PREAMBLE.size))
    facts[5 if what == "table" else 4] = 10  # offset of the table, size of the blob
    layout.FACTS.pack_into(packed, layout.PREAMBLE.size, *facts)
    checksum = isal_zlib.crc32(packed[layout.CHECKED_FROM :])
    layout.PREAMBLE.pack_into(packed, 0, layout.MAGIC, layout.VERSION, checksum, len(packed))
    scene.index_path.write_bytes(packed)
    assert LayerIndex(bytes(packed)).node_count
    result = scene.run("verify")
    assert result.exit_code == 2
    assert "not in a blob of" in result.stdout
    assert scene.run("verify", "--fix").exit_code == 1
    assert not scene.index_path.exists()


def test_a_seal_is_not_believed(scene: Scene) -> None:
    scene.cache.objects.seal()
    scene.object.write_bytes(b"smell")
    os.utime(scene.object, ns=(0, seal_time(scene.key)))
    assert scene.cache.objects.open(scene.key, 5) is not None
    assert scene.run("verify").exit_code == 2


def test_what_no_index_names_cannot_be_checked(scene: Scene) -> None:
    scene.index_path.unlink()
    result = scene.run("verify", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["unchecked"] == 1


def test_prune_alone_removes_only_leftovers(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = scene.object.parent / "new-1-abc"
    torn.write_bytes(b"half")
    orphan = Path(scene.cache.partial, "00" * 32 + ".map")
    orphan.write_bytes(b"\1")
    building = Path(scene.cache.index, "another.new-77")
    building.write_bytes(b"half")
    trees = [Path(scene.cache.trees, name) for name in ("an-index.1", "an-index.1-ab", "x.1.new-7")]
    for tree in trees:
        tree.write_bytes(b"tree")
    assert scene.json("prune")["leftovers"] == []  # too young
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    dry = scene.json("prune", "--dry-run")
    assert torn.exists()
    assert scene.json("prune")["leftovers"] == dry["leftovers"]
    assert {left["name"].rpartition("/")[2] for left in dry["leftovers"]} == {
        torn.name, orphan.name, building.name, "an-index", "an-index.tail",
        *(tree.name for tree in trees),
    }  # fmt: skip
    assert not torn.exists()
    assert not scene.index_path.exists()
    assert not scene.tail_path.exists()
    assert scene.object.exists()
    assert scene.data.exists()


def test_prune_keeps_the_indexes_of_mounted_layers(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.use_index()
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    scene.run("prune", "--all")
    assert scene.index_path.exists()
    assert scene.tail_path.exists()
    assert not scene.object.exists()
    scene.root.joinpath("slots", "2").write_bytes(b"unreadable")
    other = Path(scene.cache.index, "other")
    other.write_bytes(b"")
    assert "no index is removed" in scene.run("prune").stderr
    assert other.exists()


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        (["--older-than", "36h"], {"object"}),
        (["--older-than", "3d"], {"object", "partial"}),
        (["--to-size", "4KiB"], {"object"}),
        (["--to-size", "1GB"], {"object", "partial"}),
        (["--all"], set()),
    ],
)
def test_prune_removes_what_is_chosen(scene: Scene, option: list[str], kept: set[str]) -> None:
    _age(scene.data, 2 * 86400)
    before = scene.cache.objects.generation()
    removed = scene.json("prune", *option)
    assert {"object": scene.object.exists(), "partial": scene.data.exists()} == {
        kind: kind in kept for kind in ("object", "partial")
    }
    assert len(removed["contents"]) == 2 - len(kept)
    assert (scene.cache.objects.generation() != before) == (len(kept) < 2)


def test_prune_breaks_no_reader(scene: Scene) -> None:
    fd = scene.cache.objects.open(scene.key, 5)
    assert fd is not None
    scene.run("prune", "--all")
    assert os.pread(fd, 5, 0) == b"small"
    os.close(fd)


@pytest.mark.parametrize(
    "option", [["--older-than", "36"], ["--to-size", "10 furlongs"], ["--to-size", "-1"]]
)
def test_quantities_without_a_meaning_are_refused(scene: Scene, option: list[str]) -> None:
    result = scene.run("prune", *option)
    assert result.exit_code == 2
    assert "write it like" in result.output
    assert scene.object.exists()


def test_a_cache_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["cache", "ls", "--root", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "--root" in result.output
    assert not (tmp_path / "nowhere").exists()
