"""What a learner or a maintainer can set right: one message, which says how."""


class CourseError(Exception):
    """The command cannot do what it was asked to; nothing was changed."""
