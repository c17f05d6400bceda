"""The tutorial's network for MNIST and its training loop, for notebooks/05_mnist_memory.ipynb."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.book.data import Split

MEAN, STD = 0.1307, 0.3081  # of the training pixels, on a scale of 0 to 1
Device = torch.device | str
STEPS_PER_EPOCH = 30  # at least; one pass over the whole set at batch size 2,048 has 30


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; "auto" is the accelerator if there is one, else the CPU."""
    here = torch.accelerator.current_accelerator(check_available=True)
    allowed = ["auto", "cpu", *([here.type] if here else [])]
    if name not in allowed:
        raise ValueError(f"DEVICE must be one of {', '.join(allowed)} on this machine, got {name!r}")
    return torch.device(name) if name != "auto" else here or torch.device("cpu")


def check_batch_size(split: Split, batch_size: int) -> None:
    n = len(split.images)
    if not 1 <= batch_size <= n:
        raise ValueError(f"BATCH_SIZE must be from 1 to {n:,}, the number of images, got {batch_size:,}")


def batches(
    split: Split, batch_size: int, device: Device, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over ``split``: x (B, 1, 28, 28) float32, normalised, and labels (B,), both on ``device``.

    The last batch may be smaller. A generator on the CPU shuffles the pass; None keeps the order.
    """
    check_batch_size(split, batch_size)
    n = len(split.images)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)

    def batch(index):  # bytes travel to the device; they grow to float32 there, in one buffer
        x = split.images[index].to(device).unsqueeze(1).float()
        return x.div_(255).sub_(MEAN).div_(STD), split.labels[index].to(device)

    return map(batch, order.split(batch_size))


def pair(in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> nn.Sequential:
    """Convolution without bias, then batch norm: PyTorch's own two layers, named conv and bn."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class Net(nn.Module):
    """The tutorial's network for 28x28 digits: (N, 1, 28, 28) -> (N, 10) log-probabilities.

    ``conv_bn(in_channels, out_channels, kernel_size)`` makes each of the two convolutions with their batch
    norm: `pair`, or a fused layer in its place.
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


def train(
    model: nn.Module, split: Split, epochs: int, batch_size: int, lr: float = 1.0, gamma: float = 0.7,
    seed: int = 0, device: Device = "cpu",
    measure: Callable[[], object] = lambda: nullcontext(SimpleNamespace(mark=lambda label: None)),
) -> list[float]:  # fmt: skip
    """Train as the tutorial does: Adadelta, the learning rate times ``gamma`` about eight times an epoch.

    An epoch is as many passes over ``split`` as give it `STEPS_PER_EPOCH` steps: so one of the sample trains
    about as long as one of the whole set. ``seed`` decides the shuffling and dropout.

    ``measure`` makes a context manager for each step, around forward, loss, backward and optimiser step; its
    ``mark("end of forward")`` is called between the loss and backward. The batch is on the device, and the
    last step's gradients are gone, before the context is entered. Returns the loss of each step.
    """
    if epochs < 1:
        raise ValueError(f"EPOCHS must be at least 1, got {epochs}")
    check_batch_size(split, batch_size)
    model.to(device).train()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=lr)
    per_pass = math.ceil(len(split.images) / batch_size)
    passes = math.ceil(STEPS_PER_EPOCH / per_pass)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, math.ceil(passes * per_pass / 8), gamma)
    losses: list[float] = []
    for _ in range(epochs * passes):
        for x, labels in batches(split, batch_size, device, generator):
            optimizer.zero_grad()
            with measure() as step:
                loss = F.nll_loss(model(x), labels)
                step.mark("end of forward")
                loss.backward()
                optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses


def test(model: nn.Module, split: Split, batch_size: int, device: Device = "cpu") -> tuple[float, float]:
    """(mean loss, accuracy from 0 to 1) of ``model`` on ``split``; it leaves the model in eval mode."""
    model.to(device).eval()
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for x, labels in batches(split, batch_size, device):
            log_p = model(x)
            loss += F.nll_loss(log_p, labels, reduction="sum").item()
            correct += (log_p.argmax(1) == labels).sum().item()
    return loss / len(split.images), correct / len(split.images)
