# SPDX-License-Identifier: Apache-2.0
"""Runs the measurements that were asked for, the sides in turn, and prints what came out.

A run that fails or takes too long is reported and the next one goes on. Whatever happens, also on
Ctrl-C, nothing keeps running or mounted; what was measured until then is still printed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fixtures.processes import FixtureError
from fixtures.showcase import Interrupted, interrupt, workplace

from . import files, full, known, memory, report, start, tree
from .origin import NETWORKS, Network, Origin, origin
from .plan import Measure, Run
from .scene import LAZYSNAP, OVERLAYFS, Side, scene

MEASURES = [
    *start.MEASURES,
    *known.MEASURES,
    *full.MEASURES,
    *tree.MEASURES,
    *files.MEASURES,
    *memory.MEASURES,
]
_WORK = Path(__file__).resolve().parents[2] / ".work" / "bench"
_SECONDS = 300
"""How long a run may take, the pull of the slowest side included."""


def main() -> int:
    """Run what the command line says."""
    arguments, measures = _arguments()
    sides = [
        side for side in _sides(arguments) if not arguments.side or side.name in arguments.side
    ]
    networks = arguments.network or list(NETWORKS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    runs: list[Run] = []
    stopped = False
    try:
        with _turn(), workplace(_WORK) as place, origin(place) as server:
            for measure in measures:
                for network in measure.networks:
                    if network in networks:
                        _repeat(measure, NETWORKS[network], sides, arguments.runs, server, runs)
    except FixtureError as error:
        _say(str(error))
        stopped = True
    except Interrupted:
        _say("interrupted; everything is cleaned up")
        stopped = True
    if runs:
        _show(measures, runs, arguments)
    return 1 if stopped or any(run.error for run in runs) else 0


def _arguments() -> tuple[argparse.Namespace, list[Measure]]:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="tests/bench/run",
        description="Measure snapshotters side by side.",
        epilog="measurements: " + ", ".join(one.name for one in MEASURES),
    )
    parser.add_argument("--only", type=words, default=[], help="measurements, by name or prefix")
    parser.add_argument("--runs", type=int, default=3, help="of each side; default: %(default)s")
    parser.add_argument("--network", type=words, help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--side", type=words, help="only these snapshotters")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH",
        help="another snapshotter: a program to start, or the socket of one that is running; may "
        "be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--peer-reset", default="", metavar="COMMAND",
        help="shell command that makes running peers forget everything; run before each run",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write every run to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, in Markdown")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must run as root: it mounts and starts containers")
    if unknown := set(arguments.network or []) - NETWORKS.keys():
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    for name in arguments.only:
        if not any(one.name.startswith(name) for one in MEASURES):
            parser.error(f"no such measurement: {name}")
    chosen = [
        one
        for one in MEASURES
        if not arguments.only
        or one.name in arguments.only
        or any(
            one.name.startswith(name)
            for name in arguments.only
            if all(name != other.name for other in MEASURES)
        )
    ]
    return arguments, chosen


def _sides(arguments: argparse.Namespace) -> list[Side]:
    sides = [Side(OVERLAYFS), Side(LAZYSNAP)]
    for peer in arguments.peer:
        name, _, address = peer.partition("=")
        path = Path(address).resolve()
        if path.is_socket():
            sides.append(Side(name, socket=path, reset=arguments.peer_reset))
        elif os.access(path, os.X_OK) and path.is_file():
            sides.append(Side(name, program=path))
        else:
            raise FixtureError(f"--peer {peer}: neither a program nor a socket")
    return sides


def _repeat(
    measure: Measure,
    network: Network,
    sides: Sequence[Side],
    count: int,
    server: Origin,
    runs: list[Run],
) -> None:
    image = measure.prepare(sides)
    if measure.learn is not None and any(side.name == LAZYSNAP for side in sides):
        try:
            with _bounded(), scene(_WORK, server, Side(LAZYSNAP), NETWORKS["unlimited"]) as it:
                measure.learn(it, image)
        except (FixtureError, OSError, subprocess.SubprocessError) as problem:
            runs.append(Run(measure.name, network.name, LAZYSNAP, {}, str(problem), 0.0))
            _say(f"{measure.name} {network.name} learning: {problem}")
            return
    for number in range(count):
        for side in sides:
            if measure.skips(side):
                continue
            load = os.getloadavg()[0]
            try:
                with (
                    _bounded(),
                    scene(
                        _WORK, server, side, network,
                        form=measure.form_for(side), config=measure.config,
                    ) as it,
                ):  # fmt: skip
                    values, error = measure.run(it, image), ""
            except (FixtureError, OSError, subprocess.SubprocessError) as problem:
                values, error = {}, str(problem)
            runs.append(Run(measure.name, network.name, side.name, values, error, load))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            _say(f"{measure.name} {network.name} {number + 1} {side.name}: {error or shown}")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise FixtureError(f"took longer than {_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Wait for another benchmark on this machine: two at once would measure each other."""
    _WORK.parent.mkdir(exist_ok=True)
    with Path("/tmp/lazysnap-bench.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another benchmark to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _show(measures: Sequence[Measure], runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    machine = report.machine()
    table = report.rows(measures, runs)
    about = report.about(machine, runs, arguments.runs)
    print(f"{about}\n\n{report.plain(table)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report.document(measures, runs, machine), indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(f"{about}\n\n{report.markdown(table)}\n")


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
