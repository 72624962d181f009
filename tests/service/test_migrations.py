"""A database that an earlier version wrote comes to the present schema with everything in it."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from neoforge_email import db
from neoforge_email.lifecycle import Status
from tests.support import Database

OLD_STATUSES = [
    "queued",
    "deferred",
    "uncertain",
    "sent",
    "delivered",
    "cancelled",
    "suppressed",
    "expired",
    "failed",
    "bounced",
    "complained",
]


async def upgrade_to(database: Database, revision: str) -> None:
    async def creator() -> Any:
        return await db.connect(Database.url(database.migrator), "test")

    def upgrade(connection: Any) -> None:
        config = Config()
        config.set_main_option("script_location", str(db.PACKAGE / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(upgrade)
    await engine.dispose()


async def test_every_recipient_keeps_its_status_and_the_order_becomes_the_new_rank(empty_database: Database) -> None:
    await upgrade_to(empty_database, "0001")
    superuser = await db.connect(Database.url(empty_database.superuser), "test")
    await superuser.execute(
        "insert into email_tracking (id, email_id, created_at, updated_at, user_id, kind, status, recipient, recipient_name)"
        " select gen_random_uuid(), gen_random_uuid(), now(), now(), 1, 'to', s::recipient_status, s || '@example.net', ''"
        " from unnest($1::text[]) s",
        OLD_STATUSES,
    )
    migrated = await db.migrate(Database.url(empty_database.migrator))
    assert migrated.before == "0001"
    rows = await superuser.fetch(
        "select recipient, status::text as status from email_tracking order by email_tracking.status"
    )
    assert [row["status"] for row in rows] == [status.value for status in Status if status.value in OLD_STATUSES]
    assert all(row["recipient"] == f"{row['status']}@example.net" for row in rows)
    await superuser.close()


@pytest.mark.parametrize("function", ["accept", "attempt", "complete", "sweep"])
async def test_functions_whose_arguments_changed_leave_no_older_form_behind(
    empty_database: Database, function: str
) -> None:
    await upgrade_to(empty_database, "0001")
    migrator = await db.connect(Database.url(empty_database.migrator), "test")
    await migrator.execute(
        "set role neoforge_owner; grant create on schema public to neoforge_migrator; reset role;"
        f" create function {function}(p int) returns int language sql as 'select p'"
    )
    await db.migrate(Database.url(empty_database.migrator))
    count = await migrator.fetchval(
        "select count(*) from pg_proc where proname = $1 and pronamespace = 'public'::regnamespace", function
    )
    assert count == 1
    await migrator.close()
