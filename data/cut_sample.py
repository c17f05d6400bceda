"""Cut the sample in data/sample/ from the whole of MNIST.

    python data/cut_sample.py [FOLDER]

FOLDER holds the whole set's four IDX files, plain or gzipped; by default data/MNIST/raw. Every digit has as
many images as every other, give or take one, and the order is random; both follow from SEED alone.
"""

import gzip
import random
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from helpers.book.data import read_folder

SEED = 0
SIZES = {"train": 8192, "t10k": 2048}


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


def write_idx(path: Path, tensor) -> None:
    """Write uint8 values as a gzipped IDX file that is the same at every run."""
    header = bytes((0, 0, 8, tensor.dim())) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    # No name and no time in the gzip header.
    path.write_bytes(gzip.compress(header + tensor.numpy().tobytes(), 9, mtime=0))


def main(source: Path) -> None:
    rng = random.Random(SEED)
    for (name, size), (images, labels) in zip(SIZES.items(), read_folder(source, md5=True), strict=True):
        chosen = choose(labels.tolist(), size, rng)
        write_idx(DATA / "sample" / f"{name}-images-idx3-ubyte.gz", images[chosen])
        write_idx(DATA / "sample" / f"{name}-labels-idx1-ubyte.gz", labels[chosen].byte())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA / "MNIST" / "raw")
