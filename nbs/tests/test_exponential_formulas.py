"Exponential integrators give the same values as their papers' formulas."

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_cases import CENTERS, DATA, DDPM, NOISE, STD, VP, X0
from exact_cases import alpha_sigma_of_vp, multistep_dpm_solver, rand

from neuralsolver.classical import adams_bashforth, lagrange_weights, runge_kutta
from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.exponential import ddim, deis, ipndm, ipndm_v
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import LinearPath, ShiftedPath
from neuralsolver.solvers import sample
from neuralsolver.spacings import time_grid

GRID = [0.97, 0.8, 0.66, 0.41, 0.3, 0.12, 0.05]
ENDS = [
    (VP, {}),
    (DDPM, dict(t_end=0.0)),
    (LinearPath(), dict(t_start=0.02)),
    (ShiftedPath(), dict(t_start=0.02, t_end=1.0)),
]


def log_snr_of_vp(t):
    return np.log(np.divide(*alpha_sigma_of_vp(t)))


def sigma_over_alpha(t):
    return np.divide(*alpha_sigma_of_vp(t)[::-1])


# DPM-Solver


class PaperStep:
    "One step of DPM-Solver (arXiv 2206.00927, algorithm 2), or its data-prediction counterpart."

    def __init__(self, field, x, t, end):
        self.field = field
        self.data = field.prediction == 'data'
        self.x = x
        self.t = t
        self.end = end
        self.q = self.predicted(x, t)
        self.h = log_snr_of_vp(end) - log_snr_of_vp(t)

    def predicted(self, x, t):
        return self.field(x, torch.tensor(t))

    def part(self, u):
        "Position of a time inside the step, 0 to 1."
        return (log_snr_of_vp(u) - log_snr_of_vp(self.t)) / self.h

    def move(self, u, slope):
        "Linear part and constant; then the slope of the prediction, per unit of the step."
        (a, s), (b, r) = alpha_sigma_of_vp(self.t), alpha_sigma_of_vp(u)
        part = self.part(u)
        z = part * self.h
        if self.data:
            rest = b * (math.expm1(-z) / z + 1) * part * slope
            return r / s * self.x - b * math.expm1(-z) * self.q + rest
        rest = r * (math.expm1(z) / z - 1) * part * slope
        return b / a * self.x - r * math.expm1(z) * self.q - rest

    def of_order_2(self, u):
        a, s = alpha_sigma_of_vp(self.end)
        rise = a * math.expm1(-self.h) if self.data else s * math.expm1(self.h)
        change = self.predicted(self.move(u, 0), u) - self.q
        return self.move(self.end, 0) - rise / (2 * self.part(u)) * change

    def of_order_3(self, u, v):
        change = self.predicted(self.move(u, 0), u) - self.q
        inner = self.move(v, change / self.part(u))
        return self.move(self.end, (self.predicted(inner, v) - self.q) / self.part(v))


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
@pytest.mark.parametrize('evaluations, orders', [(5, [3, 2]), (9, [3, 3, 2, 1])])
def test_singlestep_of_order_3_is_the_papers(method, evaluations, orders):
    "At general r_1, r_2; orders 3, ..., and what is left."
    solver = method(evaluations, 3, VP, singlestep=True, t_start=0.95, t_end=0.02)
    prediction = 'data' if method is dpm_solver_pp else 'noise'
    field = GaussianMixture(CENTERS, STD, path=VP, prediction=prediction)
    times, x = solver.nodes.numpy(), X0
    for order in orders:
        step = PaperStep(field, x, times[0], times[order])
        inner = times[1:order]
        if order == 1:
            x = step.move(step.end, 0)
        elif order == 2:
            x = step.of_order_2(*inner)
        else:
            x = step.of_order_3(*inner)
        times = times[order:]
    assert len(times) == 1 and solver.steps == len(orders)
    torch.testing.assert_close(sample(field, X0, solver), x, rtol=1e-10, atol=1e-10)


def step_numbers(solver, i):
    "kappa of the nodes relative to node i, h, and c s at the end; data or noise coordinates."
    a, s = alpha_sigma_of_vp(solver.nodes.numpy())
    data = solver.coordinates == 'data'
    kappa = np.log(a / s) * (1 if data else -1)
    return kappa - kappa[i], kappa[i + 1] - kappa[i], (a if data else s)[i + 1]


def phi_integrals(h):
    "Integrals of e^(tau - h) tau^k over [0, h] for k = 0, 1, 2."
    first = -math.expm1(-h)
    second = h - first
    return first, second, h**2 - 2 * second


def newton_row(tau, h, i, order):
    "Newton's form of the polynomial in kappa through the last evaluations, integrated."
    constant, linear, quadratic = phi_integrals(h)
    unit = np.eye(6)
    row = constant * unit[i]
    if order > 1:
        first = (unit[i] - unit[i - 1]) / -tau[i - 1]
        row = row + linear * first
    if order > 2:
        before = (unit[i - 1] - unit[i - 2]) / (tau[i - 1] - tau[i - 2])
        row = row + (quadratic - tau[i - 1] * linear) * (first - before) / -tau[i - 2]
    return row


@pytest.mark.parametrize('order', [1, 2, 3])
@pytest.mark.parametrize('method', [dpm_solver_pp, multistep_dpm_solver])
def test_exact_weights_are_phi_functions(method, order):
    "In closed form; at the ends lower orders."
    for finish in ('full', 'low-order'):
        solver = method(6, order, VP, GRID, exact=True, finish=finish)
        for i, row in enumerate(solver.weights.numpy()):
            tau, h, full = step_numbers(solver, i)
            q = min(order, i + 1, 6 - i if finish == 'low-order' else order)
            expected = full * newton_row(tau, h, i, q)
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-10 * np.abs(row).max())


@pytest.mark.parametrize('method', [dpm_solver_pp, multistep_dpm_solver])
def test_the_released_third_order_takes_half_of_the_quadratic_term(method):
    "Constant and linear predictions exactly, q = (kappa - kappa_i)^2 at half its value."
    solver = method(6, 3, VP, GRID, finish='full')
    for i in range(2, 6):
        tau, h, full = step_numbers(solver, i)
        row = solver.weights[i].numpy()
        constant, linear, quadratic = phi_integrals(h)
        for k, expected in enumerate([constant, linear, quadratic / 2]):
            np.testing.assert_allclose(row @ tau[:6] ** k, full * expected, rtol=1e-9)


# DEIS, iPNDM


def identity(t):
    return t


def log_sigma_over_alpha(t):
    return np.log(sigma_over_alpha(t))


VARIABLES = {'time': identity, 's': sigma_over_alpha, 'log-snr': log_sigma_over_alpha}


def rate_of_s(t):
    "ds/dt of s = sigma / alpha."
    return (0.1 + 19.9 * t) / 2 / alpha_sigma_of_vp(t)[0] ** 2 / sigma_over_alpha(t)


@pytest.mark.parametrize('variable', VARIABLES)
@pytest.mark.parametrize('order', [2, 4])
def test_deis_integrates_powers_of_its_variable(variable, order):
    "c times the integral of z^k ds, by scipy; the first rows are of lower order."
    from scipy.integrate import quad

    z = VARIABLES[variable]
    solver = deis(6, order, VP, GRID, variable, finish='full')
    for i, row in enumerate(solver.weights.numpy()):
        q = min(order, i + 1)
        assert np.count_nonzero(row) == q
        scale = alpha_sigma_of_vp(GRID[i + 1])[0]
        for k in range(q):

            def integrand(t):
                return (z(t) - z(GRID[i])) ** k * rate_of_s(t)

            integral = quad(integrand, GRID[i], GRID[i + 1], epsabs=0, epsrel=1e-11)[0]
            power = (z(np.array(GRID[:6])) - z(GRID[i])) ** k
            np.testing.assert_allclose(row @ power, scale * integral, rtol=1e-8)


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_adams_bashforth_in_s(order):
    """deis in s, and ipndm_v, are variable-step Adams-Bashforth in s = sigma / alpha.

    iPNDM has its constants on a uniform grid.
    """
    grid = time_grid(7, VP, 'karras', 0.9, 0.01)
    a, s = (torch.from_numpy(v) for v in alpha_sigma_of_vp(grid.numpy()))
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for i, (start, end) in enumerate(pairwise((s / a).tolist())):
        used = slice(max(0, i + 1 - order), i + 1)
        expected[i, used] = torch.from_numpy(lagrange_weights((s / a)[used].numpy(), start, end))
    expected *= a[1:, None]
    atol = 1e-9 * expected.abs().max().item()
    for solver in (deis(7, order, VP, grid, 's', finish='full'), ipndm_v(7, order, VP, grid)):
        torch.testing.assert_close(solver.weights, expected, rtol=1e-7, atol=atol)
    uniform = adams_bashforth(7, order).weights
    torch.testing.assert_close(ipndm(7, order).weights, uniform, rtol=0, atol=1e-14)
    constants = uniform * 7 * (a[1:] * (s / a).diff())[:, None]
    torch.testing.assert_close(ipndm(7, order, VP, grid).weights, constants, rtol=1e-10, atol=1e-12)


# What all of them share


@pytest.mark.parametrize('path, ends', ENDS)
def test_ddim_is_eulers_method_in_data_and_in_noise_coordinates(path, ends):
    "Also on straight paths, where both are Euler's method for the velocity."
    field, grid = GaussianMixture(CENTERS, STD, path=path), time_grid(6, path, **ends)
    result = sample(field, X0, ddim(6, path, **ends))
    for solver in (
        *(runge_kutta(['euler'] * 6, grid, 'euler', c, path) for c in ('data', 'noise')),
        dpm_solver(6, 1, path, **ends),
        dpm_solver_pp(6, 1, path, singlestep=True, **ends),
        deis(6, 1, path, **ends),
        unipc(6, 1, path, corrector=False, **ends),
    ):
        torch.testing.assert_close(sample(field, X0, solver), result, rtol=1e-11, atol=1e-11)
    if isinstance(path, LinearPath):
        x = X0
        for t, u in zip(path.alpha(grid), path.alpha(grid)[1:]):
            x = x + (u - t) * GaussianMixture(CENTERS, STD)(x, t)
        torch.testing.assert_close(result, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('path, ends', ENDS)
def test_constant_predictions_are_integrated_exactly(path, ends):
    """A path through x_0 and eps ends at alpha x_0 + sigma eps.

    It ends at x_0 itself where sigma is 0; the log-SNR of that end is infinite.
    """
    x0, eps = rand(8, 3, seed=5), rand(8, 3, seed=6)
    straight = path.coordinates == 'velocity'
    noise = [method for name, method in NOISE.items() if not (straight and 'ipndm' in name)]
    for method, q in (*((m, x0) for m in DATA.values()), *((m, eps) for m in noise)):
        # the last singlestep of 7 evaluations is of order 1, as sigma = 0 demands
        for steps in (1, 7):
            solver = method(steps, path, **ends)
            start, end = solver.nodes[0], solver.nodes[-1]
            result = sample(lambda x, t: q, path.interpolate(x0, eps, start), solver)
            expected = path.interpolate(x0, eps, end)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)
            if path.sigma(end) == 0:
                torch.testing.assert_close(result, x0, rtol=1e-10, atol=1e-11)
