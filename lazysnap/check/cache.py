# SPDX-License-Identifier: Apache-2.0
"""The cache: its size, and whether a sample of it is what its names promise."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from functools import partial

from lazysnap.cache import Cache
from lazysnap.cache.inventory import layer_files
from lazysnap.check.finding import Context, Finding, Fix, Probe, failure, warning

_SAMPLE = 64
_SAMPLE_BYTES = 256 << 20
_SAMPLE_SECONDS = 8.0
_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BLOCK = 512
_MEGABYTE = 1_000_000
# What has just been stored is evicted a little later.
_EXCESS = 1.1


def size(context: Context) -> Iterator[Finding]:
    """Whether the cache keeps to its limit; counted only if there is one."""
    limit = context.cache.size_limit_bytes
    if not limit:
        return
    taken = 0
    cache = context.paths.cache
    for part in (cache.objects, cache.aside, cache.partial):
        for directory, _, names in os.walk(part):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    taken += os.lstat(os.path.join(directory, name)).st_blocks * _BLOCK
    if taken > limit * _EXCESS:
        yield warning(
            f"the cache takes {taken // _MEGABYTE} MB, its limit is {limit // _MEGABYTE} MB",
            "nothing removes the excess; perhaps no shard runs",
            f"run `lazysnap cache prune --to-size {limit}`",
        )
    if os.path.isdir(cache.indexes) and os.path.isdir(cache.trees):
        layers = sum(entry.disk_bytes for entry in layer_files(cache))
        if layers > limit // 2:
            yield warning(
                f"indexes and trees of layers take {layers // _MEGABYTE} MB, the limit of the cache is"
                f" {limit // _MEGABYTE} MB",
                "little is left for contents, or more is used than the limit says",
                "raise cache.size_limit_bytes, or remove images that nobody needs",
            )


def sample(context: Context) -> Iterator[Finding]:
    """Reads some objects, chosen at random, and compares them with their names."""
    end = time.monotonic() + _SAMPLE_SECONDS
    checked, left = 0, _SAMPLE_BYTES
    for path in _at_random(context.paths.cache.objects):
        if checked == _SAMPLE or left <= 0 or time.monotonic() > end:
            return
        try:
            with open(path, "rb") as file:
                left -= os.fstat(file.fileno()).st_size
                # Not what happens to be in memory: the disk's bytes are the question.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                problem = ""
                if hashlib.file_digest(file, "sha256").hexdigest() != os.path.basename(path):
                    problem = "its content does not have the digest in its name"
        except FileNotFoundError:
            continue  # evicted
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        checked += 1
        if problem:
            yield failure(
                f"{path} is damaged: {problem}",
                "containers may read wrong bytes, and the disk may be failing",
                "run `lazysnap cache verify --fix`; look for I/O errors in the kernel log",
                Fix(partial(_remove, context.paths.cache.path, os.path.basename(path)), False),
            )


def _at_random(directory: str) -> Iterator[str]:
    """Objects in a random order of their 256 directories, and in each of these."""
    try:
        parts = os.listdir(directory)
    except FileNotFoundError:
        return
    random.shuffle(parts)
    for part in parts:
        names = [n for n in os.listdir(os.path.join(directory, part)) if _NAME.fullmatch(n)]
        random.shuffle(names)
        for name in names:
            yield os.path.join(directory, part, name)


def _remove(directory: str, name: str) -> str:
    cache = Cache(directory)
    try:
        # Not just its file: who has it open has to learn that it is gone.
        cache.objects.remove(bytes.fromhex(name))
    finally:
        cache.objects.close()
    return f"removed {name}: it is fetched again when it is needed"


PROBES = (
    Probe("cache-size", "the cache keeps to its limit", size),
    Probe("cache-sample", "a sample of the cache is right", sample),
)
