"""The module `files`, run by Ansible on this computer."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_inventory import ROOT

OWN = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


def bring(directory: Path, *files: dict[str, Any], check: bool = False) -> Any:
    """Run the module once; what it answers."""
    entries = [OWN | file for file in files]
    playbook = directory / "playbook.yml"
    task = {"files": {"files": entries}, "register": "__answer", "ignore_errors": True}
    tasks = [
        task,
        {
            "ansible.builtin.copy": {"dest": str(directory / "answer"), "content": "{{ __answer | to_json }}"},
            "check_mode": False,
        },
    ]
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        str(playbook),
        "--connection",
        "local",
        *["--check"] * check,
    ]
    interpreter = ["--extra-vars", f"ansible_python_interpreter={sys.executable}"]
    subprocess.run([*command, "--diff", *interpreter], cwd=ROOT, check=True, capture_output=True)
    return json.loads((directory / "answer").read_text())


def test_a_template_a_file_and_a_directory_come_in_one_call_and_a_second_one_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/timer.j2").write_text("OnCalendar={{ item }} {{ zone }}\n")
    (tmp_path / "program").write_text("#!/bin/sh\n")
    made = tmp_path / "made"
    files: list[dict[str, Any]] = [
        {"path": f"{made}/deep/%s.timer", "template": "timer.j2", "each": ["daily", "weekly"], "vars": {"zone": "UTC"}},
        {"path": f"{made}/program", "copy": str(tmp_path / "program"), "mode": "0755"},
        {"path": f"{made}/secrets", "state": "directory", "mode": "0700"},
        {"path": f"{made}/elsewhere", "content": "not here", "when": False},
    ]
    wanted = [f"{made}/deep/daily.timer", f"{made}/deep/weekly.timer", f"{made}/program", f"{made}/secrets"]
    assert bring(tmp_path, *files, check=True)["paths"] == wanted
    assert not made.exists()
    umask = os.umask(0o077)
    try:
        assert bring(tmp_path, *files)["paths"] == wanted
    finally:
        os.umask(umask)
    assert (made / "deep/weekly.timer").read_text() == "OnCalendar=weekly UTC\n"
    modes = {str(path): path.stat().st_mode & 0o777 for path in [made / "deep", *map(Path, wanted)]}
    assert modes == dict(zip([f"{made}/deep", *wanted], [0o755, 0o644, 0o644, 0o755, 0o700], strict=True))
    assert bring(tmp_path, *files)["changed"] is False


def test_a_file_that_differs_in_nothing_but_its_mode_keeps_its_content_s_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("same")
    path.chmod(0o666)
    before = path.stat()
    assert bring(tmp_path, {"path": str(path), "content": "same", "mode": "0640"})["changed"] is True
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino, after.st_mode & 0o777) == (before.st_mtime_ns, before.st_ino, 0o640)


def test_other_ends_of_lines_are_another_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\r\n")
    assert bring(tmp_path, {"path": str(path), "content": "one\n"})["changed"] is True
    assert path.read_bytes() == b"one\n"


def test_what_its_program_refuses_is_not_put_in_place_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "conf/main.conf"
    path.parent.mkdir()
    path.write_text("good\n")
    answer = bring(tmp_path, {"path": str(path), "content": "bad\n", "validate": "grep -c good %s"})
    assert re.search(r"main.conf was left as it is: grep -c good %s says: 0", answer["msg"])
    assert [(entry.name, entry.read_text()) for entry in path.parent.iterdir()] == [("main.conf", "good\n")]


def test_a_link_in_a_file_s_place_is_replaced_and_what_it_led_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("of somebody else")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert bring(tmp_path, {"path": str(tmp_path / "link"), "content": "ours"})["changed"] is True
    assert (tmp_path / "target").read_text() == "of somebody else"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ({"path": "/", "content": "x"}, "/ is a directory; move it away, then run again."),
        ({"path": "/nowhere/x", "content": "x", "owner": "nobody-of-that-name"}, "nobody-of-that-name"),
        (
            {"path": "/nowhere/x", "content": "x", "owners": "root"},
            "Unsupported parameters for (files) module: files.owners",
        ),
        ({"path": "/nowhere/x"}, "state is file but all of the following are missing: content"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(tmp_path: Path, file: dict[str, Any], sentence: str) -> None:
    assert sentence in bring(tmp_path, file)["msg"]
    assert not Path("/nowhere").exists()
