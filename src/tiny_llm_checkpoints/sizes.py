"""Numbers of bytes as people read them."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def shown_bytes(nbytes: int) -> str:
    """A number of bytes in the largest unit of 1024 that it fills, to three digits or more.

    >>> shown_bytes(512), shown_bytes(536_870_912), shown_bytes(25_276_502_016)
    ('512 bytes', '512 MiB', '23.5 GiB')
    """
    value, unit = float(nbytes), 0
    while round(value, 2) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 else max(0, 3 - len(str(int(value))))
    text = f"{value:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {_UNITS[unit]}"
