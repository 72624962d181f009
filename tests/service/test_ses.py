"""Amazon SES: the contract of all providers against moto's server, and a scripted server for all that goes wrong."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from email import message_from_bytes, message_from_string
from email.utils import getaddresses
from pathlib import Path
from typing import Any, ClassVar

import pytest
from moto.server import ThreadedMotoServer
from moto.ses.models import SESBackend, ses_backends

from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Draft, Kind, Mailbox
from neoforge_email.providers import create
from neoforge_email.providers.base import NOT_STARTED, Outcome, Scope
from neoforge_email.providers.ses import QUOTA_WAIT, RATE_WAIT, SesProvider, unsupported
from neoforge_email.settings import Settings
from tests.pki import Pki
from tests.provider_contract import (
    Arrival,
    ProviderContract,
    Target,
    Trouble,
    Wire,
    WireContract,
    always,
    deliver,
    outcomes,
    yes,
)
from tests.scripted_http import HALF, Action, Answer, Request, ScriptedHttp, Step, Trickle, scripted_http
from tests.scripted_smtp import DROP, SILENCE
from tests.support import a_message

REGION = "eu-central-1"
ACCOUNT = "123456789012"  # moto's
KEY, SECRET = "AKIAEXAMPLE", "wJalrXUtnFEMI/K7MDENG"

TAKEN = (Outcome.TAKEN, Scope.MESSAGE)
REFUSED = (Outcome.REFUSED, Scope.MESSAGE)
LATER = (Outcome.DEFERRED, Scope.MESSAGE)
NOT_TAKEN = (Outcome.DEFERRED, Scope.CONNECTION)
UNCERTAIN = (Outcome.UNCERTAIN, Scope.MESSAGE)

Make = Callable[..., SesProvider]


@pytest.fixture
async def provider() -> AsyncIterator[Make]:
    """`provider(server)`: one with a short time-out; closed in the end."""
    made: list[SesProvider] = []

    def make(port: int, scheme: str = "http", **options: Any) -> SesProvider:
        given: dict[str, Any] = {
            "region": REGION,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "endpoint_url": f"{scheme}://127.0.0.1:{port}",
            "timeout": timedelta(seconds=0.5),
            **options,
        }
        made.append(SesProvider(**given))
        return made[-1]

    yield make
    for one in made:
        await one.close()
    await asyncio.sleep(0.01)


def error(status: int, code: str, message: str = "because", **headers: str) -> Answer:
    """As SES says it: the code stands in a header."""
    return Answer(status, {"message": message}, {"x-amzn-ErrorType": f"{code}:http://example.com/", **headers})


def nobody() -> int:
    """A port of the loopback interface where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


# --- against moto -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def moto(moto_port: int) -> SESBackend:
    """What moto knows of our account and region: a verified domain and no messages yet."""
    backend: SESBackend = ses_backends[ACCOUNT][REGION]
    backend.reset()
    backend.verify_domain("example.com")
    return backend


class TestMoto(ProviderContract):
    @pytest.fixture
    async def target(self, moto: SESBackend, moto_port: int, provider: Make) -> Target:
        async def arrived(_: int) -> list[Arrival]:
            return [_arrival(message.destinations, message.raw_data) for message in moto.sent_messages]

        def unreachable() -> SesProvider:
            return provider(nobody())

        one = provider(moto_port, timeout=timedelta(seconds=10), connections=4)
        return Target(one, arrived, "no@domain@example.net", unreachable)


def _arrival(destinations: list[str], raw: str) -> Arrival:
    """moto adds the addresses in the headers to the destination that it was given."""
    mail = message_from_string(raw)
    shown = getaddresses(mail.get_all("To", []) + mail.get_all("Cc", []))
    return Arrival(mail["X-NeoForge-Attempt"], frozenset(destinations[: len(destinations) - len(shown)]))


async def test_the_id_that_ses_gave_is_kept(moto: SESBackend, moto_port: int, provider: Make) -> None:
    [[result]] = await deliver(provider(moto_port, timeout=timedelta(seconds=10)), [a_message()])
    assert [message.id for message in moto.sent_messages] == [result.provider_message_id]


async def test_a_sender_that_is_not_verified_is_refused(moto: SESBackend, moto_port: int, provider: Make) -> None:
    message = a_message(sender=Mailbox("shop@elsewhere.example"))
    [[result]] = await deliver(provider(moto_port, timeout=timedelta(seconds=10)), [message])
    assert (result.outcome, result.scope) == REFUSED
    assert result.response.startswith("400 MessageRejected: Did not have authority")
    assert moto.sent_messages == []


# --- on the wire --------------------------------------------------------------------------------------------------


def choosy(request: Request) -> Answer:
    """Refuses what goes to an address of `bad`."""
    if any(map(is_bad, request.json["Destination"]["ToAddresses"])):
        return error(400, "BadRequestException", "Illegal address")
    return Answer(body={"MessageId": "0100-1"})


def is_bad(address: str) -> bool:
    return address.startswith("bad")


class TestWire(WireContract):
    TROUBLES: ClassVar[dict[Trouble, list[Step]]] = {
        "silent": [SILENCE, choosy],
        "silent after taking": [SILENCE, choosy],
        "dropped after taking": [DROP, choosy],
        "dropped in the body": [HALF, choosy],
        "garbage": [b"\xff\xfe\x00 this is no HTTP\r\n\r\n", choosy],
        "throttled": [error(429, "TooManyRequestsException")],
    }

    @pytest.fixture
    async def target(self, provider: Make) -> AsyncIterator[Target]:
        async with AsyncExitStack() as servers:
            friendly = await servers.enter_async_context(scripted_http(choosy))

            async def arrived(_: int) -> list[Arrival]:
                taken = [request.json for request in friendly.requests if choosy(request).status == 200]
                return [
                    Arrival(sent["EmailTags"][0]["Value"], frozenset(sent["Destination"]["ToAddresses"]))
                    for sent in taken
                ]

            started: list[ScriptedHttp] = []

            async def troubled(trouble: Trouble) -> SesProvider:
                server = await servers.enter_async_context(scripted_http(*self.TROUBLES[trouble]))
                started.append(server)
                one = provider(server.port)
                async with one.connection():  # reads what AWS says about the service, where nobody has before
                    pass
                return one

            yield Target(
                provider(friendly.port, timeout=timedelta(seconds=5), connections=2),
                arrived,
                "bad@example.net",
                lambda: provider(nobody()),
                Wire(troubled, lambda: bool(started[-1].requests), friendly.port, secrets=(KEY, SECRET)),
            )


# --- what goes out ------------------------------------------------------------------------------------------------


async def test_a_message_goes_out_raw_with_its_attempt_as_a_tag(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        one = provider(server.port, configuration_set="orders", reports=True)
        message = a_message(
            to=["ada@example.net", "bob@example.net"], bcc=["eve@example.net"], closed=["bob@example.net"]
        )
        results = await deliver(one, [message])
    assert [result.provider_message_id for result in results[0]] == ["0100-1", "0100-1"]
    assert one.reports
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/v2/email/outbound-emails")
    assert f"Credential={KEY}/" in request.headers["authorization"]
    assert SECRET not in str(request)
    sent = request.json
    raw = base64.b64decode(sent.pop("Content")["Raw"]["Data"])
    assert sent == {
        "FromEmailAddress": "shop@example.com",
        "Destination": {"ToAddresses": ["ada@example.net", "eve@example.net"]},
        "EmailTags": [{"Name": "neoforge_attempt", "Value": message.attempt}],
        "ConfigurationSetName": "orders",
    }
    mail = message_from_bytes(raw)
    assert (mail["X-NeoForge-Attempt"], mail["To"]) == (message.attempt, "ada@example.net, bob@example.net")
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,256}", message.attempt)


async def test_without_a_configuration_set_none_is_named(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        await deliver(provider(server.port), [a_message()])
    assert "ConfigurationSetName" not in server.requests[0].json


async def test_connections_are_kept_and_bounded(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        one = provider(server.port, connections=2)
        results = await asyncio.gather(*(deliver(one, [a_message()]) for _ in range(20)))
    assert [outcomes(result) for result in results] == [[[Outcome.TAKEN]]] * 20
    assert (server.connections, len(server.requests)) == (2, 20)


# --- what answers mean --------------------------------------------------------------------------------------------

SIGNATURE = "The signature does not match.\n\nThe Canonical String was\nPOST\nauthorization: secret"

ANSWERS: dict[str, tuple[Action, tuple[Outcome, Scope]]] = {
    "taken": (Answer(body={"MessageId": "0100-1"}), TAKEN),
    "throttled": (error(429, "TooManyRequestsException", "Maximum sending rate exceeded."), NOT_TAKEN),
    "throttled without a code": (Answer(429, b"slow down"), NOT_TAKEN),
    "throttled in the common way": (error(400, "ThrottlingException", "Rate exceeded"), NOT_TAKEN),
    "throttled with the code of an outage": (error(503, "Throttling", "Rate exceeded"), NOT_TAKEN),
    "over a limit": (error(400, "LimitExceededException"), NOT_TAKEN),
    "suspended": (error(400, "AccountSuspendedException"), NOT_TAKEN),
    "paused": (error(400, "SendingPausedException"), NOT_TAKEN),
    "the domain of its return path not verified": (error(400, "MailFromDomainNotVerifiedException"), NOT_TAKEN),
    "no such configuration set": (error(404, "NotFoundException"), NOT_TAKEN),
    "a wrong secret": (error(403, "SignatureDoesNotMatch", SIGNATURE), NOT_TAKEN),
    "a wrong secret, by 400": (error(400, "InvalidSignatureException", SIGNATURE), NOT_TAKEN),
    "a wrong key": (error(403, "UnrecognizedClientException"), NOT_TAKEN),
    "not allowed": (error(403, "AccessDeniedException"), NOT_TAKEN),
    "not allowed, without a code": (Answer(403, b"<html>no</html>"), NOT_TAKEN),
    "not there at all": (Answer(404, b"<html>not SES</html>"), NOT_TAKEN),
    "bad, without a code": (Answer(400, b"not SES"), NOT_TAKEN),
    "elsewhere": (Answer(302, headers={"Location": "/other"}), NOT_TAKEN),
    "elsewhere, and the body too": (Answer(307, headers={"Location": "/other"}), NOT_TAKEN),
    "not modified": (Answer(304, b""), NOT_TAKEN),
    "rejected": (error(400, "MessageRejected", "Email contains a virus"), REFUSED),
    "the sender not verified": (error(400, "MessageRejected", "Email address is not verified. ..."), LATER),
    "bad": (error(400, "BadRequestException", "Illegal address"), REFUSED),
    "too large": (Answer(413, {"message": "Request Too Long"}), REFUSED),
    "an error that nobody knows": (error(400, "SomethingNewException"), LATER),
    "an outage": (error(500, "InternalFailure"), UNCERTAIN),
    "an outage of the balancer before it": (Answer(502, b"<html>Bad Gateway</html>"), UNCERTAIN),
    "unavailable": (error(503, "ServiceUnavailable"), UNCERTAIN),
    "too late": (Answer(504, b""), UNCERTAIN),
    "taken without an id": (Answer(200, {}), UNCERTAIN),
    "taken with a page": (Answer(200, b"<html>welcome</html>"), UNCERTAIN),
    "taken with a list": (Answer(200, b"[1]"), UNCERTAIN),
    "taken with half an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", UNCERTAIN),
    "half a head": (b"HTTP/1.1 200 O", UNCERTAIN),
    "another protocol": (b"220 mail.example.com ESMTP\r\n", UNCERTAIN),
    "octets": (b"\xff\xfe\x00\r\n\r\n", UNCERTAIN),
    "nothing": (b"", UNCERTAIN),
    "a reset": (DROP, UNCERTAIN),
    "silence": (SILENCE, UNCERTAIN),
    "a head without end": (Trickle(), UNCERTAIN),
    "not gzip": (Answer(200, b"no", {"Content-Encoding": "gzip"}), UNCERTAIN),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_what_an_answer_means_and_that_nothing_is_sent_again_by_itself(case: str, provider: Make) -> None:
    action, expected = ANSWERS[case]
    async with scripted_http(action, Answer(body={"MessageId": "0100-2"})) as server:
        one = provider(server.port)
        async with asyncio.timeout(2):
            [[result]] = await deliver(one, [a_message()])
        assert (result.outcome, result.scope) == expected
        assert len(server.requests) == 1
        assert result.response.isprintable()
        assert result.response
        assert SECRET not in result.response
        assert "secret" not in result.response
        # Whatever has happened, the next message is not harmed by it.
        [[result]] = await deliver(one, [a_message()])
        assert (result.outcome, result.provider_message_id) == (Outcome.TAKEN, "0100-2")
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("action", "wait"),
    [
        (error(429, "TooManyRequestsException", "Maximum sending rate exceeded."), RATE_WAIT),
        (error(429, "TooManyRequestsException", "Daily message quota exceeded."), QUOTA_WAIT),
        (error(429, "TooManyRequestsException", **{"Retry-After": "7"}), timedelta(seconds=7)),
        (error(429, "TooManyRequestsException", **{"Retry-After": "tomorrow"}), RATE_WAIT),
        (error(403, "AccessDeniedException"), None),
        (error(500, "InternalFailure"), None),
    ],
)
async def test_a_throttled_call_says_when_to_come_back(action: Action, wait: timedelta | None, provider: Make) -> None:
    async with scripted_http(action) as server:
        [[result]] = await deliver(provider(server.port), [a_message()])
    assert result.retry_after == wait


async def test_an_answer_that_repeats_the_key_is_cut(provider: Make) -> None:
    async with scripted_http(error(403, "Whatever", f"{SECRET} of {KEY} is wrong " + "x" * 1000)) as server:
        [[result]] = await deliver(provider(server.port), [a_message()])
    assert result.response.startswith("403 Whatever: *** of *** is wrong xxx")
    assert len(result.response) == 500


@pytest.mark.parametrize("action", [DROP, SILENCE, b"", Answer(500, b"")])
async def test_a_kept_connection_that_fails_is_not_tried_a_second_time(action: Action, provider: Make) -> None:
    taken = Answer(body={"MessageId": "0100-1"})
    async with scripted_http(taken, action, taken) as server:
        one = provider(server.port)
        results = await deliver(one, [a_message() for _ in range(3)])
    assert outcomes(results) == [[Outcome.TAKEN], [Outcome.UNCERTAIN], [Outcome.TAKEN]]
    assert len(server.requests) == 3


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"}, then=DROP)) as server:
        one = provider(server.port)
        for _ in range(3):
            assert outcomes(await deliver(one, [a_message()])) == [[Outcome.TAKEN]]
            await asyncio.sleep(0.02)
    assert server.connections == 3


# --- several recipients -------------------------------------------------------------------------------------------


TEN = [f"{name}{number}@example.net" for number, name in enumerate(["ada"] * 4 + ["bad"] + ["ada"] * 4 + ["bad"])]


async def test_bad_addresses_are_found_by_halves_and_the_others_get_the_message_once(provider: Make) -> None:
    async with scripted_http(choosy) as server:
        [results] = await deliver(provider(server.port), [a_message(to=TEN)])
    assert [result.outcome is Outcome.REFUSED for result in results] == [is_bad(name) for name in TEN]
    to = [request.json["Destination"]["ToAddresses"] for request in server.requests]
    taken = [address for addresses in to if not any(map(is_bad, addresses)) for address in addresses]
    assert sorted(taken) == sorted(address for address in TEN if not is_bad(address))
    assert len({request.json["Content"]["Raw"]["Data"] for request in server.requests}) == 1


async def test_no_further_half_is_sent_once_none_may_start(provider: Make) -> None:
    async with scripted_http(choosy) as server:
        [results] = await deliver(provider(server.port), [a_message(to=["bad@example.net", "ada@example.net"])], yes(2))
    assert results[0].outcome is Outcome.REFUSED
    assert results[1] == NOT_STARTED
    assert len(server.requests) == 2


async def test_half_a_message_that_nobody_answered_for_is_uncertain_alone(provider: Make) -> None:
    to = ["bad@example.net", "ada@example.net"]
    bad = error(400, "BadRequestException")
    async with scripted_http(bad, bad, DROP) as server:
        [results] = await deliver(provider(server.port), [a_message(to=to)])
    assert [(result.outcome, result.scope) for result in results] == [REFUSED, UNCERTAIN]


async def test_refused_content_is_not_offered_again_to_each(provider: Make) -> None:
    async with scripted_http(error(400, "MessageRejected", "Email contains a virus")) as server:
        [results] = await deliver(provider(server.port), [a_message(to=TEN)])
    assert {result.outcome for result in results} == {Outcome.REFUSED}
    assert len(server.requests) == 1


# --- no connection ------------------------------------------------------------------------------------------------


async def not_taken(one: SesProvider) -> str:
    """The words of a call that could not reach anybody."""
    async with asyncio.timeout(2):
        [[result]] = await deliver(one, [a_message()])
    assert (result.outcome, result.scope) == NOT_TAKEN
    return result.response


async def test_a_server_that_does_not_take_the_connection_was_sent_nothing(provider: Make) -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for waiting in (first, second):  # fills the backlog; the kernel drops what comes after
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        await asyncio.sleep(0.05)
        assert "within 0.5 s" in await not_taken(provider(deaf.getsockname()[1]))


async def test_a_server_that_speaks_no_tls_was_sent_nothing(provider: Make) -> None:
    async with scripted_http() as server:
        await not_taken(provider(server.port, "https"))
    assert server.requests == []


async def test_a_server_that_breaks_off_the_tls_handshake_was_sent_nothing(provider: Make) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        await not_taken(provider(server.sockets[0].getsockname()[1], "https"))


async def test_a_server_that_cannot_prove_who_it_is_was_sent_nothing(pki: Pki, provider: Make) -> None:
    async with scripted_http(tls=pki.good) as server:
        assert "certificate verify failed" in await not_taken(provider(server.port, "https"))
    assert server.requests == []


async def test_a_name_that_nobody_knows_was_sent_nothing(provider: Make) -> None:
    await not_taken(provider(80, endpoint_url="http://ses.invalid"))


async def test_without_a_key_anywhere_nothing_is_sent(
    provider: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    async with scripted_http() as server:
        assert "credentials" in await not_taken(provider(server.port, access_key_id=None, secret_access_key=None))
    assert server.requests == []


async def test_an_address_that_is_none_is_unavailable(provider: Make) -> None:
    with pytest.raises(ProviderUnavailable, match="Amazon SES cannot be used"):
        await deliver(provider(80, endpoint_url="nowhere"), [a_message()])


async def test_a_body_that_stops_half_way_is_uncertain(provider: Make) -> None:
    """Nobody knows what a server does with the half that it has."""
    async with await asyncio.start_server(_read_a_little, "127.0.0.1", 0) as server:
        one = provider(server.sockets[0].getsockname()[1], timeout=timedelta(seconds=10))
        [[result]] = await deliver(one, [a_message(text="line of text\n" * 1_000_000)])
    assert (result.outcome, result.scope) == UNCERTAIN


async def test_a_large_message_arrives_whole(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        one = provider(server.port, timeout=timedelta(seconds=10))
        assert outcomes(await deliver(one, [a_message(text="line of text\n" * 400_000)])) == [[Outcome.TAKEN]]
    raw = base64.b64decode(server.requests[0].json["Content"]["Raw"]["Data"])
    assert raw.endswith(b"\r\nline of text\r\n")
    assert raw.count(b"line of text") == 400_000


async def _read_a_little(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1000)
    writer.transport.abort()


# --- life ---------------------------------------------------------------------------------------------------------


async def test_a_cancelled_call_harms_no_other(provider: Make) -> None:
    async with scripted_http(SILENCE, Answer(body={"MessageId": "0100-1"})) as server:
        one = provider(server.port, timeout=timedelta(seconds=30), connections=1)
        call = asyncio.create_task(deliver(one, [a_message()]))
        while not server.requests:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert outcomes(await deliver(one, [a_message()])) == [[Outcome.TAKEN]]


async def test_closing_waits_for_what_is_being_sent(provider: Make) -> None:
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        one = provider(server.port)
        async with one.connection() as connection:
            await one.close()
            assert outcomes(await connection.send([a_message()], always)) == [[Outcome.TAKEN]]
        await one.close()


SETTINGS = {
    "DATABASE_URL": "postgresql://localhost/none",
    "REDIS_URL": "redis://localhost",
    "EMAIL_PROVIDER": "ses",
    "AWS_REGION": REGION,
}


def test_the_settings_make_it() -> None:
    settings = Settings.from_environment({**SETTINGS, "SES_CONFIGURATION_SET": "orders", "SES_CONNECTIONS": "3"})
    [one] = create(settings).providers
    assert (one.name, one.window, one.connections, one.reports) == ("ses", 1, 3, False)
    topic = "arn:aws:sns:eu-central-1:123456789012:events"
    [other] = create(Settings.from_environment({**SETTINGS, "SES_TOPIC_ARNS": topic})).providers
    assert other.reports


def a_draft(**changes: Any) -> Draft:
    values: dict[str, Any] = {
        "user_id": 1,
        "lane": 2,
        "sender": Mailbox("shop@example.com"),
        "reply_to": None,
        "subject": "Your order",
        "headers": {},
        "tags": [],
        "metadata": {},
        "html": None,
        "text": "It has left.",
        "recipients": [(Kind.TO, Mailbox("ada@example.net"))],
        "idempotency_key": None,
        "body_hash": b"",
    }
    return Draft(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"headers": {"X-Order": "7", "List-Unsubscribe": "<https://example.com/>"}}, []),
        (
            {"headers": {"X-SES-CONFIGURATION-SET": "mine", "x-ses-source-arn": "a"}},
            ["headers.X-SES-CONFIGURATION-SET", "headers.x-ses-source-arn"],
        ),
        ({"html": "x" * 24_000_000}, ["html"]),
        ({"text": "x" * 24_000_000}, ["text"]),
        ({"text": "x" * 20_000_000}, []),
    ],
)
def test_what_ses_cannot_do_is_said_by_field(changes: dict[str, Any], fields: list[str]) -> None:
    assert [wrong["field"] for wrong in unsupported(a_draft(**changes))] == fields


def test_who_does_not_use_ses_does_not_load_its_libraries() -> None:
    code = "import sys, neoforge_email.providers.ses; print([m for m in sys.modules if 'boto' in m or m == 'aiohttp'])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


async def test_requests_are_not_logged_whole_at_any_level(provider: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with scripted_http(Answer(body={"MessageId": "0100-1"})) as server:
        await deliver(provider(server.port), [a_message(text="a secret body")])
    words = caplog.text
    assert "ada@example.net" not in words
    assert base64.b64encode(b"a secret body").decode()[:12] not in words
    assert SECRET not in words
