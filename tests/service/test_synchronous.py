"""What the role `postgresql` installs so that commits wait for a replica that streams, and for none that does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jinja2
import pytest

from neoforge_email import db, embedded
from tests.service.test_replica import NAME, becomes, execute, primary, replica, send
from tests.support import Database

__all__ = ["primary", "replica"]  # fixtures

TEMPLATES = Path(__file__).parents[2] / "roles/postgresql/templates"
NAMES = 'FIRST 1 ("replica")'


@pytest.fixture
def watcher(primary: embedded.PostgreSQL, tmp_path: Path) -> Iterator[None]:
    """The program itself, as the machine runs it."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined)
    environment.filters["comment"] = lambda text: f"# {text}"
    environment.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by, text)
    values = {"ansible_managed": "", "postgresql_peers": ["replica"], "__postgresql_synchronous": f"'{NAMES}'"}
    program = tmp_path / "neoforge-synchronous"
    program.write_text(environment.get_template("neoforge-synchronous.j2").render(values), encoding="utf-8")
    server = Path(f"/proc/{primary.process.pid}/exe").readlink().parent
    reached = {"PGHOST": parse_qs(urlsplit(primary.dsn()).query)["host"][0], "PGUSER": "postgres"}
    running = subprocess.Popen(
        ["/bin/sh", str(program)],
        env={"PATH": f"{server}:{os.environ['PATH']}", **reached},
        start_new_session=True,
    )
    yield
    os.killpg(running.pid, signal.SIGTERM)
    running.wait()


async def test_a_replica_that_falls_silent_holds_commits_for_seconds_and_is_waited_for_again_once_it_is_back(
    primary: embedded.PostgreSQL, replica: embedded.PostgreSQL, watcher: None
) -> None:
    async def names() -> str:
        connection = await db.connect(Database.url(primary.dsn(database=NAME)), "tests")
        try:
            return str(await connection.fetchval("show synchronous_standby_names"))
        finally:
            await connection.close()

    async def waits() -> bool:
        return await names() == NAMES

    await execute(primary, "alter system set wal_sender_timeout = '5s'", "select pg_reload_conf()")
    await becomes(waits)
    await execute(primary, "create table silent (number int)")

    send(replica, signal.SIGSTOP)
    began = time.monotonic()
    try:
        await execute(primary, "insert into silent values (1)")  # the server says when it is committed
        held = time.monotonic() - began
        assert await names() == ""
    finally:
        send(replica, signal.SIGCONT)
    print(f"held for {held:.1f} s")  # noqa: T201
    assert 1 < held < 20
    await becomes(waits, 40)
