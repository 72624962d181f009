"""The reconciler: whatever no rule will move again is found, and nothing else ever is."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from datetime import timedelta
from typing import Any

import pytest

from neoforge_email import outbox, reconcile, worker
from neoforge_email.delivery import Delivery
from neoforge_email.message import Message, Recipient
from neoforge_email.outbox import Turn
from neoforge_email.providers.base import Outcome, Result, Scope
from neoforge_email.providers.memory import MemoryProvider
from neoforge_email.providers.router import Router
from neoforge_email.reconcile import KINDS, Stuck
from neoforge_email.settings import Settings

from .test_settlement import BACKOFF, LEASE, Way, an_event, way

__all__ = ["way"]  # a fixture


async def found(way: Way, **options: Any) -> list[Stuck]:
    """All that a full look finds, as the operator's role sees it."""
    return [stuck async for stuck in reconcile.find(way.superuser, **options)]


async def noted(way: Way) -> set[tuple[str, str]]:
    return {(row["kind"], row["id"]) for row in await way.superuser.fetch("select kind, id from stuck_rows")}


CORRUPTIONS = {
    "the queue row is gone": ("recipient_without_queue", "delete from email_queue"),
    "a final status was undone": (
        "recipient_without_queue",
        "delete from email_queue; update email_tracking set status = 'sent'; update email_tracking set status = 'uncertain'",
    ),
    "the recipients are gone with the queue row": (
        "message_without_recipients",
        "delete from email_queue; delete from email_tracking",
    ),
    "the recipients are gone": ("queue_without_recipients", "delete from email_tracking"),
    "the recipients have another time": (
        "queue_without_recipients",
        "update email_tracking set created_at = created_at + interval '1 millisecond'",
    ),
    "the message is gone": ("queue_without_message", "delete from email_messages"),
    "the message has another time": (
        "queue_without_message",
        "update email_messages set created_at = created_at + interval '1 millisecond'",
    ),
    "the bodies are gone": ("queue_without_content", "update email_messages set content_id = gen_random_uuid()"),
    "a lane that no claim looks at": ("never_claimed", "update email_queue set lane = 4"),
    "a lane below all": ("never_claimed", "update email_queue set lane = 0"),
    "a user that no claim begins with": ("never_claimed", "update email_queue set user_id = 0"),
    "a lease without an end": ("never_swept", "update email_queue set state = 'leased', owner = 'w'"),
    "a lease that outlasts us": ("never_swept", "update email_queue set state = 'leased', lease_until = 'infinity'"),
    "a clock that was in another year": (
        "never_due",
        "update email_queue set due = now() + interval '9 years', expires_at = now() + interval '10 years'",
    ),
    "uncertain for ever": ("never_due", "update email_queue set state = 'uncertain', due = 'infinity'"),
    "scheduled for ever": (
        "never_due",
        "update email_queue set state = 'scheduled', due = 'infinity', expires_at = 'infinity'",
    ),
    "held for nothing": ("held_without_reason", "update email_queue set state = 'held'"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_a_row_that_no_rule_moves_is_found_and_forgotten_once_it_is_mended(way: Way, name: str) -> None:
    kind, corruption = CORRUPTIONS[name]
    await way.accept("ada@example.net", "bob@example.net")
    email_id = str(await way.superuser.fetchval("select id from email_queue"))
    tables = ("email_messages", "email_tracking", "email_queue")
    for table in tables:
        await way.superuser.execute(f"create table kept_{table} as table {table}")
    await way.superuser.execute(corruption)
    assert (kind, email_id) in {(stuck.kind, stuck.id) for stuck in await found(way)}
    new = await reconcile.run(way.worker)
    assert (kind, email_id) in {(stuck.kind, stuck.id) for stuck in new}
    assert {(stuck.kind, stuck.id) for stuck in new} == await noted(way)
    assert await reconcile.run(way.worker) == []  # it is not new any more, and still there
    assert (kind, email_id) in await noted(way)
    for table in tables:
        await way.superuser.execute(f"truncate {table}; insert into {table} table kept_{table}")
    await reconcile.run(way.worker)
    assert await noted(way) == set()


@pytest.mark.parametrize(
    ("kind", "corruption"),
    [
        ("receipt_of_nobody", "update provider_receipts set provider = 'pigeon'"),
        ("receipt_never_due", "update provider_receipts set due = 'infinity'"),
    ],
)
async def test_a_receipt_that_nobody_takes_up_is_found_while_it_waits(way: Way, kind: str, corruption: str) -> None:
    await way.superuser.fetchval("select receive('mail', array['1', '2'], array['a'::bytea, 'b'])")
    assert await found(way) == []
    await way.superuser.execute(corruption)
    assert [stuck.kind for stuck in await reconcile.run(way.worker)] == [kind] * 2
    assert [stuck.kind for stuck in await found(way)] == [kind] * 2
    await way.superuser.execute("update provider_receipts set state = 'malformed', finished_at = now()")
    assert await reconcile.run(way.worker) == []
    assert await noted(way) == set()


OF_WEBHOOKS = {
    "webhook_never_swept": "update webhook_deliveries set state = 'leased', lease_until = null",
    "webhook_never_due": "update webhook_deliveries set due = now() + interval '2 days'",
    "webhook_never_tried": "update webhook_endpoints set paused_until = 'infinity'",
}


@pytest.mark.parametrize("kind", OF_WEBHOOKS)
async def test_a_webhook_that_nobody_will_deliver_is_found_until_it_is_mended(way: Way, kind: str) -> None:
    await way.superuser.execute("""
        insert into webhook_endpoints (id, user_id, created_at, url, description, types)
        values (gen_random_uuid(), 1, now(), 'https://example.com/', '', '{}');
        insert into webhook_deliveries (id, endpoint_id, created_at, due, user_id, state, type, payload)
        select gen_random_uuid(), id, now(), now() + interval '4 hours', 1, 'pending', 'webhook.test', '{}'
        from webhook_endpoints, generate_series(1, 3);
        update webhook_endpoints set paused_until = now() + interval '4 hours'
    """)
    assert await found(way) == await reconcile.run(way.worker) == []
    await way.superuser.execute(OF_WEBHOOKS[kind])
    ids = {stuck.id for stuck in await reconcile.run(way.worker) if stuck.kind == kind}
    assert len(ids) == (1 if kind == "webhook_never_tried" else 3)
    assert {(stuck.kind, stuck.id) for stuck in await found(way)} == await noted(way) == {(kind, it) for it in ids}
    assert await reconcile.run(way.worker) == []
    await way.superuser.execute("""
        update webhook_deliveries set state = 'pending', due = now(); update webhook_endpoints set paused_until = null
    """)
    assert await reconcile.run(way.worker) == []
    assert await noted(way) == set()


async def test_every_kind_is_found_by_a_test() -> None:
    receipts = {"receipt_of_nobody", "receipt_never_due"}
    assert {kind for kind, _ in CORRUPTIONS.values()} | receipts | OF_WEBHOOKS.keys() == set(KINDS)


async def test_nothing_is_found_of_messages_in_every_state_that_the_rules_make(way: Way) -> None:
    await way.accept()
    await way.answer(await way.attempt(), Outcome.TAKEN)  # done
    await way.accept()
    await way.answer(await way.attempt(), Outcome.REFUSED)  # failed
    await way.accept()
    await way.answer(await way.attempt(), Outcome.DEFERRED)  # scheduled
    await way.accept(on_uncertain="hold")
    lost = await way.attempt()
    await way.lose(waits=True)
    await way.superuser.execute("update email_queue set due = now() where state = 'uncertain'")
    await way.sweep()  # held; and the deferred one is queued again
    await way.superuser.execute(
        "update email_queue set due = now() + interval '3 hours', state = 'scheduled' where state = 'queued'"
    )
    await way.accept()
    await way.attempt()
    await way.lose(waits=True)  # uncertain
    await way.accept()
    await way.attempt()  # leased, with an open attempt
    await way.accept()
    await outbox.claim(way.worker, "w2", 10, LEASE, Turn())  # leased
    await way.accept()  # queued
    states = {row[0] for row in await way.superuser.fetch("select state::text from email_queue")}
    assert states == {"queued", "scheduled", "leased", "uncertain", "held"}
    assert await found(way) == []
    assert await found(way, rows=1) == []
    assert await reconcile.run(way.worker) == []
    await way.report(an_event(lost))
    await way.superuser.execute("update email_queue set expires_at = now() where state in ('queued', 'scheduled')")
    await outbox.expire(way.worker)
    assert await found(way) == []
    assert await reconcile.run(way.worker) == []
    assert await noted(way) == set()


async def test_a_walk_goes_on_where_it_stopped_and_comes_round(way: Way) -> None:
    for _ in range(6):
        await way.accept("ada@example.net", "bob@example.net")
    ids = [row[0] for row in await way.superuser.fetch("select id from email_queue order by id")]
    await way.superuser.execute("update stuck_walks set position = $1 where name = 'all'", ids[3])
    await way.superuser.execute("delete from email_queue where id = any($1)", [ids[0], ids[5]])
    seen = [{stuck.id for stuck in await reconcile.run(way.worker, rows=2, slices=1)} for _ in range(6)]
    assert set().union(*seen) == {str(ids[0]), str(ids[5])}
    assert all(len(step) <= 1 for step in seen)
    assert await found(way, rows=1) == await found(way)
    assert len(await found(way)) == 2
    told: list[tuple[str, int]] = []
    await found(way, rows=3, progress=lambda part, rows: told.append((part, rows)))
    assert told == [("queue", 3), ("messages", 3), ("messages", 6), ("messages", 9)]


async def test_the_last_hour_is_looked_at_however_much_came_before(way: Way) -> None:
    await way.accept()
    last = await way.superuser.fetchval("select id from email_queue")
    await way.superuser.execute("delete from email_queue")
    await way.superuser.execute("""
        insert into email_tracking (id, email_id, created_at, updated_at, user_id, kind, status, recipient, recipient_name)
        select gen_random_uuid(), format('%s-0000-7000-8000-%s', lpad(n::text, 8, '0'), lpad(n::text, 12, '0'))::uuid, now(),
            now(), 1, 'to', 'sent', 'x@example.net', '' from generate_series(1, 5000) n
    """)
    assert [stuck.id for stuck in await reconcile.run(way.worker, rows=100, slices=2)] == [str(last)]


async def test_the_number_of_findings_that_are_kept_is_bounded(way: Way) -> None:
    await way.superuser.execute("""
        insert into email_tracking (id, email_id, created_at, updated_at, user_id, kind, recipient, recipient_name)
        select gen_random_uuid(), gen_random_uuid(), now(), now(), 1, 'to', 'x@example.net', '' from generate_series(1, 10100) n
    """)
    assert len(await reconcile.run(way.worker)) == 1000
    assert await reconcile.run(way.worker) == []
    assert len(await found(way)) == 10_100
    sizes, checked_at = await way.api.fetchrow("select sizes::text, checked_at from stuck_stats()") or ("", None)
    assert "1000" in sizes
    assert checked_at is not None


async def test_the_workers_cron_says_what_is_new(way: Way, capsys: pytest.CaptureFixture[str]) -> None:
    await way.accept()
    email_id = await way.superuser.fetchval("delete from email_queue returning id")
    for lines in (1, 0):
        await worker.reconcile_rows({"pool": way.worker})
        out = capsys.readouterr()
        said = [line for line in (out.out + out.err).splitlines() if "reconciler.found" in line]
        assert len(said) == lines
        assert all(str(email_id) in line and "recipient_without_queue" in line for line in said)


async def lose_some(way: Way, chance: random.Random) -> None:
    """A worker leases messages, begins with half of them and is lost; half of their recipients an event settles."""
    claims = await outbox.claim(way.worker, "lost", 20, timedelta(seconds=0), Turn())
    begun = [claimed for claimed in claims if chance.random() < 0.5]
    if begun:
        late = timedelta(seconds=-5)
        await outbox.attempt(way.worker, [outbox.Attempt(claimed.message, "sendgrid", late) for claimed in begun])
    await outbox.sweep(way.worker, BACKOFF, [])
    events = [an_event(claimed, recipient=n) for claimed in claims for n in (0, 1) if chance.random() < 0.5]
    if events:
        await way.report(*events)


async def test_a_system_under_load_never_yields_a_false_finding(way: Way, make_settings: Any) -> None:
    """Accepted, sent, refused, deferred, lost, swept and settled by events at once, while the reconciler looks without a
    pause and in slices that end within the messages under way."""
    settings: Settings = make_settings(
        "worker", EMAIL_RETRY_DELAY="0.1", EMAIL_RETRY_MAX_DELAY="0.2", EMAIL_UNCERTAIN_WAIT="0"
    )
    over = asyncio.Event()
    chance = random.Random(7)

    async def accept() -> None:
        while not over.is_set():
            await asyncio.gather(*(way.accept("ada@example.net", "bob@example.net") for _ in range(50)))

    async def lose() -> None:
        while not over.is_set():
            await asyncio.sleep(0.05)
            await lose_some(way, chance)

    async def look() -> None:
        began = time.monotonic()
        for rows in itertools.cycle((400, 3000, reconcile.ROWS)):
            assert await found(way, rows=rows) == []
            assert await reconcile.run(way.worker, rows=rows) == []
            if time.monotonic() - began > 5 and rows == reconcile.ROWS:
                over.set()
                return

    def answer(_message: Message, _recipient: Recipient) -> Result:
        return Result(chance.choice([*Outcome, Outcome.TAKEN, Outcome.TAKEN]), Scope.RECIPIENT, "words")

    provider = MemoryProvider(answer=answer, delay=timedelta(milliseconds=1))
    delivery = Delivery(way.worker, Router.of([provider], settings), settings)
    running = asyncio.create_task(delivery.run())
    await asyncio.gather(accept(), lose(), look())
    delivery.stop()
    await running
    assert await found(way) == []
    assert await noted(way) == set()
    ended = {
        row[0]: row[1]
        for row in await way.superuser.fetch("select status::text, count(*) from email_tracking group by 1")
    }
    assert ended.get("sent", 0) > 500, ended
