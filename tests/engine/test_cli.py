"""Exit statuses and one-line errors of commands."""

from __future__ import annotations

import argparse
import errno
import pickle

import pytest

from ldgan.engine import cli


def failing_with(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (cli.UserError("data: not there; make it"), 2, "error: data: not there; make it\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.tar"), 2, "error: the disk is full (x.tar)"),
    ],
)
def test_errors_are_one_line_and_have_their_status(error, status, line, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(failing_with(error))
    printed = capsys.readouterr().err
    assert stopped.value.code == status
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_success_is_status_0_and_silent(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: None)
    assert stopped.value.code == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "Input/output error")])
def test_what_nobody_expected_keeps_its_traceback(error) -> None:
    with pytest.raises(type(error)):
        cli.run(failing_with(error))


def test_positive_numbers() -> None:
    assert cli.positive("12") == 12
    for text in ("0", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not at least 1"):
            cli.positive(text)


def test_a_message_without_end_is_cut() -> None:
    assert str(cli.UserError("x" * 10**6)) == "x" * 5000 + "..."


def test_an_installed_script_exits_as_the_file_does(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.command(failing_with(cli.UserError("data: not there; make it")))()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data: not there; make it\n"


def test_a_parameter_is_named_as_in_python_and_as_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    error = cli.UserError("no such class\n'{cow}'", parameter="num_images")
    for same in (error, pickle.loads(pickle.dumps(error))):  # as it comes back from a worker
        assert str(same) == "num_images: no such class '{cow}'"
        assert same.as_of_command() == "--num-images: no such class '{cow}'"
    assert str(cli.UserError("plain")) == cli.UserError("plain").as_of_command() == "plain"
    with pytest.raises(SystemExit, match="2"):
        cli.run(failing_with(error))
    assert capsys.readouterr().err == "error: --num-images: no such class '{cow}'\n"
