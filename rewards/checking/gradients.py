"""Checks of the gradient: that it exists, is correct, and follows visible content."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.checking.bench import Bench, ask
from rewards.checking.report import Seen
from steer.devices import differentiating

__all__ = [
    "blurred",
    "differentiable",
    "finite_difference",
    "finite_gradient",
    "gradient",
    "high_frequencies",
    "parameters",
    "rows",
    "unseen",
]

STEP = 1 / 255
"""Step of the ascent that looks for invisible noise; it takes `STEPS` of them."""
STEPS = 4

SLOPE = {torch.float64: 2e-2, torch.float32: 0.1}
"""Relative error of the slope along random directions, of which there are `DIRECTIONS`."""
DIRECTIONS = 8
NOISE = 0.85
"""A gradient with more than this fraction of white noise's share of high frequencies is noise."""
GAIN, SURVIVAL = 0.1, 0.3
"""If an invisible change gains more spreads than the first number, at least the second fraction of
the gain should survive a blur."""

ADVICE = (
    "gradient ascent may add adversarial noise: average over views, as augmented(NAME, noise=0.2) "
    "does, add a reward of another kind, and use a held-out judge"
)


def parameters(bench: Bench) -> Seen:
    """Check that no parameter would be trained."""
    open_ = [name for name, p in bench.reward.named_parameters() if p.requires_grad]
    figures = {"trainable": float(len(open_))}
    if open_:
        line = f"{', '.join(open_[:3])}{' and others' * (len(open_) > 3)} would be trained: a "
        return "fail", line + "reward must be constant; call requires_grad_(False)", figures
    return "pass", "no parameter requires a gradient", figures


def differentiable(bench: Bench) -> Seen:
    """Check that a gradient reaches the pictures if and only if the reward declares one."""
    x = bench.images.detach().requires_grad_()
    with differentiating():
        scores = ask(bench.reward, x.clone(), bench.rows(len(x)))
        reaches = scores.requires_grad and scores.grad_fn is not None
        if reaches:
            (found,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
            reaches = found is not None
    declared = bench.reward.differentiable
    if reaches == declared:
        if declared:
            return "pass", "declared differentiable, and the gradient reaches the images", {}
        return "pass", "declared to have no gradient, and there is none", {}
    if declared:
        line = "declared differentiable, but no gradient reaches the images: remove detach(), "
        line += "no_grad, item() and numpy, or set differentiable = False"
        return "fail", line, {}
    line = "declared to have no gradient, but there is one: set differentiable = True, or detach"
    return "fail", line + " the scores", {}


def finite_gradient(bench: Bench) -> Seen:
    """Check that the gradient is finite, also at hard pictures."""
    gradient = bench.gradient(bench.every).isfinite().flatten(1).all(1)
    bad = [n for n, fine in zip(bench.names, gradient, strict=True) if not fine]
    figures = {"pictures": float(len(gradient)), "not_finite": float(len(bad))}
    if bad:
        line = f"no finite gradient at {', '.join(bad)}: a root has none at zero; write "
        return "fail", line + "(x + 1e-8).sqrt(), and mask before you divide", figures
    return (
        "pass",
        "every gradient is finite, on black, white, grey, chessboard and noise too",
        figures,
    )


def gradient(bench: Bench) -> Seen:
    """Check that the gradient is not zero at ordinary pictures."""
    norms = bench.gradient(bench.images).double().flatten(1).norm(dim=1)
    dead = int((norms == 0).sum())
    figures = {"min_norm": float(norms.min()), "max_norm": float(norms.max()), "zero": float(dead)}
    if not dead:
        return "pass", "the gradient is not zero at any ordinary picture", figures
    line = f"the gradient is zero at {dead} of {len(norms)} ordinary pictures: "
    if 2 * dead > len(norms):
        line += "rounding, thresholds and saturated units have none; make them smooth"
        return "fail", line, figures
    return "warn", line + "steering does nothing there", figures


def rows(bench: Bench) -> Seen:
    """Check that a score's gradient reaches only its own picture."""
    worst = 0.0
    for i in (0, len(bench.images) - 1):
        x = bench.images.detach().requires_grad_()
        with differentiating():
            scores = ask(bench.reward, x.clone(), bench.rows(len(x)))
            (gradient,) = torch.autograd.grad(scores[i], x)
        norms = gradient.double().flatten(1).norm(dim=1)
        others = torch.cat([norms[:i], norms[i + 1 :]])
        worst = max(worst, float(others.max() / norms[i].clamp(min=1e-30)))
    if worst > 1e-6:
        line = (
            "a picture's score has a gradient to other pictures of its batch: remove operations "
        )
        line += "over the batch, and multiply by the upstream gradient in your own backward()"
        return "fail", line, {"leak": worst}
    return "pass", "a score's gradient reaches only its own picture", {"leak": worst}


def finite_difference(bench: Bench) -> Seen:
    """`g . v` against `(r(x + h v) - r(x - h v)) / 2h`, v of random signs.

    The pictures are away from black and white and have some grain, so that kinks and clamping do
    not matter. Of a few steps h, the one with the smallest error counts, since small steps suffer
    from rounding and large ones from curvature.
    """
    reward, kind = bench.reward, torch.float32
    if bench.ok("copy") and bench.ok("double"):
        reward, kind = bench.copied(torch.float64), torch.float64
    grain = torch.rand(bench.images.shape, generator=bench.generator).to(bench.images)
    x = (0.2 + 0.5 * (0.8 * bench.images + 0.2 * grain)).to(kind)
    gradient = bench.gradient(x, reward).double().cpu()
    signs = torch.randint(0, 2, (DIRECTIONS, *x.shape), generator=bench.generator) * 2.0 - 1
    along = torch.stack([(gradient * v).flatten(1).sum(1) for v in signs])  # (directions, n)

    def slopes(v: Tensor, h: float) -> Tensor:
        up, down = (bench.scores(x + d * h * v.to(x), reward=reward) for d in (1, -1))
        return (up - down) / (2 * h)

    steps = (1e-7, 1e-5, 1e-3, 1e-2) if kind == torch.float64 else (1e-3, 3e-3, 1e-2)
    first = [slopes(signs[0], h) for h in steps]
    misses = [float((slope - along[0]).norm().nan_to_num(math.inf)) for slope in first]
    best = misses.index(min(misses))
    seen = torch.stack([first[best], *(slopes(v, steps[best]) for v in signs[1:])])
    size = along.norm(dim=0)
    size = size + 1e-2 * size.median() + 1e-300
    error = float(((seen - along).norm(dim=0) / size).max())
    along, seen = along / size, seen / size
    ratios = (seen * along).sum(0) / along.square().sum(0).clamp(min=1e-300)
    cosines = F.cosine_similarity(seen, along, dim=0)
    alike = float(F.cosine_similarity(seen.flatten(), along.flatten(), dim=0))
    ratio = float((seen * along).sum() / along.square().sum().clamp(min=1e-300))
    figures = {"error": error, "slope_to_gradient": ratio, "cosine": alike, "step": steps[best]}
    name = str(kind).removeprefix("torch.")
    if error <= SLOPE[kind]:
        return "pass", f"the gradient is the slope along random directions, in {name}", figures
    parallel = 1 - (1e-4 if kind == torch.float64 else 5e-3)  # a constant factor is the only error
    scaled = (cosines > parallel) & ((ratios - 1).abs() > 2 * SLOPE[kind])
    if alike >= 0.5 and not scaled.any():
        line = f"the gradient is near the slope along random directions, not equal, in {name}: "
        line += "is something detached, or passed straight through, on purpose?"
        return "warn", line, figures
    line = (
        f"the gradient is not the slope along random directions, in {name}: check the backward() "
    )
    return "fail", line + "of your own functions, and detached tensors", figures


def high_frequencies(bench: Bench) -> Seen:
    """Share of `|F|^2` of the gradient above 1/4 cycle a pixel, half the Nyquist frequency."""
    g = bench.gradient(bench.images).double()
    h, w = g.shape[-2:]
    f_y, f_x = (torch.fft.fftfreq(k, device=g.device) for k in (h, w))
    radius = torch.hypot(f_y[:, None], f_x[None])
    energy = torch.fft.fft2(g - g.mean((2, 3), keepdim=True)).abs().square().mean(1)
    total = energy.sum((1, 2))
    # the spectrum of a constant gradient is only rounding error
    flat = g.square().sum((1, 2, 3)) * h * w / 3 * 1e-10
    shares = (energy * (radius > 0.25)).sum((1, 2)) / (total + flat + 1e-300)
    white = float((radius > 0.25).sum()) / (h * w - 1)
    share = float(shares.mean())
    figures = {"share": share, "white_noise": white}
    if share > NOISE * white:
        line = f"the gradient has {share:.0%} of its energy above half the Nyquist frequency, as "
        return "warn", f"{line}noise has ({white:.0%}): {ADVICE}", figures
    line = (
        f"{share:.0%} of the gradient's energy is above half the Nyquist frequency; white noise "
    )
    return "pass", f"{line}has {white:.0%}", figures


def blurred(images: Tensor) -> Tensor:
    """Blur by a Gaussian with a standard deviation of one pixel."""
    k = torch.exp(-(torch.arange(-2, 3, device=images.device, dtype=images.dtype) ** 2) / 2)
    k = (k[:, None] * k / k.sum() ** 2).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), k, groups=images.shape[1])


def unseen(bench: Bench) -> Seen:
    """Ascend by four steps of 1/255 in the sign of the gradient, then blur."""
    x = z = bench.images
    for _ in range(STEPS):
        z = (z + STEP * bench.gradient(z).sign()).clamp(0, 1)
    gain = float((bench.scores(z) - bench.base).mean())
    kept = float((bench.scores(blurred(z)) - bench.scores(blurred(x))).mean())
    figures = {"gain": gain / bench.spread}
    seen = f"a change of {STEPS}/255 gains {gain / bench.spread:.2g} standard deviations"
    if not gain / bench.spread > GAIN:
        return "pass", f"{seen}: too little to matter", figures
    figures["survival"] = kept / gain
    seen += f", and {max(0.0, kept / gain):.0%} of it survives a slight blur"
    if kept / gain < SURVIVAL:
        return "warn", f"{seen}: {ADVICE}", figures
    return "pass", seen, figures
