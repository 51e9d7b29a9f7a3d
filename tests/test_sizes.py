"""Numbers of bytes as messages and tables show them."""

import pytest

from tiny_llm_checkpoints.sizes import shown_bytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (1, "1 byte"),
        (8191, "8,191 bytes"),
        (8192, "8 KiB"),
        (15 * 1024 + 512, "15.5 KiB"),
        (1_000_000, "977 KiB"),
        (2**20 - 1, "1 MiB"),
        (512 * 2**20, "512 MiB"),
        (25_276_502_016, "23.5 GiB"),
        (368_639_999_631_360, "335 TiB"),
        (2**62, "4,096 PiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_they_fill(nbytes: int, text: str) -> None:
    assert shown_bytes(nbytes) == text
