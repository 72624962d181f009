"""The rows of the report: what is done to the service, and what may come of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neoforge_email import db

from . import clock, disk
from .inject import Fault
from .load import Progress
from .machine import Machine, Setup

Disturb = Callable[[Machine, Progress], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Row:
    """One row. `faults` are by service. In at most `calls` provider calls messages may arrive twice: 0 where the
    outcome is definite, where an event settles it, and with policy `hold`."""

    name: str
    setup: Setup = field(default_factory=Setup)
    load: str = "plain"
    messages: int = 2000
    rate: float = 700
    policy: str = "resend"
    faults: Mapping[str, tuple[Fault, ...]] = field(default_factory=dict)
    disturb: Disturb | None = None
    calls: int = 0
    held: int | None = None
    """How many messages wait for an operator in the end: where it is not given, any with policy `hold`, none else."""
    kilobytes: int = 0
    """Every tenth message is this large."""
    refused_every: int = 0
    keyless_every: int = 0
    pause_seconds: float = 0
    anew: bool = False
    """The processes that have faults begin anew."""

    def body(self, key: str, number: int) -> dict[str, object]:
        """The request that makes message `number`; `key` is this run of the row."""
        refused = self.refused_every and number % self.refused_every == 2
        text = "It works. " * (self.kilobytes * 100 if self.kilobytes and number % 10 == 3 else 10)
        request: dict[str, object] = {
            "to": f"smtp-550@r{number}.example.net" if refused else f"r{number}@example.net",
            "subject": f"Message {number}",
            "text": text,
            "metadata": {"row": key, "number": number},
        }
        return request | ({"on_uncertain": self.policy} if self.policy != "resend" else {})

    def refuses(self, number: int) -> bool:
        return bool(self.refused_every) and number % self.refused_every == 2


SIGKILL, SIGTERM = signal.SIGKILL, signal.SIGTERM


# --- what is done while messages are under way --------------------------------------------------------------------


def at(share: float, call: Callable[[Machine], Awaitable[None]]) -> Disturb:
    """Do it once this share of the messages is accepted."""
    return _At(share, call)


@dataclass(frozen=True)
class _At:
    share: float
    call: Callable[[Machine], Awaitable[None]]

    async def __call__(self, machine: Machine, progress: Progress) -> None:
        await progress.reaches(self.share)
        await self.call(machine)


@dataclass(frozen=True)
class Signal:
    """A signal to services, by the beginning of their names."""

    number: signal.Signals
    names: tuple[str, ...]
    times: int = 1

    async def __call__(self, machine: Machine) -> None:
        for turn in range(self.times):
            if turn:
                await asyncio.sleep(2.5)
            for name, service in machine.services.items():
                if name.startswith(self.names):
                    service.send(self.number)


@dataclass(frozen=True)
class Order:
    """The provider's next `count` messages meet this fault, `times` times over."""

    mode: str
    count: int = 3
    times: int = 1

    async def __call__(self, machine: Machine) -> None:
        for turn in range(self.times):
            if turn:
                await asyncio.sleep(1)
            await machine.order(self.mode, self.count)
        await asyncio.sleep(0.1)


async def kill_redis(machine: Machine) -> None:
    await asyncio.sleep(0)
    machine.valkey.process.kill()
    await asyncio.sleep(3)
    await machine.in_thread(machine.valkey.stop)
    await machine.in_thread(machine.valkey.start)


async def flush_redis(machine: Machine) -> None:
    await _redis(machine, ["FLUSHALL"], 30)


async def fill_redis(machine: Machine) -> None:
    """No octet may be added for four seconds."""
    await _redis(machine, ["CONFIG", "SET", "maxmemory", "1"], 1)
    await asyncio.sleep(4)
    await _redis(machine, ["CONFIG", "SET", "maxmemory", "0"], 1)


async def _redis(machine: Machine, command: Sequence[str], times: int) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(machine.valkey.url()) as client:
        for _ in range(times):
            await client.execute_command(*command)
            await asyncio.sleep(0.1)


async def kill_postgresql(machine: Machine) -> None:
    machine.kill_postgresql()
    await asyncio.sleep(1)
    await restart_postgresql(machine)


async def restart_postgresql(machine: Machine) -> None:
    await machine.in_thread(machine.postgresql.stop)
    await machine.in_thread(machine.postgresql.start)


async def kill_everything(machine: Machine) -> None:
    """All processes but the provider's, at one moment."""
    for service in machine.services.values():
        service.send(SIGKILL)
    machine.kill_postgresql()
    await kill_redis(machine)
    await restart_postgresql(machine)


async def close_endpoint(machine: Machine) -> None:
    """A customer's endpoint is away for three seconds."""
    assert machine.endpoint is not None
    await machine.endpoint.stop()
    await asyncio.sleep(3)
    await machine.endpoint.start()


async def refuse_webhooks(machine: Machine) -> None:
    assert machine.endpoint is not None
    machine.endpoint.refuse = 3  # a few more and it is left alone for minutes
    await asyncio.sleep(0)


async def cut_connections(machine: Machine) -> None:
    """Every connection of ours, again and again for four seconds."""
    end = time.monotonic() + 4
    async with machine.connection() as connection:
        while time.monotonic() < end:
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'neoforge%'"
            )
            await asyncio.sleep(0.05)


async def fill_disk(machine: Machine) -> None:
    """Full for four seconds; a server that gives up is started again and again, as systemd would."""
    assert machine.disk is not None
    machine.disk.fill()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        if machine.postgresql.process.poll() is not None:
            await _start_postgresql(machine)
        with contextlib.suppress(*db.UNAVAILABLE):
            async with asyncio.timeout(1), machine.connection() as connection:
                await connection.execute("select pg_switch_wal()")
        await asyncio.sleep(0.2)
    machine.disk.free()
    if machine.postgresql.process.poll() is not None:
        await _start_postgresql(machine)


async def _start_postgresql(machine: Machine) -> None:
    from neoforge_email.embedded import EmbeddedError

    with contextlib.suppress(EmbeddedError):
        await machine.in_thread(machine.postgresql.start)


@dataclass(frozen=True)
class Step:
    """The clock moves by this much, and a little later again."""

    seconds: int

    async def __call__(self, machine: Machine) -> None:
        machine.clock.step(self.seconds)
        await asyncio.sleep(1.5)
        machine.clock.step(2 * self.seconds)


@dataclass(frozen=True)
class Suspend:
    """The first worker stands still for longer than its lease, in the midst of its work."""

    seconds: float

    async def __call__(self, machine: Machine) -> None:
        machine.workers[0].send(signal.SIGSTOP)
        await asyncio.sleep(self.seconds)
        machine.workers[0].send(signal.SIGCONT)


@dataclass(frozen=True)
class Then:
    """One thing after the other."""

    first: Callable[[Machine], Awaitable[None]]
    seconds: float
    second: Callable[[Machine], Awaitable[None]]

    async def __call__(self, machine: Machine) -> None:
        await self.first(machine)
        await asyncio.sleep(self.seconds)
        await self.second(machine)


# --- the rows that are written down -------------------------------------------------------------------------------

TERMINATE = Signal(SIGTERM, ("worker",))
SHORT_LEASE = 5.0


UNANSWERED = {
    "silent-before": "times out, the message not taken",
    "silent-after": "times out after it took the message",
    "garbage-before": "answers garbage, the message not taken",
    "garbage-after": "answers garbage after it took the message",
    "drop-before": "drops the connection, the message not taken",
    "drop-after": "drops the connection after it took the message",
    "drop-mid-body": "drops the connection mid-body",
}
"""What a provider may do that leaves open whether it took a message."""


def scenarios() -> Iterator[Row]:
    """What is done to servers, provider, clocks and whole processes."""
    plain, wide = Setup(), Setup(connections=8)
    yield Row("nothing is done", plain)
    yield Row("two workers claim at once", Setup(workers=2, connections=4), rate=0)
    yield Row("four workers claim at once", Setup(workers=4, connections=4), rate=0)

    yield Row("Redis is killed, and back after 3 s", plain, disturb=at(0.3, kill_redis))
    yield Row("Redis is flushed 10 times a second", plain, disturb=at(0.3, flush_redis))
    yield Row("Redis is out of memory for 4 s", plain, disturb=at(0.3, fill_redis))

    yield Row("PostgreSQL is killed", plain, disturb=at(0.3, kill_postgresql))
    yield Row("PostgreSQL is restarted", plain, disturb=at(0.3, restart_postgresql))
    yield Row("connections to PostgreSQL are cut for 4 s", plain, disturb=at(0.3, cut_connections))
    if disk.usable():
        for part in ("wal", "data"):
            setup = Setup(small_disk=part)
            yield Row(f"the disk of PostgreSQL's {part} is full for 4 s", setup, disturb=at(0.3, fill_disk))

    for mode, words in UNANSWERED.items():
        disturb, number = at(0.3, Order(mode, 3)), 3 if mode.endswith("-after") else 0
        yield Row(f"the provider {words}, 3 times", plain, disturb=disturb, calls=number)
        yield Row(f"the provider {words}, 3 times, policy hold", plain, policy="hold", disturb=disturb)
    yield Row(
        "the provider drops the connection mid-body of 300 kB, 3 times",
        plain,
        messages=500,
        rate=200,
        kilobytes=300,
        disturb=at(0.3, Order("drop-mid-body", 3)),
    )
    yield Row(
        "the provider closes the connection at DATA, 20 times", plain, disturb=at(0.3, Order("close-at-data", 20))
    )
    yield Row("the provider defers 200 bodies", plain, disturb=at(0.3, Order("defer", 200)))
    yield Row("the provider leaves with 421, 20 times", plain, disturb=at(0.3, Order("leave", 20)))
    yield Row("nobody listens at the provider for 3 s", plain, disturb=at(0.3, Order("closed", 30)), calls=1)

    killed = at(0.3, Signal(SIGKILL, ("worker",)))
    yield Row("a worker is killed", plain, disturb=killed, calls=1)
    yield Row(
        "a worker with 8 calls under way is killed, twice",
        wide,
        messages=5000,
        rate=0,
        disturb=at(0.2, Signal(SIGKILL, ("worker",), 2)),
        calls=2 * 8,
    )
    yield Row("a worker is killed, policy hold", plain, policy="hold", disturb=killed)
    yield Row(
        "a worker with 8 calls under way is killed, twice, policy hold",
        wide,
        messages=5000,
        rate=0,
        policy="hold",
        disturb=at(0.2, Signal(SIGKILL, ("worker",), 2)),
    )
    yield Row(
        "a message kills the worker whenever it is sent",
        Setup(connections=4, settings=(("NEOFORGE_FAULT_POISON", "Message 700"),)),
        rate=0,
        calls=4,
        held=1,
    )
    yield Row("everything but the provider is killed at once", plain, disturb=at(0.3, kill_everything), calls=1)
    yield Row("the API is killed, twice", plain, disturb=at(0.2, Signal(SIGKILL, ("api",), 2)))
    yield Row("SIGTERM of the worker", wide, disturb=at(0.3, Signal(SIGTERM, ("worker",))))
    yield Row("SIGTERM of the API", plain, disturb=at(0.3, Signal(SIGTERM, ("api",))))
    yield Row("SIGTERM of API and worker", wide, disturb=at(0.3, Signal(SIGTERM, ("api", "worker"))))
    yield Row(
        "SIGTERM of the worker when a job of arq's ends",
        wide,
        faults={"worker1": (Fault.parse("worker:ensure_partitions:outbox.ensure_partitions:after:terminate:1"),)},
        anew=True,
    )
    yield Row(
        "a worker is stopped beyond its lease and wakes up",
        Setup(workers=2, lease_seconds=SHORT_LEASE),
        rate=400,
        disturb=at(0.3, Suspend(2 * SHORT_LEASE)),
        calls=1,
    )
    if clock.library():
        for whose, words in (("service", "of API and worker"), ("database", "of PostgreSQL")):
            for seconds in (3600, -3600):
                name = f"the clock {words} steps {'forward' if seconds > 0 else 'back'} 1 h, twice"
                yield Row(name, Setup(clocks=whose), disturb=at(0.3, Step(seconds)))
    yield from over_http()
    yield from to_customers()


def over_http() -> Iterator[Row]:
    """SendGrid, whose events settle what is uncertain where they come, and SES."""
    sendgrid, reporting, ses = Setup("sendgrid"), Setup("sendgrid", events=True), Setup("ses", connections=4)
    killed = at(0.3, Signal(SIGKILL, ("worker",)))
    for mode, words in (UNANSWERED | {"fail-after": "answers 500 after it took the message"}).items():
        taken = mode.endswith("-after")
        disturb = at(0.3, Order(mode, 2))
        yield Row(f"SendGrid {words}, 2 calls", sendgrid, disturb=disturb, calls=2 * taken)
        yield Row(f"SendGrid {words}, 2 calls, policy hold", sendgrid, policy="hold", disturb=disturb)
        yield Row(f"SendGrid {words}, 2 calls, and events come", reporting, disturb=disturb)
        if mode != "drop-mid-body":
            yield Row(f"SES {words}, 2 calls", ses, disturb=disturb, calls=2 * taken)
    dead = (("EMAIL_PROVIDER", "smtp"), ("EMAIL_PROVIDER_FALLBACKS", "sendgrid"), ("SMTP_PORT", "1"))
    yield Row(
        "the first provider is dead, SendGrid takes over", Setup("sendgrid", settings=dead), messages=10_000, rate=0
    )
    throttled = at(0.3, Order("defer", 3))
    yield Row("SendGrid throttles with 429, 3 calls", sendgrid, disturb=throttled)
    yield Row("SES throttles with 429, 3 calls", ses, disturb=throttled)
    yield Row("a worker is killed under SendGrid", sendgrid, disturb=killed, calls=1)
    yield Row("a worker is killed under SendGrid, and events come", reporting, disturb=killed)
    yield Row("a worker is killed under SES", ses, disturb=killed, calls=4)
    yield Row(
        "a worker is killed under SendGrid, policy hold, and events come", reporting, policy="hold", disturb=killed
    )
    yield Row("the API is killed while events come", reporting, disturb=at(0.5, Signal(SIGKILL, ("api",), 2)))
    yield Row("PostgreSQL is killed while events come", reporting, disturb=at(0.5, kill_postgresql))


def to_customers() -> Iterator[Row]:
    """A customer's endpoint, to which every event must come in the end."""
    told = Setup(endpoint=True)
    some: dict[str, Any] = {"messages": 1000, "rate": 200}
    yield Row("webhooks, nothing is done", told, **some)
    yield Row("webhooks, the endpoint is away for 3 s", told, disturb=at(0.3, close_endpoint), **some)
    yield Row("webhooks, the endpoint answers 3 times 500", told, disturb=at(0.3, refuse_webhooks), **some)
    yield Row(
        "webhooks, their sender is killed, twice",
        told,
        disturb=at(0.3, Signal(SIGKILL, ("worker",), 2)),
        calls=2,
        **some,
    )
    yield Row("webhooks, PostgreSQL is killed", told, disturb=at(0.3, kill_postgresql), **some)
