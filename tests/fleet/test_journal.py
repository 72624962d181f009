"""The fleet's journals: what a machine logs is on another one within seconds, whatever happens to the machine then."""

from __future__ import annotations

import secrets
import time

import pytest

from .conftest import Fleet

KEPT = "/var/log/journal/remote"


@pytest.fixture(scope="module")
def keeper(fleet: Fleet) -> str:
    """The machine that keeps the journals."""
    if len(fleet.groups["fleet"]) == 1:
        pytest.skip("one machine keeps its own journal")
    return fleet.groups["monitoring"][0]


def arrived(fleet: Fleet, keeper: str, machine: str, word: str, seconds: float = 30) -> bool:
    """Whether a line comes to the keeper in time, into the file of that machine's address."""
    end = time.monotonic() + seconds
    files = [f"{KEPT}/remote-{address}.journal" for address in (fleet.addresses[machine], fleet.addresses6[machine])]
    look = f"journalctl --quiet --output=cat --lines=500 $(ls {' '.join(files)} 2>/dev/null | sed s/^/--file=/)"
    while time.monotonic() < end:
        if word in fleet.shell(keeper, look).stdout:
            return True
        time.sleep(0.5)
    return False


def test_what_a_machine_logs_is_kept_on_another_one(fleet: Fleet, keeper: str, each_machine: str) -> None:
    if each_machine == keeper:
        pytest.skip("it keeps the others' journals; its own is with its own backups")
    word = secrets.token_hex(8)
    fleet.ok(each_machine, f"logger {word}")
    assert arrived(fleet, keeper, each_machine, word)


def test_what_is_logged_while_the_keeper_is_away_comes_later(fleet: Fleet, keeper: str) -> None:
    machine = fleet.groups["postgresql"][0]
    word = secrets.token_hex(8)
    fleet.ok(keeper, "systemctl stop systemd-journal-remote.socket systemd-journal-remote.service")
    try:
        fleet.ok(machine, f"logger {word}")
        assert not arrived(fleet, keeper, machine, word, seconds=8)
    finally:
        fleet.ok(keeper, "systemctl start systemd-journal-remote.socket")
    assert arrived(fleet, keeper, machine, word)


def test_the_last_time_of_sending_is_a_metric(fleet: Fleet, keeper: str, each_machine: str) -> None:
    if each_machine == keeper:
        pytest.skip("it sends its journal nowhere")
    said = fleet.ok(
        each_machine,
        "systemctl start neoforge-machine-metrics && "
        "grep ^neoforge_journal_sent /var/lib/prometheus/node-exporter/machine.prom && date +%s",
        seconds=120,
    ).split()
    assert 0 <= int(said[2]) - int(said[1]) < 600
