"""SMTP against a real Postfix: the contract of all providers, its limits, its restarts and its bounces."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from email import message_from_bytes
from email.message import Message as Mail
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from neoforge_email.errors import ProviderUnavailable
from neoforge_email.inbound import dsn
from neoforge_email.lifecycle import EventType
from neoforge_email.mailbox import Store, smtp_server
from neoforge_email.message import Message
from neoforge_email.providers.base import Outcome, Scope
from neoforge_email.providers.smtp import SmtpProvider
from tests.pki import Pki
from tests.postfix import (
    BOUNCE_DOMAIN,
    DEAD_DOMAIN,
    HARD_ERROR_LIMIT,
    LATER,
    REFUSED,
    SIZE_LIMIT_BYTES,
    Postfix,
    missing,
)
from tests.provider_contract import FEW, Arrival, ProviderContract, Target, always, deliver, outcomes
from tests.support import a_message

TAKEN = (Outcome.TAKEN, Scope.MESSAGE)
REFUSED_RECIPIENT = (Outcome.REFUSED, Scope.RECIPIENT)
REFUSED_MESSAGE = (Outcome.REFUSED, Scope.MESSAGE)
DEFERRED_RECIPIENT = (Outcome.DEFERRED, Scope.RECIPIENT)
DEFERRED_CONNECTION = (Outcome.DEFERRED, Scope.CONNECTION)

KEPT_BOUNCE = Path(__file__).parent / "dsn" / "postfix.eml"

reason = missing()
NOT_TESTED = f"NOT TESTED: a real Postfix: {reason}"
if reason and not (os.environ.get("CI") == "true" and os.geteuid() == 0):
    pytest.skip(NOT_TESTED, allow_module_level=True)

Make = Callable[..., SmtpProvider]


@pytest.fixture(scope="module")
def running(pki: Pki) -> Iterator[Postfix]:
    if reason:
        pytest.fail(NOT_TESTED)
    with TemporaryDirectory(prefix="neoforge-postfix-", dir="/tmp") as directory:
        server = Postfix(Path(directory), pki)
        try:
            server.start()
            yield server
        finally:
            server.end()


@pytest.fixture
async def postfix(running: Postfix) -> AsyncIterator[Postfix]:
    """Running, with nothing queued or delivered."""
    yield running
    await running.settled()
    running.clear()


@pytest.fixture
async def provider(postfix: Postfix, pki: Pki) -> AsyncIterator[Make]:
    """`provider()`: one over STARTTLS; closed in the end."""
    made: list[SmtpProvider] = []

    def make(port: int | None = None, **options: Any) -> SmtpProvider:
        given = {"ca_file": pki.ca_file, "timeout": timedelta(seconds=10), "connections": 4, **options}
        made.append(SmtpProvider("127.0.0.1", port or postfix.port, **given))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def meanings(results: Sequence[Sequence[Any]]) -> list[list[tuple[Outcome, Scope]]]:
    return [[(result.outcome, result.scope) for result in message] for message in results]


class TestPostfix(ProviderContract):
    @pytest.fixture(params=[False, True], ids=["clear", "starttls"])
    async def target(self, postfix: Postfix, provider: Make, request: pytest.FixtureRequest) -> Target:
        async def arrived(_: int) -> list[Arrival]:
            await postfix.settled()
            copies: dict[tuple[str, str], set[str]] = {}
            for one in postfix.taken:
                copies.setdefault((one.queue_id, one.attempt), set()).add(one.recipient)
            return [Arrival(attempt, frozenset(recipients)) for (_, attempt), recipients in copies.items()]

        one = provider(use_tls=request.param, connections=2, window=3)
        return Target(one, arrived, REFUSED, lambda: provider(1))


@pytest.mark.parametrize("use_tls", [False, True], ids=["clear", "starttls"])
async def test_windows_are_pipelined_over_one_connection(use_tls: bool, postfix: Postfix, provider: Make) -> None:
    one = provider(use_tls=use_tls, window=FEW)
    seen = len(postfix.log)
    async with one.connection() as connection:
        assert {"PIPELINING", "SIZE", "8BITMIME"} <= set(connection.capabilities)
    for _ in range(2):
        assert outcomes(await deliver(one, [a_message() for _ in range(FEW)])) == [[Outcome.TAKEN]] * FEW
    await one.close()
    session = "ehlo=2 starttls=1" if use_tls else "ehlo=1"
    async with asyncio.timeout(10):
        while f"{session} mail=50 rcpt=50 data=50 quit=1 commands=" not in postfix.log[seen:]:
            await asyncio.sleep(0.02)
    assert "improper command pipelining" not in postfix.log[seen:]


async def test_refused_and_deferred_recipients_harm_nobody_beside_them(postfix: Postfix, provider: Make) -> None:
    window = [
        a_message(to=["ada@example.net", REFUSED, LATER, "bob@example.net"]),
        a_message(to=[REFUSED, LATER]),
        a_message(to=["stranger@elsewhere.example"]),
        a_message(),
    ]
    results = await deliver(provider(), window)
    assert meanings(results) == [
        [TAKEN, REFUSED_RECIPIENT, DEFERRED_RECIPIENT, TAKEN],
        [REFUSED_RECIPIENT, DEFERRED_RECIPIENT],
        [REFUSED_RECIPIENT],
        [TAKEN],
    ]
    assert "No such user here" in results[0][1].response
    assert "Relay access denied" in results[2][0].response
    await postfix.settled()
    assert Counter((one.attempt, one.recipient) for one in postfix.taken) == Counter(
        [
            (window[0].attempt, "ada@example.net"),
            (window[0].attempt, "bob@example.net"),
            (window[3].attempt, "ada@example.net"),
        ]
    )


async def test_a_message_above_the_size_limit_is_refused_before_and_by_the_server(
    postfix: Postfix, provider: Make
) -> None:
    window = [a_message(), a_message(text="x" * 70 + "\n" + "line of text\n" * 100_000), a_message()]
    one = provider()
    results = await deliver(one, window)
    assert meanings(results) == [[TAKEN], [REFUSED_MESSAGE], [TAKEN]]
    assert results[1][0].response.endswith(f"more than the {SIZE_LIMIT_BYTES} that the server takes")
    async with one.connection() as connection:
        connection._size_limit = None
        results = await connection.send(window, always)
    assert meanings(results) == [[TAKEN], [REFUSED_MESSAGE], [TAKEN]]
    assert results[1][0].response.startswith("552 5.3.4 ")


async def test_a_connection_that_postfix_ends_after_too_many_errors_loses_nothing(
    postfix: Postfix, provider: Make
) -> None:
    good = [a_message() for _ in range(20)]
    bad = [a_message(to=[REFUSED]) for _ in range(20)]
    waiting = good[:10] + bad + good[10:]  # a message that is taken makes Postfix forget the errors before it
    one = provider(postfix.strict_port, connections=1, window=len(waiting))
    seen = len(postfix.log)
    ended, refused = 0, 0
    while waiting:
        results = await deliver(one, waiting)
        answers = [result for (result,) in results]
        assert {(answer.outcome, answer.scope) for answer in answers} <= {TAKEN, REFUSED_RECIPIENT, DEFERRED_CONNECTION}
        again = [
            message for message, answer in zip(waiting, answers, strict=True) if answer.outcome is Outcome.DEFERRED
        ]
        assert len(again) < len(waiting)
        refused += sum(answer.outcome is Outcome.REFUSED for answer in answers)
        if again:
            ended += 1
            assert next(a for a in answers if a.outcome is Outcome.DEFERRED).response.startswith("421 4.7.0 ")
        waiting = again
    await postfix.settled()
    assert Counter(copy.attempt for copy in postfix.taken) == Counter(message.attempt for message in good)
    assert refused == len(bad)
    assert ended >= len(bad) // HARD_ERROR_LIMIT
    assert "too many errors after" in postfix.log[seen:]


# --- restarts -----------------------------------------------------------------------------------------------------


class Courier:
    """Sends messages until each has a definite answer; a message without one goes again, under a new attempt."""

    def __init__(self, provider: SmtpProvider, messages: Sequence[Message]) -> None:
        self.provider = provider
        self.waiting = deque(messages)
        self.taken: list[Message] = []
        self.uncertain: set[str] = set()
        self.deferred = 0
        self._left = len(messages)

    async def run(self) -> None:
        await asyncio.gather(*(self._carry() for _ in range(self.provider.connections)))

    async def _carry(self) -> None:
        while len(self.taken) < self._left:
            window = [self.waiting.popleft() for _ in range(min(self.provider.window, len(self.waiting)))]
            if not window:
                await asyncio.sleep(0.01)
                continue
            try:
                async with self.provider.connection() as connection:
                    results = await connection.send(window, always)
            except ProviderUnavailable:
                self.waiting.extend(window)
                await asyncio.sleep(0.05)
                continue
            for message, (result,) in zip(window, results, strict=True):
                if result.outcome is Outcome.TAKEN:
                    self.taken.append(message)
                    continue
                assert result.outcome is not Outcome.REFUSED, result
                if result.outcome is Outcome.UNCERTAIN:
                    self.uncertain.add(message.message_id)
                self.deferred += result.outcome is Outcome.DEFERRED
                self.waiting.append(replace(message, lease_no=message.lease_no + 1))

    async def until(self, count: int) -> None:
        while len(self.taken) < count:
            await asyncio.sleep(0.002)


MANY = 2000


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_restart_under_load_loses_nothing_and_sends_nothing_twice_that_is_not_uncertain(
    how: str, postfix: Postfix, provider: Make
) -> None:
    messages = [a_message() for _ in range(MANY)]
    courier = Courier(provider(window=10, timeout=timedelta(seconds=5)), messages)
    async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(courier.run())
        for share in (1, 2):
            await courier.until(share * MANY // 3)
            assert not sending.done()
            await asyncio.to_thread(getattr(postfix, how))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(postfix.start)
    await postfix.settled()
    copies = Counter(message_id for _, message_id in {(copy.queue_id, copy.message_id) for copy in postfix.taken})
    lost = {message.message_id for message in messages} - set(copies)
    twice = {message_id for message_id, count in copies.items() if count > 1}
    assert lost == set()
    assert twice <= courier.uncertain
    assert len(courier.uncertain) <= 2 * courier.provider.connections
    assert len(courier.taken) == MANY


# --- bounces ------------------------------------------------------------------------------------------------------


async def test_the_attempt_is_the_return_path(postfix: Postfix, provider: Make) -> None:
    message = a_message(lease_no=7)
    assert outcomes(await deliver(provider(bounce_domain=BOUNCE_DOMAIN), [message])) == [[Outcome.TAKEN]]
    await postfix.settled()
    [copy] = postfix.taken
    assert copy.return_path == f"bounce+{message.attempt}@{BOUNCE_DOMAIN}"


async def test_a_bounce_comes_back_to_the_attempt(postfix: Postfix, provider: Make) -> None:
    store = Store()
    dead = f"smtp-550@{DEAD_DOMAIN}"
    async with smtp_server(store, port=postfix.bounce_port):
        message = a_message(to=["ada@example.net", dead], lease_no=3)
        results = await deliver(provider(bounce_domain=BOUNCE_DOMAIN), [message])
        assert outcomes(results) == [[Outcome.TAKEN, Outcome.TAKEN]]
        [bounce] = await store.wait(1)
    assert bounce.sender == ""
    [recipient] = bounce.recipients
    assert recipient == f"bounce+{message.attempt}@{BOUNCE_DOMAIN}"
    [event] = dsn.normalise(dsn.pack(dsn.Envelope(recipient, "127.0.0.1", bounce.at), bounce.content))
    assert (event.type, event.recipient, event.attempt) == (EventType.BOUNCE, dead, message.attempt)
    assert event.permanent
    assert event.response == "550 5.1.1 As this address asks for"
    mail = message_from_bytes(bounce.content)
    assert shape(mail) == shape(message_from_bytes(KEPT_BOUNCE.read_bytes()))


def shape(part: Mail) -> list[Any]:
    """Content types and names of headers: what a reader of bounces depends on."""
    inner = part.get_payload()
    return [
        part.get_content_type(),
        sorted({name.lower() for name in part} - {"received"}),
        [shape(each) for each in inner if isinstance(each, Mail)] if isinstance(inner, list) else [],
    ]
