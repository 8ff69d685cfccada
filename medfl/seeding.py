"""Random streams as pure functions of what they are for: no global state, so order and place never matter."""

import hashlib

import torch


def key(*parts: int | str) -> int:
    """A 63-bit seed from its parts, e.g. `key(seed, "views", site, round, step)`; equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def share(*parts: int | str) -> float:
    """A number in [0, 1) from its parts, as `key`."""
    return (key(*parts) >> 10) / (1 << 53)


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded with `key(*parts)`."""
    return torch.Generator(device=device).manual_seed(key(*parts))
