"""What a method's codebooks make of an image: the code of every cell of its maps, as colours."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medfl.evaluation.slices import FOOT, Slices, caption, picture, plane
from medfl.methods.base import Method
from medfl.models.quantizer import Quantized


@torch.no_grad()
def code_maps(method: Method, images: Tensor) -> dict[str, Tensor]:
    """Codebook -> the code of each cell (B, *s) of images (B, C, *S), as `method.observe` finds them.

    Codebooks that hold nothing yet are left out, and those whose tokens are not the cells of one of the encoder's maps.

    Args:
        method: in evaluation mode. Networks that normalise by the batch see these images as one.
        images: at least two, for such networks.
    """
    found: dict[str, Tensor] = {}
    books = {name: book for name, book in method.codebooks().items() if book.ready}
    hooks = [book.register_forward_hook(_keeper(found, name)) for name, book in books.items()]
    try:
        method.observe(images, 0.0)
    finally:
        for hook in hooks:
            hook.remove()
    encoder: Any = method.encoder
    grids = {math.prod(one.shape[2:]): one.shape[2:] for one in encoder.maps(images[:1])}
    return {
        name: codes.reshape(len(codes), *grids[codes.shape[1]])
        for name, codes in found.items()
        if codes.shape[1] in grids
    }


def figure(
    looks: Mapping[int, Tensor], maps: Mapping[str, Tensor], vectors: Mapping[str, Tensor], spacing: Sequence[float]
) -> Slices:
    """A row for each image: itself, and the code map of each codebook in the same slice.

    Args:
        looks: by the number of the test image, greys (1, *S) or colours (3, *S) in [0, 1].
        maps: by codebook (B, *s); the rows are those of `looks`.
        vectors: by codebook, its codes (K, D).
    """
    first = next(iter(looks.values()))
    columns = [f"{short(name)}: {'×'.join(map(str, codes.shape[1:]))}" for name, codes in maps.items()]
    sheet = Slices(first[0], len(looks), ["image", *columns], spacing=spacing, foot=FOOT)
    colours = {name: palette(codes, vectors[name]) for name, codes in maps.items()}
    for at, (row, look) in enumerate(looks.items()):
        place = look.shape[-1] // 2
        counts = [f"{short(name)} {distinct(codes[at])}" for name, codes in maps.items()]
        sheet.title(at, *caption(row, look[0], place), "different codes:", *counts)
        sheet.image(at, 0, picture(look, place))
        for column, (name, codes) in enumerate(maps.items(), start=1):
            cells = codes[at]
            shown = plane(cells, place * cells.shape[-1] // look.shape[-1])
            sheet.colours(at, column, shown, colours[name], opacity=1.0)
    held = ", ".join(f"{short(name)} {len(vectors[name])}" for name in maps)
    sheet.note(f"Like colours in one column are like codes. Different codes are counted in the whole image, of {held}.")
    return sheet


def palette(codes: Tensor, vectors: Tensor) -> dict[int, str]:
    """A colour for each code that occurs in codes (...): like vectors (K, D) have like colours.

    The codes are put in order along the direction in which their vectors differ most, and spread evenly over the
    colours, from dark to light.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    present = codes.flatten().bincount().nonzero()[:, 0]
    centred = vectors[present] - vectors[present].mean(0)
    _, _, directions = torch.linalg.svd(centred.double(), full_matrices=False)
    order = present[(centred.double() @ directions[0]).argsort(stable=True)].tolist()
    return {code: to_hex(colormaps["viridis"](at / max(1, len(order) - 1))) for at, code in enumerate(order)}


def distinct(codes: Tensor) -> int:
    """How many different codes occur in codes (...)."""
    return int(codes.flatten().bincount().count_nonzero())


def short(book: str) -> str:
    """ "fine" of "scales.fine.quantizer"."""
    return book.removeprefix("scales.").removesuffix(".quantizer")


def _keeper(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Quantized], None]:
    """A hook that keeps the codes under a name."""

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Quantized) -> None:
        found[name] = output.indices.cpu()

    return keep
