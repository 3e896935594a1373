# SPDX-License-Identifier: Apache-2.0
"""Rules for all tests: what needs root, FUSE or containerd is skipped without them, but not in CI.

With `CI=true` a skip of such a test is a failure, since a machine that lacks what they need proves
nothing. `--soak` also runs the tests that take minutes. A mount or a process that is left over when
all tests have ended is an error of the last one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from fixtures.processes import kill_leftovers, leftovers, mounts_below, unmount_below

_NEEDS = ("root", "fuse", "containerd", "podman")
_END_SECONDS = 30
"""How long processes that have been told to end may take to."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run tests that take minutes")


@pytest.hookimpl(tryfirst=True)  # xdist wants to know groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        "root": "" if os.geteuid() == 0 else "needs root",
        "fuse": "" if Path("/dev/fuse").exists() and os.geteuid() == 0 else "needs /dev/fuse",
        "containerd": ""
        if shutil.which("containerd") and shutil.which("runc")
        else "needs containerd",
        "podman": "" if shutil.which("podman") and shutil.which("runc") else "needs podman",
    }
    grouped = config.pluginmanager.hasplugin("xdist")
    for item in items:
        # With --dist loadgroup: these one after the other, all others beside them.
        if any(item.get_closest_marker(name) for name in _NEEDS) and grouped:
            item.add_marker(pytest.mark.xdist_group("machine"))
        for name, why in missing.items():
            if why and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=why))
        if item.get_closest_marker("soak") and not config.getoption("--soak"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --soak"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """See that xdist has taken up the groups, without which tests that use the machine disturb others."""
    if hasattr(session.config, "workerinput") and session.config.getvalue("loadgroup"):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and not item.nodeid.endswith("@machine"):
                raise pytest.UsageError("this pytest and this pytest-xdist do not know groups")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needs = [name for name in _NEEDS if item.get_closest_marker(name)]
    if (
        report.skipped
        and needs
        and os.environ.get("CI") == "true"
        and not item.get_closest_marker("soak")
    ):
        report.outcome = "failed"
        report.longrepr = (
            f"a test that needs {', '.join(needs)} was skipped in CI: {report.longrepr}"
        )
    return report


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Generator[None, None, None]:
    yield
    directory = tmp_path_factory.getbasetemp()
    end = time.monotonic() + _END_SECONDS
    while (found := leftovers(directory)) and time.monotonic() < end:
        time.sleep(0.1)
    mounted = mounts_below(directory)
    kill_leftovers(directory)
    unmount_below(directory)
    assert (found, mounted) == ({}, []), "tests have left processes or mounts behind"
