"""A change that locks the operator out, and how long it lasts: seen by new connections, over IPv4 and IPv6."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import INVENTORY, ROOT, Fleet, Show

PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))


@dataclass(frozen=True)
class LockedOut:
    said: str
    seconds4: float
    seconds6: float


def command(tag: str, machine: str, variables: dict[str, Any]) -> list[str]:
    extra = ["--extra-vars", json.dumps(variables)] if variables else []
    return [PLAYBOOK, "site.yml", "-i", INVENTORY, "--tags", tag, "--limit", machine, *extra]


def playbook(tag: str, machine: str, variables: dict[str, Any] | None = None) -> None:
    """Run a part of site.yml, which must succeed."""
    line = command(tag, machine, variables or {})
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


class Watch(threading.Thread):
    """Knocks at one address until told to stop; the longest time between two new connections that came in."""

    def __init__(self, fleet: Fleet, machine: str, address: str) -> None:
        super().__init__(daemon=True)
        # The first value of an option wins: these come before the ones that share a connection.
        self.line = ["ssh", "-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ConnectTimeout=1"]
        self.line += ["-o", f"HostName={address}", *fleet.ssh_options, machine, "true"]
        self.longest = 0.0
        self.stop = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self.stop.is_set():
            done = subprocess.run(self.line, capture_output=True, timeout=30, check=False)
            if done.returncode == 0:
                self.longest = max(self.longest, time.monotonic() - last)
                last = time.monotonic()
            time.sleep(0.3)
        self.longest = max(self.longest, time.monotonic() - last)


def lock_out(fleet: Fleet, tag: str, variables: dict[str, Any]) -> LockedOut:
    """Run a part of site.yml with values that lock the operator out. It must fail; what it said, and for how long."""
    machine = fleet.admin
    watches = [Watch(fleet, machine, addresses[machine]) for addresses in (fleet.addresses, fleet.addresses6)]
    for watch in watches:
        watch.start()
    try:
        done = subprocess.run(
            command(tag, machine, variables),
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_TIMEOUT": "5"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode != 0, done.stdout[-3000:]
    finally:
        for watch in watches:
            watch.stop.set()
        for watch in watches:
            watch.join(60)
    return LockedOut(done.stdout + done.stderr, *(watch.longest for watch in watches))


def taken_back(fleet: Fleet, tag: str, variables: dict[str, Any], said: str, state: str, show: Show) -> None:
    """Values that lock the operator out must fail with `said`, and the machine itself must bring `state` (a command) back."""
    before = fleet.ok(fleet.admin, state)
    locked = lock_out(fleet, tag, variables)
    assert said in locked.said
    assert fleet.ok(fleet.admin, state) == before
    show(f"{tag}: locked out for {locked.seconds4:.0f} s over IPv4, {locked.seconds6:.0f} s over IPv6")
    assert 1 < locked.seconds4 < 30
    assert 1 < locked.seconds6 < 30
    # The candidate on the machine is the bad one until the next run: put the good one back.
    playbook(tag, fleet.admin)
