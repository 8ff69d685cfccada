"""Keys of one round, what two sites agree on, and streams of masks from a seed."""

from collections.abc import Iterator

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfl.errors import CredentialError

SEED = 32  # bytes
TAG = 16  # bytes that sealing adds
CHUNK = 1 << 20  # bytes of a stream at once: it stays in the cache
ZEROS = bytes(CHUNK)


def new_secret() -> bytes:
    """A private X25519 key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(secret: bytes) -> bytes:
    """The 32 public bytes of a private X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, context: bytes, purpose: str) -> bytes:
    """32 bytes that only the owners of two keys can know, for one purpose in one context.

    Raises:
        CredentialError: `public` is no key that can be agreed with.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise CredentialError("a site's public key for the sum is none. Nothing was sent.") from None
    return derived(shared, context, purpose)


def derived(secret: bytes, context: bytes, purpose: str) -> bytes:
    """HKDF-SHA256, 32 bytes."""
    return HKDF(SHA256(), SEED, salt=context, info=purpose.encode()).derive(secret)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """ChaCha20-Poly1305; each key seals one text only, so that the nonce need not differ."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, context)


def unseal(key: bytes, sealed: bytes, context: bytes, maker: str) -> bytes:
    """What site `maker` sealed.

    Raises:
        CredentialError: tampered with, or sealed for another round or site.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, context)
    except InvalidTag:
        text = f"the share that site '{maker[:40]}' sealed is of another site or round, or was changed."
        raise CredentialError(f"{text} Nothing was sent.") from None


def add(total: np.ndarray, seed: bytes, purpose: str, *, sign: int) -> None:
    """Add (sign 1) or take away (-1) the mask of a seed, modulo 2^32 or 2^64, in place.

    Args:
        total: (n,) uint32 or uint64, little-endian.
        purpose: each array of one seed has another, else two would get the same mask.
    """
    change = np.add if sign > 0 else np.subtract
    start = 0
    for mask in _stream(derived(seed, b"", purpose), total.nbytes):
        part = mask.view(total.dtype)
        place = total[start : start + part.size]
        change(place, part, out=place)
        start += part.size


def _stream(key: bytes, size: int) -> Iterator[np.ndarray]:
    """The AES-256 counter stream, in chunks that the next one overwrites; each key is used once, from counter 0."""
    cipher, out = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor(), bytearray(CHUNK + 15)
    view = memoryview(ZEROS)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        cipher.update_into(view[:length], out)
        yield np.frombuffer(out, np.uint8, length)
