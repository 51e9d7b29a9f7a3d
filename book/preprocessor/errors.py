"""The error that stops a build of the book."""


class BookError(Exception):
    """A chapter asks for something that does not exist; the message names it and what exists."""
