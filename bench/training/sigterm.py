"""SIGTERM, which schedulers send half a minute before SIGKILL: exit at once, or save a training first.

A training cannot be saved in the middle of a step, nor while validation has the averaged weights in the network. It
therefore defers the exit (`defer`) to points at which all of its state is consistent (`point`).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

CODE = 128 + signal.SIGTERM
_deferring = _asked = False


def stopped(number: int, frame: object) -> None:
    """Handler of SIGTERM: raises SystemExit, or in a training marks the exit for its next point."""
    global _asked
    if not _deferring:
        raise SystemExit(128 + number)
    _asked = True


def defer() -> None:
    """From now until the end of the job, SIGTERM takes effect at a `point` only. No effect outside of `job`."""
    global _deferring
    _deferring = _inside


def asked() -> bool:
    """True if SIGTERM arrived since `defer`."""
    return _asked


def point() -> None:
    """Raise SystemExit if SIGTERM arrived since `defer`."""
    if _asked:
        raise SystemExit(CODE)


_inside = False


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Context of one job and its record: a deferred exit takes place at its end."""
    global _inside, _deferring, _asked
    _inside = True
    try:
        yield
    finally:
        late, _inside, _deferring, _asked = _asked, False, False, False
    if late:  # the job finished before its next point
        raise SystemExit(CODE)
