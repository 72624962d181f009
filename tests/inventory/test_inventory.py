"""Mistakes in an inventory: found on the controller before anything is changed, each with a sentence that says what to write."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["prod", "staging", "single", "local", "local-single"]

Edit = Callable[[Any, Any], object]

# The mistake: what it does to hosts.yml and main.yml of a copy of inventories/prod, and the sentence.
MISTAKES: dict[str, tuple[Edit, str]] = {
    "a group is empty": (
        lambda hosts, _: fleet(hosts)["worker"].update(hosts=None),
        "Group worker has no machine; list one under fleet, children, worker, hosts.",
    ),
    "a group is missing": (
        lambda hosts, _: fleet(hosts).pop("monitoring"),
        "Group monitoring has no machine; list one under fleet, children, monitoring, hosts.",
    ),
    "a group is not below fleet": (
        lambda hosts, _: hosts["all"]["children"].update(redis=fleet(hosts).pop("redis")),
        "Group redis has no machine; list one under fleet, children, redis, hosts.",
    ),
    "the fleet is missing": (
        lambda hosts, _: hosts["all"].pop("children"),
        "The inventory has no group fleet; copy inventories/prod and put your machines under fleet, children.",
    ),
    "two primaries": (
        lambda hosts, _: fleet(hosts)["postgresql"]["hosts"].update(app1=None),
        "Group postgresql has db1 and app1: each would become a database of its own; a second machine may stand in group replica",
    ),
    "two queues": (
        lambda hosts, _: fleet(hosts)["redis"]["hosts"].update(app1=None),
        "Group redis has cache1 and app1: workers would not hear what the API rings. Leave one machine in redis.",
    ),
    "a replica of itself": (
        lambda hosts, _: fleet(hosts)["replica"]["hosts"].update(db1=None),
        "db1 is in postgresql and in replica; leave it in one of them.",
    ),
    "a managed outsider": (
        lambda hosts, _: hosts["all"]["children"].update(outside={"hosts": {"ops1": None}}),
        "ops1 is in outside and in fleet; leave it in one of them.",
    ),
    "a group's name is misspelt": (
        lambda hosts, _: fleet(hosts).update(replicas=fleet(hosts).pop("replica")),
        "No role knows the group replicas; write replica, or give a group of your own another name.",
    ),
    "a machine has nothing to do": (
        lambda hosts, _: hosts["all"]["children"]["fleet"].update(hosts={"spare1": None}),
        "spare1 is in fleet and in no group that gives it work; list it under one of loadbalancer, api, worker, postgresql,",
    ),
    "a machine has no address": (
        lambda hosts, _: hosts["all"]["hosts"]["app2"].pop("fleet_ipv6"),
        "app2 has no fleet_ipv6; write its address in the fleet, such as fleet_ipv6: 2001:db8::11.",
    ),
    "an address has a prefix length": (
        lambda hosts, _: hosts["all"]["hosts"]["app2"].update(fleet_ipv4="192.0.2.22/24"),
        "app2 has “192.0.2.22/24” as fleet_ipv4; write its address in the fleet, such as fleet_ipv4: 192.0.2.11.",
    ),
    "an address is given twice": (
        lambda hosts, _: hosts["all"]["hosts"]["app2"].update(fleet_ipv4="192.0.2.21"),
        "app2 and app1 both have fleet_ipv4 192.0.2.21; give each its own.",
    ),
    "a boolean is a text": (
        lambda _, main: main.update(alertmanager_smtp_require_tls="no"),
        "lb1: alertmanager_smtp_require_tls is the text “no”; write alertmanager_smtp_require_tls: false, without",
    ),
    "a boolean of one machine is a text": (
        lambda hosts, _: hosts["all"]["hosts"]["ops1"].update(alertmanager_smtp_require_tls="True"),
        "ops1: alertmanager_smtp_require_tls is the text “True”; write alertmanager_smtp_require_tls: true, without",
    ),
    "a number is a text": (
        lambda _, main: main.update(postgresql_memory_mb="4G"),
        "lb1: postgresql_memory_mb is “4G”; write a whole number.",
    ),
    "a list is a text": (
        lambda _, main: main.update(base_ntp_servers="ntp.example.com"),
        "lb1: base_ntp_servers is “ntp.example.com”; write a list.",
    ),
    "a mapping is a list": (
        lambda _, main: main.update(redis_settings=["maxclients 100"]),
        "lb1: redis_settings is “['maxclients 100']”; write a mapping of names to values.",
    ),
    "a variable was renamed": (
        lambda _, main: main.update(redis_maxmemory_mb=256),
        "lb1: redis_maxmemory_mb is now redis_queue_maxmemory_mb; write that name.",
    ),
    "a variable is misspelt": (
        lambda _, main: main.update(postgresql_memory=4096),
        "lb1: No role has a variable postgresql_memory; write postgresql_memory_mb.",
    ),
    "nobody may administrate": (
        lambda _, main: main.pop("operators_networks"),
        "Nobody would reach ssh; write your networks as a list in operators_networks, such as [192.0.2.0/24].",
    ),
    "a network is none": (
        lambda _, main: main.update(operators_networks=["192.0.2.7/24"]),
        "operators_networks has “192.0.2.7/24” (192.0.2.7/24 has host bits set); write a network such as 192.0.2.0/24.",
    ),
    "nobody hears of alerts": (
        lambda _, main: main.update(alertmanager_smtp_host=""),
        "Nobody would hear of an alert; write alertmanager_smtp_host, which takes the mail, with alertmanager_to, or",
    ),
    "alerts by mail to nobody": (
        lambda _, main: main.pop("alertmanager_to"),
        "Alerts go out by mail, and to nobody; write alertmanager_to, such as [operators@example.com].",
    ),
    "a flow from nowhere": (
        lambda _, main: main.update(flows_more=[{"from": "office", "to": "api", "port": 8000, "why": "tests"}]),
        "The flow “tests” comes from office; write a group, or one of operators, internet, resolvers.",
    ),
    "a flow to nowhere": (
        lambda _, main: main.update(
            flows_more=[{"from": "api", "to": "office", "port": 80, "by": ["www-data"], "why": "x"}]
        ),
        "The flow “x” goes to office; write a group of the inventory, or one of operators, internet, resolvers.",
    ),
    "a flow of nobody": (
        lambda _, main: main.update(flows_more=[{"from": "api", "to": "redis", "port": 6380, "why": "tests"}]),
        "The flow “tests” leaves the machines of api and says not whose it is; add by: and a list of the users",
    ),
    "a flow of somebody elsewhere": (
        lambda _, main: main.update(
            flows_more=[{"from": "operators", "to": "redis", "port": 6380, "by": ["root"], "why": "tests"}]
        ),
        "The flow “tests” comes from operators, whose users are not the fleet's; remove by.",
    ),
    "a flow with an unknown protocol": (
        lambda _, main: main.update(
            flows_more=[{"from": "internet", "to": "api", "port": 80, "protocol": "udp", "why": "x"}]
        ),
        "The flow “x” has protocol “udp”; write [udp], [udp, tcp], or leave it out for TCP.",
    ),
    "a flow without a port": (
        lambda _, main: main.update(flows_more=[{"from": "api", "to": "redis", "port": "redis", "why": "tests"}]),
        "The flow “tests” has port “redis”; write a number from 1 to 65535.",
    ),
    "a flow without a reason": (
        lambda _, main: main.update(flows_more=[{"from": "api", "to": "redis", "port": 6380}]),
        "says no reason; add why: and a few words, which become the rule's comment.",
    ),
}


def fleet(hosts: Any) -> Any:
    return hosts["all"]["children"]["fleet"]["children"]


@cache
def check() -> Callable[[HostVars, Any], list[str]]:
    """The filter that playbooks/inventory.yml asks."""
    file = ROOT / "playbooks/filter_plugins/inventory.py"
    spec = importlib.util.spec_from_file_location("inventory", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    init_plugin_loader()
    found: Callable[[HostVars, Any], list[str]] = module.inventory_mistakes
    return found


def hostvars(inventory: Path) -> tuple[HostVars, dict[str, list[str]]]:
    """An inventory's variables and groups, read as Ansible reads them."""
    loader = DataLoader()
    manager = InventoryManager(loader=loader, sources=[str(inventory)])
    return HostVars(manager, VariableManager(loader=loader, inventory=manager), loader), manager.get_groups_dict()


def mistakes(inventory: Path) -> list[str]:
    """What the check says about an inventory."""
    return check()(*hostvars(inventory))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """inventories/prod, copied as docs/fleet.md says."""
    directory = tmp_path / "inventories/ours"
    shutil.copytree(ROOT / "inventories/prod", directory)
    return directory


def change(inventory: Path, edit: Edit) -> None:
    """Edit the hosts, and what differs from company to company."""
    files = [inventory / "hosts.yml", inventory / "group_vars/all/main.yml"]
    read = [yaml.safe_load(file.read_text()) for file in files]
    edit(*read)
    for file, content in zip(files, read, strict=True):
        file.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_inventory_of_the_project_has_no_mistake(name: str) -> None:
    assert mistakes(ROOT / "inventories" / name) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_what_to_write(copy: Path, mistake: str) -> None:
    edit, sentence = MISTAKES[mistake]
    change(copy, edit)
    found = mistakes(copy)
    assert any(sentence in line for line in found), found


def test_a_group_that_only_sorts_machines_is_the_operator_s_affair(copy: Path) -> None:
    change(copy, lambda hosts, _: hosts["all"]["children"].update(berlin={"hosts": {"app1": None, "db1": None}}))
    assert mistakes(copy) == []


def test_site_yml_stops_before_the_first_change_and_names_every_mistake(copy: Path) -> None:
    for name in ("two primaries", "a boolean is a text"):
        change(copy, MISTAKES[name][0])
    playbook = Path(sys.executable).with_name("ansible-playbook")
    command = [str(playbook), "site.yml", "-i", str(copy), "--extra-vars", f"secrets_file={copy}/secrets.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Nothing was changed" in done.stdout
    assert "Leave one machine in postgresql." in done.stdout
    assert "write alertmanager_smtp_require_tls: false" in done.stdout
    assert "changed=0" in done.stdout
    assert not (copy / "secrets.yml").exists()
