"""Real worker processes: what a message that kills them costs the others, and a rate that two of them share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

import pytest

from neoforge_email import db
from neoforge_email.outbox import Intake
from neoforge_email.settings import Settings
from tests.delivering import a_draft
from tests.support import Database, Sink


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
        "EMAIL_RETRY_DELAY": "0.1",
    }


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[db.Connection]:
    connection = await db.connect(Database.url(database.superuser), "test")
    await connection.execute("insert into users (name) values ('shop')")
    yield connection
    await connection.close()


async def accept(settings: Settings, subjects: Sequence[str]) -> list[UUID]:
    async with await db.create_pool(settings, settings.database_url, "test-api") as pool:
        intake = Intake(pool, expire_after=timedelta(hours=1), on_commit=lambda: None)
        await intake.start()
        drafts = [a_draft(f"{n}@example.net", subject=subject) for n, subject in enumerate(subjects)]
        accepted = [answer.id for answer in await asyncio.gather(*(intake.accept(draft) for draft in drafts))]
        await intake.close()
    return accepted


def start(environment: dict[str, str], number: int, module: str = "arq") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "neoforge_email.worker.WorkerSettings"]
    return subprocess.Popen(command, env={**environment, "WORKER_INSTANCE": str(number)}, stderr=subprocess.DEVNULL)


@asynccontextmanager
async def kept_alive(environment: dict[str, str]) -> AsyncIterator[list[int]]:
    """A poisoned worker that is started again as often as it dies; gives its exit codes so far."""
    codes: list[int] = []
    worker = start(environment, 1, "tests.poisoned_worker")

    async def watch() -> None:
        nonlocal worker
        while True:
            if (code := worker.poll()) is not None:
                codes.append(code)
                worker = start(environment, 1, "tests.poisoned_worker")
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield codes
    finally:
        watching.cancel()
        worker.kill()
        worker.wait()


async def test_a_message_that_kills_its_worker_is_held_after_its_retries_and_costs_no_other_message_anything(
    worker_environment: dict[str, str], settings: Settings, superuser: db.Connection, sink: Sink
) -> None:
    subjects = ["innocent"] * 200
    subjects[70] = "poison"
    accepted = await accept(settings, subjects)
    poison = accepted[70]
    async with kept_alive({**worker_environment, "EMAIL_WORKER_MAX_RETRIES": "2"}) as codes, asyncio.timeout(100):
        while await superuser.fetchval("select count(*) from email_queue where state <> 'held'"):
            await asyncio.sleep(0.1)
    held = await superuser.fetch("select id, held_reason from email_queue")
    counted = await superuser.fetch("select status::text, count(*) from email_tracking group by 1")
    rows = await superuser.fetch("select email_id, count(*) from email_events where type = 'uncertain' group by 1")
    doubts = {row[0]: row[1] for row in rows}
    assert [row["id"] for row in held] == [poison]
    assert codes == [-9] * 3  # the first time and each retry
    assert {row[0]: row[1] for row in counted} == {"sent": 199, "uncertain": 1}
    arrived = [mail.message_id for mail in sink.store.mails]
    innocent = {f"<{one.hex}@example.com>": one for one in accepted if one != poison}
    assert set(arrived) == set(innocent)
    # What arrived twice was under way in another call when the worker died, and its timeline says so; but once each.
    assert {innocent[one] for one in innocent if arrived.count(one) > 1} <= set(doubts)
    assert doubts.pop(poison) == 3
    assert set(doubts.values()) == {1}


async def test_two_workers_share_a_rate(
    worker_environment: dict[str, str], settings: Settings, superuser: db.Connection, sink: Sink
) -> None:
    rate, count = 60, 300
    environment = {**worker_environment, "SMTP_RATE": str(rate)}
    workers = [start(environment, number) for number in (1, 2)]
    try:
        names = (
            "select count(distinct application_name) from pg_stat_activity where application_name like 'neoforge-w%'"
        )
        async with asyncio.timeout(60):
            while await superuser.fetchval(names) < len(workers):
                await asyncio.sleep(0.1)
            began = time.monotonic()
            await accept(settings, ["rated"] * count)
            await sink.store.wait(count, 60)
        seconds = time.monotonic() - began
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    times = [mail.at.timestamp() for mail in sink.store.mails]
    for first, at in enumerate(times):  # over any span: the rate, one bucket, and what a busy computer notes late
        for last in range(first, len(times), 10):
            assert last - first <= rate * (times[last] - at) + rate * 1.5
    assert seconds >= (count - rate) / rate - 0.5
