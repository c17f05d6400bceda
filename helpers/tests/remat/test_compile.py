"""`remat` and torch.compile: right, one graph, and less held by the compiler's own means."""

import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import remat
from helpers.memory import MemoryTrace
from helpers.tests.kernels.rounding import apart, rounding

torchvision = pytest.importorskip("torchvision")
functorch_config = pytest.importorskip("torch._functorch.config")
partitioners = pytest.importorskip("torch._functorch.partitioners")
dynamo = pytest.importorskip("torch._dynamo")

PARTITION = "aot_eager_decomp_partition"  # Inductor's decompositions and cut, without its kernels


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    # The compiler's cache on the disk may hold code for another instruction set, and take it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    dynamo.reset()
    yield
    dynamo.reset()


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend="aot_eager"):
        self.graphs, self.backend = 0, dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


def block(inside, outside, kernel=3, **settings):
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False, **settings)
    norm = nn.BatchNorm2d(outside)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    return nn.Sequential(conv, norm, nn.ReLU())


class Net(nn.Module):
    """A residual sum, a max-pool and a concatenation."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.d = block(3, 8), block(8, 8), block(8, 8), block(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a = F.max_pool2d(self.a(x), 2)
        b = a + self.b(a)
        return self.head(self.d(torch.cat([a, self.c(b)], 1)).mean((2, 3)))


def net():
    return Net().double()


def images(seed=1):
    return torch.randn(4, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model, function, x, context=None, grad_out=None):
    """One forward and backward: the output, gradients and buffers."""
    model.zero_grad()
    with context or nullcontext():
        y = function(x)
    grad_out = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    y.backward(grad_out)
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def check(found, exact):
    assert len(found) == len(exact)
    for mine, theirs in zip(found, exact, strict=True):
        assert apart(mine, theirs) <= rounding(torch.float64, 4 * 120 * 72)


def held(function, x, context=None):
    """Bytes that one forward leaves for its backward."""
    with context or nullcontext():
        function(x).sum().backward()  # compiles
    with MemoryTrace("cpu") as trace:
        with context or nullcontext():
            y = function(x)
        trace.mark("end of forward")
        y.sum().backward()
    return trace.marks["end of forward"]


@pytest.mark.parametrize("backend", ["aot_eager", PARTITION])
def test_a_compiled_model_is_one_graph_over_many_steps(backend):
    """Each `with` makes a mode of its own; the graph is compiled once for all of them."""
    x = images()
    plain, model, counting = net(), net(), Counting(backend)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for _ in range(5):
        check(step(model, compiled, x, remat()), step(plain, plain, x))
    assert counting.graphs == 1


def test_graphs_of_outside_and_inside_stay_apart():
    """A graph is compiled for outside, one for inside, and each serves where it belongs."""
    x = images()
    plain, model, counting = net(), net(), Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for context in (None, remat(), None, remat(), None):
        check(step(model, compiled, x, context), step(plain, plain, x))
    assert counting.graphs == 2


def test_prices_have_graphs_of_their_own():
    x = images()
    plain, model, counting = net(), net(), Counting(PARTITION)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for max_cost in (0, 80, 80, 1000, 0, 80):
        check(step(model, compiled, x, remat(max_cost)), step(plain, plain, x))
    assert counting.graphs == 3


def test_contexts_in_contexts():
    x = images()
    plain, model = net(), net()
    compiled = torch.compile(model, backend=PARTITION, fullgraph=True)
    with remat(max_cost=80):
        found = step(model, compiled, x, remat())
    check(found, step(plain, plain, x))


@pytest.mark.parametrize("part", ["a", "b", "c", "d"])
def test_a_compiled_part_of_an_eager_model(part):
    x = images()
    plain, model, counting = net(), net(), Counting(PARTITION)
    setattr(model, part, torch.compile(getattr(model, part), backend=counting, fullgraph=True))
    for _ in range(3):
        check(step(model, model, x, remat()), step(plain, plain, x))
    assert counting.graphs == 1


@pytest.mark.parametrize("decorated", [False, True])
def test_the_context_inside_of_what_is_compiled(decorated):
    """The compiler takes the context along: the same numbers, and no mode is left behind."""
    x = images()
    plain, model, counting = net(), net(), Counting(PARTITION)

    def forward(x):
        with remat():
            y = model(x)
        return 2 * y

    function = remat()(lambda x: 2 * model(x)) if decorated else forward
    compiled = torch.compile(function, backend=counting, fullgraph=not decorated)
    for _ in range(3):
        check(step(model, compiled, x), step(plain, lambda x: 2 * plain(x), x))
        assert torch.overrides._get_current_function_mode_stack() == []


def test_evaluation_and_no_grad():
    x = images()
    plain, model = net().eval(), net().eval()
    compiled = torch.compile(model, backend=PARTITION, fullgraph=True)
    check(step(model, compiled, x, remat()), step(plain, plain, x))
    with torch.no_grad(), remat():
        assert apart(compiled(x), plain(x)) <= rounding(torch.float64, 100)


def test_graph_breaks():
    """A model in several graphs: each is compiled once."""
    x = images()
    plain, model, counting = net(), net(), Counting(PARTITION)
    model.c.register_forward_hook(lambda *_: dynamo.graph_break())
    compiled = torch.compile(model, backend=counting)
    check(step(model, compiled, x, remat()), step(plain, plain, x))
    first = counting.graphs
    for _ in range(2):
        check(step(model, compiled, x, remat()), step(plain, plain, x))
    assert counting.graphs == first > 1


class Checkpointed(nn.Module):
    """A compiled block, in a checkpoint or not."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 3, 3))
        self.block = torch.compile(self.layers, backend=backend) if backend else self.layers

    def forward(self, x, inside=True):
        return checkpoint(self.block, x, use_reentrant=False) if inside else self.block(x)


@pytest.mark.parametrize("max_cost", [0, 1000])
@pytest.mark.parametrize("backend", ["aot_eager", PARTITION])
def test_a_checkpoint_around_a_compiled_block(backend, max_cost):
    """The recomputation, which runs outside of the context, saves what forward has saved."""
    plain, model = Checkpointed(None).double(), Checkpointed(backend).double()
    for seed in (1, 2):
        x = images(seed)
        check(step(model, model, x, remat(max_cost)), step(plain, plain, x))
    outside = partial(model, inside=False)
    check(step(model, outside, x, remat(max_cost)), step(plain, plain, x))
    dynamo.reset()
    check(step(model, outside, x, remat(max_cost)), step(plain, plain, x))
    with pytest.raises(RuntimeError, match="compiled under remat outside of a checkpoint"):
        step(model, model, x, remat(max_cost))


class GivenUp(nn.Module):
    """The compiler gives up a frame in which a graph break is in a loop, or under a lock."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.kind, self.lock = block(3, 3), kind, threading.Lock()

    def part(self, x):
        y = self.layers(x)
        dynamo.graph_break()
        return x + y / 2

    def forward(self, x):
        if self.kind == "loop":
            for _ in range(2):
                x = (self.part(x) + 1) * 2 - 3
        else:
            with self.lock:
                x = (self.part(x) + 1) * 2 - 3
        return x.relu().mean((2, 3))


@pytest.mark.parametrize("kind", ["loop", "lock"])
def test_frames_that_the_compiler_gives_up(kind):
    """They run as Python, and no call takes another's graph."""
    plain, model = (GivenUp(kind).double() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (1, 2):
        x = images(seed)
        check(step(model, compiled, x, remat()), step(plain, plain, x))


@pytest.mark.parametrize("max_cost", [0, 1000])
@pytest.mark.parametrize("kind", ["dropout", "bernoulli", "rand", "randperm", "rrelu"])
def test_random_numbers_are_never_drawn_again(kind, max_cost):
    """Backward uses forward's: its gradient does not depend on the generator's state then."""
    noise = {
        "dropout": lambda x: F.dropout(x, 0.5),
        "bernoulli": lambda x: x * torch.empty(len(x), 1).bernoulli_(0.5),
        "rand": lambda x: x * torch.rand(len(x), 1),
        "randperm": lambda x: x * torch.randperm(x.shape[1]),
        "rrelu": lambda x: F.rrelu(x, training=True),
    }[kind]
    compiled = torch.compile(lambda x: noise(x.sin()).sin().exp(), backend=PARTITION, fullgraph=True)
    x, grads = torch.randn(50, 6, requires_grad=True), []
    for seed in (2, 3):
        torch.manual_seed(1)
        with remat(max_cost):
            y = compiled(x)
        torch.manual_seed(seed)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


def test_nothing_sticks_to_the_compiler():
    """Its settings are as they were, after an error in the compiler too."""
    before, table = functorch_config.save_config(), partitioners.get_default_op_list
    tag = torch.compiler.config.cache_key_tag
    x, seen = images(), []

    def failing(graph, inputs):
        seen.append(functorch_config.save_config())
        raise ValueError("no compiler")

    for backend in (PARTITION, failing):
        compiled = torch.compile(net(), backend=backend)
        try:
            with remat(max_cost=80):
                compiled(x)
                assert functorch_config.save_config() == before  # not for others, even inside
        except Exception as error:
            assert "no compiler" in str(error)
        assert functorch_config.save_config() == before
        assert partitioners.get_default_op_list is table and torch.compiler.config.cache_key_tag == tag
    assert seen and seen[0] != before


def test_other_threads_compile_as_always():
    """A thread outside of the context compiles plain's graph while the context is open."""
    x, counting = images(), Counting(PARTITION)
    found = {}

    def other():
        compiled = torch.compile(net(), backend=counting, fullgraph=True)
        found["other"] = held(compiled, x)

    with remat():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    dynamo.reset()
    assert found["other"] == held(torch.compile(net(), backend=PARTITION, fullgraph=True), x)


def test_held_are_the_convolutions_outputs():
    """At 0 no convolution is computed twice, and nothing else of their size is kept."""
    x = images()
    model = net()
    outputs, handles = [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda m, i, y: outputs.append(y.nbytes)))
    model(x)
    for handle in handles:
        handle.remove()
    plain = held(torch.compile(net(), backend=PARTITION, fullgraph=True), x)
    dynamo.reset()
    mine = held(torch.compile(net(), backend=PARTITION, fullgraph=True), x, remat())
    per_channel = 8 * 8 * 8 * 4  # statistics, and what is as small
    assert sum(outputs) <= mine <= sum(outputs) + 2 * per_channel
    assert mine < 0.75 * plain


def without_kernels(cut, **how):
    """A backend that runs the graphs that Inductor would get, as ``cut`` cuts them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    compilers = {"fw_compiler": boxed_nop, "bw_compiler": boxed_nop}
    return aot_autograd(**compilers, partition_fn=partial(cut, compiler="inductor"), **how)


def convolutions_again(model, x, max_cost):
    """How many convolutions the backward graph computes a second time, and the bytes held."""
    again = []
    original = partitioners.min_cut_rematerialization_partition

    def counting(*args, **kwargs):
        halves = original(*args, **kwargs)
        target = torch.ops.aten.convolution.default
        again.append(sum(node.target is target for node in halves[1].graph.nodes))
        return halves

    from torch._inductor.compile_fx import select_decomp_table

    backend = without_kernels(counting, decompositions=select_decomp_table())
    dynamo.reset()
    mine = held(torch.compile(model, backend=backend, fullgraph=True), x, remat(max_cost))
    return again[0], mine


class Stream(nn.Module):
    """It reads the last rows of the images before, and then writes those of these."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = block(3, 4)
        self.register_buffer("rows", torch.randn(images()[:, :, :2].shape))

    def forward(self, x):
        y = self.layers(torch.cat([2 * self.rows[:, :, :1], self.rows, x], 2))
        self.rows.copy_(x[:, :, -2:])
        return y


@pytest.mark.parametrize("max_cost", [0, 1000])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_buffer_that_forward_reads_and_then_writes(in_graph, max_cost):
    """Backward must not read it again. Inductor writes it inside the graph, other backends after it."""
    cut = partitioners.min_cut_rematerialization_partition
    backend = without_kernels(cut, keep_inference_input_mutations=in_graph)
    plain, model = Stream().double(), Stream().double()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in (1, 2):
        x = images(seed)
        check(step(model, compiled, x, remat(max_cost)), step(plain, plain, x))


def test_the_price_of_compiled_convolutions():
    """3 channels · 9: 27 a value; 8 · 9: 72; 16 · 1: 16, and dearer than 27 once the
    first, on its way, is not kept either. The bytes held never rise."""
    x = images()
    found = {p: convolutions_again(net(), x, p) for p in (0, 15.9, 16, 27, 1000)}
    counts = [n for n, _ in found.values()]
    assert counts[:4] == [0, 0, 1, 1] and counts[4] > 1
    sizes = [size for _, size in found.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == sizes[1] > sizes[2] > sizes[3]


def test_resnet18_holds_at_most_three_fifths():
    """Of what the compiled model holds without `remat`; no convolution is computed twice."""
    x = torch.randn(4, 3, 96, 96)

    def model():
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=10)

    plain = held(torch.compile(model(), backend=PARTITION, fullgraph=True), x)
    again, mine = convolutions_again(model(), x, 0)
    assert again == 0
    assert mine <= 0.60 * plain
