"""The service's units as they run: sandboxed, unprivileged, their secrets out of everybody's sight."""

from __future__ import annotations

import json
import re

import pytest

from .conftest import Edge, Fleet

EXPOSURE_LIMIT = 1.5
UNITS = [
    "neoforge-api.service",
    "neoforge-bounces.service",
    "neoforge-worker@1.service",
    "neoforge-worker@2.service",
]


def properties(fleet: Fleet, unit: str, *names: str) -> dict[str, str]:
    text = fleet.ok(fleet.admin, f"systemctl show {unit} --property={','.join(names)}")
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_runs_and_starts_with_the_machine(fleet: Fleet, unit: str) -> None:
    service = fleet.host(fleet.admin).service(unit)
    assert service.is_running
    assert service.is_enabled


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_denied_what_it_does_not_need(fleet: Fleet, unit: str) -> None:
    text = fleet.ok(fleet.admin, f"systemd-analyze security --no-pager {unit}")
    match = re.search(r"Overall exposure level for .*: ([\d.]+) ", text)
    assert match, text
    assert float(match[1]) <= EXPOSURE_LIMIT


@pytest.mark.parametrize("unit", UNITS)
def test_every_process_of_a_unit_is_unprivileged(fleet: Fleet, unit: str) -> None:
    group = properties(fleet, unit, "ControlGroup")["ControlGroup"]
    users = fleet.ok(fleet.admin, f"ps -o user:32= -p $(paste -sd, '/sys/fs/cgroup{group}/cgroup.procs')").split()
    assert set(users) == {re.sub("@.*|[.]service", "", unit)}


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_comes_back_however_long_it_takes_and_gets_the_time_to_finish(fleet: Fleet, unit: str) -> None:
    shown = properties(fleet, unit, "Restart", "StartLimitIntervalUSec", "TimeoutStopUSec", "KillMode")
    assert shown["Restart"] == "always"
    assert shown["StartLimitIntervalUSec"] == "0"
    assert shown["KillMode"] == "mixed"
    assert shown["TimeoutStopUSec"] == "40s"


def test_secrets_are_readable_by_root_alone(fleet: Fleet) -> None:
    listing = fleet.ok(fleet.admin, "find /etc/neoforge/credentials -printf '%m %U %y\\n' | sort -u").splitlines()
    assert set(listing) == {"700 0 d", "600 0 f"}


def test_the_running_release_is_whole_and_belongs_to_root(fleet: Fleet) -> None:
    host = fleet.host(fleet.admin)
    current = host.file("/opt/neoforge/current")
    assert current.is_symlink
    assert host.file("/opt/neoforge/current/.complete").exists
    others = fleet.ok(
        fleet.admin,
        "find /opt/neoforge -path /opt/neoforge/backups -prune -o ! -type l '(' ! -user root -o -perm /022 ')' -print | head",
    )
    assert others == ""
    releases = fleet.ok(fleet.admin, "ls /opt/neoforge/releases").split()
    assert 1 <= len(releases) <= 3


def test_the_operators_command_runs_without_privileges(fleet: Fleet) -> None:
    shown = fleet.ok(fleet.admin, "neoforge status --json")
    assert {row["state"] for row in json.loads(shown)["queue"]} >= {"queued", "leased", "scheduled", "uncertain"}
    assert json.loads(shown)["workers_listening"] == fleet.workers * len(fleet.groups["worker"])
    refused = fleet.shell(fleet.admin, "runuser -u nobody -- /usr/local/sbin/neoforge status")
    assert refused.returncode == 1
    assert "root" in refused.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_arq_says_that_a_worker_is_alive(fleet: Fleet, number: int) -> None:
    assert "Health check successful" in fleet.shell(fleet.admin, f"neoforge-arq {number} --check").stderr


def test_a_worker_that_is_not_there_is_not_alive(fleet: Fleet) -> None:
    assert fleet.shell(fleet.admin, "neoforge-arq 99 --check").returncode == 1


def test_a_message_is_delivered_and_its_timeline_says_how(fleet: Fleet, edge: Edge) -> None:
    answer = edge.post({"to": ["ada@example.com", "smtp-550@example.com"], "subject": "Two", "text": "One of them."})
    assert answer.status == 202
    email = edge.delivered(json.loads(answer.text)["id"])
    status = {recipient["recipient"]: recipient["status"] for recipient in email["recipients"]}
    assert status["ada@example.com"] == "sent"
    assert status["smtp-550@example.com"] in {"failed", "bounced"}
    assert [event["type"] for event in email["timeline"]][:2] == ["accepted", "attempt"]


def test_the_api_itself_speaks_tls_only(fleet: Fleet) -> None:
    address = f"{fleet.addresses[fleet.admin]}:{fleet.ports['api']}"
    refused = fleet.shell(
        fleet.admin, f"python3 -c 'import urllib.request; urllib.request.urlopen(\"http://{address}/\")'"
    )
    assert refused.returncode != 0
