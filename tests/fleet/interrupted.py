"""Runs of `site.yml` whose controller is killed: `python -m tests.fleet.interrupted --help`.

SIGKILL ends Ansible and all that it started here, a moment after a task began; what the task started on a machine is left to
itself. Every run is made with `-vvv --diff`, and what it said is kept beside the inventory's secrets, in `runs/`, where
test_secrets.py looks for secrets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .conftest import INVENTORY, ROOT, Fleet
from .vault import Vault

# Beginnings of the output's lines for the tasks at which a run on a bare machine is killed.
PLACES = [
    "TASK [base : Install packages]",
    "TASK [redis : Write the users]",
    "TASK [nginx : Prove that it redirects to HTTPS]",
]
REPORT = ROOT / "docs/interrupted-report.md"
TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(.*)\]", re.MULTILINE)
CHANGED = re.compile(r"^\S+ +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.MULTILINE)
LIMIT = 1200  # seconds for one run, on a computer that does other things as well


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    listed = subprocess.run(["ps", "--no-headers", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    parents = [(int(pid), int(parent)) for pid, parent in (line.split() for line in listed.stdout.splitlines())]
    found = [process]
    for above in found:
        found += [pid for pid, parent in parents if parent == above]
    return found[1:]


class Run:
    """One run of site.yml."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.output = log.open("wb")
        environment = os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            ["ansible-playbook", "site.yml", "-i", INVENTORY, "-vvv", "--diff"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self.watchdog = threading.Timer(LIMIT, self.kill)
        self.watchdog.start()

    def kill(self) -> None:
        """Ansible's workers are in sessions of their own; the controller goes first, so that it starts no more."""
        below = descendants(self.process.pid)
        for process in (self.process.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tasks(self) -> int:
        return len(TASK.findall(self.said()))

    def end(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait()
        self.watchdog.cancel()
        self.output.close()
        return status

    def kill_at(self, place: str | int, delay: float) -> bool:
        """Kill it `delay` seconds after it came to a task, by the beginning of its line or by its number; whether it came."""
        begun, rest = 0, ""
        with self.log.open(encoding="utf-8", errors="replace") as output:
            while self.process.poll() is None:
                *lines, rest = (rest + output.read()).split("\n")
                begun += sum(bool(TASK.match(line)) for line in lines)
                if begun >= place if isinstance(place, int) else any(line.startswith(place) for line in lines):
                    time.sleep(delay)
                    self.kill()
                    break
                time.sleep(0.2)
        return self.end() == -signal.SIGKILL


def whole(log: Path) -> tuple[int, int]:
    """Run to the end; how many tasks changed something, and how many there were. Ends the program where the run failed."""
    run = Run(log)
    status = run.end()
    recap = CHANGED.findall(run.said())
    if status or not recap:
        sys.exit(f"The run did not come to its end (status {status}); {log} says why:\n{run.said()[-3000:]}")
    return sum(int(changed) for changed, _, _ in recap), run.tasks()


def main() -> None:
    """Kill at the named places one after the other; with --each, at places by chance, with two whole runs after each."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet.interrupted", description=main.__doc__)
    parser.add_argument("--each", type=int, default=0, help="so many kills, each followed by two whole runs")
    parser.add_argument("--seed", type=int, default=0, help="of the places chosen by chance")
    options = parser.parse_args()
    vault = Vault(Fleet().secrets_file)
    directory = vault.runs
    directory.mkdir(parents=True, exist_ok=True)
    if options.each:
        each(vault, options.each, random.Random(options.seed))
        return
    for number, place in enumerate(PLACES, 1):
        if not Run(directory / f"killed-{number}.log").kill_at(place, 1):
            sys.exit(f"Run {number} was not killed: it came to its end without {place}; see {directory}.")
        print(f"killed 1 s after {place}", flush=True)


def each(vault: Vault, kills: int, chance: random.Random) -> None:
    """Kill a run that has a password to change; the next has to converge, and the one after to change nothing."""
    directory = vault.runs
    _, tasks = whole(directory / "before.log")
    rows: list[str] = []
    for number in range(1, kills + 1):
        name = chance.choice(vault.passwords())
        vault.forget(name)
        run = Run(directory / f"killed-{number}.log")
        killed = run.kill_at(chance.randrange(1, tasks), chance.random())
        place = TASK.findall(run.said())[-1] if killed else "not killed, it had ended"
        changed, tasks = whole(directory / f"after-{number}.log")
        again, _ = whole(directory / f"again-{number}.log")
        rows.append(f"| {number} | `{name}` | {place} | {changed} | {again} |")
        print(rows[-1], flush=True)
        report(rows, kills)
        if again:
            sys.exit(f"The second run after kill {number} changed something; see {directory}.")


def report(rows: list[str], kills: int) -> None:
    """Write what was found so far."""
    lines = [
        "# Killed runs of `site.yml`",
        "",
        f"Made by `make test-interrupted` on {time.strftime('%Y-%m-%d')}: {len(rows)} of {kills} runs that had a password to",
        "renew, each ended by SIGKILL at a task drawn by chance. Each time the next run converged; how many tasks of it changed",
        "something, and how many of the one after, which have to be none:",
        "",
        "| | password renewed | killed at | next run changed | the one after |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    REPORT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
