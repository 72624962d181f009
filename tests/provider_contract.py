"""What every provider has to do, whatever carries the mail. A provider's tests inherit from one of the classes.

class TestSes(WireContract):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]: ...
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message
from neoforge_email.providers.base import NOT_STARTED, Outcome, Provider, Result, Scope
from tests.support import a_message

FEW = 25


@dataclass(frozen=True, slots=True)
class Arrival:
    """One time that a message was taken: the attempt that came with it, and to whom it goes."""

    attempt: str
    recipients: frozenset[str]


@dataclass(frozen=True, slots=True)
class Target:
    """A provider, and what has arrived where it sends to.

    `arrived` waits for at least so many arrivals and gives them all. `bad` is an address that is refused there.
    `unreachable` makes a provider of the same kind that nobody listens to.
    """

    provider: Provider
    arrived: Callable[[int], Awaitable[list[Arrival]]]
    bad: str
    unreachable: Callable[[], Provider]
    wire: Wire | None = None


Trouble = Literal[
    "silent", "silent after taking", "dropped after taking", "dropped in the body", "garbage", "throttled"
]


@dataclass(frozen=True, slots=True)
class Wire:
    """How things go wrong between a provider and a server, for `WireContract`.

    `troubled` gives a provider, with a time-out of a second, whose server does so once and is friendly afterwards;
    `heard` says whether it has begun to.
    `port` is that of the server that `Target.provider` sends to. `secrets` may stand in no answer.
    `says_when`: who throttles says until when.
    """

    troubled: Callable[[Trouble], Awaitable[Provider]]
    heard: Callable[[], bool]
    port: int
    secrets: Sequence[str] = ()
    says_when: bool = True


def always() -> bool:
    return True


def yes(times: int) -> Callable[[], bool]:
    """Says yes so many times, then no."""
    answers = iter([True] * times)
    return lambda: next(answers, False)


async def deliver(
    provider: Provider, messages: Sequence[Message], may_start: Callable[[], bool] = always
) -> list[tuple[Result, ...]]:
    """The messages' results, in order, over one connection after another."""
    results = []
    for call in provider.calls(messages):
        async with provider.connection() as connection:
            results += await connection.send(call, may_start)
    return results


def outcomes(results: Sequence[tuple[Result, ...]]) -> list[list[Outcome]]:
    return [[result.outcome for result in message] for message in results]


def sent_to(message: Message, *, but: str = "") -> Arrival:
    open_ones = {recipient.mailbox.address for recipient in message.open_recipients}
    return Arrival(message.attempt, frozenset(open_ones - {but}))


def each(arrivals: Iterable[Arrival]) -> Counter[tuple[str, str]]:
    """How often each recipient of each message was sent to."""
    return Counter((arrival.attempt, address) for arrival in arrivals for address in arrival.recipients)


class ProviderContract:
    """The tests; every provider passes each of them."""

    def test_calls_keep_the_order_and_hold_no_more_than_a_window(self, target: Target) -> None:
        messages = [a_message(subject=str(number)) for number in range(FEW)]
        calls = target.provider.calls(messages)
        assert [message.id for call in calls for message in call] == [message.id for message in messages]
        assert 0 < max(map(len, calls)) <= target.provider.window
        assert target.provider.calls([]) == []

    async def test_messages_are_taken_once_each_and_carry_their_attempt(self, target: Target) -> None:
        messages = [a_message(lease_no=number + 1) for number in range(FEW)]
        results = await deliver(target.provider, messages)
        assert outcomes(results) == [[Outcome.TAKEN]] * FEW
        arrived = await target.arrived(FEW)
        assert Counter(arrived) == Counter(sent_to(message) for message in messages)

    async def test_everyone_open_is_addressed_and_nobody_else(self, target: Target) -> None:
        message = a_message(
            to=["ada@example.net", "bob@example.net"],
            cc=["cyd@example.net"],
            bcc=["eve@example.net"],
            closed=["bob@example.net"],
        )
        assert outcomes(await deliver(target.provider, [message])) == [[Outcome.TAKEN] * 3]
        everyone = ["ada@example.net", "cyd@example.net", "eve@example.net"]
        assert each(await target.arrived(1)) == Counter((message.attempt, address) for address in everyone)

    async def test_a_bad_recipient_fails_nobody_else(self, target: Target) -> None:
        window = [
            a_message(),
            a_message(to=["ada@example.net", "bob@example.net"], bcc=[target.bad, "eve@example.net"]),
            a_message(),
        ]
        taken, refused = Outcome.TAKEN, Outcome.REFUSED
        results = await deliver(target.provider, window)
        assert outcomes(results) == [[taken], [taken, taken, refused, taken], [taken]]
        arrived = await target.arrived(3)
        assert each(arrived) == each(sent_to(message, but=target.bad) for message in window)

    async def test_a_message_that_cannot_be_written_is_refused_and_the_others_go(self, target: Target) -> None:
        window = [a_message(), a_message(subject="a\r\nBcc: eve@example.com"), a_message()]
        results = await deliver(target.provider, window)
        assert outcomes(results) == [[Outcome.TAKEN], [Outcome.REFUSED], [Outcome.TAKEN]]
        assert results[1][0].scope is Scope.MESSAGE
        assert Counter(await target.arrived(2)) == Counter([sent_to(window[0]), sent_to(window[2])])

    async def test_nothing_is_sent_once_nothing_may_start(self, target: Target) -> None:
        window = [a_message(), a_message(to=["ada@example.net", "bob@example.net"])]
        assert await deliver(target.provider, window, yes(0)) == [(NOT_STARTED,), (NOT_STARTED, NOT_STARTED)]
        last = a_message()
        assert outcomes(await deliver(target.provider, [last])) == [[Outcome.TAKEN]]
        assert await target.arrived(1) == [sent_to(last)]

    async def test_whenever_the_time_runs_out_exactly_what_is_taken_was_sent(self, target: Target) -> None:
        sent: list[Arrival] = []
        for times in range(1, 8):
            window = [a_message() for _ in range(3)]
            results = await deliver(target.provider, window, yes(times))
            answers = [result for (result,) in results]
            assert all(answer.outcome is Outcome.TAKEN or answer == NOT_STARTED for answer in answers)
            sent += [
                sent_to(message)
                for message, answer in zip(window, answers, strict=True)
                if answer.outcome is Outcome.TAKEN
            ]
        assert Counter(await target.arrived(len(sent))) == Counter(sent)

    async def test_many_at_once_are_taken_once_each(self, target: Target) -> None:
        messages = [a_message() for _ in range(4 * FEW)]
        results = await asyncio.gather(*(deliver(target.provider, [message]) for message in messages))
        assert [outcomes(result) for result in results] == [[[Outcome.TAKEN]]] * len(messages)
        arrived = await target.arrived(len(messages))
        assert Counter(arrived) == Counter(sent_to(message) for message in messages)

    async def test_words_are_one_line_and_an_id_is_given_or_none(self, target: Target) -> None:
        results = await deliver(target.provider, [a_message(), a_message(to=[target.bad])])
        for (result,) in results:
            assert 0 < len(result.response) <= 500
            assert result.response.isprintable()
        assert outcomes(results) == [[Outcome.TAKEN], [Outcome.REFUSED]]
        assert results[1][0].provider_message_id is None

    async def test_where_nobody_listens_nothing_is_uncertain_and_no_message_is_to_blame(self, target: Target) -> None:
        provider = target.unreachable()
        try:
            results = await deliver(provider, [a_message() for _ in range(3)])
        except ProviderUnavailable:
            return
        finally:
            await provider.close()
        answers = {(result.outcome, result.scope) for (result,) in results}
        assert answers == {(Outcome.DEFERRED, Scope.CONNECTION)}

    async def test_no_more_connections_are_used_than_allowed(self, target: Target) -> None:
        async with AsyncExitStack() as taken:
            for _ in range(target.provider.connections):
                await taken.enter_async_context(target.provider.connection())
            waiting = asyncio.ensure_future(deliver(target.provider, [a_message()]))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert await target.arrived(0) == []
        assert outcomes(await waiting) == [[Outcome.TAKEN]]

    async def test_a_connection_in_use_outlasts_closing(self, target: Target) -> None:
        message = a_message()
        async with target.provider.connection() as connection:
            await target.provider.close()
            results = await connection.send([message], always)
        assert outcomes(results) == [[Outcome.TAKEN]]
        assert await target.arrived(1) == [sent_to(message)]


UNANSWERED: tuple[Trouble, ...] = (
    *("silent", "silent after taking", "dropped after taking", "dropped in the body"),
    "garbage",
)


class WireContract(ProviderContract):
    """Further tests for providers that talk to a server."""

    @pytest.mark.parametrize("trouble", UNANSWERED)
    async def test_without_an_answer_it_is_uncertain(self, trouble: Trouble, target: Target) -> None:
        provider = await _wire(target).troubled(trouble)
        results = await deliver(provider, [a_message(to=["ada@example.net"], cc=["bob@example.net"])])
        assert _meanings(results) == [[(Outcome.UNCERTAIN, Scope.MESSAGE)] * 2]
        _check_words(results, target)
        assert outcomes(await deliver(provider, [a_message()])) == [[Outcome.TAKEN]]

    async def test_throttled_means_definitely_not_taken_and_no_message_is_to_blame(self, target: Target) -> None:
        provider = await _wire(target).troubled("throttled")
        results = await deliver(provider, [a_message(), a_message()])
        assert _meanings(results) == [[(Outcome.DEFERRED, Scope.CONNECTION)]] * 2
        assert (results[0][0].retry_after is not None) is _wire(target).says_when
        _check_words(results, target)

    async def test_cancelling_a_call_closes_its_connection_and_the_next_one_works(self, target: Target) -> None:
        provider = await _wire(target).troubled("silent")
        call = asyncio.ensure_future(deliver(provider, [a_message()]))
        while not _wire(target).heard():
            await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert outcomes(await deliver(provider, [a_message()])) == [[Outcome.TAKEN]]

    async def test_connections_do_not_pile_up_and_closing_leaves_none_open(self, target: Target) -> None:
        for _ in range(5):
            await deliver(target.provider, [a_message()])
        assert _established(_wire(target).port) <= 1
        await target.provider.close()
        await asyncio.sleep(0.05)
        assert _established(_wire(target).port) == 0


def _wire(target: Target) -> Wire:
    assert target.wire is not None
    return target.wire


def _meanings(results: Sequence[tuple[Result, ...]]) -> list[list[tuple[Outcome, Scope]]]:
    return [[(result.outcome, result.scope) for result in message] for message in results]


def _check_words(results: Sequence[tuple[Result, ...]], target: Target) -> None:
    for message in results:
        for result in message:
            assert 0 < len(result.response) <= 500
            assert result.response.isprintable()
            assert not any(secret in result.response for secret in _wire(target).secrets)


def _established(port: int) -> int:
    """How many TCP connections lead to a port of this machine (proc(5), /proc/net/tcp; state 01)."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "01" for line in lines)
