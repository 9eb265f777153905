"""The hash is frozen: these numbers are in every store that was ever written."""

import torch

from dmin.sketches.hashing import hash_words, key, signs, spread_words


def test_golden_keys():
    assert key(0) == 1726737503
    assert key(0, "conv_in.weight", "sign") == 3388175985
    assert key(7, "conv_in.weight", "offset") == 166067265


def test_golden_words():
    assert hash_words(0, 4).tolist() == [0, 804215951, 3050591713, 3918329826]
    assert hash_words(0xDEADBEEF, 4).tolist() == [1564492545, 1258758057, 4058784876, 3059891293]
    assert hash_words(12345, 1_000_003)[-2:].tolist() == [796285627, 2156267450]


def test_golden_signs():
    golden = "++-----+-+----+++---++-++-+--+-++++-+---"
    assert "".join("+" if s > 0 else "-" for s in signs(12345, 40)) == golden


def test_words_are_those_of_murmur_computed_with_python_integers():
    def finalise(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    for k in (1, 0x7FFFFFFF, 0xFFFFFFFF):
        expected = [finalise((finalise(i ^ k) + k) % 2**32) for i in range(1000)]
        assert hash_words(k, 1000).tolist() == expected


def test_a_prefix_does_not_depend_on_the_count():
    assert torch.equal(hash_words(9, 1000)[:17], hash_words(9, 17))
    assert torch.equal(signs(9, 1000)[:77], signs(9, 77))


def test_words_of_a_key_are_all_different():
    """Both rounds are bijections of 32-bit words."""
    assert len(hash_words(3, 1 << 20).unique()) == 1 << 20


def test_every_bit_of_the_words_is_balanced_and_uncorrelated_with_every_other():
    count = 1 << 16
    bits = (hash_words(key(0, "a"), count)[:, None] >> torch.arange(32)) & 1
    bits = 2.0 * bits - 1
    correlation = bits.T @ bits / count
    assert bits.mean(0).abs().max() < 5 / count**0.5
    assert (correlation - torch.eye(32)).abs().max() < 5 / count**0.5


def test_signs_are_balanced_and_uncorrelated_at_every_distance():
    count = 1 << 18
    s = signs(key(0, "a"), count)
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(s.mean()) < 4 / count**0.5
    spectrum = torch.fft.rfft(s).abs().square()
    correlation = torch.fft.irfft(spectrum, n=count) / count  # of s with s shifted, every shift
    assert correlation[1:].abs().max() < 7 / count**0.5


def test_different_keys_give_unrelated_signs():
    count, keys = 1 << 14, [key(seed, name) for seed in range(8) for name in ("a", "b", "a.b")]
    assert len(set(keys)) == 24
    s = torch.stack([signs(k, count) for k in keys])
    assert (s @ s.T / count - torch.eye(24)).abs().max() < 6 / count**0.5


def test_nearby_keys_give_unrelated_words():
    """Names are hashed to keys, but nothing should rest on how far apart those are."""
    count = 1 << 14
    s = torch.stack([signs(k, count) for k in [0, 1, 2, 3, 4, 8, 1 << 16, 1 << 31]])
    assert (s @ s.T / count - torch.eye(8)).abs().max() < 6 / count**0.5


def test_offsets_are_uniform_for_any_dimension():
    for dim in (4096, 1000, 7):
        counts = torch.bincount(hash_words(key(1, "b"), 100 * dim) % dim, minlength=dim)
        chi_square = float(((counts - 100.0) ** 2 / 100).sum())
        assert abs(chi_square - dim) < 6 * (2 * dim) ** 0.5


def test_spread_words_are_different_modulo_enough_and_even_modulo_less():
    assert spread_words(5, 4).tolist() == [9540584173, 13500231939, 14769983750, 12585506200]
    for count in (1, 2, 100, 128, 1000):
        words = spread_words(7, count)
        assert words.min() >= 0
        for k in (1024, 4096, 1 << 20):
            assert len((words % k).unique()) == count
    held = torch.bincount(spread_words(7, 1024) % 256)
    assert held.tolist() == [4] * 256


def test_differences_of_spread_words_are_uniform_but_for_what_would_be_equal():
    keys, n, k = 20_000, 8, 32
    pairs = torch.stack([spread_words(i, n)[[0, 5]] % k for i in range(keys)])
    hits = torch.bincount((pairs[:, 0] - pairs[:, 1]) % k, minlength=k)
    assert not hits[::n].any()
    others = hits[torch.arange(k) % n != 0].double() / keys
    p = 1 / (k - k / n)
    assert (others - p).abs().max() < 5 * (p / keys) ** 0.5
    assert (
        torch.bincount(pairs[:, 0], minlength=k).double().div(keys).sub(1 / k).abs().max() < 0.006
    )
