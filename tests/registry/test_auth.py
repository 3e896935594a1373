# SPDX-License-Identifier: Apache-2.0
"""Logging in: challenges, tokens, and who gets to see them."""

from __future__ import annotations

import base64
from urllib.parse import parse_qs, parse_qsl

import pytest
import trio
import trio.testing

from lazysnap.credentials.docker_config import Fixed
from lazysnap.errors import RegistryError, RegistryUnreachable, Unauthorized
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.reference import Reference
from lazysnap.registry import Credential, Registry, RegistrySettings
from lazysnap.registry.auth import Challenge, parse_challenges
from tests.registry.conftest import SETTINGS
from tests.support.registry import Break, FaultyRegistry, Status

SECRET = "s3cret:with/odd &chars"  # not one


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            ['Bearer realm="https://a/t?x=1,2",service="a \\"b\\"",scope="r:x:pull,push"'],
            [
                (
                    "bearer",
                    {"realm": "https://a/t?x=1,2", "service": 'a "b"', "scope": "r:x:pull,push"},
                )
            ],
        ),
        (
            ['Basic realm="x"', "Bearer realm=y"],
            [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})],
        ),
        (
            ['Negotiate, Basic realm="x" , charset=UTF-8,BEARER Realm = "y",Error="invalid_token"'],
            [
                ("negotiate", {}),
                ("basic", {"realm": "x", "charset": "UTF-8"}),
                ("bearer", {"realm": "y", "error": "invalid_token"}),
            ],
        ),
        ([""], []),
        (['="x"'], []),
        (['Bearer realm="open'], [("bearer", {})]),
        (["Bearer " + "a=b," * 100_000], []),
        (['Bearer realm="' + "\\" * 10_001], [("bearer", {})]),
    ],
)
def test_challenges(values: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(values) == [Challenge(*pair) for pair in expected]


def client(server: FaultyRegistry, credential: Credential | None = None) -> Registry:
    return Registry(SETTINGS, Fixed({server.host: credential} if credential else {}))


def user(server: FaultyRegistry) -> Credential:
    server.users["me"] = SECRET
    return Credential("me", SECRET)


async def read(registry: Registry, server: FaultyRegistry, image: Reference) -> None:
    blob = registry.blob(image, server.add_blob(b"x" * 1000))
    assert await blob.read(0, 10) == b"x" * 10


async def test_logins_are_counted(server: FaultyRegistry, image: Reference) -> None:
    def counted() -> list[float]:
        return [counts.counter(families.RENEWALS, each)[0] for each in ("ok", "failed")]

    server.auth = "bearer"
    good, bad = counted()
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
        await read(registry, server, image)
    assert counted() == [good + 1, bad]
    async with client(server, Credential("me", "wrong-one")) as registry:
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
    assert counted() == [good + 1, bad + 1]


async def test_basic(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "basic"
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
        await read(registry, server, image)
    # The second needs no 401.
    assert [r.status for r in server.log] == [401, 206, 206]


async def test_basic_without_or_with_wrong_password(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "basic"
    async with client(server) as registry:
        with pytest.raises(Unauthorized, match="none are known") as caught:
            await read(registry, server, image)
        assert server.host in (caught.value.hint or "")
    user(server)
    async with client(server, Credential("me", "wrong")) as registry:
        del server.log[:]
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
        assert [r.status for r in server.log] == [401, 401]


async def test_anonymous_token(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    async with client(server) as registry:
        await read(registry, server, image)
    (request,) = server.requests("token")
    assert (request.method, request.authorization) == ("GET", None)
    query = parse_qs(request.query)
    assert query["service"] == ["test, one"]
    assert query["scope"] == ["repository:team/app:pull"]


async def test_token_by_password(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
    (request,) = server.requests("token")
    form = dict(parse_qsl(request.body.decode()))
    assert request.method == "POST"
    assert (form["grant_type"], form["username"], form["password"]) == ("password", "me", SECRET)
    assert form["scope"] == "repository:team/app:pull"


async def test_token_by_password_from_a_server_without_oauth(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth, server.oauth = "bearer", False
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
    post, get = server.requests("token")
    assert (post.method, post.status, get.method, get.status) == ("POST", 405, "GET", 200)
    expected = base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert get.authorization == f"Basic {expected}"


async def test_identity_token(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    server.identity_tokens.add("refresh-me")
    async with client(server, Credential(identity_token="refresh-me")) as registry:
        await read(registry, server, image)
    form = dict(parse_qsl(server.requests("token")[0].body.decode()))
    assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", "refresh-me")


async def test_registry_token_needs_no_token_server(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "bearer"
    server.tokens.add("given")
    async with client(server, Credential(registry_token="given")) as registry:
        await read(registry, server, image)
    assert not server.requests("token")


async def test_wrong_password_for_a_token(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    user(server)
    async with client(server, Credential("me", "wrong-one")) as registry:
        with pytest.raises(Unauthorized, match="refuses the credentials") as caught:
            await read(registry, server, image)
    assert "wrong-one" not in str(caught.value)


async def test_token_is_fetched_once_for_many_requests(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "bearer"
    async with client(server) as registry, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(read, registry, server, image)
    assert len(server.requests("token")) == 1


async def test_failed_token_is_not_asked_for_by_everyone(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "bearer"
    user(server)
    server.oauth = False
    refused = 0

    async def attempt(registry: Registry) -> None:
        nonlocal refused
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
        refused += 1

    async with client(server) as registry, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(attempt, registry)
    assert refused == 20
    assert len(server.requests("token")) < 20


async def test_token_is_kept_per_repository(server: FaultyRegistry) -> None:
    server.auth = "bearer"
    async with client(server) as registry:
        for name in ("one", "two", "one"):
            await read(registry, server, Reference.parse(f"{server.host}/{name}"))
    scopes = [parse_qs(r.query)["scope"] for r in server.requests("token")]
    assert scopes == [["repository:one:pull"], ["repository:two:pull"]]


async def test_expired_token_is_renewed_before_it_is_used(
    server: FaultyRegistry, image: Reference, clock: trio.testing.MockClock
) -> None:
    server.auth, server.token_lifetime = "bearer", 600
    async with client(server) as registry:
        await read(registry, server, image)
        clock.jump(600)
        await read(registry, server, image)
    assert [r.status for r in server.requests("registry")] == [401, 206, 206]
    assert len(server.requests("token")) == 2


async def test_revoked_token_is_renewed(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    async with client(server) as registry:
        for _ in range(3):
            await read(registry, server, image)
            server.tokens.clear()
    assert [r.status for r in server.requests("registry")] == [401, 206, 401, 206, 401, 206]


async def test_token_that_does_not_help(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    server.faults.append(Status(401, {"WWW-Authenticate": _realm(server)}, times=100))
    async with client(server) as registry:
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
    assert len(server.requests("registry")) == 2


async def test_token_server_that_fails_for_a_while(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "bearer"
    server.faults += [Status(503, server="token"), Break(server="token")]
    async with client(server) as registry:
        await read(registry, server, image)


async def test_token_server_that_is_away(server: FaultyRegistry, image: Reference) -> None:
    server.auth = "bearer"
    server.faults.append(Status(503, server="token", times=1_000_000))
    settings = RegistrySettings(retry_seconds=0.3)
    async with Registry(settings, Fixed({})) as registry:
        with pytest.raises(RegistryUnreachable, match="token server"):
            await read(registry, server, image)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\nb"}', b"x" * (2 << 20)]
)
async def test_malformed_tokens(server: FaultyRegistry, image: Reference, body: bytes) -> None:
    server.auth = "bearer"
    server.faults.append(Status(200, {}, body, server="token"))
    async with client(server) as registry:
        with pytest.raises(RegistryError):
            await read(registry, server, image)
    assert len(server.requests("token")) == 1


@pytest.mark.parametrize("challenge", ["", "Negotiate", "Bearer", 'Bearer realm="file:///x"'])
async def test_unusable_challenges(
    server: FaultyRegistry, image: Reference, challenge: str
) -> None:
    server.faults.append(Status(401, {"WWW-Authenticate": challenge}))
    async with client(server, user(server)) as registry:
        with pytest.raises(Unauthorized):
            await read(registry, server, image)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_authorization_goes_to_the_registry_only(
    server: FaultyRegistry, image: Reference, auth: str
) -> None:
    server.auth, server.redirect = auth, True
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
    assert [r.status for r in server.requests("storage")] == [206]
    assert all(r.authorization is None for r in server.requests("storage"))
    assert server.requests("registry")[-1].authorization is not None


async def test_challenge_of_another_host_is_not_answered(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth, server.redirect = "basic", True
    server.faults.append(
        Status(401, {"WWW-Authenticate": 'Basic realm="x"'}, server="storage", times=10)
    )
    async with client(server, user(server)) as registry:
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
    assert all(r.authorization is None for r in server.requests("storage"))


async def test_authorization_is_not_sent_when_a_redirect_comes_back(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth, server.redirect = "bearer", True
    digest = server.add_blob(b"x" * 1000)
    back = {"Location": f"http://{server.host}/v2/team/app/blobs/{digest}"}
    server.faults.append(Status(307, back, server="storage"))
    async with client(server) as registry:
        with pytest.raises(Unauthorized):
            await read(registry, server, image)
    assert server.requests("registry")[-1].authorization is None


async def test_redirect_within_the_registry_keeps_authorization(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "basic"
    digest = server.add_blob(b"x" * 1000)
    elsewhere = f"/v2/other/blobs/{digest}"
    async with client(server, user(server)) as registry:
        await read(registry, server, image)
        server.faults.append(Status(308, {"Location": elsewhere}))
        await read(registry, server, image)
    assert (server.log[-1].path, server.log[-1].status) == (elsewhere, 206)


def _realm(server: FaultyRegistry) -> str:
    return f'Bearer realm="http://127.0.0.1:{server.ports["token"]}/token"'
