"""arq, in whose workers a message with the subject `poison` ends the process as soon as a call with it begins."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from arq.cli import cli

from neoforge_email.message import Message
from neoforge_email.providers.base import Result
from neoforge_email.providers.smtp import SmtpConnection

send = SmtpConnection.send


async def die_of_poison(
    self: SmtpConnection, window: Sequence[Message], may_start: Callable[[], bool]
) -> list[tuple[Result, ...]]:
    if any(message.subject == "poison" for message in window):
        os.kill(os.getpid(), signal.SIGKILL)
    return await send(self, window, may_start)


if __name__ == "__main__":
    SmtpConnection.send = die_of_poison  # type: ignore[method-assign]
    cli()
