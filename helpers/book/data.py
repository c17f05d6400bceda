"""MNIST for notebooks/05_mnist_memory.ipynb: the collection's sample, or the whole set from torchvision."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST

DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLE = Path("sample", "mnist.npz")  # arrays named like the whole set's files


class Split(NamedTuple):
    """Training or test images in memory, as uint8: a quarter of what they take as float32."""

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64
    name: str  # where they come from, such as "sample: 8,192 training and 2,048 test images"


def load_mnist(
    data: str = "auto", train_images: int = 0, test_images: int = 0, root: Path | str = DATA
) -> tuple[Split, Split]:
    """MNIST for training and for testing.

    Args:
        data: "sample" (in the collection), "full" (the whole set, downloaded if it is missing) or "auto":
            the whole set if its four files are in ``root``/MNIST/raw, else the sample.
        train_images, test_images: use that many, the first ones; 0 means all.

    Raises:
        ValueError: an argument is wrong, a file is damaged, or the download failed.
    """
    if data not in ("auto", "sample", "full"):
        raise ValueError(f"DATA must be auto, sample or full, got {data!r}")
    files = [Path(root, "MNIST", "raw", packed).with_suffix("") for packed, _ in MNIST.resources]
    whole = data == "full" or (data == "auto" and all(file.exists() for file in files))
    if whole:
        try:
            sets = [MNIST(root, train, download=data == "full") for train in (True, False)]
        except Exception as error:  # of the network, or whatever is wrong with a file
            why, raw = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":"), files[0].parent
            advice = f"remove what is damaged in {raw}, or take DATA=sample"
            raise ValueError(f"DATA={data} could not be read: {why}; {advice}") from error
        parts = [(part.data, part.targets) for part in sets]
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
