"""Why a message has not moved, and what will happen next: one sentence for every state that a message can be in.

`explain` is a function of a `Situation` alone; `records.py` reads one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from .lifecycle import QueueState, Status


@dataclass(frozen=True, slots=True)
class Operator:
    """What only an operator may know: how many messages are due before this one in its lane, how many workers listen to
    the doorbell (None: Redis does not say), and which instance holds the lease."""

    ahead: int
    workers: int | None
    owner: str | None


@dataclass(frozen=True, slots=True)
class Situation:
    """A message as it stands at `now`. Columns of `email_queue` are None where it has no row there.

    `answer` is the last answer about a recipient that is still open, and `provider` whose it was. `suppressed` counts open
    recipients on the suppression list. `confirmable`: an attempt ended without an answer. `operator` None is for the
    message's user.
    """

    id: UUID
    now: datetime
    known: bool = True
    recipients: Mapping[Status, int] | None = None
    suppressed: int = 0
    answer: str | None = None
    provider: str | None = None
    confirmable: bool = False
    state: QueueState | None = None
    since: datetime | None = None
    due: datetime | None = None
    expires_at: datetime | None = None
    tries: int = 0
    max_retries: int = 3
    holds: bool = False
    held_reason: str | None = None
    attempt: int = 0
    attempt_at: datetime | None = None
    attempt_provider: str | None = None
    lease_until: datetime | None = None
    operator: Operator | None = None

    @property
    def open(self) -> int:
        """Recipients that are still to be sent to."""
        return sum(count for status, count in (self.recipients or {}).items() if status.open)


_ID = re.compile(
    r"<?(?:[^@\s<>]*\+)?([0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12})(?:-[0-9]{1,9})?(?:@[^@\s<>]+)?>?"
)


def parse_id(text: str) -> UUID | None:
    """The message that an id, its hex digits, an attempt's id, a Message-ID or a bounce's return path names."""
    match = _ID.fullmatch(text.strip().lower())
    return UUID(match[1]) if match else None


_LOCAL_PART = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s<>@",:;()]+)@(?=[A-Za-z0-9\[])')


def discreet(text: str) -> str:
    """The text with the local part of every address left out: whoever is on call needs the domain at most."""
    return _LOCAL_PART.sub("…@", text)


def explain(it: Situation) -> str:
    """One sentence, without a line break, that ends with a full stop."""
    if not it.known:
        return _sentence(
            f"There is no message {it.id}: none was accepted under this id, or it is older than what is kept"
        )
    if it.state is None:
        return _sentence(_finished(it))
    if not it.open:
        return _sentence(f"{_capital(_counted(it))}, and the message leaves the queue when a worker next takes it up")
    said = {
        QueueState.QUEUED: _queued,
        QueueState.SCHEDULED: _scheduled,
        QueueState.LEASED: _leased,
        QueueState.UNCERTAIN: _uncertain,
        QueueState.HELD: _held,
    }[it.state](it)
    if it.suppressed:
        said += (
            f"; {it.suppressed} of {_recipients(it.open)} still open will not be sent to, being on the suppression list"
        )
    return _sentence(said)


def _finished(it: Situation) -> str:
    if not it.recipients:
        return "Nothing will ever be sent: the message has no recipients, which no rule mends"
    if it.open:
        return (
            f"Stuck: {it.open} of {_recipients(sum(it.recipients.values()))} still to be sent to, but the message is not in the"
            f" queue, and no rule will put it there again{'; `neoforge reconcile` reports it' if it.operator else ''}"
        )
    return f"Done: {_counted(it)}; only a provider's event can still change that"


def _queued(it: Situation) -> str:
    said = f"Waiting for a worker for {_span(it, it.since)}"
    if it.tries:
        said += f" after it was {_refusals(it)}"
    if it.operator:
        said += f", with {_messages(it.operator.ahead)} due before it in its lane"
    if it.expires_at is not None and it.expires_at <= it.now:
        return f"{said}; it expired {_span(it, it.expires_at)} ago and is ended within a minute if a worker runs"
    if it.operator is None:
        said += ", and sent as soon as one is free"
    elif it.operator.workers is None:
        said += "; Redis does not answer, so nobody knows whether workers listen"
    elif it.operator.workers == 0:
        said += "; no worker listens, so nothing moves until one is started"
    else:
        listen = "1 worker listens" if it.operator.workers == 1 else f"{it.operator.workers} workers listen"
        said += f"; {listen}, and one that can reach its provider takes up what is due within a second"
    return f"{said}; {_expiry(it)}"


def _scheduled(it: Situation) -> str:
    if it.tries:
        said = _capital(_refusals(it))
    elif it.answer:
        said = f"Put off by {_provider(it)}, which counts as no refusal"
    else:
        said = "Put off before any attempt"
    if it.due is not None and it.expires_at is not None and max(it.due, it.now) >= it.expires_at:
        return f"{said}; no further attempt is due before it expires {_until(it, it.expires_at)}"
    if it.due is not None and it.due <= it.now:
        return f"{said}; the next attempt has been due for {_span(it, it.due)} and begins when a worker runs; {_expiry(it)}"
    return f"{said}; the next attempt is due {_until(it, it.due)} and {_expiry(it)}"


def _leased(it: Situation) -> str:
    worker = f"worker {it.operator.owner or 'without a name'}" if it.operator else "a worker"
    said = f"Held by {worker} for {_span(it, it.since)}"
    attempt = f"attempt {it.attempt} with {it.attempt_provider or 'its provider'} began"
    if it.lease_until is None:
        return f"{said} on a lease without an end, so only that worker's answer or its restart moves it"
    if it.lease_until > it.now:
        said += f", on a lease that lasts {_span(it, it.lease_until)} more unless renewed"
        if it.attempt_at is None:
            return f"{said}; it has not begun to send it"
        return f"{said}; {attempt} {_span(it, it.attempt_at)} ago, and its answer decides"
    said += f", whose lease ran out {_span(it, it.lease_until)} ago"
    if it.attempt_at is None:
        return f"{said}, before an attempt began; the next sweep of any worker gives it to another"
    return f"{said}, after {attempt}; the next sweep of any worker makes it uncertain"


def _uncertain(it: Situation) -> str:
    said = (
        f"Attempt {it.attempt} with {it.attempt_provider or 'its provider'} ended {_span(it, it.since)} ago without an answer,"
        " so it may have been sent"
    )
    if it.holds:
        then = "an operator has to decide, as its policy is to hold"
    elif it.tries > it.max_retries:
        then = "an operator has to decide, as no attempt got an answer"
    else:
        then = "it is sent again with the same Message-ID, as its policy is to resend"
    if it.due is not None and it.due > it.now:
        return f"{said}; it waits {_span(it, it.due)} more for an event of the provider, and then {then}"
    return f"{said}; no event came in time, and when a worker runs {then}"


def _held(it: Situation) -> str:
    said = f"Held for {_span(it, it.since)} until an operator decides ({_short(it.held_reason or 'nobody wrote down why')})"
    if it.operator is None:
        return f"{said}; an event of the provider would still settle it"
    said += f"; `neoforge uncertain resend {it.id}` sends it"
    if it.confirmable:
        return f"{said} again and `neoforge uncertain confirm {it.id}` says that it arrived"
    return f"{said}, as no attempt can have been taken"


def _refusals(it: Situation) -> str:
    times = "once" if it.tries == 1 else f"{it.tries} times"
    return f"deferred {times}, last by {_provider(it)}"


def _provider(it: Situation) -> str:
    name = it.provider or it.attempt_provider or "its provider"
    return f"{name} ({_short(it.answer)})" if it.answer else name


def _counted(it: Situation) -> str:
    return ", ".join(f"{count} {status.value}" for status, count in sorted((it.recipients or {}).items()) if count)


def _expiry(it: Situation) -> str:
    return f"the message expires {_until(it, it.expires_at)}"


def _until(it: Situation, at: datetime | None) -> str:
    if at is not None and at <= it.now:
        return "now"
    return f"in {_span(it, at)}"


def _recipients(count: int) -> str:
    return "1 recipient" if count == 1 else f"{count} recipients"


def _messages(count: int) -> str:
    if count > MANY:
        return f"more than {MANY} messages"
    return {0: "no message", 1: "1 message"}.get(count, f"{count} messages")


MANY = 10_000
"""How many messages before one are counted at most."""


def _span(it: Situation, at: datetime | None) -> str:
    """The time between then and now, rounded down, in the largest unit of which there are two."""
    if at is None:
        return "an unknown time"
    seconds = abs(at - it.now) // timedelta(seconds=1)
    for unit, size in UNITS:
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}s"
    return "1 second" if seconds == 1 else "less than a second"


UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def _short(words: str) -> str:
    """Foreign words, cut where they are long."""
    return words if len(words) <= MOST else f"{words[: MOST - 1]}…"


MOST = 200


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _sentence(words: str) -> str:
    """One line, whatever foreign words are in it."""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split()) + "."
