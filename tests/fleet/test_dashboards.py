"""Every query of every dashboard is answered with data by the live Prometheus."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from .conftest import ROOT, Edge, Fleet
from .test_prometheus import query

DASHBOARDS = sorted((ROOT / "files/grafana").glob("*.json"))
# The guide's three.
TITLES = {"Email System Overview", "Application Performance", "Infrastructure"}


def panels(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expression(dashboard: Any, target: Any) -> str:
    """A query as Grafana asks it when somebody opens the dashboard: everything chosen, the intervals its own."""
    text = re.sub(r"\$__(rate_)?interval\b", "5m", target["expr"])
    for variable in dashboard["templating"]["list"]:
        text = re.sub(rf"\${variable['name']}\b", variable["allValue"], text)
    assert not re.search(r"\$[a-z_{]", text), text
    return text


EXPRESSIONS = [
    pytest.param(expression(dashboard, target), id=f"{file.stem}-{panel['title']}-{target['refId']}")
    for file in DASHBOARDS
    for dashboard in [json.loads(file.read_text())]
    for panel in panels(dashboard)
    for target in panel["targets"]
]


@pytest.fixture(scope="module", autouse=True)
def something_was_sent(fleet: Fleet, edge: Edge) -> None:
    """A worker counts from its first message, and a rate takes two looks at it."""
    assert edge.post({"to": "dashboards@example.com", "subject": "Figures", "text": "For them."}).status == 202
    fleet.wait_for_empty_queue(60)
    give_up = time.monotonic() + 40
    while not query(fleet, "rate(emails_sent_total[5m])") and time.monotonic() < give_up:
        time.sleep(1)


def test_the_guide_s_three_dashboards_are_there() -> None:
    assert {json.loads(file.read_text())["title"] for file in DASHBOARDS} == TITLES


def test_grafana_finds_them_and_prometheus(fleet: Fleet) -> None:
    machine = fleet.groups["monitoring"][0]
    for file in DASHBOARDS:
        assert fleet.ok(machine, f"cat /etc/grafana/dashboards/{file.name}") == file.read_text()
    source = fleet.ok(machine, "cat /etc/grafana/provisioning/datasources/prometheus.yml")
    assert f"http://127.0.0.1:{fleet.ports['prometheus']}" in source
    wanted = {
        target["datasource"]["uid"]
        for file in DASHBOARDS
        for panel in panels(json.loads(file.read_text()))
        for target in panel["targets"]
    }
    assert wanted == {"prometheus"}
    assert re.search(r"^ +uid: prometheus$", source, re.MULTILINE)


@pytest.mark.parametrize("query_text", EXPRESSIONS)
def test_a_panel_shows_data(fleet: Fleet, query_text: str) -> None:
    assert query(fleet, query_text) != []


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_what_a_dashboard_lets_one_choose_from_is_there(fleet: Fleet, file: Any) -> None:
    for variable in json.loads(file.read_text())["templating"]["list"]:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
        assert match
        assert query(fleet, f"count by ({match[2]}) ({match[1]})") != []
