"""Numbers of bytes as messages and tables show them."""

import pytest

from tiny_llm_checkpoints.sizes import shown_apart, shown_bytes


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


@pytest.mark.parametrize(
    ("sizes", "texts"),
    [
        ((12_287, 12_288), ["12,287 bytes", "12,288 bytes"]),  # both are 12 KiB when rounded
        ((2**30, 2**30 - 1, 8192), ["1,073,741,824 bytes", "1,073,741,823 bytes", "8,192 bytes"]),
        ((8191, 8192), ["8,191 bytes", "8 KiB"]),
        ((12_288, 12_288), ["12 KiB", "12 KiB"]),
        ((1, 2**30), ["1 byte", "1 GiB"]),
    ],
)
def test_different_sizes_never_look_the_same(sizes: tuple[int, ...], texts: list[str]) -> None:
    assert shown_apart(*sizes) == texts
