"""The command line: `steer COMMAND`. Each command is a typed function, see recipes/commands.py."""

import os
import sys
from collections.abc import Sequence

from recipes.arguments import function_of, further_help, parse, parser
from recipes.commands import COMMANDS, GROUPS
from recipes.faults import explained, place
from recipes.terminal import UnheardError, say
from steer.names import reason

__all__ = ["main"]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: steer COMMAND [--help] [options]"]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        lines += [
            f"  {name:<{width}}  {c.line}" for name, c in COMMANDS.items() if c.group == group
        ]
    return "\n".join([*lines, "", "steer COMMAND --help: its options, and two examples"])


def _help(command: str) -> str:
    examples = "".join(f"\n  steer {example}" for example in COMMANDS[command].examples)
    return f"{parser(command).format_help()}{further_help(command)}\nexamples:{examples}"


def _run(command: str, rest: Sequence[str]) -> None:
    if command == "--version":
        import steer

        say(f"flowsteer {steer.__version__}")
        return
    command, settings = parse(command, rest)
    if settings is None:
        say(_help(command))
    else:
        function_of(command)(**settings)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of use are one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        if not argv or argv[0] in {"-h", "--help"}:
            say(_usage())
            return 0 if argv else 2
        _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130
    except SystemExit as stop:
        where = place(stop)
        if where is None:
            raise
        return _fail(f"a file of yours ended the program ({where})")
    except (UnheardError, BrokenPipeError) as error:
        _deaf()
        print(
            f"error: standard output was closed or is full ({reason(error)}): what the command "
            "wrote to files is whole, what it had to say is lost",
            file=sys.stderr,
        )
        return 141
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str) -> int:
    if os.environ.get("STEER_TRACEBACK"):
        raise
    print(f"error: {message}", file=sys.stderr)
    return 2


def _deaf() -> None:
    """Send what is still to be written nowhere: Python would complain of it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
