"The exact field of a Gaussian mixture against autograd and Bayes' rule."

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import LinearPath, VPPath

F64 = torch.float64
STD = 0.4
WEIGHTS = torch.tensor([1, 2, 3, 1, 0.5, 4], dtype=F64)
LABELS = torch.tensor([0, 1, 1, 2, 0, 2])
G = torch.Generator().manual_seed(3)
CENTERS = torch.randn(6, 2, 3, generator=G, dtype=F64)
X = torch.randn(20, 2, 3, generator=G, dtype=F64)


def mixture(path, prediction):
    return GaussianMixture(CENTERS, STD, LABELS, WEIGHTS, path, prediction)


def score(path, t, keep):
    "The gradient of the log density, by torch.distributions and autograd."
    alpha, sigma = path.alpha(t), path.sigma(t)
    std = (STD**2 * alpha**2 + sigma**2).sqrt()
    parts = Independent(Normal(alpha * CENTERS[keep], std), 2)
    leaf = X.clone().requires_grad_()
    density = MixtureSameFamily(Categorical(WEIGHTS[keep]), parts)
    return torch.autograd.grad(density.log_prob(leaf).sum(), leaf)[0]


def derivatives(path, t):
    s = t.clone().requires_grad_()
    return [torch.autograd.grad(v, s, retain_graph=True)[0] for v in (path.alpha(s), path.sigma(s))]


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
@pytest.mark.parametrize('label', [None, 0, 1, 2, 3])  # 3 is the null class
def test_gradient_of_the_density_is_the_field(path, label):
    "Tweedie: E[x_1|x] = (x + sigma^2 score) / alpha, E[eps|x] = -sigma score."
    keep = torch.ones(6, dtype=torch.bool) if label in (None, 3) else LABELS == label
    for t in torch.tensor([0.15, 0.5, 0.85], dtype=F64):
        alpha, sigma = path.alpha(t), path.sigma(t)
        alpha_dot, sigma_dot = derivatives(path, t)
        gradient = score(path, t, keep)
        data, noise = (X + sigma**2 * gradient) / alpha, -sigma * gradient
        expected = dict(data=data, noise=noise, velocity=alpha_dot * data + sigma_dot * noise)
        for prediction, wanted in expected.items():
            given = () if label is None else (torch.full((20,), label),)
            result = mixture(path, prediction)(X, t, *given)
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_fidelity_of_the_posterior_to_bayes_rule(path):
    t = torch.tensor(0.6, dtype=F64)
    y = torch.arange(20) % 4
    a, s = path.alpha(t).item(), path.sigma(t).item()
    p = mixture(path, 'data').posterior(X.flatten(1), t, y)
    for i in range(20):
        terms = []
        for w, c, k in zip(WEIGHTS, CENTERS, LABELS):
            distance = (X[i] - a * c).square().sum().item()
            density = math.exp(-distance / (2 * (STD**2 * a**2 + s**2)))
            terms.append(w.item() * density if y[i] in (3, k) else 0.0)
        wanted = torch.tensor(terms, dtype=F64) / math.fsum(terms)
        torch.testing.assert_close(p[i], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_batch_size_independence(path):
    "Of samples with their labels, and with a time for each."
    field = mixture(path, 'data')
    t = torch.tensor(0.6, dtype=F64)
    y = torch.arange(20) % 4
    torch.testing.assert_close(field(X, t, y)[:1], field(X[:1], t, y[:1]), rtol=0, atol=1e-13)
    times = torch.linspace(0.1, 0.9, 20, dtype=F64)
    one = field(X[7:8], times[7], y[7:8])
    torch.testing.assert_close(field(X, times, y)[7:8], one, rtol=0, atol=1e-12)


def test_fidelity_of_weights_at_the_precision_of_the_centres():
    centers = torch.zeros(3, 1, dtype=F64)
    field = GaussianMixture(centers, 1.0, weights=torch.ones(3))  # float32 weights
    third = torch.full((3,), 1 / 3, dtype=F64)
    torch.testing.assert_close(field.log_weights.exp(), third, rtol=1e-15, atol=0)
