# SPDX-License-Identifier: Apache-2.0
"""A report as one page: no scripts, nothing from elsewhere; titles of the bars tell the details. Pure.

Names of files come from images, so nothing may get out of its place: everything is put in by `element`,
and a content security policy allows the page's own style and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from xml.etree.ElementTree import Element

from lazysnap.quantities import bytes_text
from lazysnap.report.markup import Child, document, element
from lazysnap.report.model import Layer, Report, Savings
from lazysnap.report.sections import sections
from lazysnap.report.style import STYLE
from lazysnap.report.waterfall import waterfall
from lazysnap.report.words import layer_text, seconds_text

_LEGEND = (
    ("demand", "fetched as a reader asked for it"),
    ("prefetch", "fetched ahead: profile, landmark, guess"),
    ("prefetch urgent", "fetched ahead, and a reader came to wait for it"),
    ("background", "fetched in the background"),
    ("failed", "failed"),
    ("wait", "a read waited"),
    ("mounting", "a layer was mounted"),
    ("container", "a container was prepared"),
)


def page(report: Report) -> str:
    """A report as HTML."""
    style_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width"),
        element("title", f"Start of {report.image}"),
    ]
    return document(head, STYLE, [element("main", *_body(report))])


def _body(report: Report) -> Iterator[Element]:
    yield element("h1", report.image)
    yield element("p", f"As seen by {report.root} at {_clock(report.made_at)}.", class_="about")
    yield _summary(report)
    if report.missing:
        yield element("h2", "What is not known")
        items = (element("li", sentence) for sentence in report.missing)
        yield element("ul", *items, class_="missing")
    yield element("h2", "What happened")
    yield from _pictures(report)
    yield element("h2", "What held the start up")
    yield _slowest(report)
    yield element("h2", "Prefetch")
    yield from _prefetch(report)
    yield element("h2", "Layers")
    yield _layers(report)
    yield element("h2", "What could be saved")
    yield from _savings(report)


def _summary(report: Report) -> Element:
    fetched = sum(each.received for each in report.ranges)
    requests = sum(each.received > 0 for each in report.ranges)  # the others were here already
    lazy = [layer for layer in report.layers if layer.slot is not None]
    tiles = (
        (f"{len(lazy)} of {len(report.layers)}", "layers lazy"),
        (bytes_text(fetched), f"fetched in {requests} requests"),
        (str(len(report.waits)), "reads waited"),
        (seconds_text(report.savings.waited_seconds), "during which a read waited"),
    )
    return element(
        "div",
        *(element("div", element("b", big), element("span", small)) for big, small in tiles),
        class_="tiles",
    )


def _pictures(report: Report) -> Iterator[Element]:
    found = sections(report)
    if not found:
        yield element("p", "Nothing was recorded; see above for why.")
        return
    yield element(
        "p",
        *(element("span", text, class_=f"key {kind}") for kind, text in _LEGEND),
        class_="legend",
    )
    for section in found:
        when = f"From {_clock(report.zero + section.begin)}"
        yield element("h3", f"{when}, for {seconds_text(section.end - section.begin)}")
        yield waterfall(report, section)


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Child]], class_: str, left: int = 1
) -> Element:
    """A table; all but the first columns hold numbers."""

    def cells(tag: str, row: Sequence[Child]) -> Iterator[Element]:
        for number, cell in enumerate(row):
            yield element(tag, cell, class_="number" if number >= left else "text")

    body = (element("tr", *cells("td", row)) for row in rows)
    return element(
        "table",
        element("thead", element("tr", *cells("th", heads))),
        element("tbody", *body),
        class_=class_,
    )


def _slowest(report: Report) -> Element:
    if not report.slowest:
        return element("p", "No known read had to wait.")
    rows = (
        (
            slow.file,
            layer_text(report.layers[slow.layer], slow.layer),
            str(slow.waits),
            seconds_text(slow.seconds),
            bytes_text(slow.bytes),
        )
        for slow in report.slowest
    )
    return _table(("file", "layer", "waits", "waited", "read"), rows, "slowest", left=2)


def _prefetch(report: Report) -> Iterator[Element]:
    uses = [layer.use for layer in report.layers if layer.slot is not None]
    known = bool(uses) and all(use.known for use in uses)
    rows = (
        ("had been fetched ahead in time (hits)", sum(use.hits for use in uses), known),
        ("were on their way when a reader came (late)", sum(use.late for use in uses), True),
        ("came along with what a reader asked for", sum(use.along for use in uses), known),
        ("had not been asked for by anybody (misses)", sum(use.missed for use in uses), True),
        ("had been local before the worker was started", sum(use.before for use in uses), known),
    )
    texts = ((what, str(number) if sure else "not known") for what, number, sure in rows)
    yield _table(("pieces of the blobs that were read, and", "number"), texts, "prefetch")
    if not known:
        yield element(
            "p",
            "Reads that do not wait are known from a profile only. Switch it on"
            " (learn_profiles), or run `lazysnap profile record IMAGE -- COMMAND`.",
        )


def _layers(report: Report) -> Element:
    heads = ("layer", "state", "blob", "fetched", "requests", "needed", "unused", "files", "local")
    rows = (_layer(layer, number) for number, layer in enumerate(report.layers))
    return _table(heads, rows, "layers", left=2)


def _layer(layer: Layer, number: int) -> Sequence[str]:
    name = layer_text(layer, number)
    if layer.slot is None:
        disk = "" if layer.disk_bytes is None else f", {bytes_text(layer.disk_bytes)} on disk"
        return (name, f"unpacked: {layer.reason or 'no lazy mount was asked for'}{disk}", *[""] * 7)
    use = layer.use
    return (
        name,
        f"lazy, slot {layer.slot}",
        _maybe(layer.blob_bytes),
        _maybe(layer.fetched_bytes),
        "?" if layer.requests is None else str(layer.requests),
        ("" if use.known else "≥ ") + bytes_text(use.needed),
        bytes_text(use.unused) if use.known else "?",
        _maybe(layer.bytes),
        _maybe(layer.local_bytes),
    )


def _maybe(number: int | None) -> str:
    return "?" if number is None else bytes_text(number)


def _savings(report: Report) -> Iterator[Element]:
    yield element("p", "Estimates from what was recorded, and how each was computed.")
    rows = list(_estimates(report.savings))
    yield _table(("what", "how it was computed", "estimate"), rows, "savings", left=2)


def _estimates(savings: Savings) -> Iterator[Sequence[str]]:
    measured = savings.round_trip > 0
    yield (
        "A profile: at the most",
        f"time during which at least one of {savings.waits} reads waited; waits at the same time"
        " counted once",
        seconds_text(savings.waited_seconds),
    )
    yield (
        "A profile: round trips",
        f"{savings.round_trips} reads that waited for the answer to a request of their own, times"
        " the registry's round trip"
        + (f" ({seconds_text(savings.round_trip)}, the least seen)" if measured else "")
        + "; reads that waited at the same time each count",
        seconds_text(savings.round_trips_seconds) if measured else "not known",
    )
    yield (
        "What cannot be saved: the transfer",
        "needed bytes divided by the bandwidth"
        + (f" ({bytes_text(savings.bandwidth)}/s)" if savings.bandwidth else ""),
        seconds_text(savings.transfer_seconds) if savings.bandwidth else "not known",
    )
    known = savings.needed_share is not None
    yield (
        "A profile: bytes",
        "pieces that were fetched on demand or ahead, and that nobody read; without the background",
        bytes_text(savings.unused_bytes) if known else "not known",
    )
    yield (
        "A conversion to smaller pieces",
        "compressed size of the pieces that were needed, less what was read of them (each layer"
        " taken as equally well compressed everywhere)",
        bytes_text(savings.coarse_bytes) if known else "not known",
    )
    if savings.unpacked_bytes:
        share = "" if savings.needed_share is None else (
            f"; of the lazy layers' blobs, {100 * savings.needed_share:.1f} % was needed"
        )  # fmt: skip
        yield (
            "A conversion of the layers that are not lazy",
            f"what they take on disk, all of which was downloaded before the start{share}",
            bytes_text(savings.unpacked_bytes),
        )


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
