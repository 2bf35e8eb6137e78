"""SIGINT, SIGTERM and SIGHUP: exit at once, or write a checkpoint first.

Schedulers send SIGTERM half a minute before SIGKILL; SIGHUP tells that the terminal was closed. In the middle of a
step, or while validation has the averaged weights in the network, the state of a training is not consistent. A training
therefore defers the exit (`defer`) to points where it is (`point`).
"""

import contextlib
import signal
from collections.abc import Iterator
from signal import Signals
from typing import NoReturn

STOPS = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP)
_in_job = _deferring = _in_rounds = _insisted = False
_requested: int | None = None  # the signal that waits for a point


def listen() -> None:
    """Handle the three signals from now on, but for those that the process was started deaf to (nohup, a shell's &)."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def handle(number: int, frame: object) -> None:
    """Handler of the three signals: they take effect at once, in a training or in `rounds` at the next `point`."""
    global _requested, _insisted
    _insisted = _in_rounds and _requested is not None
    if (_deferring and number != signal.SIGINT) or (_in_rounds and _requested is None):
        _requested = number
    else:
        _take_effect(number)


def _take_effect(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def defer() -> None:
    """From now until the end of the job, SIGTERM takes effect at a `point` only. No effect outside of `job`."""
    global _deferring
    _deferring = _in_job


def point() -> None:
    """Raise KeyboardInterrupt or SystemExit if a signal waits for it."""
    if _requested is not None:
        _take_effect(_requested)


def insisted() -> bool:
    """Did a second signal arrive before the first took effect in `rounds`?"""
    return _insisted


@contextlib.contextmanager
def rounds() -> Iterator[None]:
    """Context of a loop that calls `point` in each round: a first signal takes effect there only, a second at once.

    An exception that a signal raises anywhere else may be lost: Python drops it within a finalizer or the callback of a
    weak reference (every import has one), and half a request to the fork server ends that server.
    """
    global _in_rounds, _requested
    _in_rounds = True
    try:
        yield
    finally:
        _in_rounds, _requested = False, None


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Context of one job and its record: a deferred exit takes place at its end."""
    global _in_job, _deferring, _requested
    _in_job = True
    try:
        yield
    finally:
        late, _in_job, _deferring, _requested = _requested, False, False, None
    if late is not None:  # the job finished before its next point
        _take_effect(late)
