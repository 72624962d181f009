"""Tells Prometheus how a run of site.yml ended: when, what changed and failed on each machine, and of which revision it was.

At the end of a run that may change things, files of metrics are left on the monitoring machine for its node exporter. A run that
cannot reach that machine says so and is not failed by it; ConvergeOld notices in time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ansible import context
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: converge
type: aggregate
short_description: Metrics of each run of site.yml
description: Leaves metrics of each run of site.yml on the monitoring machine.
"""
ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = "/var/lib/prometheus/node-exporter"
HELP = {
    "timestamp_seconds": "When site.yml ran last",
    "changed_tasks": "What that run changed",
    "failed_tasks": "What failed in that run, an unreachable machine included",
}


class CallbackModule(CallbackBase):
    """Counts nothing itself: Ansible does."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "converge"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.is_site = False
        self.fleet: list[str] = []
        self.monitoring: list[str] = []

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self.is_site = self.is_site or f"{ROOT}/playbooks/site.yml:" in play.get_path()
        groups = play.get_variable_manager()._inventory.get_groups_dict()
        self.fleet, self.monitoring = groups.get("fleet", []), groups.get("monitoring", [])

    def v2_playbook_on_stats(self, stats: Any) -> None:
        given = context.CLIARGS
        machines = [machine for machine in self.fleet if machine in stats.processed]
        if not self.is_site or given["check"] or set(given["tags"]) - {"all"} or not machines or not self.monitoring:
            return
        # A file a machine: a run with --limit leaves what is known of the others.
        commit = revision()
        files = [
            {
                "path": f"{DIRECTORY}/converge-{machine}.prom",
                "content": metrics(machine, commit, stats.summarize(machine)),
            }
            for machine in machines
        ]
        command = [str(Path(sys.argv[0]).with_name("ansible")), self.monitoring[0]]
        command += ["-m", "files", "-a", json.dumps({"files": files})]
        command += [part for inventory in given["inventory"] for part in ("-i", inventory)]
        command += [part for extra in given["extra_vars"] for part in ("-e", extra)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            self._display.warning(
                f"{self.monitoring[0]} was not told of this run: {(done.stdout + done.stderr)[-500:]}"
            )


def metrics(machine: str, commit: str, summary: dict[str, int]) -> str:
    """Return the metrics of a run of the project's `commit` on a machine, of Ansible's summary of it."""
    values = {
        "timestamp_seconds": int(time.time()),
        "changed_tasks": summary["changed"],
        "failed_tasks": summary["failures"] + summary["unreachable"],
    }
    lines = [f'neoforge_converge_info{{machine="{machine}",revision="{commit}"}} 1']
    for name, value in values.items():
        lines.append(f"# HELP neoforge_converge_{name} {HELP[name]}")
        lines.append(f"# TYPE neoforge_converge_{name} gauge")
        lines.append(f'neoforge_converge_{name}{{machine="{machine}"}} {value}')
    return "\n".join(lines) + "\n"


def revision() -> str:
    """Return the project's commit, with a + where files differ from it; nothing where it is no checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
