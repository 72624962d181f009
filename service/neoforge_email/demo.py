"""`neoforge demo`: the whole service on this computer, on embedded servers, with a first message sent through it.

PostgreSQL, Valkey, API, worker and mailbox are children of this process and end with it, also when it is killed. The
state directory keeps the database and the API key, so that a later start goes on where this one ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import http
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from .embedded import PostgreSQL, Valkey, spawn, stop, tail
from .settings import DatabaseUrl, Settings

HOST = "127.0.0.1"
DATABASE = "neoforge_demo"
SENDER = "demo@example.com"
RECIPIENT = "ada@example.com"
MARKER = ".neoforge-demo"
START_SECONDS = 30.0
ARRIVAL_SECONDS = 15.0

TEXT = "This message went through the REST API, PostgreSQL, a worker and SMTP, and ended in this mailbox.\n"
HTML = """<div style="font-family: sans-serif; max-width: 34em">
<h1 style="color: #2b5fb3">It works.</h1>
<p>This message went through the REST API, PostgreSQL, a worker and SMTP, and ended in this mailbox.</p>
</div>
"""

# Past proxies of the environment: everything here is on the loopback interface.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unusable(click.ClickException):
    """What was asked for cannot be had; nothing has been started."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Ports:
    """Where things listen, all on the loopback interface. The worker's metrics are one above the API's."""

    api: int
    metrics: int
    smtp: int
    mailbox: int

    def by_option(self) -> list[tuple[str, int]]:
        return [
            ("--port", self.api),
            ("--metrics-port", self.metrics),
            ("--metrics-port (the worker's is one above)", self.metrics + 1),
            ("--smtp-port", self.smtp),
            ("--mailbox-port", self.mailbox),
        ]

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.api}"

    @property
    def mailbox_url(self) -> str:
        return f"http://{HOST}:{self.mailbox}"


@dataclass(frozen=True, slots=True)
class Watched:
    """A child; its end before ours is a failure."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True, slots=True)
class Running:
    """Everything is ready; `key` is an API key."""

    ports: Ports
    key: str
    watched: list[Watched]


def default_state() -> Path:
    """$XDG_STATE_HOME or ~/.local/state; as root a directory that `nobody`, whom PostgreSQL then runs as, can reach."""
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / "neoforge-demo"
    return Path("/var/lib/neoforge-demo") if os.geteuid() == 0 else Path.home() / ".local/state/neoforge-demo"


PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--check", is_flag=True, help="Prove that mail arrives and bad input is refused, stop, and exit 0.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier demo kept, and start anew.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep database, key and logs here.  [default: $XDG_STATE_HOME/neoforge-demo, ~/.local/state/neoforge-demo,"
    " as root /var/lib/neoforge-demo]",
)
@click.option("--port", type=PORT, default=8000, show_default=True, help="Of the API.")
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65534),
    default=8001,
    show_default=True,
    help="Of the API's metrics; the worker's are one above.",
)
@click.option("--smtp-port", type=PORT, default=2525, show_default=True, help="Where the mailbox takes mail.")
@click.option("--mailbox-port", type=PORT, default=8025, show_default=True, help="Of the mailbox's page.")
def demo(
    check: bool, fresh: bool, state: Path | None, port: int, metrics_port: int, smtp_port: int, mailbox_port: int
) -> None:
    """Run the whole service on this computer until Ctrl-C, and send a first message through it.

    Needs no root and no other programs. Nothing leaves the computer: all mail ends in a local mailbox with a web page.
    """
    ports = Ports(port, metrics_port, smtp_port, mailbox_port)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    is_up = False
    try:
        _refuse_taken(ports)
        with _state(state or default_state(), fresh=fresh) as directory, _everything(directory, ports) as running:
            _first_message(running)
            if check:
                _refusals(running)
                _say("Checked: the message has arrived, and bad input is refused.")
                return
            _welcome(running, directory)
            is_up = True
            while True:
                _all_alive(running.watched)
                time.sleep(0.2)
    except KeyboardInterrupt:
        # Ctrl-C is how a running demo ends; before that it is an interruption.
        sys.exit(0 if is_up else 130)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


_STARTED = time.monotonic()


def _say(text: str) -> None:
    click.echo(f"[{time.monotonic() - _STARTED:5.1f} s] {text}")


# --- before anything is started -----------------------------------------------------------------------------------


def _refuse_taken(ports: Ports) -> None:
    problems = []
    options: dict[int, str] = {}
    for option, number in ports.by_option():
        if number in options:
            problems.append(f"Port {number} is wanted twice, by {options[number]} and by {option}.")
            continue
        options[number] = option
        try:
            socket.create_server((HOST, number)).close()
        except OSError as error:
            reason = (
                "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({os.strerror(error.errno or 0)})"
            )
            problems.append(f"Port {number} {reason}: choose another with {option}.")
    if problems:
        raise Unusable("\n".join(problems))


@contextlib.contextmanager
def _state(directory: Path, *, fresh: bool) -> Iterator[Path]:
    """The state directory, ours alone while the context lasts. Only one that a demo has marked is ever emptied."""
    directory = directory.absolute()
    marker = directory / MARKER
    try:
        if directory.exists() and not marker.exists() and any(directory.iterdir()):
            raise Unusable(f"{directory} holds something else than a demo's state: choose another with --state.")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with marker.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Unusable(
                    f"Another demo is running on {directory}: stop it, or choose another with --state."
                ) from None
            _empty(directory, keep={MARKER} if fresh else {entry.name for entry in directory.iterdir()} - LOGS)
            yield directory
    except PermissionError as error:
        raise Unusable(f"{error.filename} cannot be used: choose another directory with --state.") from None


LOGS = {f"{name}.log" for name in ("postgresql", "valkey", "mailbox", "worker", "api")}


def _empty(directory: Path, *, keep: set[str]) -> None:
    for entry in directory.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# --- starting and stopping ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _everything(directory: Path, ports: Ports) -> Iterator[Running]:
    """Servers, database, key and processes, ready for use; stopped in the opposite order, whatever happens."""
    _say(f"Starting; the state is kept in {directory}")
    watched: list[Watched] = []

    def start(name: str, module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        child = _child(name, directory, [module, *arguments], environment)
        watched.append(stack.enter_context(child))

    with contextlib.ExitStack() as stack:
        stack.callback(_say_if_heard, "Stopped; nothing is left running")
        try:
            inherited = _inherited_environment()
            mail = ("--smtp", f"{HOST}:{ports.smtp}", "--http", f"{HOST}:{ports.mailbox}")
            first = not (directory / "postgresql").exists()
            postgresql = stack.enter_context(PostgreSQL(directory))
            watched.append(Watched("postgresql", postgresql.process, postgresql.log))
            _say("PostgreSQL is ready" + (" on a new, empty cluster" if first else ""))
            valkey = stack.enter_context(Valkey(directory))
            watched.append(Watched("valkey", valkey.process, valkey.log))
            start("mailbox", "neoforge_email.mailbox", *mail, environment=inherited)
            key_file = directory / "api-key"
            kept = key_file.read_text(encoding="ascii").strip() if key_file.exists() else ""
            key = asyncio.run(_prepare_database(postgresql, kept))
            _keep_private(key_file, f"{key}\n")
            _say("The database is migrated")
            settings = _settings(postgresql, valkey, ports)
            _keep_private(directory / "environment", _exports(settings))
            worker = {"DATABASE_URL": postgresql.dsn("neoforge_worker", DATABASE), "WORKER_INSTANCE": "1"}
            start("worker", "arq", "neoforge_email.worker.WorkerSettings", environment=inherited | settings | worker)
            start("api", "neoforge_email.cli", "serve", environment=inherited | settings)
            _wait("The mailbox is ready", f"{ports.mailbox_url}/api/messages", watched)
            _wait("The worker is ready", f"http://{HOST}:{ports.metrics + 1}/metrics", watched)
            _wait("The API is ready", f"{ports.api_url}/health/ready", watched)
            yield Running(ports, key, watched)
        finally:
            # What follows is bounded in time, and an interruption of it would leave something running.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _say_if_heard("Stopping")


def _say_if_heard(text: str) -> None:
    with contextlib.suppress(OSError):
        _say(text)


@contextlib.contextmanager
def _child(name: str, directory: Path, arguments: list[str], environment: Mapping[str, str]) -> Iterator[Watched]:
    log = directory / f"{name}.log"
    process = spawn([sys.executable, "-P", "-m", *arguments], log=log, environment=environment)
    try:
        yield Watched(name, process, log)
    finally:
        stop(process, (signal.SIGTERM, 10))


def _inherited_environment() -> dict[str, str]:
    """Ours without what would configure another service of the same kind."""
    settings = {item.name.upper() for item in dataclasses.fields(Settings)} | {"CREDENTIALS_DIRECTORY"}
    return {name: value for name, value in os.environ.items() if name not in settings}


def _settings(postgresql: PostgreSQL, valkey: Valkey, ports: Ports) -> dict[str, str]:
    return {
        "ENVIRONMENT": "demo",
        "LOG_FORMAT": "console",
        "DATABASE_URL": postgresql.dsn("neoforge_api", DATABASE),
        "DATABASE_MIGRATE_URL": postgresql.dsn("neoforge_migrator", DATABASE),
        "REDIS_URL": valkey.url(),
        "HOST": HOST,
        "PORT": str(ports.api),
        "METRICS_PORT": str(ports.metrics),
        "WORKER_PROCESSES": "1",
        "EMAIL_PROVIDER": "smtp",
        "SMTP_SERVER": HOST,
        "SMTP_PORT": str(ports.smtp),
        "SMTP_USE_TLS": "false",
        "EMAIL_RETRY_DELAY": "5",
        "FROM_EMAIL": SENDER,
        "FROM_NAME": "NeoForge demo",
    }


def _exports(settings: Mapping[str, str]) -> str:
    """For a shell, so that `neoforge status` and the like work on the running demo."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())


async def _prepare_database(postgresql: PostgreSQL, kept_key: str) -> str:
    """Make roles, database and schema as they have to be; returns an API key: the kept one while it is good."""
    from . import db, keys

    superuser = DatabaseUrl.parse(postgresql.dsn())
    await db.create_roles(superuser)
    connection = await db.connect(superuser, "neoforge-demo")
    try:
        if not await connection.fetchval("select true from pg_database where datname = $1", DATABASE):
            await connection.execute(f"create database {DATABASE} owner neoforge_owner")
    finally:
        await connection.close()
    migrator = DatabaseUrl.parse(postgresql.dsn("neoforge_migrator", DATABASE))
    await db.migrate(migrator)
    connection = await db.connect(migrator, "neoforge-demo")
    try:
        digest = hashlib.sha256(kept_key.encode()).digest()
        if await connection.fetchval("select true from api_keys where key_hash = $1 and revoked_at is null", digest):
            return kept_key
        return (await keys.create(connection, "demo", "demo"))[1]
    finally:
        await connection.close()


def _keep_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, at no moment anybody else."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.write(text)


def _all_alive(watched: list[Watched]) -> None:
    for child in watched:
        code = child.process.poll()
        if code is not None:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise click.ClickException(f"{child.name} ended by {how}; {child.log} ends:\n{tail(child.log)}")


def _wait(message: str, url: str, watched: list[Watched]) -> None:
    def answers() -> bool:
        try:
            return _request("GET", url)[0] == http.HTTPStatus.OK
        except OSError:
            return False

    _until(answers, START_SECONDS, watched, f"{url} did not answer")
    _say(message)


def _until(happened: Callable[[], bool], seconds: float, watched: list[Watched], failure: str) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        _all_alive(watched)
        if time.monotonic() > deadline:
            logs = "\n".join(f"{child.log} ends:\n{tail(child.log)}" for child in watched if child.log.exists())
            raise click.ClickException(f"{failure} within {seconds:g} seconds.\n{logs}")
        time.sleep(0.02)


# --- using it -----------------------------------------------------------------------------------------------------


def _request(method: str, url: str, *, key: str | None = None, body: Any = None) -> tuple[int, Any]:
    """The status and the JSON of an answer (None where it is none); OSError where there is no answer."""
    request = urllib.request.Request(  # noqa: S310  # our own addresses
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    try:
        with _HTTP.open(request, timeout=10) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, None


def _first_message(running: Running) -> None:
    """Send through the API, wait for the arrival in the mailbox, and print the way in between."""
    ports = running.ports
    message = {"to": f"Ada Lovelace <{RECIPIENT}>", "subject": "It works", "text": TEXT, "html": HTML, "tags": ["demo"]}
    status, answer = _request("POST", f"{ports.api_url}/api/v1/emails", key=running.key, body=message)
    if status != http.HTTPStatus.ACCEPTED:
        raise click.ClickException(f"The API answered {status} to the first message: {answer}")
    _say(f"Accepted (202): message {answer['id']}")
    url = f"{ports.api_url}/api/v1/emails/{answer['id']}"
    message_id = f"<{answer['id'].replace('-', '')}@{SENDER.rpartition('@')[2]}>"
    mails: list[Any] = []
    email: dict[str, Any] = {}

    def arrived() -> bool:
        wanted = urllib.parse.quote(message_id)
        mails[:] = _request("GET", f"{ports.mailbox_url}/api/messages?message_id={wanted}")[1]["messages"]
        return bool(mails)

    def done() -> bool:
        email.update(_request("GET", url, key=running.key)[1])
        return bool(email["state"] == "done")

    _until(arrived, ARRIVAL_SECONDS, running.watched, f"The message {message_id} did not arrive in the mailbox")
    _until(done, ARRIVAL_SECONDS, running.watched, "The message arrived, and its outcome was not recorded")
    if [mails[0]["recipients"], email["recipients"][0]["status"]] != [[RECIPIENT], "sent"] or len(mails) != 1:
        raise click.ClickException(f"The message went astray: {mails}, {email['recipients']}")
    _say(f"Arrived in the mailbox as {message_id}")
    click.echo("\n".join(["", "Its way, from GET /api/v1/emails/{id}:", *_timeline(email), ""]))


def _timeline(email: Mapping[str, Any]) -> Iterator[str]:
    start = datetime.fromisoformat(email["created_at"])
    for entry in email["timeline"]:
        after = (datetime.fromisoformat(entry["at"]) - start).total_seconds()
        words = [entry.get("recipient"), entry.get("provider") and f"by {entry['provider']}", entry.get("detail")]
        yield f"  {after:7.3f} s  {entry['type']:<9} {'  '.join(word for word in words if word)}".rstrip()


def _refusals(running: Running) -> None:
    url = f"{running.ports.api_url}/api/v1/emails"
    good = {"to": RECIPIENT, "subject": "Refused", "text": "Refused."}
    for what, key, body, expected in (
        ("a wrong key", "nf_" + "x" * 43, good, 401),
        ("a bad address", running.key, good | {"to": "ada@"}, 422),
    ):
        status, problem = _request("POST", url, key=key, body=body)
        if status != expected or not isinstance(problem, dict):
            raise click.ClickException(f"{what} was answered with {status} instead of {expected}: {problem}")
        words = [f"{item['field']}: {item['message']}" for item in problem.get("errors", [])]
        _say(f"Refused {what} ({status}): {'; '.join(words) or problem.get('detail')}")


def _welcome(running: Running, directory: Path) -> None:
    ports = running.ports
    click.echo(f"""\
  mailbox   {ports.mailbox_url}/
  API docs  {ports.api_url}/docs
  health    {ports.api_url}/health
  metrics   http://{HOST}:{ports.metrics}/metrics (API and queue), http://{HOST}:{ports.metrics + 1}/metrics (worker)
  logs      {directory}/*.log
  operate   . {shlex.quote(str(directory / "environment"))} && neoforge status

Send one yourself (a recipient smtp-550@example.com is refused, smtp-451@example.com is tried again):

curl {ports.api_url}/api/v1/emails \\
  -H 'Authorization: Bearer {running.key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"to": "grace@example.com", "subject": "Hello", "text": "It works."}}'

Running; Ctrl-C stops everything.""")
