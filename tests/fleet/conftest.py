"""A running fleet under test: machines over plain ssh, and a client outside of it.

FLEET_INVENTORY names the inventory: inventories/local (seven machines) or inventories/local-single. Tests ask for groups, never
for names: `fleet.first("redis")`, `fleet.groups`, and the fixture `each_machine`, every machine of the fleet in turn.
Sockets stay shut in the tests themselves: they talk through ssh.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import testinfra  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = os.environ.get("FLEET_INVENTORY", "inventories/local")
FACTS = (
    "{'groups': groups, 'edge_name': edge_name, 'ports': ports, 'workers': workers, 'addresses': addresses, 'ssh': ssh, "
    "'addresses6': addresses6, 'flows': flows, 'secrets_file': secrets_file}"
)
ADDRESSES = "dict(groups['all'] | zip(groups['all'] | map('extract', hostvars, '{}')))"
EMAILS = "/api/v1/emails"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def problem(self) -> Any:
        """The answer's problem details; fails for anything else."""
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.headers, self.text[:500])
        problem = json.loads(self.text)
        assert problem["status"] == self.status
        assert problem["title"]
        assert problem["type"]
        return problem


class Fleet:
    """The inventory's machines by group."""

    def __init__(self) -> None:
        command = [
            "ansible",
            inventory_groups()["api"][0],
            "-i",
            INVENTORY,
            "-m",
            "ansible.builtin.debug",
            "-a",
            f"msg={{{{ {FACTS} | to_json }}}}",
        ]
        extra = {
            "addresses": f"{{{{ {ADDRESSES.format('fleet_ipv4')} }}}}",
            "addresses6": f"{{{{ {ADDRESSES.format('fleet_ipv6')} }}}}",
            "ssh": "{{ ansible_ssh_common_args | default('') }}",
        }
        done = subprocess.run(
            [*command, "-e", json.dumps(extra)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        match = re.search(r"=> (\{.*\})\s*$", done.stdout, re.DOTALL)
        assert match, done.stdout + done.stderr
        facts = json.loads(json.loads(match[1])["msg"])
        self.groups: dict[str, list[str]] = facts["groups"]
        self.addresses: dict[str, str] = facts["addresses"]
        self.addresses6: dict[str, str] = facts["addresses6"]
        self.flows: list[dict[str, Any]] = facts["flows"]
        self.edge_name: str = facts["edge_name"]
        self.ports: dict[str, int] = facts["ports"]
        self.secrets_file = Path(facts["secrets_file"])
        self.workers: int = int(facts["workers"])
        self.ssh_options: list[str] = [*facts["ssh"].split(), "-o", "ControlMaster=auto", "-o", "ControlPersist=60s"]
        self.ssh_options += ["-o", f"ControlPath=/tmp/nf-{os.getpid()}-%C"]
        self._hosts: dict[str, Any] = {}

    def first(self, group: str) -> Any:
        return self.host(self.groups[group][0])

    def host(self, name: str) -> Any:
        """A machine; asked anew after a reboot."""
        if name not in self._hosts:
            arguments = " ".join(self.ssh_options)
            self._hosts[name] = testinfra.get_host(f"ssh://{name}", ssh_extra_args=arguments)
        return self._hosts[name]

    def shell(self, name: str, command: str, text: str = "", seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine with `text` as its input; what is in it never stands on a command line."""
        line = ["ssh", *self.ssh_options, name, command]
        return subprocess.run(line, input=text, capture_output=True, text=True, timeout=seconds, check=False)

    def ok(self, name: str, command: str, text: str = "", seconds: float = 60) -> str:
        done = self.shell(name, command, text, seconds)
        assert done.returncode == 0, f"{name}: {command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return done.stdout

    @contextmanager
    def free_egress(self, machine: str) -> Iterator[None]:
        """Whoever broke into a machine opens its way out: what the targets let in is asked, not what the source lets out."""
        both = (
            "for table in iptables ip6tables; do $table -w {} OUTPUT -p tcp -m comment --comment test -j ACCEPT; done"
        )
        self.ok(machine, both.format("-I") if machine in self.groups["fleet"] else "true")
        try:
            yield
        finally:
            self.ok(machine, both.format("-D") if machine in self.groups["fleet"] else "true")

    @property
    def outsider(self) -> str:
        return self.groups["outside"][0]

    @property
    def admin(self) -> str:
        """The machine on which root makes API keys."""
        return self.groups["api"][0]

    @cached_property
    def ca(self) -> str:
        return self.ok(self.admin, "cat /etc/neoforge/pki/ca.crt")

    def queue(self) -> dict[str, int]:
        """Messages by state."""
        report = json.loads(self.shell(self.admin, "neoforge status --json").stdout or '{"queue": []}')
        return {row["state"]: row["size"] for row in report["queue"]}

    def wait_for_empty_queue(self, seconds: float) -> float:
        """How long it took; fails after `seconds`."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            queue = self.queue()
            if queue and not any(queue.values()):
                return time.monotonic() - started
            time.sleep(0.5)
        pytest.fail(f"after {seconds:g} s the queue still holds {self.queue()}")

    def arrivals(self) -> list[dict[str, Any]]:
        """The sink's journal, a line for each message that it took."""
        text = self.ok(self.outsider, "cat /var/lib/private/sink/journal")
        return [json.loads(line) for line in text.splitlines()]


@cache
def inventory_groups() -> dict[str, list[str]]:
    """The inventory's groups with all their machines."""
    command = ["ansible-inventory", "-i", INVENTORY, "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = json.loads(done.stdout)

    def machines(group: str) -> list[str]:
        entry = listed.get(group, {})
        names = entry.get("hosts", []) + [name for child in entry.get("children", []) for name in machines(child)]
        return list(dict.fromkeys(names))

    return {group: machines(group) for group in listed if group != "_meta"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "each_machine" in metafunc.fixturenames:
        metafunc.parametrize("each_machine", inventory_groups()["fleet"])


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return Fleet()


Show = Callable[[str], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Say a figure, whether or not the test's output is captured."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="")  # noqa: T201 - the figure is for whoever runs the tests

    return say


@pytest.fixture(scope="session")
def key(fleet: Fleet) -> Iterator[str]:
    """An API key, revoked at the end."""
    done = fleet.shell(fleet.admin, "neoforge keys create --user fleet-tests --name tests")
    match = re.search(r"Key (\d+) of", done.stderr)
    assert match, done.stderr
    yield done.stdout.strip()
    fleet.ok(fleet.admin, f"neoforge keys revoke {match[1]}")


@dataclass(frozen=True)
class Edge:
    """The edge as a client outside of the fleet sees it."""

    fleet: Fleet
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

    def ask(self, path: str, body: bytes | None = None, **spec: Any) -> Answer:
        """GET, or POST where there is a body."""
        given = {"do": "request", "host": self.fleet.edge_name, "ca": self.fleet.ca, "path": path, **spec}
        if body is not None:
            given["body"] = base64.b64encode(body).decode()
        if body is not None or "size_bytes" in spec:
            given.setdefault("method", "POST")
        return Answer(**json.loads(self.fleet.ok(self.fleet.outsider, "python3 /root/client.py", json.dumps(given))))

    def post(self, message: Any, **headers: str) -> Answer:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask(EMAILS, body, headers={**self.headers, **names})

    def load(self, run: str, count: int, **more: Any) -> str:
        """What client.py is given to send `count` messages, each to somebody else; `run` tells them from others."""
        given = {
            "do": "load",
            "host": self.fleet.edge_name,
            "ca": self.fleet.ca,
            "path": EMAILS,
            "headers": self.headers,
        }
        return json.dumps({**given, "run": run, "count": count, "threads": 8, **more})

    def delivered(self, email_id: str, seconds: float = 30) -> Any:
        """The message, once it is done."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            answer = self.ask(f"{EMAILS}/{email_id}", headers=self.headers)
            email = json.loads(answer.text)
            if answer.status == 200 and email["state"] == "done":
                return email
            time.sleep(0.5)
        pytest.fail(f"{email_id} is not done after {seconds:g} s: {answer.text}")


@pytest.fixture(scope="session")
def edge(fleet: Fleet, key: str) -> Edge:
    fleet.ok(fleet.outsider, "cat >/root/client.py", (Path(__file__).parent / "client.py").read_text())
    return Edge(fleet, key)
