"""The firewall as the kernel has it, in and out, and what happens to rules that would lock the operator out."""

from __future__ import annotations

import json
import re
import time
from urllib.parse import urlsplit

import pytest

from .conftest import Fleet, Show
from .lockout import playbook, taken_back

BOTH = ["iptables", "ip6tables"]
# Opens a connection: family, address, port on the command line.
CONNECT = """
import socket, sys
family, address, port = sys.argv[1:]
raw = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
raw.settimeout(2)
try:
    raw.connect((address, int(port)))
    print("open")
except OSError as error:
    print("shut" if isinstance(error, TimeoutError) or error.errno == 1 else type(error).__name__)
"""


def reach(fleet: Fleet, user: str, port: int, family: int) -> str:
    """What a user of the worker's machine finds at a port of the machine outside: open, shut, or refused by it."""
    address = (fleet.addresses if family == 4 else fleet.addresses6)[fleet.outsider]
    machine = fleet.groups["worker"][0]
    fleet.ok(machine, "cat >/run/connect.py && chmod 644 /run/connect.py", CONNECT)
    return fleet.ok(machine, f"runuser -u {user} -- python3 /run/connect.py {family} {address} {port}").strip()


def dropped(fleet: Fleet, machine: str, program: str, chain: str) -> int:
    """Packets that the last rule of a chain dropped."""
    rules = fleet.ok(machine, f"{program} -S {chain} -v").splitlines()
    match = re.fullmatch(rf"-A {chain} -c (\d+) \d+ -j DROP", rules[-1])
    assert match, rules[-1]
    return int(match[1])


@pytest.mark.parametrize("program", BOTH)
def test_what_no_flow_allows_is_dropped_in_and_out(fleet: Fleet, each_machine: str, program: str) -> None:
    rules = fleet.ok(each_machine, f"{program} -S").splitlines()
    assert {"-P INPUT DROP", "-P FORWARD DROP", "-P OUTPUT DROP"} <= set(rules)
    for chain in ("INPUT", "OUTPUT"):
        assert [line for line in rules if line.startswith(f"-A {chain} ")][-1] == f"-A {chain} -j DROP"


def test_no_rule_opens_a_port_that_is_not_in_the_flow_table(fleet: Fleet) -> None:
    for program in BOTH:
        opened = [
            line.split() for line in fleet.ok(fleet.admin, f"{program} -S INPUT").splitlines() if "--dport" in line
        ]
        ports = {int(words[words.index("--dport") + 1].split(":")[0]) for words in opened}
        assert ports <= set(fleet.ports.values())


@pytest.mark.parametrize("program", BOTH)
def test_every_way_out_belongs_to_a_user_and_none_to_root(fleet: Fleet, each_machine: str, program: str) -> None:
    rules = fleet.ok(each_machine, f"{program} -S OUTPUT").splitlines()
    opened = [line for line in rules if "--dport" in line]
    assert opened
    assert [line for line in opened if "-m owner" not in line or "--uid-owner 0 " in line] == []


def test_ipv6_keeps_the_messages_it_cannot_live_without(fleet: Fleet) -> None:
    rules = fleet.ok(fleet.admin, "ip6tables -S")
    for kind in (1, 2, 3, 4, 135, 136):
        assert f"-A INPUT -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT" in rules
    for kind in (135, 136):
        assert f"-A OUTPUT -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT" in rules


@pytest.mark.parametrize("family", [4, 6])
def test_the_worker_reaches_a_mail_server_and_nobody_else_does(fleet: Fleet, family: int) -> None:
    """587 is closed outside: who gets there is refused by that machine; who does not get out waits in vain."""
    port = fleet.ports["submission"]
    assert reach(fleet, "neoforge-worker", port, family) == "ConnectionRefusedError"
    for user in ("root", "nobody", "neoforge-api", "postgres", "www-data"):
        if fleet.shell(fleet.groups["worker"][0], f"id {user}").returncode == 0:
            assert reach(fleet, user, port, family) == "shut", user


@pytest.mark.parametrize("family", [4, 6])
def test_the_worker_reaches_no_port_that_no_flow_opens(fleet: Fleet, family: int) -> None:
    assert reach(fleet, "neoforge-worker", fleet.ports["ssh"], family) == "shut"


def test_root_asks_no_name_server_and_still_gets_packages(fleet: Fleet, each_machine: str) -> None:
    site = fleet.ok(each_machine, "apt-get indextargets --format '$(SITE)'").splitlines()[0]
    question = f"timeout 5 getent ahosts {urlsplit(site).hostname}"
    assert fleet.shell(each_machine, question).returncode != 0
    fleet.ok(each_machine, f"runuser -u _apt -- {question}")
    fleet.ok(each_machine, "apt-get update -qq -o APT::Update::Error-Mode=any", seconds=180)


@pytest.mark.parametrize(("family", "program"), [(4, "iptables"), (6, "ip6tables")])
def test_what_is_dropped_is_counted(fleet: Fleet, family: int, program: str) -> None:
    machine = fleet.groups["worker"][0]
    address = (fleet.addresses if family == 4 else fleet.addresses6)[machine]
    before = {chain: dropped(fleet, machine, program, chain) for chain in ("INPUT", "OUTPUT")}
    assert reach(fleet, "root", fleet.ports["submission"], family) == "shut"
    knock = f"import socket; socket.create_connection(('{address}', 4444), 1)"
    assert fleet.shell(fleet.outsider, f'python3 -c "{knock}"').returncode != 0
    for chain, packets in before.items():
        assert dropped(fleet, machine, program, chain) > packets


def test_a_user_that_is_gone_takes_only_its_own_rules_along(fleet: Fleet) -> None:
    """Rules with a name that nobody has would not load at all, and the next boot would stand open."""
    machine = fleet.admin
    directory = "/run/neoforge-firewall-test"
    fleet.ok(machine, f"cp -r /etc/neoforge/firewall {directory}")
    ghost = "-A OUTPUT -p tcp -m tcp --dport 9 -m owner --uid-owner ghost -j ACCEPT"
    fleet.ok(machine, f"sed -i 's/^-A OUTPUT -j DROP/{ghost}\\n&/' {directory}/rules.v?")
    try:
        done = fleet.shell(machine, f"neoforge-firewall load {directory}")
        assert done.returncode == 0, done.stderr
        assert "ghost" in done.stderr
        assert "-P OUTPUT DROP" in fleet.ok(machine, "iptables -S OUTPUT")
        assert "--dport 9 " not in fleet.ok(machine, "iptables -S OUTPUT")
    finally:
        fleet.ok(machine, f"neoforge-firewall load /etc/neoforge/firewall; rm -r {directory}")


def test_the_next_boot_loads_what_is_loaded_now(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "systemctl is-enabled neoforge-firewall").strip() == "enabled"
    fleet.ok(each_machine, "neoforge-firewall same /etc/neoforge/firewall/candidate /etc/neoforge/firewall")


def test_rules_that_lock_the_operator_out_are_taken_back(fleet: Fleet, show: Show) -> None:
    """Both families come back by the machine itself, and the next boot does not get the bad rules."""
    state = "cat /run/neoforge-firewall/loaded; cat /etc/neoforge/firewall/rules.v*"
    taken_back(fleet, "firewall", {"operators_networks": ["192.0.2.1/32"]}, "has its old rules back", state, show)
    fleet.ok(fleet.admin, "neoforge-firewall same /etc/neoforge/firewall/candidate /etc/neoforge/firewall")


def test_ssh_from_anywhere_is_limited_and_operators_are_not(fleet: Fleet) -> None:
    """The guide's limit: four new connections a minute and address."""
    address = fleet.addresses[fleet.admin]
    program = (
        "import json, socket, sys\n"
        "def knock():\n"
        "    try:\n"
        f"        return socket.create_connection(('{address}', {fleet.ports['ssh']}), 1).recv(4).decode()\n"
        "    except OSError:\n"
        "        return ''\n"
        "print(json.dumps([knock() for _ in range(6)]))\n"
    )
    try:
        playbook("firewall", fleet.admin, {"ssh_from_anywhere": True})
        assert json.loads(fleet.ok(fleet.outsider, "python3 -", program)) == ["SSH-"] * 4 + [""] * 2
        started = time.monotonic()
        for _ in range(6):
            fleet.ok(fleet.admin, "true")
        assert time.monotonic() - started < 30
    finally:
        playbook("firewall", fleet.admin)
    assert json.loads(fleet.ok(fleet.outsider, "python3 -", program)) == [""] * 6
