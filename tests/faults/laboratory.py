"""Runs rows: load on a machine, a fault in the midst of it, then a count of every message by its id."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from uuid import UUID, uuid4

from . import count
from .count import Counted
from .load import Load, Progress
from .machine import WINDOW, Machine, Service, Setup, machine
from .rows import Row

REST_SECONDS = 90.0
"""How long a row may take to come to rest: longer than a lease, which is all that brings back a claim whose answer was lost."""
CHUNK = 12
"""Rows that one machine runs before a new one is made."""


@dataclass
class Outcome:
    """A row's count, and what breaks its promise; `passes` are those of its points, where they were counted."""

    row: Row
    counted: Counted
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unreached: bool = False
    allowed: int = 0
    """How many may arrive twice."""
    passes: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        return "kept" if self.good else "BROKEN: " + "; ".join(self.problems)


async def run_row(lab: Machine, row: Row, *, counting: bool = False) -> Outcome:
    """Run a row; raises nothing that the service could cause."""
    began = time.monotonic()
    key = uuid4().hex[:12]
    markers = lab.directory / f"marker-{key}"
    armed = {
        name: {
            "NEOFORGE_FAULT": "\n".join(map(str, faults)),
            "NEOFORGE_FAULT_MARKER": f"{markers}-{name}",
        }
        for name, faults in row.faults.items()
    }
    if counting:
        for name in lab.services:
            armed.setdefault(name, {})["NEOFORGE_FAULT_COUNTS"] = str(lab.directory / f"counts-{key}")
    offset = lab.journal.stat().st_size if lab.journal.exists() else 0
    progress = Progress(row.messages)
    load = Load(
        f"http://127.0.0.1:{lab.api_port}",
        lab.key,
        key,
        partial(row.body, key),
        row.rate,
        row.pause_seconds,
        row.keyless_every,
    )
    outcome = Outcome(row, Counted())
    waker = asyncio.create_task(_wake(lab.workers, lab.setup))
    try:
        await lab.arm(armed)
        async with asyncio.timeout(2 * REST_SECONDS), asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run(progress))
            if row.disturb is not None:
                tasks.create_task(row.disturb(lab, progress))
        at_rest = await _rest(lab, key)
        if counting or row.name.startswith("stop"):
            await asyncio.sleep(1)
    except (TimeoutError, ExceptionGroup) as error:
        outcome.problems.append(f"the row did not come to its end: {error!r}"[:300])
        at_rest = False
    finally:
        waker.cancel()
    if counting:
        outcome.passes = _passes(lab.directory, f"counts-{key}")
    await _count(lab, key, progress, offset, outcome)
    for name, faults in row.faults.items():
        # Those before the last one only prepare the way, and after a kill they may have no occasion.
        if not Path(f"{markers}-{name}.{len(faults) - 1}").exists():
            outcome.unreached = True
            outcome.problems.append(f"not reached: {faults[-1]}")
    if not at_rest and not outcome.counted.stuck:
        outcome.problems.append("the queue did not come to rest")
    outcome.seconds = time.monotonic() - began
    return outcome


async def _rest(lab: Machine, key: str) -> bool:
    """Wait until no message of the row waits for anything but an operator."""
    deadline = time.monotonic() + REST_SECONDS
    while time.monotonic() < deadline:
        async with lab.connection() as connection:
            _, waiting = await count.unfinished(connection, key)
            unreported = await count.unreported(connection, key) if lab.setup.events else 0
        if not waiting and not unreported:
            await asyncio.sleep(0.2)
            return True
        await asyncio.sleep(0.1)
    return False


async def _wake(services: Sequence[Service], setup: Setup) -> None:
    """A process that stopped itself wakes up when its lease has been over for a while."""
    while True:
        for service in services:
            if service.stopped:
                await asyncio.sleep(2 * (setup.lease_seconds or 5))
                service.send(signal.SIGCONT)
        await asyncio.sleep(0.1)


async def _count(lab: Machine, key: str, progress: Progress, offset: int, outcome: Outcome) -> None:
    row = outcome.row
    arrived, largest = count.arrivals(lab.journal, offset)
    in_a_call = {"smtp": WINDOW, "sendgrid": largest, "ses": 1}[row.setup.provider]
    outcome.allowed = row.calls * in_a_call if row.policy == "resend" else 0
    ids = {number: UUID(email_id) for number, email_id in progress.accepted.items()}
    async with lab.connection() as connection:
        outcome.counted = counted = await count.count(
            connection,
            key,
            set(ids.values()),
            arrived,
            refused={email_id for number, email_id in ids.items() if row.refuses(number)},
            unanswered=progress.unanswered,
            events=row.setup.events,
        )
    say = outcome.problems.append
    if counted.accepted + progress.unanswered < row.messages:
        say(f"only {counted.accepted} of {row.messages} were accepted")
    for words in (*counted.problems, *progress.conflicts[:3], *(f"refused: {text}" for text in progress.refused[:3])):
        say(words)
    if counted.lost:
        say(f"{counted.lost} lost")
    if counted.stuck:
        say(f"{counted.stuck} stuck")
    expected = row.held if row.held is not None else 0 if row.policy == "resend" else None
    if expected is not None and counted.held != expected:
        say(f"{counted.held} held")
    if counted.twice > outcome.allowed:
        say(f"{counted.twice} twice")


def _passes(directory: Path, name: str) -> dict[str, int]:
    """How often each point was passed, in the process that passed it most."""
    most: dict[str, int] = {}
    for file in directory.glob(f"{name}.*"):
        for point, passed in json.loads(file.read_text(encoding="utf-8")).items():
            most[point] = max(most.get(point, 0), passed)
    return most


# --- many rows ----------------------------------------------------------------------------------------------------

Report = Callable[[Outcome], None]


def run(rows: Sequence[Row], jobs: int, report: Report, *, counting: bool = False) -> list[Outcome]:
    """Run rows, `jobs` machines at a time, in processes of their own, where `report` hears of each. In the order of `rows`.

    `counting`: a machine a row, and the passes of every await are counted.
    """
    outcomes: dict[str, Outcome] = {}
    chunks = [[row] for row in rows] if counting else list(_chunks(rows))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run, chunk, report, counting=counting) for chunk in chunks]
        try:
            for future in as_completed(futures):
                outcomes.update({outcome.row.name: outcome for outcome in future.result()})
        except BaseException:
            # Each of them takes its machine down first.
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[row.name] for row in rows]


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one setup together, those that take long first."""
    by_setup: dict[Setup, list[Row]] = defaultdict(list)
    for row in rows:
        by_setup[row.setup].append(row)
    for group in sorted(by_setup.values(), key=lambda group: -sum(row.messages for row in group)):
        for start in range(0, len(group), CHUNK):
            yield group[start : start + CHUNK]


def _run(rows: list[Row], report: Report, *, counting: bool) -> list[Outcome]:
    async def until_told() -> list[Outcome]:
        task = asyncio.ensure_future(_run_on_a_machine(rows, report, counting=counting))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    return asyncio.run(until_told())


async def _run_on_a_machine(rows: list[Row], report: Report, *, counting: bool) -> list[Outcome]:
    """A machine that did not keep a promise is not used again."""
    outcomes: list[Outcome] = []
    left = list(rows)
    while left:
        async with machine(left[0].setup) as lab:
            while left:
                row = left.pop(0)
                outcome = await run_row(lab, row, counting=counting)
                for again in (row, _again(row)):
                    if outcome.unreached:
                        outcome = await run_row(lab, again)
                outcomes.append(outcome)
                report(outcome)
                if not outcome.good:
                    _keep_logs(lab, outcome)
                    break
    return outcomes


def _again(row: Row) -> Row:
    """The same with the last fault at its first occurrence: this time its turn did not come often enough."""
    return replace(
        row,
        faults={name: (*faults[:-1], replace(faults[-1], occurrence=1)) for name, faults in row.faults.items()},
    )


def _keep_logs(lab: Machine, outcome: Outcome) -> None:
    """For whoever looks into a broken row: everything that the processes said."""
    directory = os.environ.get("NEOFORGE_FAULT_LOGS")
    if not directory:
        return
    where = Path(directory) / re.sub("[^A-Za-z0-9.]+", "_", outcome.row.name)[:120]
    where.mkdir(parents=True, exist_ok=True)
    for log in lab.directory.glob("*.log"):
        (where / log.name).write_bytes(log.read_bytes())
    (where / "verdict").write_text(f"{outcome.verdict}\n", encoding="utf-8")
