"""The way of a message through PostgreSQL: accept, claim, attempt, complete, sweep. All hot SQL stands in `outbox.sql`.

`Intake` is the API's side: a group commit, so that many requests share one transaction and each is answered after it.
The functions below it are the worker's side; each is one statement, and each write is fenced by the lease.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from .db import UNAVAILABLE, UNSTORABLE, Connection, Pool
from .errors import DatabaseUnavailable, IdempotencyKeyReused, IntakeFull, NeoforgeError, OutcomeUnknown
from .inbound import Event
from .lifecycle import Backoff, Decision, implied, suppresses
from .message import Draft, Kind, Mailbox, Message, Recipient, parse_attempt

FLUSH_MOST = 500
CAPACITY = 10_000
PATIENCE = timedelta(seconds=5)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def uuid7(milliseconds: int, sequence: int | None = None) -> UUID:
    """A UUIDv7 (RFC 9562, 5.7) whose time stamp is the given Unix time.

    Ids of the same millisecond sort by `sequence` (below 4096) where one is given (6.2, method 1).
    """
    random = int.from_bytes(os.urandom(10))
    counter = random >> 68 & 0xFFF if sequence is None else sequence
    return UUID(int=milliseconds << 80 | 0x7 << 76 | counter << 64 | 0b10 << 62 | random & (1 << 62) - 1)


def created_at(email_id: UUID) -> datetime:
    """When a message was accepted, to the millisecond: its id's own time stamp, which names its partition."""
    return EPOCH + timedelta(milliseconds=email_id.int >> 80)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A message that is committed. `replayed` says that it was accepted by an earlier request with the same key."""

    id: UUID
    created_at: datetime
    replayed: bool
    recipients: list[tuple[Kind, str, str]]


@dataclass(eq=False, slots=True)
class _Waiting:
    """A draft on its way to the database, with the id that it keeps through every retry."""

    draft: Draft
    future: asyncio.Future[Accepted]
    id: UUID = field(default=UUID(int=0))


class Intake:
    """Accepts drafts by group commit: what waits is written in one transaction, at most `FLUSH_MOST` at a time.

    The commit is the linger: while one flush is on its way the next one gathers. `on_commit` is called after each.
    """

    def __init__(self, pool: Pool, *, expire_after: timedelta, on_commit: Callable[[], None], writers: int = 2) -> None:
        self._pool = pool
        self._expire_after = expire_after
        self._on_commit = on_commit
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._writers = writers
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._write(), name=f"intake-{n}") for n in range(self._writers)]

    async def close(self) -> None:
        """Flush what waits, then stop."""
        self._closing = True
        self._wake.set()
        await asyncio.gather(*self._tasks)

    async def accept(self, draft: Draft) -> Accepted:
        """Commit one message; returns after the commit.

        Raises IntakeFull, DatabaseUnavailable (nothing was accepted), OutcomeUnknown (it may have been), and
        IdempotencyKeyReused. A caller that is cancelled does not take its message back.
        """
        if len(self._waiting) >= CAPACITY or self._closing:
            raise IntakeFull("More messages are waiting to be stored than this server holds; nothing was accepted")
        waiting = _Waiting(draft, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        return await waiting.future

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            if not self._waiting:
                if self._closing:
                    return
                self._wake.clear()
                continue
            batch, self._waiting = self._waiting[:FLUSH_MOST], self._waiting[FLUSH_MOST:]
            milliseconds = time.time_ns() // 1_000_000
            for waiting in batch:
                waiting.id = uuid7(milliseconds)
            try:
                await self._flush(batch, EPOCH + timedelta(milliseconds=milliseconds))
            except Exception as error:  # noqa: BLE001 - whatever it was, every waiting request gets an answer
                for waiting in batch:
                    _fail(waiting, error)

    async def _flush(self, batch: list[_Waiting], at: datetime) -> None:
        """Write a batch. Where it fails, write each row alone under its id: a row that is there already is a success,
        and one bad row does not fail the others."""
        try:
            connection = await self._pool.acquire(timeout=PATIENCE.total_seconds())
        except UNAVAILABLE as error:
            raise DatabaseUnavailable("The database cannot be reached; nothing was accepted") from error
        try:
            lost = await self._accept(connection, batch, at)
        except (*UNAVAILABLE, *UNSTORABLE, asyncpg.PostgresError):
            lost = None
        finally:
            await self._pool.release(connection)
        if lost is None:
            await self._flush_singly(batch, at)
        else:
            await self._answer(batch, lost)
        self._on_commit()

    async def _flush_singly(self, batch: list[_Waiting], at: datetime) -> None:
        give_up = time.monotonic() + PATIENCE.total_seconds()
        for waiting in batch:
            while True:
                try:
                    async with self._pool.acquire(timeout=PATIENCE.total_seconds()) as connection:
                        lost = await self._accept(connection, [waiting], at)
                    await self._answer([waiting], lost)
                except asyncpg.UniqueViolationError:
                    await self._answer([waiting], set())
                except (*UNSTORABLE, NeoforgeError) as error:
                    _fail(waiting, error)
                except UNAVAILABLE:
                    if time.monotonic() < give_up:
                        await asyncio.sleep(0.2)
                        continue
                    _fail(
                        waiting,
                        OutcomeUnknown(
                            "The connection to the database was lost while the message was being stored: it may or may not"
                            " have been accepted. Send it again with the same Idempotency-Key, and it is sent once"
                        ),
                    )
                except asyncpg.PostgresError as error:
                    _fail(waiting, error)
                break

    async def _accept(self, connection: Any, batch: Sequence[_Waiting], at: datetime) -> set[UUID]:
        """Call `accept`; returns the ids whose idempotency key belongs to another message."""
        drafts = [waiting.draft for waiting in batch]
        shared = {draft.content_id: draft for draft in drafts if draft.content_id}
        rows = [
            (item.id, item.draft.user_id, kind, mailbox, position)
            for item in batch
            for position, (kind, mailbox) in enumerate(item.draft.recipients)
        ]
        milliseconds = (at - EPOCH) // timedelta(milliseconds=1)
        lost = await connection.fetchval(
            ACCEPT,
            at,
            self._expire_after,
            [waiting.id for waiting in batch],
            [draft.user_id for draft in drafts],
            [draft.lane for draft in drafts],
            [draft.sender.address for draft in drafts],
            [draft.sender.name for draft in drafts],
            [draft.reply_to and draft.reply_to.address for draft in drafts],
            [draft.reply_to and draft.reply_to.name for draft in drafts],
            [draft.subject for draft in drafts],
            [_json(draft.headers) for draft in drafts],
            ["{" + ",".join(draft.tags) + "}" if draft.tags else None for draft in drafts],
            [_json(draft.metadata) for draft in drafts],
            [None if draft.content_id else draft.html for draft in drafts],
            [None if draft.content_id else draft.text for draft in drafts],
            [draft.content_id for draft in drafts],
            [draft.on_uncertain for draft in drafts],
            [draft.idempotency_key for draft in drafts],
            [draft.body_hash for draft in drafts],
            list(shared),
            [draft.user_id for draft in shared.values()],
            [draft.html for draft in shared.values()],
            [draft.text for draft in shared.values()],
            [row[0] for row in rows],
            [uuid7(milliseconds, row[4]) for row in rows],
            [row[1] for row in rows],
            [row[2].value for row in rows],
            [row[3].address for row in rows],
            [row[3].name for row in rows],
        )
        return set(lost)

    async def _answer(self, batch: Sequence[_Waiting], lost: set[UUID]) -> None:
        """Resolve the requests of committed rows; those that lost their key get the answer of the message that has it."""
        for waiting in batch:
            if waiting.id not in lost:
                _resolve(waiting, waiting.id, replayed=False)
        losers = [waiting for waiting in batch if waiting.id in lost]
        if not losers:
            return
        try:
            rows = await self._pool.fetch(
                "select user_id, key, email_id, body_hash from find_idempotency_keys($1, $2)",
                [waiting.draft.user_id for waiting in losers],
                [waiting.draft.idempotency_key for waiting in losers],
            )
        except UNAVAILABLE as error:
            raise DatabaseUnavailable("The database cannot be reached; no further message was accepted") from error
        holder = {(row["user_id"], row["key"]): row for row in rows}
        for waiting in losers:
            row = holder.get((waiting.draft.user_id, waiting.draft.idempotency_key))
            if row is None:
                _fail(
                    waiting, DatabaseUnavailable("This idempotency key has just been forgotten; send the request again")
                )
            elif row["body_hash"] != waiting.draft.body_hash:
                _fail(
                    waiting,
                    IdempotencyKeyReused(
                        f"This Idempotency-Key was used for another message, {row['email_id']}; nothing was accepted."
                        " Use a new key for a new message"
                    ),
                )
            else:
                _resolve(waiting, row["email_id"], replayed=row["email_id"] != waiting.id)


def _resolve(waiting: _Waiting, email_id: UUID, *, replayed: bool) -> None:
    if not waiting.future.done():
        recipients = [(kind, mailbox.address, "queued") for kind, mailbox in waiting.draft.recipients]
        waiting.future.set_result(Accepted(email_id, created_at(email_id), replayed, recipients))


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)


def _json(value: dict[str, Any]) -> str | None:
    return msgspec.json.encode(value).decode() if value else None


ACCEPT = "select accept(" + ", ".join(f"${number}" for number in range(1, 30)) + ")"


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased message. `tries` counts its refusals; a `suspect` is sent alone; `suppressed` recipients are not sent to."""

    message: Message
    lane: int
    tries: int
    suspect: bool
    suppressed: tuple[Recipient, ...]


class Turn:
    """Which user was served last in each lane: a worker's memory between two claims, for fairness."""

    def __init__(self) -> None:
        self.after = [0, 0, 0]


async def claim(pool: Pool, owner: str, limit: int, lease: timedelta, turn: Turn) -> list[Claim]:
    """Lease up to about `limit` due messages, fairly over lanes and users, and commit.

    Rows that another worker holds are skipped, not waited for. The share of each user is rounded up, so a few more
    than `limit` may come. `Message.lease_no` fences every later write.
    """
    rows = await pool.fetch("select * from claim($1, $2, $3, $4)", owner, limit, lease, turn.after)
    if rows:
        turn.after = rows[0]["turn"]
    claims = []
    for row in rows:
        try:
            claims.append(_claim(row))
        except (ValueError, TypeError, msgspec.DecodeError) as error:  # it would be claimed, and fail, for ever
            reason = f"it cannot be read: {type(error).__name__}"
            await pool.execute("select hold($1, $2, $3)", [row["id"]], [row["lease_no"]], reason)
    return claims


def _claim(row: Any) -> Claim:
    recipients = tuple(
        Recipient(recipient_id, Kind(kind), Mailbox(address, name), is_open and not is_suppressed)
        for recipient_id, kind, address, name, is_open, is_suppressed in zip(
            row["recipient_ids"],
            row["kinds"],
            row["recipients"],
            row["names"],
            row["opens"],
            row["suppressed"],
            strict=True,
        )
    )
    suppressed = tuple(
        recipient
        for recipient, is_open, is_suppressed in zip(recipients, row["opens"], row["suppressed"], strict=True)
        if is_open and is_suppressed
    )
    message = Message(
        id=row["id"],
        created_at=row["created_at"],
        user_id=row["user_id"],
        lease_no=row["lease_no"],
        sender=Mailbox(row["sender"], row["sender_name"]),
        reply_to=Mailbox(row["reply_to"], row["reply_to_name"]) if row["reply_to"] else None,
        subject=row["subject"],
        headers=msgspec.json.decode(row["headers"]) if row["headers"] else {},
        html=row["html"],
        text=row["body"],
        recipients=recipients,
    )
    return Claim(message, row["lane"], row["tries"], row["suspect"], suppressed)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A message that is about to be handed to `provider`, whose call takes `call_time` at most."""

    message: Message
    provider: str
    call_time: timedelta


async def attempt(pool: Pool, attempts: Sequence[Attempt]) -> set[UUID]:
    """Write down that these messages may be sent now. Only those returned may be: their lease outlasts their call."""
    rows = await pool.fetch(
        "select attempt($1, $2, $3, $4) as id",
        [item.message.id for item in attempts],
        [item.message.lease_no for item in attempts],
        [item.call_time for item in attempts],
        [item.provider for item in attempts],
    )
    return {row["id"] for row in rows}


async def renew(pool: Pool, messages: Sequence[Message], lease: timedelta) -> set[UUID]:
    """Let leases run anew from now; returns the messages that still are ours."""
    rows = await pool.fetch(
        "select renew($1, $2, $3) as id",
        [message.id for message in messages],
        [message.lease_no for message in messages],
        lease,
    )
    return {row["id"] for row in rows}


async def release(pool: Pool, messages: Sequence[Message], delay: timedelta) -> None:
    """Give back leases on which no attempt was made; they are due again after `delay`."""
    await pool.execute(
        "select release($1, $2, $3)",
        [message.id for message in messages],
        [message.lease_no for message in messages],
        delay,
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """A message with what is to be recorded: the decision, and the recipients its verdicts are about, in order.

    `attempted_at` and `provider` are None where no attempt was needed. `provider_message_ids` are the provider's own ids of
    what it took, one a recipient in the same order, as far as it gives any.
    """

    message: Message
    decision: Decision
    recipients: tuple[Recipient, ...]
    attempted_at: datetime | None
    provider: str | None
    provider_message_ids: tuple[str | None, ...] = ()


async def complete(pool: Pool, completions: Sequence[Completion]) -> tuple[set[UUID], set[UUID]]:
    """Record a batch of outcomes and commit.

    Returns the messages whose state changed (the others' lease had been lost; their outcome is an event all the same),
    and those that turned out to have been taken twice.
    """
    rows = [
        (item, recipient, verdict, provider_message_id)
        for item in completions
        for recipient, verdict, provider_message_id in zip_longest(
            item.recipients, item.decision.recipients, item.provider_message_ids
        )
    ]
    [row] = await pool.fetch(
        COMPLETE,
        [item.message.id for item in completions],
        [item.message.lease_no for item in completions],
        [item.decision.state and item.decision.state.value for item in completions],
        [item.decision.delay.total_seconds() for item in completions],
        [item.decision.tries for item in completions],
        [item.message.id for item, _, _, _ in rows],
        [recipient.id for _, recipient, _, _ in rows],
        [item.message.created_at for item, _, _, _ in rows],
        [item.message.user_id for item, _, _, _ in rows],
        [item.message.lease_no if item.attempted_at else None for item, _, _, _ in rows],
        [verdict.status.value for _, _, verdict, _ in rows],
        [verdict.event.value for _, _, verdict, _ in rows],
        [verdict.response for _, _, verdict, _ in rows],
        [item.attempted_at for item, _, _, _ in rows],
        [item.provider for item, _, _, _ in rows],
        [provider_message_id for _, _, _, provider_message_id in rows],
    )
    return set(row["won"]), set(row["twice"])


COMPLETE = "select * from complete($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Of each provider event whether its message was found, and the messages that turned out to have been taken twice."""

    matched: list[bool]
    twice: set[UUID]


async def record_events(connection: Connection, events: Sequence[Event]) -> Recorded:
    """Keep what providers report and let the recipients' statuses follow, in the caller's transaction.

    An event that carries an attempt settles an uncertain message; one whose message is not found may come too early.
    """
    attempts = [parse_attempt(event.attempt) if event.attempt else None for event in events]
    row = await connection.fetchrow(
        RECORD_EVENTS,
        [event.provider for event in events],
        [event.event_id for event in events],
        [event.type.value for event in events],
        [implied(event.type).value for event in events],
        [event.occurred_at for event in events],
        [event.recipient for event in events],
        [attempt and attempt[0] for attempt in attempts],
        [attempt and attempt[1] for attempt in attempts],
        [event.provider_message_id for event in events],
        [suppresses(event.type, event.permanent) for event in events],
        [event.response for event in events],
        [_json(event.detail) for event in events],
    )
    assert row is not None
    return Recorded(list(row["matched"] or ()), set(row["twice"]))


RECORD_EVENTS = "select * from record_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"

MAX_LAPSES = 10
"""Leases of a message that may run out before any attempt, one after the other, until it is held: it may be what kills."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How many messages a sweep moved: `lapsed` leases given back, `uncertain` attempts found, `promoted` and `resent` to the
    queue, `held` for an operator."""

    lapsed: int
    uncertain: int
    promoted: int
    resent: int
    held: int

    @property
    def due(self) -> bool:
        """There is something new to claim."""
        return bool(self.lapsed or self.promoted or self.resent)


async def sweep(
    pool: Pool, backoff: Backoff, reporting: Sequence[str], *, owner: str | None = None, most: int = 5000
) -> Swept:
    """Move on what waits for time alone. `owner` also gives up the leases of an instance that has started again.

    `reporting` are the providers whose events may settle an attempt. An uncertain message whose policy is `hold`, or that was
    lost more often than `max_retries`, is not sent again: it waits for an operator.
    """
    [row] = await pool.fetch(
        "select * from sweep($1, $2, $3, $4, $5, $6, $7)",
        owner,
        list(reporting),
        backoff.wait_for_event(True),
        backoff.wait_for_event(False),
        backoff.max_retries,
        MAX_LAPSES,
        most,
    )
    return Swept(row["lapsed"], row["uncertain"], row["promoted"], row["resent"], row["held"])


async def expire(pool: Pool, *, most: int = 5000) -> int:
    """End messages that could not be sent in time; returns how many."""
    return int(await pool.fetchval("select expire($1)", most))


async def follow_clock(pool: Pool, *, most: int = 5000) -> int:
    """After the database's clock was set back: let nothing wait for it to catch up; returns how many did."""
    return int(await pool.fetchval("select follow_clock($1)", most))


async def forget_idempotency_keys(pool: Pool, age: timedelta, *, most: int = 50_000) -> int:
    """Delete idempotency keys older than `age`; returns how many."""
    return int(await pool.fetchval("select forget_idempotency_keys($1, $2)", age, most))


async def ensure_partitions(pool: Pool, months_ahead: int) -> list[str]:
    """Create the missing monthly partitions up to `months_ahead`; returns their names."""
    return [row["name"] for row in await pool.fetch("select ensure_partitions($1) as name", months_ahead)]


@dataclass(frozen=True, slots=True)
class QueueStat:
    """A state, how many stand in it, and the age of the oldest: of messages since they were accepted."""

    state: str
    size: int
    oldest_seconds: float


async def queue_stats(pool: Pool | Connection) -> list[QueueStat]:
    """The queue by state; every state is there, empty ones too."""
    rows = await pool.fetch("select state, size, oldest_seconds from queue_stats()")
    return [QueueStat(row["state"], row["size"], row["oldest_seconds"]) for row in rows]
