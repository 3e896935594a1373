# SPDX-License-Identifier: Apache-2.0
"""Whole images as directories: what they show, what they share, and when they are refused."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio

from fixtures.processes import alive
from tests.standalone.scene import SECONDS, Scene, layout, mounts_below
from tests.support import images, layers
from tests.support.images import Layout
from tests.support.registry import Break, FaultyRegistry, faulty_registry
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

_PAYLOAD = os.urandom(3_000_000)


def _look(point: Path) -> None:
    """The image shows what its layers make together."""
    assert (point / "data/hello").read_text() == "hello from the top layer\n"
    assert not (point / "data/gone").exists()
    assert sorted(os.listdir(point / "data")) == ["hello", "many", "payload"]
    assert (point / "data/payload").read_bytes() == _PAYLOAD
    assert (point / "data/many/049").read_bytes() == b"file 49\n" * 49
    assert os.readlink(point / "bin/sh") == "busybox"


def _add(server: FaultyRegistry, made: Layout, repository: str) -> str:
    """Put an image into a registry; its reference."""
    for path in (made.path / "blobs/sha256").iterdir():
        server.add_blob(path.read_bytes())
    manifest = made.path / "blobs/sha256" / made.manifest.removeprefix("sha256:")
    media_type = "application/vnd.oci.image.manifest.v1+json"
    server.add_manifest(repository, "latest", media_type, manifest.read_bytes())
    return f"{server.host}/{repository}:latest"


def _sent(server: FaultyRegistry, digest: str) -> int:
    return sum(request.sent for request in server.requests(path=digest))


@pytest.mark.parametrize(
    "forms",
    [
        ["estargz", "zstd", "estargz"],
        ["plain", "plain-zstd", "plain"],
        ["plain", "estargz", "plain"],
        ["estargz", "plain", "zstd"],
    ],
    ids="-".join,
)
def test_layers_of_all_kinds_make_one_tree(it: Scene, forms: list[str]) -> None:
    made = layout(it.directory / "layout", forms, _PAYLOAD)
    found = it.mount(f"oci:{made.path}")
    assert [layer["state"] for layer in found] == [
        "unpacked" if form.startswith("plain") else "lazy" for form in forms
    ]
    _look(it.point)
    assert it.umount()
    it.assert_clean()
    assert not it.umount()


def test_it_is_read_only_and_gives_nobody_rights(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    it.mount(f"oci:{made.path}:latest")
    with pytest.raises(OSError) as caught:
        (it.point / "new").touch()
    assert caught.value.errno == errno.EROFS
    flags = os.statvfs(it.point).f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    it.umount()
    it.assert_clean()


def test_what_is_written_goes_with_the_mount(it: Scene) -> None:
    made = layout(it.directory / "layout", ["plain", "estargz", "zstd"], _PAYLOAD)
    other = it.new_point()
    it.mount(f"oci:{made.path}", "--writable")
    it.mount(f"oci:{made.path}", point=other)
    (it.point / "data/hello").write_text("changed")
    (it.point / "data/payload").unlink()
    (it.point / "etc/new").mkdir()
    with (it.point / "data/many/003").open("a") as file:
        file.write("more")
    assert (it.point / "data/many/003").read_text() == "file 3\n" * 3 + "more"
    _look(other)
    it.umount()
    it.mount(f"oci:{made.path}", "--writable")
    _look(it.point)
    it.umount()
    it.umount(point=other)
    it.assert_clean()


async def test_nothing_is_fetched_that_is_not_read_and_nothing_twice(it: Scene) -> None:
    # Incompressible, and much larger than what comes along with a table of contents.
    payload = os.urandom(20_000_000)
    made = layout(it.directory / "layout", ["estargz", "estargz", "plain"], payload)
    middle, top = made.layers[1].digest, made.layers[2].digest
    other = it.new_point()

    async with faulty_registry() as server:
        reference = _add(server, made, "app")
        await trio.to_thread.run_sync(it.mount, reference)
        assert _sent(server, top) == len(made.layers[2].blob)
        assert _sent(server, middle) < len(payload) // 2
        hello = await trio.Path(it.point / "data/hello").read_text()
        assert hello == "hello from the top layer\n"
        assert _sent(server, middle) < len(payload) // 2

        read = await trio.Path(it.point / "data/payload").read_bytes()
        assert hashlib.sha256(read).digest() == hashlib.sha256(payload).digest()
        once = {digest: _sent(server, digest) for digest in (middle, top)}
        assert once[middle] < 1.1 * len(made.layers[1].blob)

        await trio.to_thread.run_sync(lambda: it.mount(reference, point=other))
        assert await trio.Path(other / "data/payload").read_bytes() == payload
        # A byte shows that the registry is there.
        assert _sent(server, middle) < once[middle] + 100
        assert _sent(server, top) == once[top]

        # The cache outlives the mounts.
        for point in (it.point, other):
            await trio.to_thread.run_sync(lambda point=point: it.umount(point=point))
        it.assert_clean()
        await trio.to_thread.run_sync(it.mount, reference)
        assert await trio.Path(it.point / "data/payload").read_bytes() == payload
        assert _sent(server, middle) < once[middle] + 100
        await trio.to_thread.run_sync(it.umount)
    it.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", "--writable"])
def test_more_layers_than_a_page_of_options_names(it: Scene, option: str) -> None:
    tars = [images.tar([(f"file{n}", b"%d\n" % n), ("top", b"%d\n" % n)]) for n in range(64)]
    made = images.write_layout(it.directory / "layout", [images.gzip_layer(t) for t in tars])
    assert 64 * len(f"{it.root}/snapshots/1/fs:") > 4096
    it.mount(f"oci:{made.path}", *option.split())
    assert [(it.point / f"file{n}").read_text() for n in range(64)] == [f"{n}\n" for n in range(64)]
    assert (it.point / "top").read_text() == "63\n"
    flags = os.statvfs(it.point).f_flag
    assert bool(flags & os.ST_RDONLY) == (not option)
    assert flags & os.ST_NOSUID
    it.umount()
    it.assert_clean()


def test_commands_at_the_same_time_take_turns(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    points = [it.new_point() for _ in range(4)]
    running = [
        subprocess.Popen(
            it.command("mount", f"oci:{made.path}", point), stderr=subprocess.PIPE, text=True
        )
        for point in points
    ]
    said = [process.communicate(timeout=SECONDS)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    for point in points:
        _look(point)
    running = [subprocess.Popen(it.command("umount", point)) for point in points]
    assert [process.wait(SECONDS) for process in running] == [0] * 4
    it.assert_clean()


def test_an_image_that_umount_of_the_system_took_away_is_forgotten(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    it.mount(f"oci:{made.path}")
    subprocess.run(["umount", it.point], check=True)
    assert not it.umount()
    it.assert_clean()


def test_a_mount_point_that_is_used_stays(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    it.mount(f"oci:{made.path}")
    with (it.point / "data/payload").open("rb") as file:
        done = it.run("umount", it.point)
        assert done.returncode != 0
        assert "--lazy" in done.stderr
        assert file.read() == _PAYLOAD
        it.umount("--lazy")
    it.assert_clean()


# -- what is refused ------------------------------------------------------------------------------


def _refused(it: Scene, *arguments: object, says: str) -> None:
    done = it.run("mount", *arguments)
    assert done.returncode not in (0, 130)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_mount_points_that_cannot_be_used(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz"] * 3)
    reference = f"oci:{made.path}"
    _refused(it, reference, it.directory / "missing", says="No such file")
    _refused(it, reference, made.path / "index.json", says="Not a directory")
    _refused(it, reference, made.path, says="not empty")
    _refused(it, reference, it.root, says="outside of")
    it.mount(reference)
    _refused(it, reference, it.point, says="mounted at")
    (it.directory / "link").symlink_to(it.point)
    _refused(it, reference, it.directory / "link", says="mounted at")
    assert (it.point / "etc/motd").exists()
    it.umount(point=it.directory / "link")
    it.assert_clean()


def test_what_others_have_mounted_stays(it: Scene) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "test", it.point], check=True)
    for _ in range(2):
        done = it.run("umount", it.point)
        assert done.returncode != 0
        assert "not made by lazysnap" in done.stderr
        made = layout(it.new_point() / "layout", ["plain"] * 3)
        other = it.new_point()
        it.mount(f"oci:{made.path}", point=other)  # now there is a root
    assert mounts_below(it.directory).count(str(it.point)) == 1


def test_roots_of_others_are_not_touched(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz"] * 3)
    it.root.mkdir()
    (it.root / "metadata.db").touch()
    _refused(it, f"oci:{made.path}", it.point, says="something else")
    assert set(os.listdir(it.root)) <= {"metadata.db", "lock"}
    long = it.directory / ("r" * 100)
    _refused(it, f"oci:{made.path}", it.point, "--root", long, says="too long")


async def test_images_that_are_not_there(it: Scene) -> None:
    async with faulty_registry() as server:
        _add(server, layout(it.directory / "layout", ["estargz"] * 3), "app")
        for name in ("other:latest", "app:other"):
            await trio.to_thread.run_sync(
                lambda name=name: _refused(it, f"{server.host}/{name}", it.point, says="404")
            )
    _refused(it, f"oci:{it.directory}/nothing", it.point, says="index.json")
    _refused(it, "Not A Name", it.point, says="lower case")
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        _refused(it, f"127.0.0.1:{taken.getsockname()[1]}/app", it.point, says="127.0.0.1")
    it.assert_clean()
    assert not it.root.exists()


def test_a_layer_that_is_damaged_leaves_nothing(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "zstd", "plain"])
    last = made.path / "blobs/sha256" / made.layers[2].digest.removeprefix("sha256:")
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    done = it.run("mount", f"oci:{made.path}", it.point)
    assert done.returncode != 0
    assert made.layers[2].digest in done.stderr
    it.assert_clean()


def test_root_of_a_user_namespace_without_mounts_is_told_what_to_do(it: Scene) -> None:
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", *it.command("mount", "oci:/nothing", it.point)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode != 0
    assert "unshare --user --map-root-user --mount" in done.stderr


def test_in_a_user_namespace(it: Scene) -> None:
    """There the kernel lets nobody mount EROFS, and overlay has other names for its attributes."""
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    script = f"""
        set -e
        {" ".join(it.command("mount", f"oci:{made.path}", it.point))}
        cat {it.point}/data/hello
        sha256sum {it.point}/data/payload
        test ! -e {it.point}/data/gone
        {" ".join(it.command("umount", it.point))}
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "unavailable" not in done.stderr
    assert "hello from the top layer" in done.stdout
    assert hashlib.sha256(_PAYLOAD).hexdigest() in done.stdout
    it.assert_clean()


def test_a_mount_in_another_namespace_is_left_alone_until_that_has_ended(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    script = f"{' '.join(it.command('mount', f'oci:{made.path}', it.point))} && echo ready && cat"
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    done = it.run("umount", it.point)
    assert done.returncode != 0
    assert "another mount namespace" in done.stderr
    _refused(it, f"oci:{made.path}", it.point, says="another mount namespace")
    other.communicate(timeout=SECONDS)
    it.mount(f"oci:{made.path}")
    _look(it.point)
    it.umount()
    it.assert_clean()


@pytest.mark.parametrize("form", ["estargz", "plain"])
def test_an_image_that_claims_to_be_another_does_not_take_its_place(it: Scene, form: str) -> None:
    made = layout(it.directory / "layout", [form] * 3, _PAYLOAD)
    tars = [
        *images.busybox_tars(_PAYLOAD)[:2],
        images.tar([("data", None), ("data/evil", b"evil")]),
    ]
    evil = [layers.estargz(tar) for tar in tars]
    claiming = [
        images.Layer(each.blob, honest.diff_id, each.media_type, each.annotations)
        for each, honest in zip(evil, made.layers, strict=True)
    ]
    hostile = images.write_layout(it.directory / "hostile", claiming)
    other = it.new_point()
    it.mount(f"oci:{hostile.path}", point=other)
    assert (other / "data/evil").exists()
    it.mount(f"oci:{made.path}")
    _look(it.point)
    again = it.new_point()
    it.mount(f"oci:{made.path}", point=again)  # finds what was made
    _look(again)
    assert (other / "data/evil").exists()
    for point in (it.point, other, again):
        it.umount(point=point)
    it.assert_clean()


# -- what ends in the middle ----------------------------------------------------------------------


async def test_ctrl_c_leaves_nothing(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    async with faulty_registry() as server:
        reference = _add(server, made, "app")
        blob = made.layers[1].digest
        server.faults.append(Break(after=100_000, how="stall", path=blob))
        process = await trio.lowlevel.open_process(it.command("mount", reference, it.point))
        await server.stalled.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    it.assert_clean()


def _kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_readers_do_not_notice_that_a_worker_was_killed(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    it.mount(f"oci:{made.path}")
    before = it.workers()
    _kill(before)
    _look(it.point)
    it.umount()
    it.assert_clean()


@pytest.mark.parametrize("which", ["keepers", "all"])
def test_umount_after_shards_were_killed(it: Scene, which: str) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    it.mount(f"oci:{made.path}")
    workers = set(it.workers())
    killed = [pid for pid in it.processes() if which == "all" or pid not in workers]
    _kill(killed)
    wait_until(lambda: not any(alive(pid) for pid in killed))
    assert it.umount()
    it.assert_clean()


def test_another_mount_mends_what_was_killed(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    other = it.new_point()
    it.mount(f"oci:{made.path}")
    killed = it.processes()
    _kill(killed)
    wait_until(lambda: not any(alive(pid) for pid in killed))
    it.mount(f"oci:{made.path}", point=other)
    _look(other)
    it.umount()
    _look(other)
    it.umount(point=other)
    it.assert_clean()
