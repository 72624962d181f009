"""One PostgreSQL and one Valkey a run, started from their wheels; nothing of them is left afterwards.

`TEST_DATABASE_URL`, the superuser's URL of a server that is there for tests alone, replaces the embedded PostgreSQL. The
service's roles are made there, and get the superuser's password.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest

from neoforge_email import db
from neoforge_email.embedded import PostgreSQL, Valkey
from neoforge_email.settings import DatabaseUrl
from tests.support import Database, Server


@pytest.fixture(scope="session")
def servers_directory() -> Iterator[Path]:
    """Not pytest's own: that is closed to `nobody`, whom the servers run as when the tests run as root."""
    with tempfile.TemporaryDirectory(prefix="neoforge-tests-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def postgresql(servers_directory: Path) -> Iterator[Server]:
    """A PostgreSQL server with the service's roles."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        server = Server(url.replace("postgresql+asyncpg://", "postgresql://"))
        in_a_loop_of_its_own(lambda: _make_roles(server))
        yield server
        return
    with PostgreSQL(servers_directory, fsync=False) as embedded:
        server = Server(embedded.dsn())
        in_a_loop_of_its_own(lambda: _make_roles(server))
        yield server


@pytest.fixture(scope="session")
def template(postgresql: Server) -> Iterator[Database]:
    """A migrated database that others are copied from; nobody may be connected to it."""
    database = Database(postgresql, f"neoforge_template_{uuid4().hex[:12]}")
    _execute(postgresql, f"create database {database.name} owner neoforge_owner")
    in_a_loop_of_its_own(lambda: db.migrate(DatabaseUrl.parse(database.migrator)))
    yield database
    _execute(postgresql, f"drop database {database.name} with (force)")


@pytest.fixture
def empty_database(postgresql: Server) -> Iterator[Database]:
    """A database that has not been migrated."""
    database = Database(postgresql, f"neoforge_test_{uuid4().hex[:12]}")
    _execute(postgresql, f"create database {database.name} owner neoforge_owner")
    yield database
    _execute(postgresql, f"drop database {database.name} with (force)")


@pytest.fixture
def database(template: Database) -> Iterator[Database]:
    """A fresh, migrated database without users or messages."""
    copy = Database(template.server, f"neoforge_test_{uuid4().hex[:12]}")
    _execute(copy.server, f"create database {copy.name} template {template.name} owner neoforge_owner")
    yield copy
    _execute(copy.server, f"drop database {copy.name} with (force)")


@pytest.fixture(scope="session")
def valkey(servers_directory: Path) -> Iterator[Valkey]:
    with Valkey(servers_directory) as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """An empty Redis database."""
    from redis import Redis

    with Redis.from_url(valkey.url()) as client:
        client.flushall()
    return valkey.url()


def in_a_loop_of_its_own(call: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine while the event loop of a test may exist already."""

    async def run() -> Any:
        return await call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(run())).result()


def _execute(server: Server, statement: str) -> None:
    async def run() -> None:
        connection = await db.connect(DatabaseUrl.parse(server.superuser), "tests")
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    in_a_loop_of_its_own(run)


async def _make_roles(server: Server) -> None:
    url = DatabaseUrl.parse(server.superuser)
    await db.create_roles(url)
    password = urlsplit(server.superuser).password
    if password is None:
        return
    connection = await db.connect(url, "tests")
    try:
        for role in ("neoforge_migrator", "neoforge_api", "neoforge_worker"):
            literal = await connection.fetchval("select quote_literal($1)", unquote(password))
            await connection.execute(f"alter role {role} password {literal}")
    finally:
        await connection.close()
