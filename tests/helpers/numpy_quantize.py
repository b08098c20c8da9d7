"""8-bit blocks once more, in numpy."""

import itertools
import math

import numpy as np


def value_map(signed):
    """Dynamic quantisation: 0, 1, and the middles of ever finer parts of a decade."""
    middles = []
    for k in range(7):
        parts = 2 ** ((6 if signed else 7) - k)
        edges = np.linspace(0.1, 1, parts + 1) / 10**k
        middles += [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    values = [0, 1, *middles]
    if signed:
        values += [-1, *(-x for x in middles if x != max(middles))]
    # The library's values are float32.
    return np.sort(np.asarray(values, np.float32).astype(np.float64))


MAPS = {signed: value_map(signed) for signed in (False, True)}


def block_count(n, block_size):
    return math.ceil(n / block_size)


def block_length(n, block_size):
    """Of equally long blocks, as few as hold at most `block_size` numbers each."""
    return math.ceil(n / block_count(n, block_size))


def rounded(x, block_size):
    """D(Q(x)) of (..., n), number by number."""
    out, size = np.zeros(x.shape), block_length(x.shape[-1], block_size)
    for index in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], size):
            part = (*index, slice(start, start + size))
            a = np.abs(x[part]).max()
            if a:
                u = (x[part] / a)[:, None]
                values = MAPS[True][np.abs(u - MAPS[True]).argmin(1)]
                if (values >= 0).all():
                    values = MAPS[False][np.abs(u - MAPS[False]).argmin(1)]
                    positive = (u[:, 0] > 0) & (values == 0)
                    values = np.where(positive, MAPS[False][1], values)
                out[part] = a * values
    return out


def half_gap(u, signed):
    """How far u in [-1, 1] can be from the next value, from the definition.

    Half a part of its decade; under all decades, all of u, for 0 is a value, or in the
    unsigned map, where nothing positive becomes 0, the whole way to the first value.
    The lowest part's middle has become -1: half of one part and a half.
    """
    k = np.floor(-np.log10(np.maximum(np.abs(u), 1e-30)) + 1e-9)
    part = 0.9 / 10**k / 2.0 ** ((6 if signed else 7) - k)
    below = np.abs(u) if signed else np.where(u > 0, MAPS[False][1] - u, 0)
    bound = np.where(k > 6, below, part / 2)
    return np.where(u < -1 + 1.5 * part, 0.75 * part, bound) if signed else bound


def blocks_of(x, block_size):
    size = block_length(x.shape[-1], block_size)
    return [x[..., i : i + size] for i in range(0, x.shape[-1], size)]
