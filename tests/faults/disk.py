"""A small disk for a part of PostgreSQL: a tmpfs that can be filled and freed. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SIZE = "256m"


def usable() -> bool:
    """Whether this computer lets us mount a tmpfs."""
    if os.geteuid() != 0:
        return False
    directory = tempfile.mkdtemp(prefix="neoforge-faults-disk-", dir="/tmp")
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True)
        if mounted.returncode == 0:
            subprocess.run(["umount", directory], check=True)
        return mounted.returncode == 0
    finally:
        Path(directory).rmdir()


class SmallDisk:
    """Holds `pg_wal` (part `wal`) or all but it (part `data`) of the cluster in `directory`."""

    def __init__(self, directory: Path, part: str) -> None:
        self._directory = directory
        self._part = part
        self._mount = directory / "disk"
        self._ballast = self._mount / "ballast"

    def prepare(self) -> None:
        self._mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "tmpfs", str(self._mount)], check=True)

    def move(self) -> None:
        """Put the part there, while the server is stopped."""
        cluster = self._directory / "postgresql"
        wal = cluster / "pg_wal"
        part = wal
        if self._part == "data":
            elsewhere = self._directory / "wal"
            shutil.move(wal, elsewhere)
            _like(cluster, elsewhere)
            wal.symlink_to(elsewhere)
            part = cluster / "base"
        there = self._mount / part.name
        shutil.copytree(part, there, symlinks=True)
        _like(cluster, there)
        shutil.rmtree(part)
        part.symlink_to(there)

    def fill(self) -> None:
        """Leave no octet free."""
        with self._ballast.open("ab", buffering=0) as ballast:
            try:
                while ballast.write(bytes(1 << 20)):
                    pass
            except OSError:
                pass
            try:
                while ballast.write(bytes(512)):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def remove(self) -> None:
        subprocess.run(["umount", str(self._mount)], check=False)


def _like(pattern: Path, directory: Path) -> None:
    """Give a tree to the owner of another one."""
    owner = pattern.stat()
    for path in (directory, *directory.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        if path.is_dir():
            path.chmod(0o700)
