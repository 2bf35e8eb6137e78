"""Removes the user's name and the folders of absolute paths from records and logs."""

from __future__ import annotations

import getpass
import io
import re
from functools import cache
from pathlib import Path
from typing import IO

_FOLDERS = re.compile(r"(?<![\w.])(?:/[^\s/'\":,()]+)+/")


def redacted(text: str) -> str:
    """The text with absolute paths shortened to their last name, and with `~` for the home folder.

    A byte of a file name that is not UTF-8 is written as an escape sequence: JSON cannot hold it.
    """
    text = text.encode(errors="backslashreplace").decode()
    home, user = _home_and_user()
    text = _FOLDERS.sub(".../", text.replace(home, "/~") if home else text).replace("/~", "~")
    return user.sub(".../~", text) if user else text


@cache
def _home_and_user() -> tuple[str, re.Pattern[str] | None]:
    """The home folder (empty if it is the root), and a pattern of the user's name as the last part of a path."""
    try:
        home, user = str(Path.home()), getpass.getuser()
    except (RuntimeError, OSError, KeyError):  # a container without a user database
        return "", None
    return home if len(home) > 1 else "", re.compile(rf"\.\.\./{re.escape(user)}\b") if user else None


class RedactedLog(io.TextIOBase):
    """A log file; each write passes through `redacted`."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write the redacted text."""
        self.file.write(redacted(text))
        return len(text)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def fileno(self) -> int:
        """Descriptor of the file, for code that writes past Python, such as faulthandler."""
        return self.file.fileno()
