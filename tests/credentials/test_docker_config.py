# SPDX-License-Identifier: Apache-2.0
"""Docker's configuration file and credential helpers."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap.credentials.docker_config import Anonymous, Fixed, standard
from lazysnap.registry import Chain, Credential, DockerConfig

AUTH = base64.b64encode(b"me:pass:word").decode()
ME = Credential("me", "pass:word")


def config(tmp_path: Path, content: Any, **environ: str) -> DockerConfig:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "config.json").write_text(text)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return DockerConfig(
        environ={"DOCKER_CONFIG": str(tmp_path), "PATH": path, **environ}, helper_seconds=60
    )


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("ghcr.io", "ghcr.io"),
        ("localhost:5000", "localhost:5000"),
        ("https://ghcr.io/v2/", "ghcr.io"),
        ("http://h:80/v1", "h:80"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("docker.io", "docker.io"),
        ("https://registry-1.docker.io", "docker.io"),
    ],
)
async def test_keys(tmp_path: Path, key: str, host: str) -> None:
    source = config(tmp_path, {"auths": {key: {"auth": AUTH}, "other": {}}})
    assert await source.get(host) == ME
    assert await source.get("other") is None
    assert await source.get(f"not-{host}") is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"username": "me", "password": "pass:word"}, ME),
        ({"auth": AUTH, "email": "x@y"}, ME),
        ({"identitytoken": "t"}, Credential(identity_token="t")),
        ({"auth": base64.b64encode(b"<token>:").decode(), "identitytoken": "t"},
         Credential("<token>", "", "t")),
        ({"registrytoken": "t"}, Credential(registry_token="t")),
        ({}, None),
        ({"auth": "%%%"}, None),
        ({"auth": base64.b64encode(b"\xff\xfe").decode()}, None),
    ],
)  # fmt: skip
async def test_entries(tmp_path: Path, entry: dict[str, str], expected: Credential | None) -> None:
    assert await config(tmp_path, {"auths": {"h": entry}}).get("h") == expected


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"auths": 5}', '{"auths": {"h": {"auth": 5}}}', "[" * 100_000,
     '{"auths": null, "credHelpers": null}', "\ud800"],
)  # fmt: skip
async def test_malformed_files_mean_no_credentials(tmp_path: Path, content: str) -> None:
    source = config(tmp_path, "")
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    assert await source.get("h") is None


async def test_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    source = DockerConfig(str(tmp_path / "config.json"), environ={})
    assert await source.get("h") is None
    config(tmp_path, {"auths": {"h": {"auth": AUTH}}})
    assert await source.get("h") == ME
    replacement = tmp_path / "new"
    replacement.write_text(json.dumps({"auths": {"h": {"identitytoken": "t"}}}))
    replacement.rename(tmp_path / "config.json")
    assert await source.get("h") == Credential(identity_token="t")
    (tmp_path / "config.json").unlink()
    assert await source.get("h") is None


async def test_environment_goes_before_the_file(tmp_path: Path) -> None:
    inline = json.dumps({"auths": {"h": {"auth": AUTH}}})
    source = config(
        tmp_path,
        {"auths": {"h": {"identitytoken": "t"}, "g": {"identitytoken": "t"}}},
        DOCKER_AUTH_CONFIG=inline,
    )
    assert await source.get("h") == ME
    assert await source.get("g") == Credential(identity_token="t")


def helper(tmp_path: Path, name: str, script: str) -> None:
    program = tmp_path / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


async def test_helper_for_a_host_goes_before_the_store(tmp_path: Path) -> None:
    source = config(
        tmp_path,
        {"credHelpers": {"h": "one"}, "credsStore": "all", "auths": {"g": {"auth": AUTH}}},
    )
    answer = """test "$1" = get && printf '{"Username": "%s %s", "Secret": "x"}' NAME "$(cat)\""""
    helper(tmp_path, "one", answer.replace("NAME", "one"))
    helper(tmp_path, "all", answer.replace("NAME", "all"))
    assert await source.get("h") == Credential("one h", "x")
    assert await source.get("g") == Credential("all g", "x")
    assert await source.get("docker.io") == Credential("all https://index.docker.io/v1/", "x")


async def test_helper_with_an_identity_token(tmp_path: Path) -> None:
    source = config(tmp_path, {"credsStore": "all"})
    helper(tmp_path, "all", """echo '{"Username": "<token>", "Secret": "refresh"}'""")
    assert await source.get("h") == Credential(identity_token="refresh")


@pytest.mark.parametrize(
    ("script", "logged"),
    [
        ("echo credentials not found in native keychain; exit 1", False),
        ("echo other-s3cret-error; exit 1", True),
        ("echo s3cret-but-no-json", True),
        ('echo \'{"Secret": 5, "x": "s3cret"}\'', True),
        ("head -c 3000000 /dev/zero", True),
        ("kill -9 $$", True),
    ],
)
async def test_helpers_that_fail_leave_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str, logged: bool
) -> None:
    source = config(tmp_path, {"credsStore": "all", "auths": {"h": {"auth": AUTH}}})
    helper(tmp_path, "all", script)
    with caplog.at_level(logging.DEBUG):
        assert await source.get("h") == ME
    fields = [str(vars(record)) for record in caplog.records if record.name.startswith("lazysnap")]
    assert bool(fields) == logged
    assert "s3cret" not in "".join(fields)


async def test_missing_or_malformed_helpers(tmp_path: Path) -> None:
    for name in ("does-not-exist", "../../bin/sh", ""):
        source = config(tmp_path, {"credsStore": name, "auths": {"h": {"auth": AUTH}}})
        assert await source.get("h") == ME


def _processes_that_name(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(path) in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


async def test_slow_helper_is_ended(tmp_path: Path) -> None:
    source = config(tmp_path, {"credsStore": "slow"})
    source = DockerConfig(
        environ={"DOCKER_CONFIG": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"},
        helper_seconds=0.5,
    )
    helper(tmp_path, "slow", f"exec tail -f {tmp_path}/config.json")
    with trio.fail_after(120):
        assert await source.get("h") is None
    assert _processes_that_name(tmp_path) == []


async def test_chain_takes_the_first_that_knows() -> None:
    chain = Chain([Anonymous(), Fixed({"h": ME}), Fixed({"h": Credential("x", "y")})])
    assert await chain.get("h") == ME
    assert await chain.get("g") is None


@pytest.mark.parametrize(
    ("variable", "path"),
    [("REGISTRY_AUTH_FILE", "config.json"), ("XDG_RUNTIME_DIR", "containers/auth.json")],
)
async def test_what_podman_has_logged_in_counts_after_docker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, path: str
) -> None:
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    file = tmp_path / path
    monkeypatch.setenv(variable, str(file if path == "config.json" else tmp_path))
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"auths": {"h": {"auth": AUTH}, "g": {"auth": AUTH}}}))
    (tmp_path / "docker").mkdir()
    other = {"username": "other", "password": "x"}
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {"g": other}}))
    source = standard()
    assert await source.get("h") == ME
    assert await source.get("g") == Credential("other", "x")
    assert await source.get("f") is None


def test_secrets_do_not_show() -> None:
    shown = repr(Credential("me", "s3cret1", "s3cret2", "s3cret3"))
    assert "me" in shown
    assert "s3cret" not in shown
