"""MNIST for notebooks/05_mnist_memory.ipynb: the collection's sample, or the whole set.

The whole set is used once it is in data/MNIST/raw/, where `torchvision.datasets.MNIST("data")` finds it too;
``python -m helpers.book.data download`` (`make data`) puts it there.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

DATA = Path(__file__).resolve().parents[2] / "data"
FILES = {  # MD5 sums of the whole set's files, unpacked, as published for MNIST
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SAMPLE = "sample/mnist.npz", "60cea32a0977c1fdb870e5d1af1494c6"  # arrays named like the whole set's files


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


def missing_files(raw: Path) -> list[str]:
    """Which of the whole set's files are not in ``raw``. One that is there must be the published one."""
    return [name for name, md5 in FILES.items() if not ((raw / name).is_file() and check(raw / name, md5))]


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
        FileNotFoundError: a part of the whole set is there ("auto").
        RuntimeError: the download failed.
    """
    if data not in ("auto", "sample", "full"):
        raise ValueError(f"DATA must be auto, sample or full, got {data!r}")
    raw = Path(root) / "MNIST" / "raw"
    if data == "full":
        download(root)
    whole = data == "full" or (data == "auto" and any(raw.glob("*-ubyte*")))
    if whole and (missing := missing_files(raw)):
        advice = "run `make data` to complete it, or remove the folder to use the sample"
        raise FileNotFoundError(f"{raw} lacks {', '.join(missing)}: {advice}")
    if whole:
        tensors = [(read_image_file if "images" in name else read_label_file)(raw / name) for name in FILES]
    else:
        with np.load(check(Path(root) / SAMPLE[0], SAMPLE[1])) as arrays:
            tensors = [torch.from_numpy(arrays[name]) for name in FILES]
    wanted, pairs = {"TRAIN_IMAGES": train_images, "TEST_IMAGES": test_images}, []
    for (name, count), images, labels in zip(wanted.items(), tensors[::2], tensors[1::2], strict=True):
        n = len(images)
        if not 0 <= count <= n:
            raise ValueError(f"{name} must be from 0 (which means all) to {n:,}, got {count:,}")
        pairs.append((images[: count or n], labels[: count or n].long()))
    n_train, n_test = (len(images) for images, _ in pairs)
    name = f"{'whole set' if whole else 'sample'}: {n_train:,} training and {n_test:,} test images"
    return Split(*pairs[0], name), Split(*pairs[1], name)


def download(root: Path | str = DATA, timeout: float = 30.0) -> bool:
    """Put the whole set into ``root``/MNIST/raw, and say whether that took a download.

    It is unpacked in a temporary folder, and moves in once all of it is right. A corrupt file that is there
    already is a ValueError. ``timeout``: seconds that a connection may be silent.
    """
    raw, before = Path(root) / "MNIST" / "raw", socket.getdefaulttimeout()
    if not missing_files(raw):
        return False
    raw.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(timeout)  # torchvision would wait for ever
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=raw.parent) as folder:
            new = Path(MNIST(folder, download=True).raw_folder)
            for path in [check(new / name, md5) for name, md5 in FILES.items()]:
                os.replace(path, raw / path.name)
    except (OSError, RuntimeError, HTTPException) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"MNIST could not be downloaded: {words}") from error
    finally:
        socket.setdefaulttimeout(before)
    return True


def main(arguments: list[str]) -> str | None:
    """What is wrong, or None."""
    if arguments != ["download"]:
        return "usage: python -m helpers.book.data download"
    try:
        came = "is now" if download(DATA) else "was already"
    except (OSError, RuntimeError, ValueError, KeyboardInterrupt) as error:
        return f"data: {error if str(error) else 'interrupted'}"
    print(f"MNIST {came} in {os.path.relpath(DATA / 'MNIST' / 'raw')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # words go to stderr, with the status 1
