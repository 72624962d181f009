"""What provider events do to messages: proof that ends uncertainty, whenever and however often it comes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from neoforge_email import db, outbox
from neoforge_email.db import Pool
from neoforge_email.inbound import Event
from neoforge_email.lifecycle import Backoff, EventType, Status, after, decide, implied
from neoforge_email.message import Draft, Kind, Mailbox
from neoforge_email.outbox import Attempt, Claim, Completion, Intake, Recorded, Turn
from neoforge_email.providers.base import Outcome, Result, Scope
from neoforge_email.settings import Settings
from tests.support import Database

BACKOFF = Backoff(
    delay=timedelta(0),
    max_delay=timedelta(0),
    base=1,
    max_retries=3,
    error_interval=timedelta(0),
    uncertain_wait=None,
)
LEASE = timedelta(seconds=60)
REPORTED = [
    event
    for event in EventType
    if event
    in {
        EventType(name)
        for name in (
            "sent",
            "deferred",
            "dropped",
            "delivered",
            "open",
            "click",
            "unsubscribe",
            "bounce",
            "spam_report",
        )
    }
]


class Way:
    """One message on its way by hand: every step that a worker takes, when the test says so."""

    def __init__(self, intake: Intake, api: Pool, worker: Pool, superuser: db.Connection) -> None:
        self.intake = intake
        self.api = api
        self.worker = worker
        self.superuser = superuser

    async def accept(self, *recipients: str, on_uncertain: Any = "resend") -> None:
        await self.intake.accept(
            Draft(
                user_id=1,
                lane=2,
                sender=Mailbox("shop@example.com"),
                reply_to=None,
                subject="Your order",
                headers={},
                tags=[],
                metadata={},
                html=None,
                text="It has left.",
                recipients=[(Kind.TO, Mailbox(recipient)) for recipient in recipients or ("ada@example.net",)],
                idempotency_key=None,
                body_hash=b"",
                on_uncertain=on_uncertain,
            )
        )

    async def attempt(self) -> Claim:
        [claimed] = await outbox.claim(self.worker, "w", 10, LEASE, Turn())
        attempt = Attempt(claimed.message, "sendgrid", timedelta(seconds=1))
        assert await outbox.attempt(self.worker, [attempt]) == {claimed.message.id}
        return claimed

    async def answer(
        self, claimed: Claim, outcome: Outcome, provider_message_id: str | None = None
    ) -> tuple[set[Any], set[Any]]:
        results = [Result(outcome, Scope.MESSAGE, "words") for _ in claimed.message.open_recipients]
        decision = decide(results, claimed.tries, BACKOFF, 0, reports=False)
        recipients = claimed.message.open_recipients
        ids = (provider_message_id,) * len(recipients)
        completion = Completion(claimed.message, decision, recipients, datetime.now(UTC), "sendgrid", ids)
        return await outbox.complete(self.worker, [completion])

    async def lose(self, *, waits: bool = False) -> None:
        """The worker dies, and its lease is swept; `waits`: an event may still settle it, else its policy decides at once."""
        await outbox.sweep(self.worker, BACKOFF, ["sendgrid"] if waits else [], owner="w")

    async def sweep(self) -> None:
        await outbox.sweep(self.worker, BACKOFF, ["sendgrid"])

    async def report(self, *events: Event) -> Recorded:
        async with self.worker.acquire() as connection, connection.transaction():
            return await outbox.record_events(connection, events)  # type: ignore[arg-type]

    async def statuses(self) -> list[str]:
        return [
            row[0]
            for row in await self.superuser.fetch("select status::text from email_tracking order by email_id, id")
        ]

    async def state(self) -> str | None:
        state: str | None = await self.superuser.fetchval("select state::text from email_queue")
        return state

    async def events(self, kind: EventType) -> int:
        return int(await self.superuser.fetchval("select count(*) from email_events where type::text = $1", kind.value))


def an_event(claimed: Claim, kind: EventType = EventType.DELIVERED, recipient: int = 0, **changes: Any) -> Event:
    event = Event(
        provider="sendgrid",
        event_id=uuid4().hex,
        type=kind,
        occurred_at=datetime.now(UTC),
        recipient=claimed.message.recipients[recipient].mailbox.address,
        attempt=claimed.message.attempt,
    )
    return replace(event, **changes)


@pytest.fixture
async def way(database: Database, settings: Settings, worker_settings: Settings) -> AsyncIterator[Way]:
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop')")
    async with (
        await db.create_pool(settings, settings.database_url, "test-api") as api,
        await db.create_pool(worker_settings, worker_settings.database_url, "test-worker") as worker,
    ):
        intake = Intake(api, expire_after=timedelta(hours=24), on_commit=lambda: None)
        await intake.start()
        yield Way(intake, api, worker, superuser)
        await intake.close()
    await superuser.close()


async def test_an_event_that_carries_the_attempt_settles_what_a_crash_left_open(way: Way) -> None:
    await way.accept()
    claimed = await way.attempt()
    await way.lose(waits=True)
    assert (await way.state(), await way.statuses()) == ("uncertain", ["uncertain"])
    recorded = await way.report(an_event(claimed))
    assert recorded == Recorded([True], set())
    assert (await way.state(), await way.statuses()) == (None, ["delivered"])
    assert await way.events(EventType.DUPLICATE) == 0


async def test_an_uncertain_message_waits_for_an_event_where_its_provider_sends_any(way: Way) -> None:
    await way.accept()
    await way.attempt()
    await way.lose(waits=True)
    await way.sweep()
    assert await way.state() == "uncertain"
    due = await way.superuser.fetchval("select due - now() from email_queue")
    assert timedelta(seconds=290) < due <= timedelta(seconds=300)


async def test_a_deferral_by_the_provider_proves_that_it_took_the_message(way: Way) -> None:
    await way.accept()
    claimed = await way.attempt()
    await way.lose()
    await way.report(an_event(claimed, EventType.DEFERRED))
    assert (await way.state(), await way.statuses()) == (None, ["sent"])


async def test_with_policy_hold_an_uncertain_message_is_held_until_an_operator_or_an_event_decides(way: Way) -> None:
    for decide_it in ("event", "resend", "confirm"):
        await way.accept(on_uncertain="hold")
        claimed = await way.attempt()
        await way.lose()
        await way.sweep()
        assert await way.state() == "held"
        assert await outbox.claim(way.worker, "w", 10, LEASE, Turn()) == []
        if decide_it == "event":
            await way.report(an_event(claimed))
        elif decide_it == "confirm":
            assert await way.superuser.fetchval("select confirm($1)", [claimed.message.id]) == claimed.message.id
        else:
            assert await way.superuser.fetchval("select resend($1)", [claimed.message.id]) == claimed.message.id
            await way.answer(await way.attempt(), Outcome.TAKEN)
        assert await way.state() is None
    assert sorted(await way.statuses()) == ["delivered", "sent", "sent"]


async def test_what_was_never_attempted_cannot_be_confirmed(way: Way) -> None:
    await way.accept()
    claims = await outbox.claim(way.worker, "w", 10, LEASE, Turn())
    message = claims[0].message
    assert await way.worker.fetchval("select hold($1, $2, 'tests')", [message.id], [message.lease_no]) == message.id
    assert await way.superuser.fetchval("select confirm($1)", [message.id]) is None
    assert await way.state() == "held"


@pytest.mark.parametrize("first", ["event", "own"])
async def test_a_late_proof_after_a_resend_marks_the_message_as_sent_twice_once(way: Way, first: str) -> None:
    await way.accept()
    lost = await way.attempt()
    await way.lose()
    again = await way.attempt()
    await way.answer(again, Outcome.TAKEN)
    if first == "event":
        recorded = await way.report(an_event(lost))
        assert recorded.twice == {lost.message.id}
        assert (await way.answer(lost, Outcome.TAKEN))[1] == set()
    else:
        assert (await way.answer(lost, Outcome.TAKEN))[1] == {lost.message.id}
        assert (await way.report(an_event(lost))).twice == set()
    assert await way.events(EventType.DUPLICATE) == 1


async def test_an_event_that_comes_while_the_resend_is_under_way_makes_the_resend_the_duplicate(way: Way) -> None:
    await way.accept()
    lost = await way.attempt()
    await way.lose()
    again = await way.attempt()
    assert (await way.report(an_event(lost))).twice == set()
    assert await way.state() == "leased"
    _, twice = await way.answer(again, Outcome.TAKEN)
    assert twice == {lost.message.id}
    assert (await way.state(), await way.statuses()) == (None, ["delivered"])


async def test_an_event_that_comes_before_the_resend_began_takes_it_back(way: Way) -> None:
    await way.accept()
    lost = await way.attempt()
    await way.lose()
    [claimed] = await outbox.claim(way.worker, "w", 10, LEASE, Turn())
    await way.report(an_event(lost))
    attempt = Attempt(claimed.message, "sendgrid", timedelta(seconds=1))
    assert await outbox.attempt(way.worker, [attempt]) == set()
    assert (await way.state(), await way.statuses()) == (None, ["delivered"])


async def test_an_event_before_the_answer_of_its_own_attempt_is_no_duplicate(way: Way) -> None:
    await way.accept()
    claimed = await way.attempt()
    await way.report(an_event(claimed, EventType.BOUNCE))
    won, twice = await way.answer(claimed, Outcome.TAKEN)
    assert (won, twice) == ({claimed.message.id}, set())
    assert (await way.state(), await way.statuses()) == (None, ["bounced"])


async def test_an_event_settles_its_recipient_and_leaves_the_others_open(way: Way) -> None:
    await way.accept("ada@example.net", "bob@example.net")
    claimed = await way.attempt()
    await way.lose(waits=True)
    await way.report(an_event(claimed, recipient=1))
    assert await way.state() == "uncertain"
    statuses = await way.statuses()
    assert sorted(statuses) == ["delivered", "uncertain"]
    await way.report(an_event(claimed, recipient=0))
    assert (await way.state(), await way.statuses()) == (None, ["delivered", "delivered"])


async def test_a_late_proof_outranks_a_failure_of_our_own(way: Way) -> None:
    await way.accept()
    lost = await way.attempt()
    await way.lose()
    await way.answer(await way.attempt(), Outcome.REFUSED)
    assert await way.statuses() == ["failed"]
    await way.answer(lost, Outcome.TAKEN)
    assert await way.statuses() == ["sent"]


async def test_an_event_finds_its_message_by_the_providers_own_id_once_that_is_known(way: Way) -> None:
    await way.accept("ada@example.net", "bob@example.net")
    claimed = await way.attempt()
    early = an_event(claimed, attempt=None, provider_message_id="abc")
    assert (await way.report(early)).matched == [False]
    await way.answer(claimed, Outcome.TAKEN, provider_message_id="abc")
    assert (await way.report(early)).matched == [True]
    assert sorted(await way.statuses()) == ["delivered", "sent"]


async def test_an_event_about_nothing_of_ours_matches_nothing(way: Way) -> None:
    await way.accept()
    claimed = await way.attempt()
    foreign = [
        an_event(claimed, attempt=f"{uuid4().hex}-1"),
        an_event(claimed, attempt="nonsense"),
        an_event(claimed, attempt=None, provider_message_id="unknown"),
        an_event(claimed, attempt=None),
    ]
    assert (await way.report(*foreign)).matched == [False] * 4
    assert await way.statuses() == ["queued"]


async def test_hard_bounces_and_complaints_suppress_the_address_for_its_user_and_nothing_else_does(way: Way) -> None:
    await way.accept("Hard@example.net", "soft@example.net", "angry@example.net", "away@example.net")
    claimed = await way.attempt()
    await way.answer(claimed, Outcome.TAKEN)
    by_address = {r.mailbox.address: n for n, r in enumerate(claimed.message.recipients)}
    await way.report(
        an_event(claimed, EventType.BOUNCE, by_address["Hard@example.net"], permanent=True),
        an_event(claimed, EventType.BOUNCE, by_address["soft@example.net"]),
        an_event(claimed, EventType.SPAM_REPORT, by_address["angry@example.net"]),
        an_event(claimed, EventType.UNSUBSCRIBE, by_address["away@example.net"]),
    )
    rows = await way.superuser.fetch("select user_id, address, reason from suppressions order by address")
    assert [tuple(row) for row in rows] == [
        (1, "angry@example.net", "spam_report"),
        (1, "hard@example.net", "bounce"),
    ]


@given(st.lists(st.sampled_from(REPORTED), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_status_is_the_same_in_whatever_order_and_however_often_events_come(
    events: list[EventType], random_: random.Random
) -> None:
    shuffled = events * 2
    random_.shuffle(shuffled)

    def last(order: Sequence[EventType]) -> Status:
        status = Status.SENT
        for event in order:
            lower, status = status, after(status, event)
            assert max(list(Status).index(lower), list(Status).index(implied(event))) == list(Status).index(status)
        return status

    assert last(events) == last(shuffled)


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_the_database_follows_the_lifecycle_for_random_late_and_repeated_events(way: Way, data: Any) -> None:
    await way.superuser.execute("truncate email_messages, email_tracking, email_queue, email_events, suppressions")
    await way.accept()
    claimed = await way.attempt()
    events = data.draw(st.lists(st.sampled_from(REPORTED), min_size=1, max_size=6))
    answered_at = data.draw(st.integers(0, len(events)))
    lost = data.draw(st.booleans())
    if lost:
        await way.lose(waits=True)
    expected = Status.UNCERTAIN if lost else Status.QUEUED
    for number, event in enumerate(events):
        if number == answered_at:
            await way.answer(claimed, Outcome.TAKEN)
            expected = after(expected, EventType.SENT)
        await way.report(*(an_event(claimed, event) for _ in range(data.draw(st.integers(1, 2)))))
        expected = after(expected, event)
    if answered_at == len(events):
        await way.answer(claimed, Outcome.TAKEN)
        expected = after(expected, EventType.SENT)
    assert await way.statuses() == [expected.value]
    assert await way.state() is None
    assert await way.events(EventType.DUPLICATE) == 0


async def test_the_database_reads_the_time_of_acceptance_out_of_an_id_as_we_do(way: Way) -> None:
    for milliseconds in (0, 1, 999, 1_772_368_215_250, 1_900_000_000_001, 4_102_444_799_999):
        email_id = outbox.uuid7(milliseconds)
        assert await way.superuser.fetchval("select accepted_at($1)", email_id) == outbox.created_at(email_id)
