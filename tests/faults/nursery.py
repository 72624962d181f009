"""Processes of the service that begin with everything imported: forked from one that has, which costs a twentieth of a
start. The server that forks imports `nursery_modules`, the service with its awaits wrapped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from . import inject

PR_SET_PDEATHSIG = 1

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, f"{__name__}_modules"])


class Forked:
    """A child with as much of `subprocess.Popen` as is needed here. It dies with the process that started it."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._process = CONTEXT.Process(target=_begin, args=(list(arguments), log, dict(environment)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code


def _begin(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.setsid()
    os.chdir("/")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["neoforge"]
    inject.main(arguments)
