"""The SQL that reads for people: one message, with its recipients, everything that happened to it, and why it stands where
it does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec
from msgspec import structs

from .db import Connection, Pool, read_session
from .lifecycle import EventType, QueueState, Status
from .message import Kind
from .outbox import created_at
from .why import MANY, Operator, Situation, discreet, explain


class Recipient(msgspec.Struct, kw_only=True):
    """`response` is the provider's last answer about this recipient, in its own words."""

    recipient: str
    kind: Kind
    status: Status
    updated_at: datetime
    response: str | None
    provider: str | None


class Entry(msgspec.Struct, kw_only=True):
    """One thing that happened. `type` is `accepted`, `attempt` (began) or an event's type; `attempt` numbers tries."""

    at: datetime
    type: str
    recipient: str | None = None
    attempt: int | None = None
    provider: str | None = None
    detail: str | None = None


class Email(msgspec.Struct, kw_only=True):
    """A message. `state` is where it stands in the queue, or `done`; `due` is when it is next taken up.

    A `held` one waits for an operator, who is told by `held_reason` why. `why` says in one sentence what it waits for and
    what will happen next.
    """

    id: UUID
    created_at: datetime
    sender: str = msgspec.field(name="from")
    reply_to: str | None
    subject: str
    priority: str
    tags: list[str]
    metadata: dict[str, Any]
    headers: dict[str, str]
    state: Literal["scheduled", "queued", "leased", "uncertain", "held", "done"]
    due: datetime | None
    held_reason: str | None
    why: str
    recipients: list[Recipient]
    timeline: list[Entry]


WITHOUT_DUE = {QueueState.LEASED, QueueState.HELD}

# Indexes: the primary keys, in the one partition that the id's own time names; idx_email_events_email_occurred.
_MESSAGE = """
select m.id, m.created_at, m.lane, m.sender, m.sender_name, m.reply_to, m.reply_to_name, m.subject, m.tags,
    m.headers::text as headers, m.metadata::text as metadata,
    q.id as queue_id, q.state::text as state, q.since, q.due, q.expires_at, q.tries, q.lease_no, q.lease_until, q.owner,
    q.attempt_at, q.attempt_provider, q.held_reason, q.on_uncertain::text as on_uncertain, q.lane as queue_lane, clock() as now
from (select $1::uuid as id) i
left join email_messages m on m.id = i.id and m.created_at = $2
left join email_queue q on q.id = i.id
"""
_RECIPIENTS = """
select t.id, t.recipient, t.kind::text as kind, t.status::text as status, t.updated_at, t.response, t.provider,
    exists (select from suppressions x where x.user_id = t.user_id and x.address = lower(t.recipient)) as suppressed
from email_tracking t where t.email_id = $1 and t.created_at = $2 order by t.id
"""
_EVENTS = """
select occurred_at, started_at, tracking_id, attempt, type::text as type, provider, response
from email_events where email_id = $1 and arrived_at >= $2 order by occurred_at, arrived_at
"""


# How many messages are due before this one in its lane, counted to MANY. Index: email_queue_ready.
_AHEAD = """
select count(*) from (
    select from email_queue q where q.state = 'queued' and q.lane = $1 and q.due < $2 and q.id <> $3 limit $4) ahead
"""


@dataclass(frozen=True, slots=True)
class _Rows:
    """All that the tables hold of a message; `message` has the columns of `_MESSAGE`."""

    message: asyncpg.Record
    recipients: list[asyncpg.Record]
    events: list[asyncpg.Record]


async def get_email(
    pool: Pool, user_id: int, email_id: UUID, lanes: Mapping[str, int], *, max_retries: int
) -> Email | None:
    """The user's message of that id, or None; raises DatabaseUnavailable. `lanes` gives each priority's lane."""
    async with read_session(pool, user_id) as connection:
        rows = await _read(connection, email_id)
    if rows is None or rows.message["id"] is None:
        return None
    message = rows.message
    return Email(
        id=email_id,
        created_at=message["created_at"],
        sender=_written(message["sender"], message["sender_name"]),
        reply_to=_written(message["reply_to"], message["reply_to_name"]) if message["reply_to"] else None,
        subject=message["subject"],
        priority=next((name for name, lane in lanes.items() if lane == message["lane"]), "normal"),
        tags=message["tags"] or [],
        metadata=msgspec.json.decode(message["metadata"] or "{}"),
        headers=msgspec.json.decode(message["headers"] or "{}"),
        state=message["state"] or "done",
        due=message["due"] if message["state"] and message["state"] not in WITHOUT_DUE else None,
        held_reason=message["held_reason"],
        why=explain(_situation(email_id, rows, max_retries)),
        recipients=_recipients(rows),
        timeline=_timeline(rows),
    )


@dataclass(frozen=True, slots=True)
class Examined:
    """What an operator is told about a message: where it stands, its recipients, and what happened to it."""

    situation: Situation
    recipients: list[Recipient]
    timeline: list[Entry]


async def examine(connection: Connection, email_id: UUID, *, workers: int | None, max_retries: int) -> Examined:
    """Any user's message, for an operator, without the local parts of addresses; `workers` listen to the doorbell."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await _read(connection, email_id)
        if rows is None:
            return Examined(Situation(email_id, datetime.now(UTC), known=False), [], [])
        message = rows.message
        ahead = await connection.fetchval(_AHEAD, message["queue_lane"], message["due"], email_id, MANY + 1)
    situation = _situation(email_id, rows, max_retries)
    return Examined(
        replace(
            situation,
            answer=_discreet(situation.answer),
            operator=Operator(ahead, workers, message["owner"]),
        ),
        [
            structs.replace(recipient, recipient=discreet(recipient.recipient), response=_discreet(recipient.response))
            for recipient in _recipients(rows)
        ],
        [
            structs.replace(entry, recipient=_discreet(entry.recipient), detail=_discreet(entry.detail))
            for entry in _timeline(rows)
        ],
    )


def _discreet(text: str | None) -> str | None:
    return None if text is None else discreet(text)


async def _read(connection: Connection, email_id: UUID) -> _Rows | None:
    try:
        at = created_at(email_id)
    except (OverflowError, ValueError):
        return None  # an id of a year that no clock of ours has seen
    message = await connection.fetchrow(_MESSAGE, email_id, at)
    assert message is not None
    recipients = await connection.fetch(_RECIPIENTS, email_id, at)
    if message["id"] is None and message["queue_id"] is None and not recipients:
        return None
    return _Rows(message, recipients, await connection.fetch(_EVENTS, email_id, at))


def _situation(email_id: UUID, rows: _Rows, max_retries: int) -> Situation:
    message = rows.message
    still_open = [row for row in rows.recipients if Status(row["status"]).open]
    answered = [row for row in still_open if row["response"]]
    last = max(answered, key=lambda row: row["updated_at"]) if answered else None
    situation = Situation(
        email_id,
        message["now"],
        recipients=Counter(Status(row["status"]) for row in rows.recipients),
        suppressed=sum(row["suppressed"] for row in still_open),
        answer=last["response"] if last else None,
        provider=last["provider"] if last else None,
        confirmable=any(row["type"] == EventType.UNCERTAIN for row in rows.events),
        max_retries=max_retries,
    )
    if message["state"] is None:
        return situation
    return replace(
        situation,
        state=QueueState(message["state"]),
        since=message["since"],
        due=message["due"],
        expires_at=message["expires_at"],
        tries=message["tries"],
        holds=message["on_uncertain"] == "hold",
        held_reason=message["held_reason"],
        attempt=message["lease_no"],
        attempt_at=message["attempt_at"],
        attempt_provider=message["attempt_provider"],
        lease_until=message["lease_until"],
    )


def _recipients(rows: _Rows) -> list[Recipient]:
    return [
        Recipient(
            recipient=row["recipient"],
            kind=Kind(row["kind"]),
            status=Status(row["status"]),
            updated_at=row["updated_at"],
            response=row["response"],
            provider=row["provider"],
        )
        for row in rows.recipients
    ]


def _timeline(rows: _Rows) -> list[Entry]:
    """Acceptance, the beginning of each attempt (the open one too) and every event, in the order of their times."""
    message = rows.message
    recipients = {row["id"]: row["recipient"] for row in rows.recipients}
    entries = [Entry(at=message["created_at"], type="accepted")] if message["created_at"] else []
    began = {(row["started_at"], row["attempt"]): row["provider"] for row in rows.events if row["started_at"]}
    if message["attempt_at"]:
        began.setdefault((message["attempt_at"], message["lease_no"]), message["attempt_provider"])
    entries += [
        Entry(at=at, type="attempt", attempt=number, provider=provider) for (at, number), provider in began.items()
    ]
    entries += [
        Entry(
            at=row["occurred_at"],
            type=row["type"],
            recipient=recipients.get(row["tracking_id"]),
            attempt=row["attempt"],
            provider=row["provider"],
            detail=row["response"],
        )
        for row in rows.events
    ]
    return sorted(entries, key=lambda entry: entry.at)


def _written(address: str, name: str | None) -> str:
    if not name:
        return address
    if _PLAIN_NAME.fullmatch(name):
        return f"{name} <{address}>"
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}" <{address}>'


_PLAIN_NAME = re.compile(r'[^,;<>"\\]+')
