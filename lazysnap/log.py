# SPDX-License-Identifier: Apache-2.0
"""Logging: one line per event, `message key=value ...`; as text, as JSON, or into the journal.

Built on the standard library's logging, so that a library's warnings land in the same place. Values
are quoted when they hold spaces, as logfmt does. What goes wrong again and again is not written again
and again, see `_Repeats`.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

from lazysnap import journal

_PRIORITIES = {
    logging.DEBUG: "7",
    logging.INFO: "6",
    logging.WARNING: "4",
    logging.ERROR: "3",
    logging.CRITICAL: "2",
}
_REPEAT_SECONDS = 60.0
_MOST_REPEATS = 1000
# Fields that tell about an event, but not which one it is.
_DETAILS = frozenset({"error", "hint", "why"})


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


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _line(record: logging.LogRecord) -> str:
    parts = [record.getMessage()]
    parts += (f"{key}={_quoted(value)}" for key, value in _fields(record).items())
    return " ".join(parts).replace("\n", "\\n")


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(c.isspace() or c in '"=' for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Text(logging.Formatter):
    """logfmt lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = _line(record)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}"
        return f"{stamp} {record.levelname.lower():7} {record.name}: {line}"


class _Json(logging.Formatter):
    """One JSON object for each event; `time` is UTC, RFC 3339."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for key, value in _fields(record).items():
            plain = value if isinstance(value, int | float | bool | None) else str(value)
            document[key if key not in document else f"{key}-"] = plain
        if record.exc_info:
            document["trace"] = self.formatException(record.exc_info)
        return json.dumps(document)


class _JournalHandler(logging.StreamHandler[Any]):
    """Entries in the journal; on standard error, as its second reader, when that does not work."""

    def __init__(self, path: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Text())
        self._journal = journal.Journal(path)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                self._journal.send(self._entry(self._notice()))
                self._lost = 0
            self._journal.send(self._entry(record))
        except BlockingIOError:
            # It hangs, and so would we, on standard error as well, which it reads too.
            self._lost += 1
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._journal.close()
        super().close()

    def _notice(self) -> logging.LogRecord:
        text = "journald did not take log entries, they are lost"
        notice = logging.LogRecord(
            __name__,
            logging.WARNING,
            pathname=__file__,
            lineno=0,
            msg=text,
            args=None,
            exc_info=None,
        )
        notice.__dict__["fields"] = {"lost": self._lost}
        return notice

    @staticmethod
    def _entry(record: logging.LogRecord) -> list[tuple[str, str]]:
        message = _line(record)
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        entry = [
            ("MESSAGE", message),
            ("PRIORITY", _PRIORITIES.get(record.levelno, "6")),
            ("SYSLOG_IDENTIFIER", "lazysnap"),
            ("CODE_FILE", record.pathname),
            ("CODE_LINE", str(record.lineno)),
            ("CODE_FUNC", record.funcName or ""),
            (journal.field_name("logger"), record.name),
        ]
        entry += ((journal.field_name(k), str(v)) for k, v in _fields(record).items())
        return entry


@dataclass
class _Repeated:
    """A warning or error that was written, and how often it came again."""

    until: float
    last: logging.LogRecord
    count: int = 0


class _Repeats(logging.Handler):
    """Hands records on, but the same warning or error about the same thing only once a minute.

    The others are counted; how many there were is written, with the last one's details, when the
    minute is over and anything else is logged, or at the end. Which thing it is about is said by all
    fields but those of `_DETAILS`.

    Args:
        target: what writes.
    """

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._seen: OrderedDict[Hashable, _Repeated] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        # Called with the handler's lock held.
        now = time.monotonic()
        while self._seen:
            first = next(iter(self._seen.values()))
            if first.until > now and len(self._seen) < _MOST_REPEATS:
                break
            self._seen.popitem(last=False)
            self._sum_up(first)
        if record.levelno >= logging.WARNING:
            about = tuple((k, str(v)) for k, v in _fields(record).items() if k not in _DETAILS)
            which = (record.name, record.levelno, record.getMessage(), about)
            seen = self._seen.get(which)
            if seen is not None:
                seen.count += 1
                seen.last = record
                return
            self._seen[which] = _Repeated(now + _REPEAT_SECONDS, record)
        self._target.handle(record)

    def _sum_up(self, seen: _Repeated) -> None:
        if seen.count:
            record = copy.copy(seen.last)
            record.exc_info = None
            record.__dict__["fields"] = {**_fields(record), "repeated": seen.count}
            self._target.handle(record)

    def flush(self) -> None:
        """Write what was counted."""
        self.acquire()
        try:
            while self._seen:
                self._sum_up(self._seen.popitem(last=False)[1])
        finally:
            self.release()
        self._target.flush()

    def close(self) -> None:
        self.flush()
        self._target.close()
        super().close()


def get(name: str) -> _Context:
    """The logger of a module; its methods take fields as keyword arguments.

    Args:
        name: the module's `__name__`.
    """
    return _Context(logging.getLogger(name), {})


def setup(level: str = "info", form: str = "auto", *, journal_path: str = journal.SOCKET) -> None:
    """Say where log records go. May be called again.

    Args:
        level: one of debug, info, warning, error.
        form: text or json, to standard error; journal; auto for journal if journald reads standard
            error, else text.
        journal_path: journald's socket.
    """
    if form == "auto":
        form = "journal" if journal.is_standard_error() else "text"
    target: logging.Handler
    if form == "journal":
        target = _JournalHandler(journal_path)
    else:
        target = logging.StreamHandler(sys.stderr)
        target.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    for old in root.handlers:
        if isinstance(old, _Repeats):
            old.close()
    root.handlers[:] = [_Repeats(target)]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
