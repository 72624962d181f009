"""What listens, and what can be reached from where, is what the flow table says; over IPv4 and IPv6.

Every port is tried from a machine outside of the fleet, by nmap. From a machine of each group, which gets no scanner installed,
it is every port that listens anywhere or that the table opens on one of them; with FLEET_SCAN=all it is every port, which takes
half an hour.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from functools import cache

import pytest

from .conftest import Fleet

EVERY_PORT = range(1, 65536)
# Opens connections: standard input has {address: [ports]}, standard output the open ones. What is dropped costs the time-out.
SCAN = """
import asyncio, json, resource, sys

async def reaches(gate, address, port):
    async with gate:
        for patience in (0.4, 1.2):
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), patience)
                writer.transport.abort()
                return port
            except asyncio.TimeoutError:
                continue
            except OSError:
                return None

async def main(targets):
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    gate = asyncio.Semaphore(4000)
    pairs = [(address, port) for address, ports in targets.items() for port in ports]
    answers = await asyncio.gather(*(reaches(gate, *pair) for pair in pairs))
    found = {address: [] for address in targets}
    for (address, port), answer in zip(pairs, answers):
        if answer:
            found[address].append(port)
    print(json.dumps(found))

asyncio.run(main(json.load(sys.stdin)))
"""


def ports_of(flow: dict[str, int]) -> range:
    return range(flow["port"], flow.get("through", flow["port"]) + 1)


@cache
def listening(fleet: Fleet, machine: str) -> dict[int, set[int]]:
    """The TCP ports that a machine listens on beyond loopback, by family."""
    found: dict[int, set[int]] = {4: set(), 6: set()}
    for line in fleet.ok(machine, "ss --listening --tcp --numeric --no-header").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        name = address.strip("[]").split("%")[0]
        if name == "*" or not ipaddress.ip_address(name).is_loopback:
            for family in (4, 6) if name == "*" else (6,) if ":" in name else (4,):
                found[family].add(int(port))
    return found


def allowed(fleet: Fleet, source: str, target: str) -> set[int]:
    """The ports of `target` that the flow table opens to `source`."""
    mine = {"internet", *(group for group, machines in fleet.groups.items() if source in machines)}
    return {
        port
        for flow in fleet.flows
        if flow["from"] in mine and target in fleet.groups.get(flow["to"], [])
        for port in ports_of(flow)
    }


def flows_to(fleet: Fleet, machine: str) -> list[dict[str, int]]:
    return [flow for flow in fleet.flows if machine in fleet.groups.get(flow["to"], [])]


def scan(fleet: Fleet, source: str, targets: dict[str, list[int]]) -> dict[str, set[int]]:
    """The open ports of each address, tried by a small program that leaves nothing behind."""
    with fleet.free_egress(source):
        fleet.ok(source, "cat >/run/scan.py", SCAN)
        answer = fleet.ok(source, "python3 /run/scan.py", json.dumps(targets), seconds=900)
    return {address: set(ports) for address, ports in json.loads(answer).items()}


def scan_every_port(fleet: Fleet, source: str, addresses: list[str]) -> dict[str, set[int]]:
    """The same for every port there is, by nmap, which is installed."""
    install = "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nmap"
    fleet.ok(source, f"command -v nmap >/dev/null || {{ {install} >/dev/null; }}", seconds=180)
    family = "-6 " if ":" in addresses[0] else ""
    command = f"nmap {family}-Pn -n -T4 --max-retries 1 --min-rate 20000 -p- -oG - {' '.join(addresses)}"
    found: dict[str, set[int]] = {address: set() for address in addresses}
    for line in fleet.ok(source, command, seconds=400).splitlines():
        if match := re.match(r"Host: (\S+) ", line):
            found[match[1]] |= {int(port) for port in re.findall(r"(\d+)/open/", line)}
    return found


def test_only_what_is_in_the_flow_table_listens(fleet: Fleet, each_machine: str) -> None:
    table = {port for flow in flows_to(fleet, each_machine) for port in ports_of(flow)}
    assert listening(fleet, each_machine)[4] | listening(fleet, each_machine)[6] <= table


def test_what_the_flow_table_opens_to_another_machine_listens(fleet: Fleet, each_machine: str) -> None:
    wanted = {
        port
        for flow in flows_to(fleet, each_machine)
        if set(fleet.groups.get(str(flow["from"]), ["anybody"])) - {each_machine}
        for port in ports_of(flow)
    }
    assert wanted <= listening(fleet, each_machine)[4]


def test_no_udp_port_is_open_to_the_network(fleet: Fleet, each_machine: str) -> None:
    sockets = fleet.ok(each_machine, "ss --listening --udp --numeric --no-header").splitlines()
    names = {line.split()[3].rpartition(":")[0].strip("[]").split("%")[0] for line in sockets}
    assert {name for name in names if name == "*" or not ipaddress.ip_address(name).is_loopback} == set()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "group", ["outside", "loadbalancer", "api", "worker", "postgresql", "replica", "redis", "monitoring"]
)
def test_a_scan_finds_what_the_flow_table_opens_and_nothing_else(fleet: Fleet, group: str, family: int) -> None:
    if group not in fleet.groups:
        pytest.skip(f"this inventory has no group {group}")
    source = fleet.groups[group][0]
    addresses = fleet.addresses if family == 4 else fleet.addresses6
    machines = [machine for machine in fleet.groups["fleet"] if machine != source]
    known = {port for machine in machines for ports in listening(fleet, machine).values() for port in ports}
    known |= {port for flow in fleet.flows if flow["to"] in fleet.groups for port in ports_of(flow)}
    targets = [addresses[machine] for machine in machines]
    if group == "outside":
        found = scan_every_port(fleet, source, targets)
        # At nmap's pace a busy computer may lose the answer of an open port: what is known is tried again in peace.
        for address, ports in scan(fleet, source, dict.fromkeys(targets, sorted(known))).items():
            found[address] |= ports
    else:
        every = os.environ.get("FLEET_SCAN") == "all"
        found = scan(fleet, source, dict.fromkeys(targets, list(EVERY_PORT) if every else sorted(known)))
    expected = {
        addresses[machine]: allowed(fleet, source, machine) & listening(fleet, machine)[family] for machine in machines
    }
    assert found == expected
