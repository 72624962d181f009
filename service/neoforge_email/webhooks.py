"""The sender of customers' webhooks: from the outbox to their endpoints, signed, in order and until they are taken.

    trigger on email_events ─► webhook_deliveries ─► claim, leased ─► egress ─► complete, committed in batches

What is recorded about a recipient is in the outbox by the same transaction (`webhooks.sql`), so nothing is lost whoever dies;
what a killed sender had begun is sent again under the same `webhook-id` once its lease has run out. Signatures follow
Standard Webhooks (https://www.standardwebhooks.com). Secrets stand in the database in clear, because HMAC needs them so; none
of them goes into a log, a metric, an error or an answer but the one that creates it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import structlog
from standardwebhooks import Webhook

from .db import Connection, Pool
from .egress import Answer, Egress
from .observability import WEBHOOK_DELIVERIES, WEBHOOK_DELIVERY, WEBHOOK_IN_FLIGHT
from .patience import patiently
from .settings import Settings

log = structlog.get_logger()

IN_FLIGHT = 256  # deliveries that a sender holds at a time
IN_FLIGHT_EACH = 8  # deliveries to one endpoint at a time, over all senders
RESERVE = 64  # of a sender's places; of these an endpoint gets one, so that many slow ones leave room for the others
FAILING = 4  # failures in a row, from which on an endpoint gets one delivery at a time, and that less and less often
LIFE = timedelta(
    hours=72
)  # from its first failure on a delivery is tried; an endpoint that takes nothing for as long is disabled
SWEPT = 10_000  # deliveries that one sweep buries at most, so that it is short
LEASE_MARGIN = timedelta(seconds=30)  # a lease outlasts its call by that, for its outcome to be committed
DELIVERED_KEPT = timedelta(days=30)
DEAD_KEPT = timedelta(days=90)

RETRIES = (timedelta(seconds=5), timedelta(minutes=1), timedelta(minutes=5))
PAUSES = (timedelta(minutes=15), timedelta(minutes=30), timedelta(hours=1), timedelta(hours=2), timedelta(hours=4))
RETRY_AFTER = PAUSES[-1]  # an endpoint that asks for more is tried after that
THROTTLED = {429, 502, 503, 504}  # an answer with these may say when to come again
GONE = 410


def wait(tries: int, retries: int, jitter: float) -> timedelta:
    """How long after its failed try number `tries` (from 1) a delivery is due again: the published schedule.

    Within a round there are `retries` retries, after 5 s, 1 min, 5 min and then each 5 min; between rounds there are 15 min,
    30 min, 1 h, 2 h, 4 h and then each 4 h. `jitter` in [0, 1) takes off up to a fifth.
    """
    rounds, step = divmod(tries - 1, retries + 1)
    full = RETRIES[min(step, len(RETRIES) - 1)] if step < retries else PAUSES[min(rounds, len(PAUSES) - 1)]
    return full * (1 - 0.2 * jitter)


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased delivery. `tries` were made before; `secrets` sign, the present one first; `body` goes out byte for byte."""

    id: UUID
    endpoint_id: UUID
    url: str
    secrets: tuple[str, ...]
    lease_no: int
    tries: int
    created_at: datetime
    body: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call. `due` is after what time a failed delivery is tried again, `pause` how long its endpoint rests."""

    claim: Claim
    answer: Answer
    due: timedelta
    pause: timedelta | None

    @property
    def ok(self) -> bool:
        return self.answer.status is not None and 200 <= self.answer.status < 300


def webhook_id(delivery_id: UUID) -> str:
    """What consumers know a delivery by, the same in every try."""
    return f"msg_{delivery_id.hex}"


def signed(claim: Claim, now: datetime) -> dict[str, str]:
    """The headers that make a body a Standard Webhook, with a signature by every secret that is valid.

    Raises ValueError where there is none: nothing goes out unsigned.
    """
    if not claim.secrets:
        raise ValueError("the endpoint has no secret")
    name = webhook_id(claim.id)
    return {
        "Content-Type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(name, now, claim.body) for secret in claim.secrets),
    }


class Sender:
    """Delivers what is due until it is stopped; a `Loop` of the worker. `run` ends with an error if any part of it does."""

    def __init__(self, pool: Pool, settings: Settings, egress: Egress | None = None) -> None:
        self._pool = pool
        self._owner = settings.instance
        self._retries = settings.webhook_max_retries
        self._lease = settings.webhook_timeout + LEASE_MARGIN
        self._interval = settings.email_worker_interval.total_seconds()
        self._error_interval = settings.email_worker_error_interval.total_seconds()
        self._egress = egress or Egress.of(settings)
        self._held = 0
        self._looked_in_vain = 0.0
        self._outcomes: list[Outcome] = []
        self._wake = asyncio.Event()
        self._outcome_waits = asyncio.Event()
        self._draining: list[asyncio.Event] = []
        self._stopping = False

    def ring(self) -> None:
        """There may be something due. The doorbell tells of messages, whose events come later, so most rings are for nothing:
        those that come soon after a look in vain are left to the timer."""
        if time.monotonic() - self._looked_in_vain > PACE:
            self._wake.set()

    def stop(self) -> None:
        """Claim nothing more; `run` returns when the calls under way are answered and recorded."""
        self._stopping = True
        self._wake.set()

    async def drained(self) -> None:
        """Wait until nothing is due and nothing is on its way."""
        drained = asyncio.Event()
        self._draining.append(drained)
        self._wake.set()
        await drained.wait()

    async def run(self) -> None:
        """Deliver until `stop`; first what this instance held when it was lost."""
        async with self._egress:
            await patiently("webhook_sweep", partial(self._sweep, self._owner), self._error_interval)
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self._complete()), tasks.create_task(self._sweep_forever())]
                await self._claim(tasks)
                while self._held:
                    await self._until_woken()
                for task in background:
                    task.cancel()

    async def _claim(self, tasks: asyncio.TaskGroup) -> None:
        """Claim whenever something was finished, somebody rang, or an interval has passed."""
        while not self._stopping:
            claims: list[Claim] = []
            before, draining = self._held, self._draining[:]
            room = IN_FLIGHT - before
            most, each = (room - RESERVE, IN_FLIGHT_EACH) if room > RESERVE else (room, 1)
            if room:
                look = partial(claim, self._pool, self._owner, most, self._lease, each)
                claims = await patiently("webhook_claim", look, self._error_interval)
            for item in claims:
                tasks.create_task(self._deliver(item))
            self._held += len(claims)
            WEBHOOK_IN_FLIGHT.set(self._held)
            if not before and not claims:  # nothing was there from the look's beginning to its end
                for drained in draining:
                    drained.set()
                    self._draining.remove(drained)
            if not claims:
                self._looked_in_vain = time.monotonic()
            if len(claims) < most:
                await self._until_woken()

    async def _until_woken(self) -> None:
        try:
            async with asyncio.timeout(self._interval):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _deliver(self, item: Claim) -> None:
        try:
            answer = await self._egress.post(item.url, item.body.encode(), signed(item, datetime.now(UTC)))
        except Exception:  # a fault of our own must not stop what goes to others
            log.exception("webhook.call_failed", endpoint_id=str(item.endpoint_id), id=webhook_id(item.id))
            answer = Answer(None, "the call failed inside the sender")
        pause = None
        if answer.status in THROTTLED and answer.retry_after:
            pause = min(answer.retry_after, RETRY_AFTER)
        jitter = random.random()  # noqa: S311 - not a secret
        due = max(wait(item.tries + 1, self._retries, jitter), pause or timedelta())
        self._outcomes.append(Outcome(item, answer, due, pause))
        self._outcome_waits.set()

    async def _complete(self) -> None:
        """Commit the outcomes of all that wait, for as long as it takes the database to answer."""
        while True:
            await self._outcome_waits.wait()
            self._outcome_waits.clear()
            batch, self._outcomes = self._outcomes, []
            record = partial(complete, self._pool, batch)
            states = await patiently("webhook_complete", record, self._error_interval)
            for outcome in batch:
                state = states.get(outcome.claim.id, "late")
                WEBHOOK_DELIVERIES.labels("retried" if state == "pending" else state).inc()
                if state == "delivered":
                    WEBHOOK_DELIVERY.observe(max((datetime.now(UTC) - outcome.claim.created_at).total_seconds(), 0.0))
                elif state == "dead":
                    log.warning(
                        "webhook.dead", endpoint_id=str(outcome.claim.endpoint_id), id=webhook_id(outcome.claim.id)
                    )
            self._held -= len(batch)
            WEBHOOK_IN_FLIGHT.set(self._held)
            self._wake.set()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await patiently("webhook_sweep", partial(self._sweep, None), self._error_interval)

    async def _sweep(self, owner: str | None) -> None:
        lapsed, buried = await sweep(self._pool, owner)
        if lapsed:
            log.warning("webhook.leases_lapsed", deliveries=lapsed)
            self._wake.set()
        WEBHOOK_DELIVERIES.labels("dead").inc(buried)


PACE = 0.05
"""Seconds after a claim that found nothing in which nobody is heard ringing."""


async def claim(pool: Pool, owner: str, limit: int, lease: timedelta, each: int = IN_FLIGHT_EACH) -> list[Claim]:
    """Lease up to `limit` due deliveries, in their order, and commit.

    Of a message only the first unfinished delivery to an endpoint is due; an endpoint gets `each` at a time, over all
    senders, and one that keeps failing a single one.
    """
    rows = await pool.fetch("select * from claim_webhooks($1, $2, $3, $4, $5)", owner, limit, each, FAILING, lease)
    return [
        Claim(
            id=row["id"],
            endpoint_id=row["endpoint_id"],
            url=row["url"],
            secrets=tuple(row["secrets"]),
            lease_no=row["lease_no"],
            tries=row["tries"],
            created_at=row["created_at"],
            body=row["body"],
        )
        for row in rows
    ]


async def complete(pool: Pool, outcomes: Sequence[Outcome]) -> dict[UUID, str]:
    """Record outcomes and commit. Returns the state of each delivery that was still ours: delivered, pending or dead.

    The endpoints follow: one that fails is paused, one that works again gets all that waits for it at once, one that is gone
    or took nothing for `LIFE` is disabled.
    """
    rows = await pool.fetch(
        "select id, state from complete_webhooks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        [outcome.claim.id for outcome in outcomes],
        [outcome.claim.endpoint_id for outcome in outcomes],
        [outcome.claim.lease_no for outcome in outcomes],
        [outcome.ok for outcome in outcomes],
        [outcome.answer.status == GONE for outcome in outcomes],
        [outcome.answer.status for outcome in outcomes],
        [outcome.answer.text for outcome in outcomes],
        [outcome.due for outcome in outcomes],
        [outcome.pause for outcome in outcomes],
        FAILING,
        LIFE,
    )
    return {row["id"]: row["state"] for row in rows}


async def sweep(pool: Pool, owner: str | None = None) -> tuple[int, int]:
    """Give back leases that ran out (`owner`: also those of an instance that has started again), and bury what waits for an
    endpoint that was disabled, `SWEPT` at a time; returns how many of each."""
    [row] = await pool.fetch("select * from sweep_webhooks($1, $2)", owner, SWEPT)
    return row["lapsed"], row["buried"]


async def forget(pool: Pool, *, most: int = 10_000) -> int:
    """Delete what was delivered 30 days ago, or is dead since 90, and what is left of deleted endpoints; returns how many."""
    return int(await pool.fetchval("select forget_webhooks($1, $2, $3)", DELIVERED_KEPT, DEAD_KEPT, most))


@dataclass(frozen=True, slots=True)
class WebhookStat:
    """A state of the outbox, how many deliveries are in it, and how many seconds the oldest has been there.

    `overdue` are the pending ones that only a sender has to take up: what an alert is for.
    """

    state: str
    size: int
    oldest_seconds: float


async def webhook_stats(pool: Pool | Connection) -> list[WebhookStat]:
    """The outbox by state: pending, overdue, leased, dead."""
    rows = await pool.fetch("select state, size, oldest_seconds from webhook_stats()")
    return [WebhookStat(row["state"], row["size"], row["oldest_seconds"]) for row in rows]
