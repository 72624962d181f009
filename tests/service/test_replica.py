"""Look-ups on a real replica, and what is said while there is none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import httpx
import pytest

from neoforge_email import backlog, db, embedded
from neoforge_email.settings import Settings
from tests.conftest import in_a_loop_of_its_own
from tests.service.test_api import MESSAGE, a_key, running
from tests.support import Database, Server

NAME = "replicated"
EXPECTED, STREAMS = "neoforge.replicas", "synchronous_standby_names"


@pytest.fixture(scope="module")
def primary() -> Iterator[embedded.PostgreSQL]:
    with (
        tempfile.TemporaryDirectory(prefix="neoforge-primary-", dir="/tmp") as directory,
        embedded.PostgreSQL(Path(directory), fsync=False) as server,
    ):
        in_a_loop_of_its_own(lambda: prepare(server))
        yield server


@pytest.fixture(scope="module")
def replica(primary: embedded.PostgreSQL) -> Iterator[embedded.PostgreSQL]:
    with tempfile.TemporaryDirectory(prefix="neoforge-replica-", dir="/tmp") as name:
        directory = Path(name)
        account = embedded.prepare(directory)
        data = embedded.private_directory(directory / "postgresql", account)
        log = directory / "basebackup.log"
        program = Path(f"/proc/{primary.process.pid}/exe").readlink().with_name("pg_basebackup")
        host = parse_qs(urlsplit(primary.dsn()).query)["host"][0]
        copy = embedded.spawn(
            [
                str(program),
                *("--pgdata", str(data)),
                *("--dbname", f"host={host} user=postgres application_name=replica"),
                *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
            ],
            log=log,
            environment={"PATH": "/usr/bin:/bin"},
            account=account,
        )
        assert copy.wait(30) == 0, log.read_text()
        with embedded.PostgreSQL(directory, fsync=False) as server:
            yield server


async def prepare(server: embedded.PostgreSQL) -> None:
    await db.create_roles(Database.url(server.dsn()))
    connection = await db.connect(Database.url(server.dsn()), "tests")
    await connection.execute(f"create database {NAME} owner neoforge_owner")
    await connection.close()
    await db.migrate(Database.url(server.dsn("neoforge_migrator", NAME)))


@pytest.fixture
def both(environment: dict[str, str], primary: embedded.PostgreSQL, replica: embedded.PostgreSQL) -> Settings:
    urls = {
        "DATABASE_URL": primary.dsn("neoforge_api", NAME),
        "DATABASE_READ_URL": replica.dsn("neoforge_api", NAME),
    }
    return Settings.from_environment({**environment, **urls})


@asynccontextmanager
async def client_of(settings: Settings, primary: embedded.PostgreSQL) -> AsyncIterator[httpx.AsyncClient]:
    key = await a_key(Database(Server(primary.dsn()), NAME))
    async with running(settings) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


async def execute(server: embedded.PostgreSQL, *statements: str) -> None:
    connection = await db.connect(Database.url(server.dsn(database=NAME)), "tests")
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def reads(server: str) -> float:
    from neoforge_email.observability import DATABASE_READS

    return float(DATABASE_READS.labels(server)._value.get())


async def found(client: httpx.AsyncClient, email_id: str) -> str:
    """Which server a look-up is answered by."""
    before = {server: reads(server) for server in ("replica", "primary")}
    answer = await client.get(f"/api/v1/emails/{email_id}")
    assert answer.status_code == 200, answer.text
    assert UUID(answer.json()["id"]) == UUID(email_id)
    (server,) = (server for server, count in before.items() if reads(server) > count)
    return server


async def becomes(condition: Callable[[], object], seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not await condition():  # type: ignore[misc]
        assert time.monotonic() < give_up
        await asyncio.sleep(0.2)


async def test_a_look_up_goes_to_the_replica_and_to_the_primary_where_that_is_behind_or_away(
    both: Settings, primary: embedded.PostgreSQL, replica: embedded.PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neoforge_email.replica.AWAY_SECONDS", 2.0)
    async with client_of(both, primary) as client:
        sent = (await client.post("/api/v1/emails", json=MESSAGE)).json()["id"]

        async def by(server: str) -> bool:
            return await found(client, sent) == server

        await becomes(lambda: by("replica"))

        await execute(replica, "select pg_wal_replay_pause()")
        newer = (await client.post("/api/v1/emails", json=MESSAGE)).json()["id"]
        assert await found(client, newer) == "primary"
        await becomes(lambda: by("primary"))  # more than five seconds behind, so its answers are old
        await execute(replica, "select pg_wal_replay_resume()")
        await becomes(lambda: by("replica"))

        send(replica, signal.SIGSTOP)  # it does not refuse, it says nothing
        began = time.monotonic()
        assert await found(client, sent) == "primary"
        assert time.monotonic() - began < 6
        assert await found(client, sent) == "primary"
        send(replica, signal.SIGCONT)
        await becomes(lambda: by("replica"))

        assert (await client.get("/api/v1/emails/01980000-0000-7000-8000-000000000000")).status_code == 404


def send(server: embedded.PostgreSQL, number: signal.Signals) -> None:
    """To the postmaster and all of its processes."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    for pid in [server.process.pid, *(int(word) for word in listed.stdout.split())]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def test_health_says_when_what_is_accepted_lies_on_one_machine(
    both: Settings, primary: embedded.PostgreSQL
) -> None:
    async def state(client: httpx.AsyncClient) -> tuple[str, str | None]:
        health = (await client.get("/health/ready")).json()
        return health["status"], health["checks"].get("replica", {"status": None})["status"]

    async def replicated() -> bool | None:
        connection = await db.connect(both.database_url, "tests")
        try:
            return (await backlog.read(connection)).replicated
        finally:
            await connection.close()

    async with client_of(both, primary) as client:
        assert await state(client) == ("ok", None)
        assert await replicated() is None

        # A new session's value of a setting of the server's own; postgresql.conf says the same on the fleet.
        await execute(primary, f"alter database {NAME} set {EXPECTED} = 'replica'")
        assert await replicated() is False
        async with client_of(both, primary) as later:
            assert await state(later) == ("degraded", "degraded")

        await execute(primary, f"alter system set {STREAMS} = 'replica'", "select pg_reload_conf()")
        await becomes(replicated)
        async with client_of(both, primary) as later:
            assert await state(later) == ("ok", "ok")
        await execute(primary, f"alter system reset {STREAMS}", "select pg_reload_conf()")
