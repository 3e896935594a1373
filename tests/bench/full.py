# SPDX-License-Identifier: Apache-2.0
"""From the start of the pull to the first output when no layer can be lazy.

All sides pull the same gzip image: in one layer, or the same packages in nine layers of mixed size.
``plain``: lazysnap as it is by default, with ``lazysnap pull``; ``direct``: with ``eager = "direct"``,
where the daemon gets the layers itself.
"""

from __future__ import annotations

from functools import partial

from fixtures.images import catalogue

from .origin import NETWORKS
from .plan import Measure
from .start import PY, start

_WAYS = {"plain": "", "direct": '[snapshots]\neager = "direct"\n'}
_IMAGES = {"one": "one layer", "many": "nine layers"}

MEASURES = [
    Measure(
        f"{way}-{image}",
        f"full pull, {title}" + (", eager = direct" if config else ""),
        partial(catalogue.build, f"py-{image}", ("plain",)),
        partial(start, command=PY),
        tuple(NETWORKS),
        form="plain",
        config=config,
    )
    for way, config in _WAYS.items()
    for image, title in _IMAGES.items()
]
