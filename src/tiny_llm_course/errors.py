"""The error of the course's commands. Its message says what is wrong and how to fix it."""


class CourseError(Exception):
    """A command cannot do its work, and has changed nothing."""
