"""The states of messages and recipients, their ranks and transitions. Nothing else decides on a status.

The database's types `recipient_status`, `queue_state` and `event_type`, the API's schema and the metrics' labels are
made from the enumerations here; a test compares them. The order of `Status` is its rank: provider events arrive late,
twice and out of order, and a status only ever follows an event of higher rank.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from .providers.base import NOT_STARTED, Outcome, Result, Scope


class Status(enum.StrEnum):
    """What became of one recipient, lowest rank first."""

    QUEUED = "queued"
    DEFERRED = "deferred"
    UNCERTAIN = "uncertain"
    SENT = "sent"
    DELIVERED = "delivered"
    CANCELLED = "cancelled"
    SUPPRESSED = "suppressed"
    EXPIRED = "expired"
    FAILED = "failed"
    BOUNCED = "bounced"
    COMPLAINED = "complained"

    @property
    def open(self) -> bool:
        """Still to be addressed by an attempt."""
        return self in {Status.QUEUED, Status.DEFERRED, Status.UNCERTAIN}


class QueueState(enum.StrEnum):
    """Where an unfinished message stands in `email_queue`; a finished one has no row there."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    LEASED = "leased"
    UNCERTAIN = "uncertain"


class EventType(enum.StrEnum):
    """What happened to a recipient: our own attempts, and what providers report (the guide's names)."""

    SENT = "sent"
    DEFERRED = "deferred"
    UNCERTAIN = "uncertain"
    FAILED = "failed"
    BOUNCE = "bounce"
    DROPPED = "dropped"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DUPLICATE = "duplicate"
    DELIVERED = "delivered"
    OPEN = "open"
    CLICK = "click"
    SPAM_REPORT = "spam_report"
    UNSUBSCRIBE = "unsubscribe"


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often and how late a refused message is tried again (`EMAIL_RETRY_*`, `EMAIL_WORKER_MAX_RETRIES`)."""

    delay: timedelta
    max_delay: timedelta
    base: float
    max_retries: int
    error_interval: timedelta
    uncertain_wait: timedelta

    def after(self, tries: int, jitter: float) -> timedelta:
        """The wait after refusal number `tries` (from 1); `jitter` in [0, 1) takes off up to a fifth."""
        steps = min(tries - 1, 64)
        full = min(self.delay.total_seconds() * self.base**steps, self.max_delay.total_seconds())
        return timedelta(seconds=full * (1 - 0.2 * jitter))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt's results make of one recipient."""

    status: Status
    event: EventType
    response: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What an attempt's results make of the message: `state` None is done, else it is due again after `delay`."""

    state: QueueState | None
    delay: timedelta
    tries: int
    recipients: tuple[Verdict, ...]


def decide(results: Sequence[Result], tries: int, backoff: Backoff, jitter: float) -> Decision:
    """Turn the results of one attempt, one an open recipient, into the next state of the message.

    `tries` counts the refusals of this message so far, attempts without an answer among them. Only answers about the
    message or its recipients add to it; a lost connection or a provider that closed down (`Scope.CONNECTION`) is
    nobody's refusal. A message whose turn never came is as it was, with no verdict on anyone.
    """
    if all(result is NOT_STARTED for result in results):
        return Decision(QueueState.QUEUED, timedelta(), tries, ())
    refused = any(result.outcome is Outcome.DEFERRED and result.scope is not Scope.CONNECTION for result in results)
    uncertain = any(result.outcome is Outcome.UNCERTAIN for result in results)
    tries += refused or uncertain
    exhausted = refused and tries > backoff.max_retries
    verdicts = tuple(_verdict(result, exhausted) for result in results)
    statuses = {verdict.status for verdict in verdicts}
    if uncertain:
        wait = max(backoff.uncertain_wait, backoff.after(tries, jitter))
        return Decision(QueueState.UNCERTAIN, wait, tries, verdicts)
    if Status.DEFERRED in statuses:
        delay = backoff.after(tries, jitter) if refused else backoff.error_interval
        return Decision(QueueState.SCHEDULED, delay, tries, verdicts)
    return Decision(None, timedelta(), tries, verdicts)


def _verdict(result: Result, exhausted: bool) -> Verdict:
    about_recipient = result.scope is Scope.RECIPIENT
    match result.outcome:
        case Outcome.TAKEN:
            return Verdict(Status.SENT, EventType.SENT, result.response)
        case Outcome.REFUSED if about_recipient:
            return Verdict(Status.BOUNCED, EventType.BOUNCE, result.response)
        case Outcome.REFUSED:
            return Verdict(Status.FAILED, EventType.FAILED, result.response)
        case Outcome.UNCERTAIN:
            return Verdict(Status.UNCERTAIN, EventType.UNCERTAIN, result.response)
        case Outcome.DEFERRED if exhausted and result.scope is not Scope.CONNECTION:
            return Verdict(Status.FAILED, EventType.FAILED, f"given up after the last retry: {result.response}")
        case Outcome.DEFERRED:
            return Verdict(Status.DEFERRED, EventType.DEFERRED, result.response)
