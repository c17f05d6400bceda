"""Views that are read as parts of a recomputed tensor: `Table.find` and the recipe that it gives them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.remat.values import Part, Table

COMMON = {  # and whether backward may read it a few images at a time
    "some channels": (lambda t: t[:, 1:3], True),
    "a half": (lambda t: t.chunk(2, 1)[1], True),
    "some rows": (lambda t: t[:, :, 1:], True),
    "every other column": (lambda t: t[..., ::2], True),
    "pixels": (lambda t: t.flatten(2), True),
    "tokens": (lambda t: t.flatten(2).transpose(1, 2), True),
    "groups": (lambda t: t.unflatten(1, (2, 2)), True),
    "across images": (lambda t: t.view(-1, 4), False),
    "channels before images": (lambda t: t.transpose(0, 1), False),
}


def found(whole, t):
    """The part of ``whole`` that a table takes ``t`` for, if it does."""
    table = Table(0)
    value = table.find(whole)
    part = table.find(t)
    assert part is value or part.parents in ((), (value,))
    return part.recipe


@pytest.mark.parametrize("images", [3, 1])
@pytest.mark.parametrize("name", COMMON)
def test_the_usual_views_are_parts(name, images):
    view, by_image = COMMON[name]
    whole = torch.randn(images, 4, 3, 4)
    part = found(whole, view(whole))
    assert isinstance(part, Part) and part.whole == (not by_image)
    assert torch.equal(part.run(None, whole.clone()), view(whole))
    if by_image:
        assert torch.equal(part.run(None, whole[-1:].clone()), view(whole)[-1:])


def test_a_part_of_one_image_with_another_stride_of_the_batch():
    whole = torch.randn(1, 4, 3, 4)
    part = found(whole, view := whole[0, 1:][None])
    assert view.stride(0) < whole.stride(0) and not part.whole
    assert torch.equal(part.run(None, whole.clone()), view)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_part_has_the_views_values(data):
    """Whatever the view, and wherever the whole lies in its memory; else it is none."""
    draw = data.draw
    sizes = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    memory = torch.arange(100.0)
    order = draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), draw(st.sampled_from([1, 1, 1, 2]))
    for i in order:
        strides[i], step = step, step * sizes[i]
    whole = memory.as_strided(sizes, strides, draw(st.integers(0, 4)))
    shape = [draw(st.sampled_from([1, 2, 3, sizes[0]])) for _ in range(draw(st.integers(1, 3)))]
    view = [draw(st.sampled_from([0, 1, 2, 3, *strides])) for _ in shape]
    t = memory.as_strided(shape, view, draw(st.integers(0, 8)))
    part = found(whole, t)
    if part is not None:
        copy = torch.empty_strided(whole.shape, whole.stride()).copy_(whole)
        assert torch.equal(part.run(None, copy), t)
        if not part.whole:
            assert torch.equal(part.run(None, copy[-1:]), t[-1:])


def test_what_is_no_part():
    whole = torch.randn(2, 4, 3, requires_grad=True) * 1
    table = Table(0)
    value = table.find(whole)
    part = whole[:, 1:]
    assert table.find(part).parents == (value,) and table.find(part[:, 1:]).parents == (value,)
    assert table.find(whole.detach()[:, 1:]).recipe is None  # the graph behind whole may go before it
    assert table.find(whole.view(torch.bfloat16)).recipe is None
    table.find(x := torch.randn(2, 4, 3))
    assert table.find(x[:, 1:]).recipe is not None and table.find(x.view(torch.int32)).recipe is None
    with torch.no_grad():
        whole.mul_(2)
    assert table.find(whole[:, 1:]).recipe is None
