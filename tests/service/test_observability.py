"""What goes into a log, and what never does."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOG_AN_ERROR = """
import logging, structlog
from neoforge_email.observability import configure_logging
from neoforge_email.settings import Settings

def fail():
    address = "ada@" + "example.com"
    raise ValueError("what went wrong")

configure_logging(Settings.from_environment({environment!r}))
try:
    fail()
except ValueError:
    structlog.get_logger().exception("ours.failed", email_id=17)
    logging.getLogger("library").exception("theirs failed")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_says_where_and_never_with_which_values(log_format: str) -> None:
    environment = {"DATABASE_URL": "postgresql://a@h/d", "REDIS_URL": "redis://h/0", "LOG_FORMAT": log_format}
    script = LOG_AN_ERROR.replace("{environment!r}", repr(environment))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    for expected in ("ours.failed", "theirs failed", "what went wrong", "fail", "17"):
        assert expected in done.stderr
    assert "ada@example.com" not in done.stderr
    assert done.stdout == ""
