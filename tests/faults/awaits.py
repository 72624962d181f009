"""The rows that the code makes: at every await of the hot path, under a load that reaches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .inject import Fault, Point, first
from .machine import Setup
from .rows import SHORT_LEASE, SIGKILL, SIGTERM, TERMINATE, Order, Row, Signal, Then, at, kill_redis, scenarios

if TYPE_CHECKING:
    from .laboratory import Outcome

EACH = 300
"""Messages of a row for one await."""


def _each(name: str, setup: Setup | None = None, **other: Any) -> Row:
    return Row(name, setup or Setup(), **{"messages": EACH, "rate": 0, **other})


def _faults(service: str, *texts: str) -> dict[str, tuple[Fault, ...]]:
    return {service: tuple(Fault.parse(text) for text in texts)}


FLUSH_FAILS = "outbox:Intake._flush:self._accept:before:raise-deadlock:5"
ANSWER_LOST = "outbox:Intake._flush_singly:self._accept:after:raise-lost:1"
REPORTING = Setup("sendgrid", events=True)

PROFILES = [
    _each("plain"),
    _each("the provider is away", rate=250, disturb=at(0.3, Order("closed", 10)), calls=1),
    _each("the services get SIGTERM", rate=250, disturb=at(0.4, Signal(SIGTERM, ("api", "worker")))),
    _each("a flush fails", keyless_every=3, faults=_faults("api", FLUSH_FAILS, ANSWER_LOST)),
    _each("a flush without keys fails", keyless_every=1, faults=_faults("api", FLUSH_FAILS, ANSWER_LOST)),
    _each("a claim fails", faults=_faults("worker1", "outbox:claim:pool.fetch:before:raise-lost:3")),
    _each(
        "an outcome cannot be stored",
        faults=_faults("worker1", "delivery:Delivery._complete:self._patiently(complete):before:raise-unstorable:3"),
    ),
    _each("the provider refuses recipients", refused_every=5),
    _each("the provider goes step by step", Setup(careful=True), refused_every=10, kilobytes=100),
    _each("the provider knows no EHLO", rate=250, disturb=at(0.2, Order("old", 100))),
    _each("large bodies", messages=30, kilobytes=6000),
    _each("SIGTERM while the provider is silent", disturb=at(0.2, Then(Order("silent-before", 2), 0.3, TERMINATE))),
    _each("short leases", Setup(lease_seconds=4.5), disturb=at(0.1, Order("silent-before", 2))),
    _each("Redis is away", rate=250, disturb=at(0.3, kill_redis)),
    _each("idle connections", messages=60, pause_seconds=6),
    _each(
        "the doorbell cannot be heard",
        rate=100,
        faults=_faults("worker1", "worker:_listen:next pubsub.listen:before:raise-redis:2"),
    ),
    _each("SendGrid, and events come", REPORTING),
    _each("SendGrid answers errors", Setup("sendgrid"), rate=250, disturb=at(0.2, Order("fail-before", 2))),
    _each("SIGTERM under SendGrid", Setup("sendgrid"), rate=250, disturb=at(0.4, TERMINATE)),
    _each(
        "events cannot be read",
        REPORTING,
        faults=_faults("worker1", "inbound.receipts:waiting:connection.fetch:before:raise-lost:3"),
    ),
    _each(
        "events cannot be stored",
        REPORTING,
        faults=_faults("worker1", "outbox:record_events:connection.fetchrow:before:raise-unstorable:1"),
    ),
    _each(
        "a worker is lost with 24 calls under way",
        Setup(connections=24),
        disturb=at(0.02, Then(Order("silent-before", 24), 1.5, Signal(SIGKILL, ("worker",)))),
        calls=24,
    ),
    _each("SES", Setup("ses"), messages=100),
    _each("SIGTERM under SES", Setup("ses"), messages=100, rate=80, disturb=at(0.4, TERMINATE)),
]
"""Loads that reach the awaits: each await gets its rows on the first of these that reaches it."""

BESIDE = {
    "api.emails:routes.": "not on the way of a message: reading, and the route below the hot one",
    "api.emails:_measured": "not on the way of a message: all other routes",
    "api.emails:in_front.serve:router": "not on the way of a message: the server's own start and stop",
    "api.emails:in_front.serve:_measured": "not on the way of a message: all other routes",
    "api.inbound:routes.ses_events": "SNS signs with Amazon's certificates: tests/service has its cases",
    "api.inbound:_ses": "SNS signs with Amazon's certificates: tests/service has its cases",
    "delivery:Delivery.drained": "under --burst only",
    "inbound.normaliser:Normaliser.drained": "under --burst only",
    "inbound.receipts:forget": "not on the way of a message: clearing up",
    "inbound.receipts:stats": "not on the way of a message: metrics",
    "outbox:claim:pool.execute": "holds what cannot be read; no message that was accepted is so",
    "outbox:expire": "not on the way of a message: once a minute",
    "outbox:follow_clock": "not on the way of a message: once a minute",
    "outbox:forget_idempotency_keys": "not on the way of a message: clearing up",
    "outbox:queue_stats": "not on the way of a message: metrics",
    "providers.router:Router.find:route.limit.take": "under a rate only, and it never fails: tests/service has its cases",
    "providers.ses:SesConnection._to:self._to": "asks again without those whom SES refuses; the double refuses nobody",
    "providers.wire:Wire.closed:self._closed": "nothing is under way: a server has not closed a connection that we have left",
    "worker:expire": "not on the way of a message: once a minute",
    "worker:forget": "not on the way of a message: clearing up",
    "worker:reconcile_rows": "not on the way of a message: once a minute",
    "worker:startup:loop.drained": "under --burst only",
}
"""Awaits without rows, by the beginning of their names, and why."""


def service_of(point: Point) -> str:
    """Which process passes this point."""
    is_received = point.module == "inbound.receipts" and point.function == "receive"
    accepts = point.module.startswith(("api.", "doorbell")) or point.function.startswith("Intake") or is_received
    return "api" if accepts else "worker1"


STATEMENTS = (".fetch", ".fetchval", ".fetchrow", ".execute", "outbox.", "receipts.", "._accept")
"""Awaits that raise what asyncpg does; what stands above them lets nothing of it through."""


def actions(point: Point) -> Iterator[tuple[str, str, int]]:
    """What is done at a point: moment, action, and how many messages may then arrive twice."""
    is_api = service_of(point) == "api"
    is_provider = point.module.startswith("providers")
    for moment in ("before", "after"):
        yield moment, "kill", 0 if is_api else 1
        if not is_provider:
            yield moment, "cut-database", 0
        if is_provider or point.function.endswith(("_send_window", "_call")):
            yield moment, "cut-provider", 1
        if not is_provider and any(word in point.what for word in STATEMENTS):
            yield moment, "raise-lost", 0
    if not is_provider and any(word in point.what for word in STATEMENTS):
        yield "before", "raise-deadlock", 0
        yield "before", "raise-full", 0
    if point.what == "connection.send":
        yield "before", "raise-bug", 0
        yield "after", "raise-bug", 1


STOPPED = ("Delivery._send_window", "Delivery._call", "Delivery._attempt", "Delivery._complete", "._body", "._reply")
STANDING: dict[str, Any] = {"workers": 2, "lease_seconds": SHORT_LEASE}
ASLEEP = _each("a worker stands still beyond its lease", Setup(**STANDING), rate=60)


def candidates(points: Sequence[Point]) -> Iterator[tuple[str, Fault, int]]:
    """Every fault of every point, with the name of its row and how many messages may then arrive twice."""
    for point in points:
        if str(point).startswith(tuple(BESIDE)):
            continue
        for moment, action, calls in actions(point):
            yield f"{action} {moment} {point}", Fault(point, moment, action), calls
        if point.module in {"delivery", "providers.smtp"} and any(name in point.function for name in STOPPED):
            yield f"stop before {point}", Fault(point, "before", "stop"), 1


def each_await(points: Sequence[Point], reached: Sequence[Outcome]) -> tuple[list[Row], list[str]]:
    """The rows of these points, and the names of those that no profile reaches; `reached` counted the profiles' passes."""
    rows: list[Row] = []
    missed: list[str] = []
    for name, fault, calls in candidates(points):
        found = _reaching(fault, reached)
        if found is None:
            missed.append(name)
            continue
        profile, passes = found
        if fault.action == "stop":
            # Only where the load itself leads to the await is it kept.
            leads = bool(profile.faults or profile.kilobytes)
            asleep = replace(profile, setup=replace(profile.setup, **STANDING), rate=60) if leads else ASLEEP
            profile, passes = replace(asleep, anew=profile.anew), passes // 3
        service = service_of(fault.point)
        earlier = profile.faults.get(service, ())
        turn = max(passes // 3, first(fault, earlier).occurrence)
        faults = {**profile.faults, service: (*earlier, replace(fault, occurrence=turn))}
        rows.append(replace(profile, name=name, load=profile.name, faults=faults, calls=profile.calls + calls))
    return rows, missed


def elsewhere(row: Row, points: Sequence[Point], reached: Sequence[Outcome]) -> Row:
    """The same row under another load, where another leads to its await."""
    others = [outcome for outcome in reached if outcome.row.name != row.load]
    return next((other for other in each_await(points, others)[0] if other.name == row.name), row)


OFTEN = 5


def _reaching(fault: Fault, reached: Sequence[Outcome]) -> tuple[Row, int] | None:
    """The profile under whose load, or else at whose start, this point is passed, and how often: the first that passes it
    often, or else the one that passes it most. Profiles that pass it by chance are no good."""
    for anew in (False, True):
        for moment in (fault.moment, "before"):  # what never ends while a process lives is passed before only
            passes = [
                (outcome.passes_at_start if anew else outcome.passes).get(f"{fault.point}:{moment}", 0)
                for outcome in reached
            ]
            if most := max(passes, default=0):
                chosen = next(n for n, number in enumerate(passes) if number >= min(most, OFTEN))
                return replace(reached[chosen].row, anew=anew), passes[chosen]
    return None


def subset() -> Iterator[Row]:
    """The most telling rows, quick enough for `make test`."""
    names = (
        "two workers claim at once",
        "Redis is killed, and back after 3 s",
        "PostgreSQL is killed",
        "connections to PostgreSQL are cut for 4 s",
        "the provider times out after it took the message, 3 times",
        "the provider times out after it took the message, 3 times, policy hold",
        "the provider drops the connection mid-body, 3 times",
        "a worker with 8 calls under way is killed, twice",
        "SIGTERM of API and worker",
        "SIGTERM of the worker when a job of arq's ends",
        "webhooks, their sender is killed, twice",
        "SendGrid times out after it took the message, 2 calls, and events come",
    )
    written = {row.name: row for row in scenarios()}
    for name in names:
        yield written[name]
    for fault, calls in (
        ("outbox:Intake._accept:connection.fetchval:after:kill:5", 0),
        ("outbox:attempt:pool.fetch:after:kill:5", 1),
        ("delivery:Delivery._call:connection.send:after:kill:5", 1),
        ("outbox:complete:pool.fetch:before:kill:5", 1),
        ("outbox:complete:pool.fetch:after:raise-lost:5", 0),
    ):
        found = Fault.parse(fault)
        name = f"{found.action} {found.moment} {found.point}"
        yield replace(PROFILES[0], name=name, faults={service_of(found.point): (found,)}, calls=calls)
