"""Events of SES through SNS: what is refused and leaves no trace, what is kept, and what is read in it."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from neoforge_email import db
from neoforge_email.inbound import Event, ses, sns
from neoforge_email.inbound.values import UNKNOWN
from neoforge_email.lifecycle import EventType
from neoforge_email.settings import Settings
from tests.service.test_api import running
from tests.sns_double import CERTIFICATE, HOST, REGION, TOPIC, Sns, a_certificate, headers
from tests.support import Database

PATH = "/api/v1/webhooks/ses"
GENUINE = Sns()
FORGER = Sns()
OTHER_TOPIC = f"arn:aws:sns:{REGION}:999999999999:ses-events"
CHINA = "arn:aws-cn:sns:cn-north-1:123456789012:ses-events"
FILE = CERTIFICATE.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Sent:
    """A request; `fetched` says how many addresses may be asked for while it is looked at, `answer` what they answer."""

    message: dict[str, Any] | bytes
    headers: dict[str, str] | None = None
    fetched: int = 0
    answer: Callable[[str], bytes] | None = None

    @property
    def body(self) -> bytes:
        return self.message if isinstance(self.message, bytes) else json.dumps(self.message).encode()

    @property
    def sent_headers(self) -> dict[str, str]:
        if self.headers is not None:
            return self.headers
        return headers(self.message if isinstance(self.message, dict) else {})


def notified(**changes: Any) -> dict[str, Any]:
    return GENUINE.notification({"eventType": "Delivery"}, **changes)


def altered(message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Changed after it was signed."""
    return {name: value for name, value in {**message, **changes}.items() if value is not None}


def at(**offset: float) -> str:
    return f"{datetime.now(UTC) + timedelta(**offset):%Y-%m-%dT%H:%M:%S}.000Z"


def raises(error: Exception) -> Callable[[str], bytes]:
    def answer(_: str) -> bytes:
        raise error

    return answer


def chained(first: bytes, second: bytes) -> Callable[[str], bytes]:
    return lambda _: first + second


def certified_by(url: str) -> Callable[[], Sent]:
    return lambda: Sent(notified(SigningCertURL=url))


def confirmed_by(url: str) -> Callable[[], Sent]:
    return lambda: Sent(GENUINE.subscription(SubscribeURL=url), fetched=1)


WEAK = rsa.generate_private_key(65537, 1024)
CURVE = ec.generate_private_key(ec.SECP256R1())
SUBSCRIBE = f"https://{HOST}/?Action=ConfirmSubscription&TopicArn={TOPIC}&Token="

REFUSED: dict[str, tuple[int, Callable[[], Sent]]] = {
    # malformed
    "it is empty": (400, lambda: Sent(b"")),
    "it is no JSON": (400, lambda: Sent(b"Type=Notification")),
    "it is cut off": (400, lambda: Sent(json.dumps(notified()).encode()[:-9])),
    "it is an array": (400, lambda: Sent(json.dumps([notified()]).encode())),
    "it is null": (400, lambda: Sent(b"null")),
    "it is no UTF-8": (400, lambda: Sent(json.dumps(notified()).encode().replace(b"Delivery", b"\xff\xfe"))),
    "it is nested without end": (400, lambda: Sent(b'{"Type":' + b"[" * 50_000)),
    "its type is unknown": (400, lambda: Sent(altered(notified(), Type="Publication"))),
    "its type is a number": (400, lambda: Sent(altered(notified(), Type=1))),
    "its message is an object": (400, lambda: Sent(altered(notified(), Message={"eventType": "Delivery"}))),
    "it has no signature": (400, lambda: Sent(altered(notified(), Signature=None))),
    "it has no version of its signature": (400, lambda: Sent(altered(notified(), SignatureVersion=None))),
    "it has no certificate": (400, lambda: Sent(altered(notified(), SigningCertURL=None))),
    "its id is empty": (400, lambda: Sent(notified(MessageId=""))),
    "its id is very long": (400, lambda: Sent(notified(MessageId="a" * 3000))),
    "its id holds a line break": (400, lambda: Sent(notified(MessageId="a\nb"), headers=headers(notified()))),
    "it is too large": (413, lambda: Sent(notified(Subject="x" * 110_000))),
    # of another topic
    "the topic is another account's": (403, lambda: Sent(notified(TopicArn=OTHER_TOPIC))),
    "the topic is in another region": (403, lambda: Sent(notified(TopicArn=TOPIC.replace(REGION, "us-east-1")))),
    "the topic's name goes on": (403, lambda: Sent(notified(TopicArn=f"{TOPIC}-2"))),
    "the topic is in capitals": (403, lambda: Sent(notified(TopicArn=TOPIC.upper()))),
    "the topic is empty": (403, lambda: Sent(notified(TopicArn=""))),
    "the topic is ours in the header alone": (
        403,
        lambda: Sent(notified(TopicArn=OTHER_TOPIC), headers=headers(notified())),
    ),
    "a subscription to another's topic": (403, lambda: Sent(GENUINE.subscription(TopicArn=OTHER_TOPIC))),
    # headers that say otherwise
    "there are no headers": (403, lambda: Sent(notified(), headers={})),
    "the header names another type": (
        403,
        lambda: Sent(message := notified(), {**headers(message), "x-amz-sns-message-type": "SubscriptionConfirmation"}),
    ),
    "the header names another message": (403, lambda: Sent(notified(), headers(notified()))),
    "the header names another topic": (
        403,
        lambda: Sent(message := notified(), {**headers(message), "x-amz-sns-topic-arn": OTHER_TOPIC}),
    ),
    # a weak signature
    "SHA-1 was signed": (403, lambda: Sent(notified(SignatureVersion="1"))),
    "the version is unknown": (403, lambda: Sent(notified(SignatureVersion="3"))),
    # a certificate from elsewhere: nothing is fetched
    **{
        f"the certificate is under {url}": (403, certified_by(url))
        for url in (
            "",
            f"http://{HOST}/{FILE}",
            f"HTTPS://{HOST}/{FILE}",
            f"ftp://{HOST}/{FILE}",
            f"//{HOST}/{FILE}",
            f"https://evil.example/{FILE}",
            f"https://{HOST}.evil.example/{FILE}",
            f"https://evil{HOST}/{FILE}",
            f"https://{HOST}@evil.example/{FILE}",
            f"https://user:password@{HOST}/{FILE}",
            f"https://evil.example#@{HOST}/{FILE}",
            f"https://evil.example/?@{HOST}/{FILE}",
            f"https://evil.example\\@{HOST}/{FILE}",
            f"https://{HOST}:8443/{FILE}",
            f"https://{HOST}:443/{FILE}",
            f"https://{HOST}./{FILE}",
            f"https://sns.us-east-1.amazonaws.com/{FILE}",
            f"https://sns.{REGION}.amazonaws.com.cn/{FILE}",
            f"https://sns.{REGION}.evil.amazonaws.com/{FILE}",
            f"https://s3.{REGION}.amazonaws.com/{FILE}",
            f"https://sns.{REGION}xamazonaws.com/{FILE}",
            "https://127.0.0.1/" + FILE,
            "https://[::1]/" + FILE,
            "https://169.254.169.254/latest/meta-data",
            f"https://{HOST}/evil.pem",
            f"https://{HOST}/x/{FILE}",
            f"https://{HOST}/../{FILE}",
            f"https://{HOST}/SimpleNotificationService-../../evil.pem",
            f"https://{HOST}/SimpleNotificationService-%2e%2e.pem",
            f"https://{HOST}/SimpleNotificationService-.pem",
            f"https://{HOST}/SimpleNotificationService-0123.pem.evil",
            f"https://{HOST}/{FILE}?x=1",
            f"https://{HOST}/{FILE}#x",
            f"https://{HOST}/{FILE}\n",
            f" https://{HOST}/{FILE}",
            f"https://{HOST}/SimpleNotificationService-{'a' * 5000}.pem",
        )
    },
    # stale
    "it was published 25 hours ago": (403, lambda: Sent(notified(Timestamp=at(hours=-25)))),
    "it was published a year ago": (403, lambda: Sent(notified(Timestamp=at(days=-365)))),
    "it was published eleven minutes from now": (403, lambda: Sent(notified(Timestamp=at(minutes=11)))),
    "its time stamp is empty": (403, lambda: Sent(notified(Timestamp=""))),
    "its time stamp is in seconds": (403, lambda: Sent(notified(Timestamp="1772368215"))),
    "its time stamp has another zone": (403, lambda: Sent(notified(Timestamp=at()[:-1] + "+00:00"))),
    "its time stamp is no day": (403, lambda: Sent(notified(Timestamp="2026-02-30T00:00:00.000Z"))),
    # forged
    "another key signed it": (403, lambda: Sent(FORGER.notification({"eventType": "Delivery"}), fetched=1)),
    "the signature is no base64": (403, lambda: Sent(altered(notified(), Signature="%%%"), fetched=1)),
    "the signature is empty": (403, lambda: Sent(altered(notified(), Signature=""), fetched=1)),
    "the signature is noise": (
        403,
        lambda: Sent(altered(notified(), Signature=b64encode(bytes(256)).decode()), fetched=1),
    ),
    "the signature is another message's": (
        403,
        lambda: Sent(altered(notified(), Signature=notified()["Signature"]), fetched=1),
    ),
    "the message was changed": (403, lambda: Sent(altered(notified(), Message='{"eventType":"Bounce"}'), fetched=1)),
    "the id was changed": (403, lambda: Sent(altered(notified(), MessageId="replayed"), fetched=1)),
    "the time stamp was renewed": (
        403,
        lambda: Sent(altered(notified(Timestamp=at(days=-3)), Timestamp=at()), fetched=1),
    ),
    "a subject was added": (403, lambda: Sent(altered(notified(), Subject="Hello"), fetched=1)),
    "a subject was taken out": (403, lambda: Sent(altered(notified(Subject="Hello"), Subject=None), fetched=1)),
    "its type was changed": (403, lambda: Sent(altered(GENUINE.subscription(), Type="Notification"), fetched=1)),
    "a subscription's token was changed": (403, lambda: Sent(altered(GENUINE.subscription(), Token="0"), fetched=1)),
    "a subscription's address was changed": (
        403,
        lambda: Sent(altered(GENUINE.subscription(), SubscribeURL=f"{SUBSCRIBE}0"), fetched=1),
    ),
    # certificates that prove nothing
    "the certificate has ended": (
        403,
        lambda: Sent(notified(), fetched=1, answer=lambda _: a_certificate(GENUINE.key, ends=-timedelta(days=1))),
    ),
    "the certificate has not begun": (
        403,
        lambda: Sent(notified(), fetched=1, answer=lambda _: a_certificate(GENUINE.key, begins=timedelta(days=1))),
    ),
    "the certificate is weak": (403, lambda: Sent(notified(), fetched=1, answer=lambda _: a_certificate(WEAK))),
    "the certificate is of another kind": (
        403,
        lambda: Sent(notified(), fetched=1, answer=lambda _: a_certificate(CURVE)),
    ),
    "the certificate is none": (403, lambda: Sent(notified(), fetched=1, answer=lambda _: b"<html>")),
    "the certificate is empty": (403, lambda: Sent(notified(), fetched=1, answer=lambda _: b"")),
    "the certificate's issuer is another": (
        403,
        lambda: Sent(notified(), fetched=1, answer=chained(GENUINE.certificate, FORGER.certificate)),
    ),
    "there is no such certificate": (403, lambda: Sent(notified(), fetched=1, answer=raises(sns.Refused(404)))),
    "the certificate cannot be had now": (503, lambda: Sent(notified(), fetched=1, answer=raises(ConnectionError()))),
    "the certificate comes too slowly": (503, lambda: Sent(notified(), fetched=1, answer=raises(TimeoutError()))),
    # signed subscriptions that lead elsewhere
    **{
        f"the subscription leads to {url}": (
            403,
            confirmed_by(url),
        )
        for url in (
            "",
            "https://evil.example/?Action=ConfirmSubscription",
            SUBSCRIBE.replace(HOST, f"{HOST}.evil.example") + "2336412f37fb687f5d51e6e2425929f5",
            SUBSCRIBE.replace(HOST, f"{HOST}@evil.example") + "2336412f37fb687f5d51e6e2425929f5",
            SUBSCRIBE.replace("https", "http") + "2336412f37fb687f5d51e6e2425929f5",
            SUBSCRIBE.replace("Confirm", "Delete") + "2336412f37fb687f5d51e6e2425929f5",
            SUBSCRIBE.replace(TOPIC, OTHER_TOPIC) + "2336412f37fb687f5d51e6e2425929f5",
            SUBSCRIBE + "2336412f37fb687f5d51e6e2425929f5&TopicArn=" + OTHER_TOPIC,
            SUBSCRIBE + "another",
            SUBSCRIBE + "2336412f37fb687f5d51e6e2425929f5\r\nHost: evil.example",
        )
    },
    "the subscription has no address": (403, lambda: Sent(GENUINE.subscription(SubscribeURL=None), fetched=1)),
    "the subscription cannot be confirmed now": (
        503,
        lambda: Sent(
            GENUINE.subscription(),
            fetched=2,
            answer=lambda url: GENUINE.certificate if url == CERTIFICATE else raises(ConnectionError())(url),
        ),
    ),
}


@dataclass
class Endpoint:
    client: httpx.AsyncClient
    superuser: db.Connection
    sns: Sns = field(default_factory=lambda: Sns(GENUINE.key))

    async def post(self, message: Any, given: dict[str, str] | None = None) -> httpx.Response:
        sent = Sent(message, given)
        raw = [(name.encode(), value.encode()) for name, value in sent.sent_headers.items()]
        return await self.client.post(PATH, content=sent.body, headers=raw)

    async def stored(self) -> list[tuple[str, bytes]]:
        rows = await self.superuser.fetch(
            "select event_id, body from provider_receipts where provider = 'ses' order by id"
        )
        return [(row["event_id"], row["body"]) for row in rows]


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[db.Connection]:
    connection = await db.connect(Database.url(database.superuser), "test")
    yield connection
    await connection.close()


@pytest.fixture
def endpoint(make_settings: Callable[..., Settings], superuser: db.Connection) -> Callable[..., Any]:
    """`async with endpoint() as e`: an API that takes events of the topic, and an SNS that signs them."""

    @asynccontextmanager
    async def run(**variables: str) -> AsyncIterator[Endpoint]:
        double = Sns(GENUINE.key)
        settings = make_settings(
            "api", **{"SES_TOPIC_ARNS": f"{TOPIC}, {CHINA}", "MAX_FILE_SIZE": "100KB", **variables}
        )
        async with running(settings, fetch=double.fetch) as client:
            yield Endpoint(client, superuser, double)

    return run


async def test_what_is_forged_stale_or_malformed_is_refused_and_leaves_no_trace(
    endpoint: Any, make_settings: Callable[..., Settings], superuser: db.Connection, subtests: pytest.Subtests
) -> None:
    assert len(REFUSED) >= 40
    for name, (status, make) in REFUSED.items():
        with subtests.test(name):
            sent = make()
            double = Sns(GENUINE.key, answer=sent.answer)
            settings = make_settings("api", SES_TOPIC_ARNS=TOPIC, MAX_FILE_SIZE="100KB")
            async with running(settings, fetch=double.fetch) as client:
                answer = await Endpoint(client, superuser).post(sent.message, sent.headers)
                assert answer.status_code == status, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                assert len(double.fetched) == sent.fetched
                assert ("retry-after" in answer.headers) == (status == 503)
                assert await Endpoint(client, superuser).stored() == []


async def test_a_notification_is_kept_as_it_came_and_once(endpoint: Any) -> None:
    async with endpoint() as it:
        text = '{"eventType": "Delivery",\n "mail": {"messageId": "0100"}}'
        message = it.sns.notification(text, Subject="Amazon SES Email Event Notification")
        answers = [await it.post(message) for _ in range(3)]
        assert [answer.json() for answer in answers] == [
            {"received": 1, "new": 1},
            {"received": 1, "new": 0},
            {"received": 1, "new": 0},
        ]
        assert await it.stored() == [(message["MessageId"], text.encode())]
        assert it.sns.fetched == [CERTIFICATE]


async def test_a_message_that_sns_repeats_an_hour_later_is_taken(endpoint: Any) -> None:
    async with endpoint() as it:
        assert (await it.post(it.sns.notification("{}", Timestamp=at(minutes=-61)))).status_code == 200
        assert (await it.post(it.sns.notification("{}", Timestamp=at(minutes=5)))).status_code == 200


async def test_a_certificate_is_fetched_once_and_again_when_it_has_another_name(endpoint: Any) -> None:
    async with endpoint() as it:
        assert {a.status_code for a in await asyncio.gather(*(it.post(notified()) for _ in range(20)))} == {200}
        fetched = len(it.sns.fetched)
        assert fetched <= 20
        assert (await it.post(notified())).status_code == 200
        assert len(it.sns.fetched) == fetched
        renewed = CERTIFICATE.replace("0123", "4567")
        assert (await it.post(notified(SigningCertURL=renewed))).status_code == 200
        assert it.sns.fetched[fetched:] == [renewed]


async def test_what_could_not_be_checked_is_taken_when_it_comes_again(endpoint: Any) -> None:
    async with endpoint() as it:
        message = it.sns.notification("{}")
        it.sns.answer = raises(ConnectionError())
        assert (await it.post(message)).status_code == 503
        it.sns.answer = None
        assert (await it.post(message)).json() == {"received": 1, "new": 1}


async def test_each_region_has_its_own_host(endpoint: Any) -> None:
    url = f"https://sns.cn-north-1.amazonaws.com.cn/{FILE}"
    async with endpoint() as it:
        assert (await it.post(it.sns.notification("{}", TopicArn=CHINA, SigningCertURL=url))).status_code == 200
        assert (await it.post(it.sns.notification("{}", TopicArn=CHINA))).status_code == 403
        assert it.sns.fetched == [url]


async def test_a_subscription_to_our_topic_is_confirmed_once(endpoint: Any) -> None:
    async with endpoint() as it:
        message = it.sns.subscription()
        for _ in range(2):
            assert (await it.post(message)).json() == {"received": 0, "new": 0}
        assert it.sns.fetched == [CERTIFICATE, message["SubscribeURL"]]
        assert (await it.post(it.sns.subscription())).status_code == 200
        assert len(it.sns.fetched) == 3
        assert await it.stored() == []


async def test_the_end_of_a_subscription_asks_for_nothing(endpoint: Any) -> None:
    async with endpoint() as it:
        assert (await it.post(it.sns.subscription("UnsubscribeConfirmation"))).status_code == 200
        assert it.sns.fetched == [CERTIFICATE]
        assert await it.stored() == []


async def test_without_topics_nothing_is_taken(endpoint: Any) -> None:
    async with endpoint(SES_TOPIC_ARNS="") as it:
        answer = await it.post(it.sns.notification("{}"))
        assert answer.status_code == 404
        assert "SES_TOPIC_ARNS" in answer.json()["detail"]
        assert it.sns.fetched == []


async def test_a_topic_that_is_none_is_never_ours(endpoint: Any) -> None:
    async with endpoint(SES_TOPIC_ARNS="ses-events") as it:
        assert (await it.post(it.sns.notification("{}", TopicArn="ses-events"))).status_code == 403
        assert it.sns.fetched == []


async def test_while_the_database_is_away_sns_is_asked_to_send_again(endpoint: Any) -> None:
    async with endpoint(DATABASE_URL="postgresql://neoforge_api@127.0.0.1:1/none") as it:
        answer = await it.post(it.sns.notification("{}"))
        assert (answer.status_code, answer.json()["type"]) == (503, "/docs/problems#database-unavailable")


async def test_the_schema_documents_the_envelope(endpoint: Any) -> None:
    async with endpoint() as it:
        operation = (await it.client.get("/schema/openapi.json")).json()["paths"][PATH]["post"]
        schema = operation["requestBody"]["content"]["text/plain"]["schema"]
        assert set(schema["required"]) >= {"Type", "MessageId", "TopicArn", "Message", "Signature", "SigningCertURL"}
        assert not operation.get("security")


# --- the real way of fetching ----------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Any]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{name:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_what_is_fetched_is_bounded_and_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        match request.path:
            case "/redirect":
                return web.Response(status=302, headers={"Location": "/good"})
            case "/large":
                return web.Response(body=b"x" * (sns.FETCH_BYTES + 1))
            case "/slow":
                await asyncio.sleep(60)
            case "/404" | "/403" | "/429" | "/500":
                return web.Response(status=int(request.path[1:]))
        return web.Response(body=b"certificate")

    monkeypatch.setattr(sns, "FETCH_SECONDS", 0.5)
    async with serving(answer) as url:
        assert await sns.fetch(f"{url}/good") == b"certificate"
        for name in ("redirect", "large", "404", "403"):
            with pytest.raises(sns.Refused):
                await sns.fetch(f"{url}/{name}")
        for name in ("slow", "429", "500"):
            with pytest.raises(OSError):
                await sns.fetch(f"{url}/{name}")
        assert asked.count("/good") == 1
    with pytest.raises(OSError):
        await sns.fetch(f"{url}/gone")


# --- what is read in a notification ------------------------------------------------------------------------------------

ATTEMPT = "0198f1c20f3a7c3d8e4f5a6b7c8d9e0f-2"
MAIL = {
    "timestamp": "2026-03-01T12:30:15.250Z",
    "messageId": "EXAMPLE7c191be45",
    "source": "shop@example.com",
    "destination": ["ada@example.net", "bob@example.net"],
    "headers": [
        {"name": "From", "value": "shop@example.com"},
        {"name": "X-NeoForge-Attempt", "value": "0" * 32 + "-1"},
    ],
    "tags": {"ses:configuration-set": ["events"], "neoforge_attempt": [ATTEMPT]},
}
AT = datetime(2026, 3, 1, 13, 0, tzinfo=UTC)
TIME = "2026-03-01T13:00:00.000Z"


def read(kind: str, mail: dict[str, Any] | None = None, key: str = "eventType", **parts: Any) -> list[Event]:
    return ses.normalise(json.dumps({key: kind, "mail": MAIL if mail is None else mail, **parts}).encode())


def bounced(kind: str, subtype: str = "General") -> list[Event]:
    recipients = [{"emailAddress": "ada@example.net", "status": "5.1.1", "diagnosticCode": "smtp; 550 5.1.1 unknown"}]
    bounce = {"bounceType": kind, "bounceSubType": subtype, "bouncedRecipients": recipients, "timestamp": TIME}
    return read("Bounce", bounce=bounce)


def test_a_hard_bounce_names_message_recipient_time_and_reason() -> None:
    [event] = bounced("Permanent")
    assert event.event_id.endswith(".0")
    assert event == Event(
        provider="ses",
        event_id=event.event_id,
        type=EventType.BOUNCE,
        occurred_at=AT,
        recipient="ada@example.net",
        attempt=ATTEMPT,
        provider_message_id="EXAMPLE7c191be45",
        permanent=True,
        response="smtp; 550 5.1.1 unknown",
        detail={"type": "Permanent", "subtype": "General", "status": "5.1.1"},
    )


@pytest.mark.parametrize(
    ("kind", "subtype", "expected", "permanent"),
    [
        ("Permanent", "General", EventType.BOUNCE, True),
        ("Permanent", "NoEmail", EventType.BOUNCE, True),
        ("Permanent", "Suppressed", EventType.BOUNCE, True),
        ("Permanent", "OnAccountSuppressionList", EventType.DROPPED, False),
        ("Transient", "MailboxFull", EventType.BOUNCE, False),
        ("Undetermined", "Undetermined", EventType.BOUNCE, False),
        ("Something", "New", EventType.BOUNCE, False),
    ],
)
def test_only_what_is_known_to_be_dead_is_permanent(
    kind: str, subtype: str, expected: EventType, permanent: bool
) -> None:
    [event] = bounced(kind, subtype)
    assert (event.type, event.permanent) == (expected, permanent)


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        ({}, EventType.SPAM_REPORT),
        ({"complaintFeedbackType": "abuse"}, EventType.SPAM_REPORT),
        ({"complaintFeedbackType": "not-spam"}, None),
        ({"complaintSubType": "OnAccountSuppressionList"}, EventType.DROPPED),
        ({"complaintSubType": None}, EventType.SPAM_REPORT),
    ],
)
def test_a_complaint_that_takes_one_back_or_was_never_sent_is_none(
    complaint: dict[str, Any], expected: EventType | None
) -> None:
    recipients = [{"emailAddress": "ada@example.net"}]
    events = read("Complaint", complaint={"complainedRecipients": recipients, "timestamp": TIME, **complaint})
    assert [event.type for event in events] == ([expected] if expected else [])


def test_every_recipient_of_a_notification_has_an_event_of_its_own() -> None:
    delivered = read(
        "Delivery", delivery={"recipients": MAIL["destination"], "smtpResponse": "250 ok", "timestamp": TIME}
    )
    assert [(event.recipient, event.type, event.response) for event in delivered] == [
        ("ada@example.net", EventType.DELIVERED, "250 ok"),
        ("bob@example.net", EventType.DELIVERED, "250 ok"),
    ]
    assert len({event.event_id for event in delivered}) == 2
    again = read("Delivery", delivery={"recipients": MAIL["destination"], "smtpResponse": "250 ok", "timestamp": TIME})
    assert [event.event_id for event in again] == [event.event_id for event in delivered]


@pytest.mark.parametrize(
    ("kind", "parts", "expected", "response"),
    [
        ("Send", {"send": {}}, EventType.SENT, None),
        ("Reject", {"reject": {"reason": "Bad content"}}, EventType.DROPPED, "Bad content"),
        (
            "Rendering Failure",
            {"failure": {"errorMessage": "no such attribute"}},
            EventType.DROPPED,
            "no such attribute",
        ),
        (
            "DeliveryDelay",
            {
                "deliveryDelay": {
                    "delayType": "MailboxFull",
                    "timestamp": TIME,
                    "delayedRecipients": [
                        {"emailAddress": "ada@example.net", "status": "4.2.2", "diagnosticCode": "smtp; 452 full"},
                        {"emailAddress": "bob@example.net"},
                    ],
                }
            },
            EventType.DEFERRED,
            "smtp; 452 full",
        ),
    ],
)
def test_what_is_about_every_recipient_says_so(
    kind: str, parts: dict[str, Any], expected: EventType, response: str | None
) -> None:
    events = read(kind, **parts)
    assert [(event.type, event.recipient) for event in events] == [(expected, to) for to in MAIL["destination"]]
    assert events[0].response == response


@pytest.mark.parametrize(
    ("kind", "part", "expected"), [("Open", "open", EventType.OPEN), ("Click", "click", EventType.CLICK)]
)
def test_whose_open_it_was_is_only_known_where_there_is_one_recipient(
    kind: str, part: str, expected: EventType
) -> None:
    parts: dict[str, Any] = {
        part: {"timestamp": TIME, "userAgent": "Mozilla/5.0", "ipAddress": "192.0.2.1", "link": "https://a.example"}
    }
    [event] = read(kind, **parts)
    assert (event.type, event.recipient, event.occurred_at) == (expected, None, AT)
    assert event.detail == {"url": "https://a.example", "useragent": "Mozilla/5.0", "ip": "192.0.2.1"}
    [event] = read(kind, {**MAIL, "destination": ["Ada <ada@example.net>"]}, **parts)
    assert event.recipient == "ada@example.net"


def test_only_who_opts_out_unsubscribes() -> None:
    def subscription(**preferences: Any) -> list[Event]:
        return read("Subscription", subscription={"contactList": "news", "newTopicPreferences": preferences})

    def topic(status: str) -> list[dict[str, str]]:
        return [{"topicName": "weekly", "subscriptionStatus": status}]

    assert [event.type for event in subscription(unsubscribeAll=True)] == [EventType.UNSUBSCRIBE]
    [event] = subscription(unsubscribeAll=False, topicSubscriptionStatus=topic("OptOut"))
    assert (event.type, event.detail) == (EventType.UNSUBSCRIBE, {"list": "news", "topics": ["weekly"]})
    assert subscription(unsubscribeAll=False, topicSubscriptionStatus=topic("OptIn")) == []
    assert subscription() == []


def test_the_attempt_is_in_the_tags_else_in_the_headers() -> None:
    def attempt(**mail: Any) -> str | None:
        return read("Send", {**MAIL, **mail})[0].attempt

    assert attempt() == ATTEMPT
    assert attempt(tags={}) == attempt(tags=None) == attempt(tags={"neoforge_attempt": []}) == "0" * 32 + "-1"
    assert attempt(tags={}, headers=[{"name": "x-neoforge-attempt", "value": ATTEMPT}]) == ATTEMPT
    assert attempt(tags={}, headers=[7, {}, {"name": 5}]) is None
    assert attempt(tags={}, headers=None) is None


def test_the_feedback_of_an_identity_reads_the_same() -> None:
    [event] = read("Bounce", {**MAIL, "tags": None}, "notificationType", bounce={"bounceType": "Permanent"})[:1]
    assert (event.type, event.permanent, event.recipient) == (EventType.BOUNCE, True, "ada@example.net")
    assert event.response == "Permanent: None"


@pytest.mark.parametrize(
    "body",
    [
        b"Successfully validated SNS topic for Amazon SES event publishing.",
        b'{"notificationType": "AmazonSnsSubscriptionSucceeded", "message": "You have successfully subscribed"}',
        b'{"eventType": "SomethingNew"}',
    ],
)
def test_what_says_nothing_about_a_message_is_no_event(body: bytes) -> None:
    assert ses.normalise(body) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Hello",
        b"[]",
        b"{}",
        b'{"eventType": 5}',
        b'{"eventType": "Bounce"}',
        b'{"eventType": "Bounce", "mail": []}',
        b'{"eventType": "Bounce", "mail": {"messageId": 5}}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_notification_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        ses.normalise(body)


@pytest.mark.parametrize("kind", sorted(ses.FACTS))
@pytest.mark.parametrize("value", [None, 7, "text", [], [None], {}, {"timestamp": "9" * 30}, [{"emailAddress": {}}]])
def test_parts_of_another_shape_are_left_out(kind: str, value: Any) -> None:
    names = ("delivery", "bounce", "complaint", "deliveryDelay", "reject", "failure", "open", "click", "subscription")
    mail = {"messageId": "x", "destination": value, "timestamp": value, "tags": value, "headers": value}
    inner: Any = {
        "bouncedRecipients": value,
        "complainedRecipients": value,
        "delayedRecipients": value,
        "recipients": value,
    }
    for part in (value, inner):
        parts: dict[str, Any] = dict.fromkeys(names, part)
        for event in read(kind, mail, **parts):
            assert event.occurred_at == UNKNOWN


def test_a_notification_to_very_many_is_bounded() -> None:
    assert len(read("Send", {**MAIL, "destination": [f"a{n}@example.net" for n in range(5000)]})) == 1000
