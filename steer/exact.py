"""Gaussian mixtures: a flow map in closed form and its exact tilt, for tests.

With data `sum_k w_k N(mu_k, S_k)`, the law at time t is `sum_k w_k N(beta mu_k, C_k)`,
`C_k = alpha² I + beta² S_k`, so velocity, denoiser, score and posterior are sums over components:
theory (38, 39) of docs/theory.md.
"""

import math
from typing import cast

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.path import Linear, Path, Time, as_time, like
from steer.ranges import above, all_finite, symmetric
from steer.reward import LinearReward, QuadraticReward, Reward

__all__ = ["GaussianMixture"]

_LOG_2PI = math.log(2 * math.pi)


class GaussianMixture(FlowMap):
    """A mixture of Gaussians on vectors (d,), with its flow map.

    The jump integrates the probability flow in the angle `atan2(beta, alpha)` with the
    fourth-order Runge-Kutta method. The number of steps is chosen once, such that the error of the
    jump 0 -> 1 is below 3e-5 on about a thousand seeded coordinates of noise.

    Args:
        means: (k, d).
        covariances: a variance, (k,) variances or (k, d, d).
        weights: (k,), positive; they are normalised. Default: equal.
        path: the interpolation.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a weight below zero, a
            covariance that is not symmetric or not positive.
    """

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor | float,
        weights: Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 2:
            raise ValueError(f"means of shape {tuple(means.shape)}: give (k, d)")
        all_finite("means", means)
        k, d = means.shape
        cov = torch.as_tensor(covariances, dtype=torch.float64, device=means.device)
        if cov.shape not in {(), (k,), (k, d, d)}:
            raise ValueError(
                f"covariances of shape {tuple(cov.shape)} for {k} means in {d} dimensions: "
                f"give a variance, ({k},) variances or ({k}, {d}, {d}) matrices"
            )
        all_finite("covariances", cov)
        w = torch.ones(k) if weights is None else torch.as_tensor(weights)
        w = w.to(means)
        if w.shape != (k,) or not bool((w >= 0).all() & (w.sum() > 0) & w.isfinite().all()):
            raise ValueError(f"weights {w.tolist()}: give {k} of them, finite, none below zero")
        if cov.ndim == 3:
            symmetric("covariances", cov)
            variances, basis = torch.linalg.eigh(cov)
        else:
            variances, basis = cov.expand(k).reshape(k, 1).repeat(1, d), None
        if not bool((variances > 0).all()):
            raise ValueError("covariances must be positive definite")
        self.path, self.event_shape = path or Linear(), (d,)
        self.register_buffer("means", means)
        self.register_buffer("weights", w / w.sum())
        self.register_buffer("variances", variances)  # eigenvalues, (k, d)
        self.register_buffer("basis", basis)  # eigenvectors, (k, d, d); None: the standard one
        self.means: Tensor
        self.weights: Tensor
        self.variances: Tensor
        self.basis: Tensor | None
        self._steps: int | None = None

    @property
    def covariances(self) -> Tensor:
        """The covariance matrices, (k, d, d)."""
        if self.basis is None:
            return torch.diag_embed(self.variances)
        return self.basis @ torch.diag_embed(self.variances) @ self.basis.mT

    # ------------------------------------------------- one component at a time, (k, n, d) each

    def _rotate(self, z: Tensor) -> Tensor:
        """Rotate (k, n, d) into each component's eigenbasis."""
        return z if self.basis is None else z @ self.basis.to(z)

    def _rotate_back(self, z: Tensor) -> Tensor:
        return z if self.basis is None else z @ self.basis.mT.to(z)

    def _posterior(self, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z = U^T (x - beta mu) (k, n, d), its variance (k, 1 or n, d), log w N (k, n)."""
        a, b = (like(c, x) for c in (alpha, beta))
        variance = a**2 + b**2 * self.variances.to(x)[:, None]
        z = self._rotate(x - b * self.means.to(x)[:, None])
        if variance.shape[1] == 1:  # one time for all rows: the sum over d is a product
            distance = (z * z) @ (1 / variance).mT
        else:
            distance = (z * z / variance).sum(-1, keepdim=True)
        log_norm = variance.log().sum(-1) + z.shape[-1] * _LOG_2PI
        joint = self.weights.to(x).log()[:, None] - 0.5 * (distance[..., 0] + log_norm)
        return z, variance, joint

    def _expect(self, x: Tensor, alpha: Tensor, beta: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return `E[a x_0 + b x_1 | x_t = x]`, theory (39)."""
        z, variance, joint = self._posterior(x, alpha, beta)
        c_a, c_b, c_alpha, c_beta = (like(c, x) for c in (a, b, alpha, beta))
        gain = (c_a * c_alpha + c_b * c_beta * self.variances.to(x)[:, None]) / variance
        mean = self._rotate_back(gain * z) + c_b * self.means.to(x)[:, None]
        return (joint.softmax(0)[..., None] * mean).sum(0)

    # ------------------------------------------------------------------ the flow map

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = E[alpha' x_0 + beta' x_1 | x_t = x]`, (n, d)."""
        return self._expect(x, *self.path(t), *self.path.derivative(t))

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return `E[x_1 | x_t = x]`, (n, d)."""
        alpha, beta = self.path(t)
        return self._expect(x, alpha, beta, torch.zeros_like(alpha), torch.ones_like(alpha))

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return `grad log rho_t(x)`, (n, d): finite at t = 1 too."""
        z, variance, joint = self._posterior(x, *self.path(t))
        return -(joint.softmax(0)[..., None] * self._rotate_back(z / variance)).sum(0)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """Return `log rho_t(x)`, (n,)."""
        return self._posterior(x, *self.path(t))[2].logsumexp(0)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)`, (n, d), within 1e-4, with gradients; exact for a single Gaussian."""
        if len(self.means) == 1:
            return self._stretch(x, as_time(s), as_time(t))
        if self._steps is None:
            self._steps = self._calibrate()
        return self._integrate(x, as_time(s), as_time(t), self._steps)

    def _stretch(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return `beta_t m + (C_t / C_s)^½ (x - beta_s m)`, of a single Gaussian N(m, S)."""
        (a_s, b_s), (a_t, b_t) = self.path(s), self.path(t)
        variances, mean = self.variances.to(x), self.means.to(x)
        before = like(a_s**2, x) + like(b_s**2, x) * variances
        after = like(a_t**2, x) + like(b_t**2, x) * variances
        z = self._rotate((x - like(b_s, x) * mean)[None])[0]
        return like(b_t, x) * mean + self._rotate_back((z * (after / before).sqrt())[None])[0]

    def _integrate(self, x: Tensor, s: Tensor, t: Tensor, steps: int) -> Tensor:
        """Integrate `dy/dphi = E[cos(phi) x_1 - sin(phi) x_0 | y]`, `y = x / |(alpha, beta)|`.

        Every path runs through the same y: `(alpha, beta) / |(alpha, beta)| = (cos, sin)(phi)`.
        See theory (41).
        """
        (a_s, b_s), (a_t, b_t) = self.path(s), self.path(t)
        phi, end = torch.atan2(b_s, a_s), torch.atan2(b_t, a_t)
        count = math.ceil(float((end - phi).abs().max()) / (math.pi / 2) * steps - 1e-9)
        h = (end - phi) / max(count, 1)

        def slope(y: Tensor, phi: Tensor) -> Tensor:
            cos, sin = phi.cos(), phi.sin()
            return self._expect(y, cos, sin, -sin, cos)

        if count == 0:  # the identity, with its derivative in time
            r_s, r_t = torch.hypot(a_s, b_s), torch.hypot(a_t, b_t)
            return x * like(r_t / r_s, x) + like(h * r_t, x) * slope(x / like(r_s, x), phi)
        y = x / like(torch.hypot(a_s, b_s), x)
        step = like(h, x)
        for i in range(count):
            now = phi + i * h
            k1 = slope(y, now)
            k2 = slope(y + step / 2 * k1, now + h / 2)
            k3 = slope(y + step / 2 * k2, now + h / 2)
            k4 = slope(y + step * k3, now + h)
            y = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y * like(torch.hypot(a_t, b_t), x)

    def _calibrate(self) -> int:
        """Choose the number of Runge–Kutta steps for the jump 0 -> 1."""
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            n = max(128, 8192 // self.event_shape[0])
            x = torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
            x = x.to(self.means.device)
            zero, one = as_time(0.0), as_time(1.0)
            steps = 8
            while steps < 4096:
                coarse, fine = (self._integrate(x, zero, one, n) for n in (steps, 2 * steps))
                if float((fine - coarse).abs().max()) <= 3e-5:
                    return steps
                steps = steps * 3 // 2
        raise ValueError(
            "the flow of this mixture is too stiff to integrate to 1e-4: "
            f"its smallest variance is {float(self.variances.min()):.2e}; make it larger"
        )

    # ------------------------------------------------------------------ sampling

    def _draw(self, joint: Tensor, mean: Tensor, variance: Tensor, g: torch.Generator) -> Tensor:
        """Sample `sum_k joint_k N(mean_k, U diag(variance_k) U^T)`, one sample per row (n, d)."""
        k = torch.multinomial(joint.softmax(0).T.cpu(), 1, generator=g)[:, 0].to(mean.device)
        z = torch.randn(mean.shape[1:], generator=g, dtype=mean.dtype).to(mean.device)
        noisy = mean + self._rotate_back(variance.sqrt() * z)
        return noisy[k, torch.arange(len(k), device=k.device)]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample the data n times, (n, d), in torch's default dtype.

        Args:
            n: how many.
            generator: a generator on the CPU.
        """
        dtype = torch.get_default_dtype()
        mean = self.means.to(dtype)[:, None].expand(-1, n, -1)
        logits = self.weights.log().to(dtype)[:, None].expand(-1, n)
        return self._draw(logits, mean, self.variances.to(dtype)[:, None], generator)

    def posterior_sample(self, x: Tensor, t: Time, n: int, generator: torch.Generator) -> Tensor:
        """Sample `p(x_1 | x_t = x)`, theory (39), n times for each row of `x`, (n, *x.shape).

        Args:
            x: states at time t, (m, d).
            t: a float, or a tensor () or (m,).
            n: samples per row.
            generator: a generator on the CPU.
        """
        alpha, beta = self.path(t)
        z, variance, joint = self._posterior(x, alpha, beta)
        a, b = like(alpha, x), like(beta, x)
        lam = self.variances.to(x)[:, None]
        mean = self.means.to(x)[:, None] + self._rotate_back(b * lam / variance * z)
        spread = (a**2 * lam / variance).expand_as(mean)
        mean, spread = mean.repeat(1, n, 1), spread.repeat(1, n, 1)
        return self._draw(joint.repeat(1, n), mean, spread, generator).reshape(n, *x.shape)

    # ------------------------------------------------------------------ the tilt

    def tilt(self, reward: Reward, temperature: float = 1.0) -> tuple["GaussianMixture", Tensor]:
        """Return `q = p exp(reward / temperature) / Z` in closed form, and `log Z`.

        Linear `a.x`: `mu + S a`, `log z = a.mu + a.S a / 2` for each component. Quadratic
        `-(x-c)^T P (x-c) / 2`: precision `S^-1 + P`, and the Gaussian integral. See
        theory (42, 43, 44).

        Raises:
            TypeError: the reward is neither a LinearReward nor a QuadraticReward.
            ValueError: a temperature that is not above zero.
        """
        above("temperature", temperature)
        mu, cov = self.means, self.covariances
        if isinstance(reward, LinearReward):
            a = reward.a.to(mu) / temperature
            new_cov, new_mu = cov, mu + cov @ a
            log_z = mu @ a + 0.5 * a @ cov @ a
        elif isinstance(reward, QuadraticReward):
            p, c = reward.precision.to(mu) / temperature, reward.centre.to(mu)
            eye = torch.eye(len(c), dtype=mu.dtype, device=mu.device)
            new_cov = torch.linalg.solve(eye + cov @ p, cov)
            new_cov = (new_cov + new_cov.mT) / 2
            pull = p @ c
            shift = new_cov @ (pull - (p @ mu[..., None])[..., 0])[..., None]
            new_mu = mu + shift[..., 0]
            z = mu - c
            grad = (p @ z[..., None])[..., 0]
            log_z = (
                -0.5 * (z * grad).sum(-1)
                + 0.5 * (grad * (new_cov @ grad[..., None])[..., 0]).sum(-1)
                - 0.5 * torch.linalg.slogdet(eye + cov @ p).logabsdet
            )
        else:
            raise TypeError(
                f"no closed form for {type(reward).__name__}: tilt takes a steer.LinearReward or "
                "a steer.QuadraticReward"
            )
        log_w = self.weights.log() + log_z
        tilted = GaussianMixture(new_mu, new_cov, log_w.softmax(0), self.path)
        return tilted, cast(Tensor, log_w.logsumexp(0))
