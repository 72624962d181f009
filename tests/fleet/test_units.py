"""Units run with what is written: the module `units`, asked on a running machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import INVENTORY, ROOT, Fleet

NAMES = ["neoforge-test-one.service", "neoforge-test-two.service"]
SETTINGS = "/run/neoforge-test-settings"
UNIT = "[Service]\nExecStart=/usr/bin/sleep infinity\nExecReload=/usr/bin/true\n[Install]\nWantedBy=multi-user.target\n"


@pytest.fixture
def machine(fleet: Fleet) -> Iterator[str]:
    for name in NAMES:
        fleet.ok(fleet.admin, f"cat >/etc/systemd/system/{name}", UNIT)
    fleet.ok(fleet.admin, f"touch {SETTINGS}")
    yield fleet.admin
    files = " ".join(f"/etc/systemd/system/{name}" for name in NAMES)
    fleet.ok(
        fleet.admin,
        f"systemctl disable --quiet --now {' '.join(NAMES)}; rm {files} {SETTINGS}; systemctl daemon-reload",
    )


def bring(machine: str, *units: dict[str, Any], check: bool = False) -> Any:
    """Run the module once; what it answers."""
    argument = json.dumps({"units": list(units)})
    command = ["ansible", machine, "-i", INVENTORY, "--one-line", "-m", "units", "-a", argument, *["--check"] * check]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.split("=>", 1)[1])


def pids(fleet: Fleet, machine: str) -> list[str]:
    return [fleet.ok(machine, f"systemctl show --property=MainPID --value {name}").strip() for name in NAMES]


def test_a_unit_is_restarted_for_what_it_has_not_read_and_no_other_is(fleet: Fleet, machine: str) -> None:
    one: dict[str, Any] = {"unit": NAMES[0], "files": [f"{SETTINGS}*"]}
    two = {"unit": NAMES[1]}
    assert bring(machine, one, two, check=True)["changed"]
    assert pids(fleet, machine) == ["0", "0"]
    assert bring(machine, one, two)["started"] == NAMES
    assert fleet.ok(machine, f"systemctl is-enabled {' '.join(NAMES)}").split() == ["enabled", "enabled"]
    assert not bring(machine, one, two)["changed"]
    before = pids(fleet, machine)
    fleet.ok(machine, f"touch {SETTINGS}")
    wanted = [f"restart {NAMES[0]}: it has not read {SETTINGS}"]
    assert bring(machine, one, two, check=True)["done"] == wanted
    assert pids(fleet, machine) == before
    assert bring(machine, one, two)["done"] == wanted
    after = pids(fleet, machine)
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    assert not bring(machine, one, two)["changed"]


def test_a_changed_unit_file_restarts_its_unit_also_when_systemd_has_read_it(fleet: Fleet, machine: str) -> None:
    one, two = {"unit": NAMES[0]}, {"unit": NAMES[1]}
    bring(machine, one, two)
    before = pids(fleet, machine)
    fleet.ok(machine, f"echo '# changed' >>/etc/systemd/system/{NAMES[1]}; systemctl daemon-reload")
    assert bring(machine, one, two)["done"] == [f"restart {NAMES[1]}: it has not read /etc/systemd/system/{NAMES[1]}"]
    after = pids(fleet, machine)
    assert (after[0] == before[0], after[1] != before[1]) == (True, True)


def test_what_can_be_reloaded_keeps_its_process(fleet: Fleet, machine: str) -> None:
    entries: list[dict[str, Any]] = [{"unit": NAMES[0]}, {"unit": NAMES[0], "files": [SETTINGS], "reload": True}]
    bring(machine, *entries)
    before = pids(fleet, machine)
    fleet.ok(machine, f"touch {SETTINGS}")
    assert bring(machine, *entries)["done"] == [f"reload {NAMES[0]}: it has not read {SETTINGS}"]
    assert pids(fleet, machine) == before
    assert not bring(machine, *entries)["changed"]


def test_a_unit_that_does_not_start_fails_the_run_and_says_where_to_read_why(machine: str) -> None:
    answer = bring(machine, {"unit": "neoforge-test-none.service"})
    assert "neoforge-test-none.service" in answer["msg"]
    assert "journalctl -u neoforge-test-none.service" in answer["msg"]
