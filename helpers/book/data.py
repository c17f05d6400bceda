"""MNIST for notebooks/05_mnist_memory.ipynb: the collection's sample, or the whole set.

The whole set is used once it is in data/MNIST/raw/, where `torchvision.datasets.MNIST("data")` finds it too;
``python -m helpers.book.data`` (`make data`) puts it there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLE = Path("sample", "mnist.npz")  # arrays named like the whole set's files
FILES = {  # MD5 sums of the whole set's files, unpacked, as published for MNIST
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Split(NamedTuple):
    """Training or test images in memory, as uint8: a quarter of what they take as float32."""

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64
    name: str  # where they come from, such as "sample: 8,192 training and 2,048 test images"


def wrong_files(raw: Path) -> list[str]:
    """Which of the whole set's files are missing in ``raw``, or are not the published ones."""
    return [name for name, md5 in FILES.items() if not check_integrity(raw / name, md5)]


def download(root: Path | str) -> Path:
    """Put the whole set into ``root``/MNIST/raw, unless it is there, and return that folder.

    torchvision downloads, checks and unpacks in a temporary folder. So a download that fails changes nothing.
    """
    raw = Path(root) / "MNIST" / "raw"
    if wrong_files(raw):
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=raw.parent) as folder:
            new = Path(MNIST(folder, download=True).raw_folder)
            for name in FILES:
                os.replace(new / name, raw / name)
    return raw


def load_mnist(
    data: str = "auto", train_images: int = 0, test_images: int = 0, root: Path | str = DATA
) -> tuple[Split, Split]:
    """MNIST for training and for testing.

    Args:
        data: "sample" (in the collection), "full" (the whole set, downloaded if it is missing) or "auto":
            the whole set if it is in ``root``/MNIST/raw, else the sample.
        train_images, test_images: use that many, the first ones; 0 means all.

    Raises:
        ValueError: an argument is wrong, or the whole set is there in part, or not as published ("auto").
        OSError, RuntimeError: the download failed.
    """
    if data not in ("auto", "sample", "full"):
        raise ValueError(f"DATA must be auto, sample or full, got {data!r}")
    raw = download(root) if data == "full" else Path(root) / "MNIST" / "raw"
    whole = data != "sample" and any(raw.glob("*-ubyte"))
    if whole and (wrong := wrong_files(raw)):
        advice = "run `make data` to download MNIST again, or remove the folder to use the sample"
        raise ValueError(f"{', '.join(wrong)} in {raw} must be there and as published: {advice}")
    if whole:
        parts = [(part.data, part.targets) for part in (MNIST(root, train=True), MNIST(root, train=False))]
    else:
        arrays = [torch.from_numpy(array) for array in np.load(Path(root) / SAMPLE).values()]
        parts = [arrays[:2], arrays[2:]]
    wanted, pairs = {"TRAIN_IMAGES": train_images, "TEST_IMAGES": test_images}, []
    for (name, count), (images, labels) in zip(wanted.items(), parts, strict=True):
        if not 0 <= count <= len(images):
            raise ValueError(f"{name} must be from 0 (which means all) to {len(images):,}, got {count:,}")
        pairs.append((images[: count or None], labels[: count or None].long()))
    n_train, n_test = (len(images) for images, _ in pairs)
    name = f"{'whole set' if whole else 'sample'}: {n_train:,} training and {n_test:,} test images"
    return Split(*pairs[0], name), Split(*pairs[1], name)


def main() -> str | None:
    """What is wrong, or None."""
    try:
        print(f"MNIST is in {os.path.relpath(download(DATA))}")
    except (OSError, RuntimeError) as error:
        return f"MNIST could not be downloaded: {error}"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m helpers.book.data", description=__doc__).parse_args()
    sys.exit(main())  # words go to stderr, with the status 1
