"""What the worker's loops do while the database is away: they wait, and say so once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from .db import UNAVAILABLE, UNSTORABLE
from .observability import DATABASE_ERRORS

log = structlog.get_logger()

T = TypeVar("T")


async def patiently(operation: str, call: Callable[[], Awaitable[T]], most_seconds: float) -> T:
    """Call until the database answers, with pauses up to `most_seconds`; each failure is counted, the first of a row is logged.

    Raises UNSTORABLE, which no patience mends.
    """
    failures = 0
    while True:
        try:
            return await call()
        except UNSTORABLE:
            raise
        except UNAVAILABLE as error:
            DATABASE_ERRORS.labels(operation).inc()
            if not failures:
                log.warning("database.unavailable", operation=operation, reason=type(error).__name__)
            failures += 1
            await asyncio.sleep(min(0.1 * 2**failures, most_seconds))
