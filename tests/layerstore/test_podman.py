# SPDX-License-Identifier: Apache-2.0
"""Debian's podman with the store: what it shows, fetches, exports and leaves, whoever is killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from fixtures.processes import alive
from tests.layerstore.scene import Scene
from tests.standalone.scene import mounts_below
from tests.support.outage import registry_stopped
from tests.support.podman import podman
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.podman]

_PAYLOAD = os.urandom(8 << 20)
_SUM = hashlib.sha256(_PAYLOAD).hexdigest()
_EVERYTHING = "find / -xdev -path /proc -prune -o -type f -exec sha256sum {} + | sort"


@pytest.mark.parametrize("form", ["estargz", "zstd"])
def test_a_container_fetches_what_it_reads(it: Scene, form: str) -> None:
    reference = it.push("app", [form] * 3, _PAYLOAD)
    it.podman.run("pull", reference)
    assert it.store.layers() == 3
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"
    assert it.network.received < 3 << 20
    assert _SUM in it.podman.container(reference, "sha256sum", "/data/payload")
    assert it.network.received > len(_PAYLOAD)
    it.podman.remove_image(reference)
    wait_until(it.store.is_empty)


def test_files_are_those_of_an_image_that_was_unpacked(it: Scene) -> None:
    lazy = it.push("lazy", ["estargz", "zstd", "estargz"], _PAYLOAD)
    plain = it.push("plain", ["plain"] * 3, _PAYLOAD)
    for reference in (lazy, plain):
        it.podman.run("pull", reference)
    assert it.store.layers() == 3
    seen = [it.podman.container(reference, "sh", "-c", _EVERYTHING) for reference in (lazy, plain)]

    def files(text: str) -> dict[str, str]:
        pairs = (line.split(maxsplit=1)[::-1] for line in text.splitlines())
        return {
            path: digest for path, digest in pairs if not path.startswith(("/etc/host", "/run"))
        }

    assert "/data/payload" in files(seen[1])
    assert files(seen[0]) == files(seen[1])
    assert it.podman.run("diff", lazy).stdout == it.podman.run("diff", plain).stdout
    assert "D /data/gone" in it.podman.run("diff", lazy).stdout


def test_layers_that_are_not_lazy_are_pulled(it: Scene) -> None:
    reference = it.push("app", ["plain", "estargz", "plain"], b"some")
    it.podman.run("pull", reference)
    assert it.store.layers() == 1
    assert it.podman.container(reference, "cat", "/data/payload") == "some"
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"


def test_what_was_committed_can_be_pushed(it: Scene) -> None:
    reference = it.push("app", ["estargz", "zstd", "estargz"], _PAYLOAD)
    it.podman.run("pull", reference)
    change = "echo new > /data/new; rm /data/payload; echo more >> /etc/motd"
    options = ("--name=changed", "--network=none", "--ulimit=nofile=1024:1024")
    it.podman.run("run", *options, "--ulimit=nproc=64:64", reference, "sh", "-c", change)
    assert set(it.podman.run("diff", "changed").stdout.splitlines()) == {
        *("C /data", "A /data/new", "D /data/payload", "C /etc", "C /etc/motd"),
    }
    new = f"{it.registry.host}/new:latest"
    it.podman.run("commit", "changed", new)
    it.podman.run("push", "--tls-verify=false", new)
    out = it.directory / "out"
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false"]
    subprocess.run([*copy, f"docker://{new}", f"oci:{out}:new"], check=True)
    manifest, config = _documents(out)
    assert len(manifest["layers"]) == 4
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        assert _diff_id(out, layer["digest"]) == diff_id
    it.podman.run("rm", "changed")
    it.podman.run("rmi", "--all")
    wait_until(it.store.is_empty)
    it.podman.run("pull", "--tls-verify=false", new)
    text = it.podman.container(new, "sh", "-c", "cat /data/new /etc/motd; ls /data")
    assert text.split() == ["new", "lazysnap", "test", "image", "more", "hello", "many", "new"]


@pytest.mark.parametrize("archive", ["oci-archive", "docker-archive"])
def test_what_is_saved_is_the_image(it: Scene, archive: str) -> None:
    # Podman 4.3 saves layers as they were compressed, and docker's archives know no zstd.
    forms = ["estargz", "zstd" if archive == "oci-archive" else "estargz", "estargz"]
    reference = it.push("app", forms, _PAYLOAD)
    it.podman.run("pull", reference)
    saved = it.directory / "saved"
    it.podman.run("save", f"--format={archive}", f"--output={saved}", reference)
    out = it.directory / "out"
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy"]
    subprocess.run([*copy, f"{archive}:{saved}", f"oci:{out}:new"], check=True)
    manifest, config = _documents(out)
    assert len(manifest["layers"]) == 3
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        assert _diff_id(out, layer["digest"]) == diff_id
    it.podman.remove_image(reference)
    wait_until(it.store.is_empty)


def test_a_layer_with_zstd_is_not_saved_for_docker(it: Scene) -> None:
    """That is Podman's: it is so with layers that it has pulled itself, too."""
    for form in ("zstd", "plain-zstd"):
        reference = it.push(form, ["estargz", form, "estargz"], b"some")
        it.podman.run("pull", reference)
        saved = it.directory / form
        done = it.podman.run("save", f"--output={saved}", reference, check=False)
        assert done.returncode != 0
        assert "zstd compression is not supported for docker images" in done.stderr


def _documents(
    layout: Path,
) -> tuple[dict[str, list[dict[str, str]]], dict[str, dict[str, list[str]]]]:
    """The manifest and the configuration of the one image in an OCI layout."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].split(":")[1]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"].split(":")[1]).read_text())
    return manifest, config


def _diff_id(layout: Path, digest: str) -> str:
    """The digest of a layer's tar, by other programs than ours."""
    path = layout / "blobs" / "sha256" / digest.split(":")[1]
    with path.open("rb") as file:
        tool = "zstd" if file.read(4) == b"\x28\xb5\x2f\xfd" else "gzip"
    data = subprocess.run([tool, "-dc", str(path)], check=True, capture_output=True).stdout
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_many_containers_of_one_image_while_some_are_killed(it: Scene) -> None:
    chance = random.Random(7)
    reference = it.push("app", ["estargz", "zstd", "estargz"], _PAYLOAD)
    it.podman.run("pull", reference)
    words = it.podman.container_command(reference, "sha256sum", "/data/payload", "/data/hello")
    hello = hashlib.sha256(b"hello from the top layer\n").hexdigest()
    whole = 0
    for _ in range(3):
        running = [it.podman.start(words) for _ in range(4)]
        victims = chance.sample(running, 2)
        for victim in victims:
            with_delay = chance.random() * 0.5
            _wait(victim, with_delay)
            victim.kill()
        for process in running:
            if process in victims:
                _forget(process)
            else:
                out, error = process.communicate()
                assert process.returncode == 0, error
                assert out.split()[::2] == [_SUM, hello]
                whole += 1
    assert whole == 6
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"
    assert it.store.layers() == 3
    it.podman.remove_containers()
    it.podman.run("rmi", "--all", "--force")
    # Podman keeps the layers below a container for good if it was killed while it made that.
    it.podman.run("system", "reset", "--force")
    wait_until(it.store.is_empty)
    own = str(it.store.root)
    assert [path for path in mounts_below(it.directory) if not path.startswith(own)] in (
        [],
        [str(it.podman.storage / "overlay")],
    )


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _forget(process: subprocess.Popen[str]) -> None:
    """End with a process that was killed; another that it has started may still hold its output."""
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def test_pulls_that_are_killed_leave_nothing(it: Scene) -> None:
    chance = random.Random(3)
    reference = it.push("app", ["estargz"] * 3, _PAYLOAD)
    for _ in range(4):
        process = it.podman.start(it.podman.command("pull", reference))
        _wait(process, chance.random())
        process.kill()
        _forget(process)
    it.podman.run("pull", reference)
    assert _SUM in it.podman.container(reference, "sha256sum", "/data/payload")
    it.podman.remove_image(reference)
    # Layers that a pull had made when it was killed are in podman's storage, and so in use.
    it.podman.run("system", "reset", "--force")
    wait_until(it.store.is_empty)


def test_another_storage_keeps_what_it_uses(it: Scene) -> None:
    reference = it.push("app", ["estargz"] * 3, _PAYLOAD)
    it.podman.run("pull", reference)
    with podman(it.directory / "q", it.host, it.store.path) as other:
        other.run("pull", reference)
        it.podman.remove_image(reference)
        assert not it.store.is_empty()
        assert it.store.layers() == 3
        assert _SUM in other.container(reference, "sha256sum", "/data/payload")
        other.remove_image(reference)
        wait_until(it.store.is_empty)


def test_containers_outlive_the_store_and_its_worker(it: Scene) -> None:
    reference = it.push("app", ["estargz"] * 3, _PAYLOAD)
    it.podman.run("pull", reference)
    script = "echo up; while [ ! -e /tmp/go ]; do sleep 0.1; done; sha256sum /data/payload"
    words = it.podman.container_command(reference, "sh", "-c", script)
    words.insert(words.index("run") + 1, "--name=long")
    process = it.podman.start(words)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    it.store.stop(signal.SIGKILL)
    worker = it.store.who()["pid"]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(worker))
    # Without the daemon: a new container of what is there, and an image that is not lazy now.
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"
    other = it.push("other", ["estargz"] * 3, b"other")
    it.podman.run("pull", other)
    assert it.podman.container(other, "cat", "/data/payload") == "other"
    it.podman.remove_image(other)
    it.podman.run("exec", "long", "touch", "/tmp/go")
    assert _SUM in process.communicate()[0]
    it.store.start()
    assert it.store.layers() == 3
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"
    it.podman.remove_image(reference)
    wait_until(it.store.is_empty)


def test_a_mount_that_is_lost_is_made_anew(it: Scene) -> None:
    reference = it.push("app", ["estargz"] * 3, _PAYLOAD)
    it.podman.run("pull", reference)
    it.podman.container(reference, "cat", "/data/hello")
    who = it.store.who()
    for pid in (who["keeper"], who["pid"]):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(who["keeper"]) and not alive(who["pid"]))
    it.store.stop()
    it.store.start()
    assert _SUM in it.podman.container(reference, "sha256sum", "/data/payload")


def test_without_the_store_podman_works(it: Scene) -> None:
    reference = it.push("app", ["estargz"] * 3, b"some")
    it.store.stop(unmount=True)
    assert mounts_below(it.store.root) == []
    it.podman.run("pull", reference)
    assert it.podman.container(reference, "cat", "/data/payload") == "some"
    assert it.store.layers() == 0


def test_what_was_read_needs_no_registry(it: Scene) -> None:
    reference = it.push("app", ["zstd"] * 3, _PAYLOAD)
    it.podman.run("pull", reference)
    assert _SUM in it.podman.container(reference, "sha256sum", "/data/payload")
    it.store.stop()
    with registry_stopped(it):
        it.store.start()
        assert _SUM in it.podman.container(reference, "sha256sum", "/data/payload")
