"""Pointers of Git LFS: the small text files that a clone without LFS has in place of large ones."""

from typing import BinaryIO

START = b"version https://git-lfs"


def refuse_pointer(file: BinaryIO) -> None:
    """Raise ValueError if the file is a pointer. The file is at its start, before and after."""
    if file.read(len(START)) == START:
        raise ValueError("a Git LFS pointer, not the file itself: install Git LFS and run `git lfs pull`")
    file.seek(0)
