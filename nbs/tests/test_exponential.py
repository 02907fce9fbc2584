"Measured orders of exponential integrators, their evaluations, and what they and grids refuse."

from itertools import product

import pytest
import torch
from exact_cases import (
    CENTERS,
    DATA,
    DDPM,
    NOISE,
    STD,
    VP,
    X0,
    alpha_sigma_of_vp,
    count_calls,
    noise_of_mixture,
    rms,
    slope,
)

from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, singlestep_orders, unipc
from neuralsolver.exponential import ddim, deis, ipndm, ipndm_v
from neuralsolver.fields import GaussianMixture
from neuralsolver.optimized_grids import GRIDS, optimized_nodes
from neuralsolver.paths import LinearPath, ShiftedPath
from neuralsolver.solvers import sample
from neuralsolver.spacings import time_grid

# Orders

SHORT, STEPS, LONG = (16, 32, 64), (21, 42, 84), (48, 96, 192)
T, U = 0.7, 0.2


@pytest.fixture(scope='module')
def end():
    "The true end point of dx/dt = -beta / 2 (x - eps / sigma), by scipy's DOP853."
    from scipy.integrate import solve_ivp

    def f(t, x):
        x = torch.from_numpy(x).view_as(X0)
        a, s = alpha_sigma_of_vp(t)
        return (-(0.1 + 19.9 * t) / 2 * (x - noise_of_mixture(x, a, s) / s)).flatten().numpy()

    found = solve_ivp(f, (T, U), X0.flatten().numpy(), 'DOP853', rtol=1e-12, atol=1e-13)
    assert found.success
    return torch.from_numpy(found.y[:, -1].copy()).view_as(X0)


FULL = dict(start='rk4', finish='full')
SINGLE = dict(singlestep=True, finish='full')
MULTI = dict(singlestep=False, **FULL)
ORDERS = [  # function, its arguments, order
    (ddim, {}, 1),
    (dpm_solver_pp, dict(order=2, **FULL), 2),
    (dpm_solver_pp, dict(order=2, exact=True, **FULL), 2),
    (dpm_solver_pp, dict(order=3, exact=True, **FULL), 3),
    (dpm_solver_pp, dict(order=2, **SINGLE), 2),
    (dpm_solver_pp, dict(order=3, **SINGLE), 3),
    (dpm_solver, dict(order=2, **MULTI), 2),
    (dpm_solver, dict(order=3, exact=True, **MULTI), 3),
    (dpm_solver, dict(order=2, **SINGLE), 2),
    (dpm_solver, dict(order=3, **SINGLE), 3),
    # without a corrector order 1 is ddim; from order 3 on bh1 and bh2 are one method
    (unipc, dict(order=1, variant='bh1', **FULL), 2),
    (unipc, dict(order=1, variant='bh2', **FULL), 2),
    (unipc, dict(order=2, variant='bh1', corrector=False, **FULL), 2),
    (unipc, dict(order=2, variant='bh2', corrector=False, **FULL), 2),
    (unipc, dict(order=2, variant='bh1', **FULL), 3),
    (unipc, dict(order=2, variant='bh2', **FULL), 3),
    (unipc, dict(order=3, corrector=False, **FULL), 3),
    (unipc, dict(order=3, **FULL), 4),
    (deis, dict(order=2, **FULL), 2),
    (deis, dict(order=3, **FULL), 3),
    (deis, dict(order=3, variable='s', **FULL), 3),
    (deis, dict(order=3, variable='log-snr', **FULL), 3),
    (ipndm, dict(order=2), 2),
]


def measured(end, method, steps, **settings):
    field, errors = GaussianMixture(CENTERS, STD, path=VP), []
    for n in steps:
        solver = method(n, path=VP, spacing='log-snr', t_start=T, t_end=U, **settings)
        errors.append(rms(sample(field, X0, solver) - end))
    return slope(steps, errors)


@pytest.mark.parametrize('method, settings, order', ORDERS)
def test_measured_order(end, method, settings, order):
    """Of the whole method; the corrector of UniPC adds one order.

    The cheap start and finish would show instead in orders above 2.
    """
    steps = SHORT if order < 3 else STEPS
    assert abs(measured(end, method, steps, **settings) - order) < 0.25


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_third_order_singlestep_keeps_its_order_with_a_last_step_of_order_2(end, method):
    "3 k + 2 evaluations."
    assert abs(measured(end, method, (23, 44, 86), order=3, singlestep=True) - 3) < 0.25


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_the_released_third_order_multistep_is_of_order_2(end, method):
    assert abs(measured(end, method, LONG, order=3, **MULTI) - 2) < 0.25


# Number of evaluations


def test_nfe_is_the_number_of_steps():
    for (name, method), steps in product((DATA | NOISE).items(), (1, 2, 3, 4, 5, 8)):
        solver = method(steps, VP)
        assert count_calls(solver) == solver.nfe == steps, name
        assert solver.nodes.shape == (steps + 1,)
        if 'single' not in name:
            assert solver.steps == steps, name


def test_nfe_of_the_runge_kutta_start():
    for steps, order in product((1, 2, 3, 5), (1, 2, 3)):
        for solver in (
            unipc(steps, order, start='rk4'),
            deis(steps, order, start='rk4', finish='full'),
            dpm_solver_pp(steps, order, start='rk4'),
            dpm_solver(steps, order, singlestep=False, exact=True, start='rk4'),
        ):
            assert count_calls(solver) == solver.nfe == steps + 3 * min(order - 1, steps)


def test_evaluations_of_singlestep_methods_are_split_as_in_the_paper():
    "arXiv 2206.00927, app. D.3: K = floor(N / 3) + 1 steps."
    for n in range(1, 20):
        K = n // 3 + 1
        expected = [3] * (K - 2) + [2, 1] if n % 3 == 0 else [3] * (K - 1) + [n % 3]
        assert singlestep_orders(n, 3) == expected
        assert singlestep_orders(n, 2) == [2] * (n // 2) + [1] * (n % 2)
        assert singlestep_orders(n, 1) == [1] * n
        assert dpm_solver(n, 3).steps == len(expected)


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_a_full_finish_of_singlestep_makes_whole_steps_only(method):
    for order, steps in ((2, 6), (3, 3), (3, 6), (3, 9)):
        solver = method(steps, order, singlestep=True, finish='full')
        assert (solver.steps, solver.nfe) == (steps // order, steps)


# What exponential integrators and time grids refuse: the error names the argument.

LINEAR, FINITE = LinearPath(), 'finite signal-to-noise'


def refused(said, function, args, settings):
    with pytest.raises(ValueError, match=said):
        function(*args, **settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((4, VP, 'cosine'), {}, "spacing='cosine'"),
        ((0,), {}, 'steps=0'),
        ((4, VP), dict(t_start=1.5), 't_start=1.5'),
        ((4, VP), dict(t_start=0.1, t_end=0.5), 'nearer to noise'),
        ((4, LINEAR), dict(t_start=0.5, t_end=0.5), 'nearer'),
        ((4, VP, 'karras'), dict(rho=0), 'rho=0'),
        ((4, VP, 'shifted'), dict(shift=0), 'shift=0'),
        ((4, LINEAR, 'log-snr'), {}, FINITE),
        ((4, DDPM, 'karras'), dict(t_end=0.0), 'finite'),
    ],
)
def test_refusal_of_time_grid(args, settings, said):
    refused(said, time_grid, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((5, LINEAR), {}, FINITE),
        ((5, VP, 'optimized'), {}, "init='optimized'"),
        ((5,), dict(order=4), 'order=4'),
        ((5,), dict(method='BFGS'), "method='BFGS'"),
    ],
)
def test_refusal_of_optimized_nodes(args, settings, said):
    refused(said, optimized_nodes, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((2.5,), {}, 'steps=2.5'),
        ((4, VP, 'cosine'), {}, f"spacing='cosine'.*{', '.join(GRIDS)}"),
        ((4, VP, [1, 0.5, 0.1]), {}, r'steps \+ 1 = 5'),
        ((2, VP, [1, 0.1, 0.5]), {}, 'monotone'),
        ((2, VP, [0.1, 0.5, 1]), {}, 'from noise'),
        ((2, VP, [1, float('nan'), 0.1]), {}, 'monotone'),
        ((2, VP, [1.5, 1, 0.5]), {}, 'from noise'),
        ((5, DDPM, 'optimized'), dict(t_end=0.0), 'finite'),
    ],
)
def test_refusal_of_ddim(args, settings, said):
    "And of every grid that is given to a solver."
    refused(said, ddim, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 4), {}, 'order=4'),
        ((8,), dict(start='heun'), "start='heun'"),
        ((8,), dict(singlestep=True, exact=True), 'singlestep'),
        ((7, 2), dict(singlestep=True, finish='full'), 'multiple of 2'),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
        ((6, 2, LINEAR), {}, f'{FINITE}.*t_start'),
        ((1, 2, DDPM), dict(start='rk4', t_end=0.0), FINITE),
    ],
)
def test_refusal_of_dpm_solver_pp(args, settings, said):
    refused(said, dpm_solver_pp, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 0), {}, 'order=0'),
        ((8,), dict(finish='lower'), "finish='lower'"),
        ((8,), dict(start='rk4'), 'singlestep'),
        ((8, 3), dict(finish='full'), 'multiple of 3'),
    ],
)
def test_refusal_of_dpm_solver(args, settings, said):
    refused(said, dpm_solver, args, settings)


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_refusal_of_a_clean_end_does_not_advise_what_is_given(method):
    "A last step of order 2 cannot reach sigma = 0; finish='low-order' is the default already."
    with pytest.raises(ValueError, match='cannot end at a clean state') as error:
        method(6, 2, DDPM, singlestep=True, t_end=0.0)
    assert 'low-order' not in str(error.value)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        (('5',), {}, "steps='5'"),
        ((8, 4), {}, 'order=4'),
        ((8,), dict(variant='bh3'), "variant='bh3'"),
        ((8,), dict(finish='lower'), "finish='lower'"),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
    ],
)
def test_refusal_of_unipc(args, settings, said):
    refused(said, unipc, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 5), {}, 'order=5'),
        ((8,), dict(variable='sigma'), "variable='sigma'"),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
        ((6, 2, LINEAR), {}, 't_start'),
    ],
)
def test_refusal_of_deis(args, settings, said):
    refused(said, deis, args, settings)


@pytest.mark.parametrize(
    'method, args, settings, said',
    [
        (ipndm, (8, 5), {}, 'order=5'),
        (ipndm, (6, 4, ShiftedPath()), {}, 't_start'),
        (ipndm_v, (8, 0), {}, 'order=0'),
        (ipndm_v, (6, 2, DDPM), dict(t_end=0.0), FINITE),
    ],
)
def test_refusal_of_ipndm(method, args, settings, said):
    refused(said, method, args, settings)
