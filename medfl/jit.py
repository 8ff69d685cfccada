"""Compiling with numba: at the first call, kept on disk where a folder can be written."""

from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function in machine code, without the GIL; without further options of numba it is IEEE arithmetic."""
    import numba  # a module of kernels cannot be imported without it

    try:
        jitted: Callable[..., Any] = numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # neither beside the file nor in the user's cache folder: numba finds no place
        jitted = numba.njit(nogil=True, **options)(function)
    return jitted
