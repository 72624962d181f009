"""A reboot brings everything back by itself."""

from __future__ import annotations

import time

import pytest

from .conftest import Edge, Fleet


def test_a_rebooted_machine_comes_back_and_delivers(
    fleet: Fleet, edge: Edge, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = fleet.admin
    boot = fleet.ok(machine, "cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestamp")
    started = time.monotonic()
    fleet.shell(machine, "systemctl reboot")
    while time.monotonic() - started < 120:
        time.sleep(1)
        done = fleet.shell(machine, "systemctl show --property=UserspaceTimestamp", seconds=20)
        if done.returncode == 0 and done.stdout.strip() and done.stdout.strip() not in boot:
            break
    state = fleet.shell(machine, "systemctl is-system-running --wait", seconds=120).stdout.strip()
    seconds = time.monotonic() - started
    failed = fleet.shell(machine, "systemctl --failed --no-legend").stdout
    assert state == "running", failed

    before = len(fleet.arrivals())
    answer = edge.post({"to": "after-reboot@example.com", "subject": "Back", "text": "By itself."})
    deadline = time.monotonic() + 30
    while answer.status != 202 and time.monotonic() < deadline:
        time.sleep(1)
        answer = edge.post({"to": "after-reboot@example.com", "subject": "Back", "text": "By itself."})
    assert answer.status == 202
    fleet.wait_for_empty_queue(30)
    assert [mail["recipients"] for mail in fleet.arrivals()[before:]] == [["after-reboot@example.com"]]
    with capsys.disabled():
        print(f"\nreboot: running after {seconds:.0f} s")  # noqa: T201
