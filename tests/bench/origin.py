# SPDX-License-Identifier: Apache-2.0
"""The registry that is measured against: blobs from memory by nginx, at several network speeds.

Debian's docker-registry takes milliseconds of CPU for a range request, which would be measured
along; it answers only what is not a blob. The slow networks are proxies in processes of their own;
the unlimited one is nginx itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fixtures.images.catalogue import DEFAULT_ROOT, Built
from fixtures.processes import FixtureError, accepts, daemon, free_port, run
from fixtures.registry import Registry, registry

from . import ledger

_MEMORY = Path("/dev/shm")
_PREFIX = "lazysnap-bench-"
_BLOBS = "docker/registry/v2/blobs/sha256"

_NGINX = """\
daemon off;
master_process off;
pid {work}/nginx.pid;
error_log {work}/nginx.log warn;
events {{ worker_connections 1024; }}
http {{
  log_format ledger '{log_format}';
  access_log {work}/access ledger;
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3;
  uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  sendfile on; tcp_nopush on; keepalive_requests 1000000; open_file_cache max=1000;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{registry}; proxy_set_header Host $http_host; }}
    location ~ "^/v2/.+/blobs/sha256:(?<ab>[0-9a-f]{{2}})(?<rest>[0-9a-f]{{62}})$" {{
      alias {blobs}/$ab$rest;
      default_type application/octet-stream;
      add_header Docker-Content-Digest sha256:$ab$rest;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Network:
    """How the registry is reached.

    Attributes:
        name: On the command line.
        title: In tables.
        rate: Bytes per second; 0 is unlimited.
        delay: Seconds of a round trip.
    """

    name: str
    title: str
    rate: float = 0
    delay: float = 0


NETWORKS = {
    one.name: one
    for one in (
        Network("unlimited", "unlimited"),
        Network("50", "50 MB/s, 5 ms", 50e6, 0.005),
        Network("10", "10 MB/s, 30 ms", 10e6, 0.030),
    )
}


class Origin:
    """A running registry.

    Args:
        server: The docker-registry behind it.
        ports: Of the networks, by name.
        log: nginx's access log.
        pid: nginx.
        blobs: Directory in memory that nginx serves.
    """

    def __init__(
        self, server: Registry, ports: dict[str, int], log: Path, pid: int, blobs: Path
    ) -> None:
        self.server = server
        self._blobs = blobs
        self._ports = ports
        self._log = log
        self._pid = pid

    def reference(self, image: Built, form: str, network: Network) -> str:
        """An image as it is pulled through a network; its blobs are in memory then."""
        manifest = self.server.manifest(image.repository, form)
        for blob in (manifest["config"], *manifest["layers"]):
            self._load(image.storage, blob["digest"])
        return f"{self.host(network)}/{image.repository}:{form}"

    def host(self, network: Network) -> str:
        """Host and port of a network's way to the registry."""
        return f"127.0.0.1:{self._ports[network.name]}"

    def mark(self) -> int:
        """The present end of the log, for `since`."""
        return self._log.stat().st_size

    def since(self, mark: int) -> ledger.Totals:
        """What was sent since a mark: responses that have ended."""
        with self._log.open() as log:
            log.seek(mark)
            # A line that nginx is just writing is not a line yet.
            lines = [line for line in log if line.endswith("\n")]
        return ledger.totals(lines, lambda digest: self._stored(digest).stat().st_size)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """No answer from the registry within the block, also not on open connections."""
        os.kill(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def curl(self, image: Built, network: Network, sizes: Mapping[str, int]) -> float:
        """Seconds that a network takes for one who only wants the bytes.

        Args:
            image: Whose blobs; they are in memory, see `reference`.
            network: The way.
            sizes: Bytes, at least one, from the beginning of each blob, by digest.
        """
        command = ["curl"]
        for digest, size in sizes.items():
            if len(command) > 1:
                command.append("--next")  # on the same connection, but with options of its own
            url = f"http://{self.host(network)}/v2/{image.repository}/blobs/{digest}"
            command += ["-sS", "--fail", "-o", "/dev/null", "-w", "%{time_total}\n"]
            command += ["--range", f"0-{size - 1}", url]
        return sum(map(float, run(command).split()))

    def blob(self, digest: str) -> bytes:
        """A blob of an image that was pulled."""
        return self._stored(digest).read_bytes()

    def _stored(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def _load(self, storage: Path, digest: str) -> None:
        target = self._stored(digest)
        if not target.exists():
            name = target.name
            shutil.copyfile(storage / _BLOBS / name[:2] / name / "data", target)


@contextlib.contextmanager
def origin(work: Path) -> Iterator[Origin]:
    """Run the registry and all networks.

    Args:
        work: Existing directory, of this registry alone.
    """
    _free_memory()
    blobs = _MEMORY / f"{_PREFIX}{os.getpid()}"
    blobs.mkdir()
    port = free_port()
    (work / "access").touch()
    config = work / "nginx.conf"
    try:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(registry(DEFAULT_ROOT / "registry", work, readonly=True))
            config.write_text(
                _NGINX.format(
                    work=work, log_format=ledger.LOG_FORMAT, port=port, registry=server.port,
                    blobs=blobs,
                )
            )  # fmt: skip
            # -e: before it has read its configuration, nginx would open the system's log.
            nginx = stack.enter_context(
                daemon(
                    ["nginx", "-e", work / "nginx.log", "-c", config],
                    work / "nginx-output.log",
                    lambda: accepts(port),
                )
            )
            ports = {
                network.name: stack.enter_context(_proxy(port, network)) if network.rate else port
                for network in NETWORKS.values()
            }
            yield Origin(server, ports, work / "access", nginx.pid, blobs)
    finally:
        shutil.rmtree(blobs, ignore_errors=True)


@contextlib.contextmanager
def _proxy(upstream: int, network: Network) -> Iterator[int]:
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fixtures.proxy",
            *map(str, (upstream, network.rate, network.delay)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:  # on leaving, its standard input is closed and it ends
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise FixtureError(f"the proxy of {network.title} did not start")
        try:
            yield int(line)
        finally:
            child.terminate()


def _free_memory() -> None:
    """Remove what processes left behind that were killed; never what a living one uses."""
    for left in _MEMORY.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX)).exists():
            shutil.rmtree(left, ignore_errors=True)
