"""Redis as it runs: TLS only, users with few rights, kept data, and its return from a kill."""

from __future__ import annotations

import time

import pytest

from .conftest import Fleet

CREDENTIAL = "/etc/neoforge/credentials/api/redis_password"


@pytest.fixture(scope="module")
def machine(fleet: Fleet) -> str:
    return fleet.groups["redis"][0]


def cli(fleet: Fleet, machine: str, command: str, user: str = "") -> str:
    """What Redis answers over TLS; as `user`, by the service's password, where the API runs on the same machine."""
    login = f"--user {user} --no-auth-warning" if user else ""
    secret = f"REDISCLI_AUTH=$(cat {CREDENTIAL}) " if user else ""
    port = fleet.ports["redis"]
    done = fleet.shell(
        machine, f"{secret}redis-cli --tls --cacert /etc/neoforge/pki/ca.crt -h {machine} -p {port} {login} {command}"
    )
    return (done.stdout + done.stderr).strip()


def test_without_a_password_nothing_is_answered(fleet: Fleet, machine: str) -> None:
    assert "NOAUTH" in cli(fleet, machine, "ping")


def test_without_tls_nothing_is_answered(fleet: Fleet, machine: str) -> None:
    done = fleet.shell(machine, f"timeout 5 redis-cli -h {machine} -p {fleet.ports['redis']} ping")
    assert "PONG" not in done.stdout
    assert "NOAUTH" not in done.stdout


def test_the_service_s_user_works_and_may_not_administrate(fleet: Fleet, machine: str) -> None:
    assert cli(fleet, machine, "ping", "neoforge") == "PONG"
    assert "redis_version" in cli(fleet, machine, "info server", "neoforge")
    for command in ("config get maxmemory", "flushall", "acl list", "shutdown", "keys '*'"):
        assert "NOPERM" in cli(fleet, machine, command, "neoforge"), command


@pytest.mark.parametrize(
    "line",
    ["maxmemory_policy:noeviction", "aof_enabled:1", "aof_last_write_status:ok"],
)
def test_it_keeps_what_it_holds(fleet: Fleet, machine: str, line: str) -> None:
    assert line in cli(fleet, machine, "info", "neoforge")


def test_passwords_are_not_on_the_machine_in_the_clear(fleet: Fleet, machine: str) -> None:
    found = fleet.shell(machine, f"grep -rlFf {CREDENTIAL} /etc/redis").stdout
    assert found == ""


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
