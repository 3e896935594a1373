# SPDX-License-Identifier: Apache-2.0
"""How `lazysnap profile` reads its command line; tests/system has it on the whole stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lazysnap import config, config_file, oci
from lazysnap.cli import main, profile_actions, profile_recording
from lazysnap.cli.profile_recording import LocalImage
from lazysnap.digest import Digest
from lazysnap.errors import NotFound
from lazysnap.prefetch.profile import Profile, Read, from_reads, serialize
from lazysnap.prefetch.profile_store import ProfileStore

MANIFEST = Digest.of(b"manifest")
LAYER = Digest.of(b"layer")
KNOWN = from_reads(MANIFEST, ["known"], {LAYER: [Read("a", 0, 10, 0)]})
GIVEN = from_reads(MANIFEST, ["given"], {LAYER: [Read("b", 0, 20, 0)]})


class Scene:
    """A node with one profile, whose containerd and registry only note what they are asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []
        self.store = ProfileStore(str(root))
        self.store.add(KNOWN)
        self.file = root / "file.json"
        self.file.write_bytes(serialize(GIVEN))

    def find(self, node: profile_actions.Node, image: str) -> LocalImage:
        self.calls.append(("find", image))
        if image == "typo":
            raise NotFound("there is no image typo")
        descriptor = oci.Descriptor(media_type="", digest=MANIFEST, size=1)
        return LocalImage(f"registry.example/{image}:1", descriptor, (LAYER,))

    async def record(self, image: LocalImage, run: tuple[str, ...], **_: object) -> Profile:
        self.calls.append(("record", *run))
        return GIVEN

    async def push(self, *_: object, **__: object) -> None:
        self.calls.append(("push",))

    async def fetch(self, *_: object) -> list[Profile]:
        self.calls.append(("fetch",))
        return [GIVEN]

    def run(self, *words: str) -> Result:
        """Run the command without its options; `FILE` is a profile's file."""
        self.calls.clear()
        words = tuple(str(self.file) if word == "FILE" else word for word in words)
        return CliRunner().invoke(main, ["profile", *words], env={"COLUMNS": "80"})

    def files(self) -> set[str]:
        """The files of layers that the known profile names."""
        profile = self.store.find(MANIFEST)
        return (
            {read.path for reads in profile.layers.values() for read in reads} if profile else set()
        )


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    it = Scene(tmp_path)
    monkeypatch.setattr(profile_actions, "find", it.find)
    monkeypatch.setattr(profile_recording, "record", it.record)
    monkeypatch.setattr(profile_actions, "push_referrer", it.push)
    monkeypatch.setattr(profile_actions, "fetch_profiles", it.fetch)
    monkeypatch.setattr(config_file, "load", lambda _: config.Config(root=str(tmp_path)))
    return it


FORMS: list[tuple[str, list[str], list[str], str, set[str]]] = [
    ("show", ["app"], ["show", "app"], "", {"a"}),
    ("record", ["app", "--", "c", "-x"], ["record", "app", "--", "c", "-x"], "record", {"a", "b"}),
    ("push", ["app", "--push"], ["push", "app"], "push", {"a"}),
    ("fetch", ["app", "--fetch"], ["fetch", "app"], "fetch", {"a", "b"}),
    ("import", ["app", "--import", "FILE"], ["import", "app", "FILE"], "", {"a", "b"}),
    ("export", ["app", "--export", "FILE"], ["export", "app", "FILE"], "", {"a"}),
    ("forget", ["app", "--forget"], ["forget", "app"], "", set()),
]


@pytest.mark.parametrize(("mode", "old", "new", "call", "files"), FORMS, ids=[f[0] for f in FORMS])
def test_old_and_new_form_do_the_same(
    it: Scene, mode: str, old: list[str], new: list[str], call: str, files: set[str]
) -> None:
    for words in (old, new):
        it.store.remove(MANIFEST)
        it.store.add(KNOWN)
        it.file.write_bytes(serialize(GIVEN))
        done = it.run(*words)
        assert done.exit_code == 0, done.output
        assert [made[0] for made in it.calls[1:]] == ([call] if call else [])
        assert it.files() == files
        assert (json.loads(it.file.read_bytes())["command"] == ["known"]) == (mode == "export")
        subcommand = f"this is the old form of `lazysnap profile {mode} app"
        assert (subcommand in done.stderr) == (words is old)
        assert done.stderr.count("\n") == (words is old)


def test_several_modes_of_the_old_form_are_done_in_their_order(it: Scene) -> None:
    done = it.run("app", "--push", "--export", "FILE", "--fetch", "--plain-http", "--", "c")
    assert [made[0] for made in it.calls] == ["find", "fetch", "record", "push"]
    assert json.loads(it.file.read_bytes())["layers"][LAYER][1][0] == "b"
    new = ("fetch app", "record app -- c", "push app", f"export app {it.file}")
    commands = " and ".join(f"`lazysnap profile {words}`" for words in new)
    assert done.stderr == f"note: this is the old form of {commands}\n"


@pytest.mark.parametrize(
    "words", [["show", "push"], ["--", "push"], ["--json", "push"], ["show", "--json", "push"]]
)
def test_an_image_called_like_a_subcommand_can_be_named(it: Scene, words: list[str]) -> None:
    done = it.run(*words)
    assert done.exit_code == 0, done.output
    assert it.calls == [("find", "push")]


def test_options_of_the_old_form_may_come_first(it: Scene) -> None:
    done = it.run("--json", "--seconds", "5", "app", "--", "sh", "--push")
    assert it.calls == [("find", "app"), ("record", "sh", "--push")]
    assert json.loads(done.stdout)["layers"][LAYER] == [["a", 0, 10, 0], ["b", 0, 20, 0]]


@pytest.mark.parametrize("words", [["show", "app", "--json"], ["app", "--json"]])
def test_json_is_alone_on_standard_output(it: Scene, words: list[str]) -> None:
    assert json.loads(it.run(*words).stdout)["manifest"] == MANIFEST


def test_a_profile_can_go_through_pipes(it: Scene) -> None:
    assert json.loads(it.run("export", "app", "-").stdout)["command"] == ["known"]
    words = ["profile", "import", "app", "-", "--json"]
    done = CliRunner().invoke(main, words, input=serialize(GIVEN))
    assert json.loads(done.stdout)["layers"][LAYER] == [["a", 0, 10, 0], ["b", 0, 20, 0]]


def test_what_is_not_known_is_said_with_what_to_do(it: Scene) -> None:
    it.store.remove(MANIFEST)
    for words in (["show", "app"], ["push", "app"], ["export", "app", "FILE"], ["app"]):
        done = it.run(*words)
        assert done.exit_code == 1
        assert "hint: record one with `lazysnap profile record app -- CMD`\n" in done.stderr
    done = it.run("forget", "app")
    assert (done.exit_code, done.stderr) == (0, "no profile of app was known\n")
    assert it.run("app", "--forget").exit_code == 0


def test_a_registry_without_profiles_is_told(it: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: object) -> list[Profile]:
        return []

    monkeypatch.setattr(profile_actions, "fetch_profiles", none)
    done = it.run("fetch", "app")
    assert done.exit_code == 1
    assert "the registry has no profile of registry.example/app:1" in done.stderr
    assert it.run("app", "--fetch").exit_code == 0, "the old form shows the one that is known"


def test_a_mistyped_subcommand_is_not_just_an_image_that_is_not_there(it: Scene) -> None:
    done = it.run("typo", "app")
    assert done.exit_code == 1
    assert "hint: `lazysnap profile --help` lists the subcommands\n" in done.stderr


def test_the_help_has_the_subcommands_and_not_the_old_form(it: Scene) -> None:
    page = it.run("--help").output
    names = [line.split()[0] for line in page.partition("Commands:\n")[2].splitlines()]
    assert names == sorted(form[0] for form in FORMS)
    assert "--push" not in page
    assert it.run().output == page


def test_the_old_form_has_its_help_also_before_other_options(it: Scene) -> None:
    done = it.run("--help", "--forget")
    assert (done.exit_code, "--forget" in done.output) == (0, True)
