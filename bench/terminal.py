"""What commands print: harmless, as no text of a record, a spec or a plug-in steers the terminal; wrapped; in words."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, TextIO

_ODD = re.compile(r"[^\n\t\x20-\x7e]")


def printable(text: str) -> str:
    """Text with a blank for each character that is invisible, moves a cursor or changes the direction of text."""
    return "".join(c if c.isprintable() else " " for c in text)


def plain(text: str) -> str:
    """One printable line for a terminal."""
    return printable(text).rstrip()


def counted(count: float, noun: str) -> str:
    """`1 job`, `2 jobs`, `0 past records`, `2 passes`, `3 queries`."""
    if count != 1:
        es = noun.endswith(("s", "x", "tch", "sh"))
        noun = re.sub(r"(?<=[^aeiou])y$", "ie", noun) + ("es" if es else "s")
    return f"{count:.10g} {noun}"


def columns(stream: TextIO | None = None) -> int | None:
    """Width of the terminal; None where the stream (default: stdout) is none, whose lines stay whole."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def wrapped(line: str, width: int | None) -> str:
    """The line broken between words at `width` columns, unless that is None.

    The further lines are indented as far as what follows the first gap (`data      digits`), or else by 2 more.
    """
    if width is None or len(line) <= width:
        return line
    first = re.match(r" *\S+(?: \S+)? {2,}", line) or re.match(r" *", line)
    assert first is not None
    hang = first.end() if first[0].strip() and first.end() <= width // 2 else len(line) - len(line.lstrip()) + 2
    return textwrap.fill(
        line, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False, drop_whitespace=True,
    )  # fmt: skip


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line for a person (default: on stdout), wrapped on a terminal."""
    print("\n".join(wrapped(part, columns(stream)) for part in line.split("\n")), file=stream, flush=True)


class Screen:
    """A text stream that takes everything and passes on what can be printed, line breaks and tabs.

    Rich asks for `rich_proxied_file` and writes there, since its own control sequences are meant; whoever hands text
    to rich makes it plain first.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write the text, blanks in place of what is not printable."""
        self.rich_proxied_file.write(_ODD.sub(_shown, text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def _shown(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else " "


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Both streams of this process are screens while this holds.

    Characters that the encoding of a stream lacks are replaced, so that a command which has done its work does not end
    with an error. A stream that was closed before the start takes everything and shows nothing.
    """
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            sys.stdout, sys.stderr = (Screen(_lenient(stream or nowhere)) for stream in streams)  # type: ignore[assignment]
            yield
        finally:
            sys.stdout, sys.stderr = streams


def _lenient(stream: TextIO) -> TextIO:
    """The stream, whose handler of encoding errors no longer raises."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
    return stream
