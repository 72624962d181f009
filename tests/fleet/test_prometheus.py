"""Prometheus scrapes what it should, the exporters see their servers, and nothing of it is public."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import yaml

from .conftest import ROOT, Edge, Fleet

# Group -> units that a machine of it runs.
UNITS = {
    "fleet": ["prometheus-exporter-exporter", "prometheus-node-exporter"],
    "postgresql": ["prometheus-postgres-exporter"],
    "replica": ["prometheus-postgres-exporter"],
    "redis": ["prometheus-redis-exporter"],
    "loadbalancer": ["prometheus-nginx-exporter"],
    "monitoring": ["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter"],
}
JOBS = {"neoforge-api", "neoforge-worker", "postgres", "redis", "nginx", "edge", "node", "alertmanager", "prometheus"}
ON_LOOPBACK = ["prometheus", "alertmanager", "api_metrics", "nginx_status"]
ON_LOOPBACK += [f"{name}_exporter" for name in ("node", "postgresql", "redis", "nginx", "blackbox")]
RULES = sorted((ROOT / "files/prometheus").glob("*.rules.yml"))
# Metrics of alerts that a healthy fleet of this inventory need not have, each with the reason.
NOT_ALWAYS = {
    "database_replication_degraded": "only where there is a replica",
    "emails_duplicate_total": "counts from the first message that is sent twice",
    "emails_failed_total": "counts from the first failure",
    "maxmemory_policy": "a label",
    "neoforge_backup_last_success_timestamp_seconds": "comes with the first backup",
    "neoforge_journal_sent_timestamp_seconds": "only where there is another machine to send to",
    "neoforge_unit_failed": "only where a unit failed",
    "node_timex_sync_status": "a container may not ask the clock",
    "pg_replication_slot_slot_is_active": "only where there is a replica",
}


@pytest.fixture(scope="module", autouse=True)
def everything_is_scraped_again(fleet: Fleet) -> None:
    """Tests before this one stopped things; the next scrape of all is at most 15 s away."""
    give_up = time.monotonic() + 40
    now = query(fleet, "vector(time())")[0]["value"][1]
    down = f"up == 0 or pg_up == 0 or redis_up == 0 or email_database_up == 0 or timestamp(up) < {now}"
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
    assert {row["metric"]["job"] for row in up} == JOBS
    assert [row["metric"] for row in up if row["value"][1] != "1"] == []
    workers = [row for row in up if row["metric"]["job"] == "neoforge-worker"]
    assert len(workers) == fleet.workers * len(fleet.groups["worker"])
    nodes = {row["metric"]["instance"] for row in up if row["metric"]["job"] == "node"}
    assert nodes == set(fleet.groups["fleet"])


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


def units_of(fleet: Fleet, machine: str) -> list[str]:
    return sorted({unit for group, units in UNITS.items() if machine in fleet.groups.get(group, []) for unit in units})


def test_the_units_are_sandboxed(fleet: Fleet, each_machine: str) -> None:
    for unit in units_of(fleet, each_machine):
        names = "NoNewPrivileges,ProtectSystem,CapabilityBoundingSet,User"
        shown = fleet.ok(each_machine, f"systemctl show {unit} --property={names}").splitlines()
        assert set(shown) == {
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "CapabilityBoundingSet=",
            "User=prometheus",
        }
        # 3.0, which it takes as 30.
        judged = fleet.shell(each_machine, f"systemd-analyze security --no-pager --threshold=30 {unit}.service")
        assert judged.returncode == 0, judged.stdout


def test_nothing_of_it_but_the_metrics_port_listens_to_the_world(fleet: Fleet, each_machine: str) -> None:
    wanted = {fleet.ports[name] for name in ON_LOOPBACK}
    wanted |= {fleet.ports["api_metrics"] + worker for worker in range(1, fleet.workers + 1)}
    listening = fleet.ok(each_machine, "ss -Hltn | awk '{print $4}'").split()
    ours = {line.rpartition(":")[0] for line in listening if int(line.rpartition(":")[2]) in wanted}
    assert ours == {"127.0.0.1"}


@pytest.mark.parametrize(("certificate", "answers"), [("prometheus", True), ("exporters", False), ("", False)])
def test_the_metrics_port_answers_prometheus_alone(fleet: Fleet, certificate: str, answers: bool) -> None:
    """Not even another certificate of the fleet's authority will do."""
    pki = "/etc/neoforge/pki"
    shown = f"--cert {pki}/{certificate}.crt --key {pki}/{certificate}.key" if certificate else ""
    asker = fleet.groups["monitoring"][0]
    with fleet.free_egress(asker):
        for machine in fleet.groups["fleet"]:
            url = f"https://{machine}:{fleet.ports['metrics']}/proxy?module=node"
            done = fleet.shell(asker, f"curl -s --cacert {pki}/ca.crt {shown} '{url}'")
            assert ("node_boot_time_seconds" in done.stdout) == answers, (machine, done.returncode, done.stdout[:500])


def test_every_alert_has_its_figures(fleet: Fleet, edge: Edge) -> None:
    """An alert on a metric that nobody has never fires: each name in an expression is known to the live Prometheus."""
    # A worker counts from its first message.
    assert edge.post({"to": "figures@example.com", "subject": "Figures", "text": "For them."}).status == 202
    give_up = time.monotonic() + 40
    while not query(fleet, "emails_sent_total") and time.monotonic() < give_up:
        time.sleep(1)
    text = " ".join(
        rule["expr"]
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    )
    wanted = set(
        re.findall(r"\b(?:up|[a-z]+(?:_[a-z0-9]+)+)\b(?=\s*[{\[)<>=/]|\s+(?:and|unless|or|offset|-|>)|\s*$)", text)
    )
    known = {name for name in wanted if query(fleet, f"count_over_time({name}[1d])")}
    assert wanted - known - set(NOT_ALWAYS) == set()
