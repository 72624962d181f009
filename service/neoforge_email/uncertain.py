"""Messages that an operator has to decide about, or soon will: uncertain and held ones. Ids and counts, no addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from .db import Connection

BATCH = 500
"""Messages that are freed or finished in one transaction."""


@dataclass(frozen=True, slots=True)
class Undecided:
    """A message whose attempt ended without an answer, or that is held for `reason`. `recipients` are those still open."""

    id: UUID
    since: datetime
    state: str
    policy: str
    reason: str | None
    provider: str | None
    user: str
    recipients: int


async def undecided(connection: Connection, most: int) -> list[Undecided]:
    """The oldest of them, at most so many. A scan of the queue."""
    return [Undecided(**row) for row in await connection.fetch(UNDECIDED, most)]


UNDECIDED = """
select q.id, q.since, q.state::text as state, q.on_uncertain::text as policy, q.held_reason as reason,
    q.attempt_provider as provider, coalesce(u.name, q.user_id::text) as user, (
        select count(*) from email_tracking t
        where t.email_id = q.id and t.created_at = q.created_at and t.status in ('queued', 'deferred', 'uncertain')
    ) as recipients
from email_queue q left join users u on u.id = q.user_id
where q.state in ('uncertain', 'held')
order by q.since, q.id limit $1
"""


async def held(connection: Connection) -> list[UUID]:
    """All held messages."""
    return [
        row["id"]
        for row in await connection.fetch("select id from email_queue where state = 'held' order by since, id")
    ]


async def resend(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, str | None]:
    """Let these messages be sent (again); of each None, or why it was left as it is."""
    return await _decide(connection, "resend", ids)


async def confirm(connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, str | None]:
    """These messages are known to have arrived: they are not sent again. Of each None, or why it was left as it is."""
    return await _decide(connection, "confirm", ids)


async def _decide(connection: Connection, function: str, ids: Sequence[UUID]) -> Mapping[UUID, str | None]:
    """Call `resend` or `confirm` (outbox.sql) for a batch at a time; each batch is committed."""
    decided: set[UUID] = set()
    states: dict[UUID, str] = {}
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        rows = await connection.fetch(f"select {function}($1) as id", batch)
        decided |= {row["id"] for row in rows}
        rest = [email_id for email_id in batch if email_id not in decided]
        rows = await connection.fetch("select id, state::text from email_queue where id = any($1)", rest)
        states |= {row["id"]: row["state"] for row in rows}
    return {email_id: None if email_id in decided else _refusal(states.get(email_id)) for email_id in ids}


def _refusal(state: str | None) -> str:
    if state is None:
        return "it is not in the queue: it is finished, or there is no such message"
    if state in {"uncertain", "held"}:
        return "no attempt on it can have been taken, so it cannot have arrived; resend it"
    return f"it is {state}, and moves without you"
