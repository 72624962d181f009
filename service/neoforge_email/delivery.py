"""The delivery loop: from a claimed batch to recorded outcomes.

    claim ─► windows ─► a provider ─► attempt, committed ─► the provider's call ─► complete, committed

The claim keeps the senders supplied, each sender has one connection at a time, and attempts and completions are
committed for all that wait at that moment. A lease is renewed for as long as its message is here. Nothing is sent unless
its attempt is committed and its lease outlasts the call; what is lost with this process is found by the sweep.

A window is one call of the first provider that may take it now. If that one cannot be reached, no attempt was made, and the
next provider gets it under the same lease. If it definitely did not take a message after the attempt was committed, the message
goes back to the queue, due at once, and its next lease to another provider: an attempt's id belongs to one provider, and the
history shows both. What no provider can take waits for EMAIL_WORKER_ERROR_INTERVAL. Refusals and attempts without an answer
change no provider.

A message whose attempt may have killed a worker is a suspect. Suspects go alone and one after the other, so that the one that
kills takes no other suspect along, and whatever goes out beside it becomes a suspect but once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
)
from .outbox import Claim, Completion
from .patience import patiently
from .providers.base import Connection, Outcome, Provider, Result, Scope
from .providers.router import Router, Turn
from .settings import Settings

log = structlog.get_logger()

T = TypeVar("T")

LEASE = timedelta(seconds=60)
"""How long a claim holds its messages; renewed at a third of it. Raised where a provider's time-out asks for more."""

MOST_SUSPECTS = 100
"""How many suspects wait here for their turn; the others wait in the queue, so that they keep nobody else out."""

REMEMBERED = 10_000
"""Messages of which is remembered who declined them. One that is forgotten may be declined once more."""


@dataclass(order=True, slots=True)
class _Window:
    """Claims that make up one call; `tried` are the providers that have declined them. More urgent ones come first."""

    lane: int
    number: int
    claims: list[Claim] = field(compare=False)
    tried: frozenset[str] = field(compare=False)

    @property
    def messages(self) -> list[Message]:
        return [claimed.message for claimed in self.claims]

    def parts(self, calls: Iterable[Sequence[Message]]) -> Iterator[_Window]:
        """The window, cut into calls of its messages."""
        claims = {claimed.message.id: claimed for claimed in self.claims}
        for call in calls:
            part = [claims[message.id] for message in call]
            yield _Window(part[0].lane, self.number, part, self.tried)


@dataclass(slots=True)
class _Attempt:
    """A call that waits for its attempts to be committed; the future gives the messages that may be sent."""

    messages: list[Message]
    provider: Provider
    allowed: asyncio.Future[set[UUID]]


@dataclass(slots=True)
class _Held:
    """A lease of ours, under its attempt's id; `until` is on the monotonic clock, in seconds."""

    message: Message
    until: float


class Delivery:
    """Delivers what is due until it is stopped. `run` ends with an error if any part of the loop does."""

    def __init__(self, pool: Pool, router: Router, settings: Settings, *, lease: timedelta | None = None) -> None:
        self._pool = pool
        self._router = router
        self._name = router.routes[0].name  # the label of what is nobody's yet
        self._owner = settings.instance
        slowest = max(provider.timeout for provider in router.providers)
        self._lease = lease or max(LEASE, 2 * slowest + timedelta(seconds=10))
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
        self._reporting = [provider.name for provider in router.providers if provider.reports]
        self._turn = outbox.Turn()
        self._held: dict[str, _Held] = {}
        self._windows: asyncio.PriorityQueue[_Window] = asyncio.PriorityQueue()
        self._suspects: asyncio.PriorityQueue[_Window] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._tried: dict[UUID, frozenset[str]] = {}
        self._attempts: list[_Attempt] = []
        self._completions: list[Completion] = []
        self._committed = asyncio.Event()
        """Of the completions that wait now."""
        self._wake = asyncio.Event()
        self._attempt_waits = asyncio.Event()
        self._completion_waits = asyncio.Event()
        self._idle = asyncio.Event()
        self._stopping = False

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
            connections = max(provider.connections for provider in self._router.providers)
            senders = [tasks.create_task(self._send(), name=f"send-{number}") for number in range(connections)]
            senders.append(tasks.create_task(self._send_suspects(), name="send-suspects"))
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
            if pause := self._router.wait():
                await self._until_woken(min(pause, self._interval))
                continue
            capacity = self._router.capacity()
            free = capacity - len(self._held) + self._suspects.qsize()
            if free >= max(capacity // 2, 1):
                began = time.monotonic()
                claims = await self._patiently("claim", self._claim_once, free)
                for claimed in claims:
                    until = began + self._lease.total_seconds()
                    self._held[claimed.message.attempt] = _Held(claimed.message, until)
                EMAIL_CLAIMED.labels(self._name).inc(len(claims))
                EMAIL_IN_FLIGHT.labels(self._name).set(len(self._held))
                await self._supply(claims)
                if len(claims) >= free // 2 and claims:
                    continue
                if not self._held:
                    self._idle.set()
            await self._until_woken(self._interval)

    async def _supply(self, claims: Sequence[Claim]) -> None:
        """Cut what was claimed into calls of the provider that will most likely take them."""
        calm: dict[frozenset[str], list[Claim]] = {}
        suspects: list[Claim] = []
        for claimed in sorted(claims, key=lambda claimed: claimed.lane):
            if not claimed.message.open_recipients:
                self._record([self._settled(claimed)])
            elif claimed.suspect:
                suspects.append(claimed)
            else:
                calm.setdefault(self._tried.pop(claimed.message.id, NOBODY), []).append(claimed)
        calls = self._router.preferred().calls
        for tried, alike in calm.items():
            whole = _Window(0, 0, alike, tried)
            for window in whole.parts(calls(whole.messages)):
                window.number = next(self._numbers)
                self._windows.put_nowait(window)
        room = max(MOST_SUSPECTS - self._suspects.qsize(), 0)
        for claimed in suspects[:room]:
            tried = self._tried.pop(claimed.message.id, NOBODY)
            self._suspects.put_nowait(_Window(claimed.lane, next(self._numbers), [claimed], tried))
        if suspects[room:]:
            await self._release(_Window(0, 0, suspects[room:], NOBODY), self._error_interval)

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
        for window in (*_drain(self._windows), *_drain(self._suspects)):
            await self._release(window)

    async def _release(self, window: _Window, delay_seconds: float = 0) -> None:
        await self._patiently("release", outbox.release, self._pool, window.messages, timedelta(seconds=delay_seconds))
        self._let_go(window.messages)

    # --- send --------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        """One call after the other, each only when the outcomes of the one before it are committed: of a sender that is
        lost no more than one call is in doubt."""
        committed = NOTHING_WAITS
        while True:
            committed = await self._deliver(await self._windows.get(), self._windows, committed)

    async def _send_suspects(self) -> None:
        """The next attempt, too, waits for the outcome before it: it would be in doubt again if this one kills."""
        while True:
            committed = await self._deliver(await self._suspects.get(), self._suspects, NOTHING_WAITS)
            await committed.wait()

    async def _deliver(
        self, window: _Window, windows: asyncio.PriorityQueue[_Window], before: asyncio.Event
    ) -> asyncio.Event:
        """Send a window by the first provider that may take it now, once `before` is set; what is returned is set when its
        outcomes are committed. What goes beyond one call is put back to `windows`."""
        while not self._stopping:
            turn = await self._router.find(window.messages, window.tried)
            if turn is None:
                break
            if isinstance(turn, float):
                await asyncio.sleep(turn)
                continue
            if turn.rest:
                window, *rest = window.parts([turn.messages, *turn.rest])
                for further in rest:
                    windows.put_nowait(further)
            if committed := await self._send_window(turn, window, before):
                return committed
            window.tried |= {turn.route.name}
        await self._release(window, self._error_interval if window.tried else 0)
        return before

    async def _send_window(self, turn: Turn, window: _Window, before: asyncio.Event) -> asyncio.Event | None:
        """One call by the provider whose turn it is; None if it could not be used, and nothing was done."""
        provider, results, mine = turn.route.provider, [], []
        try:
            async with provider.connection() as connection:
                allowed = await self._attempted(window.messages, provider)
                mine = [claimed for claimed in window.claims if claimed.message.id in allowed]
                await before.wait()
                attempted_at = datetime.now(UTC)
                if mine:
                    results = await self._call(connection, provider, mine)
        except ProviderUnavailable as error:
            turn.route.unavailable(turn.era, error)
            return None
        turn.route.ended(turn.era, results)
        tried = window.tried | {provider.name}
        return self._record(
            self._judged(claimed, result, provider, attempted_at, tried)
            for claimed, result in zip(mine, results, strict=True)
        )

    async def _call(
        self, connection: Connection, provider: Provider, window: Sequence[Claim]
    ) -> list[tuple[Result, ...]]:
        """The provider's call. A fault of our own in it leaves open what was sent, and must not stop the loop."""
        try:
            return await connection.send([claimed.message for claimed in window], self._may_start(provider, window))
        except Exception:
            log.exception("provider.call_failed", provider=provider.name, messages=len(window))
            return [(CALL_FAILED,) * len(claimed.message.open_recipients) for claimed in window]

    def _may_start(self, provider: Provider, window: Sequence[Claim]) -> Callable[[], bool]:
        """A message may be started while we are not stopping and every lease of its window outlasts one call."""
        call_seconds = provider.timeout.total_seconds()
        leases = [self._held[claimed.message.attempt] for claimed in window]

        def may_start() -> bool:
            last = time.monotonic() + call_seconds
            return not self._stopping and all(lease.until > last for lease in leases)

        return may_start

    async def _attempted(self, messages: list[Message], provider: Provider) -> set[UUID]:
        waiting = _Attempt(messages, provider, asyncio.get_running_loop().create_future())
        self._attempts.append(waiting)
        self._attempt_waits.set()
        return await waiting.allowed

    async def _attempt(self) -> None:
        """Commit the attempts of all calls that wait, in one statement."""
        while True:
            await self._attempt_waits.wait()
            self._attempt_waits.clear()
            waiting, self._attempts = self._attempts, []
            attempts = [
                outbox.Attempt(message, call.provider.name, call.provider.timeout)
                for call in waiting
                for message in call.messages
            ]
            try:
                allowed = await outbox.attempt(self._pool, attempts)
            except UNAVAILABLE as error:
                # It may have been committed. Nothing was sent, and the completion says so as soon as it can.
                DATABASE_ERRORS.labels("attempt").inc()
                log.warning("database.unavailable", operation="attempt", reason=type(error).__name__)
                allowed = set()
                self._record(Completion(item.message, UNTOUCHED, (), None, None) for item in attempts)
            else:
                self._let_go(item.message for item in attempts if item.message.id not in allowed)
            for call in waiting:
                call.allowed.set_result(allowed)

    # --- complete ----------------------------------------------------------------------------------------------

    def _judged(
        self,
        claimed: Claim,
        results: tuple[Result, ...],
        provider: Provider,
        attempted_at: datetime,
        tried: frozenset[str],
    ) -> Completion:
        decision = decide(
            results,
            claimed.tries,
            self._backoff,
            random.random(),  # noqa: S311 - jitter, not a secret
            reports=provider.reports,
        )
        # Put off, and no refusal counted: the provider is to blame.
        declined = decision.state is QueueState.SCHEDULED and decision.tries == claimed.tries
        if declined and self._router.other(tried):
            decision = replace(decision, state=QueueState.QUEUED, delay=timedelta())
            self._tried[claimed.message.id] = tried
            if len(self._tried) > REMEMBERED:
                del self._tried[next(iter(self._tried))]
        recipients = claimed.message.open_recipients if decision.recipients else ()
        if any(result.outcome is Outcome.TAKEN for result in results):
            age = datetime.now(UTC) - claimed.message.created_at
            EMAIL_DELIVERY.labels(provider.name).observe(max(age.total_seconds(), 0.0))
        provider_message_ids = tuple(result.provider_message_id for result in results)[: len(recipients)]
        return self._completion(claimed, decision, recipients, attempted_at, provider.name, provider_message_ids)

    def _settled(self, claimed: Claim) -> Completion:
        """A message that needs no attempt: every recipient that was open is suppressed."""
        return self._completion(claimed, Decision(None, timedelta(), claimed.tries, ()), (), None, None)

    def _completion(
        self,
        claimed: Claim,
        decision: Decision,
        recipients: tuple[Recipient, ...],
        attempted_at: datetime | None,
        provider: str | None,
        provider_message_ids: tuple[str | None, ...] = (),
    ) -> Completion:
        """Add the suppressed recipients to what is recorded, and count it all."""
        if decision.state is not QueueState.QUEUED:
            recipients += claimed.suppressed
            decision = replace(decision, recipients=decision.recipients + (SUPPRESSED,) * len(claimed.suppressed))
        name = provider or self._name
        for verdict in decision.recipients:
            if verdict.status is Status.SENT:
                EMAILS_SENT.labels(name).inc()
            elif verdict.status is Status.DEFERRED:
                EMAILS_DEFERRED.labels(name).inc()
            elif not verdict.status.open:
                EMAILS_FAILED.labels(name, verdict.status.value).inc()
        if decision.state is QueueState.UNCERTAIN:
            EMAILS_UNCERTAIN.labels(name).inc()
        return Completion(claimed.message, decision, recipients, attempted_at, provider, provider_message_ids)

    def _record(self, completions: Iterable[Completion]) -> asyncio.Event:
        """Have them committed; what is returned is set when they are."""
        self._completions.extend(completions)
        if not self._completions:
            return NOTHING_WAITS
        self._completion_waits.set()
        return self._committed

    async def _complete(self) -> None:
        """Commit the outcomes of all that wait. They are kept and tried again for as long as the database is away."""
        while True:
            await self._completion_waits.wait()
            self._completion_waits.clear()
            batch, self._completions = self._completions, []
            committed, self._committed = self._committed, asyncio.Event()
            try:
                await self._patiently("complete", self._complete_once, batch)
            except UNSTORABLE:
                log.exception("complete.batch_failed", messages=len(batch))
                await self._complete_singly(batch)
            self._let_go(item.message for item in batch)
            committed.set()

    async def _complete_once(self, batch: Sequence[Completion]) -> None:
        won, twice = await outbox.complete(self._pool, batch)
        for item in batch if len(won) < len(batch) or twice else ():
            name = item.provider or self._name
            if item.message.id not in won:
                EMAILS_LATE.labels(name).inc()
            if item.message.id in twice:
                EMAILS_DUPLICATE.labels(name).inc()
                log.error("email.duplicate", email_id=str(item.message.id), provider=name)

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
        EMAIL_IN_FLIGHT.labels(self._name).set(len(self._held))
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
                EMAILS_UNCERTAIN.labels(self._name).inc(swept.uncertain)
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

NOBODY: frozenset[str] = frozenset()

NOTHING_WAITS = asyncio.Event()
NOTHING_WAITS.set()

UNTOUCHED = Decision(QueueState.QUEUED, timedelta(), 0, ())
"""Back to the queue as it was: the attempt's commit is unknown, and nothing was sent."""


def _drain(windows: asyncio.PriorityQueue[_Window]) -> Iterator[_Window]:
    while not windows.empty():
        yield windows.get_nowait()
