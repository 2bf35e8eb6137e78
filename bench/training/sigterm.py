"""SIGTERM, as schedulers send it half a minute before SIGKILL: leave at once, or first save what is under way.

A training cannot be saved in the middle of a step, nor while validation has the averaged weights in the net. So it asks
for the exception to wait (`defer`), and leaves at points of its own (`point`), where all of its state is consistent.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

CODE = 128 + signal.SIGTERM
_deferring = _asked = False


def stopped(number: int, frame: object) -> None:
    """Handler of SIGTERM: raises SystemExit, where a training is under way at its next point."""
    global _asked
    if not _deferring:
        raise SystemExit(128 + number)
    _asked = True


def defer() -> None:
    """From now on until the job is over, SIGTERM only counts at a `point`. Without effect outside of `job`."""
    global _deferring
    _deferring = _inside


def asked() -> bool:
    """Has SIGTERM come since `defer`?"""
    return _asked


def point() -> None:
    """Leave here, if asked to. Raises SystemExit."""
    if _asked:
        raise SystemExit(CODE)


_inside = False


@contextlib.contextmanager
def job() -> Iterator[None]:
    """A job with its record: what was deferred within ends with it, and is made good then."""
    global _inside, _deferring, _asked
    _inside = True
    try:
        yield
    finally:
        late, _inside, _deferring, _asked = _asked, False, False, False
    if late:  # the job was all but over, and is done
        raise SystemExit(CODE)
