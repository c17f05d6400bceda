"""Mistakes for the exercises' checkers to find.

Page -> checker -> (a text that stands once in the solution, what to put in its place, words of the verdict).
"""

WRONG = {
    "01": {
        "check_saved": [
            ('"relu": "output"', '"relu": "input"', "the output shows which"),
            ('"average pooling": "input"', '"average pooling": "nothing"', "PyTorch saves some even so"),
            ('"square": "input"', '"square": "output"', "has lost the sign of x"),
            ('"tanh": "output"', '"tanh": "both"', 'tanh: "both" is wrong'),
        ],
        "check_predict": [
            ("4 * n", "n", "a float32 has 4 bytes"),
            ("2 * y", "y", "only half"),
            ("2 * y", "3 * y", "three a block"),
            ("total = 0", "total = 4 * n * channels[0] * height * width", "the batch existed before"),
            ("- 2 * i) * (width - 2 * i)", ") * (width)", "makes an image smaller"),
            ("- 2 * i) * (width - 2 * i)", "- 2) * (width - 2)", "cuts the border off, not the first alone"),
            ("total += 2 * y", "total += 2 * y - (c == channels[-1]) * y", "the last ReLU keeps its output"),
        ],
    },
    "02": {
        "check_grad_weight": [
            ("dy.transpose(0, 1)).transpose(0, 1)", "dy.transpose(0, 1))", "exchange dimensions 0 and 1"),
            ("return F", "return 1 / len(x) * F", "times the right one"),
            ("dy.transpose(0, 1))", "dy.transpose(0, 1)).flip(2, 3)", "dw is flipped"),
            ("dy.transpose(0, 1))", "dy.flip(2, 3).transpose(0, 1))", "dy is flipped"),
            ("(0, 1)).transpose(0, 1)", "(0, 1)).reshape(dy.shape[1], x.shape[1], 3, -1)", "reshape mixes"),
        ],
        "check_grads_transposed": [
            ("(u, dz,", "(u.flip(2, 3), dz.flip(2, 3),", "dw is flipped"),
            ("conv2d(dz, w,", "conv2d(dz, w.flip(2, 3),", "du is flipped"),
            ("return du, dw", "return du, dw.transpose(0, 1)", "exchange dimensions 0 and 1"),
            ("return du, dw", "return dw, du", "du: that is dw"),
        ],
        "check_grads_by_patches": [
            (
                '"ngop,ngrp->gor", dy_g, patches',
                '"gop,grp->gor", dy_g[0], patches[0]',
                "of the first image alone",
            ),
            ("dx = F.fold", "F.conv2d(x, x)\n    dx = F.fold", "calls a convolution"),
            ("return dx, dw", "return dx", "return a tuple, (dx, dw)"),
        ],
    },
    "03": {
        "check_through_gamma": [
            ("(dscaled * y_hat).sum(OVER)", "dscaled * y_hat", "dgamma: the shape is"),
            (".sum(OVER)", ".mean(OVER)", "collects a sum"),
            ("(dscaled * y_hat)", "dscaled", "sums dscaled alone"),
            ("return dgamma, dy_hat", "return dgamma", "return a tuple"),
            ("return dgamma, dy_hat", "dscaled.zero_()\n    return dgamma, dy_hat", "has been overwritten"),
            ("return dgamma, dy_hat", "return dgamma, dscaled", "dy_hat lacks gamma"),
            ("return dgamma, dy_hat", "return gamma * dgamma, dy_hat", "dgamma has gamma in it"),
        ],
        "check_grad_from_output": [
            ("(z - per_channel(beta)) / per_channel(gamma)", "z", "undo gamma and beta"),
            ("(dz - per_channel(dbeta_m) - y_hat * per_channel(dgamma_m))", "dz", "that is eval mode"),
            (" - per_channel(beta)", "", "beta is still in y_hat"),
            (" - y_hat * per_channel(dgamma_m)", "", "the term with y_hat is missing"),
            (
                "mean(OVER)\n    dgamma_m = (dz * y_hat).mean(OVER)",
                "sum(OVER)\n    dgamma_m = (dz * y_hat).sum(OVER)",
                "must be divided by m",
            ),
            ("gamma / std", "gamma", "the std is missing"),
        ],
        "check_grads_group_norm": [
            (
                "blocks(dz * per_channel(gamma))",
                "blocks(dz)\n    std = std / blocks(per_channel(gamma).expand_as(y))",
                "it must be inside the sums",
            ),
            (
                "return dy,",
                "return batch_norm_backward(dz, y, gamma, *batch_stats(y), eps)[0],",
                "those are batch norm's sums",
            ),
            ("dz * per_channel(gamma)", "dz", "gamma is missing"),
            ("keepdim=True) + eps", "keepdim=True) + 1e-5", "use the eps that is passed in"),
            ("def blocks(t):", "groups = y.shape[1] // groups\n\n    def blocks(t):", "how many there are"),
        ],
    },
    "04": {
        "check_six_steps": [
            ("return dx, dw, None", "return dx, dw", "return a tuple, (dx, dw, None for eps)"),
            ("conv_backward(dy, x, w)", "conv_backward(dz, x, w)", "step 4 turns dz into dy"),
            ("return dx, dw, None", "dz.zero_()\n    return dx, dw, None", "has been overwritten"),
            ("return dx, dw, None", "return dx, dw, 0.0", "None for eps: expected None, got 0.0"),
            ("ctx.eps)", "1e-3)", "take eps from ctx"),
            ("return dx, dw, None", "return [dx, dw, None]", "return a tuple"),
        ],
        "check_repaired": [
            ("(2 * sqrt_var)", "(2 * denom)", "which of the per-channel numbers are 0"),
            (
                "return dy.addcdiv_",
                "return dy.sum(OVER)\n    dy.addcdiv_",
                "dy: the shape is (4,), and must be",
            ),
        ],
        "check_conv_bn_relu": [
            ("z.relu_()", "z", "the output: wrong by up to"),
            ("z > 0)", "z)", "8.1 bytes a value are kept"),
            ("da * mask", "da", "without ReLU"),
            (
                "z > 0)\n        ctx.eps = eps",
                "gamma)\n        ctx.eps, ctx.mask = eps, z > 0",
                "a tensor is in ctx.mask",
            ),
        ],
    },
    # From here on: the chapters that measure.
    "05": {
        "check_lower_peak": [
            ("self.conv_bn2(x)", "F.relu(self.conv_bn2(x))", "the peak was 4.17 times y2 and is 4.17"),
            ("F.relu(self.conv_bn1(x))", "self.conv_bn1(x)", "the output: wrong by up to"),
            ("self.conv_bn2(x)", "self.conv_bn2(x.detach())", "a tensor is expected, got None"),
            (
                "F.max_pool2d(self.conv_bn2(x), 2)",
                "F.max_pool2d(self.conv_bn2(x).relu_(), 2)",
                "relu_ works in",
            ),
            ("F.relu(self.conv_bn1(x))", "F.relu(self.conv_bn1(x), inplace=True)", "relu works in place"),
            (
                "F.relu(self.conv_bn1(x))",
                "F.relu(self.conv_bn1(x), inplace=self.training)",
                "relu works in place",
            ),
            (
                "        return F.log",
                "        x.detach().clamp_(min=0)\n        return F.log",
                "clamp_ works in place",
            ),
            (
                "x = F.relu(self.conv_bn1(x))",
                "from helpers import remat\n        with remat(600):\n            return super().forward(x)",
                "the checker's context is to be the only one",
            ),
            ("self.dropout(self.fc1", "F.dropout(self.fc1", "the output in eval mode"),
        ],
        "check_pool": [
            ("position.to(torch.uint8)", "position", "8.0 bytes a value are kept"),
            ("ctx.save_", "ctx.out = out; ctx.save_", "9.0 bytes a value are kept"),
            ("ctx.save_", "ctx.x = x; ctx.save_", "33.0 bytes a value are kept"),
            ("windows.max(-1)", "windows.min(-1)", "the output: wrong by up to"),
            ("return windows.un", "dout.view(-1)\n        return windows.un", "need not be: use reshape"),
            ("        return out", "        x.zero_()\n        return out", "has been overwritten"),
            (
                "position = windows.max(-1)",
                "position = windows.max(-1)[0], 3 - windows.flip(-1).max(-1)[1]",
                "the first gets the gradient, not the last",
            ),
            (".transpose(3, 4).flatten(4, 5)", ".transpose(4, 5).transpose(3, 4).flatten(4, 5)", "mind rows"),
        ],
    },
    "06": {
        "check_wide": [
            ("2 * (r + 1) * pairs - 1 + 2 * r", "2 * (r + 1) * pairs + 2", "is there a higher moment"),
            ("pairs - 1 + 2 * r", "pairs + 2 * r", "what is gone by then"),
            ("return (r + 1) * pairs + 2 * r", "return (r + 1) * pairs + 2", "is there a higher moment"),
            ("return (r + 1) * pairs + 2 * r", "return (r + 1) * pairs + 3 * r", "what is gone by then"),
        ],
        "check_frozen": [
            ("return dx, g * scale", "return dx, g", "missing from dw"),
            ("w * scale, padding", "w, padding", "missing from dx"),
            (" - mean * dbeta", "", "the mean is missing"),
            ("(g * w).sum((1, 2, 3))", "(dz * F.conv2d(x, w, padding=1)).sum(OVER)", "take 1.5 times"),
            ("dbeta = dz.sum(OVER)", "dbeta = (dz + 0).sum(OVER)", "buffers of y's size"),
            ("dbeta = dz.sum(OVER)", "dbeta = dz.sum(OVER); dz.zero_()", "has been overwritten"),
            (", dgamma, dbeta\n", ", dgamma\n", "return a tuple"),
            ("(var + eps)", "(var + 1e-5)", "use the eps that is passed in"),
            ("(g * w)", "(g * w * scale)", "the sum needs w itself"),
            (
                "(g * w).sum((1, 2, 3))",
                "(g * scale * w).sum((1, 2, 3)) / (gamma * inv_std)",
                "dgamma: NaN or infinity is in it",
            ),
            (" - mean * dbeta", " + mean * dbeta", "do not add it"),
            (" - mean * dbeta) * inv_std", " - mean * dbeta)", "dgamma must be divided by"),
        ],
        "check_norm_leaky": [
            (
                "ctx.function, ctx.alpha = ",
                "ctx.all, ctx.function, ctx.alpha = recipe, ",
                "a tensor is in ctx.all",
            ),
            (".mul_(da)", ".mul_(0).add_(da)", "without leaky ReLU"),
            (
                "z.gt_(0).mul_(1 - ctx.alpha).add_(ctx.alpha).mul_(da)",
                "torch.where(z > 0, da, ctx.alpha * da)",
                "backward peaks at",
            ),
            (
                "F.leaky_relu_(normalise(y, gamma, beta, mean, var), alpha)",
                "(lambda z: torch.maximum(z, alpha * z))(normalise(y, gamma, beta, mean, var))",
                "forward peaks at",
            ),
            (
                "z.gt_(0).mul_(1 - ctx.alpha).add_(ctx.alpha).mul_(da)",
                "da.mul_(z.gt_(0) * 0.7 + 0.3)",
                "overwritten",
            ),
            ("mean, var = batch_stats(y)", "mean, var = batch_stats(y); y.mul_(1)", "overwritten"),
            (
                "mean, var, *recipe.inputs)",
                "mean, var, *recipe.inputs, y)\n        recipe.inputs[0]",
                "8.0 bytes a value are kept",
            ),
            (
                "F.leaky_relu_(normalise(y, gamma, beta, mean, var), alpha)",
                "normalise(y, gamma, beta, mean, var)",
                "the output: wrong by up to",
            ),
            ("z.gt_(0)", "y.gt(0).to(y.dtype)", "z's, not y's"),
            (".mul_(1 - ctx.alpha).add_(ctx.alpha)", "", "is α da, not 0"),
        ],
    },
    "07": {
        "check_bottleneck": [
            ("(n - 1) * k + n * b * k\n", "n * k + n * b * k\n", "the last layer's output"),
            ("(n - 1) * k + n * b * k\n", "(n - 1) * k\n", "behind the 1x1 convolution keeps its input"),
            ("2 * wide + 2 * n * b * k", "2 * wide + n * b * k", "two tensors between its convolutions"),
            ("n * (n - 1) // 2", "n * (n + 1) // 2", "the first layer reads c0 channels"),
            ("return plain, recipes", "return recipes, plain", "the pair is swapped"),
            ("return plain, recipes", "return plain", "return a tuple"),
            ("c0 + (n - 1) * k + n * b * k", "c0 + (n - 1) * (b + 1) + 12 * n", "expected 62, got 64"),
        ],
        "check_silu": [
            ("made.parents[0], F.silu", "made, F.silu", "ctx must hold the recipe of z"),
            ("made.parents[0], F.silu", "made.parents[0], None", "must return forward's output"),
            ("made.parents[0], F.silu", "made.parents[0], torch.relu", "must return forward's output"),
            ("F.silu\n", "lambda z: F.silu(z, inplace=True)\n", "has been overwritten"),
            ("return F.silu(z)", "return F.silu(z, inplace=True)", "has been overwritten"),
            (
                "return da * s *",
                "return z.mul_(1 - s).add_(1).mul_(s).mul_(da), None\n        return da * s *",
                "overwritten z",
            ),
            (
                "ctx.z, made.make = made.parents[0]",
                "ctx.z, made.make = made.parents[0].__class__(kept=made.parents[0].tensor())",
                "8.0 bytes a value are kept",
            ),
            ("return F.silu(z)", "ctx.own = F.silu(z)\n        return ctx.own", "8.0 bytes a value are kept"),
            ("return F.silu(z)", "return z * z.sigmoid().exp()", "the output: wrong by up to"),
            ("return da * s", "return s", "da is missing"),
        ],
        "check_dropout": [
            ("generator=generator) / (1 - p)", "generator=generator)", "1 / (1 - p)"),
            ("bernoulli_(1 - p,", "bernoulli_(p,", "a share p = 0.25 must go"),
            ("empty(like.shape", "empty(like[:, :, :1, :1].shape", "entries go together"),
            ("empty(like.shape", "empty(like[:1].shape", "entries go together"),
            ("torch.randint(2**40, ()).item()", "0", "draw a new seed"),
            (
                "torch.randint(2**40, ()).item()",
                "torch.Generator().seed() % 2**40",
                "the output: wrong by up to",
            ),
            ("return a * mask(", "ctx.kept = a + 0\n        return a * mask(", "4.0 bytes a value are kept"),
            ("mask(dout, ctx.p, ctx.seed)", "mask(dout, ctx.p, 0)", "backward needs the same k"),
            (
                "mask(dout, ctx.p, ctx.seed)",
                "(mask(dout, ctx.p, ctx.seed) != 0)",
                "backward must multiply by 1 / (1 - p), too",
            ),
            ("empty(like.shape, dtype=like.dtype, device=like.device)", "empty_like(like)", "dout's layout"),
            (
                "torch.Generator(like.device).manual_seed(seed)",
                "torch.manual_seed(seed)",
                "sets PyTorch's random numbers back",
            ),
        ],
    },
    "08": {
        "check_chain": [
            ("since, kept = 0, kept + [i]", "kept = kept + [i]", "the count starts at 0"),
            ("since, kept = 0, kept", "since, kept = multiplications, kept", "a kept y costs nothing itself"),
            ("since += multiplications", "since = multiplications", "must be paid for, too"),
            ("since > max_cost", "since >= max_cost", "equal to max_cost is affordable"),
            ("enumerate(work, 1)", "enumerate(work)", "count from 1"),
            ("kept + [i]", "kept + [i + 0.9]", "the blocks: expected"),
        ],
        "check_only_input": [
            ("stride**2 * y1", "y1", "at max_cost 52 this is still kept: y2"),
            ("max(y2, y3)", "y2", "still kept: y3"),
            ("max(y2, y3)", "y1 + y2 + y3", "a lower price is enough"),
            ("-(-width * y2 // c_out)", "width * y2 // c_out", "still kept: y3"),
            ("-(-width * y2 // c_out)", "width * y2 // c_out + 1", "a lower price is enough"),
            ("-(-width * y2 // c_out)", "width * y2 / c_out", "return an integer"),
        ],
        "check_fooled": [
            ("[memory] + 7 *", "[2 * memory] + 7 *", "no price fits"),
            ("+ 7 * [2 * memory]", "+ 4 * [2 * memory] + 3 * [memory]", "find none although one fits"),
            ("[memory] + 7 *", "[memory] + 6 *", "eight peaks"),
            ("[memory] + 7 * [2 * memory]", "memory", "list of numbers"),
        ],
    },
    "09": {
        "check_plan": [
            ("-(-batch // parts)", "batch // parts", "round up"),
            (".peak\n", ".forward\n", "parts: expected"),
            ("if parts > 1 else 0", "* 0", "there are the gradients"),
            (" if parts > 1 else 0", "", "one part alone has no gradients"),
            ("sorted(prices)", "prices", "from the lowest"),
            (
                "sorted(prices)",
                "sorted(prices, key=lambda p: predict_memory(model, (n, *image_shape), max_cost=p).peak)",
                "not the one with the least peak",
            ),
            ("p.nbytes", "p.numel()", "in bytes"),
            ("return parts, price", "return parts", "return a tuple"),
            ("return parts, price", "return [price, parts]", "the pair is swapped"),
            (" <= memory", " < memory", "what takes exactly `memory` fits"),
        ],
        "check_lean": [
            ("F.leaky_relu(z, 0.1)", "torch.where(z > 0, z, 0.1 * z)", "that no convolution made"),
            ("F.leaky_relu(z, 0.1)", "F.leaky_relu(z)", "the output: wrong by up to"),
            ("F.leaky_relu(z, 0.1)", "F.leaky_relu(z.detach(), 0.1)", "is something detached"),
            (
                "a = F.relu(self.norm1(self.stem(x)))",
                "from torch.utils.checkpoint import checkpoint\n"
                "        return checkpoint(super().forward, x, use_reentrant=False)",
                "does a norm run twice",
            ),
        ],
    },
    "10": {
        "check_forward": [
            ("F.conv2d(x_centred,", "F.conv2d(x,", "the mean is still in z"),
            ("sum(1) / m", "sum(1)", "divide by m"),
            ("sum(1) / m", "sum(1) / (m - 1)", "not by m - 1"),
            ("R = product(x_centred, x_centred)", "R = product(x, x)", "R must be of centred x"),
            ("(var + eps)", "var", "sqrt(var + eps)"),
            ("(var + eps)", "(var + EPS)", "z: wrong by up to"),
            ("* w, beta)", "* w).add_(per_channel(beta))", "no pass over z comes after"),
            ("* w, beta)", "* w)", "beta is missing"),
            ("((W @ R) * W).sum(1)", "(W @ R @ W.T).sum(1)", "not its row sums"),
            ("centred(x)", "centred(x) + 0 * F.conv2d(x, w).sum()", "call F.conv2d once"),
            (
                "W, m = w",
                "y = F.conv2d(x, w)\n"
                "    return F.batch_norm(y, None, None, gamma, beta, True, eps=eps)\n"
                "    W, m = w",
                "y must not exist",
            ),
            ("gamma / (var + eps).sqrt()", "1 / (var + eps).sqrt()", "gamma is missing"),
            ("(var + eps).sqrt()", "(var.sqrt() + eps)", "eps belongs inside"),
            ("(var + eps).sqrt()", "(var + eps)", "the root is missing"),
        ],
        "check_slabs": [
            ("x_i - per_channel(first)", "x_i - per_channel(x_i.mean(OVER))", "G: wrong by up to"),
            ("R - m * delta[:, None] * delta", "R", "R: wrong by up to"),
            ("first = x_i", "first = 0 * x_i", "subtract the same value, one amid"),
            ("x_i - per_channel(first)", "x_i.sub_(per_channel(first))", "a slab has been overwritten"),
            ("in slabs", "in list(slabs)", "all slabs at once"),
        ],
        "check_instance_norm": [
            ("X.mean(2, keepdim=True)", "X.mean((0, 2), keepdim=True)", "each image has its own mean"),
            ("dgamma / (sigma * m)", "dgamma / (sigma * m * len(x))", "m is its pixels"),
            ("dgamma.sum(0)", "dgamma", "dgamma: the shape is"),
            ("(var + eps)", "(var + EPS)", "dx: wrong by up to"),
            ("W, m = w", "_ = torch.zeros_like(dz); W, m = w", "a tensor of y's size was made"),
        ],
    },
}
