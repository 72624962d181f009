#!/usr/bin/python
"""Has systemd's units run with what is written, all of a task in one call to the machine."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from glob import glob
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: units
short_description: Have systemd's units enabled, started, and running with the files that are there
description:
  - A unit that runs with older files than those that are there is restarted or reloaded; no other is touched. It goes by the
    files, not by what this run has changed, so nothing is lost with a run that was killed between a file and its unit.
  - A file counts from its change of inode (ctime), a unit from its last start or reload. What a unit has in
    C(/etc/systemd/system) counts without being named.
  - A unit that its own conditions keep from starting, as some in a container, is left alone.
options:
  units:
    description: The units, in this order. One may come twice, with what it reloads and with what it restarts for.
    type: list
    elements: dict
    required: true
    suboptions:
      unit: {type: str, required: true, description: "Name of the unit; C(%s) stands for an element of I(each)."}
      files: {type: list, elements: str, default: [], description: "What it reads when it starts; patterns and C(%s) serve."}
      each: {type: list, elements: str, description: One unit for each of these.}
      reload: {type: bool, default: false, description: Whether it is reloaded for these files instead of restarted.}
      run: {type: bool, default: true, description: Whether it is enabled and started; else it is restarted only if it runs.}
      when: {type: bool, default: true, description: Whether it is on this machine.}
"""
EXAMPLES = r"""
- name: Run NGINX with what is written
  units:
    units:
      - {unit: nginx.service, files: [/etc/systemd/system/nginx.service.d/*]}
      - {unit: nginx.service, files: [/etc/nginx/nginx.conf], reload: true}
"""
RETURN = r"""
done:
  description: What was done, or would be, and why.
  type: list
  elements: str
  returned: always
started:
  description: The units that did not run before.
  type: list
  elements: str
  returned: always
"""

PROPERTIES = [
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "ConditionResult",
    "ConditionTimestamp",
    "NeedDaemonReload",
    "FragmentPath",
    "DropInPaths",
    "StateChangeTimestamp",
]


def systemctl(module: AnsibleModule, *arguments: str) -> str:
    """Run systemctl; where it fails, the task does, with what it says and where to read more."""
    status, said, complaint = module.run_command(["systemctl", *arguments])
    if status:
        command = " ".join(["systemctl", *arguments])
        module.fail_json(msg=f"{command}: {complaint.strip()} (journalctl -u {arguments[-1]} on the machine says more)")
    return str(said)


def states(module: AnsibleModule, units: list[str]) -> dict[str, dict[str, str]]:
    """Return the properties of each unit."""
    said = systemctl(module, "show", "--timestamp=us+utc", "--property=" + ",".join(PROPERTIES), *units)
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in said.strip().split("\n\n")]
    return dict(zip(units, blocks, strict=True))


def unread(entry: dict[str, Any], state: dict[str, str]) -> list[str]:
    """Return the files that were written after the unit's last start or reload."""
    since = datetime.strptime(state["StateChangeTimestamp"], "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=UTC)
    files = [path for pattern in entry["files"] for path in glob(pattern)]  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not entry["reload"]:
        own = [state["FragmentPath"], *state["DropInPaths"].split()]
        files += [path for path in own if path.startswith("/etc/systemd/system/")]  # others are their package's
    return sorted(path for path in files if os.lstat(path).st_ctime > since.timestamp())


def wanted(entry: dict[str, Any], state: dict[str, str]) -> list[tuple[str, str]]:
    """Return what systemctl has to do for a unit, each with the reason."""
    actions = []
    if entry["run"] and state["UnitFileState"] in {"disabled", ""}:
        actions.append(("enable", "it is not enabled"))
    if state["ActiveState"] not in {"active", "reloading"}:
        refused = state["ConditionTimestamp"] and state["ConditionResult"] == "no"
        return actions + ([("start", f"it is {state['ActiveState']}")] if entry["run"] and not refused else [])
    files = unread(entry, state)
    if files:
        actions.append(("reload" if entry["reload"] else "restart", "it has not read " + ", ".join(files)))
    return actions


def spread(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry once, or for each element of its `each`; not at all where it is not wanted."""
    if not entry["when"]:
        return []
    if entry["each"] is None:
        return [entry]
    return [
        entry
        | {"unit": entry["unit"].replace("%s", item), "files": [name.replace("%s", item) for name in entry["files"]]}
        for item in entry["each"]
    ]


def main() -> None:
    """Ansible's way to run a module."""
    options = {
        "unit": {"type": "str", "required": True},
        "files": {"type": "list", "elements": "str", "default": []},
        "each": {"type": "list", "elements": "str"},
        "reload": {"type": "bool", "default": False},
        "run": {"type": "bool", "default": True},
        "when": {"type": "bool", "default": True},
    }
    units = {"type": "list", "elements": "dict", "required": True, "options": options}
    module = AnsibleModule({"units": units}, supports_check_mode=True)
    entries = [one for entry in module.params["units"] for one in spread(entry)]
    done, started = [], []
    current: set[str] = set()  # read everything that is there in this run
    known = states(module, list(dict.fromkeys(entry["unit"] for entry in entries))) if entries else {}
    stale = any(state["NeedDaemonReload"] == "yes" or state["LoadState"] == "not-found" for state in known.values())
    if stale and not module.check_mode:
        systemctl(module, "daemon-reload")
        known = states(module, list(known))
    for entry in entries:
        unit = entry["unit"]
        for action, reason in wanted(entry, known[unit]):
            if unit in current:
                continue
            if not module.check_mode:
                systemctl(module, action, unit)
            if action == "enable":
                known[unit]["UnitFileState"] = "enabled"
            elif action != "reload":
                current.add(unit)
            if action == "start":
                started.append(unit)
            done.append(f"{action} {unit}: {reason}")
    module.exit_json(changed=bool(done), done=done, started=started)


if __name__ == "__main__":
    main()
