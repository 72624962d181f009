"""Redis as it runs: two instances, TLS only, a user a purpose, what is kept and what is evicted, and the return from a kill."""

from __future__ import annotations

import json
import shlex
import time

import pytest

from .conftest import Fleet

# Says commands over TLS, one a line of standard input, and prints the first line of each answer, or its value.
ASK = r"""
import socket, ssl, sys
name, port, plain, *commands = sys.argv[1:]
raw = socket.create_connection((name, int(port)), 10)
if plain == "tls":
    raw = ssl.create_default_context(cafile="/etc/neoforge/pki/ca.crt").wrap_socket(raw, server_hostname=name)
talk = raw.makefile("rwb")


def answer():
    head = talk.readline().decode().rstrip()
    if head[:1] == "$" and head != "$-1":
        return talk.read(int(head[1:]) + 2)[:-2].decode()
    if head[:1] == "*":
        return " ".join(answer() for _ in range(int(head[1:])))
    return head


for line in [*sys.stdin.read().splitlines(), *commands]:
    talk.write(line.encode() + b"\r\n")
    talk.flush()
    said = answer()
print(said)
"""
# Where a user's password lies: the groups whose machines may have it, and the file.
PASSWORDS = {
    "neoforge_api": (["api"], "/etc/neoforge/credentials/api/redis_password"),
    "neoforge_worker": (["worker"], "/etc/neoforge/credentials/worker/redis_password"),
    "exporter": (["redis", "monitoring"], "/etc/neoforge/credentials/exporters/redis_passwords.json"),
}


def password_of(fleet: Fleet, user: str) -> tuple[str, str]:
    """A machine that has the user's password, and the password."""
    groups, file = PASSWORDS[user]
    for group in groups:
        done = fleet.shell(fleet.groups[group][0], f"cat {file}")
        if done.returncode == 0:
            text = done.stdout.strip()
            return fleet.groups[group][0], next(iter(json.loads(text).values())) if text.startswith("{") else text
    pytest.fail(f"no machine of {groups} has {file}")


@pytest.fixture(scope="module")
def machine(fleet: Fleet) -> str:
    return fleet.groups["redis"][0]


def ask(fleet: Fleet, command: str, user: str = "", port: str = "redis", speak: str = "tls") -> str:
    """What an instance answers to `user`, asked from a machine that has its password; the password travels on standard input."""
    asker, password = password_of(fleet, user) if user else (fleet.admin, "")
    login = f"auth {user} {password}\n" if user else ""
    fleet.ok(asker, "cat >/run/ask.py", ASK)
    arguments = [fleet.groups["redis"][0], str(fleet.ports[port]), speak, command]
    with fleet.free_egress(asker):
        done = fleet.shell(asker, f"python3 /run/ask.py {shlex.join(arguments)}", login)
    return (done.stdout or done.stderr.strip().splitlines()[-1]).strip()


@pytest.mark.parametrize("port", ["redis", "redis_cache"])
def test_without_a_password_nothing_is_answered(fleet: Fleet, port: str) -> None:
    assert ask(fleet, "ping", port=port).startswith("-NOAUTH")


@pytest.mark.parametrize("port", ["redis", "redis_cache"])
def test_without_tls_nothing_is_answered(fleet: Fleet, port: str) -> None:
    answer = ask(fleet, "ping", port=port, speak="plain")
    assert answer == "" or "ConnectionResetError" in answer


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("neoforge_api", "get x"),
        ("neoforge_api", "set x 1"),
        ("neoforge_api", "publish other:channel x"),
        ("neoforge_api", "subscribe email_queue:doorbell"),
        ("neoforge_api", "info"),
        ("neoforge_worker", "config get maxmemory"),
        ("neoforge_worker", "flushall"),
        ("neoforge_worker", "acl list"),
        ("neoforge_worker", "shutdown"),
        ("neoforge_worker", "keys *"),
        ("exporter", "get x"),
        ("exporter", "config set maxmemory 0"),
        ("exporter", "publish email_queue:doorbell x"),
    ],
)
def test_a_user_may_do_nothing_beyond_its_purpose(fleet: Fleet, user: str, command: str) -> None:
    assert ask(fleet, command, user).startswith("-NOPERM")


def test_each_user_may_do_what_it_is_for(fleet: Fleet) -> None:
    assert ask(fleet, "publish email_queue:doorbell x", "neoforge_api").startswith(":")
    assert ask(fleet, "set fleet-test 1", "neoforge_worker") == "+OK"
    assert ask(fleet, "del fleet-test", "neoforge_worker") == ":1"
    assert "redis_version" in ask(fleet, "info server", "exporter")


@pytest.mark.parametrize(
    ("port", "settings"),
    [
        ("redis", {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec"}),
        ("redis_cache", {"maxmemory-policy": "allkeys-lru", "appendonly": "no", "save": ""}),
    ],
)
def test_the_queue_keeps_what_it_holds_and_the_cache_does_not(
    fleet: Fleet, port: str, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        assert ask(fleet, f"config get {name}", "exporter", port) == f"{name} {value}".strip()


def test_a_full_queue_refuses_and_forgets_nothing(fleet: Fleet) -> None:
    limit = int(ask(fleet, "config get maxmemory", "exporter").split()[1])
    assert ask(fleet, "set fleet-test kept", "neoforge_worker") == "+OK"
    try:
        assert ask(fleet, f"setrange fleet-test-large {limit} x", "neoforge_worker") in (f":{limit + 1}", "")
        assert ask(fleet, "set fleet-test-more x", "neoforge_worker").startswith("-OOM")
        assert ask(fleet, "get fleet-test", "neoforge_worker") == "kept"
    finally:
        ask(fleet, "del fleet-test fleet-test-large fleet-test-more", "neoforge_worker")


def test_passwords_are_not_on_the_machine_in_the_clear(fleet: Fleet, machine: str) -> None:
    for user in PASSWORDS:
        assert fleet.shell(machine, "grep -rlF -f - /etc/redis", password_of(fleet, user)[1]).stdout == ""


def test_the_package_s_own_instance_is_off(fleet: Fleet, machine: str) -> None:
    assert fleet.shell(machine, "systemctl is-enabled redis-server").stdout.strip() == "masked"


@pytest.mark.parametrize("name", ["queue", "cache"])
def test_the_sandbox_stands(fleet: Fleet, machine: str, name: str) -> None:
    fleet.ok(machine, f"systemd-analyze security --no-pager --threshold=15 redis-server@{name} >/dev/null")


def test_it_comes_back_from_a_kill_with_its_data(fleet: Fleet, machine: str) -> None:
    unit = "redis-server@queue"
    ask(fleet, "set fleet-test kept", "neoforge_worker")
    time.sleep(1.5)  # the append-only file is synced every second
    fleet.ok(machine, f"kill -KILL $(systemctl show --property=MainPID --value {unit})")
    deadline = time.monotonic() + 30
    while ask(fleet, "get fleet-test", "neoforge_worker") != "kept":
        assert time.monotonic() < deadline, fleet.ok(machine, f"journalctl -n 30 -u {unit}")
        time.sleep(0.5)
    ask(fleet, "del fleet-test", "neoforge_worker")
