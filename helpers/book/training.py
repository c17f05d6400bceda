"""Training: the tutorial's network for MNIST, and its training loop, for notebooks/05_mnist_memory.ipynb."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.book.data import Split

__all__ = ["Net", "batches", "pair", "pick_device", "test", "train"]

MEAN, STD = 0.1307, 0.3081  # of the training pixels, on a scale of 0 to 1
STEPS_PER_EPOCH = 30  # the least that an epoch holds; the whole set at batch size 2,048 has 30 steps

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
