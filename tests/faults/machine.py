"""The laboratory's machine: servers, API, workers and sink as processes, each started again a second after it died."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from neoforge_email import db, keys
from neoforge_email.embedded import Child, PostgreSQL, Valkey, spawn, stop
from neoforge_email.settings import DatabaseUrl
from tests.sendgrid_double import API_KEY

from . import disk
from .clock import Clock
from .endpoint import Endpoint
from .nursery import Forked

RESTART_SECONDS = 1.0
START_SECONDS = 30.0
DATABASE = "neoforge_faults"
ROOT = Path(__file__).parents[2]
CALL_SECONDS = "2"
"""How long the service waits for a provider."""
WINDOW = 10
"""Messages a call over SMTP."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a machine is made of; rows with the same setup share one."""

    provider: str = "smtp"
    events: bool = False
    """The provider's events come to the API's webhook."""
    workers: int = 1
    connections: int = 1
    """Provider calls that a worker has under way at once."""
    careful: bool = False
    """The sink asks for TLS and a log-in, and takes one command at a time."""
    lease_seconds: float | None = None
    clocks: str = ""
    """Whose clock can be stepped: `service` or `database`."""
    small_disk: str = ""
    """What of PostgreSQL lies on a disk that can be filled: `wal` or `data`."""
    endpoint: bool = False
    """A customer's endpoint hears of everything by webhooks."""
    settings: tuple[tuple[str, str], ...] = ()


SENDGRID_FAULTS: dict[str, dict[str, object]] = {
    "silent-before": {"kind": "hang"},
    "silent-after": {"kind": "hang", "take": True},
    "garbage-before": {"kind": "garbage"},
    "garbage-after": {"kind": "garbage", "take": True},
    "drop-before": {"kind": "drop"},
    "drop-after": {"kind": "drop", "take": True},
    "drop-mid-body": {"kind": "drop_body"},
    "fail-before": {"kind": "answer", "status": 500},
    "fail-after": {"kind": "answer", "status": 500, "take": True},
    "defer": {"kind": "throttle", "seconds": 1},
}
"""What `sink` calls these faults, in the words of the double of SendGrid."""


class Service:
    """One process of ours, kept alive as systemd would."""

    def __init__(self, start: Callable[[], Child], machine: Machine) -> None:
        self._start = start
        self._machine = machine
        self._watching: asyncio.Task[None] | None = None
        self._process: Child | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """A signal, if there is a process now."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @property
    def stopped(self) -> bool:
        """Whether the process is suspended by SIGSTOP."""
        if self._process is None:
            return False
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    @property
    def started(self) -> bool:
        """Whether it is kept alive now."""
        return self._watching is not None

    async def start(self) -> None:
        await self._machine.in_thread(self._begin)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            while self._process is not None and self._process.poll() is None:
                await asyncio.sleep(0.02)
            await asyncio.sleep(RESTART_SECONDS)
            await self._machine.in_thread(self._begin)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None
        await self._machine.in_thread(self._end, number)

    # In one thread, one after the other: who is told to end while it is being started must not live on.

    def _begin(self) -> None:
        self._process = self._start()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self.send(signal.SIGCONT)
            stop(self._process, (number, 10.0))
            self._process = None


class Machine:
    """Everything that runs, in a directory of its own. `services` are the API and the workers by name."""

    def __init__(self, setup: Setup, directory: Path) -> None:
        self.setup = setup
        self.directory = directory
        # The kernel ends our children with the thread that started them, so one thread starts them all.
        self._thread = ThreadPoolExecutor(1)
        self.clock = Clock(directory / "clock")
        environment = self.clock.environment if setup.clocks == "database" else {}
        self.postgresql = PostgreSQL(directory, environment=environment)
        self.valkey = Valkey(directory, port=free_port())
        self.api_port, self.sink_port = free_port(), free_port()
        self.journal, self.control = directory / "journal", directory / "control"
        self.services = {"api": Service(self._spawn_api, self)} | {
            f"worker{number}": Service(self._spawner(number), self) for number in range(1, setup.workers + 1)
        }
        self.disk: disk.SmallDisk | None = None
        self.endpoint = Endpoint(free_port()) if setup.endpoint else None
        self.key = ""
        self._sink: subprocess.Popen[bytes] | None = None
        self._orders = 0
        self._kept: asyncpg.Connection[asyncpg.Record] | None = None
        self._verification_key = ""

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    @property
    def workers(self) -> list[Service]:
        return [service for name, service in self.services.items() if name != "api"]

    async def start(self) -> None:
        """Servers, schema, key and sink; the services start with a row."""
        if self.setup.small_disk:
            self.disk = disk.SmallDisk(self.directory, self.setup.small_disk)
            await self.in_thread(self.disk.prepare)
        await self.in_thread(self.postgresql.start)
        if self.disk is not None:
            await self.in_thread(self.postgresql.stop)
            await self.in_thread(self.disk.move)
            await self.in_thread(self.postgresql.start)
        await self.in_thread(self.valkey.start)
        await self._prepare_database()
        if self.endpoint is not None:
            async with self.connection() as connection:
                await self.endpoint.register(connection)
            await self.endpoint.start()
        if self.setup.careful:
            await self.in_thread(make_certificate, self.directory / "certificate.pem")
        self._sink = await self.in_thread(self._spawn_sink)
        if self.setup.provider == "sendgrid":
            await until(self._sendgrid_is_up, START_SECONDS, "the double of SendGrid does not start")
        if self.setup.events:
            url = f"http://127.0.0.1:{self.api_port}/api/v1/webhooks/sendgrid"
            kinds = ["processed", "delivered"]
            await self._tell_sendgrid("set", {"webhook": {"url": url, "kinds": kinds, "delay": 0.2}})

    async def stop(self) -> None:
        for service in self.services.values():
            await service.stop(signal.SIGKILL)
        if self.endpoint is not None:
            await self.endpoint.stop()
        if self._kept is not None:
            self._kept.terminate()
        if self._sink is not None:
            await self.in_thread(stop, self._sink, (signal.SIGTERM, 5.0))
        await self.in_thread(self.valkey.stop)
        await self.in_thread(self.postgresql.stop)
        if self.disk is not None:
            await self.in_thread(self.disk.remove)
        self._thread.shutdown()

    async def _prepare_database(self) -> None:
        superuser = DatabaseUrl.parse(self.postgresql.dsn())
        await db.create_roles(superuser)
        connection = await db.connect(superuser, "laboratory")
        try:
            await connection.execute(f"create database {DATABASE} owner neoforge_owner")
        finally:
            await connection.close()
        migrator = DatabaseUrl.parse(self.postgresql.dsn("neoforge_migrator", DATABASE))
        await db.migrate(migrator)
        connection = await db.connect(migrator, "laboratory")
        try:
            self.key = (await keys.create(connection, "laboratory", "laboratory"))[1]
        finally:
            await connection.close()

    # --- processes ---------------------------------------------------------------------------------------------

    def environment(self, role: str) -> dict[str, str]:
        settings = {
            "DATABASE_URL": self.postgresql.dsn(f"neoforge_{role}", DATABASE),
            "REDIS_URL": self.valkey.url(),
            "EMAIL_PROVIDER": self.setup.provider,
            "SMTP_SERVER": "127.0.0.1",
            "SMTP_PORT": str(self.sink_port),
            "SMTP_USE_TLS": "false",
            "SMTP_TIMEOUT": CALL_SECONDS,
            "SMTP_CONNECTIONS": str(self.setup.connections),
            "EMAIL_WORKER_BATCH_SIZE": str(WINDOW),
            "EMAIL_WORKER_INTERVAL": "0.2",
            "EMAIL_WORKER_ERROR_INTERVAL": "0.5",
            "EMAIL_RETRY_DELAY": "0.5",
            "PROVIDER_BREAKER_WAIT": "0.5",
            "FROM_EMAIL": "faults@example.com",
            "ENABLE_METRICS": "false",
            "WORKER_PROCESSES": "1",
            "LOG_LEVEL": "INFO",
            "PORT": str(self.api_port),
            "GRACEFUL_SHUTDOWN_TIMEOUT": "10",
        }
        seconds, calls = CALL_SECONDS, str(self.setup.connections)
        if self.setup.provider == "sendgrid":
            settings |= {
                "SENDGRID_API_KEY": API_KEY,
                "SENDGRID_URL": f"http://127.0.0.1:{self.sink_port}",
                "SENDGRID_TIMEOUT": seconds,
                "SENDGRID_CONNECTIONS": calls,
            }
        if self.setup.provider == "ses":
            settings |= {
                "AWS_REGION": "eu-central-1",
                "AWS_ACCESS_KEY_ID": "laboratory",
                "AWS_SECRET_ACCESS_KEY": "laboratory",
                "SES_ENDPOINT_URL": f"http://127.0.0.1:{self.sink_port}",
                "SES_TIMEOUT": seconds,
                "SES_CONNECTIONS": calls,
            }
        if self.setup.events:
            settings |= {"SENDGRID_WEBHOOK_SECRET": self._verification_key, "EMAIL_UNCERTAIN_WAIT": "6"}
        if self.endpoint is not None:
            settings |= {
                "WEBHOOK_ALLOW_HTTP": "true",
                "WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
                "WEBHOOK_TIMEOUT": CALL_SECONDS,
            }
        if self.setup.careful:
            settings |= {
                "SMTP_USE_TLS": "true",
                "SMTP_CA_FILE": str(self.directory / "certificate.pem"),
                "SMTP_USERNAME": "laboratory",
                "SMTP_PASSWORD": "laboratory",
            }
        if self.setup.clocks == "service":
            settings |= self.clock.environment
        if self.setup.lease_seconds is not None:
            settings["NEOFORGE_FAULT_LEASE"] = str(self.setup.lease_seconds)
        return {**inherited(), **settings, **dict(self.setup.settings)}

    def _spawn_api(self) -> Child:
        orders = {"NEOFORGE_FAULTS": str(self._orders_of("api"))}
        return self._begin("api", "serve", {**self.environment("api"), **orders})

    def _spawner(self, number: int) -> Callable[[], Child]:
        def start() -> Child:
            own = {
                "WORKER_INSTANCE": str(number),
                "NEOFORGE_FAULT_PROVIDER_PORT": str(self.sink_port),
                "NEOFORGE_FAULTS": str(self._orders_of(f"worker{number}")),
            }
            return self._begin(f"worker{number}", "worker", {**self.environment("worker"), **own})

        return start

    def _begin(self, name: str, what: str, environment: Mapping[str, str]) -> Child:
        if self.setup.clocks == "service":
            # Its clock is a library that is loaded with a program.
            return self._spawn(name, ["tests.faults.inject", what], environment)
        return Forked([what], self.directory / f"{name}.log", environment)

    def _spawn_sink(self) -> subprocess.Popen[bytes]:
        arguments = ["--port", str(self.sink_port), "--journal", str(self.journal)]
        if self.setup.provider == "sendgrid":
            return self._spawn("sink", ["tests.sendgrid_double", *arguments], inherited())
        arguments += ["--control", str(self.control)]
        if self.setup.provider == "ses":
            return self._spawn("sink", ["tests.faults.ses_double", *arguments], inherited())
        if self.setup.careful:
            arguments += ["--careful", str(self.directory / "certificate.pem")]
        return self._spawn("sink", ["tests.faults.sink", *arguments], inherited())

    def _spawn(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *arguments]
        log = self.directory / f"{name}.log"
        return spawn(command, log=log, environment=environment, death_signal=signal.SIGKILL)

    def _orders_of(self, service: str) -> Path:
        return self.directory / f"orders-{service}"

    async def arm(self, orders: Mapping[str, Mapping[str, object]], *, anew: bool) -> None:
        """Give each service its orders, or none, and see that all have begun their work; with `anew` those that have any
        begin it anew."""
        async with self.connection() as connection:
            began = await connection.fetchval("select clock_timestamp()")
        workers = 0
        for name, service in self.services.items():
            file = self._orders_of(name)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(orders.get(name, {"faults": [], "marker": ""})), encoding="utf-8")
            new.rename(file)
            if service.started and not service.stopped and not (anew and name in orders):
                continue
            await service.stop(signal.SIGKILL)
            await service.start()
            workers += name != "api"

        async def workers_began() -> bool:
            async with self.connection() as connection:
                seen = await connection.fetchval(
                    "select count(distinct application_name) from pg_stat_activity"
                    " where application_name like 'neoforge-worker%' and backend_start > $1",
                    began,
                )
            return bool(seen >= workers)

        await until(self._api_answers, START_SECONDS, "the API does not answer")
        await until(workers_began, START_SECONDS, "a worker does not start")

    async def _api_answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.api_port)
        except OSError:
            return False
        writer.write(b"GET /health/live HTTP/1.0\r\n\r\n")
        with contextlib.suppress(OSError):
            answer = await reader.read(64)
            writer.close()
            return b" 200 " in answer
        return False

    async def order(self, mode: str, count: int) -> None:
        """Tell the provider what is to go wrong with the next `count` messages, or calls of SendGrid; see `sink`."""
        if self.setup.provider == "sendgrid":
            await self._tell_sendgrid("fault", {**SENDGRID_FAULTS[mode], "times": count})
            return
        self._orders += 1
        new = self.control.with_suffix(".new")
        new.write_text(json.dumps({"mode": mode, "count": count, "number": self._orders}), encoding="utf-8")
        new.rename(self.control)

    async def _sendgrid_is_up(self) -> bool:
        """It says on its first line how its events can be verified."""
        line, end, _ = (self.directory / "sink.log").read_text(encoding="utf-8").partition("\n")
        if end:
            self._verification_key = json.loads(line)["verification_key"]
        return bool(end)

    async def _tell_sendgrid(self, what: str, order: Mapping[str, object]) -> None:
        url = f"http://127.0.0.1:{self.sink_port}"
        async with aiohttp.ClientSession(url) as session, session.post(f"/control/{what}", json=order) as answer:
            answer.raise_for_status()

    # --- PostgreSQL --------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """The superuser's, as soon as the server takes one. It is kept for the next time, unless it is in use or broken."""
        connection, self._kept = self._kept, None
        try:
            if connection is not None:
                await connection.execute("select", timeout=5)
        except db.UNAVAILABLE:
            connection = None
        connection = connection or await self._connect()
        try:
            yield connection
        except BaseException:
            connection.terminate()
            raise
        if self._kept is None:
            self._kept = connection
        else:
            await connection.close(timeout=5)

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        deadline = time.monotonic() + START_SECONDS
        url = DatabaseUrl.parse(self.postgresql.dsn("postgres", DATABASE))
        while True:
            try:
                return await asyncpg.connect(url.dsn, timeout=5, server_settings={"application_name": "laboratory"})
            except db.UNAVAILABLE:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def kill_postgresql(self) -> None:
        """SIGKILL to the server and all its processes at once."""
        parent = self.postgresql.process.pid
        for pid in [parent, *children(parent)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def delivered(self) -> int:
        """How many messages have arrived since the machine was made."""
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0


def inherited() -> dict[str, str]:
    """Ours without what would configure the service; `tests` can be imported from everywhere."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHONPATH": path}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def children(parent: int) -> list[int]:
    """The processes that `parent` has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" ")
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                found.append(int(pid))
    return found


async def until(condition: Callable[[], Any], seconds: float, failure: str) -> None:
    """Wait for a coroutine function to say yes; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(failure)
        await asyncio.sleep(0.02)


def make_certificate(file: Path) -> None:
    """A key and a certificate for 127.0.0.1, signed by itself."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))


@contextlib.asynccontextmanager
async def machine(setup: Setup) -> AsyncIterator[Machine]:
    """A machine that runs while the context lasts, and of which nothing is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="neoforge-faults-", dir="/tmp"))
    made = Machine(setup, directory)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
        shutil.rmtree(directory, ignore_errors=True)
