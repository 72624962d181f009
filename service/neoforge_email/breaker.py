"""A circuit breaker: whoever fails again and again is left alone for a while, then asked by one call at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

PROBING = 0.1
"""Seconds after which to ask again while a probe is under way, whose end nobody knows."""


class Breaker:
    """Closed until `failures` calls in a row fail, then open for `wait`, then half-open: the outcome of one call decides.

    `clock` gives seconds that never go back.
    """

    def __init__(self, failures: int, wait: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = failures
        self._open_seconds = wait.total_seconds()
        self._clock = clock
        self._failed = 0
        self._open_until: float | None = None
        self._paused_until = 0.0
        self._probing = False
        self._era = 0  # counts the changes of state

    @property
    def is_open(self) -> bool:
        """Open or half-open."""
        return self._open_until is not None

    def wait(self) -> float:
        """Seconds until a call may begin; 0 is now."""
        now = self._clock()
        closes = now + PROBING if self._probing else self._open_until or now
        return max(closes - now, self._paused_until - now, 0.0)

    def begin(self) -> int:
        """A call begins that `wait` allowed; half-open, it is the probe. The number is for `end`, which every call needs."""
        self._probing = self.is_open
        return self._era

    def end(self, era: int, healthy: bool | None) -> None:
        """What a call showed; None: nothing. A call that began before the last change of state says nothing any more."""
        if era != self._era:
            return
        self._probing = False
        if healthy:
            self._failed = 0
            if self.is_open:
                self._open_until = None
                self._era += 1
        elif healthy is False:
            self._failed += 1
            if self.is_open or self._failed >= self._most:
                self._open_until = self._clock() + self._open_seconds
                self._era += 1

    def pause(self, seconds: float) -> None:
        """No call for so long, by the other side's own word; no failure."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)
