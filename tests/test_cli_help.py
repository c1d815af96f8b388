"""Every command explains itself: summary, example that could be typed, and help for each option and argument."""

import os
import re

import pytest
import ready

from dinov2cli.cli.main import TREE
from dinov2cli.cli.tree import Command

COMMANDS = [command for command in TREE.walk() if len(command.path) > 1]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.path[1:]))


@every_command
def test_help_opens_with_a_sentence_and_ends_with_an_example(command: Command) -> None:
    assert re.match(r"[A-Z].*[.!?]", command.summary), f"no summary: {command.summary!r}"
    description, found, example = command.help.partition("Example:")
    assert found, "no 'Example:' block"
    assert description.strip()
    assert "dino2 " in example


@every_command
def test_every_parameter_has_help(command: Command) -> None:
    for parameter in command.parameters:
        name = "/".join(parameter.flags) or "argument"
        assert len(parameter.help) > 5, f"{' '.join(command.path)}: {name} has no help"


@every_command
def test_help_can_be_printed(command: Command) -> None:
    result = ready.dino2(*command.path[1:], "--help", env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for option in command.options:
        assert option.flags[0] in result.stdout, option.flags
