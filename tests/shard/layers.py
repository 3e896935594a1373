# SPDX-License-Identifier: Apache-2.0
"""Served layers whose bytes are in memory."""

from __future__ import annotations

from unittest.mock import Mock

from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.layers.slots import LayerOrigin
from lazysnap.prefetch.guesser import Guesser
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.registry.client import Blob
from lazysnap.shard.served_layer import ServedLayer


def served(origin: LayerOrigin, reader: LayerReader, ahead: PrefetchQueue) -> ServedLayer:
    """A layer that no registry has, and of which nothing is guessed."""
    guesser = Guesser(reader.index, lambda plan: None)
    return ServedLayer(origin, reader, Mock(spec=Blob), guesser, ahead)
