"""Customers' webhooks on real servers: every event, signed, in order, whatever happens to either side meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import asyncpg
import msgspec
import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from neoforge_email import db, endpoints, lifecycle, providers, uncertain, webhooks
from neoforge_email.delivery import Delivery
from neoforge_email.egress import Answer
from neoforge_email.outbox import Intake
from neoforge_email.settings import Settings
from tests.receiver import Received, Receiver, receiving
from tests.service.webhook_yard import OTHER, SHOP, VARIABLES, Yard, told, until, verified
from tests.support import Database

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MANY = 1000  # messages


@pytest.fixture
async def yard(database: Database, make_settings: Callable[..., Settings]) -> AsyncIterator[Yard]:
    settings = make_settings("api")
    worker = make_settings("worker")
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop'), ('other')")
    async with (
        await db.create_pool(settings, settings.database_url, "test-api") as api,
        await db.create_pool(worker, worker.database_url, "test-worker") as pool,
    ):
        intake = Intake(api, expire_after=timedelta(hours=100), on_commit=lambda: None)
        await intake.start()
        yield Yard(database, make_settings, api, pool, superuser, intake)
        await intake.close()
    await superuser.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def answering(*statuses: int, headers: dict[str, str] | None = None) -> Respond:
    """Answer with these statuses one after the other, and with the last one ever after."""
    left = list(statuses)

    async def respond(request: web.Request) -> web.Response:
        status = left.pop(0) if len(left) > 1 else left[0]
        return web.Response(status=status, text=f"because of {status}", headers=headers or {})

    return respond


# --- what is sent ----------------------------------------------------------------------------------------------------


async def test_an_event_comes_signed_and_says_what_became_of_whom(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url + "hooks?token=1")
    email_id = await yard.message("Ada@example.net", tags=["order"], metadata={"order": 4711})
    at = datetime(2026, 3, 1, 12, 30, 15, 250000, tzinfo=UTC)
    detail = {"smtp": "id-1"}
    await yard.report(email_id, "delivered", occurred_at=at, response="250 ok", detail=detail)
    await yard.drain()
    [request] = receiver.requests
    assert request.path == "/hooks?token=1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("NeoForge-Email/")
    assert verified(request, endpoint.secret) == {
        "type": "email.delivered",
        "timestamp": "2026-03-01T12:30:15.250Z",
        "data": {
            "email_id": str(email_id),
            "recipient": "Ada@example.net",
            "kind": "to",
            "status": "delivered",
            "attempt": 1,
            "provider": "sendgrid",
            "response": "250 ok",
            "tags": ["order"],
            "metadata": {"order": 4711},
            "detail": {"smtp": "id-1"},
        },
    }
    [(state, tries, status, answer)] = await yard.deliveries("state", "tries", "status", "answer")
    assert (state, tries, status, answer) == ("delivered", 1, 200, "taken")


async def test_a_changed_body_or_another_secret_is_not_verified(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    other = await yard.endpoint(receiver.url, "email.bounce")
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    [request] = receiver.requests
    with pytest.raises(WebhookVerificationError):
        Webhook(endpoint.secret).verify(request.body.replace(b"delivered", b"bounced"), request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(other.secret).verify(request.body, request.headers)


async def test_after_a_rotation_both_secrets_verify_for_a_day_and_then_the_new_one_alone(
    yard: Yard, receiver: Receiver
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    first = await endpoints.rotate_secret(yard.api, SHOP, endpoint.id)
    second = await endpoints.rotate_secret(yard.api, SHOP, endpoint.id)
    email_id = await yard.message()
    await yard.report(email_id, "delivered")
    await yard.drain()
    await yard.step(25 * HOUR)
    await yard.report(email_id, "open")
    await yard.drain()
    during, after = receiver.requests
    assert verified(during, first.secret, second.secret)
    assert verified(after, second.secret)
    for request, secret in ((during, endpoint.secret), (after, first.secret)):
        with pytest.raises(WebhookVerificationError):
            verified(request, secret)
    await webhooks.forget(yard.worker)
    assert await yard.superuser.fetchval("select count(*) from webhook_secrets") == 1


async def test_what_the_worker_itself_does_is_told_as_well(
    yard: Yard, receiver: Receiver, make_settings: Callable[..., Settings]
) -> None:
    await yard.endpoint(receiver.url)
    await yard.superuser.execute(
        "insert into suppressions (user_id, address, reason) values (1, 'bob@example.net', 'bounce')"
    )
    email_id = await yard.message("ada@example.net", "bob@example.net")
    settings = make_settings("worker")
    delivery = Delivery(yard.worker, providers.create(settings), settings)
    running = asyncio.create_task(delivery.run())
    await delivery.drained()
    delivery.stop()
    await running
    await yard.drain()
    payloads = [msgspec.json.decode(request.body)["data"] for request in receiver.requests]
    assert {(it["email_id"], it["recipient"], it["status"]) for it in payloads} == {
        (str(email_id), "ada@example.net", "sent"),
        (str(email_id), "bob@example.net", "suppressed"),
    }


async def test_what_the_sweep_and_the_clock_decide_is_told_as_well(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    held, lost, late = [await yard.message() for _ in range(3)]
    await yard.worker.execute("select * from claim('w', 10, '1 minute', '{0,0,0}')")
    await yard.worker.execute("select hold(array[$1::uuid], array[1], 'unreadable')", held)
    await yard.worker.execute("select attempt(array[$1::uuid], array[1], array['1 second'::interval], '{smtp}')", lost)
    await yard.worker.execute("select release(array[$1::uuid], array[1], '200 hours')", late)
    await yard.step(2 * MINUTE)
    await yard.worker.execute("select sweep(null, '{}', '300 hours', '300 hours', 3, 3, 10)")
    await yard.step(101 * HOUR)
    await yard.worker.execute("select expire(10)")
    await yard.drain()
    assert told(receiver.requests) == {str(held): ["held"], str(lost): ["uncertain"], str(late): ["expired"]}


async def test_what_an_operator_decides_is_told_with_the_status_that_it_made(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    emails = [await yard.message() for _ in range(2)]
    await yard.worker.execute("select * from claim('w', 10, '1 minute', '{0,0,0}')")
    await yard.worker.execute(
        "select attempt($1::uuid[], array[1, 1], array_fill('1 second'::interval, array[2]), '{smtp,smtp}')", emails
    )
    await yard.step(2 * MINUTE)
    await yard.worker.execute("select sweep(null, '{}', '1 hour', '1 hour', 3, 3, 10)")
    operator = await db.connect(Database.url(yard.database.migrator), "test")
    confirmed, resent = emails
    assert await uncertain.confirm(operator, [confirmed]) == {confirmed: None}
    assert await uncertain.resend(operator, [resent]) == {resent: None}
    await operator.close()
    await yard.drain()
    payloads = [msgspec.json.decode(request.body) for request in receiver.requests]
    came = {(it["data"]["email_id"], it["type"], it["data"]["status"]) for it in payloads}
    assert came == {
        (str(confirmed), "email.uncertain", "uncertain"),
        (str(confirmed), "email.released", "sent"),
        (str(resent), "email.uncertain", "uncertain"),
        (str(resent), "email.released", "uncertain"),
    }


async def test_an_endpoint_gets_the_types_that_it_chose_of_its_own_user_only(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url + "all")
    await yard.endpoint(receiver.url + "some", "email.bounce", "email.spam_report")
    await yard.endpoint(receiver.url + "other", user_id=OTHER)
    await yard.report(await yard.message(), "delivered")
    await yard.report(await yard.message(), "bounce")
    await yard.drain()
    came = sorted((request.path, msgspec.json.decode(request.body)["type"]) for request in receiver.requests)
    assert came == [("/all", "email.bounce"), ("/all", "email.delivered"), ("/some", "email.bounce")]
    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert len(set(ids)) == 3


async def test_nothing_is_queued_for_those_who_have_no_endpoint(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url, user_id=OTHER)
    await yard.report(await yard.message(), "delivered")
    assert await yard.states() == {}


async def test_what_is_rolled_back_is_not_told(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    email_id = await yard.message()
    async with yard.worker.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("select tell(array[$1::uuid], 'held', array['test'])", email_id)
        await transaction.rollback()
    assert await yard.states() == {}


async def test_a_payload_stays_below_20_kilobytes(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    large = {"k": "\N{SNOWMAN}" * 3300}
    small = await yard.message(metadata=large, tags=["t" * 256] * 10)
    await yard.report(small, "click", detail={"url": "u" * 2000})
    too_large = await yard.message(metadata=large)
    await yard.report(too_large, "click", detail={"url": "u" * 10_000}, response="x" * 500)
    await yard.drain()
    assert all(len(request.body) < 20_000 for request in receiver.requests)
    whole, cut = sorted((verified(it, endpoint.secret) for it in receiver.requests), key=lambda it: "truncated" in it)
    assert whole["data"]["metadata"] == large
    assert cut["truncated"] is True
    assert cut["data"]["email_id"] == str(too_large)
    assert "metadata" not in cut["data"]
    assert "detail" not in cut["data"]


def test_every_type_of_event_can_be_chosen() -> None:
    assert {f"email.{event.value}" for event in lifecycle.EventType} < endpoints.TYPES


# --- order -----------------------------------------------------------------------------------------------------------


async def test_of_one_message_events_come_one_after_the_other_in_their_order(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    email_id = await yard.message()
    at = datetime.now(UTC)
    await yard.report(email_id, "open", occurred_at=at + timedelta(seconds=2))
    await yard.report(email_id, "delivered", occurred_at=at + timedelta(seconds=1))
    under_way, most = 0, 0

    async def respond(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return web.Response()

    receiver.respond = respond
    for kind in ("click", "click", "spam_report"):
        await yard.report(email_id, kind)
    await yard.drain()
    assert told(receiver.requests) == {str(email_id): ["open", "delivered", "click", "click", "spam_report"]}
    assert most == 1


async def test_events_of_one_transaction_are_in_the_order_of_their_times(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    email_id = await yard.message()
    await yard.report(email_id, "click", "open", "delivered")
    await yard.drain()
    assert told(receiver.requests) == {str(email_id): ["delivered", "open", "click"]}


async def test_a_later_event_waits_for_an_earlier_one_that_failed_and_other_messages_do_not(
    yard: Yard, receiver: Receiver
) -> None:
    await yard.endpoint(receiver.url)
    first, second = await yard.message(), await yard.message()
    await yard.report(first, "delivered")
    receiver.respond = answering(500, 200)
    await yard.drain()
    await yard.report(first, "open")
    await yard.report(second, "delivered")
    await yard.drain()
    assert told(receiver.requests) == {str(first): ["delivered"], str(second): ["delivered"]}
    await yard.step(timedelta(seconds=5))
    await yard.drain()
    assert told(receiver.requests)[str(first)] == ["delivered", "delivered", "open"]


async def test_two_senders_keep_the_order_and_send_nothing_twice(
    yard: Yard, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "RETRIES", (timedelta(milliseconds=20),))
    monkeypatch.setattr(webhooks, "PAUSES", (timedelta(milliseconds=20),))
    monkeypatch.setattr(webhooks, "FAILING", 1000)
    endpoint = await yard.endpoint(receiver.url)
    chance = random.Random(7)
    refused = taken = 0

    async def respond(request: web.Request) -> web.Response:
        nonlocal refused, taken
        await asyncio.sleep(chance.random() * 0.01)
        if chance.random() < 0.1:
            refused += 1
            return web.Response(status=500)
        taken += 1
        return web.Response()

    receiver.respond = respond
    kinds = ["delivered", "open", "click", "unsubscribe", "spam_report"]
    async with yard.sender(WORKER_INSTANCE="1") as one, yard.sender(WORKER_INSTANCE="2") as two:
        emails = await asyncio.gather(*(yard.message() for _ in range(100)))
        for kind in kinds:
            for start in range(0, 100, 10):
                await yard.report_all([(email_id, kind) for email_id in emails[start : start + 10]])
        await until(lambda: taken >= 500, 60)
        await asyncio.gather(one.drained(), two.drained())
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 500
    assert len(receiver.requests) == 500 + refused
    assert taken == 500
    assert refused > 0
    for request in receiver.requests:
        verified(request, endpoint.secret)
    for came in told(receiver.requests).values():
        assert list(dict.fromkeys(came)) == kinds
        assert came == sorted(came, key=kinds.index)
    assert await yard.states() == {"delivered": 500}


# --- failures --------------------------------------------------------------------------------------------------------


async def test_an_endpoint_that_is_down_for_an_hour_gets_every_event_afterwards(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    receiver.respond = answering(503)
    kinds = ["delivered", "open", "click"]
    emails = list(await asyncio.gather(*(yard.message() for _ in range(MANY))))
    async with yard.sender() as sender:
        for minute in range(60):
            kind = kinds[minute // 20]
            await yard.report_all([(email_id, kind) for email_id in emails[minute % 20 :: 20]])
            await sender.drained()
            await yard.step(MINUTE)
        probes = len(receiver.requests)
        assert 10 <= probes <= 40
        assert "delivered" not in await yard.states()
        assert (await endpoints.get(yard.api, SHOP, endpoint.id)).state == "failing"

        receiver.requests.clear()
        receiver.respond = None
        await yard.step(5 * MINUTE)
        async with asyncio.timeout(60):
            await sender.drained()
    assert len(receiver.requests) == len({it.headers["webhook-id"] for it in receiver.requests}) == 3 * MANY
    for request in receiver.requests:
        verified(request, endpoint.secret)
    assert told(receiver.requests) == {str(email_id): kinds for email_id in emails}
    assert await yard.states() == {"delivered": 3 * MANY}
    assert await yard.happened(endpoint.id) == ["created", "failing", "recovered"]


def test_the_schedule_is_the_published_one() -> None:
    waits = [webhooks.wait(tries, 3, 0) for tries in range(1, 40)]
    seconds, minutes = timedelta(seconds=1), timedelta(minutes=1)
    a_round = [5 * seconds, minutes, 5 * minutes]
    assert waits[:9] == [*a_round, 15 * minutes, *a_round, 30 * minutes, 5 * seconds]
    assert [waits[n] for n in (11, 15, 19, 23)] == [HOUR, 2 * HOUR, 4 * HOUR, 4 * HOUR]
    assert webhooks.wait(1, 3, 0.999) > 4 * seconds
    assert [webhooks.wait(tries, 0, 0) for tries in (1, 2)] == [15 * minutes, 30 * minutes]
    assert [webhooks.wait(tries, 5, 0) for tries in (3, 4, 5, 6)] == [5 * minutes] * 3 + [15 * minutes]


@pytest.mark.parametrize("status", [301, 307, 400, 404, 408, 429, 500, 503])
async def test_whatever_is_no_success_is_tried_again_under_the_same_id(
    status: int, yard: Yard, receiver: Receiver
) -> None:
    await yard.endpoint(receiver.url)
    receiver.respond = answering(status, 204)
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    assert await yard.deliveries("state", "tries", "status", "answer") == [
        ("pending", 1, status, f"because of {status}")
    ]
    await yard.step(timedelta(seconds=5))
    await yard.drain()
    assert await yard.deliveries("state", "tries", "status") == [("delivered", 2, 204)]
    first, second = receiver.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


@pytest.mark.parametrize(("status", "asked", "waits"), [(429, 600, 600), (503, 999_999, 4 * 3600), (500, 600, 5)])
async def test_an_endpoint_that_asks_for_time_is_left_alone_for_as_long(
    status: int, asked: int, waits: int, yard: Yard, receiver: Receiver
) -> None:
    await yard.endpoint(receiver.url)
    receiver.respond = answering(status, 200, headers={"Retry-After": str(asked)})
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    await yard.report(await yard.message(), "delivered")
    await yard.step(timedelta(seconds=0.7 * waits))
    await yard.drain()
    assert len(receiver.requests) == (1 if waits > 5 else 2)
    await yard.step(timedelta(seconds=0.4 * waits))
    await yard.drain()
    assert await yard.states() == {"delivered": 2}


async def test_an_endpoint_that_is_gone_is_disabled_at_once_and_the_others_hear_of_it(
    yard: Yard, receiver: Receiver
) -> None:
    gone = await yard.endpoint(receiver.url + "gone")
    other = await yard.endpoint(receiver.url + "other", "webhook.disabled")
    deaf = await yard.endpoint(receiver.url + "deaf", "email.bounce")

    async def respond(request: web.Request) -> web.Response:
        return web.Response(status=410 if request.path == "/gone" else 200)

    receiver.respond = respond
    email_id = await yard.message()
    await yard.report(email_id, "delivered", "open")
    async with yard.sender() as sender:
        await sender.drained()
        await until(lambda: any(it.path == "/other" for it in receiver.requests))
        await yard.report(email_id, "click")
        while (await yard.states()).get("pending"):
            await asyncio.sleep(0.02)
    assert sorted(it.path for it in receiver.requests) == ["/gone", "/other"]
    [said] = [verified(it, other.secret) for it in receiver.requests if it.path == "/other"]
    assert said["type"] == "webhook.disabled"
    assert said["data"]["endpoint_id"] == str(gone.id)
    assert said["data"]["reason"] == "gone"
    detail = await endpoints.get(yard.api, SHOP, gone.id)
    assert (detail.state, detail.disabled_reason) == ("disabled", "gone")
    assert detail.deliveries == {"pending": 0, "leased": 0, "delivered": 0, "dead": 2}
    assert detail.events[0].type == "disabled"
    assert (await endpoints.get(yard.api, SHOP, deaf.id)).deliveries["delivered"] == 0


async def test_an_endpoint_that_takes_nothing_for_three_days_is_disabled_and_can_be_replayed(
    yard: Yard, receiver: Receiver
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    receiver.respond = answering(500)
    email_id = await yard.message()
    await yard.report(email_id, "delivered", "open")
    async with yard.sender() as sender:
        for _ in range(71):
            await sender.drained()
            await yard.step(HOUR)
        assert await yard.happened(endpoint.id) == ["created", "failing"]
        for _ in range(3):
            await sender.drained()
            await yard.step(HOUR)
        assert await yard.happened(endpoint.id) == ["created", "failing", "disabled"]
        while (await yard.states()).get("pending"):
            await asyncio.sleep(0.02)
        await yard.report(email_id, "click")  # kept for the replay
    assert await yard.states() == {"dead": 3}
    assert await yard.deliveries("answer") == [
        "because of 500",
        "the endpoint was disabled",
        "not sent, since the endpoint was disabled",
    ]
    tried = len(receiver.requests)

    receiver.respond = None
    with pytest.raises(endpoints.EndpointDisabled):
        await endpoints.replay_range(
            yard.api, SHOP, endpoint.id, datetime.now(UTC) - HOUR, datetime.now(UTC) + 100 * HOUR
        )
    await endpoints.enable(yard.api, SHOP, endpoint.id)
    begin, end = datetime.now(UTC) - HOUR, datetime.now(UTC) + 100 * HOUR
    assert (await endpoints.replay_range(yard.api, SHOP, endpoint.id, begin, end)).replayed == 3
    await yard.drain()
    assert told(receiver.requests[tried:]) == {str(email_id): ["delivered", "open", "click"]}
    assert await yard.states() == {"delivered": 3}


async def test_one_event_that_is_never_taken_is_dead_after_three_days_and_holds_up_its_message_alone(
    yard: Yard, receiver: Receiver
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    poisoned, well = await yard.message(), await yard.message()

    async def respond(request: web.Request) -> web.Response:
        poison = poisoned.hex in (await request.text()).replace("-", "") and b"delivered" in await request.read()
        return web.Response(status=400 if poison else 200)

    receiver.respond = respond
    async with yard.sender() as sender:
        await yard.report(poisoned, "delivered")
        await yard.report(poisoned, "bounce")
        for _ in range(75):
            await yard.report(well, "open")
            await sender.drained()
            await yard.step(HOUR)
    states = await yard.deliveries("state", "type")
    assert [state for state, kind in states if kind == "email.delivered"] == ["dead"]
    assert {state for state, kind in states if kind != "email.delivered"} == {"delivered"}
    assert (await endpoints.get(yard.api, SHOP, endpoint.id)).state == "ok"


async def test_a_failure_after_a_long_silence_does_not_disable(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    receiver.respond = answering(500)
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    await yard.superuser.execute("delete from webhook_deliveries")
    await yard.step(100 * HOUR)
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    assert (await endpoints.get(yard.api, SHOP, endpoint.id)).state == "ok"


async def test_an_endpoint_that_hangs_gets_few_calls_and_delays_nobody(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url + "hangs")
    quick = await yard.endpoint(receiver.url + "quick", user_id=OTHER)
    hanging, answer = 0, asyncio.Event()

    async def respond(request: web.Request) -> web.Response:
        nonlocal hanging
        if request.path == "/quick":
            return web.Response()
        hanging += 1
        try:
            await answer.wait()
        finally:
            hanging -= 1
        return web.Response(status=500)

    def came(path: str) -> list[Received]:
        return [request for request in receiver.requests if request.path == path]

    receiver.respond = respond
    await yard.report_all([(await yard.message(), "delivered") for _ in range(50)])
    async with yard.sender(WEBHOOK_TIMEOUT="60") as sender:
        await until(lambda: hanging == webhooks.IN_FLIGHT_EACH)
        for _ in range(20):
            await yard.report(await yard.message(user_id=OTHER), "delivered")
        await until(lambda: len(came("/quick")) == 20)
        assert hanging == len(came("/hangs")) == webhooks.IN_FLIGHT_EACH
        answer.set()
        await sender.drained()
        answer.clear()
        hung = len(came("/hangs"))
        assert hung < 20
        await yard.step(timedelta(seconds=20))  # it keeps failing: from now on one at a time
        await until(lambda: hanging == 1)
        await asyncio.sleep(0.3)
        assert len(came("/hangs")) == hung + 1
        answer.set()
        await sender.drained()
    assert await yard.states() == {"pending": 50, "delivered": 20}
    assert all(verified(request, quick.secret) for request in came("/quick"))


async def test_many_endpoints_that_hang_leave_room_for_the_others(
    yard: Yard, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "IN_FLIGHT", 40)
    monkeypatch.setattr(webhooks, "RESERVE", 16)
    for _ in range(10):
        await yard.endpoint(receiver.url + "hangs")
    await yard.endpoint(receiver.url + "quick", user_id=OTHER)
    answer = asyncio.Event()

    async def respond(request: web.Request) -> web.Response:
        if request.path == "/hangs":
            await answer.wait()
        return web.Response()

    receiver.respond = respond
    await yard.report_all([(await yard.message(), "delivered") for _ in range(10)])
    async with yard.sender() as sender:
        await until(lambda: len(receiver.requests) >= 24)
        for _ in range(5):
            await yard.report(await yard.message(user_id=OTHER), "delivered")
        await until(lambda: sum(it.path == "/quick" for it in receiver.requests) == 5, 3)
        answer.set()
        await sender.drained()
    assert await yard.states() == {"delivered": 105}


async def test_a_backlog_of_a_dead_endpoint_costs_the_others_nothing(yard: Yard, receiver: Receiver) -> None:
    dead = await yard.endpoint(receiver.url + "dead")
    await yard.endpoint(receiver.url + "quick", user_id=OTHER)
    emails = [await yard.message(user_id=OTHER) for _ in range(3)]

    async def blocks() -> int:
        """Blocks that a claim and a sweep touch together; with nothing due for the dead one they find one delivery."""
        await yard.report(emails.pop(), "delivered")
        async with yard.worker.acquire() as connection:
            before = await connection.fetchval(TOUCHED)
            claims = await webhooks.claim(connection, "w", 256, MINUTE)  # type: ignore[arg-type]
            await webhooks.sweep(connection)  # type: ignore[arg-type]
            return int(await connection.fetchval(TOUCHED)) - int(before) if len(claims) == 1 else -1

    async def fill(count: int) -> None:
        """Queue so many events of as many messages, half of them due, for an endpoint that is paused."""
        await yard.superuser.execute(FILL, dead.id, count)
        await yard.superuser.execute("vacuum analyze webhook_deliveries")

    await yard.superuser.execute(
        "update webhook_endpoints set failures = 9, failing_since = clock(), failed_at = clock(),"
        " paused_until = clock() + interval '5 minutes' where id = $1",
        dead.id,
    )
    await fill(100)
    few = await blocks()
    await fill(50_000)
    many = await blocks()
    assert 0 < many < 2 * few
    await yard.superuser.execute("update webhook_endpoints set paused_until = null where id = $1", dead.id)
    async with yard.worker.acquire() as connection:
        before = await connection.fetchval(TOUCHED)
        assert len(await webhooks.claim(connection, "w", 256, MINUTE)) == 1  # type: ignore[arg-type]
        assert int(await connection.fetchval(TOUCHED)) - int(before) < 3 * few


async def test_a_url_that_leads_to_our_own_machines_is_never_called(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    await yard.report(await yard.message(), "delivered")
    await yard.drain(WEBHOOK_ALLOWED_NETWORKS="10.0.0.0/8")
    assert not receiver.requests
    assert await yard.deliveries("state", "status") == [("pending", None)]
    [answer] = await yard.deliveries("answer")
    assert "not public" in answer


async def test_an_endpoint_without_a_secret_gets_nothing_and_harms_nobody(yard: Yard, receiver: Receiver) -> None:
    bare = await yard.endpoint(receiver.url + "bare")
    await yard.endpoint(receiver.url + "whole")
    await yard.superuser.execute("delete from webhook_secrets where endpoint_id = $1", bare.id)
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    assert [request.path for request in receiver.requests] == ["/whole"]
    assert sorted(await yard.deliveries("state")) == ["delivered", "pending"]


TOUCHED = """
select pg_stat_get_xact_blocks_fetched('webhook_deliveries'::regclass) + sum(pg_stat_get_xact_blocks_fetched(indexrelid))
from pg_index where indrelid = 'webhook_deliveries'::regclass
"""
FILL = """
insert into webhook_deliveries (id, endpoint_id, email_id, created_at, due, user_id, state, type, payload)
select uuid7(clock()), $1, uuid7(clock()), clock(), clock() + (n % 2) * interval '1 hour', 1, 'pending', 'email.delivered', '{}'
from generate_series(1, $2) n
"""

# --- kills, leases, replays --------------------------------------------------------------------------------------------

SENDER = """
import asyncio, os
from neoforge_email import db, webhooks
from neoforge_email.settings import Settings

async def main():
    settings = Settings.from_environment(os.environ)
    pool = await db.create_pool(settings, settings.database_url, "test-sender")
    await webhooks.Sender(pool, settings).run()

asyncio.run(main())
"""


@pytest.mark.parametrize("instance", ["the same", "another"])
async def test_what_a_killed_sender_had_begun_is_sent_again_under_the_same_id(
    instance: str, yard: Yard, receiver: Receiver, environment: dict[str, str]
) -> None:
    endpoint = await yard.endpoint(receiver.url)

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    receiver.respond = hang
    emails = [await yard.message() for _ in range(5)]
    for email_id in emails:
        await yard.report(email_id, "delivered", "open")
    variables = {**os.environ, **environment, **VARIABLES, "DATABASE_URL": yard.database.worker, "WORKER_INSTANCE": "7"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SENDER, env=variables)
    try:
        await until(lambda: len(receiver.requests) == 5, 30)
    finally:
        process.kill()
        await process.wait()
    receiver.respond = None
    assert await yard.states() == {"leased": 5, "pending": 5}
    if instance == "another":
        await yard.drain(WORKER_INSTANCE="8")
        assert await yard.states() == {"leased": 5, "pending": 5}
        await yard.step(timedelta(seconds=36))  # WEBHOOK_TIMEOUT and 30 s
        async with yard.sender(WORKER_INSTANCE="8"):
            await until(lambda: len(receiver.requests) == 15)
    else:
        await yard.drain(WORKER_INSTANCE="7")
    assert await yard.states() == {"delivered": 10}
    assert len(receiver.requests) == 15
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 10
    assert told(receiver.requests[5:]) == {str(email_id): ["delivered", "open"] for email_id in emails}
    assert all(verified(request, endpoint.secret) for request in receiver.requests)


def reached(receiver: Receiver, count: int) -> bool:
    return len(receiver.requests) >= count


async def test_a_sender_that_is_killed_again_and_again_loses_nothing(
    yard: Yard, receiver: Receiver, environment: dict[str, str]
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    chance = random.Random(11)

    async def respond(request: web.Request) -> web.Response:
        await asyncio.sleep(chance.random() * 0.03)
        return web.Response(status=200 if chance.random() < 0.9 else 500)

    receiver.respond = respond
    kinds = ["delivered", "open", "click"]
    emails = [await yard.message() for _ in range(60)]
    for kind in kinds:
        await yard.report_all([(email_id, kind) for email_id in emails])
    variables = {**os.environ, **environment, **VARIABLES, "DATABASE_URL": yard.database.worker, "WORKER_INSTANCE": "7"}
    for _ in range(5):
        enough = len(receiver.requests) + chance.randrange(5, 25)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SENDER, env=variables)
        try:
            await until(partial(reached, receiver, enough), 30)
        finally:
            process.kill()
            await process.wait()
    receiver.respond = None
    async with yard.sender(WORKER_INSTANCE="7") as sender:
        for _ in range(3):
            await sender.drained()
            await yard.step(MINUTE)
        await sender.drained()
    assert await yard.states() == {"delivered": 180}
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 180
    by_message = told(receiver.requests)
    assert by_message.keys() == {str(email_id) for email_id in emails}
    for came_kinds in by_message.values():
        assert list(dict.fromkeys(came_kinds)) == kinds
        assert came_kinds == sorted(came_kinds, key=kinds.index)
    assert all(verified(request, endpoint.secret) for request in receiver.requests)


async def test_a_worker_process_sends_a_message_and_tells_of_it(
    yard: Yard, receiver: Receiver, environment: dict[str, str]
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    email_id = await yard.message()
    variables = {**os.environ, **environment, **VARIABLES, "DATABASE_URL": yard.database.worker}
    worker = "neoforge_email.worker.WorkerSettings"
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "arq", worker, "--burst", env=variables)
    assert await process.wait() == 0
    assert told(receiver.requests) == {str(email_id): ["sent"]}
    assert verified(receiver.requests[0], endpoint.secret)
    assert await yard.states() == {"delivered": 1}


async def test_a_sender_that_is_stopped_finishes_what_it_began(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        return web.Response()

    receiver.respond = slow
    for _ in range(30):
        await yard.report(await yard.message(), "delivered")
    async with yard.sender():
        await until(lambda: len(receiver.requests) == webhooks.IN_FLIGHT_EACH)
    assert await yard.states() == {"delivered": webhooks.IN_FLIGHT_EACH, "pending": 30 - webhooks.IN_FLIGHT_EACH}


async def test_a_success_counts_although_its_lease_was_lost_unless_somebody_has_taken_it_up(
    yard: Yard, receiver: Receiver
) -> None:
    await yard.endpoint(receiver.url)
    for _ in range(2):
        await yard.report(await yard.message(), "delivered")
    lost = await webhooks.claim(yard.worker, "one", 10, timedelta(seconds=1))
    await yard.step(timedelta(seconds=2))
    assert await webhooks.sweep(yard.worker) == (2, 0)
    [taken] = await webhooks.claim(yard.worker, "two", 1, timedelta(seconds=60))
    ok = Answer(200, "")
    bad = Answer(500, "")
    states = await webhooks.complete(yard.worker, [webhooks.Outcome(item, ok, MINUTE, None) for item in lost])
    assert states == {item.id: "delivered" for item in lost if item.id != taken.id}
    assert await webhooks.complete(yard.worker, [webhooks.Outcome(lost[0], bad, MINUTE, None)]) == {}
    assert await webhooks.complete(yard.worker, [webhooks.Outcome(taken, ok, MINUTE, None)]) == {taken.id: "delivered"}


async def test_the_database_may_be_away_between_call_and_outcome(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def respond(request: web.Request) -> web.Response:
        arrived.set()
        await answer.wait()
        return web.Response()

    receiver.respond = respond
    await yard.report(await yard.message(), "delivered")
    async with yard.sender() as sender:
        await arrived.wait()
        await yard.superuser.execute("alter role neoforge_worker connection limit 0")
        try:
            await yard.superuser.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
            answer.set()
            await asyncio.sleep(0.3)
            assert await yard.states() == {"leased": 1}
        finally:
            await yard.superuser.execute("alter role neoforge_worker connection limit -1")
        await sender.drained()
    assert await yard.states() == {"delivered": 1}
    assert len(receiver.requests) == 1


async def test_a_replay_by_ids_sends_the_same_again(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    for _ in range(3):
        await yard.report(await yard.message(), "delivered")
    await yard.drain()
    first = receiver.requests[:]
    receiver.requests.clear()
    [one, two, _] = await yard.deliveries("id")
    replayed = await endpoints.replay_ids(yard.api, SHOP, endpoint.id, [one, two])
    assert replayed.replayed == 2
    await yard.drain()
    again = {request.headers["webhook-id"]: request.body for request in receiver.requests}
    assert again.keys() == {webhooks.webhook_id(one), webhooks.webhook_id(two)}
    assert again.items() <= {request.headers["webhook-id"]: request.body for request in first}.items()
    assert (await endpoints.replay_ids(yard.api, SHOP, endpoint.id, [endpoint.id])).replayed == 0


async def test_a_replay_by_time_sends_what_was_queued_then(
    yard: Yard, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    for _ in range(4):
        await yard.report(await yard.message(), "delivered")
        await yard.step(HOUR)
    await yard.drain()
    ids = await yard.deliveries("id")
    times = await yard.deliveries("created_at")
    receiver.requests.clear()
    assert (await endpoints.replay_range(yard.api, SHOP, endpoint.id, times[1], times[2])).replayed == 2
    await yard.drain()
    came = [request.headers["webhook-id"] for request in receiver.requests]
    assert sorted(came) == sorted(webhooks.webhook_id(delivery_id) for delivery_id in ids[1:3])

    monkeypatch.setattr(endpoints, "REPLAYED", 3)
    part = await endpoints.replay_range(yard.api, SHOP, endpoint.id, times[0] - HOUR, times[3])
    assert part.replayed == 3
    assert part.more_from is not None
    assert abs(part.more_from - times[2]) < timedelta(milliseconds=1)


# --- what stays ------------------------------------------------------------------------------------------------------


async def test_what_was_delivered_is_forgotten_after_30_days_and_what_is_dead_after_90(
    yard: Yard, receiver: Receiver
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    for _ in range(2):
        await yard.report(await yard.message(), "delivered")
    await yard.drain()
    await yard.superuser.execute(
        "update webhook_deliveries set state = 'dead' where number = (select min(number) from webhook_deliveries)"
    )
    await yard.step(timedelta(days=29))
    assert await webhooks.forget(yard.worker) == 0
    await yard.step(timedelta(days=2))
    assert await webhooks.forget(yard.worker) == 1
    assert await yard.states() == {"dead": 1}
    await yard.step(timedelta(days=60))
    assert await webhooks.forget(yard.worker) == 1
    assert await yard.happened(endpoint.id) == []


async def test_of_a_deleted_endpoint_nothing_stays(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)
    email_id = await yard.message()
    await yard.report(email_id, "delivered")
    await yard.drain()
    await yard.report(email_id, "open")
    await endpoints.delete(yard.api, SHOP, endpoint.id)
    assert await webhooks.sweep(yard.worker) == (0, 0)
    assert await yard.states() == {"delivered": 1}
    assert await webhooks.forget(yard.worker) == 1
    for table in ("webhook_endpoints", "webhook_secrets", "webhook_deliveries", "webhook_endpoint_events"):
        assert await yard.superuser.fetchval(f"select count(*) from {table}") == 0, table


async def test_the_figures_say_what_waits_and_what_an_operator_has_to_look_at(yard: Yard, receiver: Receiver) -> None:
    endpoint = await yard.endpoint(receiver.url)

    async def stats() -> dict[str, tuple[int, int]]:
        """By state, how many there are, and for how many minutes the oldest has been there."""
        return {it.state: (it.size, int(it.oldest_seconds // 60)) for it in await webhooks.webhook_stats(yard.worker)}

    nothing = (0, 0)
    assert await stats() == {"pending": nothing, "overdue": nothing, "leased": nothing, "dead": nothing}
    email_id = await yard.message()
    await yard.report(email_id, "delivered", "open")
    await yard.step(MINUTE)
    assert await stats() == {"pending": (2, 1), "overdue": (1, 1), "leased": nothing, "dead": nothing}
    await webhooks.claim(yard.worker, "w", 10, MINUTE)
    await yard.step(MINUTE)
    assert await stats() == {"pending": (1, 2), "overdue": nothing, "leased": (1, 2), "dead": nothing}
    await webhooks.sweep(yard.worker)
    receiver.respond = answering(500)
    await yard.drain()
    assert (await stats())["overdue"] == nothing
    receiver.respond = answering(410)
    await endpoints.enable(yard.api, SHOP, endpoint.id)
    async with yard.sender() as sender:
        await sender.drained()
        while (await yard.states()) != {"dead": 2}:
            await asyncio.sleep(0.02)
    assert await stats() == {"pending": nothing, "overdue": nothing, "leased": nothing, "dead": (2, 2)}


async def test_the_api_cannot_read_a_secret_and_nobody_else_the_table(yard: Yard, receiver: Receiver) -> None:
    await yard.endpoint(receiver.url)
    for pool, statement in (
        (yard.api, "select secret from webhook_secrets"),
        (yard.api, "select * from webhook_secrets"),
        (yard.api, "update webhook_secrets set secret = 'x'"),
        (yard.api, "select * from claim_webhooks('w', 1, 1, 1, '1 minute')"),
        (yard.worker, "insert into webhook_secrets values (gen_random_uuid(), 1, now(), null, 'x')"),
        (yard.worker, "update webhook_secrets set secret = 'x'"),
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute(statement)


async def test_a_secret_stands_in_no_log_and_no_answer(
    yard: Yard, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = await yard.endpoint(receiver.url)
    receiver.respond = answering(500, 410)
    await yard.report(await yard.message(), "delivered")
    await yard.drain()
    await endpoints.enable(yard.api, SHOP, endpoint.id)
    await yard.drain()
    output = capsys.readouterr()
    everything: list[Any] = [output.out, output.err, await endpoints.list_all(yard.api, SHOP)]
    everything.append(await endpoints.get(yard.api, SHOP, endpoint.id))
    everything.append(await endpoints.deliveries(yard.api, SHOP, endpoint.id, endpoints.STATES, None, 10))
    assert "webhook.dead" in output.out + output.err
    assert endpoint.secret[6:] not in repr(everything)
