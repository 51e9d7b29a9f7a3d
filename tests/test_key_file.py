"""`tiny-llm serve --api-key-file`: which lines are keys, and what is wrong with a file.

No message may contain a key, or any other text of the file.
"""

import os
from pathlib import Path

import pytest

from command_line import Run, plain_cli
from tiny_llm_cli.key_file import read_keys

__all__ = ["plain_cli"]


def written(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    """A file with this content, which only its owner can read unless `mode` says otherwise."""
    file = folder / "keys.txt"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"one\ntwo\n", ("one", "two")),
        (b"one", ("one",)),
        (b"# team A\none\n\n   \n# team B\ntwo words\n#three\n", ("one", "two words")),
        (b"one\r\ntwo\r\n", ("one", "two")),
        (b"\xef\xbb\xbfone\n", ("one",)),
        ("zwö lf\n".encode(), ("zwö lf",)),
        ("a\u2028b\nc#d\n".encode(), ("a\u2028b", "c#d")),
    ],
)
def test_every_line_is_a_key_unless_it_is_blank_or_a_comment(
    content: bytes, keys: tuple[str, ...], tmp_path: Path
) -> None:
    assert read_keys(written(tmp_path, content)).keys == keys


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b"", "", "has no keys: write one on each line"),
        (b"\n# none yet\n", "", "has no keys: write one on each line"),
        (b"one\nsesame \n", ", line 2", "must not start or end with white space"),
        (b"\n\n\tsesame\n", ", line 3", "must not start or end with white space"),
        (b" # sesame\n", ", line 1", "must not start or end with white space"),
        (b"one\nses\xe4ame\n", ", line 2", "must be UTF-8 text"),
        (b"one\nses\0ame\n", ", line 2", "must not have control characters"),
        (b"ses\tame\n", ", line 1", "must not have control characters"),
        (b"ses\rame\n", ", line 1", "must not have control characters"),
    ],
)
def test_an_error_names_the_file_and_the_line_but_not_the_key(
    content: bytes, place: str, problem: str, tmp_path: Path, plain_cli: Run
) -> None:
    file = written(tmp_path, content)
    done = plain_cli("serve", "--api-key-file", str(file))
    assert done.code == 2
    assert "--api-key-file" in done.err
    assert f"{file}{place}" in done.err
    assert problem in done.err
    assert done.err.count("\n") == 1
    assert "ses" not in done.err


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, plain_cli: Run) -> None:
    for file, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        done = plain_cli("serve", "--api-key-file", str(file))
        assert done.code == 2
        assert f"{file}: {reason}" in done.err
        assert done.err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
@pytest.mark.parametrize(
    ("mode", "is_private"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)]
)
def test_a_file_that_other_users_can_access_is_not_private(
    mode: int, is_private: bool, tmp_path: Path
) -> None:
    assert read_keys(written(tmp_path, b"one\n", mode)).is_private == is_private
