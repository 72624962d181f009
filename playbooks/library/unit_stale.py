#!/usr/bin/python
"""Says whether units run with files that were written after they had read them, as after a run that was cut off."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from glob import glob

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: unit_stale
short_description: Whether systemd's units run with older files than those that are there
description:
  - Changes nothing itself. It reports a change where a unit has to read its files anew, so that it can notify the handlers
    which a run lost that was killed between a file and its handler.
  - A file counts from its change of inode (ctime), a unit from its last start or reload, and a unit file that systemd has
    not read yet always counts.
options:
  units:
    description: Each unit with the files that it reads at its start or reload; names of files may be patterns.
    type: list
    elements: dict
    required: true
    suboptions:
      unit: {type: str, required: true, description: Name of the unit.}
      files: {type: list, elements: str, required: true, description: What it reads.}
"""
EXAMPLES = r"""
- name: See whether NGINX runs with what is written
  unit_stale:
    units: [{unit: nginx.service, files: [/etc/nginx/nginx.conf]}]
  notify: Restart NGINX
"""
RETURN = r"""
stale:
  description: The units that have to be started anew, each with what it has not read.
  type: dict
  returned: always
"""


def stale(module: AnsibleModule, unit: str, patterns: list[str]) -> str | None:
    """Return what systemd or the running unit has not read, or None."""
    command = [
        "systemctl",
        "show",
        unit,
        "--timestamp=us+utc",
        "--property=ActiveState,NeedDaemonReload,StateChangeTimestamp",
    ]
    lines = module.run_command(command, check_rc=True)[1].splitlines()
    state = dict(line.split("=", 1) for line in lines)
    if state["NeedDaemonReload"] == "yes":
        return "its unit file"
    if state["ActiveState"] != "active":
        return None
    since = datetime.strptime(state["StateChangeTimestamp"], "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=UTC)
    files = [path for pattern in patterns for path in glob(pattern)]  # noqa: PTH207 - an absolute pattern
    newer = [path for path in files if os.lstat(path).st_ctime > since.timestamp()]
    return ", ".join(sorted(newer)) or None


def main() -> None:
    """Ansible's way to run a module."""
    options = {
        "unit": {"type": "str", "required": True},
        "files": {"type": "list", "elements": "str", "required": True},
    }
    units = {"type": "list", "elements": "dict", "required": True, "options": options}
    module = AnsibleModule({"units": units}, supports_check_mode=True)
    found = {entry["unit"]: stale(module, entry["unit"], entry["files"]) for entry in module.params["units"]}
    behind = {unit: what for unit, what in found.items() if what}
    module.exit_json(changed=bool(behind), stale=behind)


if __name__ == "__main__":
    main()
