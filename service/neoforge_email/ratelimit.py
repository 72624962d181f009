"""Token buckets: so many a second over all processes, shared through Redis, and without Redis a share for each.

A bucket holds a second's tokens, so over any span of T seconds no more is let through than `rate * T` and one bucket. It is
kept as the time at which it will be full again (the generic cell rate algorithm, ITU-T I.371).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger()

PATIENCE = timedelta(milliseconds=500)  # with Redis, before a call
AWAY = timedelta(seconds=1)  # until Redis is asked again after it failed

# Gives the microseconds to wait, and how many processes have asked within a minute. A bucket that is to be full later than
# a second from now is a clock that was set back, and is forgiven.
_TAKE = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
redis.call('ZADD', KEYS[2], now, ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 60000000)
redis.call('EXPIRE', KEYS[2], 60)
local sharers = redis.call('ZCARD', KEYS[2])
local full = tonumber(redis.call('GET', KEYS[1]) or 0)
if full < now or full > now + 1000000 then full = now end
full = full + ARGV[1] * 1000000 / ARGV[2]
local wait = full - 1000000 - now
if wait > 0 then return {math.ceil(wait), sharers} end
redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000) + 1)
return {0, sharers}
"""


class Bucket:
    """One process's own, of `rate` a second; `clock` gives seconds that never go back."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._full_at = 0.0

    def take(self, count: int) -> float:
        """0: `count` tokens were taken. Else none was, and these are the seconds until they may be there.

        A call that is larger than the bucket waits until that is full, and leaves it in debt.
        """
        now, cost = self._clock(), count / self.rate
        wait = max(self._full_at - now, 0.0) - max(1.0 - cost, 0.0)
        if wait > 0:
            return wait
        self.spend(count)
        return 0.0

    def spend(self, count: int) -> None:
        """Empty it by what was let through elsewhere."""
        now, cost = self._clock(), count / self.rate
        self._full_at = min(max(self._full_at, now) + cost, now + max(1.0, cost))


class RateLimit:
    """`rate` a second over all who share `key` in this Redis; Redis's clock is the clock.

    While Redis does not answer, each process goes on by a bucket of its own: the rate by the number of those who shared it.
    """

    def __init__(self, redis: Redis, key: str, rate: int) -> None:
        self._script = redis.register_script(_TAKE)
        self._keys = [key, f"{key}:sharers"]
        self._id = uuid4().hex
        self._own = Bucket(rate)
        self._away_until = 0.0
        self.rate = rate

    @property
    def most(self) -> int:
        """Messages a call: a quarter of a second's, so that a wide call does not wait for ever among narrow ones."""
        return max(self.rate // 4, 1)

    async def take(self, count: int) -> float:
        """As `Bucket.take`. Never raises."""
        now = time.monotonic()
        if now < self._away_until:
            return self._own.take(count)
        was_away = self._away_until > 0
        if was_away:  # one call asks, the others go on meanwhile
            self._away_until = now + AWAY.total_seconds()
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                wait, sharers = await self._script(keys=self._keys, args=[count, self.rate, self._id])
        except (RedisError, OSError, TimeoutError) as error:
            if not was_away:
                log.warning("rate.unshared", key=self._keys[0], reason=type(error).__name__)
            self._away_until = time.monotonic() + AWAY.total_seconds()
            return self._own.take(count)
        self._away_until = 0.0
        self._own.rate = self.rate / int(sharers)
        if not int(wait):
            self._own.spend(count)
        return int(wait) / 1_000_000
