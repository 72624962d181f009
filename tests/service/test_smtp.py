"""SMTP against a server that refuses, breaks off, falls silent and lies: what became of each recipient."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message, parse_attempt
from neoforge_email.providers import smtp
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope
from neoforge_email.providers.smtp import SmtpProvider
from tests.pki import Pki
from tests.scripted_smtp import DROP, SILENCE, Action, ScriptedServer, scripted_server
from tests.support import Sink, a_message

Script = dict[str, Action | Sequence[Action]]

TAKEN = (Outcome.TAKEN, Scope.MESSAGE)
REFUSED_RECIPIENT = (Outcome.REFUSED, Scope.RECIPIENT)
REFUSED_MESSAGE = (Outcome.REFUSED, Scope.MESSAGE)
DEFERRED_RECIPIENT = (Outcome.DEFERRED, Scope.RECIPIENT)
DEFERRED_MESSAGE = (Outcome.DEFERRED, Scope.MESSAGE)
DEFERRED_CONNECTION = (Outcome.DEFERRED, Scope.CONNECTION)
UNCERTAIN = (Outcome.UNCERTAIN, Scope.MESSAGE)

PLAIN = ("8BITMIME",)
PIPELINING = ("PIPELINING", "8BITMIME")


def always() -> bool:
    return True


def yes(times: int) -> Callable[[], bool]:
    """Says yes so many times, then no."""
    answers = iter([True] * times)
    return lambda: next(answers, False)


Make = Callable[..., SmtpProvider]


@pytest.fixture
async def provider() -> AsyncIterator[Make]:
    """`provider(server)`: one in the clear, with a short time-out; closed in the end."""
    made: list[SmtpProvider] = []

    def make(server: ScriptedServer | Sink, host: str = "127.0.0.1", **options: Any) -> SmtpProvider:
        given = {"use_tls": False, "timeout": timedelta(seconds=0.5), **options}
        made.append(SmtpProvider(host, server.port, **given))
        return made[-1]

    yield make
    for one in made:
        await one.close()
    await asyncio.sleep(0.01)


async def deliver(
    provider: SmtpProvider, *window: Message, may_start: Callable[[], bool] = always
) -> list[tuple[Result, ...]]:
    async with provider.connection() as connection:
        return await connection.send(window, may_start)


def outcomes(results: list[tuple[Result, ...]]) -> list[list[tuple[Outcome, Scope]]]:
    return [[(result.outcome, result.scope) for result in message] for message in results]


# --- one message to ada and bob -----------------------------------------------------------------------------------

CASES: dict[str, tuple[Script, list[tuple[Outcome, Scope]]]] = {
    "all goes well": ({}, [TAKEN, TAKEN]),
    "replies of several lines": ({"MAIL.*": "250-one\r\n250-two\r\n250 three"}, [TAKEN, TAKEN]),
    "bare line feeds in replies": ({"MAIL.*": b"250 ok\n"}, [TAKEN, TAKEN]),
    "a code without words": ({"\\.": "250"}, [TAKEN, TAKEN]),
    "the first refused": ({"RCPT.*ada.*": "550 5.1.1 no such user"}, [REFUSED_RECIPIENT, TAKEN]),
    "the last refused": ({"RCPT.*bob.*": "550 5.1.1 no such user"}, [TAKEN, REFUSED_RECIPIENT]),
    "one deferred": ({"RCPT.*bob.*": "451 4.2.0 greylisted"}, [TAKEN, DEFERRED_RECIPIENT]),
    "one refused and one deferred": (
        {"RCPT.*ada.*": "550 no", "RCPT.*bob.*": "452 full", "DATA": "554 no recipients"},
        [REFUSED_RECIPIENT, DEFERRED_RECIPIENT],
    ),
    "all refused, and a body wanted all the same": ({"RCPT.*": "550 no"}, [REFUSED_RECIPIENT] * 2),
    "all refused, and no body wanted": ({"RCPT.*": "550 no", "DATA": "503 RCPT first"}, [REFUSED_RECIPIENT] * 2),
    "the sender refused": ({"MAIL.*": "550 5.7.1 not you", "(RCPT|DATA).*": "503 no"}, [REFUSED_MESSAGE] * 2),
    "the sender deferred": ({"MAIL.*": "451 later", "(RCPT|DATA).*": "503 no"}, [DEFERRED_MESSAGE] * 2),
    "the sender refused by a server that goes on": ({"MAIL.*": "550 not you"}, [REFUSED_MESSAGE] * 2),
    "DATA refused": ({"DATA": "554 5.7.1 no"}, [REFUSED_MESSAGE] * 2),
    "DATA deferred": ({"DATA": "451 later"}, [DEFERRED_MESSAGE] * 2),
    "DATA answered with 250": ({"DATA": "250 what"}, [DEFERRED_CONNECTION] * 2),
    "DATA deferred, one refused before": (
        {"DATA": "451 later", "RCPT.*bob.*": "550 no"},
        [DEFERRED_MESSAGE, REFUSED_RECIPIENT],
    ),
    "the body refused": ({"\\.": "554 5.7.1 spam"}, [REFUSED_MESSAGE] * 2),
    "the body deferred": ({"\\.": "452 4.3.1 disk full"}, [DEFERRED_MESSAGE] * 2),
    "the body refused, one recipient deferred before": (
        {"\\.": "554 spam", "RCPT.*ada.*": "450 busy"},
        [DEFERRED_RECIPIENT, REFUSED_MESSAGE],
    ),
    "421 to MAIL": ({"MAIL.*": "421 4.3.2 shutting down"}, [DEFERRED_CONNECTION] * 2),
    "421 to the second RCPT": ({"RCPT.*bob.*": "421 4.3.2 shutting down"}, [DEFERRED_CONNECTION] * 2),
    "421 to DATA": ({"DATA": "421 4.3.2 shutting down"}, [DEFERRED_CONNECTION] * 2),
    "421 to the body": ({"\\.": "421 4.3.2 shutting down"}, [DEFERRED_CONNECTION] * 2),
    "dropped at MAIL": ({"MAIL.*": DROP}, [DEFERRED_CONNECTION] * 2),
    "dropped at the second RCPT": ({"RCPT.*bob.*": DROP}, [DEFERRED_CONNECTION] * 2),
    "dropped at DATA": ({"DATA": DROP}, [DEFERRED_CONNECTION] * 2),
    "dropped in the body": ({"BODY": DROP}, [UNCERTAIN] * 2),
    "dropped after the body": ({"\\.": DROP}, [UNCERTAIN] * 2),
    "dropped after the body, one refused before": (
        {"\\.": DROP, "RCPT.*ada.*": "550 no"},
        [REFUSED_RECIPIENT, UNCERTAIN],
    ),
    "silent at MAIL": ({"MAIL.*": SILENCE}, [DEFERRED_CONNECTION] * 2),
    "silent at DATA": ({"DATA": SILENCE}, [DEFERRED_CONNECTION] * 2),
    "silent after the body": ({"\\.": SILENCE}, [UNCERTAIN] * 2),
    "half a reply after the body": ({"\\.": b"250 2.0"}, [UNCERTAIN] * 2),
    "a first line alone after the body": ({"\\.": b"250-2.0.0 kept\r\n"}, [UNCERTAIN] * 2),
    "nonsense to MAIL": ({"MAIL.*": b"HTTP/1.1 400 Bad Request\r\n"}, [DEFERRED_CONNECTION] * 2),
    "nonsense after the body": ({"\\.": b"\xff\xfe\x00\r\n"}, [UNCERTAIN] * 2),
    "a line without end after the body": ({"\\.": b"250 " + b"x" * 10_000}, [UNCERTAIN] * 2),
    "a reply without end to MAIL": ({"MAIL.*": b"250-x\r\n" * 1000}, [DEFERRED_CONNECTION] * 2),
    "354 to MAIL": ({"MAIL.*": "354 what"}, [DEFERRED_CONNECTION] * 2),
    "354 to a recipient": ({"RCPT.*ada.*": "354 what"}, [DEFERRED_CONNECTION] * 2),
    "354 to the body": ({"\\.": "354 go on"}, [UNCERTAIN] * 2),
}


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
@pytest.mark.parametrize("case", CASES)
async def test_what_became_of_each_recipient(case: str, offers: tuple[str, ...], provider: Make) -> None:
    script, expected = CASES[case]
    async with scripted_server(script, offers=offers) as server:
        one = provider(server)
        [results] = outcomes(await deliver(one, a_message(to=["ada@example.net"], cc=["bob@example.net"])))
        assert results == expected
        # Whatever has happened, the next message is not harmed by it.
        server.script = {}
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.commands.count("DATA") - len(server.bodies) in {0, 1}


async def test_a_server_that_answers_octet_by_octet_is_understood(provider: Make) -> None:
    async with scripted_server(dribble=True) as server:
        assert outcomes(await deliver(provider(server), a_message(), a_message())) == [[TAKEN], [TAKEN]]


async def test_the_servers_words_are_kept_on_one_line(provider: Make) -> None:
    async with scripted_server({"\\.": "550-5.7.1 No\x07\r\n550-because\tof\r\n550 " + "x" * 1000}) as server:
        [[result]] = await deliver(provider(server), a_message())
    assert result.response.startswith("550 5.7.1 No because of xxx")
    assert len(result.response) == 500


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
async def test_a_large_body_that_breaks_off_before_its_end_was_not_taken(
    offers: tuple[str, ...], provider: Make
) -> None:
    async with scripted_server({"BODY": DROP}, offers=offers) as server:
        [[result]] = await deliver(provider(server), a_message(text="line of text\n" * 2_000_000))
    assert (result.outcome, result.scope) == DEFERRED_CONNECTION


async def test_recipients_that_are_finished_are_not_addressed_again(provider: Make) -> None:
    async with scripted_server() as server:
        message = a_message(to=["ada@example.net", "bob@example.net"], closed=["ada@example.net"])
        assert outcomes(await deliver(provider(server), message)) == [[TAKEN]]
    assert [command for command in server.commands if "RCPT" in command] == ["RCPT TO:<bob@example.net>"]


async def test_what_is_sent_is_what_arrives(sink: Sink, provider: Make) -> None:
    text = ".\n..\n.hidden\nlast without end"
    message = a_message(text=text, bcc=["eve@example.net"])
    assert outcomes(await deliver(provider(sink), message)) == [[TAKEN, TAKEN]]
    [mail] = await sink.store.wait(1)
    assert mail.content.endswith(b"\r\n\r\n" + text.replace("\n", "\r\n").encode() + b"\r\n")
    assert mail.recipients == ("ada@example.net", "eve@example.net")
    assert mail.message_id == message.message_id


async def test_with_a_bounce_domain_each_attempt_has_its_own_return_path(sink: Sink, provider: Make) -> None:
    first, again = a_message(), a_message(lease_no=12)
    assert outcomes(await deliver(provider(sink, bounce_domain="bounces.example.com"), first, again)) == [[TAKEN]] * 2
    mails = await sink.store.wait(2)
    assert [mail.sender for mail in mails] == [
        f"bounce+{message.attempt}@bounces.example.com" for message in (first, again)
    ]
    assert [parse_attempt(mail.sender[7:].partition("@")[0]) for mail in mails] == [(first.id, 1), (again.id, 12)]
    assert all(b"\r\nFrom: Shop <shop@example.com>\r\n" in b"\r\n" + mail.content for mail in mails)


async def test_without_a_bounce_domain_bounces_go_to_the_sender(sink: Sink, provider: Make) -> None:
    assert outcomes(await deliver(provider(sink), a_message())) == [[TAKEN]]
    [mail] = await sink.store.wait(1)
    assert mail.sender == "shop@example.com"


# --- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
async def test_one_bad_message_never_fails_the_others_of_its_window(offers: tuple[str, ...], provider: Make) -> None:
    window = [
        a_message(subject="1"),
        a_message(subject="2", to=["bad@example.net"]),
        a_message(subject="3\r\nBcc: eve@example.com"),
        a_message(subject="4", to=["ada@example.net", "bad@example.net"]),
        a_message(subject="5"),
    ]
    async with scripted_server({"RCPT.*bad.*": "550 no"}, offers=offers) as server:
        one = provider(server)
        assert outcomes(await deliver(one, *window)) == [
            [TAKEN],
            [REFUSED_RECIPIENT],
            [REFUSED_MESSAGE],
            [TAKEN, REFUSED_RECIPIENT],
            [TAKEN],
        ]
        assert server.connections == 1
    subjects = [body.split(b"Subject: ")[1][:1] for body in server.bodies if body]
    assert subjects == [b"1", b"4", b"5"]


LOST: dict[str, tuple[Script, list[tuple[Outcome, Scope]]]] = {
    "dropped after the first body": ({"\\.": DROP}, [UNCERTAIN, DEFERRED_CONNECTION, DEFERRED_CONNECTION]),
    "dropped after the second body": ({"\\.": ["250 ok", DROP]}, [TAKEN, UNCERTAIN, DEFERRED_CONNECTION]),
    "421 to the first body": ({"\\.": "421 bye"}, [DEFERRED_CONNECTION] * 3),
    "421 to the second MAIL": ({"MAIL.*": ["250 ok", "421 bye"]}, [TAKEN, DEFERRED_CONNECTION, DEFERRED_CONNECTION]),
    "silent after the second body": ({"\\.": ["250 ok", SILENCE]}, [TAKEN, UNCERTAIN, DEFERRED_CONNECTION]),
    "the first body refused": ({"\\.": ["554 spam", "250 ok"]}, [REFUSED_MESSAGE, TAKEN, TAKEN]),
    "the second DATA deferred": ({"DATA": ["354 go", "451 later", "354 go"]}, [TAKEN, DEFERRED_MESSAGE, TAKEN]),
}


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
@pytest.mark.parametrize("case", LOST)
async def test_what_is_lost_within_a_window_is_said_message_by_message(
    case: str, offers: tuple[str, ...], provider: Make
) -> None:
    script, expected = LOST[case]
    async with scripted_server(script, offers=offers) as server:
        results = await deliver(provider(server), a_message(), a_message(), a_message())
    assert outcomes(results) == [[one] for one in expected]


async def test_a_pipelining_server_gets_a_body_and_the_next_commands_at_once(provider: Make) -> None:
    async with scripted_server() as server:
        await deliver(provider(server), *[a_message() for _ in range(5)])
    assert [command.split()[0] for command in server.commands] == ["EHLO", *["MAIL", "RCPT", "DATA"] * 5]


# --- may_start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
async def test_nothing_is_written_once_no_message_may_start(offers: tuple[str, ...], provider: Make) -> None:
    async with scripted_server(offers=offers) as server:
        one = provider(server)
        assert await deliver(one, a_message(), a_message(), may_start=yes(0)) == [(NOT_STARTED,), (NOT_STARTED,)]
        assert not [command for command in server.commands if "MAIL" in command]
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.connections == 1


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
async def test_a_body_is_not_written_when_the_time_has_run_out_meanwhile(
    offers: tuple[str, ...], provider: Make
) -> None:
    async with scripted_server(offers=offers) as server:
        results = await deliver(
            provider(server), a_message(to=["ada@example.net", "bob@example.net"]), may_start=yes(1)
        )
        assert results == [(NOT_STARTED, NOT_STARTED)]
        await asyncio.sleep(0.05)
        assert server.bodies == []


@pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelining", "plain"])
@pytest.mark.parametrize("times", range(2, 9))
async def test_whenever_the_time_runs_out_what_is_not_taken_was_not_sent(
    times: int, offers: tuple[str, ...], provider: Make
) -> None:
    async with scripted_server(offers=offers) as server:
        results = await deliver(provider(server), a_message(), a_message(), a_message(), may_start=yes(times))
        await asyncio.sleep(0.05)
        taken = [result.outcome is Outcome.TAKEN for (result,) in results]
        assert taken == sorted(taken, reverse=True)
        assert sum(taken) == len(server.bodies) >= 1
        assert {result for (result,) in results if result.outcome is not Outcome.TAKEN} <= {NOT_STARTED}


# --- connections --------------------------------------------------------------------------------------------------


async def test_a_connection_is_kept_and_used_again(provider: Make) -> None:
    async with scripted_server() as server:
        one = provider(server)
        for _ in range(3):
            assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.connections == 1
        await one.close()
        await asyncio.sleep(0.05)
        assert server.commands[-1] == "QUIT"


async def test_a_kept_connection_that_the_server_has_closed_is_replaced(provider: Make) -> None:
    async with scripted_server() as server:
        one = provider(server)
        await deliver(one, a_message())
        await server.hang_up()
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.connections == 2


async def test_a_connection_ends_after_its_share_of_messages(provider: Make) -> None:
    async with scripted_server() as server:
        one = provider(server, messages_per_connection=2)
        for _ in range(5):
            await deliver(one, a_message())
        assert server.connections == 3


async def test_a_connection_that_is_idle_for_long_is_closed(provider: Make) -> None:
    async with scripted_server() as server:
        one = provider(server, idle=timedelta(seconds=0.05))
        await deliver(one, a_message())
        await asyncio.sleep(0.15)
        assert server.commands[-1] == "QUIT"
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.connections == 2


@pytest.mark.parametrize("answer", ["250 alive", "421 4.4.2 idle for too long", DROP, SILENCE])
async def test_a_connection_that_was_idle_is_asked_whether_it_lives(
    answer: Action, provider: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "PROBE_AFTER", timedelta(seconds=0.05))
    async with scripted_server({"NOOP": answer}) as server:
        one = provider(server)
        await deliver(one, a_message())
        await asyncio.sleep(0.1)
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.commands.count("NOOP") == 1
        assert server.connections == (1 if answer == "250 alive" else 2)


async def test_no_more_connections_are_open_at_once_than_are_allowed(provider: Make) -> None:
    async with scripted_server() as server:
        one = provider(server, connections=2)
        results = await asyncio.gather(*[deliver(one, a_message()) for _ in range(20)])
        assert [outcomes(result) for result in results] == [[[TAKEN]]] * 20
        assert server.connections == 2


async def test_each_destination_has_connections_of_its_own(provider: Make) -> None:
    async with scripted_server() as one, scripted_server() as other:
        providers = [provider(server, connections=1) for server in (one, other)]
        for _ in range(3):
            results = await asyncio.gather(*(deliver(to, a_message()) for to in providers))
            assert [outcomes(result) for result in results] == [[[TAKEN]]] * 2
        assert (one.connections, other.connections) == (1, 1)
        assert (len(one.bodies), len(other.bodies)) == (3, 3)


async def test_a_message_above_the_servers_size_is_refused_without_being_sent(provider: Make) -> None:
    async with scripted_server(offers=("PIPELINING", "SIZE 1000")) as server:
        results = await deliver(provider(server), a_message(text="x" * 2000), a_message())
        assert outcomes(results) == [[REFUSED_MESSAGE], [TAKEN]]
    assert "the 1000 that the server takes" in results[0][0].response
    assert len(server.bodies) == 1
    assert re.fullmatch(r"MAIL FROM:<shop@example.com> SIZE=\d+", server.commands[1])


async def test_a_cancelled_call_closes_its_connection(provider: Make) -> None:
    async with scripted_server({"\\.": SILENCE}) as server:
        one = provider(server, timeout=timedelta(seconds=30))
        call = asyncio.create_task(deliver(one, a_message()))
        while not server.bodies:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        server.script = {}
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
        assert server.connections == 2


async def test_a_server_without_ehlo_is_greeted_with_helo(provider: Make) -> None:
    async with scripted_server({"EHLO.*": "502 what"}) as server:
        assert outcomes(await deliver(provider(server), a_message(), a_message())) == [[TAKEN], [TAKEN]]
    assert server.commands[1].startswith("HELO ")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ({"GREETING": "554 5.3.2 closed"}, "554 5.3.2 closed"),
        ({"GREETING": "421 busy"}, "421 busy"),
        ({"GREETING": DROP}, "connection"),
        ({"GREETING": SILENCE}, "in time|within"),
        ({"GREETING": b"SSH-2.0-OpenSSH_9.2\r\n"}, "not SMTP"),
        ({"(EHLO|HELO).*": "550 go away"}, "550 go away"),
        ({"EHLO.*": DROP}, "connection"),
    ],
)
async def test_a_server_that_does_not_welcome_us_is_unavailable(script: Script, reason: str, provider: Make) -> None:
    async with scripted_server(script) as server:
        with pytest.raises(ProviderUnavailable, match=reason):
            await deliver(provider(server), a_message())


async def test_no_server_at_all_is_unavailable(provider: Make) -> None:
    async with scripted_server() as server:
        pass
    with pytest.raises(ProviderUnavailable, match=rf"127\.0\.0\.1:{server.port} cannot be reached"):
        await deliver(provider(server), a_message())


# --- TLS and AUTH -------------------------------------------------------------------------------------------------


SECRET = "correct horse battery staple"
WITH_TLS = ("PIPELINING", "STARTTLS", "AUTH PLAIN LOGIN")


async def test_starttls_encrypts_everything_that_matters(pki: Pki, provider: Make) -> None:
    async with scripted_server(offers=WITH_TLS, tls=pki.good) as server:
        one = provider(server, use_tls=True, ca_file=pki.ca_file, username="shop", password=SECRET)
        assert outcomes(await deliver(one, a_message(), a_message())) == [[TAKEN], [TAKEN]]
    clear = [command.split()[0] for command, tls in zip(server.commands, server.encrypted, strict=True) if not tls]
    assert clear == ["EHLO", "STARTTLS"]
    assert [command.split()[0] for command in server.commands[2:5]] == ["EHLO", "AUTH", "MAIL"]


async def test_tls_from_the_first_octet(pki: Pki, provider: Make) -> None:
    async with scripted_server(tls=pki.good, implicit_tls=True) as server:
        one = provider(server, use_ssl=True, ca_file=pki.ca_file)
        assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
    assert all(server.encrypted)


@pytest.mark.parametrize("octets", [70_000, 1_000_000])
async def test_a_large_body_goes_through_tls(octets: int, pki: Pki, provider: Make) -> None:
    async with scripted_server(offers=WITH_TLS, tls=pki.good) as server:
        one = provider(server, use_tls=True, ca_file=pki.ca_file)
        assert outcomes(await deliver(one, a_message(text="0123456 \n" * (octets // 9)), a_message())) == [
            [TAKEN],
            [TAKEN],
        ]


@pytest.mark.parametrize(
    ("script", "offers", "reason"),
    [
        ({}, ("PIPELINING", "AUTH PLAIN"), "offers no STARTTLS"),
        ({"EHLO.*": "502 what"}, (), "offers no STARTTLS"),
        ({"STARTTLS": "454 not now"}, WITH_TLS, "454 not now"),
        ({"STARTTLS": b"220 go on\r\n250 injected\r\n"}, WITH_TLS, "could be an attack"),
        ({"STARTTLS": DROP}, WITH_TLS, "connection"),
        ({"STARTTLS": SILENCE}, WITH_TLS, "in time|within"),
    ],
)
async def test_nothing_is_ever_sent_in_the_clear_when_tls_is_asked_for(
    script: Script, offers: tuple[str, ...], reason: str, provider: Make
) -> None:
    async with scripted_server(script, offers=offers) as server:
        one = provider(server, use_tls=True, username="shop", password=SECRET)
        with pytest.raises(ProviderUnavailable, match=reason):
            await deliver(one, a_message())
    assert {command.split()[0] for command in server.commands} <= {"EHLO", "HELO", "STARTTLS"}


@pytest.mark.parametrize("implicit_tls", [False, True], ids=["starttls", "implicit"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("for_another", "certificate is not valid for '127.0.0.1'"),
        ("expired", "certificate has expired"),
        ("unknown_ca", "unable to get local issuer certificate"),
    ],
)
async def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    wrong: str, reason: str, implicit_tls: bool, pki: Pki, provider: Make
) -> None:
    context = pki.good if wrong == "unknown_ca" else getattr(pki, wrong)
    ca_file = None if wrong == "unknown_ca" else pki.ca_file
    async with scripted_server(offers=WITH_TLS, tls=context, implicit_tls=implicit_tls) as server:
        tls = {"use_tls": not implicit_tls, "use_ssl": implicit_tls, "ca_file": ca_file}
        one = provider(server, timeout=timedelta(seconds=10), **tls)
        with pytest.raises(ProviderUnavailable, match=rf"^TLS with the SMTP server .* failed: .*{reason}"):
            await deliver(one, a_message())
    assert not any(server.encrypted)


@pytest.mark.parametrize("offered", ["AUTH PLAIN LOGIN", "AUTH LOGIN", "auth plain"])
async def test_username_and_password_are_given_as_the_server_asks(offered: str, provider: Make) -> None:
    plain = "PLAIN" in offered.upper()
    login: Script = {"AUTH LOGIN": "334 VXNlcm5hbWU6", "c2hvcA==|Y29y.*": ["334 UGFzc3dvcmQ6", "235 welcome"]}
    async with scripted_server({} if plain else login, offers=("PIPELINING", offered)) as server:
        assert outcomes(await deliver(provider(server, username="shop", password=SECRET), a_message())) == [[TAKEN]]
    if plain:
        assert base64.b64decode(server.commands[1].removeprefix("AUTH PLAIN ")) == f"\0shop\0{SECRET}".encode()
    else:
        assert [base64.b64decode(command) for command in server.commands[2:4]] == [b"shop", SECRET.encode()]


@pytest.mark.parametrize(
    ("script", "offered", "reason"),
    [
        ({"AUTH.*": f"535 5.7.8 no: {SECRET}"}, "AUTH PLAIN", "to SMTP_USERNAME and SMTP_PASSWORD: 535"),
        ({"AUTH.*": "535 no"}, "AUTH LOGIN", "535"),
        ({}, "AUTH CRAM-MD5", "neither AUTH PLAIN nor LOGIN"),
        ({}, "8BITMIME", "neither AUTH PLAIN nor LOGIN"),
    ],
)
async def test_a_refused_password_is_said_and_never_repeated(
    script: Script, offered: str, reason: str, provider: Make
) -> None:
    async with scripted_server(script, offers=(offered,)) as server:
        with pytest.raises(ProviderUnavailable, match=reason) as caught:
            await deliver(provider(server, username="shop", password=SECRET), a_message())
    assert SECRET not in caught.value.detail
    assert not [command for command in server.commands if "MAIL" in command]


@pytest.mark.parametrize(
    ("peer", "loopback"),
    [
        (("127.0.0.1", 25), True),
        (("::1", 25, 0, 0), True),
        (("192.0.2.1", 25), False),
        (("fe80::1%eth0", 25, 0, 0), False),
    ],
)
async def test_a_password_goes_out_without_tls_only_on_this_computer(
    peer: tuple[object, ...], loopback: bool, provider: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted_server(offers=("AUTH PLAIN",)) as server:
        transport = type("Elsewhere", (asyncio.Transport,), {"get_extra_info": lambda self, name: peer})()
        real = smtp._is_loopback
        monkeypatch.setattr(smtp, "_is_loopback", lambda _: real(transport))
        one = provider(server, username="shop", password=SECRET)
        if loopback:
            assert outcomes(await deliver(one, a_message())) == [[TAKEN]]
            return
        with pytest.raises(ProviderUnavailable, match="never sent without TLS"):
            await deliver(one, a_message())
        assert not [command for command in server.commands if "AUTH" in command]


def test_tls_cannot_be_wanted_in_two_ways() -> None:
    with pytest.raises(ValueError, match="not both"):
        SmtpProvider("mail.example.com", 25, use_tls=True, use_ssl=True)


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ValueError, match=r"SMTP_CA_FILE: .*ca\.pem holds no CA certificates"):
        SmtpProvider("mail.example.com", 25, ca_file=tmp_path / "ca.pem")
