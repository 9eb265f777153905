"""Counter-based hashes: the same signs and offsets everywhere, without state."""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def key(seed: int, *names: str) -> int:
    """Return a 32-bit key for a seed and some names, equal on every machine."""
    text = "\0".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def hash_words(key: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return pseudo-random 32-bit words for the counters 0 … count−1.

    The finaliser of MurmurHash3 (Appleby), a bijection of 32-bit words with full avalanche, is
    applied twice to each counter, with the key mixed in before each time. It is plain integer
    arithmetic, hence equal on every device.

    Returns:
        int64 ``[count]`` with values in [0, 2^32).
    """
    words = torch.arange(count, dtype=torch.int64, device=device)
    return _finalise(_finalise(words ^ key) + key & _MASK)


def spread_words(key: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return pseudo-random words that are distinct, and distinct or evenly spread modulo k.

    The low bits are the first values of a random permutation of 0 … N−1, where N is ``count``
    rounded up to a power of two; the high bits are random. Modulo a power of two k ≥ N all words
    differ, and the difference of two is uniform over the residues that are not multiples of N.
    Modulo a smaller power of two, two are equal with probability ``(N/k − 1) / (N − 1) < 1/k``.

    Returns:
        int64 ``[count]``, not negative.
    """
    size = 1 << (count - 1).bit_length()
    places = hash_words(key, size, device).argsort()[:count]  # all words differ, so no ties
    return places + size * hash_words(key + 0x9E3779B9 & _MASK, count, device)


def signs(key: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return pseudo-random signs, 32 from each hashed word.

    Returns:
        float32 ``[count]``, each +1 or −1.
    """
    words = hash_words(key, -(-count // 32), device)
    bits = (words[:, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).view(-1)[:count].float()


def _finalise(words: Tensor) -> Tensor:
    words = words ^ (words >> 16)
    words = (words * 0x85EBCA6B) & _MASK  # int64 wraps; its low 32 bits are those of the product
    words = words ^ (words >> 13)
    words = (words * 0xC2B2AE35) & _MASK
    return words ^ (words >> 16)
