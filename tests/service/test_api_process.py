"""`neoforge serve` as a process of its own: what only a real server on a real socket shows."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from neoforge_email import db, keys
from tests.support import Database

MESSAGE = {"to": "ada@example.net", "subject": "Hello", "text": "It works."}
NEOFORGE = str(Path(sys.executable).parent / "neoforge")


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    metrics_url: str
    key: str
    log: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@pytest.fixture
def serve(environment: dict[str, str], database: Database, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(WORKER_PROCESSES="2")`: a running server with these changes of its environment."""
    running: list[Served] = []

    def start(**variables: str) -> Served:
        port, metrics_port = free_port(), free_port()
        (tmp_path / "temporary").mkdir(exist_ok=True)
        temporary = {"TMPDIR": str(tmp_path / "temporary")}
        variables = {**environment, **temporary, "PORT": str(port), "METRICS_PORT": str(metrics_port), **variables}
        log = tmp_path / f"serve-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [NEOFORGE, "serve"], env={**base_environment(), **variables}, stdout=output, stderr=output
            )
        served = Served(
            process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", a_key(database), log
        )
        running.append(served)
        until(lambda: process.poll() is not None or answers(f"{served.url}/health/live"))
        assert process.poll() is None, log.read_text()
        return served

    yield start
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


def base_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.05)


def a_key(database: Database) -> str:
    async def make() -> str:
        connection = await db.connect(database.url(database.migrator), "tests")
        try:
            return (await keys.create(connection, "shop", "tests"))[1]
        finally:
            await connection.close()

    return asyncio.run(make())


def stored(database: Database) -> set[str]:
    async def ask() -> set[str]:
        connection = await db.connect(database.url(database.superuser), "tests")
        try:
            return {str(row["id"]) for row in await connection.fetch("select id from email_queue")}
        finally:
            await connection.close()

    return asyncio.run(ask())


@contextmanager
def connection_to(served: Served) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0), timeout=10) as connection:
        yield connection


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(serve: Callable[..., Served]) -> None:
    served = serve(MAX_FILE_SIZE="10KB")
    request = (
        "POST /api/v1/emails HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {served.key}\r\nContent-Length: 100000000\r\n\r\n"
    )
    with connection_to(served) as connection:
        connection.sendall(request.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_large_body_is_refused_and_the_connection_goes_on(serve: Callable[..., Served]) -> None:
    served = serve(MAX_FILE_SIZE="10KB")

    def parts() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 16384

    with httpx.Client(base_url=served.url, headers={**served.headers, "Content-Type": "application/json"}) as client:
        assert client.post("/api/v1/emails", content=b" " * 1_000_000).status_code == 413
        assert client.post("/api/v1/emails", content=parts()).status_code == 413
        assert client.post("/api/v1/emails", json=MESSAGE).status_code == 202


def test_a_client_that_hangs_up_in_the_middle_of_its_body_leaves_no_trace(
    serve: Callable[..., Served], database: Database
) -> None:
    served = serve()
    request = (
        "POST /api/v1/emails HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {served.key}\r\nContent-Length: 1000\r\n\r\n{{"
    )
    with connection_to(served) as connection:
        connection.sendall(request.encode())
        time.sleep(0.2)
    assert httpx.post(f"{served.url}/api/v1/emails", json=MESSAGE, headers=served.headers).status_code == 202
    assert len(stored(database)) == 1
    assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()


def test_what_was_answered_with_202_outlives_a_sigterm_under_load(
    serve: Callable[..., Served], database: Database
) -> None:
    served = serve(WORKER_PROCESSES="2")
    accepted: set[str] = set()

    async def send(client: httpx.AsyncClient) -> None:
        while True:
            try:
                answer = await client.post("/api/v1/emails", json=MESSAGE, headers=served.headers)
            except httpx.TransportError:
                return
            if answer.status_code == 202:
                accepted.add(answer.json()["id"])

    async def load() -> None:
        async with httpx.AsyncClient(base_url=served.url) as client:
            senders = [asyncio.create_task(send(client)) for _ in range(16)]
            await asyncio.sleep(1)
            served.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*senders), timeout=20)

    asyncio.run(load())
    assert served.process.wait(timeout=20) == 0
    assert len(accepted) > 50
    assert accepted <= stored(database)


def test_two_processes_show_their_metrics_on_one_port(serve: Callable[..., Served]) -> None:
    served = serve(WORKER_PROCESSES="2", ENABLE_METRICS="true")
    for _ in range(20):
        # a connection each, so that both processes get some
        assert httpx.post(f"{served.url}/api/v1/emails", json=MESSAGE, headers=served.headers).status_code == 202
    samples = dict(
        line.rsplit(" ", 1) for line in httpx.get(served.metrics_url).text.splitlines() if not line.startswith("#")
    )
    assert samples['http_requests_total{method="POST",route="/api/v1/emails",status="202"}'] == "20.0"
    assert samples['emails_accepted_total{priority="normal"}'] == "20.0"
    assert samples['email_queue_size{state="queued"}'] == "20.0"
    assert float(samples['email_oldest_age_seconds{state="queued"}']) > 0
    assert samples['provider_receipts_size{state="waiting"}'] == "0.0"
    assert samples['provider_receipts_oldest_age_seconds{state="unmatched"}'] == "0.0"
    assert samples['provider_receipts_oldest_age_seconds{state="postponed"}'] == "0.0"
    for state in ("pending", "overdue", "leased", "dead"):
        assert samples[f'webhook_queue_size{{state="{state}"}}'] == "0.0"
        assert samples[f'webhook_oldest_age_seconds{{state="{state}"}}'] == "0.0"
    assert samples['reconciler_stuck_rows{kind="recipient_without_queue"}'] == "0.0"
    assert float(samples["reconciler_last_success_timestamp_seconds"]) > 1.7e9
    assert float(samples["email_partitions_end_timestamp_seconds"]) > time.time() + 27 * 86400
    assert served.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.metrics_url)


@pytest.mark.parametrize("variable", ["PORT", "METRICS_PORT"])
def test_a_port_that_is_taken_stops_the_start(environment: dict[str, str], variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"PORT": str(free_port()), "METRICS_PORT": str(free_port()), "ENABLE_METRICS": "true"}
        ports[variable] = str(taken.getsockname()[1])
        done = subprocess.run(
            [NEOFORGE, "serve"],
            env={**base_environment(), **environment, **ports},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode > 0
    assert "ddress already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_server_that_was_stopped_leaves_nothing_behind(
    serve: Callable[..., Served], tmp_path: Path, processes: str
) -> None:
    served = serve(WORKER_PROCESSES=processes, ENABLE_METRICS="true")
    assert list((tmp_path / "temporary").iterdir())
    assert served.stop() == 0
    assert not list((tmp_path / "temporary").iterdir())
