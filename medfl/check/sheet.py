"""Pictures of the images as the training sees them: after reading, bringing to the grid, and a view's changes."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

SIDE = 176  # pixels of the shown picture's shorter side


def pictures(views: Tensor) -> list[str]:
    """Data URIs of PNG files, of views (n, C, *S): colours, or the first channel with something in it; of volumes the
    middle slice along each axis.
    """
    return [_uri(_planes(view)) for view in views]


def _planes(view: Tensor) -> list[Tensor]:
    """The pictures (C, H, W) of one view, C 1 or 3, upright: rows from head to foot, or front to back."""
    shown = view if len(view) == 3 and view.ndim == 3 else _first(view)[None]
    if shown.ndim == 3:
        return [shown]
    return [shown.select(axis, shown.shape[axis] // 2).transpose(1, 2).flip(1) for axis in (3, 2, 1)]


def _first(view: Tensor) -> Tensor:
    """The first channel that is not one value throughout."""
    spread = [float(channel.max() - channel.min()) for channel in view]
    return view[next((place for place, value in enumerate(spread) if value > 0), 0)]


def _uri(planes: Sequence[Tensor]) -> str:
    from PIL import Image

    parts = []
    for plane in planes:
        pixels = plane.numpy()
        low, high = float(pixels.min()), float(pixels.max())
        shown = ((pixels - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
        image = Image.fromarray(shown[0] if len(shown) == 1 else np.ascontiguousarray(shown.transpose(1, 2, 0)))
        scale = SIDE / min(image.size)
        parts.append(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR))
    width, height = sum(part.width for part in parts), max(part.height for part in parts)
    whole = Image.new(parts[0].mode, (width, height))
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
