"""Every command speaks to programs too, as the README says."""

from collections.abc import Iterator

import click

from kassa.cli.main import program


def commands(command: click.Command, name: str = "kassa") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for part in command.list_commands(context):
        found = command.get_command(context, part)
        assert found is not None
        yield from commands(found, f"{name} {part}")


def test_every_command_takes_json() -> None:
    found = dict(commands(program))

    assert len(found) > 30
    assert [name for name, command in found.items() if not any("--json" in one.opts for one in command.params)] == []
