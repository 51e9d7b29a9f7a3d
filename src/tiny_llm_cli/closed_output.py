"""Standard output that the caller of a command has closed."""

import errno
import io


class ClosedOutput(io.TextIOBase):
    """A stream that refuses every write. Python's own None would drop what a command prints."""

    def write(self, text: str, /) -> int:
        """Raise OSError, even for an empty text."""
        raise OSError(errno.EBADF, "standard output is closed: nothing receives the results")
