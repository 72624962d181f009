"""The delivery loop against real servers: what it does with answers, outages, stops and kills."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from neoforge_email import db
from neoforge_email.delivery import Delivery
from neoforge_email.message import Message, Recipient
from neoforge_email.outbox import Intake
from neoforge_email.providers.base import Outcome, Result, Scope
from neoforge_email.providers.memory import MemoryProvider, take
from neoforge_email.providers.router import Router
from neoforge_email.settings import Settings
from tests.delivering import System, a_draft, delivering
from tests.support import Database, Sink


@pytest.fixture
def system(database: Database, make_settings: Callable[..., Settings]) -> Callable[..., Any]:
    """`async with system(answer=…, EMAIL_RETRY_DELAY="0.1") as s`: a running system that is stopped at the end."""

    @asynccontextmanager
    async def run(
        answer: Callable[[Message, Recipient], Result] = take,
        delay: timedelta = timedelta(0),
        provider: MemoryProvider | None = None,
        **variables: str,
    ) -> AsyncIterator[System]:
        provider = provider or MemoryProvider(
            window=5, connections=4, timeout=timedelta(seconds=2), delay=delay, answer=answer
        )
        async with delivering(database, make_settings, [provider], **variables) as s:
            yield s

    return run


@pytest.fixture
def worker_environment(database: Database, environment: dict[str, str], sink: Sink) -> dict[str, str]:
    """The environment of a worker process that delivers to the sink."""
    return {
        **os.environ,
        **environment,
        "DATABASE_URL": database.worker,
        "EMAIL_PROVIDER": "smtp",
        "SMTP_SERVER": "127.0.0.1",
        "SMTP_PORT": str(sink.port),
        "SMTP_USE_TLS": "false",
    }


async def test_every_message_is_delivered_once_and_the_queue_is_empty(system: Any) -> None:
    async with system() as s:
        await s.send(500)
        await s.delivery.drained()
        assert await s.statuses() == {"sent": 500}
        assert await s.queue() == {}
        assert len({taken.message.id for taken in s.provider.taken}) == len(s.provider.taken) == 500


async def test_the_attempts_that_are_committed_together_are_those_of_one_call(system: Any) -> None:
    """A worker that is killed leaves uncertain what its calls hold, and nothing else."""

    class ByContent(MemoryProvider):
        def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
            texts = dict.fromkeys(message.text for message in messages)
            return [[message for message in messages if message.text == text] for text in texts]

        async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
            sent.append({message.text for message in window})
            return await super().send(window, may_start)

    sent: list[set[str | None]] = []
    provider = ByContent(window=100, connections=2, timeout=timedelta(seconds=2))
    async with system(provider=provider) as s:
        await asyncio.gather(s.send(20, text="one"), s.send(20, text="two"), s.send(20, text="three"))
        await s.delivery.drained()
        assert await s.statuses() == {"sent": 60}
        assert {len(texts) for texts in sent} == {1}


async def test_a_doorbell_makes_delivery_immediate(system: Any) -> None:
    async with system(EMAIL_WORKER_INTERVAL="30") as s:
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await s.send()
        await s.until(lambda: asyncio.sleep(0, bool(s.provider.taken)))
        assert time.monotonic() - began < 5


async def test_a_deferred_message_is_tried_again_until_it_is_taken(system: Any) -> None:
    tries: dict[Any, int] = {}

    def answer(message: Message, _: Recipient) -> Result:
        tries[message.id] = tries.get(message.id, 0) + 1
        if tries[message.id] < 3:
            return Result(Outcome.DEFERRED, Scope.RECIPIENT, "451 4.7.1 greylisted")
        return Result(Outcome.TAKEN, Scope.MESSAGE, "250 ok")

    async with system(answer, EMAIL_RETRY_DELAY="0.1") as s:
        await s.send(10)
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 10}
        assert set(tries.values()) == {3}
        kinds = await s.superuser.fetch("select type::text as type, count(*) from email_events group by 1")
        assert {row["type"]: row["count"] for row in kinds} == {"deferred": 20, "sent": 10}


async def test_a_message_that_is_refused_too_often_fails(system: Any) -> None:
    def answer(_: Message, __: Recipient) -> Result:
        return Result(Outcome.DEFERRED, Scope.MESSAGE, "451 no")

    async with system(answer, EMAIL_RETRY_DELAY="0.1", EMAIL_WORKER_MAX_RETRIES="2") as s:
        await s.send()
        await s.until(s.is_empty)
        assert await s.statuses() == {"failed": 1}


async def test_an_unreachable_provider_uses_up_no_retry_and_leaves_no_event(system: Any) -> None:
    async with system(EMAIL_WORKER_MAX_RETRIES="0") as s:
        s.provider.unavailable = "out of order"
        await s.send(50)
        await asyncio.sleep(1)
        assert await s.superuser.fetchval("select count(*) from email_events") == 0
        s.provider.unavailable = None
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 50}


async def test_an_attempt_without_an_answer_is_sent_again_under_the_same_message_id(system: Any) -> None:
    seen: list[tuple[str, str]] = []

    def answer(message: Message, _: Recipient) -> Result:
        seen.append((message.message_id, message.attempt))
        if len(seen) == 1:
            return Result(Outcome.UNCERTAIN, Scope.MESSAGE, "no answer")
        return Result(Outcome.TAKEN, Scope.MESSAGE, "250 ok")

    async with system(answer, EMAIL_RETRY_DELAY="0.1") as s:
        await s.send()
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 1}
        assert seen[0][0] == seen[1][0]
        assert seen[0][1] != seen[1][1]
        kinds = [row[0] for row in await s.superuser.fetch("select type::text from email_events order by arrived_at")]
        assert kinds == ["uncertain", "sent"]


async def test_a_fault_inside_the_providers_call_is_contained(system: Any) -> None:
    broken = {"0@example.net"}

    def answer(_: Message, recipient: Recipient) -> Result:
        if recipient.mailbox.address in broken:
            broken.clear()
            raise RuntimeError("a fault of our own")
        return Result(Outcome.TAKEN, Scope.MESSAGE, "250 ok")

    async with system(answer, EMAIL_RETRY_DELAY="0.1") as s:
        await s.send(20)
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 20}


async def test_a_suppressed_recipient_is_not_sent_to_and_the_message_is_done(system: Any) -> None:
    async with system() as s:
        await s.superuser.execute(
            "insert into suppressions (user_id, address, reason) values (1, '0@example.net', 'bounce')"
        )
        await s.send(2)
        await s.until(s.is_empty)
        assert await s.statuses() == {"sent": 1, "suppressed": 1}


async def test_a_stop_finishes_what_is_being_sent_and_gives_back_the_rest(system: Any) -> None:
    async with system(delay=timedelta(milliseconds=50)) as s:
        await s.send(400)
        await s.until(lambda: asyncio.sleep(0, len(s.provider.taken) > 20))
        s.delivery.stop()
        await s.until(lambda: is_given_back(s))
        left = await s.superuser.fetch("select state::text as state, attempt_at from email_queue")
        assert {(row["state"], row["attempt_at"]) for row in left} == {("queued", None)}
        assert await s.statuses() == {"sent": len(s.provider.taken), "queued": len(left)}
        assert len(s.provider.taken) + len(left) == 400


async def test_deadlocks_and_a_full_disk_cost_no_message_and_send_none_twice(system: Any) -> None:
    async with system() as s:
        await s.superuser.execute("""
            create function fail_now_and_then() returns trigger language plpgsql as $$ begin
                if random() < 0.15 then
                    raise exception 'injected'
                        using errcode = (array['40P01', '53100', '57014', '25006'])[1 + floor(random() * 4)];
                end if;
                return coalesce(new, old);
            end $$;
            create trigger fail before update or delete on email_queue
                for each statement execute function fail_now_and_then();
        """)
        await s.send(300)
        await s.until(s.is_empty, 30)
        assert await s.statuses() == {"sent": 300}
        assert len({taken.message.id for taken in s.provider.taken}) == len(s.provider.taken) == 300


async def test_a_worker_that_was_frozen_beyond_its_lease_starts_nothing_on_the_lease_that_it_lost(
    database: Database, make_settings: Callable[..., Settings]
) -> None:
    """It may hold the same message again by a newer lease: that one is for another window."""
    taken: list[str] = []

    def answer(message: Message, _: Recipient) -> Result:
        taken.append(message.attempt)
        return Result(Outcome.TAKEN, Scope.MESSAGE, "250 ok")

    settings, worker = make_settings("api"), make_settings("worker")
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop')")
    provider = MemoryProvider(window=2, connections=3, timeout=timedelta(seconds=0.1), answer=answer)
    provider.delay = timedelta(seconds=1.6)
    async with (
        await db.create_pool(settings, settings.database_url, "test-api") as pool,
        await db.create_pool(worker, worker.database_url, "test-worker") as worker_pool,
    ):
        delivery = Delivery(worker_pool, Router.of([provider], worker), worker, lease=timedelta(seconds=0.6))
        intake = Intake(pool, expire_after=timedelta(hours=1), on_commit=lambda: None)
        await intake.start()
        first, second = await asyncio.gather(*(intake.accept(a_draft(f"{n}@example.net")) for n in range(2)))
        await intake.close()
        running = asyncio.create_task(delivery.run())
        while not await superuser.fetchval("select count(attempt_at) from email_queue"):
            await asyncio.sleep(0.01)
        time.sleep(0.8)  # noqa: ASYNC251 - as SIGSTOP would: nothing of this process runs, its lease does
        await delivery.drained()
        delivery.stop()
        await running
    sent = await superuser.fetch("select email_id, attempt from email_events where type = 'sent'")
    told = await superuser.fetchval("select count(*) from email_events where type = 'duplicate'")
    await superuser.close()
    assert {row["email_id"] for row in sent} == {first.id, second.id}
    # The one whose call was under way may have been taken twice, and says so; the one behind it may not.
    assert len(taken) - 2 == told <= 1
    assert len(sent) == len(taken)


async def test_the_database_cut_off_again_and_again_neither_loses_nor_stops_anything(system: Any) -> None:
    async with system() as s:
        await s.send(300)
        for _ in range(15):
            await s.superuser.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'test-%'"
            )
            await asyncio.sleep(0.05)
        await s.until(s.is_empty, 20)
        assert await s.statuses() == {"sent": 300}


CONNECTED = (
    "select count(distinct application_name) from pg_stat_activity where application_name like 'neoforge-worker %'"
)


@pytest.mark.parametrize("instances", [1, 2])
async def test_a_worker_process_killed_in_the_middle_loses_nothing(
    instances: int,
    database: Database,
    worker_environment: dict[str, str],
    settings: Settings,
    sink: Sink,
) -> None:
    """Real processes, a real SMTP server: after SIGKILL and a restart every message has arrived."""
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop')")
    async with await db.create_pool(settings, settings.database_url, "test-api") as pool:
        intake = Intake(pool, expire_after=timedelta(hours=1), on_commit=lambda: None)
        await intake.start()
        accepted = await asyncio.gather(*(intake.accept(a_draft(f"{n}@example.net")) for n in range(2000)))
        await intake.close()

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "arq", "neoforge_email.worker.WorkerSettings"]
        return subprocess.Popen(
            command, env={**worker_environment, "WORKER_INSTANCE": str(number)}, stderr=subprocess.DEVNULL
        )

    workers = [start(number + 1) for number in range(instances)]
    try:
        async with asyncio.timeout(60):
            for arrived in (200, 700, 1200):
                while sink.store.arrived < arrived:
                    await asyncio.sleep(0.005)
                workers[0].send_signal(signal.SIGKILL)
                await asyncio.to_thread(workers[0].wait)
                workers[0] = start(1)
            while await superuser.fetchval("select count(*) from email_queue"):
                await asyncio.sleep(0.1)
            while await superuser.fetchval(CONNECTED) < instances:  # one that only begins knows no SIGTERM yet
                await asyncio.sleep(0.1)
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        codes = [await asyncio.to_thread(worker.wait, 30) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    uncertain = await superuser.fetchval("select count(distinct email_id) from email_events where type = 'uncertain'")
    statuses = await superuser.fetch("select distinct status::text from email_tracking")
    await superuser.close()
    arrived_ids = {mail.message_id for mail in sink.store.mails}
    assert codes == [0] * instances
    assert {f"<{answer.id.hex}@example.com>" for answer in accepted} == arrived_ids
    assert [row[0] for row in statuses] == ["sent"]
    # What arrived twice is no more than what the timeline admits.
    assert sink.store.arrived - len(arrived_ids) <= uncertain


async def test_burst_delivers_what_is_due_and_ends(
    database: Database, worker_environment: dict[str, str], settings: Settings, sink: Sink
) -> None:
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop')")
    async with await db.create_pool(settings, settings.database_url, "test-api") as pool:
        intake = Intake(pool, expire_after=timedelta(hours=1), on_commit=lambda: None)
        await intake.start()
        await asyncio.gather(*(intake.accept(a_draft(f"{n}@example.net")) for n in range(100)))
        await intake.close()
    command = [sys.executable, "-m", "arq", "neoforge_email.worker.WorkerSettings", "--burst"]
    done = await asyncio.to_thread(subprocess.run, command, env=worker_environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sink.store.arrived == 100
    assert await superuser.fetchval("select count(*) from email_queue") == 0
    await superuser.close()


async def test_a_bad_setting_ends_the_worker_with_a_line_for_each(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "arq", "neoforge_email.worker.WorkerSettings"]
    variables = {**os.environ, **environment, "EMAIL_WORKER_INTERVAL": "often", "REDIS_URL": ""}
    done = await asyncio.to_thread(subprocess.run, command, env=variables, capture_output=True, timeout=30)
    assert done.returncode == 2
    assert {line.split(b":")[0] for line in done.stderr.splitlines()} == {b"EMAIL_WORKER_INTERVAL", b"REDIS_URL"}


async def is_given_back(s: System) -> bool:
    return "leased" not in await s.queue()
