"""Hashes integers to pseudorandom integers, which are the same on every machine."""

from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]

INCREMENT = np.uint64(0x9E3779B97F4A7C15)
"""The step between two states of SplitMix64."""


def mix64(words: Words) -> Words:
    """Mix the bits of each uint64 with the output function of SplitMix64 (Steele et al. 2014).

    The function is bijective. Its input should be a multiple of ``INCREMENT`` or a sum with it.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
