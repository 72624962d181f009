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
    """What became of one recipient, lowest rank first: what we know ourselves gives way to what a provider knows."""

    QUEUED = "queued"
    DEFERRED = "deferred"
    UNCERTAIN = "uncertain"
    CANCELLED = "cancelled"
    SUPPRESSED = "suppressed"
    EXPIRED = "expired"
    FAILED = "failed"  # no provider took it
    SENT = "sent"
    DROPPED = "dropped"  # a provider took it and gave it up without trying
    DELIVERED = "delivered"
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
    HELD = "held"  # waits for an operator


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
    HELD = "held"
    RELEASED = "released"


_PROVEN = {
    EventType.SENT: Status.SENT,
    EventType.DEFERRED: Status.SENT,
    EventType.DROPPED: Status.DROPPED,
    EventType.DELIVERED: Status.DELIVERED,
    EventType.OPEN: Status.DELIVERED,
    EventType.CLICK: Status.DELIVERED,
    EventType.UNSUBSCRIBE: Status.DELIVERED,
    EventType.BOUNCE: Status.BOUNCED,
    EventType.SPAM_REPORT: Status.COMPLAINED,
}
_RANK = {status: rank for rank, status in enumerate(Status)}


def implied(event: EventType) -> Status:
    """What a provider's event proves at least, whichever other events are still on their way.

    That a provider defers a recipient proves that it took it. KeyError for what only we ourselves can say.
    """
    return _PROVEN[event]


def after(status: Status, event: EventType) -> Status:
    """The status of a recipient once a provider's event is known: it never falls in rank."""
    return max(status, implied(event), key=_RANK.__getitem__)


def suppresses(event: EventType, permanent: bool) -> bool:
    """Whether nothing more may be sent to the recipient: it complained, or its address is known not to exist."""
    return event is EventType.SPAM_REPORT or (event is EventType.BOUNCE and permanent)


UNCERTAIN_WAIT = timedelta(seconds=300)
"""How long an uncertain message waits for an event, where its provider sends any."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often and how late a refused message is tried again (`EMAIL_RETRY_*`, `EMAIL_WORKER_MAX_RETRIES`)."""

    delay: timedelta
    max_delay: timedelta
    base: float
    max_retries: int
    error_interval: timedelta
    uncertain_wait: timedelta | None

    def after(self, tries: int, jitter: float) -> timedelta:
        """The wait after refusal number `tries` (from 1); `jitter` in [0, 1) takes off up to a fifth."""
        steps = min(tries - 1, 64)
        full = min(self.delay.total_seconds() * self.base**steps, self.max_delay.total_seconds())
        return timedelta(seconds=full * (1 - 0.2 * jitter))

    def wait_for_event(self, reports: bool) -> timedelta:
        """How long an uncertain message waits for an event to settle it; `reports`: its provider sends events."""
        if self.uncertain_wait is not None:
            return self.uncertain_wait
        return UNCERTAIN_WAIT if reports else timedelta()


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


def decide(results: Sequence[Result], tries: int, backoff: Backoff, jitter: float, *, reports: bool) -> Decision:
    """Turn the results of one attempt, one an open recipient, into the next state of the message.

    `reports`: the provider of the attempt sends events, one of which may settle what is uncertain.

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
        wait = max(backoff.wait_for_event(reports), backoff.after(tries, jitter))
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
