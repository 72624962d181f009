"""`docs/fault-report.md`: what was done, what came of it, and whether every promise was kept."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from neoforge_email import __version__

from .awaits import BESIDE, PROFILES
from .inject import MODULES, points
from .laboratory import Outcome


def say(began: float, text: str) -> None:
    """A line of progress, with the time since the start (on the monotonic clock, which all processes share)."""
    print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)


def tell(began: float, outcome: Outcome) -> None:
    """The line of a row that has ended; heard in the process that ran it."""
    counted = outcome.counted
    numbers = (
        f"{counted.once} once, {counted.twice} twice, {counted.held} held, {counted.lost} lost, {counted.stuck} stuck"
    )
    say(began, f"{outcome.row.name} ({outcome.seconds:.1f} s): {numbers}: {outcome.verdict}")


HEAD = (
    "| row | messages | accepted | once | twice | uncertain | held | lost | stuck | twice at most | verdict |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
)


def markdown(
    groups: Mapping[str, Sequence[Outcome]], missed: Sequence[str], left_out: Sequence[str], arguments: Sequence[str]
) -> str:
    """The whole page. `missed` are rows whose await no load reached, `left_out` says what this computer cannot do."""
    outcomes = [outcome for group in groups.values() for outcome in group]
    broken = [outcome for outcome in outcomes if not outcome.good]
    totals: Counter[str] = Counter()
    for outcome in outcomes:
        totals.update(
            {name: getattr(outcome.counted, name) for name in ("accepted", "once", "twice", "held", "lost", "stuck")}
        )
    command = "make faults" + (f' ARGS="{shlex.join(arguments)}"' if arguments else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    seconds = sum(outcome.seconds for outcome in outcomes)
    parts = [
        "# Fault report\n",
        "Written by the fault laboratory (`tests/faults`); do not edit it, run it again.\n",
        f"- Command: `{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, version {__version__}",
        (
            f"- On {os.cpu_count()} cores, {memory:.0f} GiB of memory, Linux {platform.machine()}, "
            f"Python {platform.python_version()}; PostgreSQL with `fsync` on"
        ),
        (
            f"- {len(outcomes)} rows, {len(outcomes) - len(broken)} kept, {len(broken)} broken; {totals['accepted']} messages "
            f"accepted: {totals['once']} delivered once, {totals['twice']} twice, {totals['held']} held for an operator, "
            f"{totals['lost']} lost, {totals['stuck']} stuck; {seconds / 60:.0f} minutes of rows\n"
        ),
        EXPLANATION,
    ]
    if left_out:
        parts += ["Left out on this computer:\n", *(f"- {words}" for words in left_out), ""]
    for title, group in groups.items():
        parts += [f"## {title}\n", HEAD + "\n".join(_line(outcome) for outcome in group), ""]
    if missed:
        parts += ["## Not reached\n", "No load reaches these awaits:\n", *(f"- {name}" for name in missed), ""]
    parts += ["## Loads\n", "A row for one await runs under the first load that reaches it:", ""]
    parts += [f"- {profile.name}" for profile in PROFILES]
    parts += ["", f"The hot path is `{'`, `'.join(MODULES)}`: {len(points())} awaits. Without rows are:", ""]
    parts += [f"- `{name}`: {reason}" for name, reason in BESIDE.items()]
    return "\n".join(parts) + "\n"


EXPLANATION = """\
Every row is real processes (PostgreSQL, Valkey, API, workers, an SMTP server with a journal), each started again one second
after it died, and clients that repeat what was not answered `202` under the same idempotency key. Messages are counted by id:
*accepted* were answered `202`; *once* and *twice* are arrivals in the provider's journal (a message whose only recipient the
provider refuses counts as once); *uncertain* have such an entry in their timeline, and all that arrived twice must; *held* wait
for an operator; *stuck* are unfinished and not held after 90 s. *Twice at most* is 0 where the outcome is definite or
the policy is `hold`; otherwise it is the messages of the provider calls that were under way.

A row named `kill before delivery:Delivery._call:connection.send` kills the process with SIGKILL right before that `await`.
`cut-database` and `cut-provider` shut down the process's connections at that moment, `raise-…` lets the await fail as asyncpg
does (connection lost, deadlock, disk full), `stop` suspends the process there until its lease is long over.
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
