# SPDX-License-Identifier: Apache-2.0
"""Logging: one line per event, `message key=value ...`, to standard error.

Built on the standard library's logging, so that a library's warnings land in the same place. Values
are quoted when they hold spaces, as logfmt does. Knows nothing of journald but its level prefix,
which is used when standard error is connected to the journal.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

_PRIORITIES = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<2>",
}


class _Context(logging.LoggerAdapter[logging.Logger]):
    """A logger whose keyword arguments become `key=value` pairs."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        known = {k: kwargs.pop(k) for k in ("exc_info", "stack_info", "stacklevel") if k in kwargs}
        fields = dict(kwargs)
        kwargs.clear()
        kwargs.update(known)
        kwargs["extra"] = {"fields": {k.replace("_", "-"): v for k, v in fields.items()}}
        return msg, kwargs


class _Formatter(logging.Formatter):
    """logfmt lines; with the syslog priority in front when the journal reads them."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        parts = [record.getMessage()]
        for key, value in getattr(record, "fields", {}).items():
            parts.append(f"{key}={_quoted(value)}")
        line = " ".join(parts).replace("\n", "\\n")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if self.journal:
            return _PRIORITIES.get(record.levelno, "<6>") + line
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}"
        return f"{stamp} {record.levelname.lower():7} {record.name}: {line}"


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(c.isspace() or c in '"=' for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def get(name: str) -> _Context:
    """The logger of a module; its methods take fields as keyword arguments.

    Args:
        name: the module's `__name__`.
    """
    return _Context(logging.getLogger(name), {})


def setup(level: str = "info") -> None:
    """Send all log records to standard error.

    Args:
        level: one of debug, info, warning, error.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(journal="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
