"""What forward decided, for people."""

from __future__ import annotations

from torch import nn

from .values import Row, Table

MIB = 2**20


def check_module(model) -> None:
    """Raise a ValueError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model)}")


class Record:
    """What backward needs from one forward under `remat`, and what is kept for it. ``print`` shows it.

    Attributes:
        rows: one for each tensor that backward needs, in the order of forward: ``recipe`` (the operation
            that made it), ``shape``, ``nbytes``, ``kept``, and ``cost``, the multiplications per value that
            recomputing it takes. "given" was made outside, or by an operation without a recipe; "view" is
            another tensor's memory; "cast" is autocast's copy, "mask" dropout's, "offsets" are a max-pool's.
    """

    def __init__(self, table: Table) -> None:
        self._table, self._names, self.rows = table, {}, table.rows

    @property
    def kept_bytes(self) -> int:
        """Bytes held from forward to backward, the max-pools' offsets included."""
        return sum(row.nbytes for row in self.rows if row.kept)

    @property
    def plain_bytes(self) -> int:
        """Bytes that PyTorch would have saved for the same operations, with autocast's copies of weights."""
        return self._table.plain_bytes

    def names(self, model: nn.Module) -> Record:
        """Show the names of ``model``'s parameters as the origin of each row. Returns the record."""
        check_module(model)
        self._names.update((id(p), name) for name, p in model.named_parameters())
        return self

    def origin(self, row: Row) -> str:
        """The convolution or norm that a value comes from: a module's name, or the parameter's shape."""
        if row.origin is None:
            return ""
        number, shape = row.origin
        name = self._names.get(number)
        return f"weight of shape {shape}" if name is None else name.removesuffix(".weight")

    def __str__(self) -> str:
        if not self.rows:
            return "no operation here needs a gradient (a frozen model? no_grad? another thread or context?)"
        cells = [("tensor", "of", "shape", "MiB", "", "multiplications per value")]
        for row in self.rows:
            again = "kept" if row.kept else "recomputed"
            price = "" if row.kept else f"{row.cost:,.0f}"
            shape = "×".join(map(str, row.shape))
            cells.append((row.recipe, self.origin(row), shape, f"{row.nbytes / MIB:,.2f}", again, price))
        widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<><>", widths, strict=True))
        lines = [line.format(*row).rstrip() for row in cells]
        kept, plain = self.kept_bytes / MIB, self.plain_bytes / MIB
        ratio = f"{kept / plain:.2f} of " if plain else ""
        saved = f"the {plain:,.1f} MiB that PyTorch would have saved for these operations"
        lines.append(f"{kept:,.1f} MiB kept, {ratio}{saved}")
        return "\n".join(lines)
