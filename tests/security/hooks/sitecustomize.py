"""Put before everything on PYTHONPATH: every process of a run notes what it opens, and may not unpickle or connect.

Pickles between the processes of multiprocessing are its own protocol and pass; so do sockets of the file system.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

_log = os.open(os.environ["SECURITY_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_NET = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
_quiet = False


def _note(kind: str, what: object) -> None:
    os.write(_log, f"{kind}\t{what}\n".encode("utf-8", "backslashreplace"))


def _own_pipe(frame: FrameType | None) -> bool:
    """Was this unpickling asked for by multiprocessing, which reads what its other end wrote?"""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("multiprocessing."):
            return True
        frame = frame.f_back
    return False


def _hook(event: str, found: tuple[Any, ...]) -> None:
    global _quiet
    if _quiet:
        return
    _quiet = True
    try:
        if event == "open" and isinstance(found[0], (str, bytes)):
            _note("open", os.path.abspath(os.fsdecode(found[0])))
        elif event == "pickle.find_class" and not _own_pipe(sys._getframe()):
            _note("unpickle", f"{found[0]}.{found[1]}")
            raise RuntimeError(f"unpickled {found[0]}.{found[1]} in a run that must not")
        elif event in _NET:
            address = found[1] if event in _NET[:3] else found[0]
            if not isinstance(address, (str, bytes)) or event in _NET[3:]:
                _note("network", f"{event} {address}")
                raise OSError(f"no network in this run: {event} {address}")
    finally:
        _quiet = False


sys.addaudithook(_hook)
_note("start", os.getpid())
