"""A real Postfix on the loopback interface, from `.cache/postfix`, where `.ci/postfix` unpacks Debian's package.

Its configuration, queue, data, log and mailboxes lie in one directory of its own; the computer's own mail server, if it has
one, is not touched. It takes mail for example.net into a maildir, hands mail for the bounce domain and for the domain of
dead addresses to a port where a test listens, and sends nothing anywhere else. It needs root, as Postfix does.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

from tests.pki import Pki

UNPACKED = Path(__file__).parent.parent / ".cache" / "postfix"
QUEUE_OWNER, QUEUE_GROUP, MAIL_OWNER = "mail", "uucp", "nobody"  # of every Debian; Postfix wants three that differ

BOUNCE_DOMAIN = "bounces.example.com"
DEAD_DOMAIN = "dead.example.com"
REFUSED, LATER = "refused@example.net", "later@example.net"
SIZE_LIMIT_BYTES = 1_000_000
HARD_ERROR_LIMIT = 5  # of the second port

MAIN = """\
compatibility_level = 3.6
command_directory = {unpacked}/usr/sbin
daemon_directory = {unpacked}/usr/lib/postfix/sbin
shlib_directory = {unpacked}/usr/lib/postfix
meta_directory = {unpacked}/etc/postfix
sendmail_path = {unpacked}/usr/sbin/sendmail
newaliases_path = {unpacked}/usr/sbin/sendmail
mailq_path = {unpacked}/usr/sbin/sendmail
queue_directory = {directory}/spool
data_directory = {directory}/data
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
mail_owner = {queue_owner}
setgid_group = {queue_group}
import_environment = MAIL_CONFIG LANG=C LD_LIBRARY_PATH={libraries}
myhostname = mail.example.com
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
enable_long_queue_ids = yes
message_size_limit = {size_limit}
notify_classes =
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 1s
transport_retry_time = 1s
service_throttle_time = 1s

smtpd_peername_lookup = no
smtpd_tls_security_level = may
smtpd_tls_chain_files = {directory}/server.pem
smtpd_error_sleep_time = 0
smtpd_relay_restrictions = reject_unauth_destination
smtpd_recipient_restrictions = check_recipient_access inline:{{
    {{ {refused} = 550 5.1.1 No such user here }}
    {{ {later} = 450 4.2.0 Come back later }} }}

mydestination =
local_recipient_maps =
alias_maps =
alias_database =
virtual_mailbox_domains = example.net
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = static:inbox/
virtual_minimum_uid = 1
virtual_uid_maps = static:{mail_uid}
virtual_gid_maps = static:{mail_gid}
relay_domains = {bounce_domain} {dead_domain}
transport_maps = inline:{{
    {{ {bounce_domain} = smtp:[127.0.0.1]:{bounce_port} }}
    {{ {dead_domain} = smtp:[127.0.0.1]:{bounce_port} }} }}
default_transport = error:5.4.4 nothing leaves this computer
"""

MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
127.0.0.1:{strict_port} inet n - n - - smtpd -o smtpd_hard_error_limit={hard_error_limit}
cleanup   unix n - n - 0 cleanup
qmgr      unix n - n 300 1 qmgr
tlsmgr    unix - - n 1000? 1 tlsmgr
rewrite   unix - - n - - trivial-rewrite
bounce    unix - - n - 0 bounce
defer     unix - - n - 0 bounce
trace     unix - - n - 0 bounce
smtp      unix - - n - - smtp
error     unix - - n - - error
retry     unix - - n - - error
virtual   unix - n n - - virtual
anvil     unix - - n - 1 anvil
scache    unix - - n - 1 scache
proxymap  unix - - n - - proxymap
postlog   unix-dgram n - n - 1 postlogd
"""


def missing() -> str | None:
    """Why there can be no Postfix here, in one line; None if there can."""
    if os.geteuid() != 0:
        return "it needs root; run the tests as root on Debian"
    if not (UNPACKED / "usr/sbin/postfix").exists():
        return "it is not there; .ci/postfix brings it, on Debian and as root"
    return None


@dataclass(frozen=True, slots=True)
class Taken:
    """One copy in the maildir. Postfix itself may deliver twice when it is killed, but never under a second `queue_id`."""

    queue_id: str
    message_id: str
    attempt: str
    return_path: str
    recipient: str


class Postfix:
    """One instance; ValueError says what is missing. `strict_port` breaks off after HARD_ERROR_LIMIT refusals."""

    def __init__(self, directory: Path, pki: Pki) -> None:
        if reason := missing():
            raise ValueError(reason)
        self.port, self.strict_port, self.bounce_port = _free_ports(3)
        self._directory = directory
        self._inbox = directory / "mail" / "inbox" / "new"
        libraries = ":".join(map(str, _libraries()))
        self._environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        queue, mail = pwd.getpwnam(QUEUE_OWNER), pwd.getpwnam(MAIL_OWNER)
        directory.chmod(0o755)
        for name in ("etc", "spool", "data", "mail"):
            (directory / name).mkdir()
        # The check of the queue at a start, without root's rights by then, logs what a killed process left behind.
        (directory / "log").touch()
        for name in ("data", "log"):
            os.chown(directory / name, queue.pw_uid, queue.pw_gid)
        os.chown(directory / "mail", mail.pw_uid, mail.pw_gid)
        (directory / "server.pem").write_bytes(_key_first(pki.good_file.read_bytes()))
        main = MAIN.format(
            unpacked=UNPACKED,
            directory=directory,
            queue_owner=QUEUE_OWNER,
            queue_group=QUEUE_GROUP,
            libraries=libraries,
            size_limit=SIZE_LIMIT_BYTES,
            refused=REFUSED,
            later=LATER,
            mail_uid=mail.pw_uid,
            mail_gid=mail.pw_gid,
            bounce_domain=BOUNCE_DOMAIN,
            dead_domain=DEAD_DOMAIN,
            bounce_port=self.bounce_port,
        )
        master = MASTER.format(port=self.port, strict_port=self.strict_port, hard_error_limit=HARD_ERROR_LIMIT)
        (directory / "etc" / "main.cf").write_text(main)
        (directory / "etc" / "master.cf").write_text(master)

    def start(self) -> None:
        self._postfix("start")

    def stop(self) -> None:
        """Take no more connections; those that are open may finish what they are at."""
        self._postfix("stop")

    def kill(self) -> None:
        """SIGKILL to every process of the instance."""
        while processes := list(self._processes()):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _processes(self) -> Iterator[int]:
        """They have the queue as their working directory."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if (entry / "cwd").readlink() == self._directory / "spool":
                        yield int(entry.name)

    def end(self) -> None:
        """Stop what still runs, and leave nothing of it."""
        with suppress(subprocess.CalledProcessError):  # it is stopped already
            self.stop()
        self.kill()

    def _postfix(self, what: str) -> None:
        command = [str(UNPACKED / "usr/sbin/postfix"), "-c", str(self._directory / "etc"), what]
        try:
            subprocess.run(command, env=self._environment, check=True, capture_output=True, text=True, timeout=60)
        except subprocess.CalledProcessError as error:
            error.add_note(f"{error.stdout}{error.stderr}\n{self.log}")
            raise

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    @property
    def taken(self) -> list[Taken]:
        """What has been delivered since `clear`."""
        return [_taken(file.read_bytes()) for file in self._delivered()]

    async def settled(self, seconds: float = 30) -> None:
        """Wait until the queue is empty; raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while any(self._queued()):
                await asyncio.sleep(0.02)

    def clear(self) -> None:
        for file in self._delivered():
            file.unlink()

    def _delivered(self) -> list[Path]:
        return list(self._inbox.iterdir()) if self._inbox.exists() else []

    def _queued(self) -> Iterator[Path]:
        """Whole messages; one that was being written when Postfix was killed is not executable, and nobody's."""
        for name in ("incoming", "active", "deferred"):
            for path in (self._directory / "spool" / name).rglob("*"):
                with suppress(FileNotFoundError):  # moved on meanwhile
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IXUSR:
                        yield path


def _taken(content: bytes) -> Taken:
    mail = message_from_bytes(content)
    queued = re.search(r"\bid ([0-9A-Za-z]+)", mail["Received"])
    assert queued is not None
    return Taken(
        queued[1], mail["Message-ID"], mail["X-NeoForge-Attempt"], mail["Return-Path"].strip("<>"), mail["Delivered-To"]
    )


def _key_first(pem: bytes) -> bytes:
    """As smtpd_tls_chain_files wants it."""
    start = pem.index(b"-----BEGIN PRIVATE KEY-----")
    return pem[start:] + pem[:start]


def _libraries() -> Iterator[Path]:
    """Postfix's own, and those that came with it where the computer has none."""
    yield UNPACKED / "usr/lib/postfix"
    for library in ("usr/lib", "lib"):
        yield from (UNPACKED / library).glob("*-linux-gnu*")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
