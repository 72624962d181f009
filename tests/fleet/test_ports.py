"""The port scan of an outsider finds exactly what the flow table gives to everybody."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from .conftest import INVENTORY, ROOT, Fleet


@pytest.fixture(scope="module")
def scanner(fleet: Fleet) -> str:
    """A machine outside of the fleet that has nmap."""
    install = "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nmap"
    fleet.ok(fleet.outsider, f"command -v nmap >/dev/null || {{ {install} >/dev/null; }}", seconds=180)
    return fleet.outsider


def expected(fleet: Fleet, machine: str) -> set[int]:
    command = ["ansible", machine, "-i", INVENTORY, "-m", "ansible.builtin.debug", "-a", "msg={{ flows | to_json }}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    match = re.search(r"=> (\{.*\})\s*$", done.stdout, re.DOTALL)
    assert match, done.stdout
    flows = json.loads(json.loads(match[1])["msg"])
    return {flow["port"] for flow in flows if flow["from"] == "internet" and machine in fleet.groups[flow["to"]]}


@pytest.mark.parametrize("family", [4, 6])
def test_an_outsider_reaches_only_what_is_for_everybody(fleet: Fleet, scanner: str, family: int) -> None:
    machine = fleet.groups["loadbalancer"][0]
    address = fleet.ok(machine, f"ip -{family} -brief address show scope global").split()[2].split("/")[0]
    scan = f"nmap {'-6' if family == 6 else ''} -Pn -n -T4 --max-retries 1 --min-rate 20000 -p- -oG - {address}"
    found = {int(port) for port in re.findall(r"(\d+)/open/", fleet.ok(scanner, scan, seconds=120))}
    assert found == expected(fleet, machine)
    assert found >= {fleet.ports["http"], fleet.ports["https"]}


def test_what_listens_on_a_network_address_is_in_the_flow_table(fleet: Fleet) -> None:
    machine = fleet.groups["loadbalancer"][0]
    listening = fleet.ok(machine, "ss --listening --tcp --numeric --no-header").splitlines()
    addresses = {line.split()[3].rsplit(":", 1)[0] + " " + line.split()[3].rsplit(":", 1)[1] for line in listening}
    public = {int(item.split()[1]) for item in addresses if not item.startswith(("127.", "[::1]"))}
    assert public <= set(fleet.ports.values())
