"""The double of SendGrid: that it refuses what SendGrid refuses, signs as SendGrid signs, and can be counted and steered."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from sendgrid.helpers.eventwebhook import EventWebhook  # type: ignore[import-untyped]

from neoforge_email.providers.base import Outcome
from neoforge_email.providers.sendgrid import ATTEMPT, SendGridProvider
from tests.provider_contract import deliver, outcomes
from tests.sendgrid_double import API_KEY, Fault, SendGridDouble, Webhook, sendgrid_double
from tests.sendgrid_events import SIGNATURE, TIMESTAMP
from tests.sendgrid_limits import Json, check
from tests.support import a_message


@pytest.fixture
async def double() -> AsyncIterator[SendGridDouble]:
    async with sendgrid_double() as one:
        yield one


async def send(url: str, *messages: Any) -> list[list[Outcome]]:
    provider = SendGridProvider(API_KEY, url=url, timeout=timedelta(seconds=2))
    try:
        return outcomes(await deliver(provider, messages))
    finally:
        await provider.close()


# --- limits -------------------------------------------------------------------------------------------------------


def to(*addresses: str) -> list[Json]:
    return [{"email": address} for address in addresses]


def people(count: int) -> list[Json]:
    return [{"to": to(f"user{number}@example.net")} for number in range(count)]


def one(**fields: Any) -> Json:
    """A change of the only personalization."""
    return {"personalizations": [{"to": to("ada@example.net"), **fields}]}


HTML, TEXT = {"type": "text/html", "value": "<p>x"}, {"type": "text/plain", "value": "x"}
ONCE = "should only be included once"
REFUSALS: dict[str, tuple[Json, str, str | None]] = {
    "no personalization": ({"personalizations": []}, "at least one personalization", "personalizations"),
    "too many": ({"personalizations": people(1001)}, "You have provided 1001 personalizations", "personalizations"),
    "too many recipients": (
        one(cc=to(*(f"user{number}@example.net" for number in range(1000)))),
        "limit of 1000 total recipients",
        "personalizations",
    ),
    "no to": ({"personalizations": [{"cc": to("a@example.net")}]}, "to parameter is required", "personalizations.0.to"),
    "no address": (one(bcc=[{"name": "Ada"}]), "valid address", "personalizations.0.bcc.0.email"),
    "a bad address": (one(to=to("ada@example.net", "ada@@b")), "valid address", "personalizations.0.to.1.email"),
    "one address twice": (one(cc=to("Ada@example.net")), ONCE, "personalizations"),
    "a reserved header": (one(headers={"Reply-To": "a"}), "reserved keys", "personalizations.0.headers.Reply-To"),
    "a reserved header for all": ({"headers": {"x-sg-id": "a"}}, "reserved keys", "headers.x-sg-id"),
    "a header that is no text": (one(headers={"X-A": 1}), "must be strings", "personalizations.0.headers"),
    "a header twice": (one(headers={"X-A": "1", "x-a": "2"}), "duplicate keys", "personalizations.0.headers"),
    "a header name with a space": (one(headers={"X A": "1"}), "empty spaces", "personalizations.0.headers.X A"),
    "a bare header value": (one(headers={"X-A": "ü"}), "must be encoded", "personalizations.0.headers.X-A"),
    "arguments that are no text": (one(custom_args={"a": 1}), "must be strings", "personalizations.0.custom_args"),
    "no arguments": (one(custom_args={}), "cannot be empty", "personalizations.0.custom_args"),
    "large arguments": (one(custom_args={"a": "x" * 10_000}), "10,000 bytes", "personalizations.0.custom_args"),
    "an empty subject": (one(subject=""), "one character in length", "personalizations.0.subject"),
    "no sender": ({"from": None}, "valid address", "from.email"),
    "no content": ({"content": []}, "content param is required", "content"),
    "an empty body": ({"content": [{"type": "text/plain", "value": ""}]}, "at least one character", "content.0.value"),
    "text after html": ({"content": [HTML, TEXT]}, "text/plain needs to be first", "content"),
    "two ways to reply": ({"reply_to": to("a@example.com")[0], "reply_to_list": []}, "mutually exclusive", "reply_to"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_sendgrid_refuses(case: str) -> None:
    change, words, where = REFUSALS[case]
    payload = {"from": to("shop@example.com")[0], "subject": "Hello", "content": [TEXT, HTML], **one()}
    assert check(payload) == []
    [error] = check({**payload, **change})
    assert words in error["message"]
    assert error["field"] == where


def test_a_subject_is_needed_for_all_or_for_each() -> None:
    payload = {"from": to("shop@example.com")[0], "content": [TEXT], **one(subject="Hello")}
    assert check(payload) == []
    assert [error["field"] for error in check({**payload, **one()})] == ["subject"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Authorization": "Bearer SG.wrong"}, b"{}", 401),
        ({"Authorization": ""}, b"{}", 401),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({}, b"{", 400),
        ({}, b"[]", 400),
        ({}, b"\xff", 400),
        ({}, b"x" * (31 << 20), 413),
    ],
)
async def test_requests_that_are_none(
    headers: dict[str, str], body: bytes, status: int, double: SendGridDouble
) -> None:
    given = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json", **headers}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{double.url}/v3/mail/send", data=io.BytesIO(body), headers=given) as response,
    ):
        assert response.status == status
        assert set((await response.json())["errors"][0]) == {"message", "field", "help"}
    assert not double.taken


# --- webhooks -----------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """Takes webhooks; `statuses` are its next answers, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    posts: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        status = self.statuses.pop(0) if self.statuses else 204
        if status == 204:
            self.posts.append((dict(request.headers), body))
        return web.Response(status=status)

    @property
    def events(self) -> list[Json]:
        return [event for _, body in self.posts for event in json.loads(body)]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    one = Receiver()
    app = web.Application()
    app.router.add_post("/hook", one.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield one
    await runner.cleanup()


async def test_events_are_signed_so_that_sendgrids_own_package_verifies_them(
    double: SendGridDouble, receiver: Receiver
) -> None:
    message = a_message(to=["ada@example.net"], cc=["bob@example.net"])
    await send(double.url, message)
    kinds = ["processed", "delivered", "open", "click", "spamreport", "unsubscribe", "deferred", "bounce", "blocked"]
    assert await double.post(receiver.url, double.events(double.taken, kinds)) == 204
    [(headers, body)] = receiver.posts
    verifier = EventWebhook(double.verification_key)
    assert verifier.verify_signature(body.decode(), headers[SIGNATURE], headers[TIMESTAMP])
    assert not verifier.verify_signature(body.decode() + " ", headers[SIGNATURE], headers[TIMESTAMP])
    assert not verifier.verify_signature(body.decode(), headers[SIGNATURE], "1")
    events = receiver.events
    assert [event["event"] for event in events] == [*kinds[:-1], "bounce"] * 2
    assert {event[ATTEMPT] for event in events} == {message.attempt}
    assert {event["smtp-id"] for event in events} == {message.message_id}
    assert {event["sg_message_id"].split(".")[0] for event in events} == {double.taken[0].x_message_id}
    assert Counter(event["email"] for event in events) == {"ada@example.net": 9, "bob@example.net": 9}
    assert len({event["sg_event_id"] for event in events}) == len(events)


async def test_events_come_by_themselves_until_they_are_taken(double: SendGridDouble, receiver: Receiver) -> None:
    receiver.statuses = [500, 503]
    double.webhook = Webhook(receiver.url, ("delivered",))
    double.faults = [Fault("hang", take=True)]
    message = a_message()
    assert await send(double.url, message) == [[Outcome.UNCERTAIN]]
    async with asyncio.timeout(5):
        while not receiver.posts:
            await asyncio.sleep(0.02)
    assert [(event["event"], event[ATTEMPT]) for event in receiver.events] == [("delivered", message.attempt)]
    await asyncio.sleep(0.1)
    assert len(receiver.posts) == 1


# --- a process of its own -----------------------------------------------------------------------------------------


@asynccontextmanager
async def double_process(*options: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.sendgrid_double", *options),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())["url"], process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def control(where: str, what: str, **given: Any) -> Json:
    async with aiohttp.ClientSession() as session, session.post(f"{where}/control/{what}", json=given) as response:
        assert response.status == 200
        answer: Json = await response.json()
        return answer


async def test_as_a_process_it_is_steered_and_counted(tmp_path: Path, receiver: Receiver) -> None:
    journal = tmp_path / "taken"
    async with double_process("--journal", str(journal), "--port", "0") as (url, process):
        first, second, third = a_message(), a_message(), a_message()
        assert await send(url, first) == [[Outcome.TAKEN]]
        await control(url, "fault", kind="drop", take=True)
        assert await send(url, second) == [[Outcome.UNCERTAIN]]
        await control(url, "fault", kind="answer", status=503)
        assert await send(url, third) == [[Outcome.UNCERTAIN]]
        await control(url, "fault", kind="hang", times=0)
        await control(url, "clear")
        assert await send(url, first) == [[Outcome.TAKEN]]
        await control(url, "set", invalid=["bob@example.net"], vague=True, rate=[100, 1])
        assert await send(url, a_message(to=["bob@example.net"])) == [[Outcome.REFUSED]]
        told = {"url": receiver.url, "kinds": ["delivered", "open"], "repeat": 2, "order": "reversed"}
        answer = await control(url, "events", **told, message_ids=[second.message_id])
        assert answer == {"events": 4, "answers": [204]}
        async with aiohttp.ClientSession() as session, session.get(f"{url}/control/state") as response:
            state = await response.json()
        process.kill()
        await process.wait()
    assert {name: state[name] for name in ("personalizations", "messages", "twice")} == {
        "personalizations": 3,
        "messages": 2,
        "twice": 1,
    }
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [entry["message_id"] for entry in entries] == [each.message_id for each in (first, second, first)]
    assert entries[1][ATTEMPT] == second.attempt
    assert entries[1]["recipients"] == ["ada@example.net"]
    assert [event["event"] for event in receiver.events] == ["open", "delivered"] * 2
    ids = [event["sg_event_id"] for event in receiver.events]
    assert ids[:2] == ids[2:]


async def test_a_share_of_the_requests_can_fail(double: SendGridDouble) -> None:
    double.faults = [Fault("answer", times=2, after=1, every=2)]
    answers = [(await send(double.url, a_message()))[0][0] for _ in range(6)]
    taken, open_ended = Outcome.TAKEN, Outcome.UNCERTAIN
    assert answers == [taken, open_ended, taken, open_ended, taken, taken]
