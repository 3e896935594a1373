# SPDX-License-Identifier: Apache-2.0
"""The page: complete, and safe whatever files are called."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import trio

from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.scheduler import Priority, Scheduler
from lazysnap.fetch.trace import Told
from lazysnap.prefetch.profile import Read
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.report.estimate import covered, savings, use
from lazysnap.report.gather import from_zero
from lazysnap.report.history import History, slowest
from lazysnap.report.model import Container, Layer, Range, Report, Wait, printable
from lazysnap.report.page import page
from lazysnap.report.sections import sections
from tests.fetch.engine import Engine, engine
from tests.report.browser import CHROMIUM, Browser, Page
from tests.support import layers

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "</title></text></svg><img src=x onerror=document.title='owned'>",
    "\"'><b onmouseover=alert(1)>",
    "]]></style><style>*{display:none}</style>",
    "<!--",
    "&lt;img src=x&gt;",
    "new\nline\ttab\rreturn",
    "turned \u202e round",
    "nul\0",
    "javascript:alert(1)",
]
_RNG = random.Random(11)
FILES = {f"usr/lib/module{n}.py": _RNG.randbytes(70_000 + 9_000 * n) for n in range(12)}
LAYER = layers.estargz([layers.file(n, d) for n, d in FILES.items()], chunk_size=30_000)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def _told(e: Engine) -> Told:
    fetched, waited = e.reader.fetcher.requests.trace.events(0)
    return Told(slot=1, fetched=fetched, waited=waited, started=0, now=time.monotonic())


async def _start(e: Engine) -> None:
    """Some is fetched ahead and read, some is read at once, some is fetched and never read."""
    async with trio.open_nursery() as nursery:
        ahead = PrefetchQueue(Scheduler(), nursery)
        await ahead.add(e.reader.fetcher, Plan(range(12)), Priority.PREFETCH).wait()
        nursery.cancel_scope.cancel()
    for name in list(FILES)[::3]:
        await e.read(name, 0, 40_000)


def _report(e: Engine) -> Report:
    told = _told(e)
    history = History(0, e.index, 0.0)
    ranges, waits = history.ranges(told), history.waits(told)
    layer = Layer(
        digest=LAYER.digest,
        slot=1,
        blob_bytes=LAYER.size,
        bytes=e.index.total_size,
        local_bytes=100_000,
        fetched_bytes=sum(each.received for each in ranges),
        requests=len(ranges),
        use=use(e.index, told, None),
    )
    return from_zero(
        Report(
            image="registry.example/image:1",
            root="/var/lib/lazysnap",
            zero=0.0,
            made_at=told.now,
            layers=[layer, Layer(digest="sha256:" + "d" * 64, reason="no-toc", disk_bytes=5 << 20)],
            containers=[Container(key="default/1/box", at=ranges[0].at)],
            ranges=ranges,
            waits=waits,
            slowest=slowest(waits),
            savings=savings([layer], waits, 0.05, 1e7),
            missing=["There is no profile of the image."],
        )
    )


def _hostile() -> Report:
    names = [*HOSTILE, printable(b"not utf-8: \xff\xfe<b>")]
    ranges = [
        Range(
            layer=0,
            file=printable(name),
            files=[name],
            more_files=1,
            kind="demand" if number % 2 else name,
            at=number / 10,
            seconds=0.1,
            offset=0,
            length=10,
            received=10,
        )
        for number, name in enumerate(names)
    ]
    waits = [
        Wait(layer=0, file=name, offset=0, length=1, at=number / 10, seconds=0.05, ahead=False)
        for number, name in enumerate(names)
    ]
    return Report(
        image=HOSTILE[0],
        root=HOSTILE[1],
        zero=0.0,
        made_at=0.0,
        layers=[
            Layer(digest=HOSTILE[2], slot=1, mounting_at=0.0, ready_at=0.01),
            Layer(digest=HOSTILE[3], reason=HOSTILE[1]),
        ],
        containers=[Container(key=name, at=0.05) for name in HOSTILE],
        ranges=ranges,
        waits=waits,
        slowest=slowest(waits),
        missing=HOSTILE,
    )


async def test_every_range_and_every_wait_has_a_bar(tmp_path: Path) -> None:
    async with engine(LAYER, tmp_path) as e:
        await _start(e)
        report = _report(e)
        parsed = Page(page(report))
        assert sorted(map(int, parsed.having("data-range"))) == list(range(len(e.source.requests)))
        assert sorted(map(int, parsed.having("data-wait"))) == list(range(len(report.waits)))
        assert len(report.waits) > 1
        assert {each.kind for each in report.ranges} == {"demand", "prefetch"}
        for slow in report.slowest:
            assert slow.file in FILES
            assert slow.file in parsed.text
        assert "unpacked: no-toc, 5.0 MiB on disk" in parsed.text


async def test_what_was_read_of_what_was_fetched(tmp_path: Path) -> None:
    async with engine(LAYER, tmp_path) as e:
        await _start(e)
        size = [e.index.member(n).blob_end - e.index.member(n).blob_offset for n in range(12)]
        everything = [Read(name, 0, len(data), 0) for name, data in FILES.items()]
        found = use(e.index, _told(e), everything)
        assert found.read == sum(len(data) for data in FILES.values())
        assert found.needed == sum(
            e.index.member(n).blob_end - e.index.member(n).blob_offset
            for n in range(e.index.member_count)
            if any(e.index.chunk(i).member == n for i in e.index.member_chunks(n))
        )
        assert found.unused == 0
        # The prefetch brought the first twelve pieces, all in time, as nobody read before.
        assert (found.hits, found.late) == (12, 0)
        assert found.missed > 0
        assert found.before == e.index.member_count - 12 - found.missed - found.along
        assert found.round_trips == len(_told(e).waited)
        nothing = use(e.index, _told(e), [])
        assert nothing.known
        assert nothing.unused >= sum(size[2:])  # of each third file the first two pieces were read
        unknown = use(e.index, _told(e), None)
        assert (unknown.known, unknown.missed) == (False, found.missed)


def test_waits_at_the_same_time_count_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (1, 3), (2, 4), (2.5, 3)]) == 5


def test_pictures_are_of_what_belongs_together() -> None:
    def fetched(at: float, seconds: float) -> Range:
        return Range(
            layer=0,
            file=f"f{at}",
            kind="background",
            at=at,
            seconds=seconds,
            offset=0,
            length=1,
            received=1,
        )

    wait = Wait(layer=0, file="w", offset=0, length=1, at=3601, seconds=1, ahead=False)
    report = Report(
        image="i",
        root="/r",
        zero=0,
        made_at=0,
        layers=[Layer(digest="", slot=1, mounting_at=0, ready_at=1)],
        containers=[Container(key="box", at=3600)],
        ranges=[fetched(3600.5, 1), *(fetched(3603 + n, 1) for n in range(60))],
        waits=[wait],
    )
    found = sections(report)
    assert [(each.begin, each.end) for each in found] == [(0, 1), (3600, 3602), (3603, 3663)]
    assert [len(each.containers) for each in found] == [0, 1, 0]
    assert sum(len(row.bars) for each in found for row in each.rows) == 63


def test_a_thousand_files_are_not_a_thousand_rows() -> None:
    ranges = [
        Range(
            layer=0,
            file=f"f{number}",
            kind="demand",
            at=number / 100,
            seconds=0.1,
            offset=0,
            length=1,
            received=1,
        )
        for number in range(20_000)
    ]
    layer = Layer(digest="", slot=1)
    report = Report(image="i", root="/r", zero=0, made_at=0, layers=[layer], ranges=ranges)
    (section,) = sections(report)
    assert len(section.rows) < 400
    assert len(Page(page(report)).having("data-range")) == 20_000


def test_nothing_gets_out_of_its_place() -> None:
    source = page(_hostile())
    assert "\0" not in source
    parsed = Page(source)
    assert not parsed.tags() & {"script", "img", "base", "iframe", "object", "link"}
    assert sum(tag == "style" for tag, _ in parsed.elements) == 1
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]
    assert len(parsed.having("data-range")) == len(HOSTILE) + 1
    for name in HOSTILE[:6]:
        assert name in parsed.text
    assert "new\\nline\\ttab\\rreturn" in parsed.text
    assert "turned \\u202e round" in parsed.text
    assert "not utf-8: \\xff\\xfe<b>" in parsed.text
    (policy,) = parsed.having("content")[:1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


@needs_browser
async def test_a_browser_shows_every_bar(tmp_path: Path) -> None:
    async with engine(LAYER, tmp_path / "cache") as e:
        await _start(e)
        report = _report(e)
    await trio.to_thread.run_sync(_compare_with_browser, tmp_path, report)


@needs_browser
def test_a_browser_is_not_deceived(tmp_path: Path) -> None:
    _compare_with_browser(tmp_path, _hostile())


def _compare_with_browser(directory: Path, report: Report) -> None:
    path = directory / "page.html"
    path.write_text(page(report))
    browser = Browser(directory)
    dom, console = browser.dom(path)
    assert console == []
    seen = Page(dom)
    assert sorted(map(int, seen.having("data-range"))) == list(range(len(report.ranges)))
    assert sorted(map(int, seen.having("data-wait"))) == list(range(len(report.waits)))
    assert seen.titles[0] == f"Start of {report.image}"
    assert seen.tags() == Page(page(report)).tags() | {"tbody"}
    image = directory / "page.png"
    assert browser.screenshot(path, image) == []
    assert image.read_bytes().startswith(b"\x89PNG")


@needs_browser
def test_the_browser_would_complain(tmp_path: Path) -> None:
    """That there were no complaints means something: the policy is in force, and is heard of."""
    path = tmp_path / "page.html"
    script = "<script>document.title = 'owned'</script></body>"
    path.write_text(page(_hostile()).replace("</body>", script))
    dom, console = Browser(tmp_path).dom(path)
    assert any("Content Security Policy" in line for line in console)
    assert Page(dom).titles[0] != "owned"
