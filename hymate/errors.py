"""Mistakes of a user, each one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a trouble the user can mend; its text is one line: what, where, how to mend it."""


class ConfigError(UserError):
    """A mistake in the configuration."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that holds anything, at most 300 characters; its type where it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)
