"""What a compiled graph keeps for backward: the same idea and the same price, by the compiler's own means.

Under `torch.compile` forward and backward are one graph, and the compiler chooses the cut between the two
that carries the fewest bytes. By default it treats few operations as cheap and follows rules that save time
on a GPU. For graphs compiled under `remat`, this file changes both. The compiler's options for this,
`activation_memory_budget` and `aggressive_recomputation`, are not used: they draw dropout's random numbers
again.
"""

import functools
from unittest import mock

import torch
from torch._functorch import config, partitioners
from torch.fx import Graph, Node

from .values import MOST_MADE

aten, prims = torch.ops.aten, torch.ops.prims
NO_RULES = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}
REUSED = (
    "a graph that was compiled under remat outside of a checkpoint now runs inside one, whose recomputation "
    "would save other tensors. Compile what calls the checkpoint instead of what it calls"
)
CHEAP = {aten.cat, aten.constant_pad_nd, aten.avg_pool2d, aten.max_pool2d_with_indices}
CHEAP |= {getattr(prims, f"_low_memory_max_pool{d}_with_offsets", None) for d in ("", "2d")}


def compile_by_price(context) -> None:
    """While a graph is traced: have it compiled for the caller's ``price``, that of the innermost context."""
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    if isinstance(output.compiler_fn, ByPrice):
        return
    output.compiler_fn = ByPrice(output.compiler_fn, context.get_local("price").as_python_constant())


class ByPrice:
    """A compiler that calls ``compiler`` with the cut's rules changed."""

    def __init__(self, compiler, price: str) -> None:
        functools.update_wrapper(self, compiler)
        self.compiler, self.price = compiler, price

    def __call__(self, graph, inputs):
        if in_checkpoint():  # its recomputation runs outside of the context, and must save the same tensors
            return self.compiler(graph, inputs)
        operations = Operations(**vars(partitioners.get_default_op_list()))
        operations.max_cost = float(self.price)
        tag = f"{torch.compiler.config.cache_key_tag} remat {self.price}"
        with (
            config.patch(NO_RULES),
            torch.compiler.config.patch(cache_key_tag=tag),  # the rules are no part of the cache's key
            mock.patch.object(partitioners, "get_default_op_list", lambda: operations),
        ):
            compiled = self.compiler(graph, inputs)

        def run(*args):
            if in_checkpoint():
                raise RuntimeError(REUSED)
            return compiled(*args)

        return run


def in_checkpoint() -> bool:
    """Whether a checkpoint (not the reentrant kind) is told what autograd saves."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


class Operations(partitioners.OpTypes):
    """The compiler's table of operations; convolutions within the price may be computed again."""

    max_cost = 0.0
    graph, stale, within = None, frozenset(), frozenset()

    def is_recomputable(self, node: Node) -> bool:
        if self.graph is not node.graph:
            self.graph, self.stale = node.graph, readers_of_written(self, node.graph)
            self.within = convolutions_within(self, node.graph)
        if node in self.stale:
            return False
        if node.target is aten.convolution.default:
            return node in self.within
        return super().is_recomputable(node) or partitioners.get_aten_target(node) in CHEAP


def readers_of_written(operations: Operations, graph: Graph) -> set[Node]:
    """What reads an input of the graph that forward writes, such as a buffer: backward would find it written.

    Of an input that forward writes there is a ``copy_``, or an output with its new value, by the backend.
    """
    outputs = next(iter(reversed(graph.nodes))).meta.get("desc", ())
    changed = {getattr(output, "mutated_input", None) for output in outputs} - {None}
    written, readers = set(), set()
    for node in graph.nodes:
        if node.op == "placeholder":
            copied = any(user.target is aten.copy_.default and user.args[0] is node for user in node.users)
            if copied or node.meta.get("desc") in changed:
                written.add(node)
        elif any(p in written for p in node.all_input_nodes):
            (written if operations.is_view(node) else readers).add(node)
    return readers


def convolutions_within(operations: Operations, graph: Graph) -> set[Node]:
    """Those that cost at most `max_cost` a value, with all that is computed again on their way."""
    within, on_the_way = set(), {}
    for node in graph.nodes:
        made = frozenset().union(*(on_the_way[p] for p in node.all_input_nodes))
        if node.target is aten.convolution.default:
            made |= {node}
            if not node.args[6] and affordable(node, made, operations.max_cost):
                within.add(node)
            else:
                made = frozenset()
        elif not operations.is_recomputable(node):
            made = frozenset()
        on_the_way[node] = made
    return within


def affordable(node: Node, made: frozenset[Node], max_cost: float) -> bool:
    size = {n: partitioners._size_of(n) for n in made}  # bytes; of symbolic sizes too
    work = sum(size[n] * n.args[1].meta["val"][0].numel() for n in made)
    return work <= max_cost * size[node] and sum(size.values()) <= MOST_MADE * max(size.values())
