"""SIGTERM, which schedulers send half a minute before SIGKILL: exit at once, or write a checkpoint first.

In the middle of a step, or while validation has the averaged weights in the network, the state of a training is not
consistent. A training therefore defers the exit (`defer`) to points where it is (`point`).
"""

import contextlib
import signal
from collections.abc import Iterator

CODE = 128 + signal.SIGTERM
_in_job = _deferring = _requested = False


def handle(number: int, frame: object) -> None:
    """Handler of SIGTERM: raises SystemExit, in a training at its next `point`."""
    global _requested
    if not _deferring:
        raise SystemExit(128 + number)
    _requested = True


def defer() -> None:
    """From now until the end of the job, SIGTERM takes effect at a `point` only. No effect outside of `job`."""
    global _deferring
    _deferring = _in_job


def point() -> None:
    """Raise SystemExit if SIGTERM arrived since `defer`."""
    if _requested:
        raise SystemExit(CODE)


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Context of one job and its record: a deferred exit takes place at its end."""
    global _in_job, _deferring, _requested
    _in_job = True
    try:
        yield
    finally:
        late, _in_job, _deferring, _requested = _requested, False, False, False
    if late:  # the job finished before its next point
        raise SystemExit(CODE)
