"""The folder that `medfl export` writes: the chosen formats of one encoder, and its model card."""

from collections.abc import Sequence
from pathlib import Path

from medfl.errors import ConfigError
from medfl.export import WEIGHTS, copy_encoder, image_shape, load_encoder, read_facts
from medfl.exports import bundle, card, onnx
from medfl.exports.verify import FILES, verify
from medfl.files import write_bytes
from medfl.report.tables import read_run
from medfl.run_folder import RunFolder

CARD = "model_card.md"
PLACES = {"safetensors": "this folder", "bundle": "its own folder", "onnx": "this folder (images: a NumPy array)"}
USES = {  # format -> how to load it, from the folder itself
    "safetensors": """from pathlib import Path; from medfl.export import load_encoder
encoder = load_encoder(Path("."))
features = encoder(images)""",
    "bundle": bundle.USE,
    "onnx": f"""import onnxruntime
session = onnxruntime.InferenceSession("{onnx.FILE}")
features = session.run(["features"], {{"image": images}})[0]""",
}


def write(folder: RunFolder, arm: str, target: Path, formats: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Write the formats and the card; returns (C, *S) of an image and its number of features.

    ONNX comes first: if it fails, nothing has been written.

    Raises:
        ConfigError: the arm is not there, the folder holds an export, or the encoder has no ONNX form.
        DataError: the run's own files do not belong together.
    """
    if there := [name for name in (*FILES.values(), CARD) if (target / name).exists()]:
        raise ConfigError(f"{target} holds {there[0]} already. Name another folder with to=FOLDER.")
    source = source_of(folder, arm)
    encoder, facts, run = load_encoder(source), read_facts(source), read_run(folder.path)
    width = int(encoder.width)  # type: ignore[arg-type]
    if "onnx" in formats:
        about = {"medfl.arm": card.Arm.of(arm).public, "medfl.sha256": facts["sha256"]}
        onnx.write(encoder, image_shape(facts), target / onnx.FILE, about=about)
    if "bundle" in formats:
        readme = card.render(run, facts, name=arm, width=width, uses={"With MONAI, in this bundle": bundle.USE})
        bundle.write(source, run, target / bundle.FOLDER, card=readme, width=width)
    if "safetensors" in formats:
        copy_encoder(source, target)
    uses = {f"From {FILES[name]}, in {PLACES[name]}": USES[name] for name in formats}
    write_bytes(target / CARD, card.render(run, facts, name=arm, width=width, uses=uses).encode())
    return image_shape(facts), width


def check(folder: RunFolder, arm: str, target: Path, formats: Sequence[str]) -> dict[str, float]:
    """As `verify`, against the encoder of the run."""
    source = source_of(folder, arm)
    return verify(target, formats, load_encoder(source), read_facts(source))


def source_of(folder: RunFolder, arm: str) -> Path:
    """
    Raises:
        ConfigError: the run has no finished encoder of this arm.
    """
    places = [folder.path, *sorted((folder.path / "arms").glob("*"))]
    known = [read_facts(place)["provenance"]["arm"] for place in places if (place / WEIGHTS).exists()]
    if arm not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"arm={arm}: {folder.path} has no finished encoder of it, but of {listed}.")
    return folder.arm(arm)
