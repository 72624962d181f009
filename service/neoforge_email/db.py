"""PostgreSQL: connections, read sessions, and the schema's way to its newest version."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from .errors import DatabaseUnavailable
from .settings import DatabaseUrl, Settings

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

PACKAGE = Path(__file__).parent
FUNCTIONS = ("outbox.sql", "events.sql", "webhooks.sql", "reconcile.sql")

# What asyncpg raises where nothing is wrong with the statement, and the same one may succeed a moment later: the server is
# away, restarting, a replica, full or out of memory, or a deadlock or an operator ended the transaction.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.TransactionRollbackError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
)
# What it raises for a value that cannot be stored. Ask for it first: where asyncpg itself finds the fault, it is a kind of
# InterfaceError as well.
UNSTORABLE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError)


async def connect(url: DatabaseUrl, purpose: str) -> Connection:
    """One connection; `purpose` is its application_name. Raises DatabaseUnavailable."""
    try:
        return await asyncpg.connect(url.dsn, ssl=url.tls, timeout=10, server_settings=_session(purpose))
    except UNAVAILABLE as error:
        raise DatabaseUnavailable(f"PostgreSQL at {url.host} cannot be reached ({type(error).__name__})") from error


async def create_pool(settings: Settings, url: DatabaseUrl, purpose: str) -> Pool:
    """A pool that grows on demand up to DB_POOL_SIZE + DB_MAX_OVERFLOW. It starts even while the server is away."""
    return await asyncpg.create_pool(
        url.dsn,
        ssl=url.tls,
        min_size=0,
        max_size=settings.db_pool_size + settings.db_max_overflow,
        max_inactive_connection_lifetime=settings.db_pool_recycle.total_seconds(),
        timeout=settings.db_pool_timeout.total_seconds(),
        command_timeout=60,
        server_settings=_session(purpose),
        reset=_keep,
    )


@asynccontextmanager
async def read_session(pool: Pool, user_id: int) -> AsyncIterator[Connection]:
    """A read-only transaction that sees the rows of one user, all as of one moment. Raises DatabaseUnavailable."""
    try:
        async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("select set_config('app.current_user_id', $1, true)", str(user_id))
            yield cast("Connection", connection)
    except UNAVAILABLE as error:
        raise DatabaseUnavailable("PostgreSQL cannot be reached; nothing was read") from error


@asynccontextmanager
async def write_session(pool: Pool, user_id: int) -> AsyncIterator[Connection]:
    """A transaction that sees and changes the rows of one user, committed at its end. Raises DatabaseUnavailable."""
    try:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("select set_config('app.current_user_id', $1, true)", str(user_id))
            yield cast("Connection", connection)
    except UNAVAILABLE as error:
        raise DatabaseUnavailable("PostgreSQL cannot be reached; look whether it was done, and repeat it") from error


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did: the schema's versions, and whether FUNCTIONS were installed anew."""

    before: str | None
    after: str
    functions: bool

    @property
    def changed(self) -> bool:
        return self.functions or self.before != self.after


async def migrate(url: DatabaseUrl) -> Migrated:
    """Bring the schema to its newest version and install the functions, in one transaction, once at a time.

    Has to run as a member of neoforge_owner and neoforge_outbox. Raises DatabaseUnavailable.
    """

    async def creator() -> Connection:
        return await connect(url, "neoforge-migrate")

    engine = create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.execute(text("select pg_advisory_xact_lock(hashtext('neoforge-migrate'))"))
            before = await connection.run_sync(_version)
            await connection.run_sync(_upgrade)
            after = await connection.run_sync(_version)
            driver = (await connection.get_raw_connection()).driver_connection
            functions = await _install_functions(cast("Connection", driver))
    finally:
        await engine.dispose()
    return Migrated(before, after or "", functions)


async def create_roles(superuser: DatabaseUrl) -> None:
    """Create the database roles that the schema needs, without passwords, on a server of our own."""
    connection = await connect(superuser, "neoforge-roles")
    try:
        await connection.execute((PACKAGE / "migrations" / "roles.sql").read_text(encoding="utf-8"))
    finally:
        await connection.close()


def _session(purpose: str) -> dict[str, str]:
    return {"application_name": purpose, "jit": "off", "timezone": "UTC"}


async def _keep(_connection: object) -> None:
    """Spare the round trip that asyncpg resets a connection with: no session state outlives a transaction here."""


def _version(connection: SyncConnection) -> str | None:
    if not connection.execute(text("select to_regclass('alembic_version')")).scalar():
        return None
    version: str | None = connection.execute(text("select version_num from alembic_version")).scalar()
    return version


def _upgrade(connection: SyncConnection) -> None:
    config = Config()
    config.set_main_option("script_location", str(PACKAGE / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _install_functions(connection: Connection) -> bool:
    """Install FUNCTIONS unless these very ones are there. Definer functions need an owner who may create."""
    script = "\n".join((PACKAGE / name).read_text(encoding="utf-8") for name in FUNCTIONS)
    digest = hashlib.sha256(script.encode()).hexdigest()
    await connection.execute("reset role")
    if await connection.fetchval("select sha256 from functions_installed") == digest:
        return False
    await connection.execute(
        "set local role neoforge_owner; grant create on schema public to neoforge_outbox, neoforge_migrator; reset role"
    )
    await connection.execute(script)
    await connection.execute(
        "set local role neoforge_owner; revoke create on schema public from neoforge_outbox, neoforge_migrator;"
        " delete from functions_installed"
    )
    await connection.execute("insert into functions_installed values ($1)", digest)
    return True
