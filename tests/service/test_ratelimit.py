"""Rates over all processes: never more than the rate, whoever asks, and neither unlimited nor stopped without Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from neoforge_email import ratelimit
from neoforge_email.ratelimit import Bucket, RateLimit


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def nowhere() -> AsyncIterator[Redis]:
    async with Redis(host="127.0.0.1", port=1) as client:
        yield client


def most_within(grants: Sequence[tuple[float, int]], rate: int) -> float:
    """By how many tokens the grants (seconds, count) exceed `rate` in the span where they do so most."""
    worst = 0.0
    for first, (since, _) in enumerate(grants):
        total = 0
        for until, count in grants[first:]:
            total += count
            worst = max(worst, total - rate * (until - since))
    return worst


@given(
    rate=st.integers(1, 500),
    asked=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 1000)), min_size=1, max_size=60),
)
def test_over_any_span_no_more_is_let_through_than_the_rate_and_one_bucket_or_call(
    rate: int, asked: list[tuple[float, int]]
) -> None:
    now = 0.0
    bucket = Bucket(rate, lambda: now)
    grants = []
    for pause, count in asked:
        now += pause
        if not bucket.take(count):
            grants.append((now, count))
    largest = max(count for _, count in asked)
    assert most_within(grants, rate) <= max(rate, largest) + 1e-6


@given(rate=st.integers(1, 500), counts=st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_whoever_waits_as_long_as_told_gets_its_turn_and_the_rate_is_used_up(rate: int, counts: list[int]) -> None:
    now = 0.0
    bucket = Bucket(rate, lambda: now)
    for count in counts:
        while wait := bucket.take(count):
            now += wait + 1e-9
    assert now <= sum(counts) / rate + 1e-3


async def test_a_rate_is_shared_by_all_who_use_the_same_redis(redis: Redis, redis_url: str) -> None:
    rate, until = 400, time.monotonic() + 1.5
    grants: list[tuple[float, int]] = []

    async def use(limit: RateLimit, count: int) -> None:
        while time.monotonic() < until:
            if wait := await limit.take(count):
                await asyncio.sleep(wait)
            else:
                grants.append((time.monotonic(), count))

    async with Redis.from_url(redis_url) as other:
        limits = [RateLimit(client, "rate", rate) for client in (redis, other)]
        await asyncio.gather(*(use(limit, count) for limit in limits for count in (1, 7, 10)))
    granted = sum(count for _, count in grants)
    assert most_within(grants, rate) <= rate * 1.25  # a bucket, and what a busy computer notes late
    assert granted >= rate * 1.5  # it is used up, too


async def test_other_keys_are_other_rates(redis: Redis) -> None:
    assert await RateLimit(redis, "rate", 100).take(100) == 0
    assert await RateLimit(redis, "rate", 100).take(1) > 0
    assert await RateLimit(redis, "other", 100).take(1) == 0


async def test_what_redis_forgets_costs_one_bucket_at_most(redis: Redis) -> None:
    limit = RateLimit(redis, "rate", 10)
    assert await limit.take(10) == 0
    assert await limit.take(10) > 0
    await redis.flushall()
    await redis.script_flush()
    assert await limit.take(10) == 0
    assert await limit.take(10) > 0


async def test_a_clock_that_was_set_back_does_not_stop_anybody(redis: Redis) -> None:
    await redis.set("rate", int((time.time() + 3600) * 1_000_000))
    assert await RateLimit(redis, "rate", 100).take(1) == 0


async def test_nothing_is_kept_once_the_bucket_is_full_again(redis: Redis) -> None:
    await RateLimit(redis, "rate", 1000).take(100)
    await asyncio.sleep(0.15)
    assert await redis.exists("rate") == 0


async def test_a_process_that_never_saw_redis_keeps_to_the_rate_by_itself(nowhere: Redis) -> None:
    limit = RateLimit(nowhere, "rate", 100)
    granted = 0
    for _ in range(30):
        granted += 10 * (not await limit.take(10))
    assert 100 <= granted <= 130


async def test_a_redis_that_does_not_answer_holds_up_one_call_and_no_other() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Redis(host="127.0.0.1", port=port) as client:
        limit = RateLimit(client, "rate", 1000)
        began = time.monotonic()
        assert await limit.take(1) == 0
        first = time.monotonic() - began
        for _ in range(100):
            assert await limit.take(1) == 0
        assert first < ratelimit.PATIENCE.total_seconds() + 1
        assert time.monotonic() - began - first < ratelimit.AWAY.total_seconds()
    server.close()


async def test_when_redis_goes_each_process_keeps_to_its_share(redis: Redis, nowhere: Redis) -> None:
    limits = [RateLimit(redis, "rate", 100) for _ in range(4)]
    for _ in range(2):
        for limit in limits:
            await limit.take(1)
    granted = 0
    for limit in limits:
        limit._script = nowhere.register_script(limit._script.script)
        while not await limit.take(1):
            granted += 1
    assert 80 <= granted <= 130


async def test_it_is_shared_again_once_redis_is_back(
    redis: Redis, nowhere: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratelimit, "AWAY", timedelta(milliseconds=50))
    limit, other = RateLimit(nowhere, "rate", 10), RateLimit(redis, "rate", 10)
    assert await limit.take(1) == 0
    limit._script = redis.register_script(limit._script.script)
    assert await other.take(10) == 0
    assert await limit.take(1) == 0  # Redis is not asked yet
    await asyncio.sleep(0.1)
    assert await limit.take(5) > 0
