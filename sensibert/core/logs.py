"""Messages at level INFO that people should see without configuring anything."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

LOGGER = logging.getLogger("sensibert")


def announce(text: str) -> None:
    """Log at level INFO. Where nothing configures logging, write to standard error.

    Python writes warnings there when no logger has a handler; this does the same for one message at level INFO. Set a
    level on the logger `sensibert`, or configure the root logger, and these decide instead."""
    if LOGGER.hasHandlers() or LOGGER.level != logging.NOTSET or logging.root.level != logging.WARNING:
        LOGGER.info(text)
    elif LOGGER.manager.disable < logging.INFO:
        tqdm.write(f"[sensibert] {text}", file=sys.stderr)  # above a Trainer's progress bar, if there is one
