"""What is made of the flow table is current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_inventory import ROOT, hostvars

DOCUMENT = ROOT / "docs/fleet.md"


def picture(flows: Any) -> str:
    spec = importlib.util.spec_from_file_location("flows", ROOT / "playbooks/filter_plugins/flows.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn: str = module.flows_picture(flows)
    return drawn


def test_the_picture_in_the_documents_shows_the_flow_table() -> None:
    variables, groups = hostvars(ROOT / "inventories/prod")
    shown = re.search(r"<!-- begin of the flow table.*?-->\n(.*?)\n<!-- end", DOCUMENT.read_text(), re.DOTALL)
    assert shown, "docs/fleet.md has lost the marks of the flow table"
    assert shown[1] == picture(variables[groups["fleet"][0]]["flows"]), "run `make flows` and commit docs/fleet.md"


@pytest.mark.parametrize("name", ["staging", "single", "local", "local-single"])
def test_every_inventory_of_the_project_has_the_same_flow_table(name: str) -> None:
    file = ROOT / "inventories" / name / "group_vars/all/flows.yml"
    assert file.resolve() == ROOT / "inventories/prod/group_vars/all/flows.yml"


def test_a_port_stands_in_the_flow_table_and_nowhere_else() -> None:
    """Role variables get their port from the table, so that a change of it changes everything."""
    ports = set(yaml.safe_load((ROOT / "inventories/prod/group_vars/all/flows.yml").read_text())["ports"].values())
    numbers = re.compile(r"\b(" + "|".join(str(port) for port in sorted(ports) if port > 1024) + r")\b")
    files = [*(ROOT / "inventories").rglob("*.yml"), *(ROOT / "playbooks").glob("*.yml"), *ROOT.glob("roles/*/t*/*")]
    places = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        if file.is_file() and file.name != "flows.yml"
        for line in file.read_text().splitlines()
        if numbers.search(line.split("#")[0]) and Path(file).suffix != ".md"
    ]
    assert places == []
