"""An encoder as a MONAI bundle that holds no code: no scripts, no expressions, no pickle; weights are safetensors.

Its configuration only names parts of medfl: whoever opens it needs medfl, and runs nothing that came with the bundle.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from medfl import config
from medfl.data.sample import Source
from medfl.errors import MedflError
from medfl.export import WEIGHTS, image_shape, modalities, read_facts, value_range, with_weights
from medfl.files import write_bytes
from medfl.report.tables import Run, study_node

FOLDER = "bundle"
MODEL = Path("models") / "model.safetensors"
INFERENCE, META = Path("configs") / "inference.json", Path("configs") / "metadata.json"
SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
PACKAGES = ("medfl", "safetensors")  # what MONAI itself does not bring
OF_TRAINING = (
    "label",
    "patient",
    "site",
    "split",
    "mask",
    "convention",
    "classes",
    "regions",
)  # columns that inference has not
READERS = {"medfl.data.folder.Folder": (*OF_TRAINING, "labels"), "medfl.data.multimodal.Multimodal": OF_TRAINING}
BATCH = 16  # images
LICENSE = """The weights in this bundle were trained on images of patients. No licence was set when they were exported:
the agreement of the study decides who may use them, for what, and whether they may be passed on.
Put its terms in the place of this text before you do so.

The bundle holds no code. The classes that its configuration names belong to medfl, which is under Apache-2.0.
"""
USE = """from monai.bundle import ConfigParser
parser = ConfigParser(); parser.read_config("configs/inference.json")
features = parser.get_parsed_content("network")(images)"""


def write(source: Path, run: Run, target: Path, *, card: str, width: int) -> None:
    """Write the bundle.

    Args:
        source: the folder with the encoder.
        run: the run folder that it belongs to.
        card: docs/README.md.
        width: features of an image.
    """
    facts = read_facts(source)
    files = {
        META: json.dumps(metadata(run, facts, width=width), indent=4),
        INFERENCE: json.dumps(inference(run, facts), indent=4),
        Path("docs") / "README.md": card,
        Path("LICENSE"): LICENSE,
    }
    write_bytes(target / MODEL, (source / WEIGHTS).read_bytes())
    for name, text in files.items():
        write_bytes(target / name, text.encode())


def metadata(run: Run, facts: Mapping[str, Any], *, width: int) -> dict[str, Any]:
    """metadata.json by MONAI's schema of 2024-07-25."""
    channels, *sides = image_shape(facts)
    names = modalities(facts) or ("image",) * channels
    image = {
        "type": "image", "format": "magnitude", "modality": "n/a", "num_channels": channels, "spatial_shape": sides,
        "dtype": "float32", "value_range": list(value_range(facts)), "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(names)},
    }  # fmt: skip
    features = {
        "type": "tuples", "format": "latent", "num_channels": width, "spatial_shape": [], "dtype": "float32",
        "value_range": [], "is_patch_data": False, "channel_def": {},
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported from {run.name}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in PACKAGES},
        "task": "Representation of medical images",
        "description": f"Image encoder of the medfl run {run.name}; see docs/README.md",
        "authors": "not stated: see the study's agreement",
        "copyright": "not stated: see LICENSE",
        "intended_use": "Research. Not a medical device, not for diagnosis or treatment.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": features}},
    }


def inference(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """inference.json: the network, and features of the images that a CSV file lists, prepared as in the study."""
    return {
        "bundle_root": ".",
        "device": "cpu",
        "dataset_dir": "images",
        "datalist": "datalist.csv",
        "output": "features.csv",
        "network_def": dict(facts["architecture"]),
        "network": {
            "_target_": f"{__name__}.restored",
            "network": "@network_def",
            "bundle_root": "@bundle_root",
            "digest": facts["sha256"],
        },
        "dataset": _reader(run, facts) | {"root": "@dataset_dir", "datalist": "@datalist"},
        "inferer": {"_target_": "SimpleInferer"},
        "evaluator": {
            "_target_": f"{__name__}.FeatureWriter",
            **{name: f"@{name}" for name in ("network", "inferer", "dataset", "device")},
            "to": "@output",
        },
        "run": [{"_target_": f"{__name__}.run_evaluator", "evaluator": "@evaluator"}],
    }


def _reader(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The study's own reader of files; of a study that read none, the defaults at the encoder's size."""
    node = dict(study_node(run, "data"))
    if node.get("_target_") not in READERS:
        names = list(modalities(facts))
        file = config.CONFIGS / "data" / ("multimodal.yaml" if names else "folder.yaml")
        node = yaml.safe_load(file.read_text())
        given = {"depth": None, **facts["input"], "modalities": names}
        node |= {name: value for name, value in given.items() if name in node}
    return {name: None if name in READERS[node["_target_"]] else value for name, value in node.items()}


def load(folder: Path) -> nn.Module:
    """The network as MONAI's parser builds it.

    Raises:
        DataError: as `restored`.
    """
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_meta(folder / META)
    parser.read_config(folder / INFERENCE)
    parser["bundle_root"] = str(folder)
    try:
        network: nn.Module = parser.get_parsed_content("network")
    except RuntimeError as error:  # so the parser reports whatever its components raise
        if isinstance(error.__cause__, MedflError):
            raise error.__cause__ from None
        raise
    return network


def restored(network: nn.Module, bundle_root: str, digest: str) -> nn.Module:
    """What inference.json calls to fill its network.

    Raises:
        DataError: the bundle's weights are others than when it was written.
    """
    return with_weights(network, Path(bundle_root) / MODEL, digest)


@dataclass(frozen=True)
class FeatureWriter:
    """The evaluator of inference.json: one row an image, its name and its features, into the CSV file `to`."""

    network: nn.Module
    inferer: Callable[[Tensor, nn.Module], Tensor]
    dataset: Source
    to: str
    device: str

    @torch.no_grad()
    def run(self) -> None:
        records, network = self.dataset.load(), self.network.to(self.device)
        parts = torch.split(records.images, BATCH)
        rows = torch.cat([self.inferer(images.to(self.device), network).cpu() for images in parts]).tolist()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *(f"feature_{place}" for place in range(len(rows[0])))])
        for name, row in zip(records.patients, rows, strict=True):
            writer.writerow([name, *(f"{value:.7g}" for value in row)])
        write_bytes(Path(self.to), text.getvalue().encode())


def run_evaluator(evaluator: FeatureWriter) -> None:
    """What inference.json runs, where other bundles have an expression."""
    evaluator.run()
