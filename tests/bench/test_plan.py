# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from fixtures.images.catalogue import Built
from tests.bench.plan import Measure, Values
from tests.bench.scene import LAZYSNAP, OVERLAYFS, Scene, Side

PEER = Side("peer", program=Path("/peer"))
SIDES = (Side(OVERLAYFS), Side(LAZYSNAP), PEER)


def image() -> Built:
    return Built("image", {}, Path("/"))


def run(scene: Scene, image: Built) -> Values:
    return {}


def test_each_side_gets_the_form_that_it_is_made_for() -> None:
    measure = Measure("m", "m", image, run)
    assert [measure.form_for(side) for side in SIDES] == ["plain", "esgz", "esgz"]


def test_peers_alone_get_the_image_rebuilt_for_a_known_command() -> None:
    measure = Measure("m", "m", image, run, optimised_for=("true",))
    assert [measure.form_for(side) for side in SIDES] == ["plain", "esgz", "optimised"]
    # Which is not made for those who do not need it.
    assert measure.prepare(SIDES[:2]) == image()


def test_one_form_for_all() -> None:
    measure = Measure("m", "m", image, run, form="plain", lazy_only=True)
    assert [measure.form_for(side) for side in SIDES] == ["plain", "plain", "plain"]
    assert [measure.skips(side) for side in SIDES] == [True, False, False]
