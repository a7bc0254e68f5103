"""Console output: messages of ``simmim`` go to the current stdout once, and only if logging is configured."""

from __future__ import annotations

import logging

import pytest

from simmim.training.console import ConsoleHandler, configure_logging
from simmim.training.run_log import RunLog


def test_repeated_calls_do_not_duplicate_messages(tmp_path, capsys):
    for _ in range(3):
        configure_logging()
    RunLog(tmp_path, is_main=True).info("one line")
    RunLog(tmp_path, is_main=True).warning("one more")
    RunLog(tmp_path, is_main=False).info("of another process")
    assert capsys.readouterr().out == "one line\nwarning: one more\n"


@pytest.fixture
def unconfigured():
    logger = logging.getLogger("simmim")
    level, handlers = logger.level, logger.handlers[:]
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_the_library_prints_nothing_by_itself(unconfigured, tmp_path, capsys):
    RunLog(tmp_path, is_main=True).info("one line")
    assert capsys.readouterr().out == ""


def test_the_command_line_configures_logging(unconfigured, capsys):
    from simmim.cli.main import main

    assert main(["show"]) == 0
    assert "demo" in capsys.readouterr().out
    assert [type(handler) for handler in logging.getLogger("simmim").handlers] == [ConsoleHandler]
