"""MNIST: whole, sample, corrupt, downloaded; the network and its loop on synthetic digits."""

import gzip
import hashlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.book import data as mnist
from helpers.book import training
from helpers.book.data import FILES, Split, download, load_mnist
from helpers.book.training import Net, batches, pair, pick_device, train

ROOT = Path(__file__).resolve().parents[3]

NAMES = list(FILES)


def idx(tensor):
    """uint8 values as the bytes of an IDX file."""
    sizes = b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    return bytes((0, 0, 8, tensor.dim())) + sizes + tensor.numpy().tobytes()


@pytest.fixture
def whole(monkeypatch):
    """A small set in the place of the whole one: the contents of its files by name, under new checksums."""
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for part, n in (("train", 60), ("t10k", 20)):
        images = torch.randint(256, (n, 28, 28), generator=generator).byte()
        contents[f"{part}-images-idx3-ubyte"] = idx(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx(torch.randint(10, (n,), generator=generator).byte())
    monkeypatch.setattr(mnist, "FILES", {name: mnist.md5sum(contents[name]) for name in FILES})
    packed = [(f"{name}.gz", mnist.md5sum(gzip.compress(contents[name], mtime=0))) for name in FILES]
    monkeypatch.setattr(mnist.datasets.MNIST, "resources", packed)
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


def tree(root):
    """Every path below ``root`` with its contents."""
    return {p.relative_to(root): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


# Loading -------------------------------------------------------------------------------------------------


def test_sample_is_what_the_readme_says():
    train_split, test_split = load_mnist("sample")
    for split, n in ((train_split, 8192), (test_split, 2048)):
        assert split.images.shape == (n, 28, 28) and split.images.dtype == torch.uint8
        assert split.labels.shape == (n,) and split.labels.dtype == torch.int64
        assert split.name == "sample: 8,192 training and 2,048 test images"
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\S+-ubyte\.gz)` \| `(\w{64})` \| `(\w{64})` \|", readme)
    assert sorted(row[0] for row in rows) == sorted(f"{name}.gz" for name in NAMES)
    for name, packed, unpacked in rows:
        content = (ROOT / "data" / "sample" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == packed
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == unpacked
    for name, md5 in FILES.items():
        assert f"| `{name}` | `{md5}` |" in readme


def test_cut_sample_is_balanced_and_repeatable(tmp_path):
    sys.path.insert(0, str(ROOT / "data"))
    try:
        import cut_sample
    finally:
        sys.path.remove(str(ROOT / "data"))
    rng = cut_sample.random.Random(3)
    labels = [rng.randrange(10) for _ in range(1000)]
    chosen = cut_sample.choose(labels, 123, cut_sample.random.Random(0))
    assert chosen == cut_sample.choose(labels, 123, cut_sample.random.Random(0))
    assert chosen != cut_sample.choose(labels, 123, cut_sample.random.Random(1))
    counts = [[labels[i] for i in chosen].count(digit) for digit in range(10)]
    assert len(set(chosen)) == 123 and max(counts) - min(counts) == 1
    with pytest.raises(ValueError, match="not enough images"):
        cut_sample.choose(labels, 1000, rng)
    images = torch.arange(3 * 28 * 28).reshape(3, 28, 28).to(torch.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    cut_sample.write_idx(path, images)
    first = path.read_bytes()
    time.sleep(1.1)  # the gzip header's clock ticks once a second
    cut_sample.write_idx(path, images)
    assert path.read_bytes() == first
    assert torch.equal(mnist.parse_idx(mnist.read_bytes(path), path), images)


def test_auto_takes_the_whole_set_only_where_it_stands(root):
    assert load_mnist(root=root)[0].name == "whole set: 60 training and 20 test images"
    for name in NAMES:  # gzipped will do
        path = root / "MNIST" / "raw" / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_mnist(root=root)[1].name == "whole set: 60 training and 20 test images"
    assert load_mnist("full", root=root)[1].images.shape == (20, 28, 28)
    assert load_mnist("sample", root=root)[0].name.startswith("sample: 8,192")
    shutil.rmtree(root / "MNIST")
    assert load_mnist(root=root)[0].name.startswith("sample: 8,192")


@pytest.mark.parametrize("name", NAMES)
def test_part_of_the_whole_set_is_an_error(root, name):
    (root / "MNIST" / "raw" / name).unlink()
    before = tree(root)
    with pytest.raises(FileNotFoundError, match=f"lacks {name}: run `make data`"):
        load_mnist(root=root)
    assert tree(root) == before
    assert load_mnist("sample", root=root)[0].name.startswith("sample")


def test_values_and_labels_come_back_as_they_were_written(root, whole):
    for split, part in zip(load_mnist(root=root), ("train", "t10k"), strict=True):
        assert split.images.numpy().tobytes() == whole[f"{part}-images-idx3-ubyte"][16:]
        assert split.labels.byte().numpy().tobytes() == whole[f"{part}-labels-idx1-ubyte"][8:]


def damage_bytes(content):
    """Ways to damage an IDX file, by name."""
    return {
        "empty": b"",
        "no header": content[:3],
        "half a header": content[:7],
        "truncated": content[:-1],
        "too long": content + b"\0",
        "wrong magic": b"\0\0\x0d" + content[3:],
        "wrong dimensions": content[:3] + bytes((content[3] ^ 2,)) + content[4:],
        "wrong count": content[:4] + (7).to_bytes(4, "big") + content[8:],
        "no items": content[:4] + (0).to_bytes(4, "big") + content[8 : 16 if content[3] == 3 else 8],
        "another value": content[:-1] + bytes(((content[-1] + 1) % 10,)),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", list(damage_bytes(bytes(16))))
@pytest.mark.parametrize("data", ["auto", "full"])
def test_corrupt_file_is_named_and_left(root, whole, name, damage, data):
    write(root, {name: damage_bytes(whole[name])[damage]})
    before = tree(root)
    with pytest.raises(ValueError, match=re.escape(str(root / "MNIST" / "raw" / name))):
        load_mnist(data, root=root)
    assert tree(root) == before


def test_wrong_size_of_image(root, whole, monkeypatch):
    content = idx(torch.zeros(60, 27, 28, dtype=torch.uint8))
    name = NAMES[0]
    write(root, {name: content})
    monkeypatch.setitem(mnist.FILES, name, mnist.md5sum(content))
    with pytest.raises(ValueError, match=r"items? of shape \(28, 28\), its header says \[60, 27, 28\]"):
        load_mnist(root=root)


@pytest.mark.parametrize(
    "labels, message", [([3] * 59, "59 labels for 60 images"), ([10] * 60, "from 0 to 9")]
)
def test_labels_must_fit(root, monkeypatch, labels, message):
    # With the right checksum, so that only the contents can tell.
    content, name = idx(torch.tensor(labels, dtype=torch.uint8)), NAMES[1]
    write(root, {name: content})
    monkeypatch.setitem(mnist.FILES, name, mnist.md5sum(content))
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        load_mnist(root=root)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_torn_gzip(tmp_path, cut):
    shutil.copytree(ROOT / "data" / "sample", tmp_path / "sample")
    path = tmp_path / "sample" / f"{NAMES[1]}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_mnist(root=tmp_path)


def test_flipped_bit_in_gzip(tmp_path):
    shutil.copytree(ROOT / "data" / "sample", tmp_path / "sample")
    path = tmp_path / "sample" / f"{NAMES[2]}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_mnist(root=tmp_path)


def test_first_images():
    whole_train, whole_test = load_mnist("sample")
    cut_train, cut_test = load_mnist("sample", train_images=100, test_images=7)
    assert torch.equal(cut_train.images, whole_train.images[:100])
    assert torch.equal(cut_test.labels, whole_test.labels[:7])
    assert cut_train.name == cut_test.name == "sample: 100 training and 7 test images"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": "all"}, "DATA must be auto, sample or full, got 'all'"),
        ({"train_images": -1}, "TRAIN_IMAGES must be at least 0 .*got -1"),
        ({"test_images": 2049}, "TEST_IMAGES must be at most 2,048.*got 2,049"),
        ({"train_images": 8193}, "TRAIN_IMAGES must be at most 8,192.*got 8,193"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_mnist(**{"data": "sample", **arguments})


# Downloading ---------------------------------------------------------------------------------------------


@contextmanager
def mirror(monkeypatch, answer):
    """A server on the loopback; ``answer(handler, name)`` answers a request for a file. Gives its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path[1:])
            try:
                answer(self, self.path[1:].removesuffix(".gz"))
            except OSError:
                pass  # the client has gone

        def log_message(self, *args):
            pass

    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.asked = asked
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler, content, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def answers(whole):
    """Servers by their fault; "good" has none."""
    packed = {name: gzip.compress(content, mtime=0) for name, content in whole.items()}

    def last(fault):  # only the last of the four files goes wrong
        return lambda handler, name: (fault if name == NAMES[-1] else good)(handler, name)

    def good(handler, name):
        send(handler, packed[name])

    def truncated(handler, name):
        send(handler, packed[name][:-10], len(packed[name]))

    def wrong(handler, name):
        send(handler, packed[name][:-1] + b"x")

    def missing(handler, name):
        handler.send_error(404)

    def silent(handler, name):
        time.sleep(30)

    def dripping(handler, name):  # never silent for long, never done
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(packed[name])))
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.5)

    def page(handler, name):  # a portal's page in the place of the file
        send(handler, b"<html>please log in</html>")

    faults = (truncated, wrong, missing, silent, dripping, page)
    return {"good": good, **{fault.__name__: last(fault) for fault in faults}}


# Long enough for good answers on a slow machine, short beside 30 seconds of a bad one.
LIMITS = {"silent": {"timeout": 2.0}, "dripping": {"time_limit": 4.0}}
FAULTS = {
    "truncated": "the connection closed after",
    "wrong": "wrong contents: MD5",
    "missing": "404",
    "silent": "timed out",
    "dripping": "out of time",
    "page": "wrong contents: MD5",
}


def test_download(tmp_path, whole, monkeypatch):
    with mirror(monkeypatch, answers(whole)["good"]) as (url, asked):
        assert download(tmp_path, [url]) is True
        assert asked == [f"{name}.gz" for name in NAMES]
        assert tree(tmp_path / "MNIST" / "raw") == {
            p.relative_to(p.parent): whole[p.name] for p in (tmp_path / "MNIST" / "raw").iterdir()
        }
        assert [p.name for p in (tmp_path / "MNIST").iterdir()] == ["raw"]
        assert load_mnist(root=tmp_path)[0].name.startswith("whole set: 60")
        # torchvision's own reader agrees.
        theirs = mnist.datasets.MNIST(tmp_path, train=True)
        assert torch.equal(theirs.data, load_mnist(root=tmp_path)[0].images)
        assert torch.equal(theirs.targets, load_mnist(root=tmp_path)[0].labels)
        assert download(tmp_path, [url]) is False
        assert len(asked) == 4  # nothing is fetched again


def test_full_downloads(tmp_path, whole, monkeypatch):
    with mirror(monkeypatch, answers(whole)["good"]) as (url, _):
        monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", [url])
        assert load_mnist("full", root=tmp_path)[1].name == "whole set: 60 training and 20 test images"


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_download_changes_nothing(tmp_path, whole, monkeypatch, fault):
    with mirror(monkeypatch, answers(whole)[fault]) as (url, _):
        with pytest.raises(RuntimeError, match=f"{NAMES[-1]}.gz: .*{FAULTS[fault]}"):
            download(tmp_path / "data", [url], **LIMITS.get(fault, {}))
        assert tree(tmp_path) == {} or [*tmp_path.rglob("*")] == [tmp_path / "data"]
        # With a part that stood there already, too.
        write(tmp_path, {NAMES[0]: whole[NAMES[0]]})
        before = tree(tmp_path)
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            download(tmp_path, [url], **LIMITS.get(fault, {}))
        assert tree(tmp_path) == before


@pytest.mark.parametrize("fault", ["truncated", "wrong", "missing", "silent", "page"])
def test_second_mirror(tmp_path, whole, monkeypatch, fault):
    servers = answers(whole)
    with (
        mirror(monkeypatch, servers[fault]) as (bad, _),
        mirror(monkeypatch, servers["good"]) as (good, asked),
    ):
        assert download(tmp_path, [bad, good], **LIMITS.get(fault, {}))
        assert asked == [f"{NAMES[-1]}.gz"]  # the first mirror's good files are kept
    assert load_mnist(root=tmp_path)[0].name.startswith("whole set")


def test_nobody_listens(tmp_path, whole):
    with socket.socket() as s:  # bound, not listening: nothing else can take the port
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/"
        with pytest.raises(RuntimeError, match=f"could not be downloaded: {url}.*refused"):
            download(tmp_path, [url])
    assert tree(tmp_path) == {}


def test_download_completes_a_part_and_spares_a_corrupt_file(root, whole, monkeypatch):
    raw = root / "MNIST" / "raw"
    (raw / NAMES[1]).unlink()
    with mirror(monkeypatch, answers(whole)["good"]) as (url, asked):
        assert download(root, [url])
        assert asked == [f"{NAMES[1]}.gz"]
        (raw / NAMES[2]).write_bytes(b"corrupt")
        (raw / NAMES[1]).unlink()
        before = tree(root)
        with pytest.raises(ValueError, match=f"{NAMES[2]} is not the published file"):
            download(root, [url])
    assert tree(root) == before


def test_right_package_with_wrong_contents(tmp_path, whole, monkeypatch):
    monkeypatch.setitem(mnist.FILES, NAMES[3], "0" * 32)
    with mirror(monkeypatch, answers(whole)["good"]) as (url, _):
        with pytest.raises(RuntimeError, match=f"{NAMES[3]} has the MD5 sum"):
            download(tmp_path, [url])
    assert tree(tmp_path) == {}


def test_too_large(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(mnist, "LARGEST_DOWNLOAD", 100)
    with mirror(monkeypatch, answers(whole)["good"]) as (url, _):
        with pytest.raises(RuntimeError, match="more than 100 bytes"):
            download(tmp_path, [url])
    assert tree(tmp_path) == {}


def test_interrupted_download_changes_nothing(tmp_path, whole, monkeypatch):
    def fetch(url, *args):
        if NAMES[1] in url:
            raise KeyboardInterrupt
        return gzip.compress(whole[NAMES[0]], mtime=0)

    monkeypatch.setattr(mnist, "fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path, ["http://127.0.0.1/"])
    assert tree(tmp_path) == {}


def test_command_line(tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "DATA", tmp_path)
    with mirror(monkeypatch, answers(whole)["missing"]) as (url, _):
        monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", [url])
        assert mnist.main(["download"]) == 1
        out, err = capsys.readouterr()
        assert err.startswith("data: MNIST could not be downloaded") and err.count("\n") == 1 and not out
    with mirror(monkeypatch, answers(whole)["good"]) as (url, _):
        monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", [url])
        assert mnist.main(["download"]) == 0
        assert "now stands" in capsys.readouterr().out
        assert mnist.main(["download"]) == 0
        assert "stands already" in capsys.readouterr().out
    monkeypatch.setattr(mnist, "download", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert mnist.main(["download"]) == 130
    command = [sys.executable, "-m", "helpers.book.data"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage:")


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

    def shuffled(seed):
        found = [labels for _, labels in batches(digits, 40, "cpu", torch.Generator().manual_seed(seed))]
        return torch.cat(found)

    assert torch.equal(shuffled(1), shuffled(1))
    assert not torch.equal(shuffled(1), shuffled(2))
    assert torch.equal(shuffled(1).sort().values, digits.labels.sort().values)
    pairs = batches(digits, 96, "cpu", torch.Generator().manual_seed(3))
    x, labels = next(pairs)  # an image keeps its label
    assert torch.equal(x[:, 0, 4:24:2].mean(2).argmax(1), labels)
    assert digits.images.dtype == torch.uint8 and digits.images.max() == 255  # the split is as it was


@pytest.mark.parametrize("size", [0, -1, 97])
def test_batch_size_is_checked_at_the_call(digits, size):
    message = f"BATCH_SIZE must be from 1 to 96, .*got {size}"
    model = nn.Flatten()
    for call in (
        lambda: batches(digits, size, "cpu"),
        lambda: train(model, digits, 1, size),
        lambda: training.test(model, digits, size),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="EPOCHS must be at least 1, got 0"):
        train(model, digits, 0, 8)


def test_pair_and_net():
    layer = pair(3, 5, 2)
    assert list(layer.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip
    made = []

    def factory(*arguments):
        made.append(arguments)
        return pair(*arguments)

    model = Net(factory)
    assert made == [(1, 32, 3), (32, 64, 3)]
    assert list(model.state_dict()) == list(Net().state_dict())
    out = model(torch.randn(2, 1, 28, 28))
    assert out.shape == (2, 10)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2))


def test_net_is_the_composition_it_says():
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(3, 1, 28, 28, dtype=torch.float64)
    for layer in (model.conv_bn1.bn, model.conv_bn2.bn):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    y = model.conv_bn2(model.conv_bn1(x).relu()).relu()
    y = nn.functional.max_pool2d(y, 2).flatten(1)
    expected = model.fc2(model.fc1(y).relu()).log_softmax(1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "images, batch_size, passes", [(60000, 2048, 1), (8192, 2048, 8), (96, 96, 30), (96, 1, 1), (96, 40, 10)]
)
def test_passes_per_epoch(images, batch_size, passes):
    assert training.passes_per_epoch(images, batch_size) == passes


def test_train_and_test(digits):
    class Measure:
        """Notes what happens inside a step."""

        def __enter__(self):
            gradients = [p.grad is None for p in model.parameters()]
            assert all(gradients), "the last step's gradients are still there"
            events.append("enter")
            return self

        def mark(self, label):
            assert all(p.grad is None for p in model.parameters()), "backward came before the mark"
            events.append(label)

        def __exit__(self, *error):
            assert all(p.grad is not None for p in model.parameters()), "backward is not in the step"
            events.append("exit")

    def run():
        nonlocal model
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.1), nn.LogSoftmax(1))
        before = training.test(model, digits, 40)
        losses = train(model, digits, 2, 40, seed=5, on_step=lambda *a: steps.append(a), measure=Measure)
        return before, losses

    model, events, steps = None, [], []
    before, losses = run()
    assert events == ["enter", "end of forward", "exit"] * 60
    assert steps == [(i + 1, 60, loss) for i, loss in enumerate(losses)]
    loss, accuracy = training.test(model, digits, 40)
    assert loss < before[0] / 2 and accuracy > 0.9 > before[1]
    first, seeds = losses, run()[1]
    assert first == seeds  # the seed decides it all


def test_learning_rate_falls_eight_times_an_epoch(digits, monkeypatch):
    rates = []

    class Watched(torch.optim.Adadelta):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "Adadelta", Watched)
    train(nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1)), digits, 3, 40, lr=0.5, gamma=0.1)
    # 30 steps an epoch: an eighth, rounded up, is 4
    assert rates == pytest.approx([0.5 * 0.1 ** (step // 4) for step in range(90)])


def test_test_is_exact_and_restores_the_mode(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.5), nn.LogSoftmax(1))
    model[1].eval()  # a module that the caller froze stays so
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loss, accuracy = training.test(model, digits, 40)
    assert [m.training for m in model] == [True, False, True, True] and model.training
    x = torch.cat([x for x, _ in batches(digits, 96, "cpu")])
    log_p = model[3](model[1](model[0](x)))
    assert accuracy == pytest.approx((log_p.argmax(1) == digits.labels).double().mean().item())
    assert loss == pytest.approx(nn.functional.nll_loss(log_p, digits.labels).item(), rel=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_net_trains(digits):
    torch.manual_seed(0)
    small = Split(digits.images[:20], digits.labels[:20], digits.name)
    model = Net()
    losses = train(model, small, 1, 10)
    assert len(losses) == 30 and training.test(model, small, 10)[1] > 0.9
