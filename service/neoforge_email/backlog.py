"""What waits, of everything that can: for the metrics and `neoforge status`. One connection, one statement, little time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import msgspec

from .db import Connection
from .reconcile import KINDS
from .replica import replicated

SECONDS = 5.0
"""A scrape ends within 10 seconds."""

DEAD = {("queue", "held"), ("receipts", "malformed")}
"""States that only a person ends."""

TOO_LONG = {
    ("queue", "queued"): 300,
    ("queue", "leased"): 300,
    ("queue", "uncertain"): 3600,
    ("receipts", "waiting"): 300,
    ("webhooks", "overdue"): 300,
}
"""Seconds after which something is wrong with what stands in these states; in others waiting is their purpose."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many messages (`what` is `queue`), provider's `receipts` or deliveries to customers' `webhooks` stand in a state,
    and the age of the oldest."""

    what: str
    state: str
    size: int
    oldest_seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it, if anything is."""
        if self.size and (self.what, self.state) in DEAD:
            return "waits for you"
        if self.oldest_seconds > TOO_LONG.get((self.what, self.state), float("inf")):
            return "waits too long"
        return None


@dataclass(frozen=True, slots=True)
class Backlog:
    """Everything that waits; `stuck` counts rows that no rule moves by kind (all kinds), as of `reconciled_at`.

    Before `partitions_end` every message, recipient and event finds a partition of its month.
    `replicated` says whether commits wait for a replica; None where none is meant to be.
    """

    waiting: list[Waiting]
    stuck: dict[str, int]
    reconciled_at: datetime
    partitions_end: datetime
    replicated: bool | None


async def read(connection: Connection) -> Backlog:
    """Raises TimeoutError after SECONDS, among what the database raises."""
    rows = await connection.fetch(WAITING, timeout=SECONDS)
    stuck = await connection.fetchrow("select sizes::text as sizes, checked_at from stuck_stats()", timeout=SECONDS)
    partitions_end = await connection.fetchval(PARTITIONS_END, timeout=SECONDS)
    assert stuck is not None
    return Backlog(
        [Waiting(row["what"], row["state"], row["size"], row["oldest_seconds"]) for row in rows],
        dict.fromkeys(KINDS, 0) | msgspec.json.decode(stuck["sizes"]),
        stuck["checked_at"],
        partitions_end,
        await replicated(connection),
    )


WAITING = """
select 'queue' as what, * from queue_stats()
union all select 'receipts', * from receipt_stats()
union all select 'webhooks', * from webhook_stats()
"""

# The earliest end among the tables' last partitions, which are named after their month.
PARTITIONS_END = """
select min(last) from (
    select (to_date(max(right(c.relname, 7)), 'YYYY"m"MM') + interval '1 month') at time zone 'UTC' as last
    from pg_inherits i join pg_class c on c.oid = i.inhrelid join pg_class p on p.oid = i.inhparent
    where p.relname in ('email_messages', 'email_contents', 'email_tracking', 'email_events') and p.relkind = 'p'
    group by p.oid
) partitions
"""
