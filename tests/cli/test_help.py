"""Help texts fit a screen and list every option."""

import pytest
from typer.testing import CliRunner

from ftdata.cli import app

COMMANDS = [
    (),
    *((command.name or command.callback.__name__,) for command in app.registered_commands),
    *(("templates", name) for name in ("list", "show", "check")),
    *(("config", name) for name in ("import", "schema")),
    ("templates",),
    ("config",),
    ("cache",),
]


def show(*arguments):
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_a_screen(command):
    lines = show(*command, "--help").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", ["build", "preview", "audit"])
def test_short_help_names_the_options_that_the_complete_help_describes(command):
    short, complete = show(command, "--help"), show(command, "--help-all")
    options = {line.split()[0] for line in complete.splitlines() if line.startswith("  --")}
    assert options <= set(short.split())
    assert "More options" in short
    assert "Rows and masks:" in complete
    assert "More options" not in complete


def test_help_states_defaults_and_lists_commands():
    assert "(default: assistant)" in show("build", "--help")
    assert "preview    Show rows" in show("--help")
    assert "--help-all" not in show("verify", "--help")
