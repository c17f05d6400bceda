"""Mistakes for the exercises' checkers to find.

Page -> checker -> (a text that stands once in the solution, what to put in its place, words of the verdict).
"""

WRONG = {
    "01": {
        "check_saved": [
            ('"relu": "output"', '"relu": "input"', "the output shows which"),
            ('"average pooling": "input"', '"average pooling": "nothing"', "PyTorch saves some even so"),
            ('"square": "input"', '"square": "output"', "has lost the sign of x"),
            ('"tanh": "output"', '"tanh": "both"', 'must be "input", "output" or "nothing"'),
        ],
        "check_predict": [
            ("4 * n", "n", "a float32 has 4 bytes"),
            ("2 * y", "y", "only half"),
            ("2 * y", "3 * y", "three a block"),
            ("total = 0", "total = 4 * n * channels[0] * height * width", "the batch existed before"),
            ("- 2 * i) * (width - 2 * i)", ") * (width)", "makes an image smaller"),
            ("- 2 * i) * (width - 2 * i)", "- 2) * (width - 2)", "the ledger has"),
        ],
    },
    "02": {
        "check_grad_bias": [
            ("sum(", "mean(", "that is the mean"),
            ("(0, 2, 3)", "(2, 3)", "sum over all but o"),
            ("dy.sum((0, 2, 3))", "1.0", "db must be a tensor"),
        ],
        "check_grads_1x1": [
            ("dx, dw\n", "dx\n", "return a tuple, (dx, dw)"),
            ("->oc", "->noc", "every image uses the same w"),
            ("x)\n", "x) / len(x)\n", "do not average"),
            ('"oc,noij->ncij", w,', '"oc,noij->ncij", w.flip(1),', "what stands beside x"),
            ("dx = ", "dx = F.conv_transpose2d(dy, w[:, :, None, None])\n    _ = ", "calls a convolution"),
        ],
        "check_grads_transposed": [
            ("(u, dz,", "(u.flip(2, 3), dz.flip(2, 3),", "dw is flipped"),
            ("conv2d(dz, w,", "conv2d(dz, w.flip(2, 3),", "the kernel of du is flipped"),
            ("return du, dw", "return du, dw.transpose(0, 1)", "exchange dimensions 0 and 1"),
        ],
        "check_grads_by_patches": [
            ("dw = ", "dw = 1 / N * ", "dw is averaged over the images"),
            (
                '"ngop,ngrp->gor", dy_g, patches',
                '"gop,grp->gor", dy_g[0], patches[0]',
                "takes the images for one",
            ),
            ("dx = F.fold", "F.conv2d(x, x)\n    dx = F.fold", "calls a convolution"),
            ("return dx, dw", "return dx", "return a tuple, (dx, dw)"),
        ],
    },
    "03": {
        "check_grad_input_eval": [
            ("gamma / ", "1 / ", "gamma is missing"),
            (" + eps)", ")", "eps is missing"),
            ("sqrt(running_var + eps)", "sqrt(running_var).add(eps)", "eps belongs inside the root"),
            ("torch.sqrt", "", "not by the variance"),
        ],
        "check_grad_from_output": [
            ("(z - per_channel(beta)) / per_channel(gamma)", "z", "undo gamma and beta"),
            ("(z - per_channel(beta))", "z", "beta is still in"),
            (" / per_channel(gamma)\n", "\n", "gamma is still in"),
            ("(dz - per_channel(dbeta_m) - y_hat * per_channel(dgamma_m))", "dz", "that is eval mode"),
        ],
        "check_grads_group_norm": [
            ("dz * per_channel(gamma)", "dz", "dy lacks gamma"),
            (
                "blocks(dz * per_channel(gamma))",
                "blocks(dz)\n    std = std / blocks(per_channel(gamma).expand_as(y))",
                "it must stand inside the sums",
            ),
            ("(bracket / std)", "(dy_hat / std)", "lacks the paths through mean and variance"),
            ("(dz * y_hat.view_as(y))", "dz", "gamma is multiplied by y_hat"),
            (
                "return dy,",
                "return batch_norm_backward(dz, y, gamma, *batch_stats(y), eps)[0],",
                "those are batch norm's sums",
            ),
        ],
    },
    "04": {
        "check_biased": [
            ("y = F.conv2d(x, w)\n", "y = F.conv2d(x, w, b)\n", "is the y that backward computes the y that"),
            ("torch.zeros_like(b)", "None", "db is None"),
            ("torch.zeros_like(b)", "dz.sum(OVER)", "db sums dz"),
            ("x, w, b, mean, sqrt_var)\n        ctx", "x, w, b, mean, sqrt_var, y)\n        ctx", "is saved"),
        ],
        "check_mended": [
            ("(2 * sqrt_var)", "(2 * denom)", "the bug is still there"),
            ("(m - 1)", "m", "wrong values"),
            ("return dy.addcdiv_", "return dy.sum(OVER)\n    dy.addcdiv_", "dy must have shape"),
        ],
        "check_conv_bn_relu": [
            ("z.relu_()", "z", "the output has the right shape, but wrong values"),
            ("z > 0)", "z)", "a tensor of its shape is saved"),
            ("dz * mask", "dz", "without ReLU"),
        ],
    },
    # From here on: the chapters that measure.
    "05": {},
    "06": {},
    "07": {},
    "08": {},
}
