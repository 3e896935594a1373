# SPDX-License-Identifier: Apache-2.0
"""Advice: work that nobody waits for and nothing depends on, such as fetching ahead.

The rule: advice must not end the process that runs it. It runs in tasks of a nursery that lives as long as
the process, where one exception would cancel everything else. If advice fails, the same work is done later,
when it is needed, and meets the same error there; so an expected error is worth one line in the log. A
defect might be seen nowhere else; so it is worth a trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lazysnap.errors import LazysnapError

_CALLER = 3
"""How many frames up the body is: this generator, contextlib, then the body's function."""


@contextmanager
def advice(
    logger: logging.LoggerAdapter[logging.Logger],
    message: str,
    *,
    level: int = logging.DEBUG,
    **fields: Any,
) -> Iterator[None]:
    """Log what the body raises, and go on after it. Cancellation passes.

    Args:
        logger: of the module, from `log.get`.
        message: what did not happen.
        level: of the line for an expected error; a defect is always an error with a trace.
        fields: what the message is about.
    """
    try:
        yield
    except LazysnapError as error:
        logger.log(level, message, stacklevel=_CALLER, error=error, **fields)
    except Exception:
        logger.exception(message, stacklevel=_CALLER, **fields)
