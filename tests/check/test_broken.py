# SPDX-License-Identifier: Apache-2.0
"""`lazysnap check` names cause and cure of what is broken, and exits as promised; see `broken.BROKEN`.

Nothing is simulated: each set-up is a real one that was well before, and the command is a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.check.broken import BROKEN, DOCKER_CONFIG, Broken, Call, Site
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd, pytest.mark.slow]

CONFIG = "[shards]\ncount = 1\n[fetch]\nbackground = false\n[registry]\nprobe_valid_seconds = 0.0\n"
# What depends on the machine that the test runs on, and is said of a good set-up, too.
_OF_THE_MACHINE = {
    *("space", "kernel-release", "overlay-data-only", "erofs-file", "kernel-trees", "fuse-limits")
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    directory = tmp_path_factory.mktemp("b")
    (directory / DOCKER_CONFIG).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(directory / DOCKER_CONFIG))
        with stack(directory, config=CONFIG) as it:
            reference = it.push_busybox("lazy", ["estargz", "estargz", "zstd"])
            it.pull(reference)
            yield it, reference


@pytest.fixture
def site(running: tuple[Stack, str], tmp_path: Path) -> Site:
    return Site(*running, tmp_path)


def _check(site: Site, call: Call, *more: str) -> tuple[int, list[dict[str, str]]]:
    """Run the command: its exit code, and what it finds that is not `ok`."""
    it = site.stack
    options = {
        "--root": str(site.root),
        "--config": str(it.directory / "config.toml"),
        "--address": str(it.lazysnap.address),
        "--containerd": it.containerd.address,
        "--containerd-config": str(it.containerd.directory / "config.toml"),
    }
    options.update(zip(call.options[::2], call.options[1::2], strict=True))
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [*call.prefix, sys.executable, "-m", "lazysnap", "check", "--json", *words, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = [finding for finding in json.loads(done.stdout) if finding["level"] != "ok"]
    return done.returncode, found


def _serious(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        finding
        for finding in found
        if finding["level"] in ("warning", "failure") and finding["id"] not in _OF_THE_MACHINE
    ]


def test_a_good_set_up_is_good(site: Site) -> None:
    code, found = _check(site, Call())
    assert _serious(found) == []
    assert code == int(any(finding["level"] == "warning" for finding in found))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.breaks.__name__)
def test_cause_and_cure_are_named(site: Site, broken: Broken) -> None:
    def named(found: list[dict[str, str]]) -> list[dict[str, str]]:
        return [
            finding
            for finding in found
            if finding["id"] == broken.probe and broken.cause in finding["summary"]
        ]

    with broken.breaks(site) as call:
        code, found = _check(site, call)
        assert named(found), found
        assert all(broken.cure in finding["hint"] and finding["hint"] for finding in named(found))
        assert code == broken.exit_code, found
        if broken.fix:
            _, found = _check(site, call, "--fix")
            assert all(finding["fixed"] for finding in named(found)), found
            _, found = _check(site, call)
            assert named(found) == []


def test_all_is_well_again(site: Site) -> None:
    """Nothing above, and no `--fix`, has broken anything for good."""
    # That a registry did not have a layer is remembered for some seconds.
    wait_until(lambda: _serious(_check(site, Call())[1]) == [])
    assert site.stack.run(site.reference, "cat", "/data/hello") == "hello from the top layer\n"
