"""A good client: posts messages with idempotency keys, and repeats what was not answered 202 under the same key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

PATIENCE_SECONDS = 60.0
CLIENTS = 24
TWICE_EVERY = 25
"""Every so many messages two clients send the same one with the same key at the same time."""


@dataclass
class Progress:
    """What the clients know: the ids that were answered with 202, by message."""

    wanted: int
    accepted: dict[int, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unanswered: int = 0
    repeated: int = 0

    def note(self, number: int, email_id: str) -> None:
        known = self.accepted.setdefault(number, email_id)
        if known != email_id:
            self.conflicts.append(f"message {number} was accepted as {known} and as {email_id}")

    async def reaches(self, share: float) -> None:
        """Wait until this share of the messages is accepted."""
        while len(self.accepted) < self.wanted * share:
            await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Load:
    """`rate` is in messages a second, 0 as fast as it goes. `body` makes the request of message number n.

    Half-way there is a pause. Every `keyless_every`-th message has no idempotency key, and so is sent only once.
    """

    url: str
    key: str
    row: str
    body: Callable[[int], dict[str, object]]
    rate: float = 0
    pause_seconds: float = 0
    keyless_every: int = 0

    async def run(self, progress: Progress) -> None:
        """Return when every message was accepted, or patience is at its end."""
        numbers = iter(range(progress.wanted))
        began = half = time.monotonic()

        async def client(session: aiohttp.ClientSession) -> None:
            for number in numbers:
                if self.rate:
                    await asyncio.sleep(max(began + number / self.rate - time.monotonic(), 0))
                if self.pause_seconds and number >= progress.wanted // 2:
                    await asyncio.sleep(max(half + self.pause_seconds - time.monotonic(), 0))
                if self.keyless_every and number % self.keyless_every == 0:
                    await self._send(session, number, progress, keyless=True)
                else:
                    both = [self._send(session, number, progress) for _ in range(1 + (number % TWICE_EVERY == 1))]
                    await asyncio.gather(*both)

        timeout = aiohttp.ClientTimeout(total=15)
        headers = {"Authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession(self.url, headers=headers, timeout=timeout) as session:
            await asyncio.gather(*(client(session) for _ in range(CLIENTS)))

    async def _send(
        self, session: aiohttp.ClientSession, number: int, progress: Progress, *, keyless: bool = False
    ) -> None:
        give_up = time.monotonic() + PATIENCE_SECONDS
        headers = {} if keyless else {"Idempotency-Key": f"{self.row}-{number}"}
        while time.monotonic() < give_up:
            try:
                async with session.post("/api/v1/emails", json=self.body(number), headers=headers) as answer:
                    if answer.status == 202:
                        progress.note(number, (await answer.json())["id"])
                        return
                    if answer.status != 503:
                        progress.refused.append(f"{answer.status} {(await answer.text())[:200]}")
                        return
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            if keyless:
                progress.unanswered += 1
                return
            progress.repeated += 1
            await asyncio.sleep(0.1)
