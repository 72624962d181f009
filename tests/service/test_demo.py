"""`neoforge demo`, for real: its own process on free ports, with a state directory of its own."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neoforge_email.demo import default_state

PR_SET_CHILD_SUBREAPER = 36
SECONDS = 60.0
UP = "Running; Ctrl-C stops everything."


@dataclass(frozen=True)
class Place:
    """Where a demo runs: its state directory and its ports."""

    state: Path
    ports: dict[str, int]

    @property
    def temporary(self) -> Path:
        return self.state.with_name("temporary")

    def command(self, *options: str) -> list[str]:
        ports = [f"{option}={number}" for option, number in self.ports.items()]
        return [sys.executable, "-m", "neoforge_email.cli", "demo", f"--state={self.state}", *ports, *options]

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Until it ends by itself."""
        return subprocess.run(
            self.command(*options),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )

    @contextmanager
    def running(self, *options: str, until: str = UP) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """The process and what it has printed `until` a line."""
        with subprocess.Popen(
            self.command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                lines = []
                for line in process.stdout:
                    lines.append(line)
                    if until in line:
                        break
                else:
                    pytest.fail(f"it ended early: {''.join(lines)}{process.stderr.read() if process.stderr else ''}")
                yield process, "".join(lines)
            finally:
                process.kill()


@pytest.fixture
def place() -> Iterator[Place]:
    # Below /tmp and passable, because as root PostgreSQL runs as `nobody`.
    with tempfile.TemporaryDirectory(prefix="neoforge-demo-", dir="/tmp") as directory:
        Path(directory).chmod(0o711)
        place = Place(Path(directory) / "state", free_ports())
        place.temporary.mkdir()
        yield place


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Whatever a demo starts and does not end becomes a child of this process, and fails the test."""
    assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    before = set(children(os.getpid()))
    yield
    deadline = time.monotonic() + 10
    while left := {pid: command(pid) for pid in children(os.getpid()) if pid not in before}:
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


pytestmark = pytest.mark.usefixtures("nothing_left")


def test_the_check_proves_an_arrival_and_two_refusals_and_leaves_nothing_running(place: Place) -> None:
    done = place.run("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Arrived in the mailbox as <" in done.stdout
    assert re.search(r"\d s  sent +ada@example\.com  by smtp  250 ", done.stdout)
    assert "Refused a wrong key (401)" in done.stdout
    assert "Refused a bad address (422): to: " in done.stdout
    assert done.stderr == ""
    assert [entry.name for entry in place.temporary.rglob("*")] == []
    for number in place.ports.values():
        socket.create_server(("127.0.0.1", number)).close()


def test_a_taken_port_is_named_with_its_option_before_anything_is_started(place: Place) -> None:
    with socket.create_server(("127.0.0.1", place.ports["--smtp-port"])):
        done = place.run("--check")
    assert done.returncode == 2
    assert done.stderr == f"Error: Port {place.ports['--smtp-port']} is taken: choose another with --smtp-port.\n"
    assert not place.state.exists()


def test_a_port_that_is_wanted_twice_is_refused(place: Place) -> None:
    done = place.run(f"--port={place.ports['--metrics-port'] + 1}")
    assert done.returncode == 2
    assert "is wanted twice, by --port and by --metrics-port (the worker's is one above)" in done.stderr


def test_the_printed_command_sends_a_message_and_ctrl_c_ends_everything_in_order(place: Place) -> None:
    with place.running() as (process, printed):
        curl = shlex.split(printed[printed.index("curl ") : printed.index(UP)].replace("\\\n", ""))
        status, accepted = call(curl[1], headers=curl[3:6:2], body=curl[7])
        assert (status, accepted["status"]) == (202, "queued")
        mailbox = f"http://127.0.0.1:{place.ports['--mailbox-port']}/api/messages"
        wait_for(lambda: call(mailbox)[1]["messages"][0]["recipients"] == ["grace@example.com"])
        for url in re.findall(r"http://\S+", printed):
            if not url.endswith("/emails"):
                assert call(url)[0] == 200, url

        other = Place(place.state, free_ports()).run("--check", "--fresh")
        assert (other.returncode, other.stdout) == (2, "")
        assert "Another demo is running on" in other.stderr

        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, errors) == (0, "")
        assert rest.splitlines()[-1].endswith("Stopped; nothing is left running")


def test_messages_and_key_survive_a_restart_and_fresh_forgets_them(place: Place) -> None:
    with place.running() as (process, printed):
        key = key_in(printed)
        [email_id] = re.findall(r"message ([0-9a-f-]{36})", printed)
        process.terminate()
        process.wait(SECONDS)
    for secret in ("api-key", "environment"):
        assert stat.S_IMODE((place.state / secret).stat().st_mode) == 0o600

    with place.running() as (process, printed):
        assert key_in(printed) == key
        url = f"http://127.0.0.1:{place.ports['--port']}/api/v1/emails/{email_id}"
        status, email = call(url, headers=[f"Authorization: Bearer {key}"])
        assert (status, email["state"]) == (200, "done")
        [worker] = [pid for pid in children(process.pid) if "arq" in command(pid)]
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        assert f"worker ended by signal SIGKILL; {place.state}/worker.log ends:" in errors
        assert "worker.started" in errors

    assert place.run("--check", "--fresh").returncode == 0
    assert (place.state / "api-key").read_text() != f"{key}\n"


def test_an_interrupted_start_leaves_nothing(place: Place) -> None:
    with place.running(until="PostgreSQL is ready") as (process, _):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, errors) == (130, "")


def test_a_killed_demo_takes_its_children_with_it_and_the_next_one_starts(place: Place) -> None:
    with place.running() as (process, _):
        process.kill()
        process.wait(SECONDS)
    ports = [*place.ports.values(), place.ports["--metrics-port"] + 1]
    wait_for(lambda: all(is_free(number) for number in ports))
    assert place.run("--check").returncode == 0


def test_a_directory_of_somebody_else_is_never_emptied(place: Place) -> None:
    place.state.mkdir()
    (place.state / "thesis.txt").write_text("years of work")
    done = place.run("--check", "--fresh")
    assert done.returncode == 2
    assert "holds something else than a demo's state: choose another with --state" in done.stderr
    assert (place.state / "thesis.txt").read_text() == "years of work"


def test_the_state_is_kept_where_programs_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_state() == Path("/somewhere/neoforge-demo")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_state() == Path("/home/ada/.local/state/neoforge-demo")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state() == Path("/var/lib/neoforge-demo")


def key_in(printed: str) -> str:
    [key] = re.findall(r"nf_[A-Za-z0-9_-]{43}", printed)
    return str(key)


def call(url: str, *, headers: list[str] | None = None, body: str | None = None) -> tuple[int, Any]:
    given = dict(header.split(": ", 1) for header in headers or [])
    request = urllib.request.Request(url, data=body.encode() if body else None, headers=given)
    with urllib.request.urlopen(request, timeout=10) as response:
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else content


def wait_for(happened: Any) -> None:
    deadline = time.monotonic() + 15
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def free_ports() -> dict[str, int]:
    """A free port an option, and a free one above that of the metrics; none that an outgoing connection could take."""
    names = ("--port", "--smtp-port", "--mailbox-port", "--metrics-port")
    first = random.randrange(20_000, 32_000)
    if not all(is_free(first + number) for number in range(len(names) + 1)):
        return free_ports()
    return {name: first + number for number, name in enumerate(names)}


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    while True:
        try:
            return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            # A thread ended under our eyes; its children are another thread's now, so look at all of them again.
            if not tasks.exists():
                raise


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
