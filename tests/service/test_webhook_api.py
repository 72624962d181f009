"""`/webhook-endpoints` as a customer uses it, with a sender that delivers to a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from aiohttp import web

from neoforge_email import db, endpoints
from neoforge_email.outbox import Intake
from neoforge_email.settings import Settings
from tests.receiver import Receiver, receiving
from tests.support import Database

from .test_api import a_key, running
from .webhook_yard import OTHER, SHOP, VARIABLES, Yard, verified

PATH = "/api/v1/webhook-endpoints"


@dataclass
class Customer:
    """A user's client."""

    client: httpx.AsyncClient
    key: str

    async def call(self, method: str, path: str = "", body: Any = None, expect: int | None = None) -> Any:
        """Call below PATH, and return the answer's JSON; `expect` is its status, by default any success."""
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = await self.client.request(method, PATH + path, json=body, headers=headers)
        assert answer.is_success if expect is None else answer.status_code == expect, answer.text
        return answer.json() if answer.content else None

    async def refusal(self, method: str, path: str, body: Any) -> dict[str, str]:
        """The fields that a 422 names, with what it says about them."""
        problem = await self.call(method, path, body, expect=422)
        return {error["field"]: error["message"] for error in problem["errors"]}


@dataclass
class Site:
    """The API with two customers, and the yard that reports events of their messages."""

    shop: Customer
    other: Customer
    yard: Yard


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def site(database: Database, make_settings: Callable[..., Settings]) -> AsyncIterator[Site]:
    settings = make_settings("api", **VARIABLES)
    worker = make_settings("worker")
    shop, other = await a_key(database, "shop"), await a_key(database, "other")
    superuser = await db.connect(database.url(database.superuser), "test")
    users = {row["name"]: row["id"] for row in await superuser.fetch("select name, id from users")}
    assert users == {"shop": SHOP, "other": OTHER}
    async with (
        running(settings) as client,
        await db.create_pool(settings, settings.database_url, "test-api") as api,
        await db.create_pool(worker, worker.database_url, "test-worker") as pool,
    ):
        intake = Intake(api, expire_after=timedelta(hours=100), on_commit=lambda: None)
        await intake.start()
        yard = Yard(database, make_settings, api, pool, superuser, intake)
        yield Site(Customer(client, shop), Customer(client, other), yard)
        await intake.close()
    await superuser.close()


async def test_an_endpoint_lives_from_its_creation_to_its_deletion(site: Site, receiver: Receiver) -> None:
    shop = site.shop
    wanted = {"url": receiver.url, "description": "order desk", "types": ["email.open", "email.delivered"]}
    made = await shop.call("POST", "", wanted, expect=201)
    secret, path = made.pop("secret"), f"/{made['id']}"
    assert secret.startswith("whsec_")
    assert made.items() <= (await shop.call("GET", path)).items()
    assert made["types"] == ["email.delivered", "email.open"]
    assert (made["state"], made["next_try"], made["disabled_at"]) == ("ok", None, None)
    assert await shop.call("GET") == [made]

    queued = await shop.call("POST", f"{path}/test", expect=202)
    email_id = await site.yard.message()
    await site.yard.report(email_id, "delivered", "bounce")
    await site.yard.drain()
    sent = {request.headers["webhook-id"]: verified(request, secret) for request in receiver.requests}
    assert sorted(payload["type"] for payload in sent.values()) == ["email.delivered", "webhook.test"]
    assert sent[queued["id"]]["type"] == "webhook.test"

    changed = await shop.call("PUT", path, {"url": receiver.url + "new"})
    assert (changed["url"], changed["description"], changed["types"]) == (receiver.url + "new", "", [])
    rotated = await shop.call("POST", f"{path}/rotate-secret")
    assert rotated["secret"] != secret
    await site.yard.report(email_id, "open")
    await site.yard.drain()
    assert receiver.requests[-1].path == "/new"
    assert verified(receiver.requests[-1], secret, rotated["secret"])["type"] == "email.open"

    detail = await shop.call("GET", path)
    assert [event["type"] for event in detail["events"]] == ["secret_rotated", "changed", "created"]
    assert detail["deliveries"] == {"pending": 0, "leased": 0, "delivered": 3, "dead": 0}
    assert secret not in str(detail)
    await shop.call("DELETE", path, expect=204)
    await shop.call("GET", path, expect=404)
    assert await shop.call("GET") == []


async def test_dead_letters_are_listed_and_replayed_by_id_and_by_time(site: Site, receiver: Receiver) -> None:
    async def gone(request: web.Request) -> web.Response:
        return web.Response(status=410)

    shop, yard = site.shop, site.yard
    made = await shop.call("POST", "", {"url": receiver.url})
    path = f"/{made['id']}"
    receiver.respond = gone
    for _ in range(5):
        await yard.report(await yard.message(), "delivered")
        await yard.step(timedelta(minutes=1))
    await yard.drain()
    while (await yard.states()) != {"dead": 5}:
        await yard.drain()
    detail = await shop.call("GET", path)
    assert (detail["state"], detail["disabled_reason"]) == ("disabled", "gone")
    assert detail["events"][0]["type"] == "disabled"
    assert detail["deliveries"]["dead"] == 5

    first = await shop.call("GET", f"{path}/deliveries?state=dead&limit=3")
    rest = await shop.call("GET", f"{path}/deliveries?state=dead&limit=3&after={first['next']}")
    listed = first["deliveries"] + rest["deliveries"]
    assert rest["next"] is None
    times = [it["created_at"] for it in listed]
    assert times == sorted(times, reverse=True)
    assert len({it["id"] for it in listed}) == 5
    assert listed[0]["payload"]["type"] == listed[0]["type"] == "email.delivered"
    assert any(it["status"] == 410 for it in listed)
    assert (await shop.call("GET", f"{path}/deliveries?state=pending"))["deliveries"] == []

    span = {"from": listed[2]["created_at"], "to": listed[1]["created_at"]}
    problem = await shop.call("POST", f"{path}/replay", span, expect=409)
    assert problem["type"].endswith("endpoint-disabled")
    receiver.respond = None
    receiver.requests.clear()
    assert (await shop.call("POST", f"{path}/enable"))["state"] == "ok"
    assert await shop.call("POST", f"{path}/replay", span, expect=202) == {"replayed": 2, "more_from": None}
    chosen = {"ids": [listed[0]["id"], listed[4]["id"], f"msg_{uuid4().hex}"]}
    assert (await shop.call("POST", f"{path}/replay", chosen, expect=202))["replayed"] == 2
    await yard.drain()
    came = {request.headers["webhook-id"] for request in receiver.requests}
    assert came == {listed[n]["id"] for n in (0, 1, 2, 4)}
    assert all(verified(request, made["secret"]) for request in receiver.requests)
    assert (await shop.call("GET", path))["deliveries"] == {"pending": 0, "leased": 0, "delivered": 4, "dead": 1}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "no https": ({"url": "ftp://example.com/"}, {"url": "must begin with https:// or http://"}),
    "a private address": (
        {"url": "https://10.0.0.1/"},
        {"url": "must be reachable from the internet: this address is not public"},
    ),
    "a user in the URL": (
        {"url": "https://a:b@example.com/"},
        {"url": "must not hold a user or a password: verify the signature instead"},
    ),
    "an unknown type and a line break": (
        {"url": "https://93.184.215.14/", "types": ["email.open", "email.read"], "description": "a\nb"},
        {
            "types[1]": f"is no event type; there are {', '.join(sorted(endpoints.TYPES))}",
            "description": "must be one line without control characters",
        },
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_an_endpoint_is_refused_with_every_fault(name: str, site: Site) -> None:
    body, faults = REFUSED[name]
    assert await site.shop.refusal("POST", "", body) == faults
    assert await site.shop.call("GET") == []
    made = await site.shop.call("POST", "", {"url": "https://93.184.215.14/"})
    assert await site.shop.refusal("PUT", f"/{made['id']}", body) == faults
    assert (await site.shop.call("GET", f"/{made['id']}"))["url"] == "https://93.184.215.14/"


async def test_a_name_of_this_machine_is_refused(database: Database, make_settings: Callable[..., Settings]) -> None:
    async with running(make_settings("api")) as client:
        shop = Customer(client, await a_key(database))
        message = "must be reachable from the internet: its name leads to an address that is not public"
        assert await shop.refusal("POST", "", {"url": "https://localhost/"}) == {"url": message}
        assert "https://" in (await shop.refusal("POST", "", {"url": "http://example.com/"}))["url"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "ids"),
        ({"ids": [f"msg_{'0' * 32}"], "from": "2026-03-01T12:00:00Z"}, "ids"),
        ({"from": "2026-03-01T12:00:00Z"}, "ids"),
        ({"ids": ["msg_1"]}, "ids[0]"),
        ({"from": "2026-03-01T12:00:00", "to": "2026-03-01T13:00:00Z"}, "from"),
        ({"from": "yesterday", "to": "2026-03-01T13:00:00Z"}, "from"),
    ],
)
async def test_a_replay_that_does_not_say_what_is_refused(body: dict[str, Any], field: str, site: Site) -> None:
    made = await site.shop.call("POST", "", {"url": "https://93.184.215.14/"})
    assert field in await site.shop.refusal("POST", f"/{made['id']}/replay", body)


async def test_nobody_sees_or_moves_what_is_anothers(site: Site, receiver: Receiver) -> None:
    made = await site.shop.call("POST", "", {"url": receiver.url})
    await site.yard.report(await site.yard.message(), "delivered")
    await site.yard.drain()
    path = f"/{made['id']}"
    assert await site.other.call("GET") == []
    for method, below, body in (
        ("GET", "", None),
        ("PUT", "", {"url": "https://93.184.215.14/"}),
        ("DELETE", "", None),
        ("GET", "/deliveries", None),
        ("POST", "/rotate-secret", None),
        ("POST", "/enable", None),
        ("POST", "/test", None),
        ("POST", "/replay", {"from": "2000-01-01T00:00:00Z", "to": "2100-01-01T00:00:00Z"}),
    ):
        await site.other.call(method, path + below, body, expect=404)
    assert (await site.shop.call("GET", path))["deliveries"]["delivered"] == 1
    stranger = Customer(site.shop.client, "nf_unknown")
    await stranger.call("GET", expect=401)
    await stranger.call("POST", "", {"url": receiver.url}, expect=401)


async def test_a_user_may_have_twenty_endpoints(site: Site) -> None:
    for _ in range(endpoints.MOST_ENDPOINTS):
        await site.shop.call("POST", "", {"url": "https://93.184.215.14/"})
    problem = await site.shop.call("POST", "", {"url": "https://93.184.215.14/"}, expect=409)
    assert problem["type"].endswith("too-many-endpoints")
    await site.other.call("POST", "", {"url": "https://93.184.215.14/"})


async def test_the_times_of_an_answer_have_a_zone(site: Site) -> None:
    made = await site.shop.call("POST", "", {"url": "https://93.184.215.14/"})
    assert datetime.fromisoformat(made["created_at"]).tzinfo is not None
