"""What became of a row's messages, counted by id: where they arrived, and what the database says about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import asyncpg


@dataclass
class Counted:
    """The columns of the report. `problems` says in words what breaks a promise."""

    accepted: int = 0
    once: int = 0
    twice: int = 0
    uncertain: int = 0
    held: int = 0
    lost: int = 0
    stuck: int = 0
    problems: list[str] = field(default_factory=list)


def arrivals(journal: Path, offset: int) -> tuple[Counter[UUID], int]:
    """How often each message has arrived since the journal was `offset` octets long, and the largest call's messages.

    A journal that does not tell calls apart makes that 0.
    """
    found: Counter[UUID] = Counter()
    calls: Counter[str] = Counter()
    if not journal.exists():
        return found, 0
    with journal.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            entry = json.loads(line)
            found[UUID(entry["message_id"].strip("<>").partition("@")[0])] += 1
            if "x_message_id" in entry:
                calls[entry["x_message_id"]] += 1
    return found, max(calls.values(), default=0)


async def unfinished(connection: asyncpg.Connection[asyncpg.Record], row: str) -> tuple[set[UUID], set[UUID]]:
    """The row's messages that still stand in the queue: those that wait for an operator, and the others."""
    rows = await connection.fetch(
        """select q.id, q.state::text = 'held' held
           from email_queue q join email_messages m on m.id = q.id and m.created_at = q.created_at
           where m.metadata->>'row' = $1""",
        row,
    )
    return {found["id"] for found in rows if found["held"]}, {found["id"] for found in rows if not found["held"]}


async def unreported(connection: asyncpg.Connection[asyncpg.Record], row: str) -> int:
    """How many recipients of the row no event has called delivered yet."""
    number: int = await connection.fetchval(
        """select count(*) from email_tracking t join email_messages m on m.id = t.email_id and m.created_at = t.created_at
           where m.metadata->>'row' = $1 and t.status <> 'delivered'
               and not exists (select from email_queue q where q.id = m.id and q.state::text = 'held')""",
        row,
    )
    return number


async def count(
    connection: asyncpg.Connection[asyncpg.Record],
    row: str,
    accepted: AbstractSet[UUID],
    arrived: Counter[UUID],
    *,
    refused: AbstractSet[UUID],
    unanswered: int,
    events: bool,
) -> Counted:
    """Count a row that has come to rest. The sink refuses the recipients of `refused`; about `unanswered` messages, which
    have no key to repeat them with, the clients do not know. `events`: the provider reports what it took."""
    stored = {
        found["id"]
        for found in await connection.fetch("select id from email_messages where metadata->>'row' = $1", row)
    }
    held, waiting = await unfinished(connection, row)
    told = await connection.fetch(
        "select distinct email_id from email_events where type = 'uncertain' and email_id = any($1)", list(stored)
    )
    uncertain = {found["email_id"] for found in told}
    statuses = {
        found["email_id"]: found["status"]
        for found in await connection.fetch(
            "select email_id, status::text from email_tracking where email_id = any($1)", list(stored)
        )
    }
    open_ids = {email_id for email_id, status in statuses.items() if status in {"queued", "deferred", "uncertain"}}
    twice = {email_id for email_id in accepted if arrived[email_id] > 1}
    # Open without a row in the queue: no rule will ever move it.
    stuck = waiting | (open_ids - held)
    bounced = {email_id for email_id in refused if statuses.get(email_id) == "bounced" and not arrived[email_id]}
    lost = {email_id for email_id in accepted if not arrived[email_id]} - held - stuck - bounced
    counted = Counted(
        accepted=len(accepted),
        once=sum(arrived[email_id] == 1 for email_id in accepted) + len(bounced),
        twice=len(twice),
        uncertain=len(uncertain),
        held=len(held),
        lost=len(lost),
        stuck=len(stuck),
    )
    say = counted.problems.append
    if silent := twice - uncertain:
        say(f"{len(silent)} arrived twice without an `uncertain` entry, such as {min(silent)}")
    if len(unknown := stored - accepted) > unanswered:
        say(f"{len(unknown)} were stored and never answered with 202, such as {min(unknown)}")
    if missing := accepted - stored:
        say(f"{len(missing)} were answered with 202 and are not in the database, such as {min(missing)}")
    strange = {
        email_id: statuses.get(email_id)
        for email_id in accepted - held - stuck - missing - bounced
        if statuses.get(email_id) not in {"sent", "delivered"}
    }
    if strange:
        say(f"{len(strange)} ended as {sorted(map(str, set(strange.values())))}, such as {min(strange)}")
    if events and (unsettled := {email_id for email_id in held if arrived[email_id]}):
        say(f"{len(unsettled)} are held although an event said that they were taken, such as {min(unsettled)}")
    repeated = await connection.fetch(
        """select email_id, type::text, count(*) from email_events
           where email_id = any($1) and type = 'delivered' group by 1, 2 having count(*) > 1""",
        [email_id for email_id in accepted if arrived[email_id] == 1],
    )
    if repeated:
        say(f"{len(repeated)} have an event twice, such as {repeated[0]['type']} of {repeated[0]['email_id']}")
    return counted
