"Time grids and optimised nodes against diffusers, the released definition and scipy; moved solvers."

import math
from itertools import product
import numpy as np
import pytest
import torch
from neuralsolver.optimized_grids import error_growth, optimized_nodes
from neuralsolver.exponential import ddim, deis, ipndm
from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import DDPMPath, LinearPath, ShiftedPath, VPPath
from neuralsolver.transfer import change_path
from neuralsolver.solvers import sample
from neuralsolver.spacings import SPACINGS, time_grid

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


CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)


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
    "Their N sigmas end at the table's first entry, where our N - 1 steps end; sigma is sigma / alpha here."
    from diffusers import DPMSolverMultistepScheduler

    convert = getattr(DPMSolverMultistepScheduler(), theirs)
    ratio = ((1 - CUMPROD) / CUMPROD).sqrt().flip(0).numpy()
    for n in (2, 5, 11):
        expected = (
            np.exp(convert(np.log(ratio), n)) if theirs == '_convert_to_lu' else convert(ratio, n)
        )
        nodes = time_grid(n - 1, DDPM, name)
        np.testing.assert_allclose((-DDPM.log_snr(nodes)).exp(), expected, rtol=1e-9)
        assert nodes[0] == 1 and nodes[-1] == 0.001


@pytest.mark.parametrize('shift', [1.0, 3.0, 0.5])
def test_shifted_spacing_is_diffusers_flow_schedule(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    nodes = time_grid(8, LinearPath(), 'shifted', shift=shift)
    torch.testing.assert_close((1 - nodes).float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        ShiftedPath(shift).alpha(time_grid(8, ShiftedPath(shift))), nodes, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(
    'path, ends',
    [
        (VP, (0.9, 0.02)),
        (DDPM, (1.0, 0.001)),
        (LinearPath(), (0.1, 0.98)),
        (ShiftedPath(), (0.1, 0.98)),
    ],
)
def test_spacings_are_uniform_in_what_they_say(path, ends):
    left = lambda t: (t - path.t_data).abs()
    ratio = lambda t: path.sigma(t) / path.alpha(t)
    of = {
        'time': lambda t: t,
        'quadratic': lambda t: left(t).sqrt(),
        'log-snr': lambda t: ratio(t).log(),
        'karras': lambda t: ratio(t) ** (1 / 4),
        'shifted': lambda t: left(t) / (5 - 4 * left(t)),
    }
    for name in SPACINGS:
        nodes = time_grid(9, path, name, *ends, rho=4.0, shift=5.0)
        d = of[name](nodes).diff()
        torch.testing.assert_close(d, d.mean().expand(9), rtol=1e-6, atol=1e-9)
        assert (
            (nodes[0].item(), nodes[-1].item()) == ends
            and nodes.dtype == F64
            and nodes.shape == (10,)
        )
        assert torch.equal(ddim(9, path, name, *ends).nodes, time_grid(9, path, name, *ends))


def naive_error_growth(l):
    "The released definition (arXiv 2402.17376): the first three steps and the last by themselves, the others by evaluation."
    from scipy.integrate import quad
    from scipy.interpolate import lagrange

    N, own, shared = len(l) - 1, 0, np.zeros(len(l) - 1)
    for i in range(N):
        used = list(range(max(i - 2, i - (N - i) + 1, 0), i + 1))
        J = np.zeros(N)
        for j in used:
            p = lagrange([l[m] - l[i] for m in used], [float(m == j) for m in used])
            sigma2 = 1 / (
                1 + math.exp(2 * l[j])
            )  # and the error of the data prediction is sigma^2 / alpha
            J[j] = (
                quad(lambda u: math.exp(u + l[i] - l[-1]) * p(u), 0, l[i + 1] - l[i])[0]
                * sigma2
                / math.sqrt(1 - sigma2)
            )
        if i < 3 or i == N - 1:
            own += np.linalg.norm(J)
        else:
            shared += J
    return own + np.abs(shared).sum()


@pytest.mark.parametrize('steps', [1, 2, 4, 5, 8])
def test_error_growth_by_quadrature(steps):
    for name in ('time', 'log-snr'):
        l = VP.log_snr(time_grid(steps, VP, name)).numpy()
        np.testing.assert_allclose(error_growth(l), naive_error_growth(l), rtol=1e-9)


@pytest.mark.parametrize('path', [VP, DDPM])
def test_optimized_nodes(path):
    "Strictly monotone between the same ends, with a smaller bound than the start; at five steps equal from both starts, as table 2 has it."
    growth = lambda nodes: naive_error_growth(path.log_snr(nodes).numpy())
    for n in (1, 2, 5, 8):
        for init in ('time', 'log-snr'):
            start, nodes = time_grid(n, path, init), optimized_nodes(n, path, init)
            assert (nodes.diff() < 0).all() and torch.equal(nodes[[0, -1]], start[[0, -1]])
            assert growth(nodes) <= growth(start) * (0.8 if n >= 5 else 1)
            assert torch.equal(
                dpm_solver_pp(
                    n, 2, path, {'time': 'optimized', 'log-snr': 'optimized-log-snr'}[init]
                ).nodes,
                nodes,
            )
    torch.testing.assert_close(
        optimized_nodes(5, path, 'time'), optimized_nodes(5, path, 'log-snr'), rtol=0, atol=1e-3
    )


def test_optimized_nodes_are_a_minimum():
    "No single node can be moved for a better bound; trust-constr, as released, finds none much lower."
    nodes = optimized_nodes(5, VP)
    l = VP.log_snr(nodes).numpy()
    best = naive_error_growth(l)
    for k, step in product(range(1, 5), (-0.02, 0.02)):
        assert naive_error_growth(l + step * (np.arange(6) == k)) > best
    slow = optimized_nodes(5, VP, method='trust-constr')
    assert (
        best < naive_error_growth(VP.log_snr(slow).numpy()) * 1.001
        and (slow - nodes).abs().max() < 0.02
    )


# Other paths

ENDS_OF_MOVED = dict(t_start=0.95, t_end=0.01)
MOVED = [
    ddim(6, VP, 'log-snr', **ENDS_OF_MOVED),
    dpm_solver_pp(6, 3, VP, **ENDS_OF_MOVED),
    unipc(6, 3, VP, 'karras', **ENDS_OF_MOVED),
    deis(6, 3, VP, **ENDS_OF_MOVED),
    dpm_solver(8, 3, VP, 'log-snr', **ENDS_OF_MOVED),
    ipndm(6, 4, VP, **ENDS_OF_MOVED),
    dpm_solver_pp(5, 2, VP, start='rk4', **ENDS_OF_MOVED),
]  # its stages repeat times


@pytest.mark.parametrize('solver', MOVED, ids=lambda s: s.name)
def test_a_solver_goes_to_another_path_and_back(solver):
    for path in (DDPM, LinearPath(), ShiftedPath(), DDPMPath('cosine')):
        there = change_path(solver, path)
        back = change_path(there, VP)
        assert (there.path, there.coordinates, there.nfe, there.steps) == (
            path,
            solver.coordinates,
            solver.nfe,
            solver.steps,
        )
        torch.testing.assert_close(
            path.log_snr(there.nodes), VP.log_snr(solver.nodes), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(back.nodes, solver.nodes, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            back.weights, solver.weights, rtol=1e-8, atol=1e-9 * solver.weights.abs().max().item()
        )


@pytest.mark.parametrize('solver', MOVED, ids=lambda s: s.name)
def test_the_path_is_a_change_of_scale(solver):
    "The exact mixture from x / alpha to x / alpha."
    result = sample(GaussianMixture(CENTERS, STD, path=VP), X0, solver) / VP.alpha(solver.nodes[-1])
    for path in (LinearPath(), DDPM):
        there = change_path(solver, path)
        a = path.alpha(there.nodes)
        x = X0 * a[0] / VP.alpha(solver.nodes[0])
        torch.testing.assert_close(
            sample(GaussianMixture(CENTERS, STD, path=path), x, there) / a[-1],
            result,
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    'solver',
    [ddim(4, DDPM, t_end=0.0), unipc(4, 2, DDPM, t_end=0.0), deis(4, 2, DDPM, t_end=0.0)],
    ids=lambda s: s.name,
)
def test_a_clean_end_stays_clean_on_another_path(solver):
    there = change_path(solver, LinearPath())
    x0, eps = rand(8, 3, seed=5), rand(8, 3, seed=6)
    assert there.nodes[-1] == 1
    start = LinearPath().interpolate(x0, eps, there.nodes[0])
    torch.testing.assert_close(
        sample(lambda x, t: x0 if solver.coordinates == 'data' else eps, start, there),
        x0,
        rtol=1e-10,
        atol=1e-10,
    )
