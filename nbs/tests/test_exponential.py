"Exponential integrators and time grids against diffusers, the papers' formulas, scipy and measured orders."

import math
from itertools import product
import numpy as np
import pytest
import torch
from neuralsolver.optimized_grids import GRIDS, optimized_nodes
from neuralsolver.exponential import ddim, deis, ipndm, ipndm_v
from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, singlestep_orders, unipc
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import DDPMPath, LinearPath, ShiftedPath, VPPath
from neuralsolver.classical import adams_bashforth, runge_kutta
from neuralsolver.solvers import sample
from neuralsolver.spacings import time_grid

pytestmark = pytest.mark.filterwarnings(
    'ignore::FutureWarning', 'ignore::DeprecationWarning:diffusers.*'
)  # its algorithm_type='dpmsolver'
F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


CENTERS, STD, X0 = rand(4, 3, seed=1) * 1.5, 1.0, rand(8, 3, seed=2)
VP, DDPM = VPPath(), DDPMPath()


def rms(x):
    return x.square().mean().sqrt().item()


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def noise_of_mixture(x, a, s):
    "E[eps | x] of the mixture by Bayes' rule with torch.distributions."
    total = (a * STD) ** 2 + s**2
    p = torch.stack(
        [torch.distributions.Normal(a * c, total**0.5).log_prob(x).sum(1) for c in CENTERS], 1
    ).softmax(1)
    return s / total * (x - a * (p @ CENTERS))


def alpha_sigma_of_vp(t):
    la = -(0.1 * t + 19.9 * t * t / 2) / 2
    return np.exp(la), np.sqrt(-np.expm1(2 * la))


# Same values as diffusers, on its own nodes

CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)
A, B = rand(3, 3, seed=3), rand(3, seed=4)
REFERENCE = {  # noise prediction at an index of the table
    'sine': lambda x, i: torch.sin(x @ A + B * (i + 1) / 1000),
    'mixture': lambda x, i: noise_of_mixture(x, CUMPROD[i].sqrt(), (1 - CUMPROD[i]).sqrt()),
}


def reference_loop(scheduler, steps, field):
    "The nodes in our time, and the result."
    scheduler.set_timesteps(steps)
    index, ratio = scheduler.timesteps.tolist(), ((1 - CUMPROD) / CUMPROD).sqrt()
    zero = scheduler.sigmas[-1] == 0
    assert steps == len(index)
    sigmas = torch.cat([ratio[index], 0 * ratio[:1] if zero else ratio[:1]])
    torch.testing.assert_close(
        scheduler.sigmas, sigmas.float(), rtol=5e-4, atol=0
    )  # 1 - cumprod cancels in their float32
    scheduler.sigmas, x = sigmas, X0
    for i in index:
        x = scheduler.step(field(x, i), i, x, return_dict=False)[0]
    return torch.tensor([(i + 1) / 1000 for i in index] + [0 if zero else 0.001], dtype=F64), x


def assert_same_loop(scheduler, steps, build, tolerance=1e-11):
    for name, field in REFERENCE.items():
        nodes, expected = reference_loop(scheduler, steps, field)
        solver = build(steps, nodes)

        def sine(x, t):
            i = round(1000 * t.item()) - 1
            assert abs(1000 * t - i - 1) < 1e-9
            return DDPM.convert(x, t, field(x, i), 'noise', solver.coordinates)

        result = sample(
            sine if name == 'sine' else GaussianMixture(CENTERS, STD, path=DDPM), X0, solver
        )
        assert relative(result, expected) < tolerance, (name, steps, relative(result, expected))
        assert solver.nfe == steps


@pytest.mark.parametrize(
    'kind, order', [('midpoint', 1), ('midpoint', 2), ('midpoint', 3), ('heun', 2)]
)
@pytest.mark.parametrize('algorithm', ['dpmsolver++', 'dpmsolver'])
def test_multistep_dpm_solver_is_diffusers(algorithm, kind, order):
    "Their 'heun' of order 2 is the exact integral. They cast the state to float32 in every step."
    from diffusers import DPMSolverMultistepScheduler

    method = dpm_solver_pp if algorithm == 'dpmsolver++' else dpm_solver
    for lower, last, steps in [
        (True, 'zero', 5),
        (True, 'zero', 8),
        (False, 'zero', 10),
        (True, 'zero', 16),
        (True, 'sigma_min', 10),
        (False, 'sigma_min', 5),
        (False, 'sigma_min', 8),
        (True, 'sigma_min', 16),
    ]:
        short = (
            lower and steps < 15
        )  # they ignore lower_order_final from 15 steps on, and sigma = 0 then lowers the last step alone:
        if last == 'zero' and order == 3 and not short:
            continue  # orders ..., 3, 3, 1, which is neither finish of ours
        if last == 'zero' and algorithm == 'dpmsolver':
            continue  # refused by them
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type=algorithm,
            solver_type=kind,
            lower_order_final=lower,
            final_sigmas_type=last,
        )
        finish = 'low-order' if short or last == 'zero' else 'full'
        build = lambda n, g: method(
            n, order, DDPM, g, singlestep=False, exact=kind == 'heun', finish=finish
        )
        assert_same_loop(scheduler, steps, build, 1e-5)


@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('algorithm', ['dpmsolver++', 'dpmsolver'])
def test_singlestep_dpm_solver_is_diffusers(algorithm, order):
    "Not an even number with lower_order_final: it ends in two first-order steps there, in one of order 2 here and in the paper."
    from diffusers import DPMSolverSinglestepScheduler

    method = dpm_solver_pp if algorithm == 'dpmsolver++' else dpm_solver
    for lower, last, steps in [
        (True, 'zero', 5),
        (True, 'zero', 9),
        (True, 'sigma_min', 5),
        (True, 'sigma_min', 9),
        (False, 'sigma_min', 4),
        (False, 'sigma_min', 10),
    ]:
        if last == 'zero' and algorithm == 'dpmsolver':
            continue  # refused by them
        scheduler = DPMSolverSinglestepScheduler(
            solver_order=order,
            algorithm_type=algorithm,
            lower_order_final=lower,
            final_sigmas_type=last,
        )
        assert_same_loop(scheduler, steps, lambda n, g: method(n, order, DDPM, g, singlestep=True))


@pytest.mark.parametrize('corrector', [True, False])
@pytest.mark.parametrize('order', [1, 2, 3])
@pytest.mark.parametrize('variant', ['bh1', 'bh2'])
def test_unipc_is_diffusers(variant, order, corrector):
    from diffusers import UniPCMultistepScheduler

    for lower, last, steps in [
        (True, 'zero', 8),
        (True, 'sigma_min', 5),
        (False, 'sigma_min', 10),
        (True, 'sigma_min', 16),
    ]:
        if last == 'zero' and variant == 'bh1':
            continue  # NaN there: B(h) = -h is infinite, times a correction of 0
        scheduler = UniPCMultistepScheduler(
            solver_order=order,
            solver_type=variant,
            predict_x0=True,
            lower_order_final=lower,
            final_sigmas_type=last,
            disable_corrector=[] if corrector else list(range(steps)),
        )
        assert_same_loop(
            scheduler,
            steps,
            lambda n, g: unipc(
                n, order, DDPM, g, variant, corrector, finish='low-order' if lower else 'full'
            ),
        )


@pytest.mark.parametrize('order', [1, 2, 3])
def test_deis_in_log_snr_is_diffusers(order):
    "It always ends at the first sigma of the table, and ignores lower_order_final from 15 steps on."
    from diffusers import DEISMultistepScheduler

    for lower, steps in [(True, 5), (True, 10), (False, 5), (False, 8), (True, 16)]:
        finish = 'low-order' if lower and steps < 15 else 'full'
        assert_same_loop(
            DEISMultistepScheduler(solver_order=order, lower_order_final=lower),
            steps,
            lambda n, g: deis(n, order, DDPM, g, 'log-snr', finish=finish),
        )


@pytest.mark.parametrize('steps', [5, 8, 10])
def test_ipndm_is_diffusers(steps):
    "Its trained_betas are the sigmas of the nodes, and it takes v = alpha eps - sigma x_0, which it turns into eps."
    from diffusers import IPNDMScheduler

    index = np.linspace(0, 999, steps + 1).round()[::-1][:-1].astype(int).tolist()
    sigma = torch.cat([(1 - CUMPROD[index]).sqrt(), torch.zeros(1, dtype=F64)])
    grid = torch.tensor([(i + 1) / 1000 for i in index] + [0], dtype=F64)
    for field in REFERENCE.values():
        scheduler, x = IPNDMScheduler(trained_betas=sigma.tolist()), X0
        scheduler.set_timesteps(steps)
        scheduler.betas, scheduler.alphas = sigma, (1 - sigma**2).sqrt()
        scheduler.set_begin_index(
            0
        )  # their float32 times coincide near pure noise, and the first step would be skipped
        for k, i in enumerate(index):
            x = scheduler.step(
                (field(x, i) - sigma[k] * x) / scheduler.alphas[k], scheduler.timesteps[k], x
            ).prev_sample
        result = sample(
            lambda x, t: field(x, round(1000 * t.item()) - 1), X0, ipndm(steps, 4, DDPM, grid)
        )
        assert relative(result, x) < 1e-9  # the detour by v costs digits


# Same values as the papers' formulas


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
@pytest.mark.parametrize('evaluations', [4, 5, 8, 9])
def test_singlestep_of_order_3_is_the_papers(method, evaluations):
    "DPM-Solver, algorithm 2 (arXiv 2206.00927), at general r_1, r_2, and its data-prediction counterpart; orders 3, ..., and what is left."
    solver = method(evaluations, 3, VP, singlestep=True, t_start=0.95, t_end=0.02)
    data = method is dpm_solver_pp
    field = GaussianMixture(CENTERS, STD, path=VP, prediction='data' if data else 'noise')
    times, x = solver.nodes.numpy(), X0
    rest = {4: [3, 1], 5: [3, 2], 8: [3, 3, 2], 9: [3, 3, 2, 1]}[evaluations]
    for p in rest:
        (t, *inner), end = times[:p], times[p]
        times = times[p:]
        (a, s), l = alpha_sigma_of_vp(t), lambda t: np.log(np.divide(*alpha_sigma_of_vp(t)))
        h, r = l(end) - l(t), [(l(u) - l(t)) / (l(end) - l(t)) for u in inner]

        def move(
            u, part, slope
        ):  # the linear part and the constant; then the slope of the prediction, per unit of part
            (a1, s1), z = alpha_sigma_of_vp(u), part * h
            if data:
                return (
                    s1 / s * x
                    - a1 * math.expm1(-z) * q0
                    + a1 * (math.expm1(-z) / z + 1) * part * slope
                )
            return (
                a1 / a * x - s1 * math.expm1(z) * q0 - s1 * (math.expm1(z) / z - 1) * part * slope
            )

        q0 = field(x, torch.tensor(t))
        if p == 1:
            x = move(end, 1, 0)
        else:
            q1 = field(move(inner[0], r[0], 0), torch.tensor(inner[0]))
            if p == 3:
                q2 = field(move(inner[1], r[1], (q1 - q0) / r[0]), torch.tensor(inner[1]))
                x = move(end, 1, (q2 - q0) / r[1])
            else:
                a1, s1 = alpha_sigma_of_vp(end)
                rise = a1 * math.expm1(-h) if data else s1 * math.expm1(h)
                x = move(end, 1, 0) - rise / (2 * r[0]) * (q1 - q0)
    assert len(times) == 1 and solver.steps == len(rest)
    torch.testing.assert_close(sample(field, X0, solver), x, rtol=1e-10, atol=1e-10)


def step_numbers(solver, i):
    "kappa of the nodes relative to node i, h, and c s at the end, of a solver on the VP path in data or noise coordinates."
    a, s = alpha_sigma_of_vp(solver.nodes.numpy())
    data = solver.coordinates == 'data'
    kappa = np.log(a / s) * (1 if data else -1)
    return kappa - kappa[i], kappa[i + 1] - kappa[i], (a if data else s)[i + 1]


GRID = [0.97, 0.8, 0.66, 0.41, 0.3, 0.12, 0.05]


@pytest.mark.parametrize('order', [1, 2, 3])
@pytest.mark.parametrize(
    'method', [dpm_solver_pp, lambda *args, **kw: dpm_solver(*args, singlestep=False, **kw)]
)
def test_exact_weights_are_phi_functions(method, order):
    "Newton's form of the polynomial in kappa, and the integrals of e^(tau - h) tau^k over [0, h] in closed form; at the ends lower orders."
    for finish in ('full', 'low-order'):
        solver = method(6, order, VP, GRID, exact=True, finish=finish)
        for i, row in enumerate(solver.weights.numpy()):
            tau, h, full = step_numbers(solver, i)
            q = min(order, i + 1, 6 - i if finish == 'low-order' else order)
            I0 = -math.expm1(-h)
            I1 = h - I0
            I2 = h**2 - 2 * I1
            unit, expected = np.eye(6), I0 * np.eye(6)[i]
            if q > 1:
                expected = expected + I1 * (d1 := (unit[i] - unit[i - 1]) / -tau[i - 1])
            if q > 2:
                d2 = (d1 - (unit[i - 1] - unit[i - 2]) / (tau[i - 1] - tau[i - 2])) / -tau[i - 2]
                expected = expected + (I2 - tau[i - 1] * I1) * d2
            np.testing.assert_allclose(row, full * expected, rtol=0, atol=1e-10 * np.abs(row).max())


@pytest.mark.parametrize(
    'method', [dpm_solver_pp, lambda *args, **kw: dpm_solver(*args, singlestep=False, **kw)]
)
def test_the_released_third_order_takes_half_of_the_quadratic_term(method):
    "Constant and linear predictions are integrated exactly, q = (kappa - kappa_i)^2 at half its value."
    solver = method(6, 3, VP, GRID, finish='full')
    for i in range(2, 6):
        tau, h, full = step_numbers(solver, i)
        row = solver.weights[i].numpy()
        I0 = -math.expm1(-h)
        I1 = h - I0
        I2 = h**2 - 2 * I1
        for k, expected in enumerate([I0, I1, I2 / 2]):
            np.testing.assert_allclose(row @ tau[:6] ** k, full * expected, rtol=1e-9)


@pytest.mark.parametrize('variable', ['time', 's', 'log-snr'])
@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_deis_integrates_powers_of_its_variable(variable, order):
    "c times the integral of z^k ds, by scipy."
    from scipy.integrate import quad

    def s(t):
        return np.divide(*alpha_sigma_of_vp(t)[::-1])

    z = {'time': lambda t: t, 's': s, 'log-snr': lambda t: np.log(s(t))}[variable]
    rate = lambda t: (0.1 + 19.9 * t) / 2 / alpha_sigma_of_vp(t)[0] ** 2 / s(t)  # ds/dt
    solver = deis(6, order, VP, GRID, variable, finish='full')
    for i, row in enumerate(solver.weights.numpy()):
        q = min(order, i + 1)
        assert np.count_nonzero(row) == q
        for k in range(q):
            power = lambda t: (z(t) - z(GRID[i])) ** k
            integral = quad(
                lambda t: power(t) * rate(t), GRID[i], GRID[i + 1], epsabs=0, epsrel=1e-11
            )[0]
            np.testing.assert_allclose(
                row @ power(np.array(GRID[:6])),
                alpha_sigma_of_vp(GRID[i + 1])[0] * integral,
                rtol=1e-8,
            )


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_adams_bashforth_in_s(order):
    "deis in s, and ipndm_v, are variable-step Adams-Bashforth in s = sigma / alpha; iPNDM has its constants on a uniform grid."
    grid = time_grid(7, VP, 'karras', 0.9, 0.01)
    a, s = (torch.from_numpy(v) for v in alpha_sigma_of_vp(grid.numpy()))
    expected = adams_bashforth(7, order, s / a).weights * a[1:, None]
    for solver in (deis(7, order, VP, grid, 's', finish='full'), ipndm_v(7, order, VP, grid)):
        torch.testing.assert_close(
            solver.weights, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item()
        )
    torch.testing.assert_close(
        ipndm(7, order).weights, adams_bashforth(7, order).weights, rtol=0, atol=1e-14
    )
    constants = adams_bashforth(7, order).weights * 7 * (a[1:] * (s / a).diff())[:, None]
    torch.testing.assert_close(ipndm(7, order, VP, grid).weights, constants, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    'path, ends',
    [
        (VP, {}),
        (DDPM, {}),
        (DDPM, dict(t_end=0.0)),
        (LinearPath(), dict(t_start=0.02)),
        (ShiftedPath(), dict(t_start=0.02)),
    ],
)
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


DATA = {
    'ddim': ddim,
    **{
        f'{f.__name__}-{o}-{k}': lambda n, p, f=f, o=o, kw=kw, **ends: f(n, o, p, **kw, **ends)
        for f, o, k, kw in [
            (dpm_solver_pp, 2, 'multi', {}),
            (dpm_solver_pp, 3, 'multi', {}),
            (dpm_solver_pp, 3, 'exact', dict(exact=True)),
            (dpm_solver_pp, 2, 'single', dict(singlestep=True)),
            (dpm_solver_pp, 3, 'single', dict(singlestep=True)),
            (unipc, 2, 'bh1', dict(variant='bh1')),
            (unipc, 2, 'bh2', {}),
            (unipc, 3, 'bh1', dict(variant='bh1')),
            (unipc, 3, 'bh2', {}),
            (unipc, 3, 'predictor', dict(corrector=False)),
        ]
    },
}
NOISE = {
    f'{f.__name__}-{o}-{k}': lambda n, p, f=f, o=o, kw=kw, **ends: f(n, o, p, **kw, **ends)
    for f, o, k, kw in [
        (dpm_solver, 2, 'single', {}),
        (dpm_solver, 3, 'single', {}),
        (dpm_solver, 2, 'multi', dict(singlestep=False)),
        (dpm_solver, 3, 'multi', dict(singlestep=False)),
        (dpm_solver, 3, 'exact', dict(singlestep=False, exact=True)),
        (deis, 3, 'time', {}),
        (deis, 4, 's', dict(variable='s')),
        (deis, 3, 'log-snr', dict(variable='log-snr')),
        (ipndm, 4, '', {}),
    ]
}
ENDS = [
    (VP, {}),
    (DDPM, {}),
    (DDPM, dict(t_end=0.0)),
    (LinearPath(), dict(t_start=0.02)),
    (ShiftedPath(), dict(t_start=0.02, t_end=1.0)),
]


@pytest.mark.parametrize('path, ends', ENDS)
def test_constant_predictions_are_integrated_exactly(path, ends):
    "A path through x_0 and eps ends at alpha x_0 + sigma eps, and at x_0 itself where sigma is 0; the log-SNR of that end is infinite."
    x0, eps = rand(8, 3, seed=5), rand(8, 3, seed=6)
    ipndm_here = path.coordinates != 'velocity'
    for method, q in (
        *((m, x0) for m in DATA.values()),
        *((m, eps) for k, m in NOISE.items() if ipndm_here or 'ipndm' not in k),
    ):
        for steps in (
            1,
            7,
        ):  # the last singlestep of 7 evaluations is of order 1, as sigma = 0 demands
            solver = method(steps, path, **ends)
            start, end = solver.nodes[0], solver.nodes[-1]
            result = sample(lambda x, t: q, path.interpolate(x0, eps, start), solver)
            torch.testing.assert_close(
                result, path.interpolate(x0, eps, end), rtol=1e-10, atol=1e-11
            )
            if path.sigma(end) == 0:
                torch.testing.assert_close(result, x0, rtol=1e-10, atol=1e-11)


# Orders

SHORT, STEPS, LONG = (16, 32, 64), (21, 42, 84), (48, 96, 192)
T, U = 0.7, 0.2


@pytest.fixture(scope='module')
def end():
    "The true end point: the probability-flow ODE dx/dt = -beta / 2 (x - eps / sigma) by scipy's DOP853."
    from scipy.integrate import solve_ivp

    def f(t, x):
        x = torch.from_numpy(x).view_as(X0)
        a, s = alpha_sigma_of_vp(t)
        return (-(0.1 + 19.9 * t) / 2 * (x - noise_of_mixture(x, a, s) / s)).flatten().numpy()

    found = solve_ivp(f, (T, U), X0.flatten().numpy(), 'DOP853', rtol=1e-12, atol=1e-13)
    assert found.success
    return torch.from_numpy(found.y[:, -1].copy()).view_as(X0)


FULL = dict(start='rk4', finish='full')
ORDERS = [  # function, its arguments, order
    (ddim, {}, 1),
    (dpm_solver_pp, dict(order=2, **FULL), 2),
    (dpm_solver_pp, dict(order=2, exact=True, **FULL), 2),
    (dpm_solver_pp, dict(order=3, exact=True, **FULL), 3),
    (dpm_solver, dict(order=2, singlestep=False, **FULL), 2),
    (dpm_solver, dict(order=3, singlestep=False, exact=True, **FULL), 3),
    *(
        (unipc, dict(order=p, variant=v, corrector=c, **FULL), p + c)
        for p, v, c in product((1, 2, 3), ('bh1', 'bh2'), (False, True))
    ),
    *(
        (deis, dict(order=p, variable=v, **FULL), p)
        for p, v in product((2, 3), ('time', 's', 'log-snr'))
    ),
    *(
        (f, dict(order=p, singlestep=True, finish='full'), p)
        for p, f in product((2, 3), (dpm_solver, dpm_solver_pp))
    ),
    (ipndm, dict(order=2), 2),
]


def measured(end, method, steps, **kw):
    field = GaussianMixture(CENTERS, STD, path=VP)
    return slope(
        steps,
        [
            rms(
                sample(field, X0, method(n, path=VP, spacing='log-snr', t_start=T, t_end=U, **kw))
                - end
            )
            for n in steps
        ],
    )


@pytest.mark.parametrize('method, kw, order', ORDERS)
def test_measured_order(end, method, kw, order):
    "Of the whole method; the corrector of UniPC adds one order. The cheap start and finish would show instead in orders above 2."
    assert abs(measured(end, method, SHORT if order < 3 else STEPS, **kw) - order) < 0.25


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_third_order_singlestep_keeps_its_order_with_a_last_step_of_order_2(end, method):
    "3 k + 2 evaluations."
    assert abs(measured(end, method, (23, 44, 86), order=3, singlestep=True) - 3) < 0.25


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_the_released_third_order_multistep_is_of_order_2(end, method):
    assert abs(measured(end, method, LONG, order=3, singlestep=False, **FULL) - 2) < 0.25


# Number of evaluations


def calls(solver):
    seen = []
    sample(lambda x, t: (seen.append(float(t)), -x)[1], torch.ones(2, 1, dtype=F64), solver)
    assert seen == solver.nodes[:-1].tolist()  # at the nodes, in their order
    return len(seen)


@pytest.mark.parametrize('name', [*DATA, *NOISE])
def test_nfe_is_the_number_of_steps(name):
    for steps in (1, 2, 3, 4, 5, 8, 15):
        solver = {**DATA, **NOISE}[name](steps, VP)
        assert calls(solver) == solver.nfe == steps and solver.nodes.shape == (steps + 1,)
        if 'single' not in name:
            assert solver.steps == steps


def test_nfe_of_the_runge_kutta_start():
    for steps, order in product((1, 2, 3, 5), (1, 2, 3)):
        for solver in (
            unipc(steps, order, start='rk4'),
            deis(steps, order, start='rk4', finish='full'),
            dpm_solver_pp(steps, order, start='rk4'),
            dpm_solver(steps, order, singlestep=False, exact=True, start='rk4'),
        ):
            assert calls(solver) == solver.nfe == steps + 3 * min(order - 1, steps)


def test_evaluations_of_singlestep_methods_are_split_as_in_the_paper():
    "arXiv 2206.00927, app. D.3: K = floor(N / 3) + 1 steps."
    for n in range(1, 20):
        K = n // 3 + 1
        expected = [3] * (K - 2) + [2, 1] if n % 3 == 0 else [3] * (K - 1) + [n % 3]
        assert singlestep_orders(n, 3) == expected
        assert (
            singlestep_orders(n, 2) == [2] * (n // 2) + [1] * (n % 2)
            and singlestep_orders(n, 1) == [1] * n
        )
        assert dpm_solver(n, 3).steps == len(expected)


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_a_full_finish_of_singlestep_makes_whole_steps_only(method):
    for order, steps in ((2, 6), (3, 3), (3, 6), (3, 9)):
        solver = method(steps, order, singlestep=True, finish='full')
        assert (solver.steps, solver.nfe) == (steps // order, steps)


# Errors


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: time_grid(4, VP, 'cosine'), "spacing='cosine'"),
        (lambda: ddim(4, VP, 'cosine'), f"spacing='cosine'.*{', '.join(GRIDS)}"),
        (lambda: time_grid(0), 'steps=0'),
        (lambda: ddim(2.5), 'steps=2.5'),
        (lambda: unipc('5'), "steps='5'"),
        (lambda: ddim(4, VP, [1, 0.5, 0.1]), r'steps \+ 1 = 5'),
        (lambda: ddim(2, VP, [1, 0.1, 0.5]), 'monotone'),
        (lambda: ddim(2, VP, [0.1, 0.5, 1]), 'from noise'),
        (lambda: ddim(2, VP, [1, float('nan'), 0.1]), 'monotone'),
        (lambda: ddim(2, VP, [1.5, 1, 0.5]), 'from noise'),
        (lambda: time_grid(4, VP, t_start=1.5), 't_start=1.5'),
        (lambda: time_grid(4, VP, t_start=0.1, t_end=0.5), 'nearer to noise'),
        (lambda: time_grid(4, LinearPath(), t_start=0.5, t_end=0.5), 'nearer'),
        (lambda: time_grid(4, VP, 'karras', rho=0), 'rho=0'),
        (lambda: time_grid(4, VP, 'shifted', shift=0), 'shift=0'),
        (lambda: time_grid(4, LinearPath(), 'log-snr'), 'finite signal-to-noise'),
        (lambda: time_grid(4, DDPM, 'karras', t_end=0.0), 'finite'),
        (lambda: optimized_nodes(5, LinearPath()), 'finite signal-to-noise'),
        (lambda: ddim(5, DDPM, 'optimized', t_end=0.0), 'finite'),
        (lambda: optimized_nodes(5, VP, 'optimized'), "init='optimized'"),
        (lambda: optimized_nodes(5, order=4), 'order=4'),
        (lambda: optimized_nodes(5, method='BFGS'), "method='BFGS'"),
        (lambda: dpm_solver_pp(8, 4), 'order=4'),
        (lambda: dpm_solver(8, 0), 'order=0'),
        (lambda: unipc(8, 4), 'order=4'),
        (lambda: deis(8, 5), 'order=5'),
        (lambda: ipndm(8, 5), 'order=5'),
        (lambda: ipndm_v(8, 0), 'order=0'),
        (lambda: unipc(8, variant='bh3'), "variant='bh3'"),
        (lambda: deis(8, variable='sigma'), "variable='sigma'"),
        (lambda: dpm_solver_pp(8, start='heun'), "start='heun'"),
        (lambda: unipc(8, finish='lower'), "finish='lower'"),
        (lambda: dpm_solver(8, finish='lower'), "finish='lower'"),
        (lambda: dpm_solver_pp(8, singlestep=True, exact=True), 'singlestep'),
        (lambda: dpm_solver(8, start='rk4'), 'singlestep'),
        (lambda: dpm_solver(8, 3, finish='full'), 'multiple of 3'),
        (lambda: dpm_solver_pp(7, 2, singlestep=True, finish='full'), 'multiple of 2'),
        *(
            (
                lambda f=f: f(6, 2, DDPM, t_end=0.0, finish='full'),
                'finite signal-to-noise.*low-order',
            )
            for f in (dpm_solver_pp, unipc, deis)
        ),
        (lambda: ipndm_v(6, 2, DDPM, t_end=0.0), 'finite signal-to-noise'),
        (lambda: dpm_solver_pp(6, 2, LinearPath()), 'finite signal-to-noise.*t_start'),
        (lambda: deis(6, 2, LinearPath()), 't_start'),
        (lambda: ipndm(6, 4, ShiftedPath()), 't_start'),
        (lambda: dpm_solver_pp(1, 2, DDPM, start='rk4', t_end=0.0), 'finite signal-to-noise'),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_singlestep_to_a_clean_end_does_not_advise_what_is_given(method):
    "A last step of order 2 cannot reach sigma = 0; finish='low-order' is the default already."
    with pytest.raises(ValueError, match='cannot end at a clean state') as error:
        method(6, 2, DDPM, singlestep=True, t_end=0.0)
    assert 'low-order' not in str(error.value)
