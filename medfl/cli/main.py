"""The `medfl` command. One file per user beside this one; errors are one line and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from medfl.errors import ConfigError, MedflError
from medfl.files import FULL

Command = Callable[[Sequence[str]], None]
USAGE = 2
GROUPS = {
    "On one machine": ("prepare", "simulate", "synthesize", "share"),
    "With a finished run": ("finetune", "evaluate", "transfer", "report", "compare", "export", "audit"),
    "Among real sites": ("study", "site", "bundle"),
}


def commands() -> dict[str, Command]:
    """Name → command; a command's help is its docstring."""
    from medfl.cli import audit, bundle, compare, exports, prepare, research, site, study, synthetic

    return {
        "prepare": prepare.prepare,
        "simulate": research.simulate,
        "synthesize": synthetic.synthesize,
        "share": synthetic.share,
        "finetune": research.finetune,
        "evaluate": research.evaluate,
        "transfer": research.transfer,
        "report": research.report,
        "compare": compare.compare,
        "export": exports.export,
        "audit": audit.audit,
        "study": study.study,
        "site": site.site,
        "bundle": bundle.bundle,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (README, "Exit codes")."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    known = commands()
    if not words or words[0] in ("help", "-h", "--help"):
        _print_help(known)
        return 0 if words else USAGE
    if words[0] not in known:
        print(
            f"medfl: unknown command {words[0]!r}. Commands: {', '.join(known)}. Try: medfl --help",
            file=sys.stderr,
        )
        return USAGE
    try:
        known[words[0]](words[1:])
    except MedflError as error:
        print(f"medfl {words[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"medfl {words[0]}: the disk is full: {error}. Free space and add resume=true.", file=sys.stderr)
        return 30
    except KeyboardInterrupt:
        again = "" if words[0] == "prepare" else " and resume=true"
        print(f"\nmedfl {words[0]}: stopped. Go on with the same command{again}.", file=sys.stderr)
        return 130
    return 0


def asks_help(command: Command, words: Sequence[str]) -> bool:
    """Print the command's docstring if the words ask for it."""
    if not {"-h", "--help"} & set(words):
        return False
    print((command.__doc__ or "").replace("\n    ", "\n"))
    return True


def run_argument(name: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """The run folder and the overrides of `medfl <name> RUN [key=value ...]`."""
    if not words or "=" in words[0] or words[0].startswith("-"):
        raise ConfigError(f"got no run folder. Usage: medfl {name} RUN [key=value ...]")
    return words[0], list(words[1:])


def _print_help(known: dict[str, Command]) -> None:
    print("medfl: federated self-supervised pretraining for medical images")
    for users, names in GROUPS.items():
        print(f"\n{users}")
        for name in names:
            print(f"  medfl {name:10} {(known[name].__doc__ or '').splitlines()[0]}")
    print("\nOne command's options: medfl COMMAND --help")


if __name__ == "__main__":
    sys.exit(main())
