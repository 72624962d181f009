"""The firewall as the kernel has it, and what happens to rules that would lock the operator out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import INVENTORY, ROOT, Fleet

PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_what_no_flow_allows_is_dropped(fleet: Fleet, program: str) -> None:
    rules = fleet.ok(fleet.admin, f"{program} -S").splitlines()
    assert "-P INPUT DROP" in rules
    assert "-P FORWARD DROP" in rules
    assert rules[-1] == "-A INPUT -j DROP"


def test_no_rule_opens_a_port_that_is_not_in_the_flow_table(fleet: Fleet) -> None:
    for program in ("iptables", "ip6tables"):
        opened = [
            line.split() for line in fleet.ok(fleet.admin, f"{program} -S INPUT").splitlines() if "--dport" in line
        ]
        ports = {int(words[words.index("--dport") + 1].split(":")[0]) for words in opened}
        assert ports <= set(fleet.ports.values()) | {fleet.ports["api_metrics"] + 1}


def test_ipv6_keeps_the_messages_it_cannot_live_without(fleet: Fleet) -> None:
    rules = fleet.ok(fleet.admin, "ip6tables -S INPUT")
    for kind in (1, 2, 3, 4, 135, 136):
        assert f"--icmpv6-type {kind} -j ACCEPT" in rules


def test_the_next_boot_loads_what_is_loaded_now(fleet: Fleet) -> None:
    assert fleet.ok(fleet.admin, "systemctl is-enabled neoforge-firewall").strip() == "enabled"
    fleet.ok(fleet.admin, "neoforge-firewall same /etc/neoforge/firewall/candidate /etc/neoforge/firewall")


def test_rules_that_lock_the_operator_out_are_taken_back(fleet: Fleet) -> None:
    """Both families come back by the machine itself, and the next boot does not get the bad rules."""
    before = fleet.ok(fleet.admin, "cat /run/neoforge-firewall/loaded; cat /etc/neoforge/firewall/rules.v*")
    wrong = json.dumps({"operators_networks": ["192.0.2.1/32"]})
    command = [PLAYBOOK, "site.yml", "-i", INVENTORY, "--tags", "firewall", "--limit", fleet.admin]
    command += ["--extra-vars", wrong]
    environment = {**os.environ, "ANSIBLE_TIMEOUT": "5"}
    started = time.monotonic()
    # The connection kept by the tests must not answer for a new one.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode != 0
    assert "has its old rules back" in done.stdout + done.stderr, done.stdout[-3000:]
    assert fleet.ok(fleet.admin, "cat /run/neoforge-firewall/loaded; cat /etc/neoforge/firewall/rules.v*") == before
    assert time.monotonic() - started < 120
    # The candidate on the machine is the bad one until the next run: put the good one back.
    done = subprocess.run(command[:-2], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    fleet.ok(fleet.admin, "neoforge-firewall same /etc/neoforge/firewall/candidate /etc/neoforge/firewall")
