"""What is made of the flow table is current."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

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


@pytest.mark.parametrize(
    ("group", "variable"),
    [
        ("loadbalancer", "nginx_api_servers"),
        ("monitoring", "prometheus_modules"),
        ("api", "service_api_environment"),
        ("worker", "service_worker_environment"),
    ],
)
def test_what_a_machine_is_told_to_connect_to_is_open_to_it(group: str, variable: str) -> None:
    """Upstreams, scrape targets, database and Redis: wherever an address of the fleet stands with a port, a flow allows it."""
    variables, groups = hostvars(ROOT / "inventories/prod")
    source = groups[group][0]
    names = {name: name for name in groups["fleet"]} | {variables[name]["fleet_ipv4"]: name for name in groups["fleet"]}
    own = {**variables.raw_get(source), "hostvars": variables}
    value = Templar(loader=DataLoader(), variables=own).template(own[variable])
    told = re.findall(r"\b([\w.]+):(\d+)\b", json.dumps(value, default=str))
    wanted = {(names[host], int(port)) for host, port in told if host in names and names[host] != source}
    assert wanted
    mine = {name for name, machines in groups.items() if source in machines}
    flows = [flow for flow in variables[source]["flows"] if flow["from"] in mine]
    shut = {
        (machine, port)
        for machine, port in wanted
        if not any(machine in groups.get(flow["to"], []) and port in ports_of(flow) for flow in flows)
    }
    assert shut == set()


def ports_of(flow: dict[str, int]) -> range:
    return range(flow["port"], flow.get("through", flow["port"]) + 1)
