"""The `neoforge` command. Settings come from the environment (docs/settings.md); each sub-command has `--help`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import click

from . import __version__
from .errors import NeoforgeError, SettingsError
from .settings import Settings


class Commands(click.Group):
    """Sub-commands whose module is imported when they are asked for, and errors of ours as one message each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "demo"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "demo":
            return super().get_command(ctx, cmd_name)
        try:
            from .demo import demo
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"the demo needs further packages ({error.name}); `make demo` brings them"
            ) from None
        return demo

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            click.echo(error.detail, err=True)
            ctx.exit(2)
        except NeoforgeError as error:
            raise click.ClickException(error.detail) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neoforge")
def main() -> None:
    """A company's own transactional e-mail. Settings are environment variables; see docs/settings.md."""


@main.command()
def serve() -> None:
    """Serve the API on HOST:PORT, and its metrics on METRICS_PORT.

    Example: DATABASE_URL=… REDIS_URL=… neoforge serve
    """
    from .serve import serve as run

    run(_settings())


@main.command()
@click.option("--burst", is_flag=True, help="Deliver what is due, then end.")
@click.option("--check", is_flag=True, help="Exit 0 if this instance (WORKER_INSTANCE) is alive, else 1.")
def worker(burst: bool, check: bool) -> None:
    """Deliver messages: the same as `arq neoforge_email.worker.WorkerSettings`.

    Example: WORKER_INSTANCE=1 neoforge worker
    """
    options = [name for name, wanted in (("--burst", burst), ("--check", check)) if wanted]
    os.execv(sys.executable, [sys.executable, "-m", "arq", "neoforge_email.worker.WorkerSettings", *options])  # noqa: S606


@main.command()
def bounces() -> None:
    """Take bounces and complaints by mail on BOUNCE_HOST:BOUNCE_PORT, for the return paths at BOUNCE_DOMAIN.

    Example: BOUNCE_DOMAIN=bounces.example.com BOUNCE_PORT=25 neoforge bounces
    """
    from .bounces import run
    from .observability import configure_logging

    settings = _settings()
    configure_logging(settings)
    asyncio.run(run(settings))


@main.command()
def migrate() -> None:
    """Bring the database's schema and functions to this version. A second run changes nothing.

    Connects by DATABASE_MIGRATE_URL, as a member of neoforge_owner and neoforge_outbox.

    Example: neoforge migrate
    """
    from . import db

    done = asyncio.run(db.migrate(_settings().database_migrate_url))
    if not done.changed:
        click.echo(f"Nothing to do: the schema is at {done.after}.")
        return
    if done.before != done.after:
        click.echo(f"Schema: {done.before or 'empty'} -> {done.after}.")
    if done.functions:
        click.echo("Functions installed.")


@main.group()
def keys() -> None:
    """API keys of users. Connects by DATABASE_MIGRATE_URL."""


@keys.command("create")
@click.option("--user", required=True, help="Whose key; the user is made if there is none of that name.")
@click.option("--name", default="default", show_default=True, help="What the key is for.")
def keys_create(user: str, name: str) -> None:
    """Make a key and print it: the only time that it can be seen.

    Example: neoforge keys create --user shop --name checkout
    """
    from . import keys as api_keys

    key, secret = asyncio.run(_with_database(lambda connection: api_keys.create(connection, user, name)))
    click.echo(f"Key {key.id} of user {key.user} ({key.name}); keep it, it is not shown again:", err=True)
    click.echo(secret)


@keys.command("list")
@click.option("--user", help="Of this user only.")
def keys_list(user: str | None) -> None:
    """Show keys: id, user, name, beginning, and when each was made, last used and revoked.

    Example: neoforge keys list --user shop
    """
    from . import keys as api_keys

    for key in asyncio.run(_with_database(lambda connection: api_keys.list_all(connection, user))):
        state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "active"
        used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
        click.echo(
            f"{key.id:>5}  {key.user:<20} {key.name:<20} {key.prefix}…  made {key.created_at:%Y-%m-%d}  used {used}  {state}"
        )


@keys.command("revoke")
@click.argument("key_id", type=int)
def keys_revoke(key_id: int) -> None:
    """Make a key useless, within 30 seconds everywhere. KEY_ID is the first column of `keys list`.

    Example: neoforge keys revoke 7
    """
    from . import keys as api_keys

    key = asyncio.run(_with_database(lambda connection: api_keys.revoke(connection, key_id)))
    click.echo(f"Key {key.id} of user {key.user} ({key.name}) is revoked.")


@main.command()
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, envvar="NEOFORGE_URL", help="Where the API is."
)
@click.option("--key", required=True, envvar="NEOFORGE_API_KEY", help="An API key; better in NEOFORGE_API_KEY.")
@click.option("--from", "sender", help="The visible sender; default: the service's.")
@click.option("--to", required=True, multiple=True, help="A recipient; may be given again.")
@click.option("--subject", required=True)
@click.option("--text", help="The body; `-` reads it from standard input.")
@click.option("--html", help="The body as HTML.")
@click.option("--idempotency-key", help="Makes repeating this command safe for 24 hours.")
@click.option("--wait", type=float, metavar="SECONDS", help="Wait for the outcome; exit 1 if it does not come in time.")
def send(
    url: str,
    key: str,
    sender: str | None,
    to: tuple[str, ...],
    subject: str,
    text: str | None,
    html: str | None,
    idempotency_key: str | None,
    wait: float | None,
) -> None:
    """Send a message through the REST API and print its id.

    Example: neoforge send --to ada@example.com --subject Hello --text 'It works.' --wait 10
    """
    text = sys.stdin.read() if text == "-" else text
    message = {"from": sender, "to": list(to), "subject": subject, "text": text, "html": html}
    body = {name: value for name, value in message.items() if value is not None}
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    answer = _request("POST", f"{url}/api/v1/emails", key, body, headers)
    click.echo(answer["id"])
    if wait is None:
        return
    give_up = time.monotonic() + wait
    while time.monotonic() < give_up:
        email = _request("GET", f"{url}/api/v1/emails/{answer['id']}", key)
        if email["state"] == "done":
            for recipient in email["recipients"]:
                click.echo(f"{recipient['recipient']}: {recipient['status']} {recipient['response'] or ''}")
            return
        time.sleep(0.2)
    raise click.ClickException(f"no outcome within {wait:g} seconds; the message is {email['state']}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Show everything that waits with the age of its oldest, and whether workers listen. Exit 1 where something waits too
    long, waits for you, is stuck, or where no worker listens.

    Connects by DATABASE_MIGRATE_URL and REDIS_URL.

    Example: neoforge status --json
    """
    from . import backlog

    async def ask() -> tuple[backlog.Backlog, int | None]:
        return await _with_database(backlog.read), await _workers_listening()

    read, listening = asyncio.run(ask())
    faults = [f"{w.what} {w.state}: {w.fault}" for w in read.waiting if w.fault]
    faults += [
        f"{kind}: {count} rows are stuck; see `neoforge reconcile`" for kind, count in read.stuck.items() if count
    ]
    faults += [] if listening else ["no worker is known to listen"]
    if as_json:
        report: dict[str, Any] = {}
        for w in read.waiting:
            row = {"state": w.state, "size": w.size, "oldest_seconds": round(w.oldest_seconds, 1)}
            report.setdefault(w.what, []).append(row)
        click.echo(_json(report | {"stuck": read.stuck, "workers_listening": listening, "faults": faults}))
    else:
        for w in read.waiting:
            click.echo(
                f"{w.what:<8} {w.state:<10} {w.size:>9}   oldest {w.oldest_seconds:>8.0f} s   {w.fault or ''}".rstrip()
            )
        click.echo(f"stuck    {sum(read.stuck.values()):>20}   looked for until {read.reconciled_at:%Y-%m-%d %H:%M:%S}")
        click.echo(
            "workers listening: " + ("unknown, Redis cannot be reached" if listening is None else str(listening))
        )
    if faults:
        sys.exit(1)


@main.command()
@click.argument("name", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def why(name: str, as_json: bool) -> None:
    """Say in one sentence why a message has not moved and what will happen next; then its recipients and its timeline.
    Exit 1 if there is no such message.

    ID is the message's, an attempt's, or a Message-ID. Of addresses only the domain is shown. Connects by
    DATABASE_MIGRATE_URL and REDIS_URL.

    Example: neoforge why 01a20bfa-4ebb-78c0-9472-c1c1bfced7cf
    """
    from . import records
    from .why import explain, parse_id

    email_id = parse_id(name)
    if email_id is None:
        raise click.UsageError(f"{name!r} names no message: give its id, an attempt's id, or a Message-ID")
    retries = _settings().email_worker_max_retries

    async def ask() -> records.Examined:
        workers = await _workers_listening()
        examined: records.Examined = await _with_database(
            lambda connection: records.examine(connection, email_id, workers=workers, max_retries=retries)
        )
        return examined

    examined = asyncio.run(ask())
    sentence = explain(examined.situation)
    if as_json:
        report: dict[str, Any] = {"id": email_id, "state": examined.situation.state, "why": sentence}
        click.echo(_json(report | {"recipients": examined.recipients, "timeline": examined.timeline}))
    else:
        lines = [sentence, ""] if examined.timeline else [sentence]
        lines += [f"{r.recipient}: {r.status} {r.response or ''}".rstrip() for r in examined.recipients]
        lines += [""] if examined.recipients else []
        for entry in examined.timeline:
            number = None if entry.attempt is None else f"attempt {entry.attempt}"
            words = (entry.type, entry.recipient, number, entry.provider, entry.detail)
            lines.append(f"{entry.at:%Y-%m-%d %H:%M:%S.%f}  {'  '.join(word for word in words if word)}")
        click.echo("\n".join(lines))
    if not examined.situation.known:
        sys.exit(1)


@main.group()
def uncertain() -> None:
    """Messages of which nobody knows whether they were sent, and those that wait for an operator. Connects by
    DATABASE_MIGRATE_URL."""


@uncertain.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--most", type=click.IntRange(1), default=1000, show_default=True, help="The oldest so many.")
def uncertain_list(as_json: bool, most: int) -> None:
    """Show them: id, since when, state, policy, provider, user, open recipients, and why it is held.

    Example: neoforge uncertain list
    """
    from . import uncertain as decisions

    found = asyncio.run(_with_database(lambda connection: decisions.undecided(connection, most)))
    if as_json:
        click.echo(_json(found))
        return
    for it in found:
        recipients = "1 recipient" if it.recipients == 1 else f"{it.recipients} recipients"
        click.echo(
            f"{it.id}  {it.since:%Y-%m-%d %H:%M:%S}  {it.state:<9}  {it.policy:<6}  {it.provider or '-':<8}  {it.user:<12}"
            f"  {recipients:<13}  {it.reason or ''}".rstrip()
        )


@uncertain.command("resend")
@click.argument("names", metavar="[ID]...", nargs=-1)
@click.option("--all-held", is_flag=True, help="All that are held; asks for --yes.")
@click.option("--yes", is_flag=True, help="Do so.")
def uncertain_resend(names: tuple[str, ...], all_held: bool, yes: bool) -> None:
    """Have messages sent, or sent again under the same Message-ID: one that was taken before arrives twice. Exit 1 if one of
    them was left as it is.

    Example: neoforge uncertain resend 01a20bfa-4ebb-78c0-9472-c1c1bfced7cf
    """
    from . import uncertain as decisions

    if bool(names) == all_held:
        raise click.UsageError("give the ids of messages, or --all-held")
    if all_held and not yes:
        raise click.UsageError("--all-held sends every held message; add --yes if you mean it")
    ids = _ids(names)

    async def decide(connection: Any) -> Any:
        return await decisions.resend(connection, await decisions.held(connection) if all_held else ids)

    _tell(asyncio.run(_with_database(decide)), "will be sent")


@uncertain.command("confirm")
@click.argument("names", metavar="ID...", nargs=-1, required=True)
def uncertain_confirm(names: tuple[str, ...]) -> None:
    """Say that messages arrived: they are not sent again. Exit 1 if one of them was left as it is.

    Example: neoforge uncertain confirm 01a20bfa-4ebb-78c0-9472-c1c1bfced7cf
    """
    from . import uncertain as decisions

    ids = _ids(names)
    _tell(asyncio.run(_with_database(lambda connection: decisions.confirm(connection, ids))), "counts as sent")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object a line.")
def reconcile(as_json: bool) -> None:
    """Look at every row for what no rule will move again, and print it: kind, id, what is wrong. Changes nothing. Exit 1 if
    there is any; docs/operations.md says what to do.

    Example: neoforge reconcile
    """
    from . import reconcile as reconciler

    async def look(connection: Any) -> int:
        count, told = 0, time.monotonic()

        def progress(part: str, rows: int) -> None:
            nonlocal told
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                click.echo(f"{part}: {rows} rows …", err=True)

        async for stuck in reconciler.find(connection, progress):
            count += 1
            click.echo(_json(stuck) if as_json else f"{stuck.kind:<26}  {stuck.id}  {stuck.what}")
        return count

    count = asyncio.run(_with_database(look))
    click.echo("Nothing is stuck." if not count else f"{count} found.", err=True)
    if count:
        sys.exit(1)


PROGRESS_SECONDS = 5


def _settings() -> Settings:
    return Settings.from_environment(os.environ)


async def _with_database(call: Any) -> Any:
    from . import db

    connection = await db.connect(_settings().database_migrate_url, "neoforge-cli")
    try:
        return await call(connection)
    finally:
        await connection.close()


async def _workers_listening() -> int | None:
    """How many workers hear the doorbell; None if Redis does not say."""
    from redis.exceptions import RedisError

    from .redis import connect

    settings = _settings()
    redis = connect(settings)
    try:
        [(_, listening)] = await redis.pubsub_numsub(settings.doorbell_channel)
    except (RedisError, OSError):
        return None
    finally:
        await redis.aclose()
    return int(listening)


def _ids(names: tuple[str, ...]) -> list[UUID]:
    from .why import parse_id

    ids = {name: parse_id(name) for name in names}
    if wrong := [name for name, email_id in ids.items() if email_id is None]:
        raise click.UsageError(f"{wrong[0]!r} names no message: give its id, an attempt's id, or a Message-ID")
    return list(dict.fromkeys(email_id for email_id in ids.values() if email_id))


def _tell(decided: Mapping[UUID, str | None], done: str) -> None:
    for email_id, refusal in decided.items():
        click.echo(f"{email_id}  {'left as it is: ' + refusal if refusal else done}")
    if any(decided.values()):
        sys.exit(1)


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


def _request(method: str, url: str, key: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise click.ClickException(f"--url must begin with http:// or https://, not {url}")
    request = urllib.request.Request(  # noqa: S310 - checked above
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - checked above
            return json.load(response)
    except urllib.error.HTTPError as error:
        try:
            problem = json.load(error)
        except ValueError:
            raise click.ClickException(f"{url} answered {error.code}") from None
        lines = [problem.get("detail", problem.get("title", ""))]
        lines += [f"  {item['field']}: {item['message']}" for item in problem.get("errors", [])]
        raise click.ClickException("\n".join(lines)) from None
    except OSError as error:
        raise click.ClickException(f"{url} cannot be reached: {error}") from None


if __name__ == "__main__":
    main()
