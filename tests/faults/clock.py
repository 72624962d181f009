"""A clock that can be stepped under running processes, by libfaketime. Their monotonic clock goes on, as in real life."""

from __future__ import annotations

import platform
from functools import cached_property
from pathlib import Path

PLACES = (
    f"/usr/lib/{platform.machine()}-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
)


def library() -> str | None:
    """Where libfaketime is installed, if it is."""
    return next((place for place in PLACES if Path(place).exists()), None)


class Clock:
    """`environment` is for the processes that live by this clock."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def environment(self) -> dict[str, str]:
        self.step(0)
        return {
            "LD_PRELOAD": library() or "",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def step(self, seconds: int) -> None:
        """From now on the clock is this far from the real one."""
        new = self._file.with_suffix(".new")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(f"{seconds:+d}\n", encoding="ascii")
        new.chmod(0o644)
        new.rename(self._file)
