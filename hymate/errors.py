"""Mistakes of a user, each one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a trouble the user can mend; its text is one line: what, where, how to mend it."""


class ConfigError(UserError):
    """A mistake in the configuration."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that holds anything, at most 300 characters; its type where it has none.

    A ? stands for each character that a terminal cannot show: libraries quote what they find in files.
    """
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    line = next((line[:300] for line in lines if line), type(error).__name__)
    return "".join(character if character.isprintable() else "?" for character in line)
