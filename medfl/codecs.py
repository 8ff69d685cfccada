"""Codecs of weights and their changes: pure functions on flat float32 arrays, written into arrays that are there.

Long arrays are taken in chunks, so that what lies between stays in the cache.
"""

import zlib
from collections.abc import Iterator

import numpy as np
import torch

CHUNK = 1 << 17  # values: 0.5 MB
BLOCK = 256  # values that share a scale in int8
STRIDE = 61  # one in so many values tells about where the largest begin
HALF_LIMIT = 65520.0  # from here on float16 rounds to infinity
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST = np.finfo(np.float32).tiny  # of scales: dividing by smaller ones is not precise
BARE = -15  # zlib: a stream of the largest window without a header


def to_half(values: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Round to the nearest bfloat16 (its bits in uint16) or float16.

    Relative error at most 2^-8, or 2^-11; of a float16 below 2^-14 the error is at most 2^-25.
    """
    _half(out, dtype).copy_(torch.from_numpy(values))


def of_half(halves: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """What `to_half` wrote, as float32."""
    torch.from_numpy(out).copy_(_half(halves, dtype))


def to_packed(halves: np.ndarray) -> bytes:
    """16-bit floats without loss: their lower bytes as they are, then their upper ones, deflated.

    The upper byte is the sign and most of the exponent, of which weights of a network use about 3 bits of 8 (as in
    ZipNN, Hershcovitch et al. 2024). Huffman codes alone: bytes do not repeat in a way that is worth looking for.
    """
    lower, upper = (np.ascontiguousarray(halves.reshape(-1).view(np.uint8)[place::2]).data for place in (0, 1))
    deflate = zlib.compressobj(1, zlib.DEFLATED, BARE, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join((lower, deflate.compress(upper), deflate.flush()))


def of_packed(data: bytes | memoryview, size: int, dtype: np.dtype) -> np.ndarray:
    """(size,) what `to_packed` was given; whatever came, no more memory is taken than three times its bytes.

    Raises:
        ValueError: bytes that hold more or fewer values, or no such stream.
    """
    wrong = ValueError(f"its packed bytes are not those of {size} values")
    if len(data) < size:  # before anything is inflated to that size
        raise wrong
    inflate = zlib.decompressobj(BARE)
    try:
        upper = inflate.decompress(memoryview(data)[size:], size + 1)
    except zlib.error:
        raise wrong from None
    if not (len(upper) == size and inflate.eof and not inflate.unused_data):
        raise wrong
    found = np.empty((size, 2), np.uint8)
    found[:, 0], found[:, 1] = np.frombuffer(data, np.uint8, size), np.frombuffer(upper, np.uint8)
    return found.reshape(-1).view(dtype)


def _half(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16)).view(HALVES[dtype])


def scales_of(size: int) -> int:
    """How many scales `to_int8` needs for so many values."""
    return -(-size // BLOCK)


def to_int8(values: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
    """Round each block to whole multiples of its scale, max |x| / 127: the error is at most half a scale.

    A block without a value of at least 127 times the smallest normal number is zeros.
    """
    for start, end, width in _blocks(values.size):
        block, scale = values[start:end].reshape(-1, width), scales[start // BLOCK : scales_of(end)]
        np.maximum(block.max(axis=1), -block.min(axis=1), out=scale)
        scale /= 127
        scale[scale < SMALLEST] = 0
        with np.errstate(invalid="ignore"):  # NaN shows in the scale
            whole = block / np.where(scale == 0, np.inf, scale)[:, None]
            codes[start:end] = np.rint(whole, out=whole).reshape(-1)


def of_int8(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """What `to_int8` wrote, as float32."""
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # what a site sends may be anything; the gate looks at the result
        for start, end, width in _blocks(out.size):
            scale = scales[start // BLOCK : scales_of(end), None]
            np.multiply(codes[start:end].reshape(-1, width), scale, out=out[start:end].reshape(-1, width))


def _blocks(size: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, width of a block): chunks of whole blocks, then the shorter last one."""
    whole = size - size % BLOCK
    for start in range(0, whole, CHUNK):
        yield start, min(start + CHUNK, whole), BLOCK
    if whole < size:
        yield whole, size, size - whole


def to_largest(values: np.ndarray, indices: np.ndarray, kept: np.ndarray) -> None:
    """As many of the values with the largest magnitude as `indices` has room for, and where they stand, rising."""
    found, count = _candidates(values, indices.size), indices.size
    sizes = np.abs(values[found])
    chosen = found[np.argpartition(sizes, sizes.size - count)[sizes.size - count :]]
    indices[:] = np.sort(chosen)
    kept[:] = values[indices]


def _candidates(values: np.ndarray, count: int) -> np.ndarray:
    """Places of at least `count` values, the largest among them: of those above a limit that about twice as many pass.

    Sorting out a few of them takes a quarter of the time that sorting out all does.
    """
    sample = np.sort(np.abs(values[::STRIDE]))[::-1]
    limit = sample[min(2 * count // STRIDE + 8, sample.size - 1)]
    parts = range(0, values.size, CHUNK)
    found = np.concatenate([np.flatnonzero(np.abs(values[start : start + CHUNK]) >= limit) + start for start in parts])
    return found if found.size >= count else np.arange(values.size)


def of_largest(indices: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """What `to_largest` wrote, as float32 among zeros.

    Raises:
        ValueError: places that do not rise, or beyond the end.
    """
    if indices.size and (int(indices[-1]) >= size or bool((indices[1:] <= indices[:-1]).any())):
        raise ValueError(f"the places of its values must rise and be below {size}")
    values = np.zeros(size, np.float32)
    values[indices] = kept
    return values
