"""The command that makes a run's encoder usable elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from medfl.cli.main import asks_help, run_argument
from medfl.errors import ConfigError, one_of
from medfl.run_folder import RunFolder

USAGE = "medfl export RUN to=FOLDER [arm=federated] [formats=[safetensors,bundle,onnx]] [--verify]"
DEFAULT = "[safetensors,bundle]"


def export(words: Sequence[str]) -> None:
    """Write a run's encoder for use elsewhere: medfl export RUN to=FOLDER [--verify].

    medfl export RUN to=FOLDER                     safetensors, a MONAI bundle without code, and a model card
    medfl export RUN to=FOLDER formats=[onnx]      any of safetensors, bundle, onnx; ONNX needs medfl[export]
    medfl export RUN to=FOLDER arm=local:site-1    random | federated | central | local:SITE, or a fine-tuned one
    medfl export RUN to=FOLDER --verify            load every format again and compare its features

    Of a fine-tuned arm, such as federated_finetune:federated:1, the encoder is written; its head stays in the run.
    """
    if asks_help(export, words):
        return
    from medfl.exports import folder as exported
    from medfl.exports import onnx
    from medfl.exports.verify import FILES

    run, rest = run_argument("export", words)
    flags, options = [w for w in rest if "=" not in w], dict(w.split("=", 1) for w in rest if "=" in w)
    if "to" not in options or options.keys() - {"to", "arm", "formats"} or set(flags) - {"verify", "--verify"}:
        raise ConfigError(f"usage: {USAGE}")
    asked = [name.strip() for name in options.get("formats", DEFAULT).strip("[]").split(",")]
    for name in asked:
        one_of("formats", name, FILES)
    formats = [name for name in FILES if name in asked]
    if "onnx" in formats:
        onnx.require(onnx.WRITING + onnx.RUNNING * bool(flags))
    folder, arm, target = RunFolder.open(Path(run)), options.get("arm", "federated"), Path(options["to"])
    shape, width = exported.write(folder, arm, target, formats)
    print(f"wrote {target}/: {', '.join((*(FILES[name] for name in formats), exported.CARD))}")
    print(f"{list(shape)} image → {width} features")
    if flags:
        apart = exported.check(folder, arm, target, formats)
        listed = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        print(f"verified: largest difference of a feature from the run's encoder, over random images: {listed}")
    print(f"how to load it: {target / exported.CARD}")
