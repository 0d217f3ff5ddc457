"""Messages at level INFO that nobody has to configure anything for."""

import logging
from contextlib import contextmanager

from sensibert.core.logs import LOGGER, announce


@contextmanager
def unconfigured(monkeypatch):
    """Logging as in a program that configures nothing. pytest adds its handlers when a test begins."""
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        yield
    LOGGER.setLevel(logging.NOTSET)


def test_without_configuration_a_message_goes_to_standard_error(monkeypatch, capsys):
    with unconfigured(monkeypatch):
        announce("cut at step 4")
    assert capsys.readouterr().err == "[sensibert] cut at step 4\n"


def test_a_level_of_the_logger_turns_it_off(monkeypatch, capsys):
    with unconfigured(monkeypatch):
        LOGGER.setLevel(logging.WARNING)
        announce("cut at step 4")
    assert capsys.readouterr().err == ""


def test_a_program_that_configures_logging_decides_itself(caplog, capsys):
    announce("not at level WARNING")
    caplog.set_level(logging.INFO)
    announce("cut at step 4")
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", "cut at step 4")]
    assert capsys.readouterr().err == ""
