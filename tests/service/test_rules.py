"""The alert rules: each is explained and tested. `make test-rules` runs the tests; this looks that none is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from neoforge_email.reconcile import KINDS

yaml: Any = importlib.import_module("yaml")  # comes with Ansible, without types
ROOT = Path(__file__).parents[2]
RULES = {
    ROOT / "files/prometheus/neoforge.rules.yml": "docs/operations.md",
    ROOT / "files/prometheus/fleet.rules.yml": "docs/alerts.md",
}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
GUIDE = {
    "EmailSystemDown",
    "EmailWorkerDown",
    "HighEmailQueueSize",
    "HighEmailErrorRate",
    "DatabaseConnectionFailure",
    "RedisConnectionFailure",
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


LISTED = [(rule, page) for path, page in RULES.items() for group in load(path)["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule, _ in LISTED}
PAGES = {rule["alert"]: page for rule, page in LISTED}
TESTS = [test for path in RULES for test in load(path.with_suffix(".test.yml"))["tests"]]
CASES = [case for test in TESTS for case in test["alert_rule_test"]]


def test_the_deployment_guides_six_alerts_are_there_and_no_name_is_given_twice() -> None:
    assert ALERTS.keys() >= GUIDE
    assert len(ALERTS) == len(LISTED)
    assert set((ROOT / "files/prometheus").glob("*.rules.yml")) == RULES.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_it_is_explained(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ({"none"} if name == "Watchdog" else {"critical", "warning"})
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["runbook"] == f"{PAGES[name]}#{name.lower()}"
    assert re.search(rf"^### {name}\n\n\S", (ROOT / PAGES[name]).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(ALERTS.keys() - {"Watchdog"}))  # which is never quiet
def test_an_alert_has_a_case_that_makes_it_fire_and_one_that_keeps_it_quiet(name: str) -> None:
    assert {bool(case["exp_alerts"]) for case in CASES if case["alertname"] == name} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_can_read_what_to_do_about_a_stuck_row(kind: str) -> None:
    assert f"`{kind}`" in OPERATIONS
