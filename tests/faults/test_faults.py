"""The laboratory's most telling rows, and the laboratory itself. All rows: `make faults`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import awaits, inject
from tests.faults.inject import Fault, Point


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each row of the subset."""
    file = tmp_path_factory.mktemp("faults") / "rows.json"
    command = [sys.executable, "-m", "tests.faults", "--subset", "--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert file.exists(), done.stdout
    print(done.stdout)
    return {row["row"]: row["verdict"] for row in json.loads(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("row", [row.name for row in awaits.subset()])
def test_every_promise_is_kept(row: str, verdicts: dict[str, str]) -> None:
    assert verdicts[row] == "kept"


SOURCE = """
class Shop:
    async def open(self):
        async with self.lock, connect("here", 1) as line:
            async for order in line.orders():
                await self.serve(order); await self.serve(await order.details)
        return [x async for x in self.all()]
async def sleep():
    await asyncio.sleep(1) or await nothing
"""


def test_every_await_is_found_by_name() -> None:
    assert [str(point).removeprefix("m:") for point in inject.points_of("m", SOURCE)] == [
        "Shop.open:enter self.lock",
        "Shop.open:leave self.lock",
        "Shop.open:enter connect(here)",
        "Shop.open:leave connect(here)",
        "Shop.open:next line.orders",
        "Shop.open:self.serve",
        "Shop.open:self.serve#2",
        "Shop.open:order.details",
        "Shop.open:next self.all",
        "sleep:asyncio.sleep",
        "sleep:nothing",
    ]


def test_no_two_awaits_of_the_hot_path_have_the_same_name() -> None:
    points = inject.points()
    assert len(points) > 150
    assert len(set(points)) == len(points)


def test_every_await_has_rows_or_a_reason() -> None:
    points = inject.points()
    named = {fault.point for _, fault, _ in awaits.candidates(points)}
    assert not [point for point in points if point not in named and not str(point).startswith(tuple(awaits.BESIDE))]
    assert not [name for name in awaits.BESIDE if not any(str(point).startswith(name) for point in points)]


def test_a_fault_is_read_as_it_is_written() -> None:
    fault = Fault(Point("outbox", "claim", "pool.fetch#2"), "after", "raise-lost", 7)
    assert Fault.parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("outbox:claim:pool.fetch:before:kill:2", -9, ["asked"]),
        ("outbox:claim:pool.fetch:after:kill:2", -9, ["asked", "asked"]),
        ("outbox:claim:pool.fetch:before:raise-lost:2", 0, ["asked", "ConnectionDoesNotExistError", "asked"]),
        ("outbox:claim:pool.fetch:after:raise-lost:2", 0, ["asked", "asked", "ConnectionDoesNotExistError", "asked"]),
    ],
)
def test_a_fault_happens_where_and_when_it_says(fault: str, code: int, said: list[str], tmp_path: Path) -> None:
    script = """
import asyncio
from datetime import timedelta
from tests.faults import inject

class Pool:
    async def fetch(self, *_):
        print("asked", flush=True)
        return []

async def main():
    for _ in range(3):
        try:
            await outbox.claim(Pool(), "me", 1, timedelta(1), outbox.Turn())
        except Exception as error:
            print(type(error).__name__)

with inject.installed():
    from neoforge_email import outbox
asyncio.run(main())
"""
    orders = tmp_path / "orders"
    orders.write_text(json.dumps({"faults": [fault], "marker": str(tmp_path / "marker")}), encoding="utf-8")
    environment = {**os.environ, "NEOFORGE_FAULTS": str(orders)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (code, said, "")
    again = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout.split()) == (0, ["asked"] * 3)
