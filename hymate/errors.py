"""What a command tells its user in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a trouble the user can mend; its text is one line: what, where, how to mend it."""
