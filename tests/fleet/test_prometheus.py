"""Prometheus scrapes what it should, the exporters see their servers, and nothing of it is public."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from .conftest import Fleet

UNITS = ["prometheus", "prometheus-node-exporter", "prometheus-postgres-exporter", "prometheus-redis-exporter"]


@pytest.fixture(scope="module", autouse=True)
def everything_is_scraped_again(fleet: Fleet) -> None:
    """Tests before this one stopped things; the next scrape of all is at most 15 s away."""
    give_up = time.monotonic() + 40
    down = "up == 0 or pg_up == 0 or redis_up == 0 or email_database_up == 0"
    while query(fleet, down) and time.monotonic() < give_up:
        time.sleep(1)


def query(fleet: Fleet, expression: str) -> list[Any]:
    """The result of an instant query, asked on the machine itself."""
    program = (
        "import sys, urllib.parse, urllib.request; print(urllib.request.urlopen("
        f"'http://127.0.0.1:{fleet.ports['prometheus']}/api/v1/query?query=' + urllib.parse.quote(sys.stdin.read())"
        ").read().decode())"
    )
    answer = json.loads(fleet.ok(fleet.groups["monitoring"][0], f'python3 -c "{program}"', expression))
    assert answer["status"] == "success"
    result: list[Any] = answer["data"]["result"]
    return result


def test_every_job_is_scraped_and_up(fleet: Fleet) -> None:
    up = query(fleet, "up")
    assert {row["metric"]["job"] for row in up} >= {"neoforge-api", "neoforge-worker", "postgres", "redis", "node"}
    assert [row["metric"] for row in up if row["value"][1] != "1"] == []
    workers = [row for row in up if row["metric"]["job"] == "neoforge-worker"]
    assert len(workers) == fleet.workers * len(fleet.groups["worker"])


@pytest.mark.parametrize("expression", ["pg_up", "redis_up", "email_database_up"])
def test_what_an_exporter_reports_on_is_up(fleet: Fleet, expression: str) -> None:
    assert {row["value"][1] for row in query(fleet, expression)} == {"1"}


@pytest.mark.parametrize("metric", ["email_queue_size", "email_oldest_age_seconds"])
def test_the_queue_is_measured_by_state(fleet: Fleet, metric: str) -> None:
    assert {row["metric"]["state"] for row in query(fleet, metric)} >= {"queued", "leased", "scheduled", "uncertain"}


def test_the_alerts_are_loaded_and_none_is_broken(fleet: Fleet) -> None:
    assert query(fleet, "prometheus_config_last_reload_successful")[0]["value"][1] == "1"
    groups = query(fleet, 'prometheus_rule_group_rules{rule_group=~".*neoforge.rules.yml.*"}')
    assert sum(int(row["value"][1]) for row in groups) >= 13
    assert [row for row in query(fleet, "prometheus_rule_evaluation_failures_total") if row["value"][1] != "0"] == []


def test_the_exporters_rights_end_at_statistics(fleet: Fleet) -> None:
    command = 'cd /; runuser -u postgres -- psql -XAtq -d neoforge_prod -c "{}"'
    machine = fleet.groups["postgresql"][0]
    member = "select string_agg(b.rolname, ',') from pg_auth_members m join pg_roles a on a.oid = m.member "
    member += "join pg_roles b on b.oid = m.roleid where a.rolname = 'neoforge_exporter'"
    assert fleet.ok(machine, command.format(member)).strip() == "pg_monitor"
    readable = "select has_table_privilege('neoforge_exporter', 'email_messages', 'select')"
    assert fleet.ok(machine, command.format(readable)).strip() == "f"


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_sandboxed_and_has_no_secret_on_its_command_line(fleet: Fleet, unit: str) -> None:
    machine = fleet.groups["monitoring"][0]
    names = "NoNewPrivileges,ProtectSystem,CapabilityBoundingSet,User"
    shown = fleet.ok(machine, f"systemctl show {unit} --property={names}").splitlines()
    assert set(shown) == {"NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "User=prometheus"}


def test_nothing_of_the_monitoring_listens_to_the_world(fleet: Fleet) -> None:
    wanted = {fleet.ports[name] for name in ("prometheus", "node_exporter", "postgresql_exporter", "redis_exporter")}
    listening = fleet.ok(fleet.groups["monitoring"][0], "ss -Hltn | awk '{print $4}'").split()
    ours = {line.rpartition(":")[0] for line in listening if int(line.rpartition(":")[2]) in wanted}
    assert ours == {"127.0.0.1"}
