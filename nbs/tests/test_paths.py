"Paths and conversions against diffusers' tables, scipy, autograd and finite differences."

import math
from itertools import product

import numpy as np
import pytest
import torch
from exact_cases import F64, rand

from neuralsolver.paths import NETWORK_TIMES, PREDICTIONS, DDPMPath, LinearPath, ShiftedPath, VPPath

SHORT_TABLE = DDPMPath('linear', 0.001, 0.2, 100)
PATHS = [
    LinearPath(),
    ShiftedPath(),
    ShiftedPath(0.4),
    VPPath(),
    DDPMPath(),
    DDPMPath('cosine'),
    SHORT_TABLE,
]
# inside the intervals of every table
TIMES = torch.tensor([0.0143, 0.1307, 0.37191, 0.50043, 0.8642, 0.9871], dtype=F64)


def assert_near(actual, expected, rtol, atol=0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# The schedules


@pytest.mark.parametrize(
    'ours, theirs',
    [
        (DDPMPath(), dict(beta_schedule='linear')),
        (
            SHORT_TABLE,
            dict(beta_schedule='linear', beta_start=0.001, beta_end=0.2, num_train_timesteps=100),
        ),
        (
            DDPMPath('scaled-linear', 0.00085, 0.012),
            dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012),
        ),
        (DDPMPath('cosine'), dict(beta_schedule='squaredcos_cap_v2')),
    ],
)
def test_ddpm_tables_are_diffusers(ours, theirs):
    """Index i at t = (i + 1) / T, log alpha linear in between.

    Their table is float32, so a small sigma has few digits.
    """
    from diffusers import DDPMScheduler

    table = DDPMScheduler(**theirs).alphas_cumprod.double()
    T = len(table)
    assert T == ours.train_steps
    knots = torch.arange(1, T + 1, dtype=F64) / T
    # 1 - beta is .001 in the last step of 'cosine'
    assert_near(ours.alpha(knots) ** 2, table, rtol=2e-4)
    assert_near(ours.sigma(knots) ** 2, 1 - table, rtol=0, atol=2e-6)
    zero = torch.zeros(1, dtype=F64)
    assert ours.alpha(zero) == 1 and ours.sigma(zero) == 0
    assert ours.t_end == 1 / T
    between = np.interp(TIMES, np.r_[0, knots], np.r_[0, table.log() / 2])
    np.testing.assert_allclose(ours.log_alpha(TIMES), between, rtol=1e-4)
    told = NETWORK_TIMES['1000t-1'](ours, knots[[0, 9, 57, -1]])
    if T == 1000:
        assert_near(told, torch.tensor([0.0, 9, 57, 999], dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize('path', [VPPath(), VPPath(0.05, 15.0, 1e-4)])
def test_vp_is_the_integral_of_beta(path):
    from scipy.integrate import quad

    for t in TIMES.tolist():
        integral = quad(lambda u: path.beta_min + (path.beta_max - path.beta_min) * u, 0, t)[0]
        alpha = path.alpha(torch.tensor(t, dtype=F64))
        assert math.isclose(alpha, math.exp(-integral / 2), rel_tol=1e-12)
    low = torch.tensor([0.0, path.t_min / 2, path.t_min], dtype=F64)
    for f in (path.alpha, path.sigma, path.log_snr):
        assert f(low).unique().numel() == 1
    assert path.t_end == path.t_min


@pytest.mark.parametrize('path', PATHS)
def test_alpha_and_sigma_belong_together(path):
    a, s = path.alpha(TIMES), path.sigma(TIMES)
    total = a + s if isinstance(path, LinearPath) else a**2 + s**2
    assert_near(total, torch.ones(6, dtype=F64), rtol=0, atol=1e-14)
    assert_near(path.log_snr(TIMES), (a / s).log(), rtol=1e-12, atol=1e-12)
    # rises towards the data
    assert (path.log_snr(TIMES).diff() * (path.t_data - path.t_noise) > 0).all()
    noise, data = (torch.tensor(t, dtype=F64) for t in (path.t_noise, path.t_data))
    assert path.alpha(noise) < 0.08 and path.sigma(noise) > 0.99
    assert path.alpha(data) > 0.999 and path.sigma(data) < 0.02


@pytest.mark.parametrize('shift', [0.4, 3.0])
def test_the_shift_is_a_factor_of_the_signal_to_noise_ratio(shift):
    "sigma = s tau / (1 + (s - 1) tau) with tau = 1 - t (arXiv 2403.03206)."
    path, tau = ShiftedPath(shift), 1 - TIMES
    assert_near(path.sigma(TIMES), shift * tau / (1 + (shift - 1) * tau), rtol=1e-14)
    shifted = LinearPath().log_snr(TIMES) - math.log(shift)
    assert_near(path.log_snr(TIMES), shifted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('path', PATHS)
def test_float32_keeps_its_digits(path):
    "Also of sigma next to the data, where 1 - alpha^2 would cancel."
    single = torch.cat([torch.tensor([0.0013, 0.9987], dtype=F64), TIMES]).float()
    for f in ('alpha', 'sigma', 'alpha_dot', 'sigma_dot'):
        exact = getattr(path, f)(single.double())
        rtol = 2e-4 if f.endswith('dot') else 2e-5
        assert_near(getattr(path, f)(single).double(), exact, rtol=rtol)


# Derivatives and inverses


def differences(f, t, h=1e-7):
    return (f(t + h) - f(t - h)) / (2 * h)


@pytest.mark.parametrize('path', PATHS)
def test_rates_are_derivatives(path):
    "By autograd and by finite differences."
    for f, rate in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        t = TIMES.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(t).sum(), t)
        assert_near(rate(TIMES), grad, rtol=1e-11, atol=1e-12)
        assert_near(rate(TIMES), differences(f, TIMES), rtol=1e-6, atol=1e-6)
    data, noise = rand(6, 3), rand(6, 3, seed=1)
    moving = differences(lambda t: path.interpolate(data, noise, t), TIMES)
    assert_near(path.velocity(data, noise, TIMES), moving, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('path', PATHS)
def test_time_of_log_snr_is_the_inverse(path):
    "Both ways, with the derivative of an inverse; beyond the ends of the path its end."
    t = TIMES.clone().requires_grad_()
    back = path.time_of_log_snr(path.log_snr(t))
    assert_near(back, TIMES, rtol=1e-10)
    (slope,) = torch.autograd.grad(back.sum(), t)
    assert_near(slope, torch.ones(6, dtype=F64), rtol=1e-9)
    values = path.log_snr(TIMES).requires_grad_()
    (grad,) = torch.autograd.grad(path.time_of_log_snr(values).sum(), values)
    assert_near(1 / grad, differences(path.log_snr, TIMES), rtol=1e-5)
    assert_near(path.log_snr(path.time_of_log_snr(values)), values, rtol=1e-10, atol=1e-10)
    ends = torch.tensor([path.t_noise, path.t_end], dtype=F64)
    assert_near(path.time_of_log_snr(path.log_snr(ends)), ends, rtol=1e-12, atol=1e-12)
    far = path.time_of_log_snr(torch.tensor([-1e3, 1e3], dtype=F64))
    limit = path.t_end if isinstance(path, VPPath) else path.t_data
    assert_near(far, torch.tensor([path.t_noise, limit], dtype=F64), rtol=0, atol=1e-12)


# Predictions


def wide(v):
    return v.reshape(-1, 1, 1)


@pytest.mark.parametrize('path', PATHS)
def test_conversion_between_all_predictions(path):
    """From the data and the noise that made the state, with the rates by finite differences.

    One time for all, or one a sample.
    """
    data, noise = rand(6, 3, 2), rand(6, 3, 2, seed=1)
    for t in (TIMES, TIMES[2]):
        x = wide(path.alpha(t)) * data + wide(path.sigma(t)) * noise
        rates = differences(path.alpha, t), differences(path.sigma, t)
        velocity = wide(rates[0]) * data + wide(rates[1]) * noise
        truth = dict(data=data, noise=noise, flow=data - noise, velocity=velocity)
        assert set(truth) == set(PREDICTIONS)
        for source, target in product(PREDICTIONS, PREDICTIONS):
            there = path.convert(x, t, truth[source], source, target)
            assert_near(there, truth[target], rtol=1e-4, atol=1e-4)
            # back again, to rounding: without the finite differences
            back = path.convert(x, t, there, target, source)
            assert_near(back, truth[source], rtol=1e-8, atol=1e-8)


def test_flow_is_the_velocity_of_the_straight_path():
    "The shifted path runs the same line at another speed."
    x, v = rand(6, 3), rand(6, 3, seed=1)
    for target in ('data', 'noise'):
        a, b = (
            LinearPath().convert(x, TIMES, v, source, target) for source in ('velocity', 'flow')
        )
        assert_near(a, b, rtol=1e-13, atol=1e-13)
    for path, shift in ((ShiftedPath(), 3.0), (ShiftedPath(0.4), 0.4)):
        speed = shift / (1 + (shift - 1) * (1 - TIMES)) ** 2
        velocity = path.convert(x, TIMES, v, 'flow', 'velocity')
        assert_near(velocity, speed[:, None] * v, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('path', [LinearPath(), DDPMPath()])
def test_singular_conversions_are_not_finite(path):
    "No noise is left at the data, and on the linear path no data in the noise."
    x, q = rand(6, 3), rand(6, 3, seed=1)
    data, noise = (torch.tensor(t, dtype=F64) for t in (path.t_data, path.t_noise))
    assert not path.convert(x, data, q, 'data', 'noise').isfinite().any()
    assert_near(path.convert(x, data, q, 'noise', 'data'), x, rtol=0, atol=1e-14)
    if isinstance(path, LinearPath):
        assert not path.convert(x, noise, q, 'noise', 'data').isfinite().any()


# Refusals


@pytest.mark.parametrize(
    'source, target, said',
    [
        ('score', 'data', "source='score'.*velocity, data, noise, flow"),
        ('data', 'eps', "target='eps'"),
    ],
)
def test_refusal_of_convert(source, target, said):
    with pytest.raises(ValueError, match=said):
        LinearPath().convert(rand(2), TIMES[0], rand(2), source, target)


@pytest.mark.parametrize(
    'path, settings, said',
    [
        (DDPMPath, dict(schedule='sigmoid'), "schedule='sigmoid'.*linear, scaled-linear, cosine"),
        (DDPMPath, dict(train_steps=1), 'train_steps=1'),
        (DDPMPath, dict(beta_start=0.03), 'beta_start=0.03'),
        (DDPMPath, dict(beta_end=1.0), 'beta_end=1.0'),
        (ShiftedPath, dict(shift=0), 'shift=0'),
    ],
)
def test_refusal_of_a_path(path, settings, said):
    with pytest.raises(ValueError, match=said):
        path(**settings)
