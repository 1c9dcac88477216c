"""The program `kassa`. One file per group of commands; each is imported when it is used, so that `kassa --help` is quick."""

import importlib
import sys
from typing import Any, cast

import click

from kassa.errors import BrokerUnreachable, DatabaseUnreachable, KassaError, ServerUnreachable

EXIT_REFUSED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("kassa.cli.up", "Everything in one place: database, API, workers, sandboxes."),
    "demo": ("kassa.cli.demo", "A short tour on a temporary directory, each claim checked."),
    "serve": ("kassa.cli.serve", "The API, for production."),
    "worker": ("kassa.cli.serve", "The workers, for production."),
    "migrate": ("kassa.cli.serve", "Bring the database up to this program."),
    "doctor": ("kassa.cli.doctor", "Check a set-up and say what to do."),
    "sandbox": ("kassa.cli.sandbox", "One provider's sandbox on its own."),
    "merchant": ("kassa.cli.merchant", "Merchants and their policies."),
    "channel": ("kassa.cli.merchant", "A merchant's accounts at channels."),
    "key": ("kassa.cli.merchant", "A merchant's API keys."),
    "payment": ("kassa.cli.payment", "The whole story of one payment."),
    "ledger": ("kassa.cli.ledger", "Balances, statements, and proof."),
    "queue": ("kassa.cli.queue", "Queues and dead letters."),
    "bench": ("kassa.cli.bench", "Which queue to choose: measures brokers, writes a page."),
    "simulate": ("kassa.cli.simulate", "Whole life cycles with a virtual clock and seeded faults."),
}
"""Each command: the module that has it under its own name, and what `kassa --help` says."""

_UNREACHABLE = (DatabaseUnreachable, BrokerUnreachable, ServerUnreachable)


class Program(click.Group):
    """Finds commands in COMMANDS and imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        return cast(click.Command, getattr(module, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kassa")
def program() -> None:
    """Kassa takes, refunds and tops up money, and books every minor unit of it.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 something it needs cannot be reached.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Runs the program and ends the process with its exit code."""
    try:
        program.main(args=arguments, prog_name="kassa", standalone_mode=False)
    except click.UsageError as error:
        error.show(sys.stderr)
        sys.exit(EXIT_USAGE)
    except click.Abort:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except click.ClickException as error:
        error.show(sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KassaError as error:
        print(told(error), file=sys.stderr)
        sys.exit(EXIT_UNREACHABLE if isinstance(error, _UNREACHABLE) else EXIT_REFUSED)
    except BrokenPipeError:
        # Whoever read our output (`| head`) has enough. Python would complain once more when it flushes at the end.
        sys.stdout = None
        sys.exit(EXIT_REFUSED)


def told(error: KassaError) -> str:
    """An error as a person reads it: what, and the names that belong to it."""
    facts = [f"{name}={value}" for name, value in error.facts.items() if name != "errors" and value is not None]
    return f"kassa: {error.detail}" + (f" ({', '.join(facts)})" if facts else "") + f" [{error.code}]"


if __name__ == "__main__":
    main()
