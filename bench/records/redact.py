"""What records and logs may say of the machine they were made on: not its user, and no folder of an absolute path."""

from __future__ import annotations

import getpass
import io
import re
from functools import cache
from pathlib import Path
from typing import IO

_FOLDERS = re.compile(r"(?<![\w.])(?:/[^\s/'\":,()]+)+/")


def portable(text: str) -> str:
    """Text in which absolute paths keep their last name only, and `~` stands for the home folder."""
    home, user = _own()
    text = _FOLDERS.sub(".../", text.replace(home, "/~") if home else text).replace("/~", "~")
    return user.sub(".../~", text) if user else text


@cache
def _own() -> tuple[str, re.Pattern[str] | None]:
    """The home folder (empty where it is the root of all), and the user's name as the last one of a path."""
    try:
        home, user = str(Path.home()), getpass.getuser()
    except (RuntimeError, OSError, KeyError):  # a container without a user database
        return "", None
    return home if len(home) > 1 else "", re.compile(rf"\.\.\./{re.escape(user)}\b") if user else None


class Portable(io.TextIOBase):
    """A log that is written through `portable`, a write at a time."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write the text without what is private."""
        self.file.write(portable(text))
        return len(text)

    def flush(self) -> None:
        """Pass it on."""
        self.file.flush()

    def fileno(self) -> int:
        """Of the file: for what writes past Python, such as faulthandler."""
        return self.file.fileno()
