"""A keyed permutation of any number of places that is computed place by place: nothing is stored but its keys.

A Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM
Journal on Computing 17, 1988) on pairs of digits (left, right) with left in [0, a) and right in [0, b), the generalised
form of Black and Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002). A round adds a keyed hash of one digit
to the other, which can be undone, so all rounds together permute the a b pairs. With a the integer root of N and
b = ceil(N / a), a b exceeds N by less than a; a place that leads outside is walked on until it leads inside, which
permutes [0, N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_nepa.parallel.random import derive_key, words

_ROUNDS = 8  # four of each digit; Luby and Rackoff's proof needs two of each

Digits = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class KeyedBijection:
    """A permutation of [0, size) that looks drawn at random.

    Attributes:
        size: places N, from 1 to 2**62.
        keys: the rounds' keys, 64 bits each.
    """

    size: int
    keys: tuple[int, ...]

    @classmethod
    def derive(cls, seed: int, purpose: str, number: int, size: int) -> KeyedBijection:
        """The ``number``-th permutation of ``size`` places for a purpose, of a seed."""
        return cls(size, tuple(derive_key(seed, purpose, number * _ROUNDS + i) for i in range(_ROUNDS)))

    def __call__(self, place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each place leads.

        Args:
            place: int64 [n] in [0, size).

        Returns:
            int64 [n] in [0, size); different for different places.
        """
        found = self._rounds(np.asarray(place, np.uint64))
        # less than 1 in sqrt(size) leads outside; each cycle of the pairs holds the place that it came from, so it ends
        while len(outside := np.flatnonzero(found >= np.uint64(self.size))):
            found[outside] = self._rounds(found[outside])
        return found.astype(np.int64)

    def _rounds(self, place: Digits) -> Digits:
        """The permutation of the a b pairs, each as the number left b + right."""
        a = math.isqrt(self.size)
        b = -(-self.size // a)
        left, right = np.divmod(place, np.uint64(b))
        for number, key in enumerate(self.keys):
            if number % 2 == 0:
                left = _add(left, words(key, right), a)
            else:
                right = _add(right, words(key, left), b)
        return left * np.uint64(b) + right


def _add(digit: Digits, word: Digits, base: int) -> Digits:
    """The digit plus a hash, modulo its base; 63 bits of the hash leave room for the sum."""
    return (digit + (word >> np.uint64(1))) % np.uint64(base)
