"""How a command ends: one line on standard error for an error, and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import typer

from .core.config import RETIRED
from .core.errors import SensibertError, Terminated, Told
from .core.launch import launched
from .core.text import printable

_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false"}
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM: the convention of shells


def run_to_exit(app: typer.Typer) -> None:
    """Run the command of this process. SystemExit with code 2 for errors of the user and of the system, and with those
    of shells where the process was stopped."""
    logging.getLogger("sensibert").addFilter(_printable_record)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer returns this code after Ctrl-C
            message = "stopped; finetune --resume continues from the last complete checkpoint, if there is one"
            _fail(message, INTERRUPTED)
        if code:
            sys.exit(code)
    except Told:
        _fail("", 2)
    except Terminated as error:
        _fail(str(error), TERMINATED)
    except (SensibertError, OSError) as error:
        _fail(str(error), 2)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Click's usage errors have an exit code and a formatted message. Anything else is a bug of ours.
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        _fail(_in_words(error), error.exit_code)


def _printable_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _in_words(error: Any) -> str:
    """The message of a usage error, with the value that came; or that the option no longer exists."""
    name = getattr(error, "option_name", "")
    if name.lstrip("-").replace("-", "_") in RETIRED:
        return f"{name} was removed: want it left out"
    details = getattr(error.__cause__, "errors", None)
    if not callable(details):
        return error.format_message()
    detail = details()[0]
    wanted = _WANTED.get(detail["type"].partition("_")[0], detail["msg"])
    return f"Invalid value for {error.param_hint or error.param.opts[0]!r}: it is {detail['input']!r}, want {wanted}"


def _fail(message: str, code: int) -> None:
    process, connected = launched(), "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    if process.local and (not connected or code == INTERRUPTED):
        message = ""  # of arguments, or of Ctrl-C: the first process of each machine has it too
    if message:  # empty after the help text
        who = f"process {process.number}: " if process.number else ""
        print(f"sensibert: error: {who}{printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    if connected:  # at a usual exit torch.distributed may wait for the others
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
