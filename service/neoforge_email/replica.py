"""A replica of the database: look-ups go to it while it is fresh, and commits are safe from the loss of a machine only while
one streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .db import UNAVAILABLE, Connection, Pool
from .errors import DatabaseUnavailable
from .observability import DATABASE_READS

Answer = TypeVar("Answer")

SECONDS = 2.0
"""How long a replica may take for an answer, before the primary is asked."""

AWAY = (DatabaseUnavailable, *UNAVAILABLE)

FRESH_SECONDS, AWAY_SECONDS = 1.0, 10.0
"""How long its last word on how far it is holds, and how long it is left alone after a failure."""

# It is connected to the primary, and what it got it has applied, or applied something of the last seconds. One that was
# promoted is a replica no more: until DATABASE_URL says so, its rows are not the ones that this service writes.
_FRESH = """
select pg_is_in_recovery() and exists (select from pg_stat_wal_receiver)
    and (pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()
         or coalesce(now() - pg_last_xact_replay_timestamp() < interval '5 seconds', false))
"""


class Readers:
    """Look-ups on a replica where `replica` is its pool, and on the primary where it is not, is away or is behind."""

    def __init__(self, primary: Pool, replica: Pool | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._primary = primary
        self._replica = replica
        self._clock = clock
        self._good = False
        self._ask_again_at = 0.0
        self._asked: set[asyncio.Future[Any]] = set()

    async def look_up(self, read: Callable[[Pool], Awaitable[Answer | None]]) -> Answer | None:
        """What `read` finds; the primary has the last word on what the replica does not know yet. Raises DatabaseUnavailable."""
        if self._replica is not None and await self._fresh(self._replica):
            found = await self._within_seconds(read(self._replica))
            if found is not None:
                DATABASE_READS.labels("replica").inc()
                return found
        DATABASE_READS.labels("primary").inc()
        return await read(self._primary)

    async def _fresh(self, replica: Pool) -> bool:
        if self._clock() >= self._ask_again_at:
            self._ask_again_at = self._clock() + AWAY_SECONDS  # others go on with its last word meanwhile
            self._good = bool(await self._within_seconds(replica.fetchval(_FRESH)))
            if self._good:
                self._ask_again_at = self._clock() + FRESH_SECONDS
        return self._good

    async def _within_seconds(self, answer: Awaitable[Answer]) -> Answer | None:
        """The replica's answer; None where none comes in time, and then it is left alone for a while.

        What has not ended is not cancelled: asyncpg would wait for a silent server to confirm that.
        """
        task = asyncio.ensure_future(answer)
        self._asked.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task}, timeout=SECONDS)
        if task.done() and task.exception() is None:
            return task.result()
        self._leave_alone()
        return None

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._asked.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, AWAY):
            raise error  # a fault of ours, for the loop's log

    def _leave_alone(self) -> None:
        self._good = False
        self._ask_again_at = self._clock() + AWAY_SECONDS


async def replicated(connection: Connection | Pool) -> bool | None:
    """Whether a commit waits until a replica has it on disk too; None where no replica is meant to be.

    The server says what is meant (`neoforge.replicas`, written by the role `postgresql`) and what is.
    """
    answer: bool | None = await connection.fetchval(_REPLICATED, timeout=SECONDS)
    return answer


_REPLICATED = """
select case when coalesce(current_setting('neoforge.replicas', true), '') <> ''
    then current_setting('synchronous_standby_names') <> '' end
"""


async def close(replica: Pool) -> None:
    """Close the pool, by force where the replica does not answer."""
    with contextlib.suppress(*AWAY):
        await asyncio.wait_for(replica.close(), SECONDS)
