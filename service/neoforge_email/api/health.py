"""Is the service alive, and can it do its work? For load balancers, systemd and people; no key is needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from redis.exceptions import RedisError

from neoforge_email import outbox
from neoforge_email.db import UNAVAILABLE
from neoforge_email.replica import replicated

from .runtime import Runtime, Slot

BACKLOG_FRESH_SECONDS = 5.0
BACKLOG_OLD_SECONDS = 300.0


class Check(msgspec.Struct, omit_defaults=True):
    """One thing that the service needs: `ok`, `degraded` or `failed`, and why."""

    status: str
    detail: str | None = None
    size: int | None = None
    oldest_seconds: float | None = None


class Health(msgspec.Struct):
    """`ok`; `degraded`: messages are accepted, but something needs attention; `failed`: messages cannot be accepted."""

    status: str
    checks: dict[str, Check]


class Backlog:
    """The queue's size and age, asked of the database every few seconds at most."""

    def __init__(self) -> None:
        self._check = Check("ok")
        self._at = 0.0

    async def check(self, runtime: Runtime) -> Check:
        if time.monotonic() - self._at > BACKLOG_FRESH_SECONDS:
            stats = await outbox.queue_stats(runtime.pool)
            waiting = [stat for stat in stats if stat.state in {"queued", "leased", "uncertain"}]
            oldest = max(stat.oldest_seconds for stat in waiting)
            late = oldest > BACKLOG_OLD_SECONDS
            self._check = Check(
                status="degraded" if late else "ok",
                detail=f"a message has waited for more than {BACKLOG_OLD_SECONDS:g} seconds" if late else None,
                size=sum(stat.size for stat in stats),
                oldest_seconds=round(oldest, 1),
            )
            self._at = time.monotonic()
        return self._check


def routes(slot: Slot) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to where they find the runtime."""
    backlog = Backlog()

    @get("/health/live", operation_id="live", summary="The process answers", tags=["health"])
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @get(["/health", "/health/ready"], summary="It can accept messages", tags=["health"])
    async def ready() -> Response[Health]:
        """200 while messages are accepted, even with Redis away (`degraded`); 503 when they cannot be."""
        runtime = slot.runtime
        limit = min(runtime.settings.health_check_timeout.total_seconds(), 5.0)
        database, replica, redis, queue = await asyncio.gather(
            _checked(runtime.pool.fetchval("select 1"), limit, "failed", "messages cannot be accepted"),
            _checked(_replica(runtime), limit, "degraded", "it is not known whether a replica has them"),
            _checked(runtime.redis.ping(), limit, "degraded", "messages are accepted and wait until Redis is back"),
            _checked(backlog.check(runtime), limit, "failed", "the queue cannot be read"),
        )
        checks = {"database": database, "redis": redis, "backlog": queue}
        if replica is not NONE_MEANT:
            checks["replica"] = replica
        worst = next((s for s in ("failed", "degraded") if any(c.status == s for c in checks.values())), "ok")
        status = HTTPStatus.SERVICE_UNAVAILABLE if worst == "failed" else HTTPStatus.OK
        return Response(Health(worst, checks), status_code=status, headers={"Cache-Control": "no-store"})

    return [live, ready]


NONE_MEANT = Check("ok")


async def _replica(runtime: Runtime) -> Check:
    match await replicated(runtime.pool):
        case None:
            return NONE_MEANT
        case False:
            return Check("degraded", "messages are accepted onto one database machine alone: no replica streams")
        case True:
            return Check("ok")


async def _checked(call: Awaitable[Any], seconds: float, status: str, consequence: str) -> Check:
    try:
        async with asyncio.timeout(seconds):
            answer = await call
    except (*UNAVAILABLE, RedisError) as error:
        return Check(status, f"{consequence} ({type(error).__name__})")
    return answer if isinstance(answer, Check) else Check("ok")
