"""Console output of the command line: messages of the loggers below ``simmim``."""

from __future__ import annotations

import logging
import sys


class ConsoleHandler(logging.Handler):
    """Writes every message as a line to the current ``sys.stdout``, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def configure_logging(level: int = logging.INFO) -> None:
    """Show the messages of ``simmim`` on the console, without level or time; further calls only set the level."""
    logger = logging.getLogger("simmim")
    logger.setLevel(level)
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
