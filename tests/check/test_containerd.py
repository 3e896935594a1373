# SPDX-License-Identifier: Apache-2.0
"""containerd's configuration, and a real containerd."""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap.check import containerd, settings
from lazysnap.check.containerd import judge_cri, judge_loaded, judge_proxy, judge_transfer, ours
from lazysnap.check.finding import Context, Finding, Level
from lazysnap.containerd.client import Plugin
from lazysnap.errors import ConfigError
from tests.check.scene import context, look
from tests.support.containerd import PrivateContainerd, private_containerd

PROXY = """
[proxy_plugins.lazysnap]
  type = "snapshot"
  address = "{address}"
  {more}
  [proxy_plugins.lazysnap.exports]
    root = "{root}"
    enable_remote_snapshot_annotations = "true"
"""
CRI_1 = """
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "lazysnap"
  disable_snapshot_annotations = {value}
"""
CRI_2 = """
version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "lazysnap"
  disable_snapshot_annotations = {value}
"""


def _proxy(ctx: Context, **changes: str) -> str:
    values = {"address": ctx.address, "root": ctx.root, "more": "", **changes}
    return PROXY.format(**values)


def _judged(ctx: Context, text: str, version: tuple[int, int] = (2, 1)) -> list[Finding]:
    mine = ours(ctx, settings.proxies(tomllib.loads(text)))
    assert len(mine) == 1
    return list(judge_proxy(ctx, mine[0], "config.toml", version))


def test_a_good_entry(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    assert _judged(ctx, _proxy(ctx)) == []
    assert _judged(ctx, _proxy(ctx, address=f"unix://{ctx.address}")) == []


@pytest.mark.parametrize(
    ("change", "level", "says"),
    [
        ({"more": 'capabilities = ["rebase"]'}, Level.FAILURE, "rebase"),
        ({"root": "/elsewhere"}, Level.WARNING, "/elsewhere"),
    ],
)
def test_bad_entries(tmp_path: Path, change: dict[str, str], level: Level, says: str) -> None:
    ctx = context(tmp_path)
    (found,) = _judged(ctx, _proxy(ctx, **change))
    assert (found.level, says in found.summary) == (level, True)


def test_more_bad_entries(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    other = _proxy(ctx).replace('"snapshot"', '"content"')
    assert [finding.level for finding in _judged(ctx, other)] == [Level.FAILURE]
    silent = _proxy(ctx).replace("enable_remote_snapshot_annotations", "other")
    assert [finding.level for finding in _judged(ctx, silent)] == [Level.WARNING]
    assert _judged(ctx, silent, (1, 7)) == []  # it has no use for it


@pytest.mark.parametrize("text", [CRI_1, CRI_2])
def test_annotations_must_not_be_disabled(text: str) -> None:
    for value, levels in (("false", []), ("true", [Level.FAILURE])):
        table = settings.cri(tomllib.loads(text.format(value=value)))
        assert table is not None
        assert [f.level for f in judge_cri(table, ["lazysnap"], "c")] == levels
    default = text.replace("disable_snapshot_annotations = {value}", "")
    table = settings.cri(tomllib.loads(default))
    assert [f.level for f in judge_cri(table or {}, ["lazysnap"], "c")] == [Level.FAILURE]
    assert [f.level for f in judge_cri(table or {}, ["other"], "c")] == [Level.INFO]


def test_a_disabled_cri_is_not_looked_at() -> None:
    for name in ("cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"):
        assert settings.cri({"disabled_plugins": [name]}) is None
    assert settings.cri({"disabled_plugins": ["other"]}) == {}


def test_the_transfer_service() -> None:
    entry = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = '{}'\n"
    both = settings.unpacked(tomllib.loads(entry.format("overlayfs") + entry.format("lazysnap")))
    assert both == ["overlayfs", "lazysnap"]
    assert list(judge_transfer(both, ["lazysnap"], "c")) == []
    one = settings.unpacked(tomllib.loads(entry.format("overlayfs")))
    assert [f.level for f in judge_transfer(one, ["lazysnap"], "c")] == [Level.WARNING]
    assert settings.unpacked({}) is None
    assert [f.level for f in judge_transfer(None, ["lazysnap"], "c")] == [Level.WARNING]


def test_a_plugin_that_is_not_loaded(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    mine = ours(ctx, settings.proxies(tomllib.loads(_proxy(ctx))))

    def judged(*plugins: Plugin) -> list[Level]:
        return [finding.level for finding in judge_loaded(mine, plugins)]

    kind = "io.containerd.snapshotter.v1"
    assert judged(Plugin(kind, "lazysnap", {}, (), "")) == []
    assert judged(Plugin(kind, "lazysnap", {}, (), "no socket")) == [Level.FAILURE]
    assert judged(Plugin("io.containerd.content.v1", "lazysnap", {}, (), "")) == [Level.FAILURE]


def test_imported_files_are_read_too(tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    main.write_text('version = 2\nimports = ["conf.d/*.toml"]\n[proxy_plugins.a]\ntype = "diff"\n')
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/b.toml").write_text('[proxy_plugins.b]\ntype = "snapshot"\n')
    assert [proxy.name for proxy in settings.proxies(settings.load(str(main)))] == ["a", "b"]
    (tmp_path / "conf.d/c.toml").write_text("no = = toml")
    with pytest.raises(ConfigError):
        settings.load(str(main))
    assert settings.load(str(tmp_path / "none")) == {}


def test_settings_of_odd_kinds_do_no_harm() -> None:
    odd = {"proxy_plugins": 3, "plugins": [], "disabled_plugins": "cri", "imports": 7}
    assert settings.proxies(odd) == []
    assert settings.cri(odd) == {}
    assert settings.unpacked(odd) is None
    odd = {"proxy_plugins": {"x": 1, "y": {"exports": 2, "capabilities": 3}}}
    assert [proxy.capabilities for proxy in settings.proxies(odd)] == [(), ()]


# -- with a real containerd -------------------------------------------------------------------------


@pytest.fixture
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[PrivateContainerd, Context]]:
    directory = tmp_path_factory.mktemp("c")
    ctx = context(directory)
    with private_containerd(directory, proxies={"lazysnap": ctx.address}) as it:
        yield it, context(directory, containerd=it.address, containerd_config=None)


@pytest.mark.root
@pytest.mark.containerd
async def test_a_real_containerd(running: tuple[PrivateContainerd, Context]) -> None:
    daemon, ctx = running
    assert settings.find(ctx) == str(daemon.directory / "config.toml")
    for probe in containerd.PROBES:
        assert await look(ctx, containerd.PROBES, probe.id) == []


@pytest.mark.root
@pytest.mark.containerd
async def test_a_real_containerd_that_was_not_restarted(
    running: tuple[PrivateContainerd, Context], tmp_path: Path
) -> None:
    _, ctx = running
    config = tmp_path / "config.toml"
    text = _proxy(ctx).replace("proxy_plugins.lazysnap", "proxy_plugins.other")
    config.write_text(text)
    changed = Context(
        root=ctx.root,
        address=ctx.address,
        containerd=ctx.containerd,
        containerd_config=str(config),
    )
    (found,) = await look(changed, containerd.PROBES, "containerd-plugin")
    assert (found.level, "restart" in found.hint) == (Level.FAILURE, True)
    config.write_text("")
    (found,) = await look(changed, containerd.PROBES, "containerd-plugin")
    assert (found.level, "does not know" in found.detail) == (Level.FAILURE, True)
    config.write_text(_proxy(ctx) + CRI_1.format(value="true"))
    (found,) = await look(changed, containerd.PROBES, "containerd-cri")
    assert found.level is Level.FAILURE


@pytest.mark.parametrize("kind", ["absent", "silent"])
async def test_no_containerd(tmp_path: Path, kind: str) -> None:
    ctx = context(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "silent":
            listener.bind(ctx.containerd)
        (found,) = await look(ctx, containerd.PROBES, "containerd")
    assert found.level is Level.FAILURE
    assert found.hint
    # without a file there is no entry either, and nothing crashes
    levels = {probe.id: await look(ctx, containerd.PROBES, probe.id) for probe in containerd.PROBES}
    assert {len(found) for found in levels.values()} == {0, 1}
    assert all("probe failed" not in f.summary for found in levels.values() for f in found)


async def test_a_file_that_is_no_toml_is_a_finding(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    (tmp_path / "containerd.toml").write_text("= =")
    (found,) = await look(ctx, containerd.PROBES, "containerd-plugin")
    assert (found.level, "cannot be read" in found.summary) == (Level.FAILURE, True)
    for probe in ("containerd-cri", "containerd-transfer"):
        assert await look(ctx, containerd.PROBES, probe) == []  # told once
