# SPDX-License-Identifier: Apache-2.0
"""Image references; the cases of distribution/reference and of what CRI passes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazysnap.errors import InvalidArgument
from lazysnap.reference import Reference

HEX = "4f" * 32
SHA = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/team/app:1", "docker.io/team/app:1"),
        (f"alpine@{SHA}", f"docker.io/library/alpine@{SHA}"),
        (f"ghcr.io/a/b/c:v1@{SHA}", f"ghcr.io/a/b/c:v1@{SHA}"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("[fd00:1:2::3]/app", "[fd00:1:2::3]/app:latest"),
        ("HOST/app", "HOST/app:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ("xn--n3h.com/myimage:xn--n3h.com", "xn--n3h.com/myimage:xn--n3h.com"),
        ("a-a/a_a/a__b/c---d.e", "docker.io/a-a/a_a/a__b/c---d.e:latest"),
        (f"{HEX}:tag", f"docker.io/library/{HEX}:tag"),
        (f"localhost/{HEX}", f"localhost/{HEX}:latest"),
        ("h:5000/a:" + "t" * 128, "h:5000/a:" + "t" * 128),
        ("foo_bar.com:8080", "docker.io/library/foo_bar.com:8080"),
    ],
)
def test_good(text: str, name: str) -> None:
    reference = Reference.parse(text)
    assert reference.name == str(reference) == name
    assert Reference.parse(name) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "/", ":", "@", ":tag", "@" + SHA, "a:", "a@", "a@sha256:12", f"a@sha999:{HEX}",
        f"a@{SHA}:tag", f"a@{SHA.upper()}", "Alpine", "ghcr.io/App", "a//b", "/a", "a/", "a/b/",
        "-a", "a-", "a._b", "a___b", "a..b", "_a", "a b", "a\n", "a\n:1", "a:b\n", "a:t t", "a:-t",
        "a:" + "t" * 129, "https://ghcr.io/a", "h:p/a", "h:99999/a", "h:0/a", "h:/a", "[::1/a",
        "[]/a", "[::g]:1/a", "-h.com/a", "h-.com/a", "h..com/a", "aa/asdf$$^/aa", HEX, "ghcr.io/",
        "x" * 5000, "a/" * 127 + "ab", "\u0430lpine", "a:\u0663", "h:\u0665000/a",
        "../etc/passwd", "ghcr.io/../x", "ghcr.io/a/./b", "ghcr.io/a?x=1", "ghcr.io/a#x", "u@h.io/a",
    ],
)  # fmt: skip
def test_nonsense(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Reference.parse(text)


def test_parts() -> None:
    reference = Reference.parse(f"alpine:3@{SHA}")
    assert (reference.host, reference.repository) == ("docker.io", "library/alpine")
    assert (reference.tag, reference.digest, reference.target) == ("3", SHA, SHA)
    assert reference.api_host == "registry-1.docker.io"
    assert Reference.parse("ghcr.io/a:1").api_host == "ghcr.io"
    assert Reference.parse("ghcr.io/a:1").target == "1"
    assert reference.with_tag("x").name == "docker.io/library/alpine:x"
    assert reference.digest is not None
    assert reference.with_digest(reference.digest).name == f"docker.io/library/alpine@{SHA}"
    with pytest.raises(InvalidArgument):
        reference.with_tag("a/b")


@given(st.text(alphabet="aA0.:/@-_[]%\n ", max_size=40))
def test_what_is_accepted_is_read_back(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidArgument:
        return
    assert Reference.parse(reference.name) == reference
    assert reference.name.isprintable()
