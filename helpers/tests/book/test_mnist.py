"""MNIST: whole, sample, corrupt, downloaded; the network and its loop on synthetic digits."""

import gzip
import hashlib
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.book import data as mnist
from helpers.book import training
from helpers.book.data import SAMPLE, Split, load_mnist
from helpers.book.training import Net, batches, pair, pick_device, train

ROOT = Path(__file__).resolve().parents[3]
NAMES = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def whole(monkeypatch):
    """A small set in the place of the whole one: the contents of its files by name, under new checksums."""
    generator, contents = torch.Generator().manual_seed(0), {}
    for name in NAMES:
        shape, values = ((28, 28), 256) if "images" in name else ((), 10)
        tensor = torch.randint(values, (60 if "train" in name else 20, *shape), generator=generator).byte()
        sizes = b"".join(n.to_bytes(4, "big") for n in tensor.shape)
        contents[name] = bytes((0, 0, 8, tensor.dim())) + sizes + tensor.numpy().tobytes()
    packed = [(f"{name}.gz", md5(gzip.compress(contents[name], mtime=0))) for name in NAMES]
    monkeypatch.setattr(mnist.MNIST, "resources", packed)
    return contents


@pytest.fixture
def root(tmp_path, whole):
    """A data folder with the sample and the small set in the whole one's place."""
    shutil.copytree(ROOT / "data" / "sample", tmp_path / "sample")
    write(tmp_path, whole)
    return tmp_path


def write(root, contents):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (raw / name).write_bytes(content)


def files(root):
    """Every file below ``root`` with its contents."""
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# Loading -------------------------------------------------------------------------------------------------


def test_sample_is_what_the_readme_says():
    for split, n in zip(load_mnist("sample"), (8192, 2048), strict=True):
        assert split.images.shape == (n, 28, 28) and split.images.dtype == torch.uint8
        assert split.labels.shape == (n,) and split.labels.dtype == torch.int64
        assert split.name == "sample: 8,192 training and 2,048 test images"
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    always = "1cb7d889a9ce8e4d", "0163e37aafae8a50", "53f14ec792004b25", "e1c2f4cb5e001c5e"
    tensors = [t for split in load_mnist("sample") for t in (split.images, split.labels.byte())]
    assert tuple(hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in tensors) == always
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((ROOT / "data" / SAMPLE).read_bytes()).hexdigest() in readme


def test_cut_sample_is_balanced_and_repeatable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    import cut_sample

    labels = torch.randint(10, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    first, again, other = (cut_sample.choose(labels, 123, cut_sample.random.Random(s)) for s in (0, 0, 1))
    counts = [[labels[i] for i in first].count(digit) for digit in range(10)]
    assert first == again != other and len(set(first)) == 123 and max(counts) - min(counts) == 1
    with pytest.raises(ValueError, match="not enough images"):
        cut_sample.choose(labels, 1000, cut_sample.random.Random(0))


def test_auto_takes_the_whole_set_where_it_is(root, whole):
    for data in ("auto", "full"):
        splits = load_mnist(data, root=root)
        for split, part in zip(splits, ("train", "t10k"), strict=True):
            assert split.name == "whole set: 60 training and 20 test images"
            assert split.images.numpy().tobytes() == whole[f"{part}-images-idx3-ubyte"][16:]
            assert split.labels.byte().numpy().tobytes() == whole[f"{part}-labels-idx1-ubyte"][8:]
    assert load_mnist("sample", root=root)[0].name.startswith("sample: 8,192")
    shutil.rmtree(root / "MNIST")
    assert load_mnist(root=root)[0].name.startswith("sample: 8,192")


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_sample_where_the_whole_set_is_not_whole(root, name):
    (root / "MNIST" / "raw" / name).unlink()
    assert load_mnist(root=root)[0].name.startswith("sample")


def test_a_damaged_file_is_named(root):
    (root / "MNIST" / "raw" / NAMES[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="^DATA=auto could not be read: .*remove what is damaged in .*raw"):
        load_mnist(root=root)
    for name in NAMES:  # other names, as some pages have them
        (root / "MNIST" / "raw" / name).rename(root / "MNIST" / "raw" / name.replace("-idx", ".idx"))
    assert load_mnist(root=root)[0].name.startswith("sample")


def test_first_images():
    splits = zip(load_mnist("sample"), load_mnist("sample", train_images=100, test_images=7), strict=True)
    for (whole, cut), n in zip(splits, (100, 7), strict=True):
        assert torch.equal(cut.images, whole.images[:n]) and torch.equal(cut.labels, whole.labels[:n])
        assert cut.name == "sample: 100 training and 7 test images"
    everything = load_mnist("sample", train_images=8192, test_images=2048)
    assert [len(split.images) for split in everything] == [8192, 2048]


WRONG_ARGUMENTS = {
    "DATA must be auto, sample or full, got 'all'": {"data": "all"},
    "TRAIN_IMAGES must be from 0 .* to 8,192, got -1": {"train_images": -1},
    "TRAIN_IMAGES must be from 0 .* to 8,192, got 8,193": {"train_images": 8193},
    "TEST_IMAGES must be from 0 .* to 2,048, got 2,049": {"test_images": 2049},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments(message):
    with pytest.raises(ValueError, match=message):
        load_mnist(**{"data": "sample", **WRONG_ARGUMENTS[message]})


# Downloading ---------------------------------------------------------------------------------------------


@contextmanager
def mirror(monkeypatch, whole, fault=None):
    """A server on the loopback, torchvision's only mirror; the last of the four files has the ``fault``."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:].removesuffix(".gz")
            content, wrong = gzip.compress(whole[name], mtime=0), fault if name == NAMES[-1] else None
            if wrong == "404":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-10] if wrong == "short" else content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(mnist.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_full_downloads_what_is_missing(tmp_path, whole, monkeypatch):
    with mirror(monkeypatch, whole):
        first = load_mnist("full", root=tmp_path)
    assert first[1].name == "whole set: 60 training and 20 test images"
    again = load_mnist("full", root=tmp_path)  # the server is gone: nothing is fetched
    assert all(torch.equal(a, b) for a, b in zip(first[0][:2], again[0][:2], strict=True))


@pytest.mark.parametrize("fault", ["404", "short"])
def test_a_failed_download_is_an_error_until_it_is_taken_up(tmp_path, whole, monkeypatch, fault):
    words = {"404": "404", "short": "corrupted"}[fault]
    wanted = f"^DATA=full could not be read: .*{words}.*take DATA=sample"
    with mirror(monkeypatch, whole, fault), pytest.raises(ValueError, match=wanted):
        load_mnist("full", root=tmp_path)
    with mirror(monkeypatch, whole):
        assert load_mnist("full", root=tmp_path)[1].name.startswith("whole set: 60")


# Training ------------------------------------------------------------------------------------------------


@pytest.fixture
def digits():
    """96 images that a network can learn: a bright bar whose place is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 10
    images = torch.randint(60, (96, 28, 28), generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, 2 * label + 4 : 2 * label + 6] = 255
    return Split(images.byte(), labels, "bars")


def test_pick_device():
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert pick_device() == (here or torch.device("cpu"))
    assert pick_device("cpu") == torch.device("cpu")
    if here is not None:
        assert pick_device(here.type).type == here.type
        with pytest.raises(ValueError, match="DEVICE must be one of"):
            pick_device(f"{here.type}:{torch.accelerator.device_count()}")
    for name in {"gpu", "meta", "", "cpu:x", "cuda", "mps", "xpu"} - {here and here.type}:
        with pytest.raises(ValueError, match=f"DEVICE must be one of auto, cpu.*got {name!r}"):
            pick_device(name)


def test_batches(digits):
    plain = list(batches(digits, 40, "cpu"))
    assert [len(x) for x, _ in plain] == [40, 40, 16]
    x, labels = (torch.cat(part) for part in zip(*plain, strict=True))
    assert x.dtype == torch.float32 and x.shape == (96, 1, 28, 28) and torch.equal(labels, digits.labels)
    expected = (digits.images.double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x[:, 0].double(), expected, atol=1e-6, rtol=0)
    assert digits.images.dtype == torch.uint8 and digits.images.max() == 255  # the split is as it was


def test_batches_shuffle_by_the_generator(digits):
    passes = [list(batches(digits, 40, "cpu", torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    first, again, other = (torch.cat([labels for _, labels in one]) for one in passes)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, digits.labels.sort().values)
    for x, labels in passes[0]:  # an image keeps its label
        assert torch.equal(x[:, 0, 4:24:2].mean(2).argmax(1), labels)


@pytest.mark.parametrize("size", [0, -1, 97])
@pytest.mark.parametrize("call", ["batches(digits, size, 'cpu')", "train(nn.Flatten(), digits, 1, size)",
                                  "training.test(nn.Flatten(), digits, size)"])  # fmt: skip
def test_batch_size_is_checked_at_the_call(digits, size, call):
    with pytest.raises(ValueError, match=f"BATCH_SIZE must be from 1 to 96, .*got {size}"):
        eval(call, globals(), {"digits": digits, "size": size})


def test_epochs_are_checked(digits):
    with pytest.raises(ValueError, match="EPOCHS must be at least 1, got 0"):
        train(nn.Flatten(), digits, 0, 8)


def test_pair_and_net(digits):
    torch.manual_seed(0)
    assert [name for name, _ in pair(3, 5, 2).named_children()] == ["conv", "bn"]
    assert pair(3, 5, 2).conv.bias is None
    made = []
    model = Net(lambda *arguments: made.append(arguments) or pair(*arguments))
    assert made == [(1, 32, 3), (32, 64, 3)]
    assert list(model.state_dict()) == list(Net().state_dict())
    out = model(torch.randn(2, 1, 28, 28))
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2))
    model, few = Net(), Split(*(t[:20] for t in digits[:2]), "few")  # and it learns
    train(model, few, 1, 10)
    assert training.test(model, few, 10)[1] > 0.9


def test_train_and_test(digits):
    class Measure:
        """Notes what happens inside a step, and whether there are gradients."""

        def mark(self, what):
            events.append((what, {p.grad is not None for p in model.parameters()}))

        def __enter__(self):
            self.mark("enter")
            return self

        def __exit__(self, *error):
            self.mark("exit")

    found = []
    for seed in (5, 5, 6):
        events = []
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.1), nn.LogSoftmax(1))
        before = training.test(model, digits, 40)
        torch.manual_seed(len(found))  # of no account
        losses = train(model, digits, 2, 40, seed=seed, measure=Measure)
        assert events == [("enter", {False}), ("end of forward", {False}), ("exit", {True})] * 60
        loss, accuracy = training.test(model, digits, 40)
        assert loss < before[0] / 2 and accuracy > 0.9 > before[1]
        found.append((before, losses, loss))
    assert found[0] == found[1]  # the seeds decide it all
    assert found[2][0] == found[0][0] and found[2][1:] != found[0][1:]


def test_the_seed_decides_the_order_of_the_images(digits):
    losses = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))
        losses.append(train(model, digits, 1, 40, seed=seed))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("batch_size, steps", [(96, 30), (40, 30), (3, 32)])
def test_an_epoch_has_thirty_steps_and_lowers_the_rate_eight_times(digits, monkeypatch, batch_size, steps):
    class Watched(torch.optim.Adadelta):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    rates, model = [], nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))
    monkeypatch.setattr(torch.optim, "Adadelta", Watched)
    assert len(train(model, digits, 2, batch_size, lr=0.5, gamma=0.1)) == 2 * steps
    assert rates == pytest.approx([0.5 * 0.1 ** (step // 4) for step in range(2 * steps)])  # 4: an eighth


def test_test_is_exact_and_changes_no_number(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.5), nn.LogSoftmax(1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loss, accuracy = training.test(model, digits, 40)
    assert not any(m.training for m in model.modules())
    x = torch.cat([x for x, _ in batches(digits, 96, "cpu")])
    log_p = model[3](model[1](model[0](x)))
    assert accuracy == pytest.approx((log_p.argmax(1) == digits.labels).double().mean().item())
    assert loss == pytest.approx(nn.functional.nll_loss(log_p, digits.labels).item(), rel=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
