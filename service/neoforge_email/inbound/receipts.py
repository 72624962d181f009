"""Receipts: what providers told us, stored as it came before it is answered. The SQL stands in `events.sql`."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from neoforge_email.db import UNAVAILABLE, Connection, Pool
from neoforge_email.errors import DatabaseUnavailable
from neoforge_email.outbox import QueueStat

LIMIT = timedelta(seconds=8)
"""For storing: SendGrid and SNS wait 10 and 15 seconds for an answer, and send again what had none."""

PATIENCE = timedelta(hours=24)
"""How long a receipt waits for its message to be known: as long as SendGrid would repeat it."""


class Outcome(enum.StrEnum):
    """What became of a receipt this time."""

    DONE = "done"
    UNMATCHED = "unmatched"  # its message is not known, or not yet
    MALFORMED = "malformed"
    FAILED = "failed"  # the database or our own code could not take it


@dataclass(frozen=True, slots=True)
class Receipt:
    """One of a transaction that holds it; `body` is what `normalise` of its provider reads."""

    id: int
    provider: str
    event_id: str
    body: bytes
    received_at: datetime


async def receive(pool: Pool, provider: str, items: Sequence[tuple[str, bytes]]) -> int:
    """Store what came, by the id that tells each again, and commit; returns how many are new.

    Raises DatabaseUnavailable: some may have been stored, and repeating all of it is safe.
    """
    try:
        async with asyncio.timeout(LIMIT.total_seconds()):
            new: int = await pool.fetchval(
                "select receive($1, $2, $3)", provider, [item[0] for item in items], [item[1] for item in items]
            )
    except UNAVAILABLE as error:
        raise DatabaseUnavailable("The database cannot be reached; send it again") from error
    return new


async def waiting(connection: Connection, providers: Iterable[str], most: int, most_bytes: int) -> list[Receipt]:
    """Receipts that are due, held by the transaction of the connection, with little more than `most_bytes` together.

    Those of another worker are skipped.
    """
    rows = await connection.fetch("select * from waiting_receipts($1, $2, $3)", list(providers), most, most_bytes)
    return [Receipt(row["id"], row["provider"], row["event_id"], row["body"], row["received_at"]) for row in rows]


async def settle(
    connection: Connection, outcomes: Sequence[tuple[Receipt, Outcome, str | None]], max_tries: int
) -> dict[int, str]:
    """Write down what became of receipts of this transaction, with what is wrong with them; returns the state of each id."""
    rows = await connection.fetch(
        "select * from settle_receipts($1, $2, $3, $4, $5)",
        [receipt.id for receipt, _, _ in outcomes],
        [outcome.value for _, outcome, _ in outcomes],
        [error for _, _, error in outcomes],
        PATIENCE,
        max_tries,
    )
    return {row["id"]: row["state"] for row in rows}


async def stats(pool: Pool | Connection) -> list[QueueStat]:
    """Receipts that are `waiting` (due), `postponed`, `unmatched` or `malformed`, since when the oldest has been so; every state
    is there, empty ones too."""
    rows = await pool.fetch("select state, size, oldest_seconds from receipt_stats()")
    return [QueueStat(row["state"], row["size"], row["oldest_seconds"]) for row in rows]


async def forget(pool: Pool, *, done: timedelta, other: timedelta, most: int = 20_000) -> int:
    """Delete receipts that were done, or finished otherwise, so long ago; returns how many."""
    return int(await pool.fetchval("select forget_receipts($1, $2, $3)", done, other, most))


async def forget_provider_message_ids(pool: Pool, age: timedelta, *, most: int = 20_000) -> int:
    """Delete what providers called messages so long ago; returns how many."""
    return int(await pool.fetchval("select forget_provider_message_ids($1, $2)", age, most))
