"""Mistakes for the exercises' checkers to find.

Page -> checker -> (a text that stands once in the solution, what to put in its place, words of the verdict).
"""

WRONG = {
    "01": {
        "check_predict": [
            ("4 * n", "n", "a float32 has 4 bytes"),
            ("2 * y", "y", "only half"),
            ("2 * y", "3 * y", "three a block"),
            ("total = 0", "total = 4 * n * channels[0] * height * width", "the batch existed before"),
            ("- 2 * i) * (width - 2 * i)", ") * (width)", "makes an image smaller"),
            ("- 2 * i) * (width - 2 * i)", "- 2) * (width - 2)", "the ledger has"),
        ],
        "check_saved": [
            ('"relu": "output"', '"relu": "input"', "look again at relu"),
            ('"average pooling": "input"', '"average pooling": "nothing"', "look again at average pooling"),
            ('"tanh": "output"', '"tanh": "both"', 'must be "input", "output" or "nothing"'),
        ],
    },
    "02": {
        "check_grad_bias": [
            ("sum(", "mean(", "that is the mean"),
            ("(0, 2, 3)", "(2, 3)", "sum over all but o"),
            ("dy.sum((0, 2, 3))", "1.0", "return a tensor"),
        ],
        "check_grads_1x1": [
            ("dx, dw\n", "dx\n", "return the pair"),
            ("->oc", "->noc", "n is summed over"),
            ("x)\n", "x) / len(x)\n", "do not average"),
            ('"oc,noij->ncij", w,', '"oc,noij->ncij", w.flip(1),', "what stands beside x"),
        ],
        "check_grads_transposed": [
            ("(u, dz,", "(u.flip(2, 3), dz.flip(2, 3),", "is flipped"),
            ("conv2d(dz, w,", "conv2d(dz, w.flip(2, 3),", "wrong values"),
            ("return du, dw", "return du, dw.transpose(0, 1)", "exchange dimensions 0 and 1"),
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
        "check_grad_layer_norm": [
            ("return (", "return dx_hat / std + 0 * (", "paths through mean and variance"),
            (" - dx_hat.mean(1, keepdim=True)", "", "must sum to 0"),
            ("dx_hat = dz * weight", "dx_hat = dz", "values are wrong"),
        ],
    },
    "04": {
        "check_biased": [
            ("y = F.conv2d(x, w)\n", "y = F.conv2d(x, w, b)\n", "is the y that backward computes"),
            ("torch.zeros_like(b)", "None", "db is None"),
            ("torch.zeros_like(b)", "torch.ones_like(b)", "what does b change"),
        ],
        "check_mended": [
            ("(2 * sqrt_var)", "(2 * denom)", "the bug is still there"),
            ("(m - 1)", "m", "changed, but not right yet"),
        ],
        "check_conv_bn_relu": [
            ("z.relu_()", "z", "the output is wrong"),
            ("z > 0)", "z)", "only a mask"),
            ("dz * mask", "dz", "without ReLU"),
        ],
    },
    # From here on: the chapters that measure.
    "05": {},
    "06": {},
    "07": {},
    "08": {},
}
