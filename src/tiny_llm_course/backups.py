"""Backups of the learner's files: `.backups/norm.py.1.bak`, `.2.bak` and so on; the highest is the newest.

`reset`, `start --again` and, for a kernel, `skip` make them, and `restore` brings the newest one back. Only
the newest few of each file are kept.
"""

import re
from pathlib import Path

FOLDER = ".backups"  # next to the learner's files
MAX_BACKUPS = 5  # of each file


def back_up(file: Path) -> Path:
    """Move a file to its newest backup and return the new path.

    Of backups with the same contents only the newest is kept, so that blank starters do not replace work. If
    more than five are left, the oldest is deleted.
    """
    before = backups(file)
    target = _folder(file) / f"{file.name}.{_number(before[-1]) + 1 if before else 1}.bak"
    target.parent.mkdir(exist_ok=True)
    file.rename(target)
    contents = target.read_bytes()
    others = [one for one in before if one.read_bytes() != contents]
    for backup in {*before} - {*others[1 - MAX_BACKUPS :]}:
        backup.unlink()
    return target


def backups(file: Path) -> list[Path]:
    """The backups of a file, the oldest first."""
    found = [one for one in _folder(file).glob("*.bak") if original(one) == file]
    return sorted(found, key=_number)


def original(backup: Path) -> Path:
    """The path of the file that a backup is of."""
    return backup.parent.parent / re.sub(r"\.\d+\.bak$", "", backup.name)


def _folder(file: Path) -> Path:
    return file.parent / FOLDER


def _number(backup: Path) -> int:
    return int(backup.name.split(".")[-2])
