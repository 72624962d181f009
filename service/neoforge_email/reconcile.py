"""The reconciler: finds rows that no rule will move again. There must be none; each is a fault of ours, or a hand's.

`run` is the worker's cron: bounded work, from where it stopped the last time. It walks the queue and the recipients in the
order of their messages' ids, which is the order of time, with a walk of its own for the last hour; what it finds is kept in
`stuck_rows` until it is mended. `find` looks at everything, writes nothing, and is `neoforge reconcile`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast
from uuid import UUID

from .db import Connection, Pool
from .inbound.normaliser import NORMALISE
from .outbox import EPOCH

KINDS = (
    "recipient_without_queue",
    "message_without_recipients",
    "queue_without_message",
    "queue_without_recipients",
    "queue_without_content",
    "never_claimed",
    "never_swept",
    "never_due",
    "held_without_reason",
    "receipt_of_nobody",
    "receipt_never_due",
    "webhook_never_swept",
    "webhook_never_due",
    "webhook_never_tried",
)
"""What can be wrong, as `reconcile.sql` names it; docs/operations.md says what to do about each."""

ROWS = 20_000
SLICES = 10
"""A run looks at so many rows a statement, and takes so many statements a walk: 200,000 rows a minute."""
RECENT = timedelta(hours=1)
AGAIN = 100
"""Findings that a run looks at again, the oldest first; those in its way it does anyway."""
SECONDS = 20.0
"""No statement may take longer: a long snapshot slows the claims down."""

FIRST = UUID(int=0)
LAST = UUID(int=(1 << 128) - 1)
PROVIDERS = list(NORMALISE)


@dataclass(frozen=True, slots=True)
class Stuck:
    """A row that no rule will move again. `id` is its message's, or that of the receipt, webhook delivery or endpoint."""

    kind: str
    id: str
    what: str


async def run(pool: Pool, *, rows: int = ROWS, slices: int = SLICES) -> list[Stuck]:
    """Look at the next rows of each walk, and again at what was found before. Returns what is new.

    A run that fails leaves the walks where they were; `stuck_stats` says when the last one succeeded.
    """
    async with pool.acquire() as acquired:
        connection = cast("Connection", acquired)
        now = await connection.fetchval("select clock()")
        recent = UUID(int=(now - RECENT - EPOCH) // timedelta(milliseconds=1) << 80)
        walks = await connection.fetch("select name, position from stuck_walks")
        positions = {row["name"]: row["position"] for row in walks}
        known = await connection.fetch(
            "select part, id from stuck_rows where part in ('queue', 'messages') order by checked_at limit $1", AGAIN
        )
        for row in known:
            await _look(connection, NOTE, row["part"], UUID(row["id"]), UUID(row["id"]))
        found = await _look(connection, NOTE, "receipts", FIRST, LAST)
        found += await _look(connection, NOTE, "webhooks", FIRST, LAST)
        for name, part, first in (
            ("queue", "queue", FIRST),
            ("recent", "messages", recent),
            ("all", "messages", FIRST),
        ):
            start = max(positions[name], first)
            for _ in range(slices):
                until = await _reach(connection, part, start, rows)
                found += await _look(connection, NOTE, part, start, until)
                start = first if until == LAST else _next(until)
                if until == LAST:
                    break
            positions[name] = start
        await connection.execute(SAVE, list(positions), list(positions.values()), timeout=SECONDS)
    return found


async def find(
    connection: Connection, progress: Callable[[str, int], None] | None = None, *, rows: int = ROWS
) -> AsyncIterator[Stuck]:
    """Everything that is stuck, by a look at every row. `progress` is told the part, and about how many rows are done."""
    for part in ("queue", "messages", "receipts", "webhooks"):
        start, done = FIRST, 0
        while True:
            until = await _reach(connection, part, start, rows)
            for stuck in await _look(connection, FIND, part, start, until):
                yield stuck
            if until == LAST:
                break
            start, done = _next(until), done + rows
            if progress:
                progress(part, done)


async def _reach(connection: Connection, part: str, start: UUID, rows: int) -> UUID:
    until: UUID = await connection.fetchval(
        "select stuck_reach($1, $2, $3, $4)", part, start, LAST, rows, timeout=SECONDS
    )
    return until


async def _look(connection: Connection, query: str, part: str, start: UUID, until: UUID) -> list[Stuck]:
    rows = await connection.fetch(query, part, start, until, PROVIDERS, timeout=SECONDS)
    return [Stuck(row["kind"], row["id"], row["what"]) for row in rows]


def _next(email_id: UUID) -> UUID:
    return UUID(int=email_id.int + 1)


FIND = "select kind, id, what from stuck($1, $2, $3, $4)"
NOTE = "select kind, id, what from note_stuck($1, $2, $3, $4)"
SAVE = """
update stuck_walks w set position = u.position, saved_at = clock()
from unnest($1::text[], $2::uuid[]) u(name, position) where w.name = u.name
"""
