"""Faults at the awaits of the service, found by name in its code; nothing of the service is changed for it.

    echo '{"faults": ["outbox:claim:pool.fetch:after:kill:3"], "marker": "/tmp/marker"}' >/tmp/orders
    NEOFORGE_FAULTS=/tmp/orders python -m tests.faults.inject worker

runs the same worker as `arq neoforge_email.worker.WorkerSettings`, which kills itself right after the third time that
`await pool.fetch(…)` in `outbox.claim` has ended. New orders may come while it runs. Every fault happens once: it leaves a
file, the marker with the fault's number (from 0), and a process that finds the file does nothing.

An import hook rewrites the modules in `MODULES` while they are loaded: `await X` becomes `await point(NAME, X)`, and the
context of an `async with` and the iterable of an `async for` are wrapped likewise. A new await is a new point without
anyone writing it down: `points()` is what the laboratory goes through.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

PACKAGE = "neoforge_email"
MODULES = (
    *("api.emails", "outbox", "doorbell", "delivery", "worker"),
    *("providers.router", "providers.smtp", "providers.wire", "providers.sendgrid", "providers.ses"),
    *("api.inbound", "inbound.receipts", "inbound.normaliser"),
)
"""Modules of the hot path, as far as they exist."""


@dataclass(frozen=True, slots=True)
class Point:
    """One await. `function` is its qualified name, `what` is awaited; of several alike the later ones have a number."""

    module: str
    function: str
    what: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}:{self.what}"

    @classmethod
    def parse(cls, text: str) -> Point:
        module, function, what = text.split(":", 2)
        return cls(module, function, what)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a point: `moment` is before or after, `occurrence` counts the passes of one process, from 1."""

    point: Point
    moment: str
    action: str
    occurrence: int = 1

    def __str__(self) -> str:
        return f"{self.point}:{self.moment}:{self.action}:{self.occurrence}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        point, moment, action, occurrence = text.rsplit(":", 3)
        if moment not in {"before", "after"} or action not in ACTIONS:
            raise ValueError(f"not a fault: {text}")
        return cls(Point.parse(point), moment, action, int(occurrence))


def first(fault: Fault, earlier: Sequence[Fault]) -> Fault:
    """The fault at its first occurrence, after those that happen `earlier` at this very place."""
    there = [old.occurrence for old in earlier if (old.point, old.moment) == (fault.point, fault.moment)]
    return replace(fault, occurrence=max(there, default=0) + 1)


# --- what can happen ------------------------------------------------------------------------------------------------


def _raise(make: Callable[[], Exception]) -> Callable[[], None]:
    def act() -> None:
        raise make()

    return act


def _lost() -> Exception:
    import asyncpg

    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def _deadlock() -> Exception:
    import asyncpg

    return asyncpg.DeadlockDetectedError("deadlock detected")


def _full() -> Exception:
    import asyncpg

    return asyncpg.DiskFullError("could not extend file: No space left on device")


def _unstorable() -> Exception:
    import asyncpg

    return asyncpg.DataError("a value that cannot be stored")


def _no_redis() -> Exception:
    from redis.exceptions import ConnectionError as RedisConnectionError

    return RedisConnectionError("Connection closed by server.")


def _cut(is_wanted: Callable[[Any], bool]) -> Callable[[], None]:
    """Shut down every connection of this process whose peer is wanted, as a network does that breaks right now."""

    def act() -> None:
        for file in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(file.name))) as connection:
                if connection.type == socket.SOCK_STREAM and is_wanted(connection.getpeername()):
                    connection.shutdown(socket.SHUT_RDWR)

    return act


def _soon(turns: int, call: Callable[[], None]) -> None:
    """Call it so many turns of the event loop later."""
    if turns:
        asyncio.get_running_loop().call_soon(_soon, turns - 1, call)
    else:
        call()


def _is_database(peer: Any) -> bool:
    return isinstance(peer, str) and ".s.PGSQL" in peer


def _is_provider(peer: Any) -> bool:
    return isinstance(peer, tuple) and str(peer[1]) == os.environ["NEOFORGE_FAULT_PROVIDER_PORT"]


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: _soon(2, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "cut-database": _cut(_is_database),
    "cut-provider": _cut(_is_provider),
    "raise-lost": _raise(_lost),
    "raise-deadlock": _raise(_deadlock),
    "raise-full": _raise(_full),
    "raise-unstorable": _raise(_unstorable),
    "raise-redis": _raise(_no_redis),
    "raise-bug": _raise(lambda: RuntimeError("a fault of our own")),
}


class Armed:
    """The faults of this process, and how often each of its points was passed since the orders came."""

    def __init__(self) -> None:
        self.orders = Path(os.environ.get("NEOFORGE_FAULTS", ""))
        self._seen = 0
        self._faults: dict[str, list[tuple[int, Fault]]] = {}
        self._marker = self._counts = ""
        self._passed: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Write the counts where the orders want them while the context lasts, again and again: a process that is killed
        could not write them in the end."""
        threading.Thread(target=self._write_counts_again_and_again, daemon=True).start()
        try:
            yield
        finally:
            self._write_counts()

    def passing(self, name: str, moment: str) -> None:
        if (seen := self.orders.stat().st_mtime_ns) != self._seen:
            self._seen = seen
            self._read()
        self._passed[name, moment] += 1
        for number, fault in self._faults.get(name, ()):
            if fault.moment == moment and fault.occurrence == self._passed[name, moment]:
                try:
                    os.close(os.open(f"{self._marker}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                except FileExistsError:
                    continue
                ACTIONS[fault.action]()

    def _read(self) -> None:
        orders = json.loads(self.orders.read_bytes())
        self._passed.clear()
        self._marker, self._counts = orders["marker"], orders.get("counts", "")
        self._faults = {}
        for number, fault in enumerate(map(Fault.parse, orders["faults"])):
            self._faults.setdefault(str(fault.point), []).append((number, fault))

    def _write_counts_again_and_again(self) -> None:
        while True:
            self._write_counts()
            time.sleep(0.1)

    def _write_counts(self) -> None:
        if not self._counts:
            return
        counts = {f"{name}:{moment}": count for (name, moment), count in self._passed.copy().items()}
        file = Path(f"{self._counts}.{os.getpid()}")
        new = file.with_name(f"new-{file.name}-{threading.get_ident()}")
        new.write_text(json.dumps(counts), encoding="utf-8")
        new.rename(file)


# --- in the code ----------------------------------------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    """Finds the points of a module in the order of the text, and wraps them."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._inside: list[str] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self.points: list[Point] = []

    def _scope(self, node: Any) -> Any:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()
        return node

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _scope  # noqa: N815 - names that ast looks for

    def visit_Await(self, node: ast.Await) -> ast.AST:
        point = self._point(_words(node.value))
        self.generic_visit(node)
        node.value = self._wrapped("__fault_await__", node.value, point)
        return node

    def visit_AsyncWith(self, node: ast.AsyncWith) -> ast.AST:
        for item in node.items:
            entering = self._point(f"enter {_words(item.context_expr)}")
            leaving = self._point(f"leave {_words(item.context_expr)}")
            item.context_expr = self._wrapped("__fault_context__", item.context_expr, entering, leaving)
        self.generic_visit(node)
        return node

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        node.iter = self._wrapped("__fault_iterator__", node.iter, self._point(f"next {_words(node.iter)}"))
        self.generic_visit(node)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        if node.is_async:
            node.iter = self._wrapped("__fault_iterator__", node.iter, self._point(f"next {_words(node.iter)}"))
        self.generic_visit(node)
        return node

    def _point(self, what: str) -> Point:
        function = ".".join(self._inside)
        self._seen[function, what] += 1
        number = self._seen[function, what]
        point = Point(self._module, function, what if number == 1 else f"{what}#{number}")
        self.points.append(point)
        return point

    def _wrapped(self, wrapper: str, value: ast.expr, *points: Point) -> ast.expr:
        names = [str(point) for point in points]
        arguments: list[ast.expr] = [ast.Constant(name) for name in names]
        call = ast.Call(ast.Name(wrapper, ast.Load()), [*arguments, value], [])
        return ast.fix_missing_locations(ast.copy_location(call, value))


def _words(expression: ast.expr) -> str:
    """What is awaited, short: a call without its arguments, but for a first one that is a word."""
    if not isinstance(expression, ast.Call):
        return ast.unparse(expression)
    name = ast.unparse(expression.func)
    match expression.args:
        case [ast.Constant(value=str(word)), *_] if word.isidentifier():
            return f"{name}({word})"
    return name


async def _await(name: str, awaitable: Awaitable[Any]) -> Any:
    try:
        ARMED.passing(name, "before")
    except Exception:
        if asyncio.iscoroutine(awaitable):
            awaitable.close()
        raise
    result = await awaitable
    ARMED.passing(name, "after")
    return result


class _Context:
    """An asynchronous context manager whose way in and way out are points."""

    def __init__(self, entering: str, leaving: str, context: Any) -> None:
        self._entering, self._leaving, self._context = entering, leaving, context

    async def __aenter__(self) -> Any:
        ARMED.passing(self._entering, "before")
        entered = await self._context.__aenter__()
        try:
            ARMED.passing(self._entering, "after")
        except BaseException:
            if not await self._context.__aexit__(*sys.exc_info()):
                raise
        return entered

    async def __aexit__(self, *error: object) -> Any:
        try:
            ARMED.passing(self._leaving, "before")
        except BaseException:
            await self._context.__aexit__(*sys.exc_info())
            raise
        result = await self._context.__aexit__(*error)
        ARMED.passing(self._leaving, "after")
        return result


async def _iterator(name: str, iterable: Any) -> AsyncIterator[Any]:
    iterator = aiter(iterable)
    while True:
        try:
            item = await _await(name, anext(iterator))
        except StopAsyncIteration:
            return
        yield item


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with its points wrapped, past the cache of compiled files."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        rewriter = _Rewriter(fullname.removeprefix(f"{PACKAGE}."))
        code: CodeType = compile(rewriter.visit(tree), path, "exec")
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(__fault_await__=_await, __fault_context__=_Context, __fault_iterator__=_iterator)
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Gives our modules to `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{PACKAGE}.") or fullname.removeprefix(f"{PACKAGE}.") not in MODULES:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is not None and found.origin is not None:
            found.loader = _Loader(fullname, found.origin)
        return found


def points(modules: Sequence[str] = MODULES) -> list[Point]:
    """Every await of these modules, in the order of the text. Those that do not exist have none."""
    found: list[Point] = []
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            specification = importlib.util.find_spec(f"{PACKAGE}.{module}")
            if specification is not None and specification.origin is not None:
                found += points_of(module, Path(specification.origin).read_text(encoding="utf-8"))
    return found


def points_of(module: str, source: str) -> list[Point]:
    """The awaits of a module's source."""
    rewriter = _Rewriter(module)
    rewriter.visit(ast.parse(source))
    return rewriter.points


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The import hook, while the context lasts."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


ARMED = Armed()


def main(arguments: Sequence[str]) -> None:
    """Run `serve` or `worker` with what the environment arms.

    NEOFORGE_FAULT_LEASE is the worker's lease in seconds; a message with the subject NEOFORGE_FAULT_POISON kills the worker
    that writes it.
    """
    ARMED.orders = Path(os.environ["NEOFORGE_FAULTS"])
    with installed(), ARMED.counted():
        if arguments[0] == "serve":
            from neoforge_email.cli import main as neoforge

            neoforge(["serve"])
            return
        from arq.cli import cli

        from neoforge_email import delivery

        if seconds := os.environ.get("NEOFORGE_FAULT_LEASE"):
            defaults: dict[str, Any] = delivery.Delivery.__init__.__kwdefaults__ or {}
            defaults["lease"] = timedelta(seconds=float(seconds))
        if poison := os.environ.get("NEOFORGE_FAULT_POISON"):
            _poison(poison)
        cli(["neoforge_email.worker.WorkerSettings", *arguments[1:]])


def _poison(subject: str) -> None:
    from neoforge_email import mime

    build = mime.build

    def build_or_die(message: Any, *others: Any) -> bytes:
        if message.subject == subject:
            ACTIONS["kill"]()
        return build(message, *others)

    mime.build = build_or_die  # type: ignore[assignment]  # called as it is everywhere


if __name__ == "__main__":
    main(sys.argv[1:])
