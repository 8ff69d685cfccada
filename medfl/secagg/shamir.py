"""Shamir's secret sharing (1979): any `threshold` shares give the secret, fewer say nothing about it."""

import secrets
from collections.abc import Mapping

PRIME = 2**521 - 1
BYTES = 66  # of a share
SECRET = 32  # bytes of a secret


def split(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """Shares of a 32-byte secret, at the places 1 to `count`: values of a random polynomial of degree threshold - 1.

    Raises:
        ValueError: another length, or a threshold outside of [1, count].
    """
    if len(secret) != SECRET or not 1 <= threshold <= count:
        raise ValueError(f"split: got {len(secret)} bytes, {threshold} of {count}; need {SECRET} and 1 <= threshold.")
    polynomial = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(polynomial, place).to_bytes(BYTES) for place in range(1, count + 1)]


def _value(polynomial: list[int], place: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * place + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind the shares by their places: Lagrange's polynomial at 0.

    Raises:
        ValueError: these are not enough shares of one secret (found out in all but one of 2^265 cases).
    """
    secret = 0
    for place, share in shares.items():
        above = below = 1
        for other in shares.keys() - {place}:
            above, below = above * other % PRIME, below * (other - place) % PRIME
        secret += int.from_bytes(share) * above * pow(below, -1, PRIME)
    secret %= PRIME
    if secret >> (8 * SECRET):
        raise ValueError(f"join: {len(shares)} shares are not of one secret, or too few.")
    return secret.to_bytes(SECRET)
