"""From receipts to events: once each, in whatever order they come, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import uvicorn
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from neoforge_email import db, outbox, records
from neoforge_email.app import create_app
from neoforge_email.db import Pool
from neoforge_email.delivery import Delivery
from neoforge_email.inbound import dsn, receipts
from neoforge_email.inbound import normaliser as normaliser_module
from neoforge_email.inbound.normaliser import Normaliser
from neoforge_email.lifecycle import EventType
from neoforge_email.outbox import Claim, Intake
from neoforge_email.providers.base import Outcome
from neoforge_email.providers.router import Router
from neoforge_email.providers.sendgrid import SendGridProvider
from neoforge_email.settings import Settings
from neoforge_email.worker import Loop
from tests.delivering import a_draft
from tests.sendgrid_double import API_KEY, Webhook, sendgrid_double
from tests.service.test_api_process import free_port
from tests.service.test_settlement import Way
from tests.support import Database

KINDS = (
    "processed",
    "delivered",
    "deferred",
    "dropped",
    "bounce",
    "blocked",
    "open",
    "click",
    "spamreport",
    "unsubscribe",
)


@dataclass
class Desk:
    """What providers say comes in here, and is worked off when the test says so."""

    way: Way
    api: Pool
    settings: Settings

    async def receive(self, *bodies: dict[str, Any], provider: str = "sendgrid") -> int:
        items = [(str(body.get("sg_event_id", uuid4().hex)), json.dumps(body).encode()) for body in bodies]
        return await receipts.receive(self.api, provider, items)

    async def work_off(self) -> None:
        normaliser = Normaliser(self.way.worker, self.settings)
        running = asyncio.create_task(normaliser.run())
        await normaliser.drained()
        normaliser.stop()
        await running

    async def states(self) -> dict[str, int]:
        rows = await self.way.superuser.fetch("select state::text as state, count(*) from provider_receipts group by 1")
        return {row["state"]: row["count"] for row in rows}

    async def make_due(self, **older: float) -> None:
        """Time passes: waiting receipts are due, and have waited for so much longer."""
        await self.way.superuser.execute(
            "update provider_receipts set due = now(), received_at = received_at - $1::interval where state = 'waiting'",
            timedelta(**older),
        )


def reported(claimed: Claim, kind: str, recipient: int = 0, **changes: Any) -> dict[str, Any]:
    """What SendGrid's webhook says of a recipient."""
    fields = {
        "email": claimed.message.recipients[recipient].mailbox.address,
        "timestamp": 1_772_368_215,
        "event": "bounce" if kind == "blocked" else kind,
        "sg_event_id": uuid4().hex,
        "sg_message_id": "abc.filter0001",
        "neoforge_attempt": claimed.message.attempt,
        **({"type": kind, "status": "5.1.1", "reason": "unknown"} if kind in {"bounce", "blocked"} else {}),
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


@pytest.fixture
async def desk(
    database: Database, settings: Settings, worker_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Desk]:
    monkeypatch.setattr(normaliser_module, "PAUSE", 0)  # between two looks; here each is asked for
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop')")
    async with (
        await db.create_pool(settings, settings.database_url, "test-api") as api,
        await db.create_pool(worker_settings, worker_settings.database_url, "test-worker") as worker,
    ):
        intake = Intake(api, expire_after=timedelta(hours=24), on_commit=lambda: None)
        await intake.start()
        yield Desk(Way(intake, api, worker, superuser), api, worker_settings)
        await intake.close()
    await superuser.close()


async def test_a_report_becomes_an_event_and_a_status(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.way.answer(claimed, Outcome.TAKEN, "abc")
    recorded, done = count("provider_events_total", provider="sendgrid", type="bounce"), await desk.states()
    await desk.receive(reported(claimed, "bounce", sg_event_id="one", bounce_classification="Invalid Address"))
    await desk.work_off()
    assert (await desk.states(), done) == ({"done": 1}, {})
    assert await desk.way.statuses() == ["bounced"]
    event = await desk.way.superuser.fetchrow(
        "select event_id, provider, occurred_at, response, detail::text from email_events where event_id is not null"
    )
    assert event is not None
    assert tuple(event)[:2] == ("one", "sendgrid")
    assert event["occurred_at"] == datetime.fromisoformat("2026-03-01T12:30:15+00:00")
    assert event["response"] == "5.1.1 unknown"
    assert json.loads(event["detail"])["bounce_classification"] == "Invalid Address"
    assert await desk.way.superuser.fetchval("select address from suppressions") == "ada@example.net"
    assert count("provider_events_total", provider="sendgrid", type="bounce") == recorded + 1
    email = await records.get_email(desk.api, 1, claimed.message.id, {"normal": 2}, max_retries=3)
    assert email is not None


async def test_what_is_blocked_this_time_suppresses_nobody(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.receive(reported(claimed, "blocked"))
    await desk.work_off()
    assert await desk.way.statuses() == ["bounced"]
    assert await desk.way.superuser.fetchval("select count(*) from suppressions") == 0


async def test_an_event_cannot_have_happened_after_we_were_told(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    times = [None, "soon", 10**15, 4_102_444_800, -5]
    await desk.receive(*[reported(claimed, "open", timestamp=value, sg_event_id=f"{value}") for value in times])
    await desk.work_off()
    rows = await desk.way.superuser.fetch(
        "select e.event_id, e.occurred_at = r.received_at as bounded from email_events e"
        " join provider_receipts r using (event_id) where e.event_id is not null"
    )
    assert {row["event_id"]: row["bounded"] for row in rows} == {
        "None": True,
        "soon": True,
        str(10**15): True,
        "4102444800": True,
        "-5": False,
    }


async def test_an_event_that_comes_before_its_messages_provider_id_is_kept_and_matched_later(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.receive(reported(claimed, "delivered", neoforge_attempt=None))
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"waiting": 1}, ["queued"])
    await desk.way.answer(claimed, Outcome.TAKEN, "abc")
    await desk.make_due()
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"done": 1}, ["delivered"])
    assert await desk.way.events(EventType.DELIVERED) == 1


async def test_an_event_that_carries_the_attempt_is_matched_at_once_and_settles_it(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.way.lose(waits=True)
    assert await desk.way.state() == "uncertain"
    await desk.receive(reported(claimed, "processed", sg_message_id=None))
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"done": 1}, ["sent"])
    assert await desk.way.state() is None


async def test_a_report_on_nothing_of_ours_waits_longer_and_longer_and_is_set_aside_after_a_day(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.receive(reported(claimed, "open", neoforge_attempt=None, sg_message_id="foreign"))
    for older, expected in (
        (timedelta(), timedelta(seconds=1)),
        (timedelta(seconds=30), timedelta(seconds=30)),
        (timedelta(minutes=9), timedelta(minutes=9, seconds=30)),
        (timedelta(hours=2), timedelta(minutes=15)),
        (timedelta(hours=21), timedelta(minutes=15)),
    ):
        await desk.make_due(seconds=older.total_seconds())
        await desk.work_off()
        assert await desk.states() == {"waiting": 1}
        delay = await desk.way.superuser.fetchval("select due - now() from provider_receipts")
        assert expected - timedelta(seconds=2) < delay < expected + timedelta(seconds=4)
    await desk.make_due(hours=1)
    await desk.work_off()
    assert await desk.states() == {"unmatched": 1}
    error = await desk.way.superuser.fetchval("select error from provider_receipts")
    assert error == "1 of 1 events name no message of ours"


async def test_what_cannot_be_read_is_set_aside_with_its_fault_and_holds_up_nothing(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.receive(reported(claimed, "delivered"), {"sg_event_id": "odd", "event": 5}, {"event": "something_new"})
    await receipts.receive(desk.api, "sendgrid", [("no json", b"\0\xff"), ("deep", b"[" * 50_000)])
    await receipts.receive(desk.api, "ses", [("text", b"Hello")])
    await desk.work_off()
    assert await desk.states() == {"done": 2, "malformed": 4}
    assert await desk.way.statuses() == ["delivered"]
    errors = await desk.way.superuser.fetch("select event_id, error from provider_receipts where state = 'malformed'")
    assert all(row["error"] for row in errors)
    assert {row["event_id"] for row in errors} == {"odd", "no json", "deep", "text"}


async def test_a_receipt_that_the_database_refuses_is_tried_again_alone_and_then_set_aside(desk: Desk) -> None:
    await desk.way.superuser.execute("alter table email_events add constraint tests check (event_id <> 'poison')")
    await desk.way.accept("ada@example.net", "bob@example.net")
    claimed = await desk.way.attempt()
    poison = reported(claimed, "delivered", sg_event_id="poison")
    await desk.receive(poison, *[reported(claimed, "delivered", 1) for _ in range(5)])
    for tries in (1, 2, 3):
        await desk.work_off()
        assert await desk.states() == {"done": 5, "waiting": 1}
        row = await desk.way.superuser.fetchrow("select tries, error from provider_receipts where state = 'waiting'")
        assert row is not None
        assert (row["tries"], row["error"].startswith("CheckViolationError")) == (tries, True)
        await desk.make_due()
    await desk.work_off()
    assert await desk.states() == {"done": 5, "malformed": 1}
    statuses = {
        r.mailbox.address: s for r, s in zip(claimed.message.recipients, await desk.way.statuses(), strict=True)
    }
    assert statuses == {"ada@example.net": "queued", "bob@example.net": "delivered"}
    # what an operator does once the fault is mended (docs/operations.md)
    await desk.way.superuser.execute("alter table email_events drop constraint tests")
    await desk.way.superuser.execute(
        "update provider_receipts set state = 'waiting', tries = 0, received_at = now(), due = now(), finished_at = null"
        " where state = 'malformed'"
    )
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"done": 6}, ["delivered", "delivered"])


async def test_a_fault_in_our_own_reading_is_isolated_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def normalise(body: bytes) -> list[Any]:
        if b"poison" in body:
            raise KeyError("a fault of ours")
        return []

    monkeypatch.setattr(normaliser_module, "NORMALISE", {"sendgrid": normalise})
    await receipts.receive(desk.api, "sendgrid", [("1", b"poison"), ("2", b"good")])
    await desk.work_off()
    assert await desk.states() == {"done": 1, "waiting": 1}
    assert (
        await desk.way.superuser.fetchval("select error from provider_receipts where state = 'waiting'") == "KeyError"
    )


async def test_reports_of_a_provider_that_this_version_does_not_know_are_left_for_the_next(desk: Desk) -> None:
    await desk.receive({"event": "delivered"}, provider="of the next version")
    await desk.work_off()
    assert await desk.states() == {"waiting": 1}


async def test_a_message_that_two_attempts_were_taken_for_is_counted_once(desk: Desk) -> None:
    await desk.way.accept()
    lost = await desk.way.attempt()
    await desk.way.lose()
    again = await desk.way.attempt()
    await desk.way.answer(again, Outcome.TAKEN)
    before = count("emails_duplicate_total", provider="sendgrid")
    for kind in ("processed", "delivered"):
        await desk.receive(reported(lost, kind))
        await desk.work_off()
    assert count("emails_duplicate_total", provider="sendgrid") == before + 1
    assert await desk.way.events(EventType.DUPLICATE) == 1


async def test_several_recipients_of_one_ses_notification_are_recorded_together(desk: Desk) -> None:
    await desk.way.accept("ada@example.net", "bob@example.net")
    claimed = await desk.way.attempt()
    mail = {
        "messageId": "0100",
        "destination": ["ada@example.net", "bob@example.net"],
        "tags": {"neoforge_attempt": [claimed.message.attempt]},
    }
    delivery = {"recipients": ["ADA@example.net", "bob@example.net", "carol@example.net"], "smtpResponse": "250 ok"}
    await desk.receive({"eventType": "Delivery", "mail": mail, "delivery": delivery}, provider="ses")
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"done": 1}, ["delivered", "delivered"])


async def test_a_bounce_by_mail_is_read_too(desk: Desk) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    report = (
        b"From: MAILER-DAEMON@mx.example.net\nSubject: Undelivered\nMIME-Version: 1.0\n"
        b'Content-Type: multipart/report; report-type=delivery-status; boundary="b"\n\n'
        b"--b\nContent-Type: text/plain\n\nSorry.\n"
        b"--b\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; mx.example.net\n\n"
        b"Final-Recipient: rfc822; ada@example.net\nAction: failed\nStatus: 5.1.1\n"
        b"Diagnostic-Code: smtp; 550 5.1.1 user unknown\n\n--b--\n"
    )
    address = f"bounce+{claimed.message.attempt}@bounces.example.com"
    body = dsn.pack(dsn.Envelope(address, "192.0.2.1", datetime.now(UTC)), report)
    await receipts.receive(desk.way.worker, "mail", [(dsn.event_id(address, report), body)])
    await desk.work_off()
    assert (await desk.states(), await desk.way.statuses()) == ({"done": 1}, ["bounced"])
    assert await desk.way.superuser.fetchval("select address from suppressions") == "ada@example.net"


async def test_large_reports_are_taken_few_at_a_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normaliser_module, "BATCH_BYTES", 3000)
    await receipts.receive(desk.api, "sendgrid", [(f"{n}", b'{"event":"other"}' + b" " * 1000) for n in range(10)])
    await receipts.receive(desk.api, "sendgrid", [("large", b'{"event":"other"}' + b" " * 9000)])
    async with desk.way.worker.acquire() as connection, connection.transaction():
        found = await receipts.waiting(connection, ["sendgrid"], 200, 3000)  # type: ignore[arg-type]
        assert len(found) == 3
    await desk.work_off()
    assert await desk.states() == {"done": 11}


# --- twice and out of order --------------------------------------------------------------------------------------------


async def outcome(desk: Desk) -> dict[str, Any]:
    """All that events do, without the ids and times that differ anyway."""
    rows = await desk.way.superuser.fetch(
        "select t.recipient, e.type::text as type, e.event_id, e.occurred_at, e.attempt, e.provider, e.response,"
        " e.detail::text as detail from email_events e left join email_tracking t on t.id = e.tracking_id"
        " where e.event_id is not null or e.type = 'duplicate' order by 1, 2, 3"
    )
    return {
        "statuses": await desk.way.superuser.fetch("select recipient, status::text from email_tracking order by 1"),
        "events": [tuple(row)[:8] for row in rows],
        "suppressed": await desk.way.superuser.fetch("select address, reason from suppressions order by 1"),
        "queue": await desk.way.superuser.fetch("select state::text from email_queue"),
        "receipts": await desk.states(),
    }


async def begin(desk: Desk, path: str) -> Claim:
    tables = (
        "email_messages email_tracking email_queue email_events suppressions provider_receipts provider_message_ids"
    )
    await desk.way.superuser.execute(";".join(f"delete from {table}" for table in tables.split()))
    await desk.way.accept("ada@example.net", "bob@example.net")
    claimed = await desk.way.attempt()
    if path == "taken":
        await desk.way.answer(claimed, Outcome.TAKEN, "abc")
    elif path == "lost":
        await desk.way.lose(waits=True)
    return claimed


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1)), min_size=1, max_size=8),
    path=st.sampled_from(["taken", "lost", "open"]),
    random_=st.randoms(use_true_random=False),
)
async def test_events_twice_and_out_of_order_end_in_the_same_state_as_once_and_in_order(
    desk: Desk, kinds: Sequence[tuple[str, int]], path: str, random_: random.Random
) -> None:
    claimed = await begin(desk, path)
    for number, (kind, recipient) in enumerate(kinds):
        await desk.receive(reported(claimed, kind, recipient, sg_event_id=f"{number}"))
        await desk.work_off()
    expected = await outcome(desk)

    claimed = await begin(desk, path)
    events = [reported(claimed, kind, recipient, sg_event_id=f"{n}") for n, (kind, recipient) in enumerate(kinds)] * 2
    random_.shuffle(events)
    while events:
        cut = random_.randint(1, len(events))
        await desk.receive(*events[:cut])
        events = events[cut:]
        if random_.random() < 0.4:
            await desk.work_off()
    await desk.work_off()
    assert normal(await outcome(desk)) == normal(expected)


def normal(found: dict[str, Any]) -> dict[str, Any]:
    """Why an address was suppressed first depends on which of two reasons came first."""
    return {**found, "suppressed": [row["address"] for row in found["suppressed"]]}


# --- what dies meanwhile -----------------------------------------------------------------------------------------------


async def many(desk: Desk, messages: int) -> list[dict[str, Any]]:
    """Three events of each of so many messages that were taken."""
    await asyncio.gather(*(desk.way.intake.accept(a_draft(f"{n}@example.net")) for n in range(messages)))
    claims: list[Claim] = []
    while len(claims) < messages:
        claims += await outbox.claim(desk.way.worker, "w", messages, timedelta(seconds=600), outbox.Turn())
    await desk.way.superuser.execute("delete from email_queue")
    return [reported(claimed, kind) for claimed in claims for kind in ("processed", "delivered", "open")]


async def recorded_events(desk: Desk) -> dict[str, int]:
    rows = await desk.way.superuser.fetch(
        "select type::text, count(*) from email_events where event_id is not null group by 1"
    )
    return {row["type"]: row["count"] for row in rows}


async def test_cut_connections_lose_no_event_and_double_none(desk: Desk) -> None:
    await desk.receive(*await many(desk, 400))
    normalisers = [Normaliser(desk.way.worker, desk.settings) for _ in range(2)]
    running = [asyncio.create_task(normaliser.run()) for normaliser in normalisers]
    cuts = 0
    async with asyncio.timeout(60):
        while (await desk.states()).get("waiting"):
            cuts += await desk.way.superuser.fetchval(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'test-worker'"
            )
            # Longer and longer, so that a batch gets through between two cuts on a slow computer as well.
            await asyncio.sleep(random.random() * (1 + cuts / 10) / 10)
    for normaliser in normalisers:
        normaliser.stop()
    await asyncio.gather(*running)
    assert cuts
    assert await recorded_events(desk) == {"sent": 400, "delivered": 400, "open": 400}
    assert await desk.states() == {"done": 1200}


async def test_a_worker_killed_between_receipt_and_events_loses_none_and_doubles_none(
    desk: Desk, database: Database, environment: dict[str, str]
) -> None:
    await desk.receive(*await many(desk, 1500))
    command = [sys.executable, "-m", "arq", "neoforge_email.worker.WorkerSettings"]
    variables = {**os.environ, **environment, "DATABASE_URL": database.worker, "WORKER_INSTANCE": "1"}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)

    worker = start()
    try:
        async with asyncio.timeout(60):
            for done in (1, 1000, 2500):
                while (await desk.states()).get("done", 0) < done:
                    await asyncio.sleep(0.001)
                worker.send_signal(signal.SIGKILL)
                await asyncio.to_thread(worker.wait)
                worker = start()
            while (await desk.states()).get("waiting"):
                await asyncio.sleep(0.05)
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) == 0
    finally:
        worker.kill()
    assert await recorded_events(desk) == {"sent": 1500, "delivered": 1500, "open": 1500}
    assert await desk.states() == {"done": 4500}


async def test_it_waits_for_a_database_that_is_away_and_ends_when_it_is_told(
    desk: Desk, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings("worker", DATABASE_URL="postgresql://neoforge_worker@127.0.0.1:1/none")
    before = count("database_errors_total", operation="normalise")
    async with await db.create_pool(settings, settings.database_url, "test-away") as pool:
        normaliser = Normaliser(pool, settings)
        running = asyncio.create_task(normaliser.run())
        while count("database_errors_total", operation="normalise") < before + 3:
            await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_the_doorbell_is_answered_at_once(desk: Desk, make_settings: Callable[..., Settings]) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    normaliser = Normaliser(desk.way.worker, make_settings("worker", EMAIL_WORKER_INTERVAL="60"))
    running = asyncio.create_task(normaliser.run())
    await normaliser.drained()
    await desk.receive(reported(claimed, "delivered"))
    normaliser.ring()
    async with asyncio.timeout(5):
        while await desk.way.statuses() != ["delivered"]:
            await asyncio.sleep(0.01)
    normaliser.stop()
    await running


# --- what is kept, counted and allowed ---------------------------------------------------------------------------------


async def test_receipts_are_counted_by_state_with_the_age_of_the_oldest(desk: Desk) -> None:
    async def stats() -> dict[str, tuple[int, int]]:
        found = await receipts.stats(desk.api)
        return {stat.state: (stat.size, 10 * round(stat.oldest_seconds / 10)) for stat in found}

    nothing = dict.fromkeys(("waiting", "postponed", "unmatched", "malformed"), (0, 0))
    assert await stats() == nothing
    await desk.way.accept()
    claimed = await desk.way.attempt()
    foreign = reported(claimed, "open", neoforge_attempt=None)
    await desk.receive({"event": 5}, reported(claimed, "open"), foreign)
    assert await stats() == {**nothing, "waiting": (3, 0)}
    await desk.work_off()
    assert await stats() == {**nothing, "postponed": (1, 0), "malformed": (1, 0)}
    await desk.way.superuser.execute(
        "update provider_receipts set received_at = received_at - interval '300 s', finished_at = finished_at - interval '600 s'"
    )
    assert await stats() == {**nothing, "postponed": (1, 300), "malformed": (1, 600)}
    await desk.way.superuser.execute(
        "update provider_receipts set due = now() - interval '60 s' where state = 'waiting'"
    )
    assert await stats() == {**nothing, "waiting": (1, 60), "malformed": (1, 600)}


async def test_done_receipts_are_forgotten_after_a_week_the_others_after_three_months(desk: Desk) -> None:
    await receipts.receive(desk.api, "sendgrid", [(f"{n}", b"{}") for n in range(6)])
    for number, (state, days) in enumerate(
        [("done", 6), ("done", 8), ("unmatched", 8), ("malformed", 91), ("unmatched", 91), ("waiting", 400)]
    ):
        await desk.way.superuser.execute(
            "update provider_receipts set state = $2::text::receipt_state, received_at = now() - $3::interval,"
            " finished_at = case when $2 <> 'waiting' then now() - $3::interval end where event_id = $1",
            f"{number}",
            state,
            timedelta(days=days),
        )
    kept = {"done": timedelta(days=7), "other": timedelta(days=90)}
    assert [await receipts.forget(desk.way.worker, **kept, most=2) for _ in range(3)] == [2, 1, 0]
    assert await desk.states() == {"done": 1, "unmatched": 1, "waiting": 1}


async def test_what_providers_called_messages_is_forgotten_after_its_time(desk: Desk) -> None:
    await desk.way.superuser.execute(
        "insert into provider_message_ids select 'sendgrid', n::text, gen_random_uuid(), now(), 1, 1,"
        " now() - n * interval '10 days' from generate_series(0, 5) n"
    )
    forget = receipts.forget_provider_message_ids
    assert [await forget(desk.way.worker, timedelta(days=25), most=2) for _ in range(3)] == [2, 1, 0]
    assert await desk.way.superuser.fetchval("select count(*) from provider_message_ids") == 3


async def test_the_api_can_store_and_count_what_comes_and_neither_read_nor_change_it(desk: Desk) -> None:
    await desk.receive({"event": "open"})
    for statement in (
        "select * from provider_receipts",
        "delete from provider_receipts",
        "update provider_receipts set state = 'done'",
        "insert into provider_receipts (provider, event_id, body, received_at, due) values ('a', 'b', '', now(), now())",
        "select * from waiting_receipts(array['sendgrid'], 1, 1)",
        "select * from settle_receipts('{1}', '{done}', '{null}', '1 day', 3)",
        "select forget_receipts('0', '0', 1)",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await desk.api.execute(statement)
    assert await desk.states() == {"waiting": 1}


# --- the whole way -----------------------------------------------------------------------------------------------------


async def test_the_webhooks_of_a_running_sendgrid_move_the_statuses(
    desk: Desk, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    async with sendgrid_double() as double:
        settings = make_settings("api", SENDGRID_WEBHOOK_SECRET=double.verification_key)
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(create_app(settings), port=port, log_config=None, lifespan="on"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        url = f"http://127.0.0.1:{port}/api/v1/webhooks/sendgrid"
        double.webhook = Webhook(url, kinds=("delivered", "processed", "open"))
        provider = SendGridProvider(API_KEY, url=double.url, reports=True)
        loops: list[Loop] = [
            Delivery(desk.way.worker, Router.of([provider], desk.settings), desk.settings),
            Normaliser(desk.way.worker, desk.settings),
        ]
        running = [asyncio.create_task(loop.run()) for loop in loops]
        accepted = await asyncio.gather(*(desk.way.intake.accept(a_draft(f"{n}@example.net")) for n in range(300)))
        async with asyncio.timeout(30):
            while await desk.way.statuses() != ["delivered"] * 300 or await recorded_events(desk) != {
                "sent": 300,
                "delivered": 300,
                "open": 300,
            }:
                await asyncio.sleep(0.05)
        # and once more, in another order
        events = double.events(double.taken, ("spamreport", "click"))
        assert [await double.post(url, events[::step]) for step in (-1, 1)] == [200, 200]
        async with asyncio.timeout(30):
            while await desk.way.statuses() != ["complained"] * 300:
                await asyncio.sleep(0.05)
        for loop in loops:
            loop.stop()
        await asyncio.gather(*running)
        await provider.close()
        server.should_exit = True
        await serving
    rows = await desk.way.superuser.fetch("select distinct email_id from email_events where event_id is not null")
    assert {row["email_id"] for row in rows} == {answer.id for answer in accepted}
    assert await desk.way.superuser.fetchval("select count(*) from suppressions") == 300
    assert await desk.states() == {"done": 1500}
    assert await desk.way.events(EventType.DUPLICATE) == 0
