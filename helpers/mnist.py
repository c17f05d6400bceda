"""MNIST: the images, the tutorial's network, and its training loop, for notebooks/05_mnist_memory.ipynb.

The collection carries a sample of MNIST in data/sample/, so that every page runs offline. The whole set
is used where it stands in data/MNIST/raw/, the folder that `torchvision.datasets.MNIST("data")` reads;
``python -m helpers.mnist download`` (`make data`) puts it there.
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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets
from tqdm import tqdm

__all__ = ["Net", "Split", "batches", "download", "load_mnist", "pair", "pick_device", "test", "train"]

DATA = Path(__file__).resolve().parent.parent / "data"
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


# Training ------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here else 0
    if name == "auto":
        return here or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device == torch.device("cpu") or (
        device is not None and here is not None and device.type == here.type and (device.index or 0) < count
    ):
        return device
    allowed = ["auto", "cpu"] + ([here.type] + [f"{here.type}:{i}" for i in range(count)] if here else [])
    raise ValueError(f"DEVICE must be one of {', '.join(allowed)} on this machine, got {name!r}")


def check_batch_size(split: Split, batch_size: int) -> None:
    n = len(split.images)
    if not 1 <= batch_size <= n:
        raise ValueError(f"BATCH_SIZE must be from 1 to {n:,}, the images there are, got {batch_size:,}")


def batches(
    split: Split, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over ``split``: x (B, 1, 28, 28) float32, normalised, and labels (B,), both on ``device``.

    Args:
        batch_size: B; the last batch holds what is left, and may be smaller.
        generator: a generator on the CPU shuffles the pass; None keeps the order.

    Raises:
        ValueError: ``batch_size`` is below 1 or above the number of images.
    """
    check_batch_size(split, batch_size)  # at the call, not at the first batch

    def one_pass():
        n = len(split.images)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for index in order.split(batch_size):
            # Bytes travel to the device; they grow to float32 there, in one buffer.
            x = split.images[index].to(device).unsqueeze(1).float()
            yield x.div_(255).sub_(MEAN).div_(STD), split.labels[index].to(device)

    return one_pass()


def pair(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, then batch norm: PyTorch's own two layers, named conv and bn."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class Net(nn.Module):
    """The tutorial's network for 28x28 digits: (N, 1, 28, 28) -> (N, 10) log-probabilities.

    Args:
        conv_bn: called as ``conv_bn(in_channels, out_channels, kernel_size)``, makes each of the two
            convolutions with their batch norm: `pair`, or a fused layer in its place.
    """

    def __init__(self, conv_bn: Callable[[int, int, int], nn.Module] = pair):
        super().__init__()
        self.conv_bn1 = conv_bn(1, 32, 3)
        self.conv_bn2 = conv_bn(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_bn1(x))
        x = F.relu(self.conv_bn2(x))
        x = F.relu(F.max_pool2d(x, 2))
        x = F.relu(self.dropout(self.fc1(x.flatten(1))))
        return F.log_softmax(self.fc2(x), dim=1)


class _NoMeasure:
    """The measure that measures nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def mark(self, label: str) -> None:
        pass


def passes_per_epoch(images: int, batch_size: int) -> int:
    """Passes over the images until an epoch holds `STEPS_PER_EPOCH` optimiser steps."""
    return math.ceil(STEPS_PER_EPOCH / math.ceil(images / batch_size))


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    batch_size: int,
    lr: float = 1.0,
    gamma: float = 0.7,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], object] | None = None,
    measure: Callable[[], object] = _NoMeasure,
) -> list[float]:
    """Train as the tutorial does: Adadelta, the learning rate times ``gamma`` eight times an epoch.

    An epoch is one pass over ``split``, repeated until it holds at least `STEPS_PER_EPOCH` steps, so that
    an epoch of the sample trains about as long as one of the whole set. The tutorial lowers the rate after
    each pass; of the sample an epoch has eight, so that is what the whole set gets, too.

    Args:
        model: moved to ``device``, and left in training mode.
        seed: of the shuffling, and of torch's global generators, which dropout draws from.
        on_step: called after each step with (steps done, steps in all, loss).
        measure: makes a context manager for each step, around forward, loss, backward and optimiser step;
            its ``mark("end of forward")`` is called between the loss and backward. The batch is on the
            device, and the last step's gradients are gone, before the context is entered.

    Returns:
        The loss of each step.

    Raises:
        ValueError: ``epochs`` or ``batch_size`` is out of range.
    """
    if epochs < 1:
        raise ValueError(f"EPOCHS must be at least 1, got {epochs}")
    check_batch_size(split, batch_size)
    model.to(device).train()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=lr)
    passes = passes_per_epoch(len(split.images), batch_size)
    steps = passes * math.ceil(len(split.images) / batch_size)
    total = epochs * steps
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=math.ceil(steps / 8), gamma=gamma)
    losses: list[float] = []
    for _ in range(epochs):
        for _ in range(passes):
            for x, labels in batches(split, batch_size, device, generator):
                optimizer.zero_grad()
                with measure() as step:
                    loss = F.nll_loss(model(x), labels)
                    step.mark("end of forward")
                    loss.backward()
                    optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                if on_step is not None:
                    on_step(len(losses), total, losses[-1])
    return losses


def test(
    model: nn.Module, split: Split, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """(mean loss, accuracy from 0 to 1) of ``model`` on ``split``, in eval mode; the mode is restored."""
    check_batch_size(split, batch_size)
    modes = [(module, module.training) for module in model.modules()]
    model.to(device).eval()
    loss, correct = 0.0, 0
    try:
        with torch.inference_mode():
            for x, labels in batches(split, batch_size, device):
                log_p = model(x)
                loss += F.nll_loss(log_p, labels, reduction="sum").item()
                correct += (log_p.argmax(1) == labels).sum().item()
    finally:
        for module, training in modes:
            module.training = training
    return loss / len(split.images), correct / len(split.images)


def main(argv: Sequence[str]) -> int:
    if list(argv) != ["download"]:
        print("usage: python -m helpers.mnist download", file=sys.stderr)
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
