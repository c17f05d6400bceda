"""`remat`: backward recomputes cheap values instead of keeping them.

`values` has the recipes, the price and the decision of what is kept; `task` recomputes values in backward;
`operations`, `convolutions` and `pools` say what each operation computes in forward, its recipe and its
backward, and `layouts` in which memory format; `calls` which calls become which operation, `arguments` what
theirs say, and `writes` what other calls change; `mode` has the context and the nodes of the graph; `record`
and `compare` are what people read; `compiled` does the same for graphs that torch.compile makes.
"""

from .mode import remat
from .record import Record

__all__ = ["Record", "remat"]
