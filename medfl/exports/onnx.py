"""An encoder as one ONNX file, for any runtime: `image` (N, C, *S) float32 -> `features` (N, F)."""

import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError
from medfl.files import write_bytes

FILE = "encoder.onnx"
OPSET = 18  # the exporter's own, so nothing is converted; onnxruntime reads it since 1.14, of 2023
WRITING, RUNNING = ("onnx", "onnxscript"), ("onnxruntime",)


def require(packages: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: one is not installed.
    """
    if absent := [name for name in packages if find_spec(name) is None]:
        raise ConfigError(
            f"formats: onnx needs {' and '.join(absent)}. Run pip install 'medfl[export]', or leave onnx out."
        )


def write(encoder: nn.Module, shape: Sequence[int], path: Path, *, about: dict[str, str]) -> None:
    """Write the file. The batch is free, and so are sides that are not shorter than those of training.

    Args:
        shape: (C, *S) of an image.
        about: name -> text, kept inside the file.

    Raises:
        ConfigError: a package is absent, or the encoder is no fixed graph of operations.
    """
    require(WRITING)
    example = torch.zeros(2, *shape)
    free = {0: torch.export.Dim("batch")}
    free |= {axis: torch.export.Dim(f"side_{axis - 1}", min=n) for axis, n in enumerate(shape[1:], start=2)}
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                encoder, (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["image"], output_names=["features"], dynamic_shapes=(free,),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError:
        raise ConfigError(
            f"{type(encoder).__name__} cannot be written as ONNX: what it computes depends on the values of an image, "
            "such as a modality that is missing. Leave onnx out: formats=[safetensors,bundle]."
        ) from None
    model = program.model_proto
    del model.graph.value_info[:]  # shapes of inner tensors, which a runtime finds itself and some get wrong
    importlib.import_module("onnx.helper").set_model_props(model, about)
    write_bytes(path, model.SerializeToString())


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of images (N, C, *S), through onnxruntime on the CPU.

    Raises:
        ConfigError: onnxruntime is absent.
    """
    require(RUNNING)
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"image": images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints for its own developers."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
