"""Random numbers as pure functions of a seed and a position, for whole arrays at once. Runs anywhere."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(seeds: Words, counters: npt.NDArray[np.int64]) -> Words:
    """Return random 64-bit words: SplitMix64 (Steele et al. 2014) of each seed at each counter (0, 1, ...).

    SplitMix64 is a counter that is hashed: word k needs no draw for the words before it.
    """
    with np.errstate(over="ignore"):
        z = seeds + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed_words: Words = z ^ (z >> np.uint64(31))
        return mixed_words


def uniform(seeds: Words, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) that are functions of seed and counter."""
    # The 53 bits of a float64's fraction.
    return (mixed(seeds, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
