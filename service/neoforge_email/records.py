"""The SQL that reads for people: one message, with its recipients and everything that happened to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec

from .db import Pool, read_session
from .lifecycle import QueueState, Status
from .message import Kind
from .outbox import created_at


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

    A `held` one waits for an operator, who is told by `held_reason` why.
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
    recipients: list[Recipient]
    timeline: list[Entry]


WITHOUT_DUE = {QueueState.LEASED, QueueState.HELD}

# Indexes: the primary keys, in the one partition that the id's own time names; idx_email_events_email_occurred.
_MESSAGE = """
select m.id, m.created_at, m.lane, m.sender, m.sender_name, m.reply_to, m.reply_to_name, m.subject, m.tags,
    m.headers::text as headers, m.metadata::text as metadata,
    q.state::text as state, q.due, q.lease_no, q.attempt_at, q.attempt_provider, q.held_reason
from email_messages m left join email_queue q on q.id = m.id
where m.id = $1 and m.created_at = $2
"""
_RECIPIENTS = """
select id, recipient, kind::text as kind, status::text as status, updated_at, response, provider
from email_tracking where email_id = $1 and created_at = $2 order by id
"""
_EVENTS = """
select occurred_at, started_at, tracking_id, attempt, type::text as type, provider, response
from email_events where email_id = $1 and arrived_at >= $2 order by occurred_at, arrived_at
"""


async def get_email(pool: Pool, user_id: int, email_id: UUID, lanes: Mapping[str, int]) -> Email | None:
    """The user's message of that id, or None; raises DatabaseUnavailable. `lanes` gives each priority's lane."""
    try:
        at = created_at(email_id)
    except (OverflowError, ValueError):
        return None  # an id of a year that no clock of ours has seen
    async with read_session(pool, user_id) as connection:
        message = await connection.fetchrow(_MESSAGE, email_id, at)
        if message is None:
            return None
        recipients = await connection.fetch(_RECIPIENTS, email_id, message["created_at"])
        events = await connection.fetch(_EVENTS, email_id, message["created_at"])
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
        recipients=[
            Recipient(
                recipient=row["recipient"],
                kind=Kind(row["kind"]),
                status=Status(row["status"]),
                updated_at=row["updated_at"],
                response=row["response"],
                provider=row["provider"],
            )
            for row in recipients
        ],
        timeline=_timeline(message, {row["id"]: row["recipient"] for row in recipients}, events),
    )


def _timeline(message: asyncpg.Record, recipients: Mapping[UUID, str], events: list[asyncpg.Record]) -> list[Entry]:
    """Acceptance, the beginning of each attempt (the open one too) and every event, in the order of their times."""
    entries = [Entry(at=message["created_at"], type="accepted")]
    began = {(row["started_at"], row["attempt"]): row["provider"] for row in events if row["started_at"]}
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
        for row in events
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
