"""A drill: what the guide's alerts are for is done to the live fleet, and each of them reaches those who should hear of it.

Prometheus loads a copy of the rules for it, in which minutes are seconds (`for`) or one minute (the window of a rate);
thresholds stay as they are. Afterwards every alert is told to be over, and the fleet delivers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .conftest import ROOT, Edge, Fleet
from .test_prometheus import query

RULES = sorted((ROOT / "files/prometheus").glob("*.rules.yml"))
RELOAD = "systemctl reload prometheus"
WITHOUT_A_WORKER = {"EmailWorkerDown", "EmailNoWorker", "HighEmailQueueSize"}
WITHOUT_SERVERS = {"EmailSystemDown", "DatabaseConnectionFailure", "RedisConnectionFailure"}
# Above the threshold of HighEmailQueueSize.
MESSAGES = 1100


def load_rules(fleet: Fleet, change: Callable[[str], str]) -> None:
    for machine in fleet.groups["monitoring"]:
        for file in RULES:
            fleet.ok(machine, f"cat >/etc/prometheus/rules/{file.name}", change(file.read_text()))
        fleet.ok(machine, RELOAD)


@pytest.fixture(scope="module")
def quick_rules(fleet: Fleet) -> Iterator[None]:
    load_rules(fleet, lambda text: re.sub(r"for: \d+[mhd]\b", "for: 5s", text).replace("[5m]", "[1m]"))
    yield
    load_rules(fleet, lambda text: text)


def told(fleet: Fleet, path: str, status: str, since: int = 0) -> set[str]:
    """Names of the alerts with this status that a path of the receiver was told, after its first `since` calls."""
    calls = [json.loads(line) for line in journal(fleet, "alerts")[since:]]
    return {
        alert["labels"]["alertname"]
        for call in calls
        if call["path"] == path
        for alert in call["body"]["alerts"]
        if alert["status"] == status
    }


def journal(fleet: Fleet, unit: str) -> list[str]:
    return fleet.ok(fleet.outsider, f"cat /var/lib/private/{unit}/journal || true").splitlines()


def wait_until(what: str, done: Callable[[], Any], seconds: float = 90) -> None:
    give_up = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < give_up, f"after {seconds:g} s: not {what}"
        time.sleep(1)


def stop(fleet: Fleet, group: str, pattern: str, undo: ExitStack) -> None:
    """Stop what runs of a unit on every machine of a group; `undo` starts it again."""
    for machine in fleet.groups[group]:
        listed = fleet.ok(machine, f"systemctl list-units --plain --no-legend --state=active '{pattern}'")
        units = " ".join(line.split()[0] for line in listed.splitlines())
        assert units, f"{machine} runs no {pattern}"
        fleet.ok(machine, f"systemctl stop {units}", seconds=120)
        undo.callback(fleet.ok, machine, f"systemctl start {units}")


def send_refused(fleet: Fleet, edge: Edge, run: str, count: int) -> None:
    """Messages that the provider refuses for good, each to somebody else."""
    spec = edge.load(run, count, to="smtp-550@{}.example.com", seconds=1, patience_seconds=60)
    answer = fleet.ok(fleet.outsider, "python3 /root/client.py", spec, seconds=90)
    assert json.loads(answer.splitlines()[-1])["failures"] == []


@pytest.mark.usefixtures("quick_rules")
def test_every_alert_of_the_guide_reaches_its_receivers(fleet: Fleet, edge: Edge) -> None:
    since, mails = len(journal(fleet, "alerts")), len(journal(fleet, "alerts-mail"))
    run = f"drill-{int(time.time())}"

    def reach(names: set[str]) -> Callable[[], bool]:
        return lambda: names <= told(fleet, "/alerts", "firing", since)

    with ExitStack() as undo:
        stop(fleet, "worker", "neoforge-worker@*", undo)
        send_refused(fleet, edge, f"{run}-first", MESSAGES)
        wait_until(f"told of {WITHOUT_A_WORKER}", reach(WITHOUT_A_WORKER))
    # The workers are back and their provider refuses: what they have counted is seen once it grows.
    rounds = iter(range(1000))

    def refused() -> bool:
        send_refused(fleet, edge, f"{run}-{next(rounds)}", 200)
        return reach({"HighEmailErrorRate"})()

    wait_until("told of HighEmailErrorRate", refused)
    fleet.wait_for_empty_queue(60)

    with ExitStack() as undo:
        stop(fleet, "api", "neoforge-api.service", undo)
        stop(fleet, "redis", "redis-server@*", undo)
        stop(fleet, "postgresql", "postgresql@*", undo)
        wait_until(f"told of {WITHOUT_SERVERS}", reach(WITHOUT_SERVERS))

    guide = WITHOUT_A_WORKER | WITHOUT_SERVERS | {"HighEmailErrorRate"}
    wait_until("told that all is over", lambda: guide <= told(fleet, "/alerts", "resolved", since), 150)
    assert not guide & {row["metric"]["alertname"] for row in query(fleet, 'ALERTS{alertstate="firing"}')}
    arrived = [json.loads(line) for line in journal(fleet, "alerts-mail")[mails:]]
    assert len(arrived) >= len(guide)
    assert {recipient for mail in arrived for recipient in mail["recipients"]} == {"operators@example.com"}
    answer = edge.post({"to": f"{run}@example.com", "subject": "Well again", "text": "After the drill."})
    assert answer.status == 202, answer.text
    fleet.wait_for_empty_queue(60)
    assert f"{run}@example.com" in [recipient for mail in fleet.arrivals() for recipient in mail["recipients"]]


def test_the_watchdog_arrives_by_a_way_of_its_own(fleet: Fleet) -> None:
    assert told(fleet, "/watchdog", "firing") == {"Watchdog"}
    assert "Watchdog" not in told(fleet, "/alerts", "firing")


def test_what_alertmanager_knows_is_read_by_itself_alone(fleet: Fleet) -> None:
    """A password and webhooks' URLs are in it."""
    machine = fleet.groups["monitoring"][0]
    assert (
        fleet.ok(machine, "stat --format='%U %G %a' /etc/prometheus/alertmanager.yml").strip() == "root prometheus 640"
    )
