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
RULES = ROOT / "files" / "prometheus" / "neoforge.rules.yml"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


ALERTS = {rule["alert"]: rule for group in load(RULES)["groups"] for rule in group["rules"]}
CASES = [case for test in load(RULES.with_suffix(".test.yml"))["tests"] for case in test["alert_rule_test"]]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_it_is_explained(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    assert re.search(rf"^### {name}\n\n\S", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_case_that_makes_it_fire_and_one_that_keeps_it_quiet(name: str) -> None:
    assert {bool(case["exp_alerts"]) for case in CASES if case["alertname"] == name} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_can_read_what_to_do_about_a_stuck_row(kind: str) -> None:
    assert f"`{kind}`" in OPERATIONS
