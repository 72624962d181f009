"""Runs rows: load on a machine, a fault in the midst of it, then a count of every message by its id."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from neoforge_email import reconcile

from . import count, endpoint
from .count import Counted
from .inject import Fault, first
from .load import Load, Progress
from .machine import WINDOW, Machine, Service, Setup, machine
from .rows import Row

REST_SECONDS = 90.0
"""How long nothing may move until a row has come to rest: longer than a lease, which is all that brings back a claim whose
answer was lost."""
TIMERS_SECONDS = 6.0
"""How long to wait for a fault at what comes by time alone."""
CHUNK = 40
"""Rows that one machine runs at most before a new one is made."""


@dataclass
class Outcome:
    """A row's count, and what breaks its promise; `passes` are those of its points, where they were counted, by
    the process that passed it most under load; `passes_at_start` those that came before the load only."""

    row: Row
    counted: Counted
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unreached: bool = False
    allowed: int = 0
    """How many may arrive twice."""
    passes: dict[str, int] = field(default_factory=dict)
    passes_at_start: dict[str, int] = field(default_factory=dict)

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
    counts = f"counts-{key}"
    armed: dict[str, dict[str, object]] = {
        name: {
            "faults": [str(fault) for fault in row.faults.get(name, ())],
            "marker": f"{markers}-{name}",
            "counts": str(lab.directory / counts) if counting else "",
        }
        for name in (lab.services if counting else row.faults)
    }
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
    at_start: dict[str, dict[str, int]] = {}
    try:
        await lab.arm(armed, anew=row.anew or counting)
        if counting:
            await asyncio.sleep(0.5)
            at_start = _passes(lab.directory, counts)
        async with asyncio.timeout(2 * REST_SECONDS), asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run(progress))
            if row.disturb is not None:
                tasks.create_task(row.disturb(lab, progress))
        at_rest = await _rest(lab, key) and await _rest_awake(lab, key)
        if not await _reached(row, markers):
            at_rest = await _rest(lab, key)
        if counting:
            await asyncio.sleep(1)
    except (TimeoutError, ExceptionGroup) as error:
        outcome.problems.append(f"the row did not come to its end: {error!r}"[:300])
        at_rest = False
    finally:
        waker.cancel()
    if counting:
        _note_passes(outcome, at_start, _passes(lab.directory, counts))
    await _count(lab, key, progress, offset, outcome)
    for fault in _unreached(row, markers):
        outcome.unreached = True
        outcome.problems.append(f"not reached: {fault}")
    if not at_rest and not outcome.counted.stuck:
        outcome.problems.append("the queue did not come to rest")
    outcome.seconds = time.monotonic() - began
    return outcome


async def _rest(lab: Machine, key: str) -> bool:
    """Wait until no message of the row waits for anything but an operator, for as long as there are fewer and fewer."""
    fewest, deadline = math.inf, 0.0
    while True:
        async with lab.connection() as connection:
            _, waiting = await count.unfinished(connection, key)
            left = len(waiting)
            if lab.setup.events:
                left += await count.unreported(connection, key)
            if lab.endpoint is not None:
                left += await endpoint.untold(connection, key)
        if not left:
            await asyncio.sleep(0.2)
            return True
        if left < fewest:
            fewest, deadline = left, time.monotonic() + REST_SECONDS
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)


async def _rest_awake(lab: Machine, key: str) -> bool:
    """The same after those that stand still have woken up and done what they still want to."""
    if not any(service.stopped for service in lab.workers):
        return True
    while any(service.stopped for service in lab.workers):
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    return await _rest(lab, key)


def _unreached(row: Row, markers: Path) -> list[Fault]:
    """The last faults that have not happened. Those before them only prepare the way; after a kill they may have no turn."""
    return [
        faults[-1] for name, faults in row.faults.items() if not Path(f"{markers}-{name}.{len(faults) - 1}").exists()
    ]


async def _reached(row: Row, markers: Path) -> bool:
    """Whether all faults had happened before the messages were at rest; else wait for what a timer does."""
    before = deadline = time.monotonic()
    deadline += TIMERS_SECONDS
    while _unreached(row, markers) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return time.monotonic() - before < 0.1


async def _wake(services: Sequence[Service], setup: Setup) -> None:
    """A process that stopped itself wakes up when its lease has been over for a while."""
    while True:
        for service in services:
            if service.stopped:
                await asyncio.sleep(1.5 * (setup.lease_seconds or 5))
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
        outcome.problems += [
            f"the reconciler found {stuck.kind} {stuck.id}: {stuck.what}" async for stuck in reconcile.find(connection)
        ][:3]
        if lab.endpoint is not None and (missing := await endpoint.missing(connection, key, lab.endpoint)):
            outcome.problems.append(f"not all events of {len(missing)} came to the endpoint, such as {missing[0]}")
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


def _note_passes(outcome: Outcome, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    for process, passed in after.items():
        for point, number in passed.items():
            under_load = number - before.get(process, {}).get(point, 0)
            outcome.passes[point] = max(outcome.passes.get(point, 0), under_load)
            if not under_load:
                outcome.passes_at_start[point] = max(outcome.passes_at_start.get(point, 0), number)


def _passes(directory: Path, name: str) -> dict[str, dict[str, int]]:
    """How often each process has passed each point."""
    return {
        file.suffix: json.loads(file.read_text(encoding="utf-8"))
        for file in directory.glob(f"{name}.*")
        if not file.name.startswith("new-")
    }


# --- many rows ----------------------------------------------------------------------------------------------------

Report = Callable[[Outcome, float], None]


def run(
    rows: Sequence[Row], jobs: int, report: Report, *, until: float = math.inf, counting: bool = False
) -> list[Outcome]:
    """Run rows, `jobs` machines at a time, in processes of their own, where `report` hears of each, and which share of all
    is done. In the order of `rows`; those are missing that would begin after `until` on the monotonic clock. With `counting`
    the passes of every await are counted."""
    outcomes: dict[str, Outcome] = {}
    context = get_context("spawn")
    done, total = context.Value("d", 0.0), sum(map(_weight, rows))
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_share, initargs=(done, total)) as pool:
        futures = [pool.submit(_run, chunk, report, until, counting=counting) for chunk in _chunks(rows, jobs)]
        try:
            for future in as_completed(futures):
                outcomes.update({outcome.row.name: outcome for outcome in future.result()})
        except BaseException:
            # Each of them takes its machine down first.
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[row.name] for row in rows if row.name in outcomes]


def _weight(row: Row) -> float:
    """About how long a row takes, in seconds of a quiet computer."""
    return 3 + row.messages / 500


def _chunks(rows: Sequence[Row], jobs: int) -> list[list[Row]]:
    """What one machine runs: rows of one setup, no more than leaves work for all machines; in any order, lest one setup is
    always the last."""
    by_setup: dict[Setup, list[Row]] = defaultdict(list)
    for row in rows:
        by_setup[row.setup].append(row)
    size = min(max(len(rows) // (2 * jobs), 1), CHUNK)
    chunks = [group[start : start + size] for group in by_setup.values() for start in range(0, len(group), size)]
    random.Random(len(chunks)).shuffle(chunks)
    return chunks


_done: Any = None
_total = 0.0


def _share(done: Any, total: float) -> None:
    """In a process of the pool: what all of them have done, of how much."""
    global _done, _total
    _done, _total = done, total


def _run(rows: list[Row], report: Report, until: float, *, counting: bool) -> list[Outcome]:
    async def until_told() -> list[Outcome]:
        task = asyncio.ensure_future(_run_on_a_machine(rows, report, until, counting=counting))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(until_told())
    except asyncio.CancelledError:
        os._exit(143)  # the pool would give this process more to do


async def _run_on_a_machine(rows: list[Row], report: Report, until: float, *, counting: bool) -> list[Outcome]:
    """A machine that did not keep a promise is not used again."""
    outcomes: list[Outcome] = []
    left = list(rows)
    while left and time.monotonic() < until:
        async with machine(left[0].setup) as lab:
            while left and time.monotonic() < until:
                row = left.pop(0)
                outcome = await run_row(lab, row, counting=counting)
                for again in (_at_first(row), *[replace(_at_first(row), anew=True)] * 3):
                    if outcome.unreached:
                        outcome = await run_row(lab, again)
                outcomes.append(outcome)
                with _done.get_lock():
                    _done.value += _weight(row)
                report(outcome, _done.value / _total)
                if not outcome.good:
                    _keep_logs(lab, outcome)
                    break
    return outcomes


def _at_first(row: Row) -> Row:
    """The same with the last fault at its first occurrence: its turn did not come often enough."""
    return replace(
        row, faults={name: (*faults[:-1], first(faults[-1], faults[:-1])) for name, faults in row.faults.items()}
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
