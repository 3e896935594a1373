# SPDX-License-Identifier: Apache-2.0
"""What becomes of errors in work that nothing depends on."""

from __future__ import annotations

import logging

import pytest
import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.errors import Unavailable

_log = log.get(__name__)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_an_expected_error_is_one_line(caplog: pytest.LogCaptureFixture, level: int) -> None:
    caplog.set_level(logging.DEBUG)
    with advice(_log, "nothing fetched", level=level, layer="sha256:x"):
        raise Unavailable("the registry is away")
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (level, "nothing fetched")
    assert record.exc_info is None
    fields = record.__dict__["fields"]
    assert (fields["layer"], str(fields["error"])) == ("sha256:x", "the registry is away")
    assert record.funcName == test_an_expected_error_is_one_line.__name__


def test_a_defect_is_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    with advice(_log, "nothing fetched", layer="sha256:x"):
        raise ValueError("a defect")
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "nothing fetched")
    assert "ValueError: a defect" in caplog.text
    assert record.__dict__["fields"] == {"layer": "sha256:x"}
    assert record.funcName == test_a_defect_is_a_trace.__name__


async def test_a_defect_of_a_task_in_the_body_is_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("a defect")

    with advice(_log, "nothing fetched"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
    assert "ValueError: a defect" in caplog.text


async def test_cancellation_passes(caplog: pytest.LogCaptureFixture) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with advice(_log, "nothing fetched"):
            await trio.sleep_forever()
        raise AssertionError("not reached")
    assert scope.cancelled_caught
    assert not caplog.records
