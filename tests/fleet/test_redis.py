"""Redis as it runs: TLS only, users with few rights, kept data, and its return from a kill."""

from __future__ import annotations

import shlex
import time

import pytest

from .conftest import Fleet

CREDENTIAL = "/etc/neoforge/credentials/api/redis_password"


@pytest.fixture(scope="module")
def machine(fleet: Fleet) -> str:
    return fleet.groups["redis"][0]


ASK = """
import shlex, sys
import redis
host, port, user = sys.argv[1:4]
password = open("/etc/neoforge/credentials/api/redis_password").read().strip() if user else None
try:
    client = redis.Redis(
        host,
        int(port),
        username=user or None,
        password=password,
        ssl=True,
        ssl_ca_certs="/etc/neoforge/pki/ca.crt",
        decode_responses=True,
    )
    client.response_callbacks.clear()
    print(client.execute_command(*shlex.split(sys.argv[4])))
except redis.RedisError as error:
    print(type(error).__name__, error)
"""


def cli(fleet: Fleet, machine: str, command: str, user: str = "") -> str:
    """What Redis answers over TLS to a machine of the API; as `user`, by the password that the API has there."""
    python = "/opt/neoforge/current/bin/python"
    return fleet.ok(
        fleet.admin, f"{python} - {machine} {fleet.ports['redis']} '{user}' {shlex.quote(command)}", ASK
    ).strip()


def test_without_a_password_nothing_is_answered(fleet: Fleet, machine: str) -> None:
    assert "AuthenticationError" in cli(fleet, machine, "ping")


def test_without_tls_nothing_is_answered(fleet: Fleet, machine: str) -> None:
    plain = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); "
    plain += "s.sendall(b'PING\\r\\n'); print(s.recv(99)[:1] in (b'+', b'-'))"
    done = fleet.shell(fleet.admin, f'python3 -c "{plain}" {machine} {fleet.ports["redis"]}')
    assert done.stdout.strip() == "False" or "ConnectionResetError" in done.stderr


def test_the_service_s_user_works_and_may_not_administrate(fleet: Fleet, machine: str) -> None:
    assert cli(fleet, machine, "ping", "neoforge") == "PONG"
    assert "redis_version" in cli(fleet, machine, "info server", "neoforge")
    for command in ("config get maxmemory", "flushall", "acl list", "shutdown", "keys '*'"):
        assert "NoPermissionError" in cli(fleet, machine, command, "neoforge"), command


@pytest.mark.parametrize(
    "line",
    ["maxmemory_policy:noeviction", "aof_enabled:1", "aof_last_write_status:ok"],
)
def test_it_keeps_what_it_holds(fleet: Fleet, machine: str, line: str) -> None:
    assert line in cli(fleet, machine, "info", "neoforge")


def test_passwords_are_not_on_the_machine_in_the_clear(fleet: Fleet, machine: str) -> None:
    password = fleet.ok(fleet.admin, f"cat {CREDENTIAL}")
    assert fleet.shell(machine, "grep -rlF -f - /etc/redis", password).stdout == ""


def test_the_package_s_own_instance_is_off(fleet: Fleet, machine: str) -> None:
    assert fleet.shell(machine, "systemctl is-enabled redis-server").stdout.strip() == "masked"


def test_the_sandbox_stands(fleet: Fleet, machine: str) -> None:
    fleet.ok(machine, "systemd-analyze security --no-pager --threshold=15 redis-server@queue >/dev/null")


def test_it_comes_back_from_a_kill_with_its_data(fleet: Fleet, machine: str) -> None:
    unit = "redis-server@queue"
    cli(fleet, machine, "set fleet-test kept", "neoforge")
    time.sleep(1.5)  # the append-only file is synced every second
    fleet.ok(machine, f"kill -KILL $(systemctl show --property=MainPID --value {unit})")
    deadline = time.monotonic() + 30
    while cli(fleet, machine, "get fleet-test", "neoforge") != "kept":
        assert time.monotonic() < deadline, fleet.ok(machine, f"journalctl -n 30 -u {unit}")
        time.sleep(0.5)
    cli(fleet, machine, "del fleet-test", "neoforge")
