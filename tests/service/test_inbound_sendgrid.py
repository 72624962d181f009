"""Events of SendGrid: what is refused and leaves no trace, what is kept, and what is read in it."""

from __future__ import annotations

import gzip
import json
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA1, SHA256

from neoforge_email import db
from neoforge_email.errors import SettingsError
from neoforge_email.inbound import Event, sendgrid
from neoforge_email.inbound.values import UNKNOWN
from neoforge_email.lifecycle import EventType
from neoforge_email.settings import Settings
from tests.sendgrid_events import SIGNATURE, TIMESTAMP, EventWebhook
from tests.service.test_api import running
from tests.support import Database

PATH = "/api/v1/webhooks/sendgrid"
WEBHOOK = EventWebhook()
EVENT = {
    "email": "ada@example.net",
    "timestamp": 1_772_368_215,
    "event": "delivered",
    "sg_event_id": "ZGVsaXZlcmVkLTAtMTIzNDU2",
    "sg_message_id": "14c5d75ce93.dfd.64b469.filter0001.16648.5515E0B88.0",
    "smtp-id": "<0198f1c2@example.com>",
    "response": "250 OK",
    "neoforge_attempt": "0198f1c20f3a7c3d8e4f5a6b7c8d9e0f-1",
}
BOUNCE = {**EVENT, "event": "bounce", "type": "bounce", "sg_event_id": "Ym91bmNlLTAtMTIzNDU2", "status": "5.1.1"}


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it goes out."""

    body: bytes
    headers: dict[str, str]

    def altered(self, old: bytes, new: bytes) -> Sent:
        assert self.body.count(old) == 1
        return replace(self, body=self.body.replace(old, new))

    def with_header(self, name: str, value: str | None) -> Sent:
        rest = {key: text for key, text in self.headers.items() if key != name}
        return replace(self, headers=rest if value is None else {**rest, name: value})


def signed(body: Any = (EVENT, BOUNCE), *, webhook: EventWebhook = WEBHOOK, at: str | None = None) -> Sent:
    """A request of SendGrid's; `at` is its time stamp, now if it is not given."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    stamp = at or str(int(time.time()))
    return Sent(
        content, {SIGNATURE: webhook.sign(stamp, content), TIMESTAMP: stamp, "Content-Type": "application/json"}
    )


def seconds_from_now(seconds: int) -> str:
    return str(int(time.time()) + seconds)


def with_signature(sign: Callable[[bytes], bytes]) -> Sent:
    """A request with a signature of another making, over what SendGrid signs."""
    sent = signed()
    return sent.with_header(SIGNATURE, b64encode(sign(sent.headers[TIMESTAMP].encode() + sent.body)).decode())


def raw_signature(text: bytes) -> bytes:
    r, s = decode_dss_signature(WEBHOOK._key.sign(text, ec.ECDSA(SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


OTHER_CURVE = ec.generate_private_key(ec.SECP384R1())

REFUSED: dict[str, tuple[int, Callable[[], Sent]]] = {
    # without proof
    "nothing is signed": (403, lambda: Sent(b"[]", {})),
    "the signature is missing": (403, lambda: signed().with_header(SIGNATURE, None)),
    "the time stamp is missing": (403, lambda: signed().with_header(TIMESTAMP, None)),
    "the signature is empty": (403, lambda: signed().with_header(SIGNATURE, "")),
    "the signature is no base64": (403, lambda: signed().with_header(SIGNATURE, "%" * 96)),
    "the signature lacks its padding": (
        403,
        lambda: with_signature(lambda text: b"0" * 71).with_header(SIGNATURE, "A" * 95),
    ),
    "the signature is noise": (403, lambda: with_signature(lambda text: bytes(range(72)))),
    "the signature is cut off": (403, lambda: with_signature(lambda text: b64decode(WEBHOOK.sign("", text))[:-3])),
    "the signature is not ASN.1": (403, lambda: with_signature(raw_signature)),
    "the signature is very long": (403, lambda: signed().with_header(SIGNATURE, "A" * 8000)),
    # forged
    "another key signed it": (403, lambda: signed(webhook=EventWebhook())),
    "a key on another curve signed it": (
        403,
        lambda: with_signature(lambda text: OTHER_CURVE.sign(text, ec.ECDSA(SHA256()))),
    ),
    "SHA-1 was signed": (403, lambda: with_signature(lambda text: WEBHOOK._key.sign(text, ec.ECDSA(SHA1())))),
    "the body alone was signed": (403, lambda: with_signature(lambda text: b64decode(WEBHOOK.sign("", text[10:])))),
    "time stamp and body were signed with a dot between": (
        403,
        lambda: with_signature(lambda text: b64decode(WEBHOOK.sign("", text[:10] + b"." + text[10:]))),
    ),
    "the signature is another body's": (
        403,
        lambda: signed().with_header(SIGNATURE, signed([EVENT]).headers[SIGNATURE]),
    ),
    "an event was changed": (403, lambda: signed().altered(b'"bounce", "sg', b'"open", "sg')),
    "a recipient was changed": (
        403,
        lambda: replace(signed([EVENT]), body=signed([{**EVENT, "email": "eve@x.org"}]).body),
    ),
    "an event was added": (403, lambda: replace(signed([EVENT]), body=signed([EVENT, BOUNCE]).body)),
    "an event was taken out": (403, lambda: replace(signed(), body=signed([EVENT]).body)),
    "the events were put in another order": (403, lambda: replace(signed(), body=signed([BOUNCE, EVENT]).body)),
    "the body was written anew": (403, lambda: replace(signed(), body=json.dumps([EVENT, BOUNCE], indent=1).encode())),
    "a line break was added": (403, lambda: replace(signed(), body=signed().body + b"\n")),
    "the body was left out": (403, lambda: replace(signed(), body=b"")),
    "the body was compressed": (400, lambda: replace(signed(), body=gzip.compress(signed().body))),
    "the parts of what is signed moved": (
        403,
        lambda: replace(
            signed(b"0" + signed().body, at=seconds_from_now(0)[:9]), headers={**signed(at=seconds_from_now(0)).headers}
        ),
    ),
    # replayed under another time, stale
    "its time stamp was renewed": (
        403,
        lambda: signed(at=seconds_from_now(-300)).with_header(TIMESTAMP, seconds_from_now(0)),
    ),
    "it was signed more than a day ago": (403, lambda: signed(at=seconds_from_now(-86_460))),
    "it was signed eleven minutes from now": (403, lambda: signed(at=seconds_from_now(660))),
    "its time stamp is in milliseconds": (403, lambda: signed(at=f"{int(time.time())}000")),
    "its time stamp is 0": (403, lambda: signed(at="0")),
    "its time stamp is negative": (403, lambda: signed(at=f"-{int(time.time())}")),
    "its time stamp has a fraction": (403, lambda: signed(at=f"{int(time.time())}.0")),
    "its time stamp has a sign": (403, lambda: signed(at=f"+{int(time.time())}")),
    "its time stamp is in words": (403, lambda: signed(at="Sun, 01 Mar 2026 12:30:15 GMT")),
    "its time stamp has forty digits": (403, lambda: signed(at="1" * 40)),
    "its time stamp is infinite": (403, lambda: signed(at="inf")),
    "its time stamp has other digits": (403, lambda: signed().with_header(TIMESTAMP, "²" * 10)),
    # signed, and not what it should be
    "it is signed and empty": (400, lambda: signed(b"")),
    "it is signed and no JSON": (400, lambda: signed(b"events")),
    "it is signed and cut off": (400, lambda: signed(json.dumps([EVENT, BOUNCE]).encode()[:-7])),
    "it is signed and an object": (400, lambda: signed(EVENT)),
    "it is signed and a text": (400, lambda: signed("events")),
    "it is signed and null": (400, lambda: signed(b"null")),
    "it is signed and no UTF-8": (400, lambda: signed(b'[{"email": "\xff\xfe"}]')),
    "it is signed and UTF-16": (400, lambda: signed(json.dumps([EVENT]).encode("utf-16"))),
    "it is signed and nested without end": (400, lambda: signed(b"[" * 50_000)),
    "it is signed and there are two of it": (400, lambda: signed(json.dumps([EVENT]).encode() * 2)),
    "it is signed and too large": (413, lambda: signed(b"[" + b" " * 110_000 + b"]")),
}


@pytest.fixture
async def client(make_settings: Callable[..., Settings]) -> AsyncIterator[httpx.AsyncClient]:
    settings = make_settings("api", SENDGRID_WEBHOOK_SECRET=WEBHOOK.verification_key, MAX_FILE_SIZE="100KB")
    async with running(settings) as client:
        yield client


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[db.Connection]:
    connection = await db.connect(Database.url(database.superuser), "test")
    yield connection
    await connection.close()


async def post(client: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    headers = [(name.encode(), value.encode()) for name, value in sent.headers.items()]
    return await client.post(PATH, content=sent.body, headers=headers)


async def stored(superuser: db.Connection) -> list[tuple[str, bytes]]:
    rows = await superuser.fetch("select event_id, body from provider_receipts where provider = 'sendgrid' order by id")
    return [(row["event_id"], row["body"]) for row in rows]


async def test_what_is_forged_stale_or_malformed_is_refused_and_leaves_no_trace(
    client: httpx.AsyncClient, superuser: db.Connection, subtests: pytest.Subtests
) -> None:
    assert len(REFUSED) >= 40
    for name, (status, make) in REFUSED.items():
        with subtests.test(name):
            answer = await post(client, make())
            assert answer.status_code == status, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["status"] == status
            assert await stored(superuser) == []


async def test_each_event_is_kept_as_it_came_before_the_answer(
    client: httpx.AsyncClient, superuser: db.Connection
) -> None:
    body = b'[{"sg_event_id":"one",  "event":"open"},\r\n {"event":"click", "sg_event_id":"two"} ]\r\n'
    answer = await post(client, signed(body))
    assert (answer.status_code, answer.json()) == (200, {"received": 2, "new": 2})
    assert await stored(superuser) == [
        ("one", b'{"sg_event_id":"one",  "event":"open"}'),
        ("two", b'{"event":"click", "sg_event_id":"two"}'),
    ]


async def test_a_request_that_comes_again_is_a_success_and_stored_once(
    client: httpx.AsyncClient, superuser: db.Connection
) -> None:
    sent = signed()
    answers = [(await post(client, sent)).json() for _ in range(3)]
    assert answers == [{"received": 2, "new": 2}, {"received": 2, "new": 0}, {"received": 2, "new": 0}]
    later = signed([BOUNCE, {**EVENT, "sg_event_id": "another"}], at=seconds_from_now(30))
    assert (await post(client, later)).json() == {"received": 2, "new": 1}
    assert {event_id for event_id, _ in await stored(superuser)} == {
        EVENT["sg_event_id"],
        BOUNCE["sg_event_id"],
        "another",
    }


async def test_what_is_wrong_with_one_event_costs_no_other(client: httpx.AsyncClient, superuser: db.Connection) -> None:
    odd: list[Any] = [7, "text", None, [], {}, {"sg_event_id": 5}, {"sg_event_id": "a b"}, {"sg_event_id": "x" * 500}]
    odd += [{"sg_event_id": "\0"}, {"sg_event_id": "", "event": "open"}]
    answer = await post(client, signed([*odd, EVENT, {}]))
    assert answer.json() == {"received": 12, "new": 11}  # {} is there twice
    kept = await stored(superuser)
    assert [event_id for event_id, _ in kept if not event_id.startswith("sha256:")] == [EVENT["sg_event_id"]]


async def test_half_a_surrogate_in_a_user_agent_costs_no_event(
    client: httpx.AsyncClient, superuser: db.Connection
) -> None:
    body = json.dumps([{**EVENT, "event": "open", "useragent": "\ud83d"}, BOUNCE]).encode()
    assert (await post(client, signed(body))).json() == {"received": 2, "new": 2}
    for control in (b"\x01", b"\n"):
        body = b'[{"event":"open","useragent":"' + control + b'","sg_event_id":"' + control.hex().encode() + b'"}]'
        assert (await post(client, signed(body))).json() == {"received": 1, "new": 1}
    kept = dict(await stored(superuser))
    assert sendgrid.normalise(kept[str(EVENT["sg_event_id"])])[0].detail["useragent"] == "?"
    assert sendgrid.normalise(kept[str(BOUNCE["sg_event_id"])])[0].permanent


async def test_no_events_are_a_success(client: httpx.AsyncClient) -> None:
    assert (await post(client, signed([]))).json() == {"received": 0, "new": 0}


async def test_without_a_key_nothing_is_taken(make_settings: Callable[..., Settings], superuser: db.Connection) -> None:
    async with running(make_settings("api")) as client:
        answer = await post(client, signed())
        assert answer.status_code == 404
        assert "SENDGRID_WEBHOOK_SECRET" in answer.json()["detail"]
    assert await stored(superuser) == []


@pytest.mark.parametrize("key", ["nonsense", b64encode(b"x" * 91).decode(), WEBHOOK.verification_key[:-4]])
def test_a_key_that_cannot_be_one_ends_the_start(make_settings: Callable[..., Settings], key: str) -> None:
    with pytest.raises(SettingsError, match="SENDGRID_WEBHOOK_SECRET: write the verification key as SendGrid shows it"):
        make_settings("api", SENDGRID_WEBHOOK_SECRET=key)


async def test_while_the_database_is_away_sendgrid_is_asked_to_send_again(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(
        "api",
        SENDGRID_WEBHOOK_SECRET=WEBHOOK.verification_key,
        DATABASE_URL="postgresql://neoforge_api@127.0.0.1:1/none",
    )
    async with running(settings) as client:
        answer = await post(client, signed())
        assert (answer.status_code, answer.json()["type"]) == (503, "/docs/problems#database-unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await post(client, signed(webhook=EventWebhook()))).status_code == 403


async def test_that_redis_is_away_makes_no_difference(
    make_settings: Callable[..., Settings], superuser: db.Connection
) -> None:
    settings = make_settings("api", SENDGRID_WEBHOOK_SECRET=WEBHOOK.verification_key, REDIS_URL="redis://127.0.0.1:1/0")
    async with running(settings) as client:
        assert (await post(client, signed())).status_code == 200
    assert len(await stored(superuser)) == 2


async def test_only_post_is_answered_and_the_schema_says_how(client: httpx.AsyncClient) -> None:
    assert (await client.get(PATH)).status_code == 405
    operation = (await client.get("/schema/openapi.json")).json()["paths"][PATH]["post"]
    assert {item["name"] for item in operation["parameters"]} == {SIGNATURE, TIMESTAMP}
    assert set(operation["responses"]) >= {"200", "400", "403", "404", "408", "413", "503"}
    assert "requestBody" in operation
    assert not operation.get("security")


# --- what is read in an event --------------------------------------------------------------------------------------


def read(**changes: Any) -> Event:
    [event] = sendgrid.normalise(json.dumps({**EVENT, **changes}).encode())
    return event


@pytest.mark.parametrize(
    ("changes", "kind", "permanent"),
    [
        ({"event": "processed"}, EventType.SENT, False),
        ({"event": "delivered"}, EventType.DELIVERED, False),
        ({"event": "deferred"}, EventType.DEFERRED, False),
        ({"event": "dropped"}, EventType.DROPPED, False),
        ({"event": "bounce", "type": "bounce"}, EventType.BOUNCE, True),
        ({"event": "bounce", "type": "blocked"}, EventType.BOUNCE, False),
        ({"event": "bounce"}, EventType.BOUNCE, False),
        ({"event": "open"}, EventType.OPEN, False),
        ({"event": "click"}, EventType.CLICK, False),
        ({"event": "spamreport"}, EventType.SPAM_REPORT, False),
        ({"event": "unsubscribe"}, EventType.UNSUBSCRIBE, False),
        ({"event": "group_unsubscribe"}, EventType.UNSUBSCRIBE, False),
        ({"event": "delivered", "type": "bounce"}, EventType.DELIVERED, False),
    ],
)
def test_every_kind_has_its_event(changes: dict[str, str], kind: EventType, permanent: bool) -> None:
    event = read(**changes)
    assert (event.type, event.permanent) == (kind, permanent)


def test_an_event_names_its_message_recipient_and_time() -> None:
    event = read()
    assert event == Event(
        provider="sendgrid",
        event_id="ZGVsaXZlcmVkLTAtMTIzNDU2",
        type=EventType.DELIVERED,
        occurred_at=datetime(2026, 3, 1, 12, 30, 15, tzinfo=UTC),
        recipient="ada@example.net",
        attempt="0198f1c20f3a7c3d8e4f5a6b7c8d9e0f-1",
        provider_message_id="14c5d75ce93",
        response="250 OK",
    )


@pytest.mark.parametrize("kind", ["group_resubscribe", "account_status_change", "something_new"])
def test_what_says_nothing_about_a_message_is_no_event(kind: str) -> None:
    assert sendgrid.normalise(json.dumps({**EVENT, "event": kind}).encode()) == []


@pytest.mark.parametrize(
    "body", [b"", b"7", b"null", b"[]", b"{}", b'{"event": 5}', b'{"event": null}', b"{", b"[" * 50_000]
)
def test_what_is_no_event_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        sendgrid.normalise(body)


def test_opens_by_machines_are_told_apart_and_details_are_bounded() -> None:
    event = read(
        event="click",
        sg_machine_open=True,
        useragent="U" * 10_000,
        url="https://shop.example.com/\0\n",
        category=["a", "b", 7],
        asm_group_id=1 << 90,
        ip={"v4": "192.0.2.1"},
        status="",
    )
    assert event.detail == {
        "sg_machine_open": True,
        "useragent": "U" * 1999 + "…",
        "url": "https://shop.example.com/",
        "category": ["a", "b"],
    }


def test_the_response_is_one_bounded_line_with_the_status() -> None:
    assert read(event="bounce", reason="user\r\nunknown\0", status="5.1.1").response == "5.1.1 user unknown"
    assert read(event="bounce", reason="550 5.1.1 unknown", status="5.1.1").response == "550 5.1.1 unknown"
    assert len(read(response="é" * 9_000).response or "") == 500
    assert read(response=None).response is None


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (1_772_368_215, datetime(2026, 3, 1, 12, 30, 15, tzinfo=UTC)),
        ("1772368215", datetime(2026, 3, 1, 12, 30, 15, tzinfo=UTC)),
        (1_772_368_215.5, datetime(2026, 3, 1, 12, 30, 15, 500_000, tzinfo=UTC)),
        (-5, datetime(1970, 1, 1, tzinfo=UTC)),
        (10**30, UNKNOWN),
        (float("nan"), UNKNOWN),
        (float("inf"), UNKNOWN),
        ("yesterday", UNKNOWN),
        (None, UNKNOWN),
        ([1], UNKNOWN),
    ],
)
def test_a_time_that_cannot_be_is_one_that_the_database_takes(timestamp: Any, expected: datetime) -> None:
    assert read(timestamp=timestamp).occurred_at == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"email": 7}, "recipient"),
        ({"email": ""}, "recipient"),
        ({"neoforge_attempt": {"a": 1}}, "attempt"),
        ({"sg_message_id": ""}, "provider_message_id"),
        ({"sg_message_id": ["x"]}, "provider_message_id"),
    ],
)
def test_what_is_not_a_text_is_left_out(changes: dict[str, Any], field: str) -> None:
    assert getattr(read(**changes), field) is None
