"""The schema's history. `db.migrate` runs it; `outbox.sql` holds the functions, which are installed after it."""

from __future__ import annotations

from typing import Any

from alembic import op


def run(script: str) -> None:
    """Execute a script of many statements as the owner of the tables, in the migration's transaction."""
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(f"set local role neoforge_owner; {script}; reset role"))
