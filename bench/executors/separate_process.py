"""A question that needs torch or opens a foreign file, answered by a child: what crashes or fills it costs one line."""

from __future__ import annotations

import contextlib
import importlib
import io
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.executors.processes import carried, context, kill, leave_the_driver, preload

MISTAKES = (ValueError, LookupError, OSError)  # a user's, told in one line


def ask(module: str, function: str, *arguments: Any) -> Any:
    """What `module.function(*arguments)` gives, or raises of MISTAKES, from a child of the fork server that the workers
    come from too. The child is no sandbox. Raises ValueError where it died, or anything else went wrong in it.
    """
    preload([])
    receiver, sender = context().Pipe(duplex=False)
    process = context().Process(target=_answer, args=(sender, module, function, arguments, str(Path.cwd()), carried()))
    process.start()
    sender.close()
    try:
        good, found = receiver.recv()
    except EOFError:
        process.join(timeout=5)
        raise ValueError(f"the process that loaded it died (exit code {process.exitcode}); is memory short?") from None
    finally:
        kill(process)
    if good:
        return found
    raise found


def _answer(sender: Connection, module: str, function: str, arguments: Any, folder: str, files: dict[str, str]) -> None:
    leave_the_driver(files)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(folder):
        try:
            answer = True, getattr(importlib.import_module(module), function)(*arguments)
        except MISTAKES as error:
            text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
            answer = False, type(error)(text) if type(error) in MISTAKES else ValueError(text)
        except Exception as error:
            answer = False, ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sender.send(answer)
