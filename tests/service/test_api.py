"""The API in this process, on real servers. Every request to send goes both ways: in front of the router, and through it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from neoforge_email import db, keys
from neoforge_email.api import submission
from neoforge_email.api.auth import KeyRing
from neoforge_email.app import create_app
from neoforge_email.errors import Unauthorized
from neoforge_email.settings import Settings
from tests.support import Database

ORIGIN = "https://app.example.com"
MESSAGE = {"to": "ada@example.net", "subject": "Hello", "text": "It works."}


@dataclass
class Api:
    """A client with the key of a user; `headers` make its requests go the way that is under test."""

    client: httpx.AsyncClient
    key: str
    headers: dict[str, str] = field(default_factory=dict)

    async def send(self, message: Any = None, **headers: str) -> httpx.Response:
        """A dictionary is sent as JSON with `MESSAGE` as its rest, bytes as they are."""
        content = message if isinstance(message, bytes) else json.dumps({**MESSAGE, **(message or {})}).encode()
        sent = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **self.headers}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/api/v1/emails", content=content, headers=sent)

    async def get(self, email_id: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}", **self.headers}
        return await self.client.get(f"/api/v1/emails/{email_id}", headers=headers)

    async def refusal(self, message: Any, **headers: str) -> dict[str, str]:
        """The fields that a 422 names, with what it says about them."""
        answer = await self.send(message, **headers)
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        return {error["field"]: error["message"] for error in answer.json()["errors"]}


@pytest.fixture
def api_settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings("api", ALLOWED_ORIGINS=ORIGIN, MAX_FILE_SIZE="100KB", REQUEST_TIMEOUT="1")


async def a_key(database: Database, user: str = "shop") -> str:
    connection = await db.connect(database.url(database.migrator), "tests")
    try:
        _, secret = await keys.create(connection, user, "tests")
        return secret
    finally:
        await connection.close()


async def count(database: Database, table: str) -> int:
    connection = await db.connect(database.url(database.superuser), "tests")
    try:
        return int(await connection.fetchval(f"select count(*) from {table}"))
    finally:
        await connection.close()


@asynccontextmanager
async def running(settings: Settings, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings, **options)
    started, stop = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        # in one task from beginning to end, which the two halves of a fixture are not
        async with app.lifespan():
            started.set()
            await stop.wait()

    life = asyncio.create_task(live())
    await asyncio.wait([life, asyncio.create_task(started.wait())], return_when=asyncio.FIRST_COMPLETED)
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]  # Litestar's own types of the same protocol
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client
    stop.set()
    await life


@pytest.fixture(params=[{}, {"Origin": ORIGIN}], ids=["in front of the router", "through the router"])
async def api(api_settings: Settings, database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    async with running(api_settings) as client:
        yield Api(client, await a_key(database), request.param)


@pytest.fixture
async def client(api_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with running(api_settings) as client:
        yield client


async def test_a_message_is_accepted_and_can_be_read_back(api: Api) -> None:
    answer = await api.send(
        {
            "from": "Shop, Ltd <shop@Example.COM>".replace("Shop, Ltd", '"Shop, Ltd"'),
            "to": ["Ada <ada@example.net>", "bob@example.net"],
            "cc": "carol@example.net",
            "bcc": ["dan@example.net"],
            "reply_to": "help@example.com",
            "subject": "Größe ✓",
            "html": "<p>Hello</p>",
            "text": "Hello",
            "headers": {"X-Order": "4711"},
            "tags": ["order", "first_one"],
            "metadata": {"order": 4711, "nested": {"list": [1, None, "x"]}},
            "priority": "high",
        }
    )
    assert answer.status_code == 202, answer.text
    accepted = answer.json()
    assert accepted["status"] == "queued"
    assert accepted["recipients"] == [
        {"recipient": address, "kind": kind, "status": "queued"}
        for address, kind in (
            ("ada@example.net", "to"),
            ("bob@example.net", "to"),
            ("carol@example.net", "cc"),
            ("dan@example.net", "bcc"),
        )
    ]

    email = (await api.get(accepted["id"])).json()
    assert email["id"] == accepted["id"]
    assert datetime.fromisoformat(email["created_at"]) == datetime.fromisoformat(accepted["created_at"])
    assert email["from"] == '"Shop, Ltd" <shop@example.com>'
    assert email["reply_to"] == "help@example.com"
    assert email["subject"] == "Größe ✓"
    assert email["headers"] == {"X-Order": "4711"}
    assert email["tags"] == ["order", "first_one"]
    assert email["metadata"] == {"order": 4711, "nested": {"list": [1, None, "x"]}}
    assert email["priority"] == "high"
    assert email["state"] == "queued"
    assert {(row["recipient"], row["status"]) for row in email["recipients"]} == {
        (row["recipient"], "queued") for row in accepted["recipients"]
    }
    assert [entry["type"] for entry in email["timeline"]] == ["accepted"]


async def test_what_is_left_out_gets_the_services_defaults(api: Api) -> None:
    accepted = (await api.send()).json()
    email = (await api.get(accepted["id"])).json()
    assert (email["from"], email["reply_to"], email["priority"]) == ("noreply@example.com", None, "normal")
    assert (email["headers"], email["tags"], email["metadata"]) == ({}, [], {})


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"to": ["ada@example.net", "nobody"]}, "to[1]", "local@domain"),
        ({"to": "nobody"}, "to", "local@domain"),
        ({"to": []}, "to", "at least one recipient"),
        ({"to": None}, "to", "expected `str | array`"),
        ({"to": [1]}, "to[0]", "expected `str`"),
        ({"cc": ["ADA@example.net"]}, "cc[0]", "same address as to"),
        ({"to": [f"a{n}@example.net" for n in range(51)]}, "to", "at most 50"),
        ({"to": [f"a{n}@example.net" for n in range(50)], "bcc": "b@example.net"}, "bcc", "at most 50"),
        ({"to": "ada@example.net\r\nBcc: eve@example.net"}, "to", "control character"),
        ({"from": "Shop"}, "from", "local@domain"),
        ({"reply_to": "a@b@c"}, "reply_to", ""),
        ({"subject": "One\r\nX-Evil: 1"}, "subject", "one line"),
        ({"subject": "\0"}, "subject", "one line"),
        ({"subject": "x" * 999}, "subject", "at most 998"),
        ({"subject": 7}, "subject", "expected `str`"),
        ({"text": None}, "text", "html, text or both"),
        ({"text": ""}, "text", "html, text or both"),
        ({"html": "\0"}, "html", "NUL"),
        ({"headers": {"X-Foo": "a\r\nBcc: eve@example.net"}}, "headers.X-Foo", "control character"),
        ({"headers": {"X-Foo": 1}}, "headers.X-Foo", "must be a string"),
        ({"headers": {"X Foo": "1"}}, "headers.X Foo", "header's name"),
        ({"headers": {"Bcc": "eve@example.net"}}, "headers.Bcc", "writes it itself"),
        ({"headers": {"X-Foo": "1", "x-foo": "2"}}, "headers.x-foo", "twice"),
        ({"headers": {f"X-{n}": "1" for n in range(51)}}, "headers", "at most 50"),
        ({"tags": ["good", "bad tag"]}, "tags[1]", "letters"),
        ({"tags": ["t"] * 11}, "tags", "at most 10"),
        ({"metadata": {"a": "x" * 10_000}}, "metadata", "bytes"),
        ({"metadata": {"a": ["\0"]}}, "metadata", "NUL"),
        ({"metadata": {str(n): n for n in range(51)}}, "metadata", "at most 50"),
        ({"metadata": []}, "metadata", "expected `object`"),
        ({"metadata": {"a": json.loads("[" * 32 + "]" * 32)}}, "metadata", "32 levels"),
        ({"priority": "urgent"}, "priority", "urgent"),
        ({"recipient": "ada@example.net"}, "recipient", "not a field"),
    ],
)
async def test_a_refusal_names_the_field_and_the_fault(
    api: Api, database: Database, change: dict[str, Any], field: str, says: str
) -> None:
    errors = await api.refusal(change)
    assert list(errors) == [field]
    assert says in errors[field]
    assert await count(database, "email_messages") == 0


async def test_a_refusal_names_every_fault_at_once(api: Api) -> None:
    errors = await api.refusal(
        {"to": ["x", "ada@example.net"], "cc": "y", "subject": "a\nb", "headers": {"Date": "now"}, "tags": ["?"]}
    )
    assert set(errors) == {"to[0]", "cc", "subject", "headers.Date", "tags[0]"}
    assert set(await api.refusal(b'{"too": 1, "frm": 2}')) == {"too", "frm", "subject"}


async def test_a_text_that_only_looks_like_nul_is_kept(api: Api) -> None:
    accepted = (await api.send({"metadata": {"pattern": "\\u0000"}})).json()
    assert (await api.get(accepted["id"])).json()["metadata"] == {"pattern": "\\u0000"}


async def test_metadata_of_the_greatest_depth_can_be_read_back(api: Api) -> None:
    metadata = {"a": json.loads("[" * 31 + "]" * 31)}
    accepted = (await api.send({"metadata": metadata})).json()
    assert (await api.get(accepted["id"])).json()["metadata"] == metadata


@pytest.mark.parametrize(
    ("variables", "changes", "field"),
    [
        ({"EMAIL_PROVIDER": "sendgrid"}, {"to": [], "cc": "ada@example.net"}, "to"),
        (
            {"EMAIL_PROVIDER": "ses", "AWS_REGION": "eu-west-1"},
            {"headers": {"X-SES-CONFIGURATION-SET": "mine"}},
            "headers.X-SES-CONFIGURATION-SET",
        ),
    ],
)
async def test_what_the_provider_cannot_do_is_refused_and_never_dropped(
    make_settings: Callable[..., Settings],
    database: Database,
    variables: dict[str, str],
    changes: dict[str, Any],
    field: str,
) -> None:
    async with running(make_settings("api", **variables)) as client:
        headers = {"Authorization": f"Bearer {await a_key(database)}"}
        message = {"to": "ada@example.net", "subject": "Your order", "text": "It has left."}
        answer = await client.post("/api/v1/emails", json={**message, **changes}, headers=headers)
        assert answer.status_code == 422
        assert [error["field"] for error in answer.json()["errors"]] == [field]
        assert (await client.post("/api/v1/emails", json=message, headers=headers)).status_code == 202


async def test_a_sender_is_asked_for_where_there_is_no_default(
    make_settings: Callable[..., Settings], database: Database
) -> None:
    async with running(make_settings("api", FROM_EMAIL="")) as client:
        errors = await Api(client, await a_key(database)).refusal({})
    assert list(errors) == ["from"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{]",
        b"\xef\xbb\xbf{}",
        b'{"to": "\xff"}',
        b'{"metadata": {"a": NaN}}',
        b'{"subject": "\\ud800"}',
        b'{"metadata": {"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}}",
        b'{"x": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    ],
)
async def test_a_body_that_is_no_json_is_malformed(api: Api, body: bytes) -> None:
    answer = await api.send(body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "/docs/problems#malformed-body"


async def test_a_body_that_is_json_but_no_object_is_refused(api: Api) -> None:
    assert (await api.refusal(b"[]"))[""] == "the body must be a JSON object"


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"]
)
async def test_another_content_type_is_refused(api: Api, media_type: str) -> None:
    answer = await api.send(Content_Type=media_type)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["detail"]


async def test_json_with_its_charset_named_is_accepted(api: Api) -> None:
    assert (await api.send(Content_Type='Application/JSON; charset="UTF-8"')).status_code == 202


async def test_a_body_over_the_bound_is_refused(api: Api) -> None:
    answer = await api.send({"text": "x" * 100 * 1024})
    assert answer.status_code == 413
    assert "102400 bytes" in answer.json()["detail"]


async def test_a_chunked_body_over_the_bound_is_refused(api: Api) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1024

    headers = {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json", **api.headers}
    answer = await api.client.post("/api/v1/emails", content=parts(), headers=headers)
    assert answer.status_code == 413


async def test_a_body_that_does_not_come_is_not_waited_for(api: Api) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    headers = {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json", **api.headers}
    answer = await api.client.post("/api/v1/emails", content=parts(), headers=headers)
    assert answer.status_code == 408


@pytest.mark.parametrize(
    "header",
    ["", "Basic YTpi", "Bearer", "Bearer nf_short", f"Bearer nf_{'x' * 43}", f"nf_{'x' * 43}"],
)
async def test_a_wrong_key_is_refused_without_saying_why_to_guessers(api: Api, header: str) -> None:
    answer = await api.send(Authorization=header)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["status"] == 401


async def test_without_a_key_nothing_of_the_body_is_read(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/v1/emails", content=b"{" * 10_000_000)
    assert answer.status_code == 401


async def test_a_message_of_another_user_is_not_there(api: Api, database: Database) -> None:
    accepted = (await api.send()).json()
    other = Api(api.client, await a_key(database, "other"), api.headers)
    answer = await other.get(accepted["id"])
    assert answer.status_code == 404
    assert answer.json()["type"] == "/docs/problems#not-found"
    assert (await api.get(accepted["id"])).status_code == 200


@pytest.mark.parametrize(
    "email_id", [str(uuid4()), "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-7fff-bfff-ffffffffffff"]
)
async def test_a_message_that_never_was_is_not_found(api: Api, email_id: str) -> None:
    assert (await api.get(email_id)).status_code == 404


async def test_a_repeated_request_with_the_same_key_is_accepted_once(api: Api, database: Database) -> None:
    first = await api.send(Idempotency_Key="order-1")
    # the same request, written differently
    again = await api.send(json.dumps(dict(reversed(MESSAGE.items())), indent=2).encode(), Idempotency_Key="order-1")
    assert (first.status_code, again.status_code) == (202, 202)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert await count(database, "email_messages") == 1


async def test_many_repeated_requests_at_once_are_accepted_once(api: Api, database: Database) -> None:
    answers = await asyncio.gather(*(api.send(Idempotency_Key="order-1") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await count(database, "email_messages") == 1


async def test_a_key_that_belongs_to_another_request_is_a_conflict(api: Api, database: Database) -> None:
    await api.send(Idempotency_Key="order-1")
    answer = await api.send({"subject": "Another"}, Idempotency_Key="order-1")
    assert answer.status_code == 409
    assert answer.json()["type"] == "/docs/problems#idempotency-key-reused"
    assert await count(database, "email_messages") == 1


async def test_two_users_may_use_the_same_idempotency_key(api: Api, database: Database) -> None:
    other = Api(api.client, await a_key(database, "other"), api.headers)
    first, second = await api.send(Idempotency_Key="1"), await other.send({"subject": "B"}, Idempotency_Key="1")
    assert (first.status_code, second.status_code) == (202, 202)


@pytest.mark.parametrize("key", ["x" * 256, "a b", ""])
async def test_an_idempotency_key_has_bounds(api: Api, key: str) -> None:
    assert list(await api.refusal({}, Idempotency_Key=key)) == ["Idempotency-Key"]


async def test_a_client_that_hangs_up_does_not_take_its_message_back(api: Api, database: Database) -> None:
    task = asyncio.create_task(api.send())
    while await count(database, "email_messages") == 0 and not task.done():
        await asyncio.sleep(0)
        task.cancel()
    for _ in range(100):
        if await count(database, "email_messages"):
            break
        await asyncio.sleep(0.01)
    # whether it was cancelled before or after the intake took it: the process goes on, and nothing is half there
    assert (await api.send()).status_code == 202
    assert await count(database, "email_messages") == await count(database, "email_queue")


async def test_both_ways_answer_in_the_same_words(api_settings: Settings, database: Database) -> None:
    async with running(api_settings) as client:
        key = await a_key(database)
        ways = [Api(client, key), Api(client, key, {"Origin": ORIGIN})]
        for body, headers in (
            (b"{", {}),
            (b"[]", {}),
            (b'{"x": 1}', {}),
            ({"to": "x"}, {}),
            ({}, {"Content_Type": "text/plain"}),
            ({}, {"Authorization": "Bearer no"}),
            ({"text": "x" * 200_000}, {}),
        ):
            direct, routed = [await way.send(body, **headers) for way in ways]
            assert direct.status_code == routed.status_code
            assert direct.content == routed.content
            cors = {"access-control-allow-origin", "access-control-allow-headers", "access-control-allow-methods"}
            cors |= {"access-control-expose-headers", "access-control-max-age", "vary"}
            assert {name: value for name, value in routed.headers.items() if name not in cors} == direct.headers


async def test_a_browser_of_an_allowed_origin_may_send_and_no_other(api_settings: Settings, database: Database) -> None:
    async with running(api_settings) as client:
        key = await a_key(database)
        allowed = await Api(client, key, {"Origin": ORIGIN}).send()
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        other = await Api(client, key, {"Origin": "https://evil.example"}).send()
        assert "access-control-allow-origin" not in other.headers
        preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,content-type,idempotency-key"
        answer = await client.options("/api/v1/emails", headers=preflight)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("DELETE", "/api/v1/emails", 405),
        ("GET", "/api/v1/emails/not-an-id", 404),
        ("PUT", "/health", 405),
    ],
)
async def test_what_the_router_refuses_is_a_problem_too(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


async def test_an_error_of_ours_is_answered_with_the_id_of_its_log_entry_and_nothing_else(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("neoforge_email.api.emails.draft", broken)
    answer = await api.send()
    assert answer.status_code == 500
    assert "secret detail" not in answer.text
    captured = capsys.readouterr()
    assert answer.json()["error_id"] in captured.out + captured.err


async def test_a_revoked_key_is_refused_once_the_cache_has_forgotten_it(
    api: Api, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neoforge_email.api.auth.TTL", timedelta(0))
    assert (await api.send()).status_code == 202
    connection = await db.connect(database.url(database.migrator), "tests")
    [key] = await keys.list_all(connection)
    await keys.revoke(connection, key.id)
    await connection.close()
    assert (await api.send()).status_code == 401


async def test_the_key_ring_forgets_after_its_time_shares_queries_and_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked, users = 0.0, 0, {1: 7}

    async def find(_: bytes) -> int | None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return users.get(1)

    def headers(number: int = 0) -> dict[bytes, bytes]:
        return {b"authorization": b"Bearer nf_%043d" % number}

    ring = KeyRing(find, clock=lambda: now)
    assert await asyncio.gather(*(ring.user_id(headers()) for _ in range(50))) == [7] * 50
    assert asked == 1
    now = 29
    assert await ring.user_id(headers()) == 7
    assert asked == 1
    users.clear()
    now = 31
    with pytest.raises(Unauthorized):
        await ring.user_id(headers())
    users[1] = 8
    assert await ring.user_id(headers()) == 8  # a refusal is not remembered
    monkeypatch.setattr("neoforge_email.api.auth.MOST", 10)
    for number in range(100):
        await ring.user_id(headers(number))
    assert len(ring._known) == 10


async def test_health_is_open_to_everyone_and_ok(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok", answer.text
    assert set(answer.json()["checks"]) == {"database", "redis", "backlog"}


async def test_without_redis_messages_are_accepted_and_readiness_says_degraded(
    make_settings: Callable[..., Settings], database: Database
) -> None:
    settings = make_settings("api", REDIS_URL="redis://127.0.0.1:1/0")
    async with running(settings) as client:
        api = Api(client, await a_key(database))
        answers = await asyncio.wait_for(asyncio.gather(*(api.send() for _ in range(20))), timeout=5)
        assert {answer.status_code for answer in answers} == {202}
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
        assert answer.json()["checks"]["redis"]["status"] == "degraded"


async def test_a_full_intake_says_when_to_come_back(
    api: Api, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neoforge_email.outbox.CAPACITY", 0)
    answer = await api.send()
    assert answer.status_code == 503
    assert answer.json()["type"] == "/docs/problems#intake-full"
    assert int(answer.headers["retry-after"]) >= 1
    assert await count(database, "email_messages") == 0


async def test_without_the_database_nothing_is_accepted_and_readiness_says_so(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings("api", DATABASE_URL="postgresql://neoforge_api@127.0.0.1:1/none")
    async with running(settings) as client:
        answer = await Api(client, f"nf_{'x' * 43}").send()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["type"] == "/docs/problems#database-unavailable"
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["checks"]["database"]["status"]) == (503, "failed")
        assert (await client.get("/health/live")).status_code == 200


async def test_the_schema_documents_the_request_and_every_error(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/schema/openapi.json")).json()
    assert schema["openapi"].startswith("3.1")
    operation = schema["paths"]["/api/v1/emails"]["post"]
    assert set(operation["responses"]) == {"202", "400", "401", "408", "409", "413", "415", "422", "500", "503"}
    for status, response in operation["responses"].items():
        assert list(response["content"]) == ["application/json" if status == "202" else "application/problem+json"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["Idempotency-Key"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    request = schema["components"]["schemas"][reference.rpartition("/")[2]]
    documented = {item.encode_name for item in msgspec.structs.fields(submission.EmailRequest)}
    assert set(request["properties"]) == documented
    assert request["additionalProperties"] is False
    assert schema["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    text = json.dumps(schema)
    assert all(f"#/components/schemas/{name}" in text for name in ("Problem", "Accepted"))


async def test_the_documentation_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    assert "http" not in page.text
    assert "'unsafe-eval'" not in page.headers["content-security-policy"]
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "favicon-32x32.png", "problems"):
        assert (await client.get(f"/docs/{name}")).status_code == 200
    for name in ("..%2Fauth.py", "LICENSE", "%00", "x" * 5000):
        assert (await client.get(f"/docs/{name}")).status_code == 404


async def test_the_problem_page_explains_every_type_that_an_answer_names(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs/problems")).text
    for name in (
        "validation-failed",
        "malformed-body",
        "request-timeout",
        "intake-full",
        "outcome-unknown",
        "internal-error",
    ):
        assert f'id="{name}"' in page
