"""The `neoforge` command. Settings come from the environment (docs/settings.md); each sub-command has `--help`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

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
    """Show the queue by state with the age of the oldest message, and whether workers listen. Exit 1 if something waits
    for more than five minutes.

    Connects by DATABASE_MIGRATE_URL and REDIS_URL.

    Example: neoforge status --json
    """
    report = asyncio.run(_status(_settings()))
    if as_json:
        click.echo(json.dumps(report))
    else:
        for state in report["queue"]:
            click.echo(f"{state['state']:<10} {state['size']:>9}   oldest {state['oldest_seconds']:.0f} s")
        listening = report["workers_listening"]
        click.echo(
            "workers listening: " + ("unknown, Redis cannot be reached" if listening is None else str(listening))
        )
    stuck = [s for s in report["queue"] if s["state"] != "scheduled" and s["oldest_seconds"] > STUCK_SECONDS]
    if stuck or not report["workers_listening"]:
        sys.exit(1)


STUCK_SECONDS = 300


def _settings() -> Settings:
    return Settings.from_environment(os.environ)


async def _with_database(call: Any) -> Any:
    from . import db

    connection = await db.connect(_settings().database_migrate_url, "neoforge-keys")
    try:
        return await call(connection)
    finally:
        await connection.close()


async def _status(settings: Settings) -> dict[str, Any]:
    from redis.exceptions import RedisError

    from . import db, outbox
    from .redis import connect

    connection = await db.connect(settings.database_migrate_url, "neoforge-status")
    try:
        queue = await outbox.queue_stats(connection)
    finally:
        await connection.close()
    redis = connect(settings)
    listening: int | None
    try:
        [(_, listening)] = await redis.pubsub_numsub(settings.doorbell_channel)
    except (RedisError, OSError):
        listening = None
    finally:
        await redis.aclose()
    rows = [{"state": s.state, "size": s.size, "oldest_seconds": round(s.oldest_seconds, 1)} for s in queue]
    return {"queue": rows, "workers_listening": listening}


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
