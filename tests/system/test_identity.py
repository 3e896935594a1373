# SPDX-License-Identifier: Apache-2.0
"""An image that claims the diff ids of another one does not take its place.

Of two layers, the upper one is the one that is claimed; the images are pulled by lazysnap and by ctr, into
another namespace than the hostile image, lazily and not. In one namespace, containerd asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, layers
from tests.support.stack import Stack, stack

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

_GOOD = b"the code of an honest image\n"
_EVIL = b"*** the code of somebody else ***\n"
_BASE = images.busybox_tars()[0]


def _upper(code: bytes) -> bytes:
    return images.tar([("code", None), ("code/main", code), (f"code/only-{len(code)}", code)])


def _push(it: Stack, repository: str, made: list[layers.Layer], claims: list[str]) -> str:
    """Push an image whose configuration claims diff ids; its reference."""
    converted = [
        images.Layer(layer.blob, diff_id, layer.media_type, layer.annotations)
        for layer, diff_id in zip(made, claims, strict=True)
    ]
    layout = images.write_layout(it.directory / repository.replace("/", "-"), converted)
    return images.push(layout, it.registry.host, repository)


class Images:
    """The honest image in two forms, and one that claims to be either."""

    def __init__(self, it: Stack, *, form: str, whole: bool) -> None:
        maker = layers.estargz if form == "lazy" else layers.plain
        base, upper = layers.estargz(_BASE), maker(_upper(_GOOD))
        claims = [base.diff_id, upper.diff_id]
        self.good = _push(it, "good/app", [base, upper], claims)
        # If `whole`, the base is the attacker's as well.
        evil_base = layers.estargz(_entries()) if whole else base
        self.evil = _push(it, "evil/app", [evil_base, layers.estargz(_upper(_EVIL))], claims)


def _entries() -> list[layers.LayerEntry]:
    return [layers.directory("bin"), layers.file("bin/sh", b"not a shell", mode=0o755)]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as it:
        yield it


def _code(it: Stack, reference: str) -> str:
    return it.run(reference, "sh", "-c", "cat /code/main; ls /code")


def _expected(code: bytes) -> str:
    return f"{code.decode()}main\nonly-{len(code)}\n"


@pytest.mark.parametrize("whole", [False, True], ids=["upper", "whole"])
@pytest.mark.parametrize("form", ["lazy", "plain"])
def test_claimed_diff_ids_take_nobodys_place(it: Stack, form: str, whole: bool) -> None:
    made = Images(it, form=form, whole=whole)
    it.containerd.namespace = "tenant-a"
    it.pull(made.evil)
    # That holds for those who come later, too.
    for namespace in ("tenant-b", "tenant-c"):
        it.containerd.namespace = namespace
        result = it.pull(made.good)
        assert _code(it, made.good) == _expected(_GOOD)
        reasons = [layer.get("reason") for layer in result["layers"]]
        assert reasons[0 if whole else 1] == "name-taken"


def test_a_pull_by_the_daemon_believes_no_claim(it: Stack) -> None:
    made = Images(it, form="lazy", whole=False)
    it.containerd.namespace = "tenant-a"
    it.pull(made.evil, delegated=True)
    it.containerd.namespace = "tenant-b"
    it.pull(made.good, delegated=True)
    assert _code(it, made.good) == _expected(_GOOD)


@pytest.mark.parametrize("form", ["lazy", "plain"])
def test_another_client_gets_what_it_asked_for_in_another_namespace(it: Stack, form: str) -> None:
    made = Images(it, form=form, whole=False)
    for namespace, reference in (("tenant-a", made.evil), ("tenant-b", made.good)):
        it.containerd.namespace = namespace
        words = ("images", "rpull", "--plain-http", "--snapshotter", "lazysnap", reference)
        it.containerd.ctr(*words, client="ctr-remote")
    assert _code(it, made.good) == _expected(_GOOD)


def test_layers_that_are_unpacked_by_the_daemon_are_not_taken_either(it: Stack) -> None:
    it.lazysnap.stop()
    it.lazysnap.configure('[snapshots]\neager = "direct"\n')
    it.start_daemon()
    made = Images(it, form="plain", whole=False)
    it.containerd.namespace = "tenant-a"
    it.pull(made.evil)
    it.containerd.namespace = "tenant-b"
    it.pull(made.good)
    assert _code(it, made.good) == _expected(_GOOD)


def test_images_that_truly_share_a_layer_share_it(it: Stack) -> None:
    """From two repositories, in two namespaces, also after a restart."""
    base = layers.estargz(_BASE)
    for name, code in (("one", b"1\n"), ("two", b"22\n")):
        upper = layers.estargz(_upper(code))
        reference = _push(it, name, [base, upper], [base.diff_id, upper.diff_id])
        it.containerd.namespace = f"tenant-{name}"
        result = it.pull(reference)
        assert [layer["state"] for layer in result["layers"]] == ["lazy", "lazy"]
        assert _code(it, reference) == _expected(code)
        it.lazysnap.stop()
        it.start_daemon()
    assert len(list((it.lazysnap.root / "slots").iterdir())) == 3
