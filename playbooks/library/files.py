#!/usr/bin/python
"""Brings files and directories to what they should be, all of a task in one call to the machine."""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: files
short_description: Files and directories with their content, owner and mode, in one call to the machine
description:
  - What a loop over C(template), C(copy) and C(file) does, for a whole list at once. Each call of a module costs a machine
    about 0.2 s of processor time, and such a loop calls two for each file.
  - A file is replaced as a whole and never seen half written or with another mode. What nothing differs in is left alone,
    its times as well, so that C(units) can go by them.
options:
  files:
    description: What is to be there, made in this order.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {type: str, required: true, description: "Where; C(%s) stands for the last part of an element of I(each)."}
      state: {type: str, choices: [file, directory], default: file, description: What it is; directories above are made as well.}
      template: {type: str, description: "Name of the template that makes the content; C(%s) stands for an element of I(each)."}
      copy: {type: str, description: "Name of the file on the controller that is the content; C(%s) as above."}
      content: {type: str, description: The content itself.}
      vars: {type: dict, description: Variables for the template.}
      each: {type: list, elements: str, description: "Make one for each of these; the template sees it as C(item)."}
      when: {type: bool, default: true, description: Whether it is wanted here. It is not removed where it is not.}
      owner: {type: str, default: root, description: Name of its user.}
      group: {type: str, default: root, description: Name of its group.}
      mode: {type: str, description: "As octal digits; by default C(0644) of a file, C(0755) of a directory."}
      validate: {type: str, description: "A command that has to succeed on it first, with C(%s) for the new file."}
"""
EXAMPLES = r"""
- name: Write the settings
  files:
    files:
      - {path: /etc/example, state: directory, mode: "0750"}
      - {path: /etc/example/main.conf, template: main.conf.j2, group: example, mode: "0640"}
      - {path: "/etc/systemd/system/example@%s.timer", template: timer.j2, each: [hourly, daily]}
"""
RETURN = r"""
paths:
  description: What was changed, or would be.
  type: list
  elements: str
  returned: always
"""

DIRECTORY = "a directory\n"


class Module(AnsibleModule):
    """A module that does not write every file's content to the machine's journal."""

    def _log_invocation(self) -> None:
        self.log("Invoked with " + " ".join(entry["path"] for entry in self.params["files"]))


def owned(path: Path, uid: int, gid: int, mode: int) -> bool:
    """Return whether a file or directory belongs to these and has this mode."""
    stat = path.stat()
    return (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (uid, gid, mode)


def before(path: Path) -> str | None:
    """Return what is there: a file's text, a word for a directory, None for nothing or for a link to a file, which goes."""
    if path.is_dir():
        return DIRECTORY
    if path.is_symlink() or not path.exists():
        return None
    return path.read_bytes().decode(errors="replace")  # as text, other ends of lines would look the same


def parents(path: Path) -> None:
    """Make the directories above, for everybody to read, whatever umask root has."""
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir()
            parent.chmod(0o755)


def write(module: AnsibleModule, path: Path, entry: dict[str, Any], uid: int, gid: int, mode: int) -> None:
    """Write a file beside its place, have it validated, and put it there."""
    parents(path)
    descriptor, name = tempfile.mkstemp(prefix=".ansible_tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(entry["content"])
            file.flush()
            os.fchown(descriptor, uid, gid)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        if entry["validate"]:
            status, said, complaint = module.run_command(shlex.split(entry["validate"].replace("%s", name)))
            if status:
                module.fail_json(msg=f"{path} was left as it is: {entry['validate']} says: {said}{complaint}")
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def bring(module: AnsibleModule, entry: dict[str, Any]) -> dict[str, str] | None:
    """Bring one to what it should be; its difference, or None where there is none."""
    path, directory = Path(entry["path"]), entry["state"] == "directory"
    mode = int(entry["mode"] or ("0755" if directory else "0644"), 8)
    old, new = before(path), DIRECTORY if directory else entry["content"]
    difference = {"before": old or "", "after": new, "before_header": str(path), "after_header": str(path)}
    if old is not None and path.is_dir() != directory:
        module.fail_json(msg=f"{path} is {'a file' if directory else 'a directory'}; move it away, then run again.")
    try:
        uid, gid = pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid
    except KeyError as error:
        if module.check_mode:  # a task before this one would have made them
            return difference
        module.fail_json(msg=f"{path}: {error.args[0]}")
    if old == new and owned(path, uid, gid, mode):
        return None
    if module.check_mode:
        return difference
    if old != new and not directory:
        write(module, path, entry, uid, gid, mode)
        return difference
    if directory and old is None:
        parents(path)
        path.mkdir()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return difference


def main() -> None:
    """Ansible's way to run a module."""
    options = {
        "path": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["file", "directory"], "default": "file"},
        "content": {"type": "str"},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        "mode": {"type": "str"},
        "validate": {"type": "str"},
    }
    content = [("state", "file", ["content"])]
    files = {"type": "list", "elements": "dict", "required": True, "options": options, "required_if": content}
    module = Module({"files": files}, supports_check_mode=True)
    differences = []
    for entry in module.params["files"]:
        try:
            if difference := bring(module, entry):
                differences.append(difference)
        except OSError as error:
            module.fail_json(msg=f"{entry['path']}: {error.strerror}")
    paths = [difference["after_header"] for difference in differences]
    module.exit_json(changed=bool(paths), paths=paths, diff=differences)


if __name__ == "__main__":
    main()
