"""Losses in closed form from the moments of noisy logits: squared error, probability of winning, cross-entropy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bench.noise.logit_moments import LogitMoments, sign_rows

Target = Literal["logits", "softmax"]

FAR = 5.0  # from here on -log Phi(t) equals Phi(-t) to 1e-7, relatively
Q_MIN = 1e-6  # floor of a pair's variance: below it log Phi saturates at the start of training


def competitors(mean: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` classes j != y of largest mean logit, b `count`, strongest first; 0 means all k - 1.

    Raises ValueError where there are not so many.
    """
    k = mean.shape[1]
    if count >= k:
        raise ValueError(f"rows={count}, but {k} classes leave {k - 1} competitors; use 0 for all")
    others = mean.detach().scatter(1, y[:, None], float("-inf"))
    return others.topk(count or k - 1, dim=1).indices


def pair_rows(mean: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """e_y - e_j for the classes j in `rivals` (b r), shape r b k: their quadratic is the variance of z_y - z_j."""
    k = mean.shape[1]
    return (nn.functional.one_hot(y, k)[None] - nn.functional.one_hot(rivals.T, k)).to(mean.dtype)


def pair_variance(covariance: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """q_j = S_yy + S_jj - 2 S_yj for j in `rivals` (b r), shape r b, from a full covariance b k k."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    row = covariance.gather(1, y[:, None, None].expand(-1, 1, covariance.shape[2])).squeeze(1)
    return (diagonal.gather(1, y[:, None]) + diagonal.gather(1, rivals) - 2 * row.gather(1, rivals)).T


def softmax_rows(mean: Tensor, rows: Tensor) -> Tensor:
    """Jp v = p * v - p (p . v) for rows v (r b k), with Jp = diag(p) - p p^T the (symmetric) softmax Jacobian."""
    p = mean.softmax(1)
    return p * rows - p * (p * rows).sum(2, keepdim=True)


def trace(mean: Tensor, covariance: Tensor, target: Target) -> Tensor:
    """tr S, or tr Jp S Jp for the softmax, shape b, from a full covariance b k k."""
    if target == "softmax":
        once = softmax_rows(mean, covariance.transpose(0, 1)).transpose(0, 1)  # S Jp: Jp acts on each row of S
        covariance = softmax_rows(mean, once.permute(2, 0, 1)).permute(1, 0, 2)  # and on each column of the result
    return covariance.diagonal(dim1=1, dim2=2).sum(1)


def exact_variances(moments: LogitMoments, y: Tensor, rivals: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The trace of the squared error (b) and q of each of the `rivals` (r b), from the whole covariance."""
    covariance = moments.covariance()
    return trace(moments.mean, covariance, target), pair_variance(covariance, y, rivals)


def probed_variances(
    moments: LogitMoments, y: Tensor, rivals: Tensor, target: Target, probes: int
) -> tuple[Tensor, Tensor]:
    """The same from `probes` + r rows of the covariance: Hutchinson's estimate of the trace, and q exactly."""
    signs = sign_rows(moments.mean, probes)
    signs = softmax_rows(moments.mean, signs) if target == "softmax" else signs
    variances = moments.quadratic(torch.cat([signs, pair_rows(moments.mean, y, rivals)]))
    return variances[:probes].mean(0), variances[probes:]


def squared_error(mean: Tensor, trace: Tensor, y: Tensor, target: Target) -> Tensor:
    """E||Y - onehot(y)||^2 = ||mu - onehot||^2 + trace, shape b; `target` says whether Y is logits or softmax."""
    mu = mean.softmax(1) if target == "softmax" else mean
    return (mu - nn.functional.one_hot(y, mean.shape[1])).square().sum(1) + trace


def gap(mean: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """d_j = m_y - m_j for the classes j in `rivals` (b r), shape r b."""
    return (mean.gather(1, y[:, None]) - mean.gather(1, rivals)).T


def in_noise(d: Tensor, q: Tensor) -> Tensor:
    """t = d / sqrt q (r b): gaps in units of their standard deviation, which has a floor."""
    return d / q.clamp_min(Q_MIN).sqrt()


def log_win(mean: Tensor, q: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """log Phi(d_j / sqrt q_j), r b: log-probability that the true class beats each rival.

    Over all k - 1 rivals the sum is the log-probability to win if the pairs were independent, and the least is an upper
    bound of it. With fewer rivals both speak of these alone: the true class may lose to another one.
    """
    return torch.special.log_ndtr(in_noise(gap(mean, y, rivals), q))


def log_joint_loss(mean: Tensor, q: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """log(-sum_j log Phi(t_j)), t_j = d_j / sqrt q_j, shape b, for an attack.

    It is monotone in the training loss -sum_j log_win, so it has the same ascent directions. That loss and its gradient
    are 0 in float32 from t = 13 on. This one is not: from t = 5 on it uses -log Phi(t) = Phi(-t), whose log is exact.
    """
    t = in_noise(gap(mean, y, rivals), q)
    near = torch.log(-torch.special.log_ndtr(t.clamp_max(FAR)))
    return torch.where(t < FAR, near, torch.special.log_ndtr(-t.clamp_min(FAR))).logsumexp(0)


def margin_ratio(mean: Tensor, q: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """max_j (m_j - m_y) / sqrt q_j, shape b: the expected margin in units of its standard deviation. Phi of it is the
    probability to lose against the rival that wins most often."""
    return in_noise(-gap(mean, y, rivals), q).amax(0)


def cross_entropy_bound(mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
    """The smaller of two upper bounds of the expected cross-entropy of Gaussian logits, shape b (derived; Jensen).

    log E sum_j exp(z_j) - m_y = logsumexp(m + diag(S) / 2) - m_y, and logsumexp_j(m_j - m_y + q_j / 2) with q_j the
    variance of z_j - z_y (q_y = 0).
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    own = mean.gather(1, y[:, None])
    row = covariance.gather(1, y[:, None, None].expand(-1, 1, covariance.shape[2])).squeeze(1)
    q = diagonal.gather(1, y[:, None]) + diagonal - 2 * row
    single = torch.logsumexp(mean + diagonal / 2, 1) - own.squeeze(1)
    return torch.minimum(single, torch.logsumexp(mean - own + q / 2, 1))


def joint_probability(mean: Tensor, pair_covariance: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """P(the true class beats every rival), b, by Genz's integration of the joint normal: for reports, not training.

    It draws on NumPy's generator. `pair_covariance` (b r r) is that of the differences z_y - z_j. One that is not
    semi-definite by rounding is made so, and one that holds no numbers gives NaN: a report must not end a training.
    """
    from scipy.stats import multivariate_normal

    gaps = mean.gather(1, y[:, None]) - mean.gather(1, rivals)
    jitter = Q_MIN * torch.eye(gaps.shape[1], dtype=torch.float64)
    found = []
    for gap, cov in zip(gaps.detach().double().cpu(), pair_covariance.detach().double().cpu(), strict=True):
        if not (gap.isfinite().all() and cov.isfinite().all()):
            found.append(float("nan"))
            continue
        cov = cov + jitter
        values, vectors = torch.linalg.eigh(cov)
        if values[0] < 0:
            cov = vectors * values.clamp_min(Q_MIN) @ vectors.T
        # the differences fall short of their means by Gaussian noise: P(noise < gap). So few points are good to 0.01.
        options = {"cov": cov.numpy(), "allow_singular": True, "maxpts": 1000}
        found.append(float(multivariate_normal.cdf(gap.numpy(), **options)))
    return torch.tensor(found).clamp(0, 1)
