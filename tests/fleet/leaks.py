"""Looks for secrets on a machine; run there by test_secrets.py with Python's own library, as root.

Reads from standard input a JSON object, from a secret's name to the texts that give it away, and prints a JSON list of
[name, where]. Looked through: the journal, every process's environment and command line, every log, and every file that
another user than its owner may read.
"""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What packages bring is not ours, and the kernel's trees are no files.
SKIPPED = {
    "/proc",
    "/sys",
    "/dev",
    "/usr/lib",
    "/usr/share",
    "/usr/bin",
    "/usr/sbin",
    "/usr/include",
    "/var/lib/dpkg",
    "/var/cache/apt",
    # By its mode a group may read there, by its access list the unit's user alone.
    "/run/credentials",
}
PIECE = 1 << 20
OVERLAP = 4096  # longer than any secret


def search(where: str, stream: object, needles: list[tuple[str, bytes]]) -> Iterator[tuple[str, str]]:
    """Yield what a stream of bytes holds, read in pieces."""
    rest, found = b"", set()
    while piece := stream.read(PIECE):  # type: ignore[attr-defined]
        text = rest + piece
        found |= {name for name, needle in needles if needle in text}
        rest = text[-OVERLAP:]
    for name in found:
        yield name, where


def files(root: str) -> Iterator[str]:
    """Yield the files that group or others may read, and every log."""
    for directory, names, leaves in os.walk(root):
        names[:] = [
            name
            for name in names
            if os.path.join(directory, name) not in SKIPPED and not os.path.islink(os.path.join(directory, name))
        ]
        for leaf in leaves:
            path = os.path.join(directory, leaf)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue
            if stat.S_ISREG(mode) and (mode & (stat.S_IRGRP | stat.S_IROTH) or directory.startswith("/var/log")):
                yield path


def main() -> None:
    """Print what was found."""
    given: dict[str, list[str]] = json.load(sys.stdin)
    needles = [(name, text.encode()) for name, texts in given.items() for text in texts]
    found: list[tuple[str, str]] = []
    journal = subprocess.Popen(["journalctl", "--output=export", "--quiet"], stdout=subprocess.PIPE)
    found += search("the journal", journal.stdout, needles)
    journal.wait()
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("environ", "cmdline"):
            try:
                with (process / name).open("rb") as stream:
                    program = (process / "comm").read_text().strip()
                    found += search(f"{name} of {program}", stream, needles)
            except OSError:
                continue
    for path in files("/"):
        try:
            with Path(path).open("rb") as stream:
                found += search(path, stream, needles)
        except OSError:
            continue
    print(json.dumps(found))


if __name__ == "__main__":
    main()
