"Paths against diffusers' tables, scipy, autograd and finite differences, and conversions against the definitions."

import math
from itertools import product
import numpy as np, pytest, torch
from neuralsolver.paths import NETWORK_TIMES, PREDICTIONS, DDPMPath, LinearPath, ShiftedPath, VPPath

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


VP = [
    VPPath(),
    VPPath(0.05, 15.0, 1e-4),
    DDPMPath(),
    DDPMPath('scaled-linear', 0.00085, 0.012),
    DDPMPath('cosine'),
    DDPMPath('linear', 0.001, 0.2, 100),
]
PATHS = [LinearPath(), ShiftedPath(), ShiftedPath(0.4), *VP]
TIMES = torch.tensor(
    [0.0143, 0.1307, 0.37191, 0.50043, 0.8642, 0.9871], dtype=F64
)  # inside the intervals of every table

# The schedules


@pytest.mark.parametrize(
    'ours, theirs',
    [
        (DDPMPath(), dict(beta_schedule='linear')),
        (
            DDPMPath('linear', 0.001, 0.2, 100),
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
    "Index i at t = (i + 1) / T, log alpha linear in between; their table is float32, so a small sigma has few digits."
    from diffusers import DDPMScheduler

    table = DDPMScheduler(**theirs).alphas_cumprod.double()
    T = len(table)
    assert T == ours.train_steps
    knots = torch.arange(1, T + 1, dtype=F64) / T
    torch.testing.assert_close(
        ours.alpha(knots) ** 2, table, rtol=2e-4, atol=0
    )  # 1 - beta is .001 in the last step of 'cosine'
    torch.testing.assert_close(ours.sigma(knots) ** 2, 1 - table, rtol=0, atol=2e-6)
    assert (
        ours.alpha(torch.zeros(1, dtype=F64)) == 1
        and ours.sigma(torch.zeros(1, dtype=F64)) == 0
        and ours.t_end == 1 / T
    )
    between = np.interp(TIMES, np.r_[0, knots], np.r_[0, table.log() / 2])
    np.testing.assert_allclose(ours.log_alpha(TIMES), between, rtol=1e-4)
    told = NETWORK_TIMES['1000t-1'](ours, knots[[0, 9, 57, -1]])
    if T == 1000:
        torch.testing.assert_close(
            told, torch.tensor([0.0, 9, 57, 999], dtype=F64), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize('path', VP[:2])
def test_vp_is_the_integral_of_beta(path):
    from scipy.integrate import quad

    for t in TIMES.tolist():
        integral = quad(lambda u: path.beta_min + (path.beta_max - path.beta_min) * u, 0, t)[0]
        assert math.isclose(
            path.alpha(torch.tensor(t, dtype=F64)), math.exp(-integral / 2), rel_tol=1e-12
        )
    low = torch.tensor([0.0, path.t_min / 2, path.t_min], dtype=F64)
    for f in (path.alpha, path.sigma, path.log_snr):
        assert f(low).unique().numel() == 1
    assert path.t_end == path.t_min


@pytest.mark.parametrize('path', PATHS)
def test_alpha_and_sigma_belong_together(path):
    a, s = path.alpha(TIMES), path.sigma(TIMES)
    torch.testing.assert_close(
        a + s if isinstance(path, LinearPath) else a**2 + s**2,
        torch.ones(6, dtype=F64),
        rtol=0,
        atol=1e-14,
    )
    torch.testing.assert_close(path.log_snr(TIMES), (a / s).log(), rtol=1e-12, atol=1e-12)
    assert (
        path.log_snr(TIMES).diff() * (path.t_data - path.t_noise) > 0
    ).all()  # rises towards the data
    noise, data = (torch.tensor(t, dtype=F64) for t in (path.t_noise, path.t_data))
    assert (
        path.alpha(noise) < 0.08
        and path.sigma(noise) > 0.99
        and path.alpha(data) > 0.999
        and path.sigma(data) < 0.02
    )


@pytest.mark.parametrize('shift', [0.4, 1.0, 3.0])
def test_the_shift_is_a_factor_of_the_signal_to_noise_ratio(shift):
    "sigma = s tau / (1 + (s - 1) tau) with tau = 1 - t (arXiv 2403.03206)."
    path, tau = ShiftedPath(shift), 1 - TIMES
    torch.testing.assert_close(
        path.sigma(TIMES), shift * tau / (1 + (shift - 1) * tau), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        path.log_snr(TIMES), LinearPath().log_snr(TIMES) - math.log(shift), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize('path', PATHS)
def test_float32_keeps_its_digits(path):
    "Also of sigma next to the data, where 1 - alpha^2 would cancel."
    single = torch.cat([torch.tensor([0.0013, 0.9987], dtype=F64), TIMES]).float()
    for f in ('alpha', 'sigma', 'alpha_dot', 'sigma_dot'):
        exact = getattr(path, f)(single.double())
        torch.testing.assert_close(
            getattr(path, f)(single).double(),
            exact,
            rtol=2e-4 if f.endswith('dot') else 2e-5,
            atol=0,
        )


# Derivatives and inverses


def differences(f, t, h=1e-7):
    return (f(t + h) - f(t - h)) / (2 * h)


@pytest.mark.parametrize('path', PATHS)
def test_rates_are_derivatives(path):
    "By autograd and by finite differences."
    for f, rate in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        t = TIMES.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(t).sum(), t)
        torch.testing.assert_close(rate(TIMES), grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(rate(TIMES), differences(f, TIMES), rtol=1e-6, atol=1e-6)
    data, noise = rand(6, 3), rand(6, 3, seed=1)
    moving = differences(lambda t: path.interpolate(data, noise, t), TIMES)
    torch.testing.assert_close(path.velocity(data, noise, TIMES), moving, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('path', PATHS)
def test_time_of_log_snr_is_the_inverse(path):
    "Both ways, with the derivative of an inverse; beyond the ends of the path its end."
    t = TIMES.clone().requires_grad_()
    l = path.log_snr(t)
    back = path.time_of_log_snr(l)
    torch.testing.assert_close(back, TIMES, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(back.sum(), t)[0], torch.ones(6, dtype=F64), rtol=1e-9, atol=0
    )
    values = l.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(path.time_of_log_snr(values).sum(), values)
    torch.testing.assert_close(1 / grad, differences(path.log_snr, TIMES), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        path.log_snr(path.time_of_log_snr(values)), values, rtol=1e-10, atol=1e-10
    )
    ends = torch.tensor([path.t_noise, path.t_end], dtype=F64)
    torch.testing.assert_close(
        path.time_of_log_snr(path.log_snr(ends)), ends, rtol=1e-12, atol=1e-12
    )
    far = path.time_of_log_snr(torch.tensor([-1e3, 1e3], dtype=F64))
    limit = path.t_end if isinstance(path, VPPath) else path.t_data
    torch.testing.assert_close(
        far, torch.tensor([path.t_noise, limit], dtype=F64), rtol=0, atol=1e-12
    )


# Predictions


@pytest.mark.parametrize('path', PATHS)
def test_conversion_between_all_predictions(path):
    "From the data and the noise that made the state, with the rates by finite differences; one time for all, or one a sample."
    data, noise = rand(6, 3, 2), rand(6, 3, 2, seed=1)
    for t in (TIMES, TIMES[2]):
        wide = lambda v: v.reshape(-1, 1, 1)
        x = wide(path.alpha(t)) * data + wide(path.sigma(t)) * noise
        truth = dict(
            data=data,
            noise=noise,
            flow=data - noise,
            velocity=wide(differences(path.alpha, t)) * data
            + wide(differences(path.sigma, t)) * noise,
        )
        assert set(truth) == set(PREDICTIONS)
        for source, target in product(PREDICTIONS, PREDICTIONS):
            torch.testing.assert_close(
                path.convert(x, t, truth[source], source, target),
                truth[target],
                rtol=1e-4,
                atol=1e-4,
            )
            there = path.convert(
                x, t, truth[source], source, target
            )  # without the finite differences to rounding
            torch.testing.assert_close(
                path.convert(x, t, there, target, source), truth[source], rtol=1e-8, atol=1e-8
            )


def test_flow_is_the_velocity_of_the_straight_path():
    x, v = rand(6, 3), rand(6, 3, seed=1)
    for target in ('data', 'noise'):
        a, b = (
            LinearPath().convert(x, TIMES, v, source, target) for source in ('velocity', 'flow')
        )
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for path, shift in (
        (ShiftedPath(), 3.0),
        (ShiftedPath(0.4), 0.4),
    ):  # the shifted path runs the same line at another speed
        speed = shift / (1 + (shift - 1) * (1 - TIMES)) ** 2
        torch.testing.assert_close(
            path.convert(x, TIMES, v, 'flow', 'velocity'),
            speed[:, None] * v,
            rtol=1e-11,
            atol=1e-11,
        )


@pytest.mark.parametrize('path', [LinearPath(), DDPMPath()])
def test_singular_conversions_are_not_finite(path):
    "No noise is left at the data, and on the linear path no data in the noise; never a finite wrong number."
    x, q = rand(6, 3), rand(6, 3, seed=1)
    data, noise = (torch.tensor(t, dtype=F64) for t in (path.t_data, path.t_noise))
    assert not path.convert(x, data, q, 'data', 'noise').isfinite().any()
    torch.testing.assert_close(path.convert(x, data, q, 'noise', 'data'), x, rtol=0, atol=1e-14)
    if path == LinearPath():
        assert not path.convert(x, noise, q, 'noise', 'data').isfinite().any()


@pytest.mark.parametrize(
    'call, message',
    [
        (
            lambda: LinearPath().convert(rand(2), TIMES[0], rand(2), 'score', 'data'),
            "source='score'.*velocity, data, noise, flow",
        ),
        (lambda: LinearPath().convert(rand(2), TIMES[0], rand(2), 'data', 'eps'), "target='eps'"),
        (lambda: DDPMPath('sigmoid'), "schedule='sigmoid'.*linear, scaled-linear, cosine"),
        (lambda: DDPMPath(train_steps=1), 'train_steps=1'),
        (lambda: DDPMPath(beta_start=0.03), 'beta_start=0.03'),
        (lambda: DDPMPath(beta_end=1.0), 'beta_end=1.0'),
        (lambda: ShiftedPath(0), 'shift=0'),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
