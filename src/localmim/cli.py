"""What every command shares: exit codes, one line for a user's mistake, quiet shutdown.

0: done. 2: a wrong argument, config, file or folder. 1: anything else. 3: another process of the same job failed.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from localmim.errors import PeerError, RunError, UserError


def run(main: Callable[[list[str]], object], argv: list[str] | None = None) -> int:
    """Calls `main(argv)` and turns what happened into an exit code; errors of the user are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what is no letter
    try:
        main(sys.argv[1:] if argv is None else argv)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PeerError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except RunError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        return 1
    finally:
        gc.collect()  # MindSpore's cells complain when they are freed at interpreter exit


def commands(prog: str, description: str) -> tuple[ArgumentParser, Callable[..., ArgumentParser]]:
    """A parser with sub-commands, and a function (name, help) that adds one and returns its parser."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    group = parser.add_subcommands(dest="command")

    def add(name: str, help: str) -> ArgumentParser:
        command = ArgumentParser(description=help, exit_on_error=False)
        group.add_subcommand(name, command, help=help)
        return command

    return parser, add


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parsed arguments; what is wrong with them becomes one line (UserError)."""
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
