"""What is wrong with an inventory, found on the controller: each mistake as a sentence that says what to write."""

import ipaddress
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ["loadbalancer", "api", "worker", "postgresql", "redis", "monitoring"]
# Groups that may be missing.
OPTIONAL = ["replica", "outside"]
# Of these one machine is asked, and a second would hold what nobody finds.
SINGLE = {
    "postgresql": "each would become a database of its own; a second machine may stand in group replica",
    "redis": "workers would not hear what the API rings",
}


def inventory_mistakes(hostvars: Mapping[str, Any], groups: Mapping[str, list[str]]) -> list[str]:
    """Return a sentence for each mistake; none where `site.yml` can run on the inventory."""
    fleet = groups.get("fleet", [])
    if not fleet:
        return ["The inventory has no group fleet; copy inventories/prod and put your machines under fleet, children."]
    found = [*_groups(groups, fleet), *_addresses(hostvars, fleet), *_variables(hostvars, fleet)]
    # Flows are made of the groups: asked only once those are right.
    return found or [
        *_operators(hostvars[fleet[0]]),
        *_alerts(hostvars.raw_get(groups["monitoring"][0])),
        *_flows(hostvars[fleet[0]], groups),
    ]


def _groups(groups: Mapping[str, list[str]], fleet: list[str]) -> Iterator[str]:
    for group in GROUPS:
        if not set(groups.get(group, [])) & set(fleet):
            yield f"Group {group} has no machine; list one under fleet, children, {group}, hosts."
    for group, why in SINGLE.items():
        if len(groups.get(group, [])) > 1:
            yield f"Group {group} has {' and '.join(groups[group])}: {why}. Leave one machine in {group}."
    for first, second in (("postgresql", "replica"), ("outside", "fleet")):
        for machine in sorted(set(groups.get(first, [])) & set(groups.get(second, []))):
            yield f"{machine} is in {first} and in {second}; leave it in one of them."
    yield from _unknown(groups, fleet)


def _unknown(groups: Mapping[str, list[str]], fleet: list[str]) -> Iterator[str]:
    """Name groups that look like one of ours, and machines that no group of ours gives work."""
    known = [*GROUPS, *OPTIONAL, "fleet", "all", "ungrouped"]
    for group in groups:
        # A group that only sorts machines, by place or by kind, is the operator's own affair.
        if group not in known and (near := get_close_matches(group, known, 1)):
            yield f"No role knows the group {group}; write {near[0]}, or give a group of your own another name."
    for machine in fleet:
        if not any(machine in groups.get(group, []) for group in [*GROUPS, *OPTIONAL]):
            mine = ", ".join(group for group in groups if machine in groups[group] and group not in known)
            yield (
                f"{machine} is in fleet{' and ' + mine if mine else ''} and in no group that gives it work; "
                f"list it under one of {', '.join([*GROUPS, 'replica'])}."
            )


def _addresses(hostvars: Mapping[str, Any], fleet: list[str]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for machine in fleet:
        for name, kind in (("fleet_ipv4", ipaddress.IPv4Address), ("fleet_ipv6", ipaddress.IPv6Address)):
            given = _value(hostvars[machine], name)
            try:
                address = str(kind(given))
            except ValueError:
                has = "has no" if given is None else f"has “{given}” as"
                example = "192.0.2.11" if name == "fleet_ipv4" else "2001:db8::11"
                yield f"{machine} {has} {name}; write its address in the fleet, such as {name}: {example}."
                continue
            if address in owners:
                yield f"{machine} and {owners[address]} both have {name} {address}; give each its own."
            owners[address] = machine


def _variables(hostvars: Mapping[str, Any], fleet: list[str]) -> Iterator[str]:
    """Check names and types of what begins with a role's name against the role's specification."""
    roles, specified, shipped, renamed = _known()
    said = set()
    for machine in fleet:
        for name in hostvars[machine]:
            sentence = None
            if name in renamed:
                sentence = f"{name} is now {renamed[name]}; write that name."
            elif name in specified:
                sentence = _type(name, hostvars.raw_get(machine)[name], specified[name])
            elif name not in shipped and name.startswith(roles):
                near = get_close_matches(name, [*specified, *shipped], 1)
                sentence = f"No role has a variable {name}; {f'write {near[0]}' if near else 'remove it'}."
            # What stands in group_vars is the same mistake for every machine.
            if sentence and sentence not in said:
                said.add(sentence)
                yield f"{machine}: {sentence}"


@cache
def _known() -> tuple[tuple[str, ...], dict[str, Any], set[str], dict[str, str]]:
    """Return the roles' prefixes, their variables' specifications, the variables that come with the project, the old names."""

    def read(file: Path) -> Any:
        return yaml.safe_load(file.read_text(encoding="utf-8"))

    files = sorted((ROOT / "roles").glob("*/meta/argument_specs.yml"))
    specified: dict[str, Any] = {}
    for file in files:
        for entry in read(file)["argument_specs"].values():
            specified |= entry.get("options", {})
    shipped = {name for file in (ROOT / "inventories/prod/group_vars/all").glob("*.yml") for name in read(file)}
    return tuple(f"{file.parts[-3]}_" for file in files), specified, shipped, read(ROOT / "playbooks/vars/renamed.yml")


def _type(name: str, value: Any, option: Mapping[str, Any]) -> str | None:
    """Say what a literal should be. What is computed is not looked at: it needs secrets and facts."""
    kind = option.get("type", "str")
    text = isinstance(value, str)
    if text and "{{" in value:
        return None
    right = {
        "bool": isinstance(value, bool),
        "int": (isinstance(value, int) and not isinstance(value, bool)) or (text and value.isdigit()),
        "list": isinstance(value, list),
        "dict": isinstance(value, Mapping),
    }.get(kind, True)
    if not right and kind == "bool":
        yes = str(value).strip().lower() in {"yes", "true", "on", "1"}
        return f"{name} is the text “{value}”; write {name}: {str(yes).lower()}, without quotation marks."
    if not right:
        article = {"int": "a whole number", "list": "a list", "dict": "a mapping of names to values"}[kind]
        return f"{name} is “{value}”; write {article}. {option.get('description', '')}".rstrip()
    if text and (choices := option.get("choices")) and value not in choices:
        return f"{name} is “{value}”; write one of {', '.join(map(str, choices))}."
    return None


def _operators(machine: Mapping[str, Any]) -> Iterator[str]:
    networks = _value(machine, "operators_networks")
    if not isinstance(networks, list) or not networks:
        yield "Nobody would reach ssh; write your networks as a list in operators_networks, such as [192.0.2.0/24]."
        return
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            yield f"operators_networks has “{network}” ({error}); write a network such as 192.0.2.0/24."


def _alerts(machine: Mapping[str, Any]) -> Iterator[str]:
    mail = machine.get("alertmanager_smtp_host")
    if not mail and not machine.get("alertmanager_webhooks"):
        yield (
            "Nobody would hear of an alert; write alertmanager_smtp_host, which takes the mail, with alertmanager_to, "
            "or alertmanager_webhooks, a list of URLs."
        )
    elif mail and not machine.get("alertmanager_to"):
        yield "Alerts go out by mail, and to nobody; write alertmanager_to, such as [operators@example.com]."


def _flows(machine: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Iterator[str]:
    networks = _value(machine, "flow_networks") or {}
    for flow in _value(machine, "flows") or []:
        name = f"The flow “{flow.get('why', flow)}”"
        sources = [*networks, *groups]
        if flow.get("from") not in [*sources, *OPTIONAL]:
            yield f"{name} comes from {flow.get('from')}; write a group, or one of {', '.join(networks)}."
        if flow.get("to") not in [*sources, *OPTIONAL]:
            yield f"{name} goes to {flow.get('to')}; write a group of the inventory, or one of {', '.join(networks)}."
        for key in ("port", "through"):
            port = flow.get(key, 1 if key == "through" else None)
            if not isinstance(port, int) or not 0 < port < 65536:
                yield f"{name} has {key} “{port}”; write a number from 1 to 65535."
        if not flow.get("why"):
            yield f"{name} says no reason; add why: and a few words, which become the rule's comment."
        yield from _packets(flow, name, own=flow.get("from") in set(groups) - {"outside"})


def _packets(flow: Mapping[str, Any], name: str, *, own: bool) -> Iterator[str]:
    """Check whose packets a flow lets through; `own` says that they come from machines of the fleet."""
    by, protocol = flow.get("by"), flow.get("protocol", ["tcp"])
    if own and not (isinstance(by, list) and by):
        yield (
            f"{name} leaves the machines of {flow['from']} and says not whose it is; "
            "add by: and a list of the users that may open it, such as by: [neoforge-worker]."
        )
    if by and not own:
        yield f"{name} comes from {flow.get('from')}, whose users are not the fleet's; remove by."
    if not isinstance(protocol, list) or not protocol or set(protocol) - {"tcp", "udp"}:
        yield f"{name} has protocol “{protocol}”; write [udp], [udp, tcp], or leave it out for TCP."


def _value(variables: Mapping[str, Any], name: str) -> Any:
    """Return a variable's value, or None where it is missing or cannot be computed."""
    try:
        return variables[name]
    except (KeyError, AnsibleError):
        return None


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, object]:
        """Return the filters of this file by name."""
        return {"inventory_mistakes": inventory_mistakes}
