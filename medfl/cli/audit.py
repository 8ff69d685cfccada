"""The command that attacks a finished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medfl.cli.main import asks_help, run_argument
from medfl.errors import ConfigError, PrivacyError
from medfl.run_folder import RunFolder

USAGE = "medfl audit privacy RUN [canaries=1000] [seed=0]"


def audit(words: Sequence[str]) -> None:
    """What an attacker finds of single patients in a simulated run: medfl audit privacy RUN.

    medfl audit privacy RUN                  attack the site with the fewest patients, and write RUN/audit.json
    medfl audit privacy RUN canaries=4000    more of them find more; the default is 1000
    medfl audit privacy RUN seed=1           other coins and other images

    Canaries give a lower bound on ε beside the claimed upper one (privacy=patient or group); then membership of the
    training images, and images from an update. The report shows it from then on: medfl report RUN.
    """
    if asks_help(audit, words):
        return
    if words[:1] != ["privacy"]:
        raise ConfigError(f"usage: {USAGE}")
    run, rest = run_argument("audit privacy", words[1:])
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    if len(options) < len(rest) or options.keys() - {"canaries", "seed"}:
        raise ConfigError(f"usage: {USAGE}")
    numbers = {
        name: _whole(name, options.get(name, default)) for name, default in {"canaries": "1000", "seed": "0"}.items()
    }
    from medfl.audit.run import FILE
    from medfl.audit.run import audit as attack
    from medfl.report.page import write

    folder = RunFolder.open(Path(run))
    found = attack(folder, canaries=numbers["canaries"], seed=numbers["seed"], say=lambda text: print(f"... {text}"))
    print("\n".join(told(found)))
    write(folder.path)
    print(f"wrote {folder.path / FILE}, and report.html with it")
    if broken := [*found.get("ledger", []), *_broken(found)]:
        raise PrivacyError(" ".join(broken))


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or (name == "canaries" and not 100 <= int(text) <= 100_000):
        raise ConfigError(f"{name}: got {text!r}, need a whole number{', 100 to 100000' * (name == 'canaries')}.")
    return int(text)


def _broken(found: dict[str, Any]) -> list[str]:
    part = found.get("canaries")
    if not part or part["held"]:
        return []
    return [
        f"the canaries refute the claim: ε is at least {part['epsilon']:.2f}, and {part['claim']:.2f} is claimed. Do "
        "not release this model; report the bug."
    ]


def told(found: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    lines = [f"site {found['site']}, {found['patients']} training patients"]
    if part := found.get("canaries"):
        lines.append(
            f"canaries: ε of a {part['unit']} is at least {part['epsilon']:.2f} (95 %, {part['right']} of "
            f"{part['guesses']} guesses right), claimed at most {part['claim']:.2f} for these steps at "
            f"δ={part['delta']:.1e}"
        )
    else:
        lines.append("canaries: none, as the study has no differential privacy to hold to a figure")
    for name, one in found["membership"].items():
        lines.append(
            f"membership by {name}: AUC {one['auc']:.3f} (0.5: nothing), {one['found']:.1%} found at 1 % false alarms"
        )
    for name, one in found.get("inversion", {}).items():
        if isinstance(one, dict):
            lines.append(
                f"image from {name.replace('_', ' ')}: SSIM {one['ssim']:.3f}, a guess without it {one['prior']:.3f}"
            )
    return lines
