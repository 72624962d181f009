"""Fail-over: who takes over when a provider fails, what that costs a message, and how the first one comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from neoforge_email import outbox
from neoforge_email.mailbox import Store, smtp_server
from neoforge_email.message import Message, Recipient
from neoforge_email.observability import PROVIDER_BREAKER_OPEN, PROVIDER_UP
from neoforge_email.providers import create, unsupported
from neoforge_email.providers.base import Outcome, Provider, Result, Scope
from neoforge_email.providers.memory import MemoryProvider, take
from neoforge_email.providers.sendgrid import SendGridProvider
from neoforge_email.providers.smtp import SmtpProvider
from neoforge_email.settings import Settings
from tests.delivering import System, a_draft, delivering
from tests.scripted_smtp import SILENCE, scripted_server
from tests.sendgrid_double import API_KEY, Fault, sendgrid_double
from tests.service.test_providers import nobody
from tests.support import Database

Run = Callable[..., AbstractAsyncContextManager[System]]

MANY = 10_000
GREETING = "GREETING"
NOT_NOW = Result(Outcome.DEFERRED, Scope.CONNECTION, "421 not now")
LATER = Result(Outcome.DEFERRED, Scope.MESSAGE, "451 try again later")
NO = Result(Outcome.REFUSED, Scope.RECIPIENT, "550 no such user")
LOST = Result(Outcome.UNCERTAIN, Scope.MESSAGE, "no answer")


@pytest.fixture
def system(database: Database, make_settings: Callable[..., Settings]) -> Run:
    """`async with system(first, second, EMAIL_RETRY_DELAY="0.1") as s`: running with these providers."""

    def run(*providers: Provider, **variables: str) -> AbstractAsyncContextManager[System]:
        return delivering(database, make_settings, providers, **variables)

    return run


def memory(name: str, answer: Callable[[Message, Recipient], Result] = take) -> MemoryProvider:
    provider = MemoryProvider(window=10, connections=4, timeout=timedelta(seconds=2), answer=answer)
    provider.name = name
    return provider


def smtp(port: int, *, seconds: float = 2, window: int = 50) -> SmtpProvider:
    timeout = timedelta(seconds=seconds)
    return SmtpProvider("127.0.0.1", port, use_tls=False, window=window, connections=8, timeout=timeout)


@pytest.fixture
async def large_sink() -> AsyncIterator[tuple[Store, int]]:
    """A store that forgets none of `MANY`, and the port of its server."""
    store = Store(keep=2 * MANY)
    async with smtp_server(store) as port:
        yield store, port


def taken(provider: MemoryProvider) -> int:
    """How many were taken, each of them once."""
    assert len({one.message.id for one in provider.taken}) == len(provider.taken)
    return len(provider.taken)


async def tries(s: System) -> set[int]:
    return {row[0] for row in await s.superuser.fetch("select tries from email_queue")}


# --- what costs nothing ------------------------------------------------------------------------------------------------


async def test_a_dead_first_provider_costs_none_of_ten_thousand_messages_and_none_arrives_twice(
    system: Run, large_sink: tuple[Store, int]
) -> None:
    store, port = large_sink
    async with AsyncExitStack() as stack:
        double = await stack.enter_async_context(sendgrid_double())
        double.faults.append(Fault("throttle", times=0, seconds=60))
        first, second = SendGridProvider(API_KEY, url=double.url), memory("second")
        second.unavailable = "out of order"
        s = await stack.enter_async_context(system(first, second, smtp(port)))
        accepted: set[str] = set()
        for start in range(0, MANY, 1000):
            answers = await asyncio.gather(
                *(s.intake.accept(a_draft(f"{n}@example.net")) for n in range(start, start + 1000))
            )
            accepted |= {f"<{answer.id.hex}@example.com>" for answer in answers}
        await s.until(s.is_empty, 120)  # 28 s, on a computer that has time
        assert await s.statuses() == {"sent": MANY}
        assert "uncertain" not in await s.events()
    arrived = Counter(mail.message_id for mail in store.mails)
    assert len(accepted) == MANY
    assert set(arrived) == accepted
    assert set(arrived.values()) == {1}
    assert double.counts == {}
    assert taken(second) == 0


async def refuses_connections(_: AsyncExitStack) -> Provider:
    return smtp(nobody())


async def leaves_at_once(stack: AsyncExitStack) -> Provider:
    return smtp((await stack.enter_async_context(scripted_server({GREETING: "421 4.3.2 not now"}))).port)


async def leaves_at_each_message(stack: AsyncExitStack) -> Provider:
    return smtp((await stack.enter_async_context(scripted_server({"MAIL.*": "421 4.3.2 not now"}))).port)


async def knows_no_such_key(stack: AsyncExitStack) -> Provider:
    double = await stack.enter_async_context(sendgrid_double())
    return SendGridProvider("SG.another.key", url=double.url)


async def throttles(stack: AsyncExitStack) -> Provider:
    double = await stack.enter_async_context(sendgrid_double())
    double.faults.append(Fault("throttle", times=0, seconds=60))
    return SendGridProvider(API_KEY, url=double.url)


@pytest.mark.parametrize(
    "dead", [refuses_connections, leaves_at_once, leaves_at_each_message, knows_no_such_key, throttles]
)
async def test_whatever_a_provider_definitely_did_not_take_goes_to_the_next_at_once_and_counts_as_no_refusal(
    dead: Callable[[AsyncExitStack], Awaitable[Provider]], system: Run
) -> None:
    async with AsyncExitStack() as stack:
        second = memory("second", lambda message, _: LATER if message.subject == "later" else take(message, _))
        variables = {"EMAIL_RETRY_DELAY": "60", "EMAIL_WORKER_ERROR_INTERVAL": "60"}
        s = await stack.enter_async_context(system(await dead(stack), second, **variables))
        await s.send(300)
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 300}
        assert taken(second) == 300
        await s.send(1, subject="later")
        await s.until(lambda: _is(s.queue, {"scheduled": 1}))
        assert await tries(s) == {1}  # the refusal of the second one alone


async def _is(look: Callable[[], Awaitable[Any]], expected: Any) -> bool:
    return bool(await look() == expected)


async def test_where_every_provider_declines_messages_wait_and_use_up_no_retry(system: Run) -> None:
    first, second = memory("first", lambda *_: NOT_NOW), memory("second")
    second.unavailable = "out of order"
    async with system(first, second, EMAIL_WORKER_MAX_RETRIES="0") as s:
        await s.send(100)
        await asyncio.sleep(1.5)
        assert await tries(s) == {0}
        assert sum((await s.queue()).values()) == 100
        first.answer = take
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 100}
        assert taken(first) == 100


# --- what is nobody else's ---------------------------------------------------------------------------------------------


async def test_a_refusal_is_an_answer_and_no_other_provider_is_asked(system: Run) -> None:
    first, second = memory("first", lambda message, _: NO if message.subject == "no" else LATER), memory("second")
    async with system(first, second, EMAIL_RETRY_DELAY="0.1", EMAIL_WORKER_MAX_RETRIES="2") as s:
        await s.send(20, subject="no")
        await s.send(20, subject="later")
        await s.until(s.is_empty)
        assert await s.statuses() == {"bounced": 20, "failed": 20}
        assert taken(second) == 0


@pytest.mark.parametrize("policy", ["resend", "hold"])
async def test_what_may_have_been_taken_goes_to_nobody_else_before_it_is_settled(policy: str, system: Run) -> None:
    """Even where the provider has been given up since. Afterwards the message's own policy decides."""
    async with scripted_server({r"\.": SILENCE}) as silent:
        second = memory("second")
        variables = {"EMAIL_UNCERTAIN_WAIT": "3", "EMAIL_RETRY_DELAY": "0.1", "PROVIDER_BREAKER_WAIT": "60"}
        async with system(smtp(silent.port, seconds=0.5, window=1), second, **variables) as s:
            await s.send(8, on_uncertain=policy)
            await s.until(lambda: _is(s.queue, {"uncertain": 8}))
            silent.script = {GREETING: "421 4.3.2 not now"}
            await s.send(100, subject="after")
            await s.until(lambda: _is(s.queue, {"uncertain": 8}))
            assert {one.message.subject for one in second.taken} == {"after"}
            if policy == "hold":
                await s.until(lambda: _is(s.queue, {"held": 8}))
                assert taken(second) == 100
            else:
                await s.until(s.is_empty)
                assert taken(second) == 108


# --- the breaker -------------------------------------------------------------------------------------------------------


class Counting(MemoryProvider):
    """Counts the connections that were asked for."""

    asked = 0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[MemoryProvider]:
        self.asked += 1
        async with super().connection() as connection:
            yield connection


async def test_a_provider_that_is_down_is_left_alone_and_its_messages_flow_when_it_is_back(system: Run) -> None:
    one = Counting(window=5, connections=1)
    one.unavailable = "out of order"
    async with system(one, PROVIDER_BREAKER_FAILURES="3", PROVIDER_BREAKER_WAIT="0.5") as s:
        await s.send(200)
        await asyncio.sleep(2)
        assert 3 <= one.asked <= 3 + 4
        assert PROVIDER_BREAKER_OPEN.labels("memory")._value.get() == 1
        assert PROVIDER_UP.labels("memory")._value.get() == 0
        one.unavailable = None
        await s.until(s.is_empty)
        assert taken(one) == 200
        assert PROVIDER_BREAKER_OPEN.labels("memory")._value.get() == 0
        assert PROVIDER_UP.labels("memory")._value.get() == 1


async def test_the_first_provider_is_asked_by_one_message_at_a_time_and_serves_again_once_it_answers(
    system: Run,
) -> None:
    sizes: list[int] = []

    class Measured(MemoryProvider):
        async def send(self, window: Any, may_start: Any) -> list[tuple[Result, ...]]:
            sizes.append(len(window))
            return await super().send(window, may_start)

    first, second = Measured(window=10, connections=4, answer=lambda *_: NOT_NOW), memory("second")
    async with system(first, second, PROVIDER_BREAKER_FAILURES="1", PROVIDER_BREAKER_WAIT="0.2") as s:
        await s.send(100)
        await s.until(s.is_empty)
        before = len(sizes)
        for _ in range(20):
            await s.send(10)
            await asyncio.sleep(0.05)
        await s.until(s.is_empty)
        assert 2 <= len(sizes) - before <= 8
        assert set(sizes[before:]) == {1}
        first.answer = take
        await asyncio.sleep(0.25)
        await s.send(10)
        await s.until(s.is_empty)
        await s.send(100)
        await s.until(s.is_empty)
        assert taken(first) >= 100 + 1
        assert taken(first) + taken(second) == 410


async def test_until_when_a_provider_says_it_is_not_asked_again(system: Run) -> None:
    async with sendgrid_double() as double:
        double.faults.append(Fault("throttle", times=1, seconds=2))
        provider = SendGridProvider(API_KEY, url=double.url)
        async with system(provider) as s:
            await s.send(50)
            await s.until(lambda: _is(lambda: asyncio.sleep(0, double.statuses[429]), 1))
            await asyncio.sleep(0.8)
            assert double.requests == 1
            await s.until(s.is_empty)
            assert await s.statuses() == {"sent": 50}
            assert double.statuses[429] == 1
            assert PROVIDER_BREAKER_OPEN.labels("sendgrid")._value.get() == 0


# --- two hours ---------------------------------------------------------------------------------------------------------


async def clock(s: System, minutes: int) -> None:
    """Move the clock of every connection that is opened from now on."""
    name = await s.superuser.fetchval("select current_database()")
    await s.superuser.execute(f"alter database {name} set app.clock_offset = '{minutes} minutes'")


@pytest.mark.parametrize("dead", [refuses_connections, leaves_at_each_message, throttles])
async def test_two_hours_without_a_provider_fail_no_message(
    dead: Callable[[AsyncExitStack], Awaitable[Provider]], system: Run
) -> None:
    """A worker every twenty minutes of the simulated clock, each with a breaker that knows nothing yet."""
    variables = {"PROVIDER_BREAKER_WAIT": "0.1", "EMAIL_WORKER_MAX_RETRIES": "3"}
    async with AsyncExitStack() as stack:
        provider = await dead(stack)
        for minutes in range(0, 121, 20):
            async with system(provider, **variables) as s:
                await s.send(20)
                await asyncio.sleep(0.4)
                await outbox.expire(s.pool)
                assert set(await s.statuses()) <= {"queued", "deferred"}
                assert await tries(s) == {0}
                await clock(s, minutes + 20)
    healthy = memory("healthy")
    async with system(healthy, **variables) as s:
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 7 * 20}
        assert taken(healthy) == 7 * 20


# --- what no provider can do ------------------------------------------------------------------------------------------


def test_a_message_must_fit_every_provider_that_may_carry_it(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(
        "api", EMAIL_PROVIDER="smtp", EMAIL_PROVIDER_FALLBACKS="sendgrid", SENDGRID_API_KEY="SG.a.b"
    )
    draft = a_draft("ada@example.net", headers={"X-SG-EID": "1"})
    assert [error["field"] for error in unsupported(settings)(draft)] == ["headers.X-SG-EID"]
    assert unsupported(make_settings("api", EMAIL_PROVIDER="smtp"))(draft) == []


async def test_the_settings_make_all_providers_in_their_order(make_settings: Callable[..., Settings]) -> None:
    router = create(
        make_settings(
            "worker",
            EMAIL_PROVIDER="ses",
            AWS_REGION="eu-central-1",
            EMAIL_PROVIDER_FALLBACKS="sendgrid, smtp",
            SENDGRID_API_KEY="SG.a.b",
            SES_RATE="14",
            SMTP_RATE="100",
        )
    )
    assert [provider.name for provider in router.providers] == ["ses", "sendgrid", "smtp"]
    assert [route.limit.rate if route.limit else None for route in router.routes] == [14, None, 100]
    await router.close()
