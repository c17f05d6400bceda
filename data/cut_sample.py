"""Cut the sample in data/sample/ from the whole of MNIST, which `make data` puts into data/MNIST/raw.

Every digit has as many images as every other, give or take one, and the order is random; both follow from
SEED alone.
"""

import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.book.data import DATA, MNIST, SAMPLE, load_mnist

SEED = 0
SIZES = 8192, 2048


def choose(labels: list[int], size: int, rng: random.Random) -> list[int]:
    """Positions of ``size`` images, shuffled, with as equal a number of each digit as there can be."""
    positions = list(range(len(labels)))
    rng.shuffle(positions)
    more = set(rng.sample(range(10), size % 10))  # the digits that have one image more
    room = {digit: size // 10 + (digit in more) for digit in range(10)}
    chosen = []
    for position in positions:
        if room[labels[position]]:
            room[labels[position]] -= 1
            chosen.append(position)
    if len(chosen) != size:
        raise ValueError(f"not enough images for {size} in equal shares")
    return chosen


def main() -> None:
    rng, arrays = random.Random(SEED), []
    for split, size in zip(load_mnist("full"), SIZES, strict=True):
        chosen = choose(split.labels.tolist(), size, rng)
        arrays += [split.images[chosen].numpy(), split.labels[chosen].byte().numpy()]
    names = [packed.removesuffix(".gz") for packed, _ in MNIST.resources]
    np.savez_compressed(DATA / SAMPLE, **dict(zip(names, arrays, strict=True)))


if __name__ == "__main__":
    main()
