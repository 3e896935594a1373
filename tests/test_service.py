# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trio

from lazysnap.containerd._pb import snapshots_pb2 as pb
from lazysnap.containerd._pb import snapshots_pb2_grpc as pb_grpc
from lazysnap.errors import ConfigError
from lazysnap.service import serve
from lazysnap.snapshotter import Snapshotter
from lazysnap.snapshotter.interfaces import Attached, Filesystem
from lazysnap.store.records import Attachment
from lazysnap.store.snapshots import SnapshotStore

SIXTEEN_MIB = 16 << 20


@asynccontextmanager
async def serving(tmp_path: Path, filesystem: Filesystem | None = None) -> AsyncIterator[str]:
    """A service with its snapshotter; the path of its socket."""
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    address = str(tmp_path / "run/s.sock")
    store = SnapshotStore(str(root / "metadata.db"))
    try:
        snapshotter = Snapshotter(str(root), store, filesystem=filesystem)
        async with trio.open_nursery() as nursery:
            await snapshotter.start(nursery)
            async with trio.open_nursery() as calls:
                await calls.start(serve, snapshotter, address)
                yield address
                calls.cancel_scope.cancel()
            await snapshotter.aclose()
    finally:
        store.close()


class Client:
    """Calls the service as containerd would, in a thread."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            f"unix:{address}",
            options=[
                ("grpc.max_receive_message_length", SIXTEEN_MIB),
                ("grpc.max_send_message_length", SIXTEEN_MIB),
                # channels of one process to one address would share a connection otherwise
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.stub = pb_grpc.SnapshotsStub(self.channel)

    def __enter__(self) -> pb_grpc.SnapshotsStub:
        return self.stub

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def code(call: object, *args: object) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)  # type: ignore[operator]  # a stub's method
    return caught.value.code().name, caught.value.details()


def names(stub: pb_grpc.SnapshotsStub, *filters: str) -> list[str]:
    return [
        info.name
        for response in stub.List(pb.ListSnapshotsRequest(filters=filters))
        for info in response.info
    ]


async def test_every_method(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        await trio.to_thread.run_sync(every_method, address, tmp_path)


def every_method(address: str, tmp_path: Path) -> None:
    with Client(address) as stub:
        labels = {"a": "1", "b": "2"}
        made = stub.Prepare(
            pb.PrepareSnapshotRequest(key="key", labels=labels),
            metadata=[("containerd-namespace", "test")],
        )
        [mount] = made.mounts
        assert (mount.type, mount.target, list(mount.options)) == ("bind", "", ["rw", "rbind"])
        assert stub.Mounts(pb.MountsRequest(key="key")).mounts == made.mounts
        stub.Commit(pb.CommitSnapshotRequest(key="key", name="base", labels=labels))
        stub.View(pb.ViewSnapshotRequest(key="view", parent="base"))
        info = stub.Stat(pb.StatSnapshotRequest(key="base")).info
        assert (info.name, info.parent, info.kind) == ("base", "", pb.COMMITTED)
        assert dict(info.labels) == labels
        request = pb.UpdateSnapshotRequest(info=pb.Info(name="base", labels={"a": "9"}))
        request.update_mask.paths.append("labels.a")
        updated = stub.Update(request).info
        assert dict(updated.labels) == {"a": "9", "b": "2"}
        assert updated.created_at == info.created_at
        assert updated.updated_at.ToNanoseconds() > info.updated_at.ToNanoseconds()
        assert updated == stub.Stat(pb.StatSnapshotRequest(key="base")).info
        assert stub.Usage(pb.UsageRequest(key="base")).inodes == 1
        assert names(stub) == ["base", "view"]
        assert names(stub, "kind==view") == ["view"]

        assert code(stub.Stat, pb.StatSnapshotRequest(key="x"))[0] == "NOT_FOUND"
        assert code(stub.Mounts, pb.MountsRequest(key="base"))[0] == "FAILED_PRECONDITION"
        again = pb.PrepareSnapshotRequest(key="base")
        assert code(stub.Prepare, again)[0] == "ALREADY_EXISTS"
        status, text = code(stub.Remove, pb.RemoveSnapshotRequest(key="base"))
        assert status == "FAILED_PRECONDITION"
        assert "remove" in text
        assert code(names, stub, "==")[0] == "INVALID_ARGUMENT"
        request.update_mask.paths[:] = ["parent"]
        assert code(stub.Update, request)[0] == "INVALID_ARGUMENT"

        stub.Remove(pb.RemoveSnapshotRequest(key="view"))
        stub.Remove(pb.RemoveSnapshotRequest(key="base"))
        stub.Cleanup(pb.CleanupRequest())
        assert os.listdir(tmp_path / "root/snapshots") == []


async def test_lists_come_in_batches_of_a_hundred(tmp_path: Path) -> None:
    def check(address: str) -> None:
        with Client(address) as stub:
            assert list(stub.List(pb.ListSnapshotsRequest())) == []
            for i in range(205):
                labels = {"odd": "1"} if i % 2 else {}
                stub.View(pb.ViewSnapshotRequest(key=f"key {i}", labels=labels))
            answers = list(stub.List(pb.ListSnapshotsRequest()))
            assert [len(each.info) for each in answers] == [100, 100, 5]
            answers = list(stub.List(pb.ListSnapshotsRequest(filters=["labels.odd"])))
            assert [len(each.info) for each in answers] == [100, 2]

    async with serving(tmp_path) as address:
        await trio.to_thread.run_sync(check, address)


async def test_large_messages(tmp_path: Path) -> None:
    def check(address: str) -> None:
        labels = {f"key {i}": "x" * 100_000 for i in range(120)}
        with Client(address) as stub:
            stub.Prepare(pb.PrepareSnapshotRequest(key="key", labels=labels))
            assert dict(stub.Stat(pb.StatSnapshotRequest(key="key")).info.labels) == labels

    async with serving(tmp_path) as address:
        await trio.to_thread.run_sync(check, address)


async def test_an_unexpected_failure_is_internal_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Snapshotter, "stat", broken)
    async with serving(tmp_path) as address:
        with Client(address) as stub:
            status, text = await trio.to_thread.run_sync(
                code, stub.Stat, pb.StatSnapshotRequest(key="x")
            )
    assert (status, text) == ("INTERNAL", "ZeroDivisionError: a bug")
    assert "a call failed" in caplog.text


# -- the socket -----------------------------------------------------------------------------------


async def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path) as address:
            status = os.stat(address)
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert os.umask(0) == 0, "the umask was not put back"
    finally:
        os.umask(before)
    assert not os.path.exists(address)


async def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        other = tmp_path / "other"
        other.mkdir()
        store = SnapshotStore(str(other / "metadata.db"))
        with pytest.raises(ConfigError, match="another lazysnap serves"):
            await serve(Snapshotter(str(other), store), address)
        store.close()
        with Client(address) as stub:  # the first is not disturbed
            assert await trio.to_thread.run_sync(names, stub) == []


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "run/s.sock"))
    async with serving(tmp_path) as address:
        with Client(address) as stub:
            assert await trio.to_thread.run_sync(names, stub) == []


async def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/s.sock"
    store = SnapshotStore(str(tmp_path / "metadata.db"))
    snapshotter = Snapshotter(str(tmp_path / "root"), store)
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        await serve(snapshotter, str(path))
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(ConfigError, match="another program listens"):
            await serve(snapshotter, str(path))
    with pytest.raises(ConfigError, match="longer than"):
        await serve(snapshotter, str(tmp_path / ("x" * 200)))
    store.close()


# -- many at once, and clients that go away -------------------------------------------------------


async def test_fifty_clients_at_once(tmp_path: Path) -> None:
    clients, rounds = 50, 4

    def churn(address: str, client: int) -> None:
        with Client(address) as stub:
            parent = ""
            for i in range(rounds):
                key, name = f"{client}/{i} active", f"{client}/{i}"
                stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent))
                assert code(stub.Prepare, pb.PrepareSnapshotRequest(key=key))[0] == "ALREADY_EXISTS"
                stub.Commit(pb.CommitSnapshotRequest(key=key, name=name))
                stub.View(pb.ViewSnapshotRequest(key=f"view {key}", parent=name))
                stub.Remove(pb.RemoveSnapshotRequest(key=f"view {key}"))
                parent = name
            if client % 2:
                for i in reversed(range(rounds)):
                    stub.Remove(pb.RemoveSnapshotRequest(key=f"{client}/{i}"))

    def all_of_them(address: str) -> None:
        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(churn, address, i) for i in range(clients)]:
                future.result()
        with Client(address) as stub:
            stub.Cleanup(pb.CleanupRequest())
            expected = {f"{c}/{i}" for c in range(0, clients, 2) for i in range(rounds)}
            assert set(names(stub)) == expected

    async with serving(tmp_path) as address:
        await trio.to_thread.run_sync(all_of_them, address)
    store = SnapshotStore(str(tmp_path / "root/metadata.db"))
    assert {str(number) for number in store.ids()} == set(os.listdir(tmp_path / "root/snapshots"))
    for each in store.walk():
        assert (each.parent == "") == each.name.endswith("/0")
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
    store.close()


class Slow:
    """Lazy layers that take for ever to mount."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def restore(self, attached: Sequence[Attached]) -> None:
        pass

    async def mount(
        self,
        slot: int,
        labels: Mapping[str, str],
        mountpoint: str,
        lowers: Sequence[object] = (),
    ) -> Attachment:
        self.begun.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        return True

    async def check(self, chain: Sequence[Attached]) -> None:
        pass

    async def unmount(self, attached: Attached) -> None:
        pass


REMOTE_REQUEST = pb.PrepareSnapshotRequest(key="key", labels={"containerd.io/snapshot.ref": "r"})


async def test_a_client_that_goes_away_ends_its_call(tmp_path: Path) -> None:
    slow = Slow()

    def check(address: str) -> None:
        with Client(address) as stub:
            call = stub.Prepare.future(REMOTE_REQUEST)
            assert slow.begun.wait(60)
            call.cancel()
            assert slow.cancelled.wait(60)
            # the key is not in use, nor locked
            stub.Prepare(pb.PrepareSnapshotRequest(key="key"))
            stub.Cleanup(pb.CleanupRequest())
            assert names(stub) == ["key"]
            assert len(os.listdir(tmp_path / "root/snapshots")) == 1

    async with serving(tmp_path, slow) as address:
        await trio.to_thread.run_sync(check, address)


async def test_stopping_does_not_wait_for_a_slow_call(tmp_path: Path) -> None:
    slow = Slow()
    with trio.fail_after(120):
        async with serving(tmp_path, slow) as address:
            client = Client(address)
            call = client.stub.Prepare.future(REMOTE_REQUEST)
            assert await trio.to_thread.run_sync(slow.begun.wait, 60)
    assert slow.cancelled.is_set()
    assert call.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    client.channel.close()
