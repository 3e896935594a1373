# SPDX-License-Identifier: Apache-2.0
"""Makes views of snapshots that stay: `ctr snapshots view` sets no label, so they are garbage at once."""

from __future__ import annotations

from pathlib import Path

import grpc

from lazysnap.containerd._pb import snapshots_pb2 as pb

_VIEW = "/containerd.services.snapshots.v1.Snapshots/View"
_SECONDS = 120


def make_view(
    address: str | Path, snapshotter: str, key: str, parent: str, *, namespace: str = "default"
) -> None:
    """Make a view that containerd's garbage collection leaves alone until it is removed.

    Args:
        address: containerd's socket.
        snapshotter: its name in containerd's configuration.
        key: of the new view.
        parent: name of a committed snapshot.
        namespace: containerd's.

    Raises:
        grpc.RpcError: it could not be made.
    """
    request = pb.ViewSnapshotRequest(
        snapshotter=snapshotter, key=key, parent=parent, labels={"containerd.io/gc.root": "test"}
    )
    with grpc.insecure_channel(f"unix:{address}") as channel:
        view = channel.unary_unary(
            _VIEW,
            request_serializer=pb.ViewSnapshotRequest.SerializeToString,
            response_deserializer=pb.ViewSnapshotResponse.FromString,
        )
        view(request, timeout=_SECONDS, metadata=(("containerd-namespace", namespace),))
