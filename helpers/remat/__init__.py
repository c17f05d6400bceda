"""`remat`: backward makes cheap values again instead of keeping them.

`values` has the recipes, the price and what makes a value again; `operations` what each operation computes in
forward, its recipe and its backward; `calls` which calls of forward become which operation; `mode` the
context and the nodes of the graph; `record` and `compare` what people read; `compiled` the same for graphs
that torch.compile makes.
"""

from helpers.remat.mode import remat
from helpers.remat.record import Record

__all__ = ["Record", "remat"]
