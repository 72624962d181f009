"""The doorbell: tell the workers, through Redis, that messages were committed. Nothing waits for it.

A ring that is lost costs one sweep at most (`EMAIL_WORKER_INTERVAL`): the workers look for themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

FIRST_PAUSE = timedelta(milliseconds=100)
LONGEST_PAUSE = timedelta(seconds=5)
LOG_INTERVAL = timedelta(seconds=10)

log = structlog.get_logger(__name__)


class Doorbell:
    """One task a process that publishes; `ring` only notes that it has to. `on_error` counts failures."""

    def __init__(self, redis: Redis, channel: str, on_error: Callable[[], None]) -> None:
        self._redis = redis
        self._channel = channel
        self._on_error = on_error
        self._rung = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def ring(self) -> None:
        """At most one publication is under way; those who ring meanwhile share the next one."""
        self._rung.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._publish_forever(), name="doorbell")

    async def close(self) -> None:
        """Publish a last time, for those who have just rung, within a second."""
        if self._task is None:
            return
        self._closing = True
        self._rung.set()
        await asyncio.wait([self._task], timeout=1)
        # redis-py may turn a cancellation into an error of its own, so the loop also looks at `_closing`
        self._task.cancel()
        await asyncio.wait([self._task], timeout=1)

    async def _publish_forever(self) -> None:
        pause = FIRST_PAUSE
        logged = -LOG_INTERVAL.total_seconds()
        while not self._closing:
            await self._rung.wait()
            self._rung.clear()
            try:
                await self._redis.publish(self._channel, b"")
                pause = FIRST_PAUSE
            except (RedisError, OSError, TimeoutError) as error:
                self._on_error()
                if time.monotonic() - logged >= LOG_INTERVAL.total_seconds():
                    logged = time.monotonic()
                    log.warning("doorbell.failed", error=type(error).__name__, detail=str(error))
                if not self._closing:
                    await asyncio.sleep(pause.total_seconds())
                pause = min(pause * 2, LONGEST_PAUSE)
