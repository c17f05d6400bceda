"""How far apart two right computations of one thing may be: it follows from the dtype and the sizes alone."""

import torch


def rounding(dtype, terms=1):
    """Allowed `apart` of sums of so many terms in ``dtype``.

    Adding rounds each time, by ε/2 at most. In which order a library adds depends on the processor and the
    number of threads; in any order the errors are like a random walk, of √terms steps. Four times that is
    out of reach of a right computation, and far below a wrong one.
    """
    return 2 * terms**0.5 * torch.finfo(dtype).eps


def apart(found, exact):
    """The norm of the difference, relative to that of ``exact``; where that is 0, as it is."""
    found, exact = found.detach().double(), exact.detach().double()
    return ((found - exact).norm() / (exact.norm() or 1)).item()
