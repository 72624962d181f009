"""From receipts to events: what providers told us, applied to messages, each receipt exactly once.

    claim (locked) ─► normalise ─► record_events ─► settle, all in one transaction

A worker that is lost in the middle leaves the receipts as they were. What cannot be read or applied is set aside with its
error and holds up nothing else; what is about a message that is not known yet is tried again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast
from uuid import UUID

import asyncpg
import structlog

from neoforge_email import outbox
from neoforge_email.db import UNAVAILABLE, UNSTORABLE, Connection, Pool
from neoforge_email.inbound import Event, dsn, receipts, sendgrid, ses
from neoforge_email.inbound.receipts import Outcome, Receipt
from neoforge_email.inbound.values import line
from neoforge_email.observability import EMAILS_DUPLICATE, PROVIDER_EVENTS, PROVIDER_RECEIPTS
from neoforge_email.patience import patiently
from neoforge_email.settings import Settings

log = structlog.get_logger()

BATCH = 200
BATCH_BYTES = 16 << 20
"""Receipts a transaction, at most, and their bytes, about."""
PAUSE = 0.1
"""Seconds at least between two looks that found nothing: the doorbell rings for every accepted message, too."""

NORMALISE: Mapping[str, Callable[[bytes], list[Event]]] = {
    "sendgrid": sendgrid.normalise,
    "ses": ses.normalise,
    "mail": dsn.normalise,
}


@dataclass(slots=True)
class _Work:
    """A receipt with what is in it and what became of it."""

    receipt: Receipt
    events: list[Event] = field(default_factory=list)
    outcome: Outcome = Outcome.DONE
    error: str | None = None


class Normaliser:
    """Works off receipts until it is stopped."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._interval = settings.email_worker_interval.total_seconds()
        self._error_interval = settings.email_worker_error_interval.total_seconds()
        self._max_tries = settings.email_worker_max_retries
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._stopping = False

    def ring(self) -> None:
        """The doorbell: there may be new receipts."""
        self._wake.set()

    def stop(self) -> None:
        """Begin no further batch; `run` returns when the one under way is committed."""
        self._stopping = True
        self._wake.set()

    async def drained(self) -> None:
        """Wait until no receipt is due. Those whose message is not known yet are due later."""
        self._idle.clear()
        self._wake.set()
        await self._idle.wait()

    async def run(self) -> None:
        """Work until `stop`; woken by the doorbell and its own timer."""
        while not self._stopping:
            self._wake.clear()
            if await patiently("normalise", self._work, self._error_interval):
                continue
            self._idle.set()
            await asyncio.sleep(PAUSE)
            try:
                async with asyncio.timeout(self._interval):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _work(self) -> int:
        """One batch, in one transaction; returns how many receipts it had."""
        twice: list[tuple[str, UUID]] = []
        async with self._pool.acquire() as acquired, acquired.transaction():
            connection = cast("Connection", acquired)
            found = await receipts.waiting(connection, NORMALISE, BATCH, BATCH_BYTES)
            batch = [_read(receipt) for receipt in found]
            if not batch:
                return 0
            for provider in {work.receipt.provider for work in batch}:
                mine = [work for work in batch if work.receipt.provider == provider and work.events]
                if mine:
                    twice += [(provider, email_id) for email_id in await _apply(connection, mine)]
            outcomes = [(work.receipt, work.outcome, line(work.error)) for work in batch]
            states = await receipts.settle(connection, outcomes, self._max_tries)
        _tell(batch, states)
        for provider, email_id in twice:
            EMAILS_DUPLICATE.labels(provider).inc()
            log.error("email.duplicate", email_id=str(email_id), provider=provider)
        return len(batch)


def _read(receipt: Receipt) -> _Work:
    """Normalise a receipt. An event cannot have happened after we were told of it."""
    try:
        events = NORMALISE[receipt.provider](receipt.body)
    except ValueError as error:
        return _Work(receipt, outcome=Outcome.MALFORMED, error=str(error))
    except Exception as error:
        log.exception("receipt.unreadable", receipt=receipt.id, provider=receipt.provider)
        return _Work(receipt, outcome=Outcome.FAILED, error=type(error).__name__)
    return _Work(receipt, [replace(event, occurred_at=min(event.occurred_at, receipt.received_at)) for event in events])


async def _apply(connection: Connection, batch: Sequence[_Work]) -> set[UUID]:
    """Record the events of a batch; where the database refuses them, those of each receipt alone.

    Returns the messages that turned out to have been taken twice. Raises what says that the database is away.
    """
    try:
        return await _record(connection, batch)
    except UNSTORABLE as error:
        refused: Exception = error
    except UNAVAILABLE:
        raise
    except asyncpg.PostgresError as error:
        refused = error
    if len(batch) > 1:
        return set().union(*[await _apply(connection, [work]) for work in batch])
    [work] = batch
    work.outcome, work.error = Outcome.FAILED, f"{type(refused).__name__}: {refused}"
    log.error("receipt.failed", receipt=work.receipt.id, reason=type(refused).__name__)
    return set()


async def _record(connection: Connection, batch: Sequence[_Work]) -> set[UUID]:
    async with connection.transaction():
        recorded = await outbox.record_events(connection, [event for work in batch for event in work.events])
    matched = iter(recorded.matched)
    for work in batch:
        found = [next(matched) for _ in work.events]
        work.outcome = Outcome.DONE if any(found) else Outcome.UNMATCHED
        if not all(found):
            work.error = f"{found.count(False)} of {len(found)} events name no message of ours"
    return recorded.twice


def _tell(batch: Sequence[_Work], states: Mapping[int, str]) -> None:
    """Count and log what is committed."""
    for work in batch:
        provider, state = work.receipt.provider, states[work.receipt.id]
        result = state
        if state == "waiting":
            result = "postponed" if work.outcome is Outcome.UNMATCHED else "failed"
        elif state == "done" and not work.events:
            result = "ignored"
        PROVIDER_RECEIPTS.labels(provider, result).inc()
        if state == "done":
            for event in work.events:
                PROVIDER_EVENTS.labels(provider, event.type.value).inc()
        elif state != "waiting":
            log.error("receipt.set_aside", receipt=work.receipt.id, provider=provider, state=state)
