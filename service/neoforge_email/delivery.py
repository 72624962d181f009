"""The delivery loop: from a claimed batch to recorded outcomes.

    claim ─► windows ─► a kept connection ─► attempt, committed ─► the provider's call ─► complete, committed

The claim keeps the senders supplied, each sender has one connection at a time, and attempts and completions are
committed for all that wait at that moment. A lease is renewed for as long as its message is here. Nothing is sent unless
its attempt is committed and its lease outlasts the call; what is lost with this process is found by the sweep.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

import structlog

from . import outbox
from .db import UNAVAILABLE, UNSTORABLE, Pool
from .errors import ProviderUnavailable
from .lifecycle import Backoff, Decision, EventType, QueueState, Status, Verdict, decide
from .message import Message, Recipient
from .observability import (
    DATABASE_ERRORS,
    EMAIL_CLAIMED,
    EMAIL_DELIVERY,
    EMAIL_IN_FLIGHT,
    EMAILS_DEFERRED,
    EMAILS_DUPLICATE,
    EMAILS_FAILED,
    EMAILS_LATE,
    EMAILS_SENT,
    EMAILS_UNCERTAIN,
    PROVIDER_UP,
)
from .outbox import Claim, Completion
from .patience import patiently
from .providers.base import Connection, Outcome, Provider, Result, Scope
from .settings import Settings

log = structlog.get_logger()

T = TypeVar("T")

LEASE = timedelta(seconds=60)
"""How long a claim holds its messages; renewed at a third of it. Raised where a provider's time-out asks for more."""


MOST_HELD = 2000
"""Messages that a worker holds at most, however wide the provider's calls are."""


@dataclass(slots=True)
class _Attempt:
    """A window that waits for its attempt to be committed; the future gives the messages that may be sent."""

    messages: list[Message]
    allowed: asyncio.Future[set[UUID]]


@dataclass(slots=True)
class _Held:
    """A lease of ours, under its attempt's id; `until` is on the monotonic clock, in seconds."""

    message: Message
    until: float


class Delivery:
    """Delivers what is due until it is stopped. `run` ends with an error if any part of the loop does."""

    def __init__(self, pool: Pool, provider: Provider, settings: Settings, *, lease: timedelta | None = None) -> None:
        self._pool = pool
        self._provider = provider
        self._owner = settings.instance
        self._lease = lease or max(LEASE, 2 * provider.timeout + timedelta(seconds=10))
        self._interval = settings.email_worker_interval.total_seconds()
        self._error_interval = settings.email_worker_error_interval.total_seconds()
        self._backoff = Backoff(
            delay=settings.email_retry_delay,
            max_delay=settings.email_retry_max_delay,
            base=settings.email_retry_exponential_base,
            max_retries=settings.email_worker_max_retries,
            error_interval=settings.email_worker_error_interval,
            uncertain_wait=settings.email_uncertain_wait,
        )
        self._reporting = [provider.name] if provider.reports else []
        self._capacity = min(2 * provider.connections * provider.window, MOST_HELD)
        self._turn = outbox.Turn()
        self._held: dict[str, _Held] = {}
        self._windows: asyncio.Queue[list[Claim]] = asyncio.Queue()
        self._attempts: list[_Attempt] = []
        self._completions: list[Completion] = []
        self._wake = asyncio.Event()
        self._attempt_waits = asyncio.Event()
        self._completion_waits = asyncio.Event()
        self._idle = asyncio.Event()
        self._stopping = False
        self._paused_until = 0.0

    def ring(self) -> None:
        """The doorbell: there may be something due."""
        self._wake.set()

    async def run(self) -> None:
        """Deliver until `stop`; a numbered instance takes up first what it held when it was lost."""
        await self._patiently("sweep", self._take_up)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(work(), name=name)
                for name, work in {
                    "sweep": self._sweep,
                    "renew": self._renew,
                    "attempt": self._attempt,
                    "complete": self._complete,
                }.items()
            ]
            senders = [
                tasks.create_task(self._send(), name=f"send-{number}") for number in range(self._provider.connections)
            ]
            await self._claim()
            await self._give_back()
            while self._held:
                self._wake.clear()
                await self._until_woken(self._interval)
            for task in (*senders, *background):
                task.cancel()

    def stop(self) -> None:
        """Claim nothing more, start no further message, finish what is being sent; `run` then returns."""
        self._stopping = True
        self._wake.set()

    async def drained(self) -> None:
        """Wait until nothing is due and nothing is held here."""
        self._idle.clear()
        self._wake.set()
        await self._idle.wait()

    # --- claim -------------------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        """Keep the senders supplied: claim when half of the capacity is free, wake by doorbell, completion and timer."""
        while not self._stopping:
            self._wake.clear()
            free = self._capacity - len(self._held)
            pause = self._paused_until - time.monotonic()
            if pause > 0:
                await self._until_woken(min(pause, self._interval))
                continue
            if free >= self._capacity // 2:
                began = time.monotonic()
                claims = await self._patiently("claim", self._claim_once, free)
                for claimed in claims:
                    until = began + self._lease.total_seconds()
                    self._held[claimed.message.attempt] = _Held(claimed.message, until)
                EMAIL_CLAIMED.labels(self._provider.name).inc(len(claims))
                EMAIL_IN_FLIGHT.labels(self._provider.name).set(len(self._held))
                for window in _windows(claims, self._provider):
                    self._windows.put_nowait(window)
                if len(claims) >= free // 2:
                    continue
                if not self._held:
                    self._idle.set()
            await self._until_woken(self._interval)

    async def _claim_once(self, free: int) -> list[Claim]:
        return await outbox.claim(self._pool, self._owner, free, self._lease, self._turn)

    async def _until_woken(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _give_back(self) -> None:
        """Release what no sender has begun with."""
        rest = [claimed.message for window in _drain(self._windows) for claimed in window]
        if rest:
            await self._patiently("release", outbox.release, self._pool, rest, timedelta())
            self._let_go(rest)

    # --- send --------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            window = await self._windows.get()
            unsent = [self._settled(claimed) for claimed in window if not claimed.message.open_recipients]
            self._record(unsent)
            window = [claimed for claimed in window if claimed.message.open_recipients]
            if window:
                await self._send_window(window)

    async def _send_window(self, window: list[Claim]) -> None:
        messages = [claimed.message for claimed in window]
        try:
            async with self._provider.connection() as connection:
                PROVIDER_UP.labels(self._provider.name).set(1)
                allowed = await self._attempted(messages)
                mine = [claimed for claimed in window if claimed.message.id in allowed]
                if mine:
                    attempted_at = datetime.now(UTC)
                    results = await self._call(connection, mine)
                    self._record(
                        self._judged(claimed, result, attempted_at)
                        for claimed, result in zip(mine, results, strict=True)
                    )
        except ProviderUnavailable as error:
            PROVIDER_UP.labels(self._provider.name).set(0)
            if time.monotonic() >= self._paused_until:
                log.warning("provider.unavailable", provider=self._provider.name, reason=error.detail)
            self._paused_until = time.monotonic() + self._error_interval
            await self._patiently("release", outbox.release, self._pool, messages, timedelta())
            self._let_go(messages)

    async def _call(self, connection: Connection, window: Sequence[Claim]) -> list[tuple[Result, ...]]:
        """The provider's call. A fault of our own in it leaves open what was sent, and must not stop the loop."""
        try:
            return await connection.send([claimed.message for claimed in window], self._may_start(window))
        except Exception:
            log.exception("provider.call_failed", provider=self._provider.name, messages=len(window))
            return [(CALL_FAILED,) * len(claimed.message.open_recipients) for claimed in window]

    def _may_start(self, window: Sequence[Claim]) -> Callable[[], bool]:
        """A message may be started while we are not stopping and every lease of its window outlasts one call."""
        call_seconds = self._provider.timeout.total_seconds()

        leases = [self._held[claimed.message.attempt] for claimed in window]

        def may_start() -> bool:
            last = time.monotonic() + call_seconds
            return not self._stopping and all(lease.until > last for lease in leases)

        return may_start

    async def _attempted(self, messages: list[Message]) -> set[UUID]:
        waiting = _Attempt(messages, asyncio.get_running_loop().create_future())
        self._attempts.append(waiting)
        self._attempt_waits.set()
        return await waiting.allowed

    async def _attempt(self) -> None:
        """Commit the attempts of all windows that wait, in one statement."""
        while True:
            await self._attempt_waits.wait()
            self._attempt_waits.clear()
            waiting, self._attempts = self._attempts, []
            messages = [message for window in waiting for message in window.messages]
            try:
                allowed = await outbox.attempt(
                    self._pool,
                    [outbox.Attempt(message, self._provider.name, self._provider.timeout) for message in messages],
                )
            except UNAVAILABLE as error:
                # It may have been committed. Nothing was sent, and the completion says so as soon as it can.
                DATABASE_ERRORS.labels("attempt").inc()
                log.warning("database.unavailable", operation="attempt", reason=type(error).__name__)
                allowed = set()
                self._record(Completion(message, UNTOUCHED, (), None, None) for message in messages)
            else:
                self._let_go(message for message in messages if message.id not in allowed)
            for window in waiting:
                window.allowed.set_result(allowed)

    # --- complete ----------------------------------------------------------------------------------------------

    def _judged(self, claimed: Claim, results: tuple[Result, ...], attempted_at: datetime) -> Completion:
        decision = decide(
            results,
            claimed.tries,
            self._backoff,
            random.random(),  # noqa: S311 - jitter, not a secret
            reports=self._provider.reports,
        )
        recipients = claimed.message.open_recipients if decision.recipients else ()
        if any(result.outcome is Outcome.TAKEN for result in results):
            age = datetime.now(UTC) - claimed.message.created_at
            EMAIL_DELIVERY.labels(self._provider.name).observe(max(age.total_seconds(), 0.0))
        provider_message_ids = tuple(result.provider_message_id for result in results)[: len(recipients)]
        return self._completion(claimed, decision, recipients, attempted_at, provider_message_ids)

    def _settled(self, claimed: Claim) -> Completion:
        """A message that needs no attempt: every recipient that was open is suppressed."""
        return self._completion(claimed, Decision(None, timedelta(), claimed.tries, ()), (), None)

    def _completion(
        self,
        claimed: Claim,
        decision: Decision,
        recipients: tuple[Recipient, ...],
        attempted_at: datetime | None,
        provider_message_ids: tuple[str | None, ...] = (),
    ) -> Completion:
        """Add the suppressed recipients to what is recorded, and count it all."""
        if decision.state is not QueueState.QUEUED:
            recipients += claimed.suppressed
            decision = replace(decision, recipients=decision.recipients + (SUPPRESSED,) * len(claimed.suppressed))
        name = self._provider.name
        for verdict in decision.recipients:
            if verdict.status is Status.SENT:
                EMAILS_SENT.labels(name).inc()
            elif verdict.status is Status.DEFERRED:
                EMAILS_DEFERRED.labels(name).inc()
            elif not verdict.status.open:
                EMAILS_FAILED.labels(name, verdict.status.value).inc()
        if decision.state is QueueState.UNCERTAIN:
            EMAILS_UNCERTAIN.labels(name).inc()
        return Completion(
            claimed.message, decision, recipients, attempted_at, name if attempted_at else None, provider_message_ids
        )

    def _record(self, completions: Iterable[Completion]) -> None:
        self._completions.extend(completions)
        if self._completions:
            self._completion_waits.set()

    async def _complete(self) -> None:
        """Commit the outcomes of all that wait. They are kept and tried again for as long as the database is away."""
        while True:
            await self._completion_waits.wait()
            self._completion_waits.clear()
            batch, self._completions = self._completions, []
            try:
                await self._patiently("complete", self._complete_once, batch)
            except UNSTORABLE:
                log.exception("complete.batch_failed", messages=len(batch))
                await self._complete_singly(batch)
            self._let_go(item.message for item in batch)

    async def _complete_once(self, batch: Sequence[Completion]) -> None:
        won, twice = await outbox.complete(self._pool, batch)
        EMAILS_LATE.labels(self._provider.name).inc(len(batch) - len(won))
        for email_id in twice:
            EMAILS_DUPLICATE.labels(self._provider.name).inc()
            log.error("email.duplicate", email_id=str(email_id), provider=self._provider.name)

    async def _complete_singly(self, batch: Sequence[Completion]) -> None:
        """One outcome that cannot be stored must not keep the others; its message becomes uncertain and is seen."""
        for item in batch:
            try:
                await self._patiently("complete", self._complete_once, [item])
            except UNSTORABLE:
                log.exception("complete.failed", email_id=str(item.message.id))

    def _let_go(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._held.pop(message.attempt, None)
        EMAIL_IN_FLIGHT.labels(self._provider.name).set(len(self._held))
        self._wake.set()

    # --- time --------------------------------------------------------------------------------------------------

    async def _take_up(self) -> None:
        swept = await outbox.sweep(self._pool, self._backoff, self._reporting, owner=self._owner)
        if swept.lapsed or swept.uncertain:
            log.info("leases.taken_up", released=swept.lapsed, uncertain=swept.uncertain)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            swept = await self._patiently("sweep", outbox.sweep, self._pool, self._backoff, self._reporting)
            if swept.uncertain:
                EMAILS_UNCERTAIN.labels(self._provider.name).inc(swept.uncertain)
                log.warning("attempt.lost", messages=swept.uncertain)
            if swept.held:
                log.error("email.held", messages=swept.held)
            if swept.due:
                self._wake.set()

    async def _renew(self) -> None:
        """Keep what is held. A message whose lease was lost meanwhile gets no new time, so no call on it starts."""
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            # Where a lease was lost and taken anew, only the newer one can be renewed.
            held = {lease.message.id: lease for lease in self._held.values()}
            if not held:
                continue
            began = time.monotonic()
            try:
                kept = await outbox.renew(self._pool, [lease.message for lease in held.values()], self._lease)
            except UNAVAILABLE as error:
                DATABASE_ERRORS.labels("renew").inc()
                log.warning("database.unavailable", operation="renew", reason=type(error).__name__)
                continue
            for email_id in kept:
                held[email_id].until = began + self._lease.total_seconds()

    async def _patiently(self, operation: str, call: Callable[..., Awaitable[T]], *arguments: object) -> T:
        return await patiently(operation, lambda: call(*arguments), self._error_interval)


CALL_FAILED = Result(Outcome.UNCERTAIN, Scope.MESSAGE, "the provider's call failed inside the worker")

SUPPRESSED = Verdict(Status.SUPPRESSED, EventType.DROPPED, "on the suppression list")

UNTOUCHED = Decision(QueueState.QUEUED, timedelta(), 0, ())
"""Back to the queue as it was: the attempt's commit is unknown, and nothing was sent."""


def _windows(claims: Sequence[Claim], provider: Provider) -> Iterator[list[Claim]]:
    """Cut a claim into windows, more urgent lanes first, each what one call of the provider takes: after a crash no more than
    one call's messages are uncertain. A suspect goes alone, so that it can harm no other."""
    ordered = sorted(claims, key=lambda claimed: claimed.lane)
    for claimed in ordered:
        if claimed.suspect:
            yield [claimed]
    calm = {claimed.message.id: claimed for claimed in ordered if not claimed.suspect}
    for call in provider.calls([claimed.message for claimed in calm.values()]):
        yield [calm[message.id] for message in call]


def _drain(windows: asyncio.Queue[list[Claim]]) -> Iterator[list[Claim]]:
    while not windows.empty():
        yield windows.get_nowait()
