"""SendGrid, against its double: what goes out, and what each answer, or none, makes of each recipient."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from email.header import decode_header, make_header
from typing import Any

import pytest

from neoforge_email import providers
from neoforge_email.errors import ProviderUnavailable, SettingsError
from neoforge_email.message import Draft, Kind, Mailbox, Message
from neoforge_email.providers import sendgrid
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope
from neoforge_email.providers.sendgrid import ATTEMPT, SendGridProvider, unsupported
from neoforge_email.settings import P256, Settings
from tests.pki import Pki
from tests.provider_contract import always, deliver, yes
from tests.scripted_http import Answer, scripted_http
from tests.sendgrid_double import API_KEY, Fault, SendGridDouble, sendgrid_double
from tests.support import a_message

TAKEN = (Outcome.TAKEN, Scope.MESSAGE)
REFUSED_RECIPIENT = (Outcome.REFUSED, Scope.RECIPIENT)
REFUSED_MESSAGE = (Outcome.REFUSED, Scope.MESSAGE)
DEFERRED_MESSAGE = (Outcome.DEFERRED, Scope.MESSAGE)
DEFERRED_CONNECTION = (Outcome.DEFERRED, Scope.CONNECTION)
UNCERTAIN = (Outcome.UNCERTAIN, Scope.MESSAGE)
SOON = timedelta(seconds=1)

Make = Callable[..., SendGridProvider]


@pytest.fixture
async def double() -> AsyncIterator[SendGridDouble]:
    async with sendgrid_double() as one:
        yield one


@pytest.fixture
async def provider() -> AsyncIterator[Make]:
    """`provider(double)`: closed in the end."""
    made: list[SendGridProvider] = []

    def make(double: SendGridDouble | None = None, **options: Any) -> SendGridProvider:
        where = {"url": double.url} if double else {}
        given: dict[str, Any] = {"api_key": API_KEY, "timeout": timedelta(seconds=10), **where, **options}
        made.append(SendGridProvider(**given))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def meanings(results: list[tuple[Result, ...]]) -> list[list[tuple[Outcome, Scope]]]:
    return [[(result.outcome, result.scope) for result in message] for message in results]


def some(count: int, **fields: Any) -> list[Message]:
    return [a_message(to=[f"user{number}@example.net"], **fields) for number in range(count)]


def raw(status_line: str, *headers: str, body: str = "") -> Fault:
    """An answer that is written as it stands, before the connection is closed."""
    return Fault("garbage", take=True, octets="\r\n".join([f"HTTP/1.1 {status_line}", *headers, "", body]))


# --- what goes out ------------------------------------------------------------------------------------------------


async def test_a_message_goes_out_with_everything_it_has(double: SendGridDouble, provider: Make) -> None:
    message = a_message(
        sender=Mailbox("shop@example.com", "Dürers Laden"),
        reply_to=Mailbox("help@example.com"),
        headers={"X-Order": "4711"},
        html="<p>It has left.</p>",
        to=[Mailbox("ada@example.net", "Lovelace, Ada"), "bob@example.net"],
        cc=["cyd@example.net"],
        bcc=["eve@example.net"],
    )
    results = await deliver(provider(double), [message])
    [taken] = double.taken
    assert taken.sender == {"email": "shop@example.com", "name": "Dürers Laden"}
    assert taken.reply_to == {"email": "help@example.com"}
    assert taken.content == [
        {"type": "text/plain", "value": "It has left."},
        {"type": "text/html", "value": "<p>It has left.</p>"},
    ]
    assert taken.personalization == {
        "to": [{"email": "ada@example.net", "name": "Lovelace, Ada"}, {"email": "bob@example.net"}],
        "cc": [{"email": "cyd@example.net"}],
        "bcc": [{"email": "eve@example.net"}],
        "subject": "Your order",
        "headers": {"X-Order": "4711", "Message-ID": message.message_id},
        "custom_args": {ATTEMPT: message.attempt},
    }
    assert results == [(Result(Outcome.TAKEN, Scope.MESSAGE, "202 Accepted", taken.x_message_id),) * 4]


async def test_the_message_id_stays_and_the_attempt_does_not(double: SendGridDouble, provider: Make) -> None:
    first = a_message(lease_no=1)
    again = a_message(lease_no=2, email_id=first.id)
    one = provider(double)
    await deliver(one, [first])
    await deliver(one, [again])
    assert [taken.message_id for taken in double.taken] == [first.message_id] * 2
    assert [taken.custom_args for taken in double.taken] == [{ATTEMPT: first.attempt}, {ATTEMPT: again.attempt}]


@pytest.mark.parametrize("text", ["Straße 5", "日本語" * 40, "né, " * 100])
async def test_a_header_beyond_ascii_arrives_as_encoded_words(
    text: str, double: SendGridDouble, provider: Make
) -> None:
    results = await deliver(provider(double), [a_message(headers={"X-Place": text})])
    assert meanings(results) == [[TAKEN]]
    assert str(make_header(decode_header(double.taken[0].headers["X-Place"]))) == text


@pytest.mark.parametrize(
    ("bodies", "kinds"),
    [
        ({"html": "<p>x"}, ["text/plain", "text/html"]),
        ({"html": "<p>x", "text": None}, ["text/html"]),
        ({}, ["text/plain"]),
    ],
)
async def test_only_the_bodies_that_there_are(
    bodies: dict[str, Any], kinds: list[str], double: SendGridDouble, provider: Make
) -> None:
    await deliver(provider(double), [a_message(**bodies)])
    assert [each["type"] for each in double.taken[0].content] == kinds


async def test_without_anyone_in_to_the_first_in_cc_steps_in(double: SendGridDouble, provider: Make) -> None:
    message = a_message(cc=["bob@example.net", "cyd@example.net"], bcc=["eve@example.net"], closed=["ada@example.net"])
    results = await deliver(provider(double), [message])
    assert meanings(results) == [[TAKEN] * 3]
    [taken] = double.taken
    addressed = {kind: [each["email"] for each in taken.personalization.get(kind, ())] for kind in ("to", "cc", "bcc")}
    assert addressed == {"to": ["bob@example.net"], "cc": ["cyd@example.net"], "bcc": ["eve@example.net"]}


async def test_of_those_in_bcc_nobody_sees_another(double: SendGridDouble, provider: Make) -> None:
    hidden = ["eve@example.net", "fay@example.net", "gil@example.net"]
    results = await deliver(provider(double), [a_message(bcc=hidden, closed=["ada@example.net"]), a_message()])
    assert meanings(results) == [[TAKEN] * 3, [TAKEN]]
    assert [taken.recipients for taken in double.taken] == [*((address,) for address in hidden), ("ada@example.net",)]
    assert double.requests == 1


# --- calls --------------------------------------------------------------------------------------------------------


async def test_a_thousand_messages_of_the_same_content_are_one_request(double: SendGridDouble, provider: Make) -> None:
    one = provider(double)
    messages = some(1000, html="<p>Hello</p>")
    [call] = one.calls(messages)
    async with one.connection() as connection:
        results = await connection.send(call, always)
    assert meanings(results) == [[TAKEN]] * 1000
    assert double.sizes == [1000]
    assert [taken.custom_args[ATTEMPT] for taken in double.taken] == [message.attempt for message in messages]
    assert [taken.message_id for taken in double.taken] == [message.message_id for message in messages]


async def test_ten_thousand_messages_go_quickly_and_once(double: SendGridDouble, provider: Make) -> None:
    one = provider(double, timeout=timedelta(seconds=20))
    messages = [message for number in range(10) for message in some(1000, html=f"<p>{number}</p>")]
    async with asyncio.timeout(20):
        await asyncio.gather(*(deliver(one, call) for call in one.calls(messages)))
    assert double.requests == 10
    assert sorted(double.counts) == sorted(message.message_id for message in messages)
    assert set(double.counts.values()) == {1}


@pytest.mark.parametrize(
    ("count", "each", "sizes"), [(1001, 1, [1000, 1]), (45, 48, [20, 20, 5]), (41, 50, [20, 20, 1])]
)
def test_a_call_has_a_thousand_recipients_at_most(count: int, each: int, sizes: list[int], provider: Make) -> None:
    one = provider(url="http://127.0.0.1:1")
    to = [f"user{number}@example.net" for number in range(each)]
    assert [len(call) for call in one.calls([a_message(to=to) for _ in range(count)])] == sizes


def test_only_what_shares_sender_content_and_owner_goes_together(provider: Make) -> None:
    same = [a_message(), a_message(subject="another", headers={"X-A": "b"}, to=["bob@example.net"])]
    others = [
        a_message(text="another"),
        a_message(html="<p>also"),
        a_message(sender=Mailbox("shop@example.com", "another")),
        a_message(reply_to=Mailbox("help@example.com")),
        replace(same[0], user_id=2),
    ]
    one = provider(url="http://127.0.0.1:1")
    assert one.calls([same[0], *others, same[1]]) == [same, *([other] for other in others)]


async def test_whatever_a_window_holds_is_sent(double: SendGridDouble, provider: Make) -> None:
    one = provider(double)
    window = [a_message(text="a"), a_message(text="b"), a_message(text="a"), a_message(closed=["ada@example.net"])]
    async with one.connection() as connection:
        results = await connection.send(window, always)
    assert meanings(results) == [[TAKEN], [TAKEN], [TAKEN], []]
    assert double.sizes == [2, 1]


async def test_a_large_message_goes_out(double: SendGridDouble, provider: Make) -> None:
    message = a_message(html="<p>" + "x" * 9_000_000)
    assert meanings(await deliver(provider(double), [message])) == [[TAKEN]]
    assert double.taken[0].content[1]["value"] == message.html


async def test_a_request_stays_below_the_size_that_is_taken(
    double: SendGridDouble, provider: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sendgrid, "MAX_REQUEST_BYTES", 4000)
    window = [*some(20), a_message(headers={"X-Long": "x" * 4000})]
    results = await deliver(provider(double), window)
    assert meanings(results) == [[TAKEN]] * 20 + [[REFUSED_MESSAGE]]
    assert "more than SendGrid takes" in results[-1][0].response
    assert sum(double.sizes) == 20
    assert len(double.sizes) > 1


# --- refusals -----------------------------------------------------------------------------------------------------


async def test_a_refusal_that_names_recipients_costs_one_request_more(double: SendGridDouble, provider: Make) -> None:
    double.invalid = {"user3@example.net", "user500@example.net", "user999@example.net"}
    results = await deliver(provider(double), some(1000))
    refused = [number for number, meaning in enumerate(meanings(results)) if meaning == [REFUSED_RECIPIENT]]
    assert refused == [3, 500, 999]
    assert double.sizes == [997]
    assert double.requests == 2
    assert set(double.counts.values()) == {1}


async def test_a_refusal_that_names_nobody_is_traced_by_halves(double: SendGridDouble, provider: Make) -> None:
    double.invalid, double.vague = {"user77@example.net", "user600@example.net"}, True
    results = await deliver(provider(double), some(1000))
    expected = [[REFUSED_MESSAGE if number in {77, 600} else TAKEN] for number in range(1000)]
    assert meanings(results) == expected
    assert sum(double.sizes) == 998
    assert set(double.counts.values()) == {1}
    assert double.requests < 45


async def test_a_message_loses_its_bad_recipients_and_goes_to_the_others(
    double: SendGridDouble, provider: Make
) -> None:
    double.invalid = {"ada@example.net", "cyd@example.net"}
    message = a_message(to=["ada@example.net"], cc=["bob@example.net", "cyd@example.net"], bcc=["eve@example.net"])
    results = await deliver(provider(double), [message])
    assert meanings(results) == [[REFUSED_RECIPIENT, TAKEN, REFUSED_RECIPIENT, TAKEN]]
    assert results[0][0].response == "400 Does not contain a valid address."
    assert [each["email"] for each in double.taken[0].personalization["to"]] == ["bob@example.net"]


async def test_when_only_hidden_recipients_are_left_they_stay_hidden(double: SendGridDouble, provider: Make) -> None:
    double.invalid = {"ada@example.net"}
    results = await deliver(provider(double), [a_message(bcc=["eve@example.net", "fay@example.net"])])
    assert meanings(results) == [[REFUSED_RECIPIENT, TAKEN, TAKEN]]
    assert [taken.recipients for taken in double.taken] == [("eve@example.net",), ("fay@example.net",)]


async def test_what_is_wrong_with_one_message_is_said_of_that_one_only(double: SendGridDouble, provider: Make) -> None:
    window = [a_message(), a_message(subject=""), a_message(headers={"X-SG-ID": "x"}), a_message()]
    results = await deliver(provider(double), window)
    assert meanings(results) == [[TAKEN], [REFUSED_MESSAGE], [REFUSED_MESSAGE], [TAKEN]]
    assert "subject" in results[1][0].response
    assert results[2][0].response == "400 Header cannot be one of the reserved keys."


async def test_an_unverified_sender_is_the_messages_fault_and_not_the_accounts(
    double: SendGridDouble, provider: Make
) -> None:
    double.unverified = {"other@example.com"}
    window = [*some(3, sender=Mailbox("other@example.com")), a_message()]
    results = await deliver(provider(double), window)
    assert meanings(results) == [[REFUSED_MESSAGE]] * 3 + [[TAKEN]]
    assert double.requests == 2
    assert results[0][0].response.startswith("403 The from address does not match a verified Sender Identity.")


@pytest.mark.parametrize("field", ["subject", "header", "text"])
async def test_what_cannot_be_written_is_refused_and_the_others_go(
    field: str, double: SendGridDouble, provider: Make
) -> None:
    bad = {
        "subject": a_message(subject="a\r\nBcc: eve@example.com"),
        "header": a_message(headers={"X-A": "a\nBcc: eve@example.com"}),
        "text": a_message(text="\ud800"),
    }[field]
    results = await deliver_together(provider(double), [a_message(), bad, a_message()])
    assert meanings(results) == [[TAKEN], [REFUSED_MESSAGE], [TAKEN]]
    assert results[1][0].response.startswith("cannot be written as JSON: ")


# --- answers ------------------------------------------------------------------------------------------------------

STATUSES = {
    **dict.fromkeys([400, 413, 415, 422], REFUSED_MESSAGE),
    **dict.fromkeys([401, 403, 404, 405, 301, 307, 308, 429], DEFERRED_CONNECTION),
    **dict.fromkeys([402, 406, 408, 409, 410, 451], DEFERRED_MESSAGE),
    **dict.fromkeys([200, 201, 302, 303, 500, 502, 503, 504, 520], UNCERTAIN),
}


@pytest.mark.parametrize("status", STATUSES)
async def test_what_a_status_means(status: int, double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("answer", status=status, message="because", take=STATUSES[status] == UNCERTAIN)]
    one = provider(double)
    results = await deliver(one, [a_message(cc=["bob@example.net"])])
    assert meanings(results) == [[STATUSES[status]] * 2]
    assert results[0][0].response == f"{status} because"
    assert results[0][0].provider_message_id is None
    if status != 429:
        assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]


async def test_a_field_called_null_is_no_field(double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("answer", status=403, message="access forbidden", field="null")]
    assert meanings(await deliver(provider(double), [a_message()])) == [[DEFERRED_CONNECTION]]


ODD_ANSWERS: dict[str, tuple[Fault, tuple[Outcome, Scope]]] = {
    "a 400 that is not SendGrid's": (raw("400 Bad Request", "Content-Length: 4", body="what"), DEFERRED_MESSAGE),
    "a 400 that breaks off": (raw("400 Bad Request", "Content-Length: 40", body="{"), DEFERRED_MESSAGE),
    "a 413 of a proxy": (raw("413 Too Large", "Content-Length: 6", body="<html>"), REFUSED_MESSAGE),
    "a 401 that is not SendGrid's": (raw("401 Who", "Content-Length: 6", body="<html>"), DEFERRED_CONNECTION),
    "a 502 of a proxy": (raw("502 Bad Gateway", "Content-Length: 6", body="<html>"), UNCERTAIN),
    "a 202 whose body breaks off": (raw("202 Accepted", "Content-Length: 40", body="{"), TAKEN),
    "a 202 without an id": (raw("202 Accepted", "Content-Length: 0"), TAKEN),
    "a redirect": (raw("307 Moved", "Location: /v3/mail/send", "Content-Length: 0"), DEFERRED_CONNECTION),
    "half a status line": (Fault("garbage", take=True, octets="HTTP/1.1 20"), UNCERTAIN),
    "headers without an end": (Fault("garbage", take=True, octets="HTTP/1.1 202 Accepted\r\nX-A: b\r\n"), UNCERTAIN),
    "a header without an end": (Fault("garbage", take=True, octets="HTTP/1.1 202 OK\r\nX: " + "x" * 20_000), UNCERTAIN),
    "another protocol": (Fault("garbage", take=True, octets="220 mail.example.com ESMTP\r\n"), UNCERTAIN),
    "nothing": (Fault("garbage", take=True, octets=""), UNCERTAIN),
}


@pytest.mark.parametrize("case", ODD_ANSWERS)
async def test_what_an_odd_answer_means(case: str, double: SendGridDouble, provider: Make) -> None:
    fault, expected = ODD_ANSWERS[case]
    double.faults = [fault]
    results = await deliver(provider(double), [a_message()])
    assert meanings(results) == [[expected]]
    assert results[0][0].response.isprintable()
    assert double.requests == 1


async def test_an_endless_answer_is_read_up_to_a_limit(double: SendGridDouble, provider: Make) -> None:
    double.faults = [raw("400 Bad Request", "Content-Length: 90000000", body="x" * 3_000_000)]
    assert meanings(await deliver(provider(double), [a_message()])) == [[DEFERRED_MESSAGE]]


async def test_the_key_stands_in_no_response(double: SendGridDouble, provider: Make) -> None:
    for status in (400, 401, 429, 500):
        double.faults = [Fault("answer", status=status, message=f"no\r\n to Bearer {double.key}!")]
        [(result,)] = await deliver(provider(double), [a_message()])
        assert result.response == f"{status} no to Bearer ***!"


async def test_a_wrong_key_blames_no_message(double: SendGridDouble, provider: Make) -> None:
    results = await deliver(provider(double, api_key="SG.wrong"), some(3))
    assert meanings(results) == [[DEFERRED_CONNECTION]] * 3
    assert double.requests == 1


async def test_after_an_open_end_nothing_more_of_the_window_is_sent(double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("hang", take=True, after=1)]
    one = provider(double, timeout=SOON)
    results = await deliver_together(one, [a_message(text=str(number)) for number in range(4)])
    assert meanings(results) == [[TAKEN], [UNCERTAIN], [DEFERRED_CONNECTION], [DEFERRED_CONNECTION]]
    assert double.requests == 2


async def test_before_each_request_it_is_asked_whether_it_may_start(double: SendGridDouble, provider: Make) -> None:
    double.invalid = {"user1@example.net"}
    results = await deliver(provider(double), some(3), yes(1))
    assert [result for (result,) in results][0::2] == [NOT_STARTED, NOT_STARTED]
    assert meanings(results)[1] == [REFUSED_RECIPIENT]
    assert not double.taken


async def deliver_together(one: SendGridProvider, window: list[Message]) -> list[tuple[Result, ...]]:
    async with one.connection() as connection:
        return await connection.send(window, always)


# --- rate limits --------------------------------------------------------------------------------------------------


async def test_throttled_it_stays_away_until_the_limit_is_reset(double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("throttle", seconds=1.5)]
    one = provider(double)
    [(result,)] = await deliver(one, [a_message()])
    assert result.retry_after is not None
    assert timedelta(seconds=1) <= result.retry_after <= timedelta(seconds=3)
    with pytest.raises(ProviderUnavailable, match="rate limit") as caught:
        await deliver(one, [a_message()])
    assert caught.value.retry_after is not None
    assert caught.value.retry_after <= result.retry_after
    assert double.requests == 1
    await asyncio.sleep(caught.value.retry_after.total_seconds() + 0.05)
    assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]


async def test_the_last_request_that_a_limit_allows_is_the_last(double: SendGridDouble, provider: Make) -> None:
    double.rate = (2, 60)
    one = provider(double)
    window = [a_message(text=str(number)) for number in range(3)]
    results = await deliver_together(one, window)
    assert meanings(results) == [[TAKEN], [TAKEN], [DEFERRED_CONNECTION]]
    assert results[2][0].retry_after is not None
    with pytest.raises(ProviderUnavailable):
        await deliver(one, [a_message()])
    assert double.requests == 2
    assert double.statuses == {202: 2}


DATE = "Tue, 24 Nov 2026 10:00:00 GMT"
AT = 1795514400


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((f"X-RateLimit-Reset: {AT + 30}", f"Date: {DATE}"), 30),  # by the server's clock, whatever ours says
        ((f"X-RateLimit-Reset: {AT - 30}", f"Date: {DATE}"), 1),
        ((f"X-RateLimit-Reset: {AT + 10**8}", f"Date: {DATE}"), 3600),
        (("Retry-After: 7",), 7),
        (("X-RateLimit-Reset: soon",), None),
        (("X-RateLimit-Reset: nan",), None),
        (("X-RateLimit-Reset: 1e999",), None),
        (("X-RateLimit-Reset: 5", "Date: today"), None),
        (("Retry-After: Tue, 24 Nov 2026 10:00:00 GMT",), None),
        ((), None),
    ],
)
async def test_how_long_a_throttle_lasts(
    headers: tuple[str, ...], seconds: int | None, double: SendGridDouble, provider: Make
) -> None:
    double.faults = [raw("429 Too Many Requests", "Content-Length: 0", *headers)]
    [(result,)] = await deliver(provider(double), [a_message()])
    assert (result.outcome, result.scope) == DEFERRED_CONNECTION
    assert result.retry_after == (None if seconds is None else timedelta(seconds=seconds))


# --- connections --------------------------------------------------------------------------------------------------


async def test_an_answer_comes_within_the_time_out_or_never(double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("hang")]
    began = time.monotonic()
    results = await deliver(provider(double, timeout=SOON), [a_message()])
    assert SOON.total_seconds() - 0.05 < time.monotonic() - began < 2 * SOON.total_seconds()
    assert results[0][0].response == "gave no answer in time"


async def test_where_connecting_takes_too_long_nothing_was_sent(provider: Make) -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)  # its queue is full with the two that follow
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        results = await deliver(provider(url=f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=SOON), [a_message()])
    assert meanings(results) == [[DEFERRED_CONNECTION]]
    assert results[0][0].response.startswith("cannot be reached: ")


async def test_where_there_is_no_tls_nothing_was_sent(double: SendGridDouble, provider: Make) -> None:
    results = await deliver(provider(url=double.url.replace("http:", "https:")), [a_message()])
    assert meanings(results) == [[DEFERRED_CONNECTION]]
    assert double.requests == 0


async def test_a_server_that_cannot_prove_who_it_is_is_sent_nothing(pki: Pki, provider: Make) -> None:
    async with scripted_http(Answer(202), tls=pki.good) as server:
        results = await deliver(provider(url=f"https://127.0.0.1:{server.port}"), [a_message()])
    assert meanings(results) == [[DEFERRED_CONNECTION]]
    assert "certificate" in results[0][0].response
    assert server.requests == []


async def test_a_request_is_never_repeated_by_the_client(double: SendGridDouble, provider: Make) -> None:
    double.faults = [Fault("drop", take=True, after=1, times=5)]
    one = provider(double)
    assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]
    for count in range(2, 5):  # on a kept connection, then on new ones
        message = a_message()
        assert meanings(await deliver(one, [message])) == [[UNCERTAIN]]
        assert double.counts[message.message_id] == 1
        assert double.requests == count


async def test_a_connection_that_the_server_closed_while_idle_leaves_nothing_open(provider: Make) -> None:
    """The client's loop does not run while the server closes, so that it finds out in the last moment."""
    answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
    closed = threading.Event()

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            client, _ = listener.accept()
            with client:
                while not client.recv(65536).endswith(b"]}"):
                    pass
                client.sendall(answer)
                time.sleep(0.05)
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        one = provider(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]
        closed.wait(5)
        assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]
        await asyncio.to_thread(thread.join)


async def test_a_connection_is_not_kept_for_longer_than_it_should(double: SendGridDouble, provider: Make) -> None:
    one = provider(double, idle=timedelta(seconds=0.2))
    await deliver(one, [a_message()])
    assert double.connections == 1
    await asyncio.sleep(0.5)
    assert double.connections == 0


async def test_closing_lets_a_call_end_that_is_under_way(double: SendGridDouble, provider: Make) -> None:
    double.latency = 0.2
    one = provider(double)
    call = asyncio.ensure_future(deliver(one, [a_message()]))
    await asyncio.sleep(0.1)
    await one.close()
    assert meanings(await call) == [[TAKEN]]
    await asyncio.sleep(0.05)
    assert double.connections == 0


async def test_it_can_be_used_again_after_it_was_closed(double: SendGridDouble, provider: Make) -> None:
    one = provider(double)
    for _ in range(2):
        assert meanings(await deliver(one, [a_message()])) == [[TAKEN]]
        await one.close()
    await asyncio.sleep(0.05)
    assert double.connections == 0


# --- settings and drafts ------------------------------------------------------------------------------------------


def test_the_settings_choose_it(make_settings: Callable[..., Settings]) -> None:
    key = b64encode(P256 + bytes(64)).decode()
    variables = {"EMAIL_PROVIDER": "sendgrid", "SENDGRID_API_KEY": "SG.a.b"}
    [made] = providers.create(make_settings("worker", **variables, SENDGRID_WEBHOOK_SECRET=key)).providers
    assert isinstance(made, SendGridProvider)
    assert (made.name, made.window, made.connections, made.reports) == ("sendgrid", 1000, 8, True)
    assert made.timeout == timedelta(seconds=30)
    assert "SG.a.b" not in repr(made)
    [other] = providers.create(make_settings("worker", **variables)).providers
    assert not other.reports


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SENDGRID_API_KEY", ""),
        ("SENDGRID_API_KEY", "SG.a b"),
        ("SENDGRID_URL", "http://api.sendgrid.com"),
        ("SENDGRID_URL", "https://user:password@api.sendgrid.com"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    variable: str, text: str, make_settings: Callable[..., Settings]
) -> None:
    variables = {"EMAIL_PROVIDER": "sendgrid", "SENDGRID_API_KEY": "SG.a.b", variable: text}
    with pytest.raises(SettingsError, match=variable):
        providers.create(make_settings("worker", **variables))


def a_draft(**fields: Any) -> Draft:
    given: dict[str, Any] = {
        "user_id": 1,
        "lane": 2,
        "sender": Mailbox("shop@example.com"),
        "reply_to": None,
        "subject": "Hello",
        "headers": {},
        "tags": [],
        "metadata": {},
        "html": None,
        "text": "Hello",
        "idempotency_key": None,
        "recipients": [(Kind.TO, Mailbox("ada@example.net"))],
        "body_hash": b"",
    }
    return Draft(**{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, []),
        ({"headers": {"X-Order": "1", "List-Unsubscribe": "<https://example.com>", "In-Reply-To": "<a@b>"}}, []),
        ({"recipients": [(Kind.CC, Mailbox("a@example.net")), (Kind.BCC, Mailbox("b@example.net"))]}, ["to"]),
        ({"subject": ""}, ["subject"]),
        ({"headers": {"X-SG-EID": "1", "x-smtpapi": "{}", "X-Sg": "1"}}, ["headers.X-SG-EID", "headers.x-smtpapi"]),
        ({"text": "SG.abc.def is the key"}, ["text"]),
        ({"html": "SG.abc.def", "text": "the key is SG.abc.def"}, ["html"]),
    ],
)
def test_what_it_cannot_do_is_said_at_acceptance(fields: dict[str, Any], wrong: list[str]) -> None:
    assert [error["field"] for error in unsupported(a_draft(**fields))] == wrong


async def test_nothing_that_passes_acceptance_is_refused_for_its_form(double: SendGridDouble, provider: Make) -> None:
    message = a_message(
        sender=Mailbox("x" * 64 + "@example.com", 'J. "Q" Öçü; <a>'),
        subject="x" * 998,
        headers={f"X-{number}": "ü" * 400 for number in range(50)},
        to=[Mailbox("o'neil+tag@sub.example.co", "Zoë 🎉")],
        cc=[f"user{number}@example.net" for number in range(49)],
    )
    assert meanings(await deliver(provider(double), [message])) == [[TAKEN] * 50]
