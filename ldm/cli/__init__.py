"""The command line: `ldm COMMAND`, one file a command, each with `add(commands)` and `run(args)`.

What is wrong with what was given is said in one line, with exit status 1 (2 where the command line itself is wrong, 130 after
Ctrl-C, 143 after SIGTERM); `--debug` shows where it came from. Nothing heavy is imported until a command runs.
"""

import argparse
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from ldm.cli import (
    diff,
    duplicates,
    emissions,
    encode,
    evaluate,
    inspect,
    make,
    plan,
    precision,
    replay,
    schedule,
    serve,
    trace,
    train,
    verify,
)

COMMANDS = (
    make,
    serve,
    replay,
    inspect,
    schedule,
    train,
    encode,
    plan,
    emissions,
    evaluate,
    duplicates,
    trace,
    diff,
    precision,
    verify,
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="surrogateescape")  # a folder's name need not be text
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; what a user should know is in our own lines
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = parser().parse_args(arguments)
    args.stops = stops = []

    def stop(number: int, _: Any) -> None:
        """Leave through every `finally`, so that no partial file stays. Python drops an exception that is raised while an
        object is taken down, so who works in a long loop looks at `stops` too."""
        stops.append(number)
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        status = args.run(args) or 0
        print(end="", flush=True)
        return status
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted")
        return 128 + (stops or [signal.SIGINT])[0]
    except BrokenPipeError:  # whoever read our output has left; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug or not _expected(error):
            raise
        _say(" ".join(str(error).split()) or type(error).__name__)
        return 1
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def parser() -> argparse.ArgumentParser:
    """All commands."""
    import ldm

    about = "Latent diffusion: pictures from prompts, over any Stable Diffusion v1 checkpoint."
    top = _Parser(prog="ldm", description=about, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return top


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, and where to look."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: ") and not message.partition(": ")[2].startswith("-"):
            message += "; a prompt of several words stands in quotes"
        help_of = self.prog if self.prog != "ldm" else "ldm COMMAND"
        self.exit(2, f"{self.prog}: {message}; see {help_of} --help\n")


def _expected(error: Exception) -> bool:
    """Errors that tell of the input or of the machine. A RuntimeError tells of memory, or it is a fault of ours."""
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in ("memory", "allocate", "CUDA"))


def _say(text: str) -> None:
    print(f"ldm: {text}", file=sys.stderr)
