"""The one exception that the command line turns into a sentence instead of a traceback."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something that a user can mend: the message names the file, the field and the thing to do."""
