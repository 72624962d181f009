"""The schema's history. `db.migrate` runs it; `outbox.sql` and its like hold the functions, which are installed after it."""

from __future__ import annotations

from typing import Any

from alembic import op


def run(script: str) -> None:
    """Execute a script of many statements as the owner of the tables, in the migration's transaction."""
    _execute(f"set local role neoforge_owner; {script}; reset role")


def drop_functions(*names: str) -> None:
    """Drop every function of these names, whatever its arguments; `db.migrate` installs the present ones afterwards."""
    _execute(DROP_FUNCTIONS % ", ".join(f"'{name}'" for name in names))


DROP_FUNCTIONS = """
do $$
declare
    f regprocedure;
begin
    for f in select oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace and proname in (%s) loop
        execute format('drop function %%s', f);
    end loop;
end $$"""


def _execute(script: str) -> None:
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(script))
