"""Which provider takes a call: the first, in the order of the settings, whose breaker allows it now, at its rate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from neoforge_email.breaker import Breaker
from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message
from neoforge_email.observability import PROVIDER_BREAKER_OPEN, PROVIDER_UP
from neoforge_email.providers.base import NOT_STARTED, Outcome, Provider, Result, Scope
from neoforge_email.ratelimit import RateLimit
from neoforge_email.settings import Settings

log = structlog.get_logger()

MOST_HELD = 2000
"""Messages that a worker holds for a provider at most, however wide its calls are."""

SOON = 1.0
"""Seconds that messages wait in the worker for a provider; for longer they are better off in the queue."""


class Route:
    """A provider with the breaker and the rate of this process's calls to it."""

    def __init__(self, provider: Provider, breaker: Breaker, limit: RateLimit | None = None) -> None:
        self.provider = provider
        self.name = provider.name
        self.breaker = breaker
        self.limit = limit
        self._is_up: bool | None = None
        self._shown_open = PROVIDER_BREAKER_OPEN.labels(self.name)
        self._shown_open.set(0)

    @property
    def capacity(self) -> int:
        """Messages that a worker holds for it: two rounds of calls, and no more than a second's where there is a rate."""
        most = min(2 * self.provider.connections * self.provider.window, MOST_HELD)
        return min(most, self.limit.rate) if self.limit else most

    @property
    def most(self) -> int:
        """Messages a call, whatever the provider itself would take: one where its breaker is half-open."""
        if self.breaker.is_open:
            return 1
        return self.limit.most if self.limit else self.provider.window

    def ended(self, era: int, results: Iterable[tuple[Result, ...]]) -> None:
        """Learn from a call. Whoever answers about any message is alive; a provider that asks for time is no failure."""
        healthy: bool | None = None
        pause = 0.0
        reason = ""
        for result in (result for message in results for result in message):
            if result.retry_after is not None:
                pause = max(pause, result.retry_after.total_seconds())
            elif result.outcome is Outcome.UNCERTAIN or (
                result.scope is Scope.CONNECTION and result.outcome is Outcome.DEFERRED
            ):
                if healthy is None and result is not NOT_STARTED:
                    healthy, reason = False, result.response
            else:
                healthy = True
        self._learn(era, healthy, pause, reason)

    def unavailable(self, era: int, error: ProviderUnavailable) -> None:
        """Learn that it could not be used at all."""
        if error.retry_after is None:
            self._learn(era, False, 0, error.detail)
        else:
            self._learn(era, None, error.retry_after.total_seconds(), error.detail)

    def _learn(self, era: int, healthy: bool | None, pause: float, reason: str) -> None:
        self.breaker.end(era, healthy)
        if pause:
            self.breaker.pause(pause)
        if healthy is None or (healthy is self._is_up and not self.breaker.is_open):
            return
        self._shown_open.set(self.breaker.is_open)
        if healthy is self._is_up:
            return
        self._is_up = healthy
        PROVIDER_UP.labels(self.name).set(healthy)
        if not healthy:
            log.warning("provider.unavailable", provider=self.name, reason=reason)


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to one call of `messages`; `rest` are the further calls of what was asked for. `era` is for `Route.ended`."""

    route: Route
    messages: list[Message]
    rest: list[list[Message]]
    era: int


class Router:
    """All providers of this process, in the order in which they are tried."""

    def __init__(self, routes: Sequence[Route], redis: Redis | None = None) -> None:
        self.routes = tuple(routes)
        self._redis = redis
        self._serving = self.routes[0]

    @classmethod
    def of(cls, providers: Sequence[Provider], settings: Settings, redis: Redis | None = None) -> Router:
        """With the breakers that the settings ask for, and their rates where there is a Redis, which is closed in the end."""
        failures, wait = settings.provider_breaker_failures, settings.provider_breaker_wait
        rates = {"sendgrid": settings.sendgrid_rate, "ses": settings.ses_rate, "smtp": settings.smtp_rate}
        routes = []
        for provider in providers:
            rate = rates.get(provider.name, 0)
            key = f"{settings.email_queue_name}:rate:{provider.name}"
            limit = RateLimit(redis, key, rate) if redis is not None and rate else None
            routes.append(Route(provider, Breaker(failures, wait), limit))
        return cls(routes, redis)

    @property
    def name(self) -> str:
        """Of the provider that was chosen first."""
        return self.routes[0].name

    @property
    def providers(self) -> list[Provider]:
        return [route.provider for route in self.routes]

    def preferred(self) -> Provider:
        """Who takes what nobody has declined yet, as things stand."""
        return next((route for route in self.routes if not route.breaker.wait()), self.routes[0]).provider

    def wait(self) -> float:
        """Seconds until any provider may be called, by the breakers; 0 is now."""
        return min(route.breaker.wait() for route in self.routes)

    def capacity(self) -> int:
        """Messages that a worker may hold: for the widest provider that is well; without one, a message to try with."""
        return max((route.capacity for route in self.routes if not route.breaker.is_open), default=1)

    def other(self, tried: Collection[str]) -> bool:
        """Whether a provider beside these may be called now."""
        return any(route.name not in tried and not route.breaker.wait() for route in self.routes)

    async def find(self, messages: Sequence[Message], tried: Collection[str] = ()) -> Turn | float | None:
        """The turn of the first provider whose breaker allows a call of `messages` now and that is not one of `tried`.

        Else the seconds after which to ask again, SOON at most; None where messages are better off in the queue: for
        longer, or because somebody who is well again declined them before. A provider that is well and has
        reached its rate is waited for: others take over only where one fails. One whose breaker is half-open is tried with
        a single message. Every turn is to be ended by `Route.ended` or `Route.unavailable`.
        """
        self._note()
        soonest: float | None = None
        for route in self.routes:
            wait = route.breaker.wait()
            if route.name in tried or wait > SOON:
                continue
            if not wait:
                call, *rest = route.provider.calls(messages)
                if len(call) > route.most:
                    call, rest = call[: route.most], [call[route.most :], *rest]
                if route.limit is not None and (wait := await route.limit.take(len(call))):
                    return min(wait, SOON)
                if not (wait := route.breaker.wait()):
                    return Turn(route, call, rest, route.breaker.begin())
            soonest = min(wait, soonest or SOON, SOON)
        return None if tried else soonest

    def _note(self) -> None:
        """Say once that another provider takes over."""
        serving = next((r for r in self.routes if not r.breaker.is_open and not r.breaker.wait()), self._serving)
        if serving is not self._serving:
            log.warning("provider.failover", provider=self._serving.name, to=serving.name)
            self._serving = serving

    async def close(self) -> None:
        for route in self.routes:
            await route.provider.close()
        if self._redis is not None:
            await self._redis.aclose()
