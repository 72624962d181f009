"""The way of a message through PostgreSQL: what accept, claim, attempt, complete and sweep promise."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from neoforge_email import db, outbox
from neoforge_email.db import Pool
from neoforge_email.errors import DatabaseUnavailable, IdempotencyKeyReused
from neoforge_email.lifecycle import Backoff, Decision, EventType, QueueState, Status, Verdict
from neoforge_email.message import Draft, Kind, Mailbox
from neoforge_email.outbox import Accepted, Attempt, Claim, Completion, Intake, Turn
from neoforge_email.settings import Settings
from tests.support import Database

BACKOFF = Backoff(
    delay=timedelta(seconds=60),
    max_delay=timedelta(hours=1),
    base=2,
    max_retries=3,
    error_interval=timedelta(seconds=5),
    uncertain_wait=timedelta(0),
)
LEASE = timedelta(seconds=60)
CALL = timedelta(seconds=30)


def a_draft(**changes: Any) -> Draft:
    draft = Draft(
        user_id=1,
        lane=2,
        sender=Mailbox("shop@example.com", "Shöp"),
        reply_to=None,
        subject="Your order",
        headers={"X-Order": "4711"},
        tags=["order", "first"],
        metadata={"order": 4711},
        html=None,
        text="It has left.",
        recipients=[(Kind.TO, Mailbox("ada@example.net", "Ada")), (Kind.BCC, Mailbox("audit@example.com"))],
        idempotency_key=None,
        body_hash=b"",
    )
    return replace(draft, **changes)


def attempt(claimed: Claim) -> Attempt:
    return Attempt(claimed.message, "smtp", CALL)


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[db.Connection]:
    connection = await db.connect(Database.url(database.superuser), "test")
    await connection.execute("insert into users (name) select 'user' || n from generate_series(1, 200) n")
    yield connection
    await connection.close()


@pytest.fixture
async def api(settings: Settings, superuser: db.Connection) -> AsyncIterator[Pool]:
    async with await db.create_pool(settings, settings.database_url, "test-api") as pool:
        yield pool


@pytest.fixture
async def worker(worker_settings: Settings, superuser: db.Connection) -> AsyncIterator[Pool]:
    async with await db.create_pool(worker_settings, worker_settings.database_url, "test-worker") as pool:
        yield pool


@pytest.fixture
async def intake(api: Pool) -> AsyncIterator[Intake]:
    intake = Intake(api, expire_after=timedelta(hours=24), on_commit=lambda: None)
    await intake.start()
    yield intake
    await intake.close()


async def accept(intake: Intake, *drafts: Draft) -> list[Accepted]:
    return list(await asyncio.gather(*(intake.accept(draft) for draft in drafts)))


def taken(claimed: Claim) -> Completion:
    recipients = claimed.message.open_recipients
    verdict = Verdict(Status.SENT, EventType.SENT, "250 taken")
    decision = Decision(None, timedelta(), claimed.tries, (verdict,) * len(recipients))
    return Completion(claimed.message, decision, recipients, datetime.now(UTC), "smtp")


async def statuses(superuser: db.Connection) -> list[str]:
    return [row[0] for row in await superuser.fetch("select status::text from email_tracking order by id")]


async def events(superuser: db.Connection) -> list[str]:
    return [row[0] for row in await superuser.fetch("select type::text from email_events order by arrived_at, type")]


# --- accept -------------------------------------------------------------------------------------------------------


async def test_what_was_accepted_is_claimed_as_it_was_sent(intake: Intake, worker: Pool) -> None:
    [accepted] = await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    message = claimed.message
    assert (message.id, message.created_at) == (accepted.id, accepted.created_at)
    assert (message.sender, message.subject, message.text) == (
        Mailbox("shop@example.com", "Shöp"),
        "Your order",
        "It has left.",
    )
    assert message.headers == {"X-Order": "4711"}
    assert [(r.kind, r.mailbox.address, r.mailbox.name, r.open) for r in message.recipients] == [
        (Kind.TO, "ada@example.net", "Ada", True),
        (Kind.BCC, "audit@example.com", "", True),
    ]


async def test_bodies_that_drafts_of_one_request_share_are_stored_once(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    shared = outbox.uuid7(1)
    await accept(intake, *(a_draft(content_id=shared, html="<p>one</p>", subject=f"to {n}") for n in range(5)))
    assert await superuser.fetchval("select count(*) from email_contents") == 1
    claims = await outbox.claim(worker, "w", 10, LEASE, Turn())
    assert [claimed.message.html for claimed in claims] == ["<p>one</p>"] * 5


async def test_a_repeated_key_gets_the_first_answer_and_nothing_is_stored(
    intake: Intake, superuser: db.Connection
) -> None:
    draft = a_draft(idempotency_key="order-1", body_hash=hashlib.sha256(b"1").digest())
    [first] = await accept(intake, draft)
    [second] = await accept(intake, draft)
    assert (second.id, second.replayed, first.replayed) == (first.id, True, False)
    assert await superuser.fetchval("select count(*) from email_messages") == 1


async def test_the_same_key_many_times_at_once_is_one_message(intake: Intake, superuser: db.Connection) -> None:
    draft = a_draft(idempotency_key="order-1", body_hash=hashlib.sha256(b"1").digest())
    answers = await accept(intake, *[draft] * 50)
    assert len({answer.id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert await superuser.fetchval("select count(*) from email_queue") == 1


async def test_a_key_of_another_body_is_refused_and_a_key_of_another_user_is_another_key(intake: Intake) -> None:
    draft = a_draft(idempotency_key="order-1", body_hash=hashlib.sha256(b"1").digest())
    [first] = await accept(intake, draft)
    with pytest.raises(IdempotencyKeyReused, match=str(first.id)):
        await intake.accept(replace(draft, body_hash=hashlib.sha256(b"2").digest()))
    [other] = await accept(intake, replace(draft, user_id=2))
    assert not other.replayed


async def test_one_row_that_the_database_refuses_does_not_fail_the_flush_it_shares(
    intake: Intake, superuser: db.Connection
) -> None:
    bad = a_draft(subject="NUL \0")
    answers = await asyncio.gather(
        *(intake.accept(draft) for draft in [a_draft(), bad, a_draft()]), return_exceptions=True
    )
    assert isinstance(answers[1], asyncpg.PostgresError)
    assert isinstance(answers[0], Accepted)
    assert isinstance(answers[2], Accepted)
    assert await superuser.fetchval("select count(*) from email_queue") == 2


async def test_a_value_that_cannot_even_be_sent_to_the_database_fails_alone_and_at_once(intake: Intake) -> None:
    began = time.monotonic()
    drafts = [a_draft(), a_draft(subject="half a character: \ud800"), a_draft(lane=10**9), a_draft()]
    answers = await asyncio.gather(*(intake.accept(draft) for draft in drafts), return_exceptions=True)
    assert [isinstance(answer, Accepted) for answer in answers] == [True, False, False, True]
    assert time.monotonic() - began < outbox.PATIENCE.total_seconds()


async def test_an_id_that_is_there_already_is_a_success(intake: Intake, api: Pool, superuser: db.Connection) -> None:
    """After a commit whose answer was lost, the same rows are written again."""
    [accepted] = await accept(intake, a_draft())
    waiting = outbox._Waiting(a_draft(), asyncio.get_running_loop().create_future(), accepted.id)
    await intake._flush_singly([waiting], accepted.created_at)
    assert (await waiting.future).id == accepted.id
    assert await superuser.fetchval("select count(*) from email_messages") == 1


async def test_connections_cut_while_messages_are_accepted_lose_and_double_nothing(
    intake: Intake, superuser: db.Connection
) -> None:
    async def cut() -> None:
        for _ in range(20):
            await asyncio.sleep(0.01)
            await superuser.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'test-api'"
            )

    cutter = asyncio.create_task(cut())
    answers: list[Accepted | BaseException] = []
    while not cutter.done():
        batch = [a_draft(subject=str(len(answers) + n)) for n in range(20)]
        answers += await asyncio.gather(*(intake.accept(draft) for draft in batch), return_exceptions=True)
    await cutter
    accepted = {answer.id for answer in answers if isinstance(answer, Accepted)}
    stored = {row["id"] for row in await superuser.fetch("select id from email_queue")}
    doubled = await superuser.fetchval("select count(*) - count(distinct subject) from email_messages")
    assert accepted
    assert accepted <= stored
    assert doubled == 0


async def test_without_a_database_nothing_is_accepted_and_the_answer_says_so(settings: Settings) -> None:
    async with await db.create_pool(settings, Database.url("postgresql://x@127.0.0.1:1/none"), "test") as pool:
        intake = Intake(pool, expire_after=timedelta(hours=1), on_commit=lambda: None)
        await intake.start()
        with pytest.raises(DatabaseUnavailable):
            await intake.accept(a_draft())
        await intake.close()


async def test_closing_the_intake_flushes_what_waits(api: Pool, superuser: db.Connection) -> None:
    intake = Intake(api, expire_after=timedelta(hours=1), on_commit=lambda: None)
    waiting = [asyncio.create_task(intake.accept(a_draft())) for _ in range(100)]
    await asyncio.sleep(0)
    await intake.start()
    await intake.close()
    assert len({(await task).id for task in waiting}) == 100


# --- claim --------------------------------------------------------------------------------------------------------


async def test_two_workers_never_get_the_same_message(intake: Intake, worker: Pool) -> None:
    await accept(intake, *(a_draft(subject=str(n)) for n in range(300)))
    claims = await asyncio.gather(*(outbox.claim(worker, f"w{n % 2}", 40, LEASE, Turn()) for n in range(12)))
    ids = [claimed.message.id for batch in claims for claimed in batch]
    assert len(ids) == len(set(ids))


async def test_one_users_backlog_does_not_delay_another_user(intake: Intake, worker: Pool) -> None:
    await accept(intake, *(a_draft(subject=str(n)) for n in range(400)))
    await accept(intake, a_draft(user_id=2, subject="reset"))
    claims = await outbox.claim(worker, "w", 20, LEASE, Turn())
    assert "reset" in {claimed.message.subject for claimed in claims}


async def test_urgent_lanes_come_first_and_no_lane_starves(intake: Intake, worker: Pool) -> None:
    for lane in (3, 2, 1):
        await accept(intake, *(a_draft(lane=lane, subject=f"{lane}-{n}") for n in range(100)))
    claims = await outbox.claim(worker, "w", 100, LEASE, Turn())
    by_lane = {lane: sum(claimed.lane == lane for claimed in claims) for lane in (1, 2, 3)}
    assert by_lane == {1: 80, 2: 10, 3: 10}


async def test_with_more_users_than_a_claim_can_serve_each_gets_a_turn(intake: Intake, worker: Pool) -> None:
    for _ in range(3):
        await accept(intake, *(a_draft(user_id=user) for user in range(1, 151)))
    turn = Turn()
    served: list[set[int]] = []
    for _ in range(3):
        claims = await outbox.claim(worker, "w", 64, LEASE, turn)
        served.append({claimed.message.user_id for claimed in claims})
    assert set().union(*served) == set(range(1, 151))


async def test_suppressed_recipients_are_told_apart_and_not_addressed(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await superuser.execute(
        "insert into suppressions (user_id, address, reason) values (1, 'audit@example.com', 'bounce')"
    )
    await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    assert [recipient.mailbox.address for recipient in claimed.suppressed] == ["audit@example.com"]
    assert [recipient.mailbox.address for recipient in claimed.message.open_recipients] == ["ada@example.net"]


# --- attempt and complete -----------------------------------------------------------------------------------------


async def test_a_completed_message_leaves_the_queue_with_a_status_and_an_event_for_each_recipient(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    assert await outbox.attempt(worker, [attempt(claimed)]) == {claimed.message.id}
    won, twice = await outbox.complete(worker, [taken(claimed)])
    assert (won, twice) == ({claimed.message.id}, set())
    assert await superuser.fetchval("select count(*) from email_queue") == 0
    assert await statuses(superuser) == ["sent", "sent"]
    assert await events(superuser) == ["sent", "sent"]


async def test_no_attempt_is_allowed_on_a_lease_that_would_not_outlast_the_call(intake: Intake, worker: Pool) -> None:
    await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, timedelta(seconds=20), Turn())
    assert await outbox.attempt(worker, [attempt(claimed)]) == set()
    await outbox.renew(worker, [claimed.message], LEASE)
    assert await outbox.attempt(worker, [attempt(claimed)]) == {claimed.message.id}


async def test_a_lost_lease_can_no_longer_change_the_message_but_its_outcome_is_recorded(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft())
    [first] = await outbox.claim(worker, "w1", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(first)])
    await superuser.execute("update email_queue set lease_until = now() - interval '1 second'")
    await outbox.sweep(worker, BACKOFF, [])
    assert await statuses(superuser) == ["uncertain", "uncertain"]
    [second] = await outbox.claim(worker, "w2", 10, LEASE, Turn())
    assert second.suspect

    deferred = Decision(
        QueueState.SCHEDULED, timedelta(hours=1), 1, (Verdict(Status.DEFERRED, EventType.DEFERRED, "451 later"),) * 2
    )
    late = Completion(first.message, deferred, first.message.recipients, datetime.now(UTC), "smtp")
    assert await outbox.complete(worker, [late]) == (set(), set())
    assert await superuser.fetchval("select state from email_queue") == "leased"
    assert "deferred" in await events(superuser)


async def test_a_late_taken_cancels_a_resend_that_has_not_begun(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft())
    [first] = await outbox.claim(worker, "w1", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(first)])
    await outbox.sweep(worker, BACKOFF, [], owner="w1")
    assert await outbox.complete(worker, [taken(first)]) == (set(), set())
    assert await superuser.fetchval("select count(*) from email_queue") == 0
    assert await statuses(superuser) == ["sent", "sent"]


async def test_a_message_taken_by_two_attempts_says_so(intake: Intake, worker: Pool, superuser: db.Connection) -> None:
    await accept(intake, a_draft())
    [first] = await outbox.claim(worker, "w1", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(first)])
    await outbox.sweep(worker, BACKOFF, [], owner="w1")
    await outbox.sweep(worker, BACKOFF, [])
    [second] = await outbox.claim(worker, "w2", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(second)])
    await outbox.complete(worker, [taken(second)])
    _, twice = await outbox.complete(worker, [taken(first)])
    assert twice == {first.message.id}
    assert (await events(superuser)).count("duplicate") == 2


async def test_a_completion_that_is_repeated_after_a_lost_answer_is_told_once(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(claimed)])
    await outbox.complete(worker, [taken(claimed)])
    assert await outbox.complete(worker, [taken(claimed)]) == (set(), set())
    assert await events(superuser) == ["sent", "sent"]


async def test_a_retry_addresses_only_those_still_open(intake: Intake, worker: Pool, superuser: db.Connection) -> None:
    await accept(intake, a_draft())
    [claimed] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(claimed)])
    verdicts = (Verdict(Status.SENT, EventType.SENT, "250"), Verdict(Status.DEFERRED, EventType.DEFERRED, "451"))
    decision = Decision(QueueState.SCHEDULED, timedelta(0), 1, verdicts)
    await outbox.complete(
        worker, [Completion(claimed.message, decision, claimed.message.recipients, datetime.now(UTC), "smtp")]
    )
    assert (await outbox.sweep(worker, BACKOFF, [])).promoted == 1
    [again] = await outbox.claim(worker, "w", 10, LEASE, Turn())
    assert [recipient.mailbox.address for recipient in again.message.open_recipients] == ["audit@example.com"]
    assert (again.tries, again.message.lease_no) == (1, 2)


async def test_released_messages_are_due_at_once_and_a_begun_attempt_cannot_be_released(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft(), a_draft())
    claims = await outbox.claim(worker, "w", 10, LEASE, Turn())
    await outbox.attempt(worker, [attempt(claims[0])])
    await outbox.release(worker, [claimed.message for claimed in claims], timedelta())
    rows = {row["id"]: row["state"] for row in await superuser.fetch("select id, state::text from email_queue")}
    assert rows == {claims[0].message.id: "leased", claims[1].message.id: "queued"}


# --- sweep --------------------------------------------------------------------------------------------------------


async def test_a_message_that_is_lost_again_and_again_is_not_sent_for_ever(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft())
    attempts = 0
    while claims := await outbox.claim(worker, "w", 10, LEASE, Turn()):
        await outbox.attempt(worker, [attempt(claims[0])])
        attempts += 1
        await outbox.sweep(worker, BACKOFF, [], owner="w")
        await outbox.sweep(worker, BACKOFF, [])
    assert attempts == 1 + BACKOFF.max_retries
    stats = {stat.state: stat.size for stat in await outbox.queue_stats(worker)}
    assert stats == {"scheduled": 0, "queued": 0, "leased": 0, "uncertain": 0, "held": 1}
    reason = await superuser.fetchval("select held_reason from email_queue")
    assert reason == "no attempt got an answer"
    assert await superuser.fetchval("select response from email_events where type = 'held' limit 1") == reason


async def test_an_unsent_message_expires_with_an_event_and_an_uncertain_one_does_not(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft(subject="late"), a_draft(subject="unsure"))
    [unsure] = [c for c in await outbox.claim(worker, "w", 10, LEASE, Turn()) if c.message.subject == "unsure"]
    await outbox.attempt(worker, [attempt(unsure)])
    await outbox.sweep(worker, replace(BACKOFF, uncertain_wait=timedelta(hours=1)), [], owner="w")
    await superuser.execute("update email_queue set expires_at = now()")
    assert await outbox.expire(worker) == 1
    assert sorted(await statuses(superuser)) == ["expired", "expired", "uncertain", "uncertain"]
    assert await superuser.fetchval("select count(*) from email_events where type = 'expired'") == 2


async def test_idempotency_keys_are_forgotten_after_their_time(
    intake: Intake, worker: Pool, superuser: db.Connection
) -> None:
    await accept(intake, a_draft(idempotency_key="old", body_hash=bytes(32)))
    await superuser.execute("update idempotency_keys set created_at = now() - interval '25 hours'")
    await accept(intake, a_draft(idempotency_key="new", body_hash=bytes(32)))
    assert await outbox.forget_idempotency_keys(worker, timedelta(hours=24)) == 1
    assert await superuser.fetchval("select key from idempotency_keys") == "new"


async def test_the_clock_of_the_service_can_be_moved_in_tests(
    intake: Intake, database: Database, superuser: db.Connection, worker_settings: Settings
) -> None:
    await accept(intake, a_draft())
    await superuser.execute(f"alter database {database.name} set app.clock_offset = '25 hours'")
    async with await db.create_pool(worker_settings, worker_settings.database_url, "later") as later:
        assert await outbox.expire(later) == 1


async def test_a_clock_that_is_set_back_keeps_no_message_waiting(
    intake: Intake, worker: Pool, database: Database, superuser: db.Connection, worker_settings: Settings
) -> None:
    await accept(intake, a_draft(subject="leased"), a_draft(subject="queued"))
    [leased] = await outbox.claim(worker, "w", 1, LEASE, Turn())
    await superuser.execute(f"alter database {database.name} set app.clock_offset = '-1 hour'")
    async with await db.create_pool(worker_settings, worker_settings.database_url, "earlier") as earlier:
        assert await outbox.claim(earlier, "w2", 10, LEASE, Turn()) == []
        assert await outbox.follow_clock(earlier) == 2
        assert await outbox.follow_clock(earlier) == 0
        [queued] = await outbox.claim(earlier, "w2", 10, LEASE, Turn())
        assert (queued.message.subject, leased.message.subject) == ("queued", "leased")
        # Its worker still holds it, for no longer than before.
        assert await outbox.attempt(earlier, [attempt(leased)])
        left = await superuser.fetchval(
            "select lease_until - now() + interval '1 hour' from email_queue where id = $1", leased.message.id
        )
        assert timedelta(seconds=0) < left <= LEASE


# --- schema and security ------------------------------------------------------------------------------------------


async def test_the_database_knows_the_very_states_of_the_lifecycle(superuser: db.Connection) -> None:
    for enumeration, name in ((Status, "recipient_status"), (QueueState, "queue_state"), (EventType, "event_type")):
        labels = await superuser.fetchval(f"select enum_range(null::{name})::text[]")
        assert labels == [member.value for member in enumeration], name


async def test_partitions_stand_ready_for_the_months_ahead(worker: Pool) -> None:
    assert await outbox.ensure_partitions(worker, 3) == []
    assert len(await outbox.ensure_partitions(worker, 5)) == 8


async def test_migrating_twice_changes_nothing(database: Database) -> None:
    assert not (await db.migrate(Database.url(database.migrator))).changed


async def test_a_reader_sees_the_rows_of_its_user_alone_and_without_a_user_none(intake: Intake, api: Pool) -> None:
    await accept(intake, a_draft(user_id=1), a_draft(user_id=2))
    tables = ["email_messages", "email_tracking", "email_queue"]
    async with db.read_session(api, 1) as connection:
        for table in tables:
            assert {row[0] for row in await connection.fetch(f"select user_id from {table}")} == {1}
    for table in tables:
        assert await api.fetchval(f"select count(*) from {table}") == 0


@pytest.mark.parametrize(
    "statement",
    [
        "insert into email_messages (id, created_at) values (gen_random_uuid(), now())",
        "delete from email_queue",
        "update email_tracking set status = 'sent'",
        "select * from email_messages_y2026m11",
        "select key_hash from api_keys",
        "create table mine (id int)",
        "select * from claim('w', 1, '1 minute', '{0,0,0}')",
    ],
)
async def test_the_api_role_may_do_nothing_but_accept_and_read(api: Pool, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await api.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "delete from email_messages",
        "select * from api_keys",
        "create table mine (id int)",
        "delete from email_events",
        "select resend('{}')",
        "select confirm('{}')",
    ],
)
async def test_the_worker_role_may_neither_touch_what_was_sent_nor_decide_for_an_operator(
    worker: Pool, statement: str
) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await worker.execute(statement)
