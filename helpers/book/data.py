"""MNIST: the images, the tutorial's network, and its training loop, for notebooks/05_mnist_memory.ipynb.

The collection carries a sample of MNIST in data/sample/, so that every page runs offline. The whole set
is used where it stands in data/MNIST/raw/, the folder that `torchvision.datasets.MNIST("data")` reads;
``python -m helpers.book.data download`` (`make data`) puts it there.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

__all__ = ["Split", "download", "load_mnist"]

DATA = Path(__file__).resolve().parents[2] / "data"
MEAN, STD = 0.1307, 0.3081  # of the training pixels, on a scale of 0 to 1
STEPS_PER_EPOCH = 30  # the least that an epoch holds; the whole set at batch size 2,048 has 30 steps

# MD5 sums of the four files, uncompressed, as published for MNIST.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
IDX_SHAPES = {"idx3": (28, 28), "idx1": ()}  # the shape of one item in a file of that kind
LARGEST_DOWNLOAD = 16 << 20  # bytes; the largest of the four files has 9.5 MiB


class Split(NamedTuple):
    """Training or test images in memory, as uint8: a quarter of what they take as float32."""

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64
    name: str  # where they come from, such as "sample: 8,192 training and 2,048 test images"


# Reading -------------------------------------------------------------------------------------------------


def find_file(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain or gzipped, or None."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """The contents of ``path``, unpacked if it ends in .gz."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as f:
            return f.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def parse_idx(content: bytes, path: Path) -> Tensor:
    """The uint8 tensor in an IDX file of MNIST; ``path`` says which kind it must be.

    IDX: two zero bytes, the type (8 = unsigned byte), the number of dimensions, then the size of each
    as a big-endian int32, then the values in C order.
    """
    item = next(shape for kind, shape in IDX_SHAPES.items() if kind in path.name)
    magic = bytes((0, 0, 8, 1 + len(item)))
    header = 4 * (2 + len(item))
    if content[:4] != magic:
        raise ValueError(
            f"{path} must begin with the bytes {magic.hex()}, got {content[:4].hex() or 'nothing'}"
        )
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) < header or tuple(sizes[1:]) != item or sizes[0] < 1:
        raise ValueError(f"{path} must hold at least one item of shape {item}, its header says {sizes}")
    size = header + math.prod(sizes)
    if len(content) != size:
        raise ValueError(f"{path} must be {size:,} bytes long for sizes {sizes}, it is {len(content):,}")
    # A bytearray, since a tensor may be written to and bytes may not.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


def read_folder(folder: Path, md5: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((training images, labels), (test images, labels)) from the four IDX files in ``folder``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupt, or (with ``md5``) is not the one published. The message names it.
    """
    tensors = {}
    for name, digest in FILES.items():
        path = find_file(folder, name)
        if path is None:
            raise FileNotFoundError(f"{folder / name} is missing")
        content = read_bytes(path)
        tensor = parse_idx(content, path)
        if "labels" in name:
            images = tensors[name.replace("labels", "images").replace("idx1", "idx3")]
            if len(images) != len(tensor):
                raise ValueError(f"{path} has {len(tensor):,} labels for {len(images):,} images")
            if tensor.max() > 9:
                raise ValueError(f"{path} must hold labels from 0 to 9, it holds {int(tensor.max())}")
            tensor = tensor.long()
        if md5 and md5sum(content) != digest:
            raise ValueError(f"{path} is not the published file: MD5 {md5sum(content)}, expected {digest}")
        tensors[name] = tensor
    train_images, train_labels, test_images, test_labels = tensors.values()
    return (train_images, train_labels), (test_images, test_labels)


def md5sum(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def standing(raw: Path) -> bool:
    """Whether the whole set's four files are in ``raw``; a part of them is an error."""
    missing = [name for name in FILES if find_file(raw, name) is None]
    if missing and len(missing) < len(FILES):
        raise FileNotFoundError(
            f"{raw} lacks {', '.join(missing)}: "
            "run `make data` to complete it, or remove the folder to use the sample"
        )
    return not missing


def load_mnist(
    data: str = "auto", train_images: int = 0, test_images: int = 0, root: Path | str | None = None
) -> tuple[Split, Split]:
    """Load MNIST.

    Args:
        data: "sample" (in the collection), "full" (the whole set, downloaded if it is missing) or "auto":
            the whole set if its four files stand in ``root``/MNIST/raw, plain or gzipped, else the sample.
        train_images, test_images: use that many, the first ones; 0 means all.
        root: the folder with sample/ and MNIST/raw/; None is the collection's data/.

    Returns:
        ``(train, test)``, two `Split`.

    Raises:
        ValueError: an argument is wrong, or a file is corrupt. The file stays, and none of the four is used.
        FileNotFoundError: some of the whole set's files are missing (in "auto").
        RuntimeError: the download failed.
    """
    root = DATA if root is None else Path(root)
    if data not in ("auto", "sample", "full"):
        raise ValueError(f"DATA must be auto, sample or full, got {data!r}")
    wanted = {"TRAIN_IMAGES": train_images, "TEST_IMAGES": test_images}
    for name, count in wanted.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0 (which means all), got {count}")
    raw = root / "MNIST" / "raw"
    if data == "full":
        download(root)
    whole = data == "full" or (data == "auto" and standing(raw))
    splits = read_folder(raw, md5=True) if whole else read_folder(root / "sample", md5=False)
    for (name, count), (images, _) in zip(wanted.items(), splits, strict=True):
        if count > len(images):
            raise ValueError(f"{name} must be at most {len(images):,}, the images there are, got {count:,}")
    splits = [(x[: n or None], t[: n or None]) for n, (x, t) in zip(wanted.values(), splits, strict=True)]
    n_train, n_test = (len(images) for images, _ in splits)
    name = f"{'whole set' if whole else 'sample'}: {n_train:,} training and {n_test:,} test images"
    train_split, test_split = (Split(images, labels, name) for images, labels in splits)
    return train_split, test_split


# Downloading ---------------------------------------------------------------------------------------------


def fetch(url: str, md5: str, timeout: float, deadline: float) -> bytes:
    """The bytes at ``url``, whose MD5 sum must be ``md5``; nothing is written."""
    received, name = bytearray(), url.rsplit("/", 1)[-1]
    patience = max(0.001, min(timeout, deadline - time.monotonic()))
    with urllib.request.urlopen(url, timeout=patience) as response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None) as bar:
            # read1 comes back after one packet, so that a server that drips cannot outlast the deadline.
            while chunk := response.read1(1 << 16):
                received += chunk
                bar.update(len(chunk))
                if time.monotonic() > deadline:
                    raise TimeoutError("out of time")
                if len(received) > LARGEST_DOWNLOAD:
                    raise OSError(f"more than {LARGEST_DOWNLOAD:,} bytes")
    if total is not None and len(received) != total:
        raise OSError(f"the connection closed after {len(received):,} of {total:,} bytes")
    if md5sum(received) != md5:
        raise OSError(f"wrong contents: MD5 {md5sum(received)}, expected {md5}")
    return bytes(received)


def download(
    root: Path | str | None = None,
    mirrors: Sequence[str] | None = None,
    timeout: float = 30.0,
    time_limit: float = 1800.0,
) -> bool:
    """Put the whole set into ``root``/MNIST/raw, as torchvision would, and say whether that took a download.

    Files that stand there already are checked and kept. The others are fetched into a temporary folder,
    checked compressed and uncompressed, and moved in together once all of them are right: until then
    nothing changes, whatever goes wrong.

    Args:
        root: the folder for MNIST/raw/; None is the collection's data/.
        mirrors: addresses to try in turn, each ending in "/"; None is torchvision's list.
        timeout: seconds that a connection may be silent.
        time_limit: seconds for the whole download.

    Raises:
        ValueError: a file that stands there is corrupt. It stays.
        RuntimeError: a file could not be had from any mirror. The message says why, mirror by mirror.
    """
    base = (DATA if root is None else Path(root)) / "MNIST"
    raw = base / "raw"
    mirrors = datasets.MNIST.mirrors if mirrors is None else mirrors
    packed = {name.removesuffix(".gz"): md5 for name, md5 in datasets.MNIST.resources}
    missing = []
    for name, digest in FILES.items():
        path = find_file(raw, name)
        if path is None:
            missing.append(name)
        elif (found := md5sum(read_bytes(path))) != digest:
            raise ValueError(
                f"{path} is not the published file: MD5 {found}, expected {digest}; remove it first"
            )
    if not missing:
        return False

    deadline = time.monotonic() + time_limit
    new_folders = [folder for folder in (raw, base) if not folder.exists()]
    raw.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=base) as temporary:
            for name in missing:
                failures = []
                for mirror in mirrors:
                    url = f"{mirror}{name}.gz"
                    try:
                        content = gzip.decompress(fetch(url, packed[name], timeout, deadline))
                        break
                    except (OSError, http.client.HTTPException, EOFError, zlib.error, ValueError) as error:
                        failures.append(f"{url}: {error or type(error).__name__}")
                else:
                    raise RuntimeError(f"MNIST could not be downloaded: {'; '.join(failures)}")
                if md5sum(content) != FILES[name]:
                    raise RuntimeError(f"{name} has the MD5 sum {md5sum(content)}, expected {FILES[name]}")
                (Path(temporary) / name).write_bytes(content)
            for name in missing:
                os.replace(Path(temporary) / name, raw / name)
    finally:
        for folder in new_folders:
            if not any(folder.iterdir()):
                folder.rmdir()
    return True


def main(argv: Sequence[str]) -> int:
    if list(argv) != ["download"]:
        print("usage: python -m helpers.book.data download", file=sys.stderr)
        return 2
    try:
        new = download()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("data: interrupted, nothing is changed", file=sys.stderr)
        return 130
    print(f"MNIST {'now stands' if new else 'stands already'} in {os.path.relpath(DATA / 'MNIST' / 'raw')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
