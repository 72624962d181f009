"""`make faults`: run the fault laboratory, and write its report."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from . import clock, disk, report
from .awaits import PROFILES, candidates, each_await, elsewhere, subset
from .inject import points
from .laboratory import Outcome, run
from .rows import Row, scenarios

REPORT = Path("docs/fault-report.md")


def main(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say = partial(report.say, began)
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names of all rows, and run nothing")
    parser.add_argument(
        "--only", metavar="PATTERN", help="rows whose name this regular expression is found in; no report"
    )
    parser.add_argument("--subset", action="store_true", help="the rows of `make test`; no report")
    parser.add_argument("--jobs", type=int, default=5, metavar="N", help="machines at a time (5)")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="begin no row later than that; the report says which were not run"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help=f"write the report here ({REPORT})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here, too")
    given = parser.parse_args(arguments)
    wanted = re.compile(given.only or "")

    written = [row for row in (subset() if given.subset else scenarios()) if wanted.search(row.name)]
    found = [] if given.subset else points()
    names = [name for name, _, _ in candidates(found) if wanted.search(name)]
    if given.list:
        print("\n".join([*(row.name for row in written), *names]))
        return 0
    if not written and not names:
        parser.error(f"no row has a name like {given.only!r}")
    left_out = unavailable()
    for words in left_out:
        say(f"LEFT OUT: {words}")
    made: list[Row] = []
    missed: list[str] = []
    reached: list[Outcome] = []
    if names:
        say(f"{len(PROFILES)} loads without a further fault, to see which awaits they reach")
        reached = run(PROFILES, given.jobs, partial(report.tell, began, time.monotonic()), counting=True)
        made, missed = each_await(found, reached)
        made = [row for row in made if wanted.search(row.name)]
        missed = [name for name in missed if wanted.search(name)]
    say(f"{len(written)} rows and {len(made)} for single awaits, {given.jobs} machines at a time")
    # Whatever time there is, no module is left for the end.
    random.Random(0).shuffle(made)
    until = began + 60 * given.minutes if given.minutes else math.inf
    outcomes = run(written, given.jobs, partial(report.tell, began, time.monotonic()), until=until)
    outcomes += run(made, given.jobs, partial(report.tell, began, time.monotonic()), until=until)
    # On machines of their own, when the computer has little else to do, and under another load where one leads there.
    by_name = {row.name: row for row in (*written, *made)}
    for _ in range(2):
        if late := [by_name[outcome.row.name] for outcome in outcomes if outcome.unreached]:
            late = [elsewhere(row, found, reached) for row in late]
            by_name |= {row.name: row for row in late}
            say(f"{len(late)} rows whose fault did not come to pass, once more")
            again = {
                new.row.name: new for new in run(late, 2, partial(report.tell, began, time.monotonic()), until=until)
            }
            outcomes = [again.get(outcome.row.name, outcome) for outcome in outcomes]
    run_names = {outcome.row.name for outcome in outcomes}
    not_run = [row.name for row in (*written, *made) if row.name not in run_names]
    for name in missed:
        say(f"NOT REACHED: {name}")
    if given.json:
        given.json.write_text(json.dumps([_plain(outcome) for outcome in outcomes], indent=1), encoding="utf-8")
    if given.report or not (given.only or given.subset):
        file = given.report or REPORT
        named = [outcome for outcome in outcomes if outcome.row in written]
        each = [outcome for outcome in outcomes if outcome.row not in written]
        options = [f"--{name}={value}" for name in ("only", "minutes") if (value := getattr(given, name))]
        text = report.markdown(named, each, missed, not_run, left_out, options, time.monotonic() - began)
        file.write_text(text, encoding="utf-8")
        say(f"written: {file}")
    broken = sum(not outcome.good for outcome in outcomes)
    say(
        f"{len(outcomes) - broken} rows kept their promise, {broken} did not, {len(missed)} were not reached, "
        f"{len(not_run)} not run"
    )
    return 1 if broken or missed or not_run else 0


def unavailable() -> list[str]:
    """What this computer cannot do, in words."""
    words = []
    if clock.library() is None:
        words.append("stepping clocks: libfaketime is not installed (`apt-get install libfaketime`)")
    if not disk.usable():
        words.append("full disks: mounting a tmpfs needs root")
    return words


def _plain(outcome: Outcome) -> dict[str, object]:
    own = {name: getattr(outcome, name) for name in ("verdict", "seconds", "allowed")}
    return {"row": outcome.row.name, "messages": outcome.row.messages, **own, **asdict(outcome.counted)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
