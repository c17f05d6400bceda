"""MNIST for notebooks/05_mnist_memory.ipynb: the collection's sample, or the whole set.

The whole set is used once it is in data/MNIST/raw/, where torchvision puts it;
``python -m helpers.book.data download`` (`make data`) lets it do so.
"""

from __future__ import annotations

import os
import socket
import sys
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

DATA = Path(__file__).resolve().parents[2] / "data"
FILES = {  # MD5 sums of the whole set's files, unpacked, as published for MNIST
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SAMPLE = "sample/mnist.npz", "60cea32a0977c1fdb870e5d1af1494c6"  # arrays named like the whole set's files
SILENCE = 30.0  # seconds that a connection may be silent; torchvision would wait for ever


class Split(NamedTuple):
    """Training or test images in memory, as uint8: a quarter of what they take as float32."""

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64
    name: str  # where they come from, such as "sample: 8,192 training and 2,048 test images"


def check(path: Path, md5: str) -> Path:
    """``path``, if its contents are the right ones."""
    if not check_integrity(path, md5):
        raise ValueError(f"{path} is missing or corrupt: its MD5 sum must be {md5}")
    return path


def load_mnist(
    data: str = "auto", train_images: int = 0, test_images: int = 0, root: Path | str = DATA
) -> tuple[Split, Split]:
    """MNIST for training and for testing.

    Args:
        data: "sample" (in the collection), "full" (the whole set, downloaded if it is missing) or "auto":
            the whole set if its four files are in ``root``/MNIST/raw, else the sample.
        train_images, test_images: use that many, the first ones; 0 means all.

    Raises:
        ValueError: an argument is wrong, or a file is corrupt. It stays, and no other is used in its place.
        OSError, RuntimeError, HTTPException: the download failed. The next one goes on from there.
    """
    if data not in ("auto", "sample", "full"):
        raise ValueError(f"DATA must be auto, sample or full, got {data!r}")
    raw = Path(root) / "MNIST" / "raw"
    there = [raw / name for name in FILES if (raw / name).is_file()]
    whole = data == "full" or (data == "auto" and len(there) == len(FILES))
    if whole:
        for path in there:  # torchvision checks what it downloads, and takes what is there as it is
            check(path, FILES[path.name])
        sets = [MNIST(root, train=train, download=data == "full") for train in (True, False)]
        pairs = [(found.data, found.targets) for found in sets]
    else:
        with np.load(check(Path(root) / SAMPLE[0], SAMPLE[1])) as arrays:
            tensors = [torch.from_numpy(arrays[name]) for name in FILES]
        pairs = [tensors[:2], tensors[2:]]
    counts = {"TRAIN_IMAGES": train_images, "TEST_IMAGES": test_images}
    for (name, count), (images, _) in zip(counts.items(), pairs, strict=True):
        if not 0 <= count <= len(images):
            raise ValueError(f"{name} must be from 0 (which means all) to {len(images):,}, got {count:,}")
    pairs = [[t[: n or None] for t in pair] for pair, n in zip(pairs, counts.values(), strict=True)]
    n_train, n_test = (len(images) for images, _ in pairs)
    name = f"{'whole set' if whole else 'sample'}: {n_train:,} training and {n_test:,} test images"
    train, test = (Split(images, labels.long(), name) for images, labels in pairs)
    return train, test


def main(arguments: list[str]) -> str | None:
    """What is wrong, or None."""
    if arguments != ["download"]:
        return "usage: python -m helpers.book.data download"
    socket.setdefaulttimeout(SILENCE)
    try:
        load_mnist("full", root=DATA)
    except (OSError, RuntimeError, ValueError, HTTPException, KeyboardInterrupt) as error:
        return f"data: MNIST is not complete: {' '.join(str(error).split()) or type(error).__name__}"
    print(f"MNIST is in {os.path.relpath(DATA / 'MNIST' / 'raw')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # words go to stderr, with the status 1
