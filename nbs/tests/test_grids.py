"Time grids, optimised nodes and moved solvers against diffusers, the released code and scipy."

import math
from itertools import product

import numpy as np
import pytest
import torch
from exact_cases import CENTERS, CUMPROD, DDPM, F64, STD, VP, X0, rand

from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.exponential import ddim, deis, ipndm
from neuralsolver.fields import GaussianMixture
from neuralsolver.optimized_grids import error_growth, optimized_nodes
from neuralsolver.paths import DDPMPath, LinearPath, ShiftedPath
from neuralsolver.solvers import sample
from neuralsolver.spacings import SPACINGS, time_grid
from neuralsolver.transfer import change_path

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')
LINEAR = LinearPath()

# Time grids


@pytest.mark.parametrize(
    'name, theirs',
    [
        ('karras', '_convert_to_karras'),
        ('log-snr', '_convert_to_exponential'),
        ('log-snr', '_convert_to_lu'),
    ],
)
def test_spacings_are_diffusers(name, theirs):
    """Their N sigmas end at the table's first entry, where our N - 1 steps end.

    Their sigma is sigma / alpha here.
    """
    from diffusers import DPMSolverMultistepScheduler

    convert = getattr(DPMSolverMultistepScheduler(), theirs)
    ratio = ((1 - CUMPROD) / CUMPROD).sqrt().flip(0).numpy()
    in_logarithms = theirs == '_convert_to_lu'
    for n in (2, 5, 11):
        expected = np.exp(convert(np.log(ratio), n)) if in_logarithms else convert(ratio, n)
        nodes = time_grid(n - 1, DDPM, name)
        np.testing.assert_allclose((-DDPM.log_snr(nodes)).exp(), expected, rtol=1e-9)
        assert nodes[0] == 1 and nodes[-1] == 0.001


@pytest.mark.parametrize('shift', [3.0, 0.5])
def test_shifted_spacing_is_diffusers_flow_schedule(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    nodes = time_grid(8, LINEAR, 'shifted', shift=shift)
    torch.testing.assert_close((1 - nodes).float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    uniform = time_grid(8, ShiftedPath(shift))
    torch.testing.assert_close(ShiftedPath(shift).alpha(uniform), nodes, rtol=0, atol=1e-15)


def uniform_quantity(name, path, t):
    "What a spacing makes uniform: rho = 4, shift = 5."
    left = (t - path.t_data).abs()
    ratio = path.sigma(t) / path.alpha(t)
    quantities = {
        'time': t,
        'quadratic': left.sqrt(),
        'log-snr': ratio.log(),
        'karras': ratio ** (1 / 4),
        'shifted': left / (5 - 4 * left),
    }
    return quantities[name]


@pytest.mark.parametrize(
    'path, ends',
    [
        (VP, (0.9, 0.02)),
        (DDPM, (1.0, 0.001)),
        (LINEAR, (0.1, 0.98)),
        (ShiftedPath(), (0.1, 0.98)),
    ],
)
def test_spacings_are_uniform_in_what_they_say(path, ends):
    for name in SPACINGS:
        nodes = time_grid(9, path, name, *ends, rho=4.0, shift=5.0)
        d = uniform_quantity(name, path, nodes).diff()
        torch.testing.assert_close(d, d.mean().expand(9), rtol=1e-6, atol=1e-9)
        assert (nodes[0].item(), nodes[-1].item()) == ends
        assert nodes.dtype == F64 and nodes.shape == (10,)
        assert torch.equal(ddim(9, path, name, *ends).nodes, time_grid(9, path, name, *ends))


# Optimised nodes


def naive_contributions(lam, i):
    "Of the errors of all evaluations in step i: J of the released code."
    from scipy.integrate import quad
    from scipy.interpolate import lagrange

    N, J = len(lam) - 1, np.zeros(len(lam) - 1)
    used = list(range(max(i - 2, i - (N - i) + 1, 0), i + 1))
    for j in used:
        p = lagrange([lam[m] - lam[i] for m in used], [float(m == j) for m in used])

        def integrand(u):
            return math.exp(u + lam[i] - lam[-1]) * p(u)

        # the error of the data prediction is sigma^2 / alpha
        sigma2 = 1 / (1 + math.exp(2 * lam[j]))
        integral = quad(integrand, 0, lam[i + 1] - lam[i])[0]
        J[j] = integral * sigma2 / math.sqrt(1 - sigma2)
    return J


def naive_error_growth(lam):
    """The released definition (arXiv 2402.17376).

    The first three steps and the last by themselves, the others by evaluation.
    """
    N = len(lam) - 1
    own, shared = 0, np.zeros(N)
    for i in range(N):
        J = naive_contributions(lam, i)
        if i < 3 or i == N - 1:
            own += np.linalg.norm(J)
        else:
            shared += J
    return own + np.abs(shared).sum()


def growth_of(path, nodes):
    return naive_error_growth(path.log_snr(nodes).numpy())


@pytest.mark.parametrize('steps', [1, 4, 8])
def test_error_growth_by_quadrature(steps):
    for name in ('time', 'log-snr'):
        lam = VP.log_snr(time_grid(steps, VP, name)).numpy()
        np.testing.assert_allclose(error_growth(lam), naive_error_growth(lam), rtol=1e-9)


@pytest.mark.parametrize('path', [VP, DDPM])
def test_optimized_nodes(path):
    """Strictly monotone between the same ends, with a smaller bound than the start.

    At five steps equal from both starts, as table 2 has it.
    """
    spacings = {'time': 'optimized', 'log-snr': 'optimized-log-snr'}
    for n, (init, spacing) in product((1, 2, 5, 8), spacings.items()):
        start, nodes = time_grid(n, path, init), optimized_nodes(n, path, init)
        assert (nodes.diff() < 0).all() and torch.equal(nodes[[0, -1]], start[[0, -1]])
        assert growth_of(path, nodes) <= growth_of(path, start) * (0.8 if n >= 5 else 1)
        assert torch.equal(dpm_solver_pp(n, 2, path, spacing).nodes, nodes)
    by_time, by_log_snr = (optimized_nodes(5, path, init) for init in spacings)
    torch.testing.assert_close(by_time, by_log_snr, rtol=0, atol=1e-3)


def test_optimized_nodes_are_a_minimum():
    "No node alone can be moved for a better bound; the released trust-constr finds none lower."
    nodes = optimized_nodes(5, VP)
    lam = VP.log_snr(nodes).numpy()
    best = naive_error_growth(lam)
    for k, step in product(range(1, 5), (-0.02, 0.02)):
        assert naive_error_growth(lam + step * (np.arange(6) == k)) > best
    slow = optimized_nodes(5, VP, method='trust-constr')
    assert best < growth_of(VP, slow) * 1.001
    assert (slow - nodes).abs().max() < 0.02


# Other paths

ENDS = dict(t_start=0.95, t_end=0.01)
MOVED = [
    ddim(6, VP, 'log-snr', **ENDS),
    dpm_solver_pp(6, 3, VP, **ENDS),
    unipc(6, 3, VP, 'karras', **ENDS),
    deis(6, 3, VP, **ENDS),
    dpm_solver(8, 3, VP, 'log-snr', **ENDS),
    ipndm(6, 4, VP, **ENDS),
    dpm_solver_pp(5, 2, VP, start='rk4', **ENDS),  # its stages repeat times
]
moved = pytest.mark.parametrize('solver', MOVED, ids=lambda s: s.name)


@moved
def test_a_solver_goes_to_another_path_and_back(solver):
    kept = 'coordinates', 'nfe', 'steps'
    atol = 1e-9 * solver.weights.abs().max().item()
    for path in (LINEAR, ShiftedPath(), DDPMPath('cosine')):
        there = change_path(solver, path)
        back = change_path(there, VP)
        assert there.path == path
        assert [getattr(there, k) for k in kept] == [getattr(solver, k) for k in kept]
        levels = VP.log_snr(solver.nodes)
        torch.testing.assert_close(path.log_snr(there.nodes), levels, rtol=0, atol=1e-9)
        torch.testing.assert_close(back.nodes, solver.nodes, rtol=0, atol=1e-10)
        torch.testing.assert_close(back.weights, solver.weights, rtol=1e-8, atol=atol)


@moved
def test_the_path_is_a_change_of_scale(solver):
    "The exact mixture from x / alpha to x / alpha."
    result = sample(GaussianMixture(CENTERS, STD, path=VP), X0, solver) / VP.alpha(solver.nodes[-1])
    for path in (LINEAR, DDPM):
        there = change_path(solver, path)
        a = path.alpha(there.nodes)
        x = X0 * a[0] / VP.alpha(solver.nodes[0])
        end = sample(GaussianMixture(CENTERS, STD, path=path), x, there) / a[-1]
        torch.testing.assert_close(end, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('method', [ddim, unipc, deis])
def test_a_clean_end_stays_clean_on_another_path(method):
    solver = method(4, path=DDPM, t_end=0.0)
    there = change_path(solver, LINEAR)
    x0, eps = rand(8, 3, seed=5), rand(8, 3, seed=6)
    assert there.nodes[-1] == 1
    start = LINEAR.interpolate(x0, eps, there.nodes[0])
    constant = x0 if solver.coordinates == 'data' else eps
    result = sample(lambda x, t: constant, start, there)
    torch.testing.assert_close(result, x0, rtol=1e-10, atol=1e-10)
