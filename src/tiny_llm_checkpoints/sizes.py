"""Shows counts and numbers of bytes in a form that is easy to read."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_EXACT = 10 * 1024


def shown_bytes(nbytes: int) -> str:
    """A number of bytes in the largest unit (KiB, MiB, ...) that it fills, rounded to three digits or more.

    Below 10 KiB, a number that is not a whole number of KiB is shown in bytes, because an error of a few
    bytes must be visible.

    >>> shown_bytes(8191), shown_bytes(536_870_912), shown_bytes(25_276_502_016)
    ('8,191 bytes', '512 MiB', '23.5 GiB')
    """
    if nbytes < _EXACT and nbytes % 1024:
        return f"{nbytes:,} byte{'s' if nbytes > 1 else ''}"
    value, unit = float(nbytes), 0
    while round(value, 2) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 else max(0, 3 - len(str(int(value))))
    text = f"{value:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {_UNITS[unit]}"


def shown_apart(*sizes: int) -> list[str]:
    """Numbers of bytes that a message compares: exact if two different ones would look the same if rounded.

    >>> shown_apart(2**30, 2**30 + 1)
    ['1,073,741,824 bytes', '1,073,741,825 bytes']
    >>> shown_apart(8192, 2**30)
    ['8 KiB', '1 GiB']
    """
    texts = [shown_bytes(size) for size in sizes]
    if len(set(texts)) == len(set(sizes)):
        return texts
    return [f"{size:,} byte{'' if size == 1 else 's'}" for size in sizes]


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "prompt token"), counted(2, "prompt token")
    ('1 prompt token', '2 prompt tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
