"Solvers by name, RULE@GRID: exponential rules on the flow path against diffusers and scipy."

import numpy as np
import pytest
import torch
from exact_cases import CENTERS, STD, X0, noise_of_mixture, relative, rms, slope

from neuralsolver.classical import adams_bashforth, euler, uniform_grid
from neuralsolver.dpm_solvers import dpm_solver_pp, unipc
from neuralsolver.exponential import deis
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import get_solver
from neuralsolver.paths import DDPMPath, LinearPath, ShiftedPath, VPPath
from neuralsolver.rules import classical_names, classical_rules, classical_solver, FIRST, VELOCITY
from neuralsolver.solvers import sample

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')
LINEAR = LinearPath()
FLOW = GaussianMixture(CENTERS, STD)


def velocity(x, t):
    "E[x_1 - eps | x] on the linear path, from the noise by Bayes' rule."
    noise = noise_of_mixture(x, t, 1 - t)
    return (x - noise) / t  # x = t x_1 + (1 - t) eps


# The same numbers as diffusers, on its sigmas of a flow model


def flow_scheduler(kind, order, **settings):
    import diffusers

    cls = getattr(diffusers, kind)
    known = dict(use_flow_sigmas=True, prediction_type='flow_prediction', solver_order=order)
    return cls(**known, **settings)


def their_end(scheduler, steps):
    "Times in ours, and the end point. Their field returns eps - x_1."
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = X0
    for sigma, step in zip(sigmas, scheduler.timesteps):
        x = scheduler.step(-velocity(x, 1 - sigma), step, x, return_dict=False)[0]
    return 1 - sigmas, x


CASES = [
    ('DPMSolverMultistepScheduler', 1, {}, 'ddim'),
    ('DPMSolverMultistepScheduler', 2, dict(solver_type='midpoint'), 'dpm-solver++2m'),
    ('DPMSolverMultistepScheduler', 3, dict(solver_type='midpoint'), 'dpm-solver++3m'),
    ('UniPCMultistepScheduler', 2, {}, 'unipc-2'),
    ('UniPCMultistepScheduler', 3, {}, 'unipc-3'),
]


@pytest.mark.parametrize('kind, order, settings, rule', CASES)
@pytest.mark.parametrize('shift, steps', [(1.0, 5), (3.0, 8)])
def test_exponential_rules_on_the_flow_path_are_diffusers(
    kind, order, settings, rule, shift, steps
):
    scheduler = flow_scheduler(kind, order, flow_shift=shift, **settings)
    nodes, expected = their_end(scheduler, steps)
    solver = classical_solver(rule, steps, nodes=nodes)
    assert nodes[-1] == 1 and solver.nfe == steps
    assert relative(sample(FLOW, X0, solver), expected) < 1e-5
    if shift == 1 and kind.startswith('DPM'):  # its first node is ours by name, too
        assert abs(nodes[0] - FIRST) < 1e-6


# Orders


@pytest.fixture(scope='module')
def end():
    "The true end point of dx/dt = v from t = 0.2 to 0.8, by scipy's DOP853."
    from scipy.integrate import solve_ivp

    def f(t, x):
        return velocity(torch.from_numpy(x).view_as(X0), t).flatten().numpy()

    found = solve_ivp(f, (0.2, 0.8), X0.flatten().numpy(), 'DOP853', rtol=1e-12, atol=1e-13)
    assert found.success
    return torch.from_numpy(found.y[:, -1].copy()).view_as(X0)


ORDERS = [
    (dpm_solver_pp, dict(order=2), 2),
    (dpm_solver_pp, dict(order=3, exact=True), 3),
    (unipc, dict(order=2), 3),
    (unipc, dict(order=3, corrector=False), 3),
    (deis, dict(order=2), 2),
    (deis, dict(order=3), 3),
]


@pytest.mark.parametrize('method, settings, order', ORDERS)
def test_order_on_the_flow_path(end, method, settings, order):
    ends = dict(t_start=0.2, t_end=0.8, start='rk4', finish='full', path=LINEAR)
    steps = (24, 48, 96)
    found = [sample(FLOW, X0, method(n, **settings, **ends)) for n in steps]
    measured = slope(steps, [rms(x - end) for x in found])
    assert abs(measured - order) < 0.3, measured


@pytest.mark.parametrize('grid', ['power-1.2', 'shifted-2', 'quadratic', 'log-snr-3'])
@pytest.mark.parametrize('rule', ['ab2', 'dpm-solver++2m', 'unipc-2', 'deis-2'])
def test_named_rules_converge_on_every_grid(rule, grid):
    "From noise to data; the start and the last step, both of order one, leave order two at most."
    truth = sample(FLOW, X0, classical_solver('rk4@power-1.5', 250))
    steps = (10, 20, 40, 80)
    errors = [rms(sample(FLOW, X0, classical_solver(f'{rule}@{grid}', n)) - truth) for n in steps]
    assert errors[-1] < 0.02
    if grid == 'log-snr-3':  # its first and last step stay long
        assert errors[-1] < errors[0]
    else:
        assert slope(steps, errors) > 0.8, errors


# Names


def test_a_rule_without_a_grid_is_on_uniform_time():
    for name in VELOCITY:
        plain, timed = get_solver(name, 7), get_solver(f'{name}@time', 7)
        assert torch.equal(plain.nodes, timed.nodes) and torch.equal(plain.weights, timed.weights)
    assert torch.equal(get_solver('ab2', 8).weights, adams_bashforth(8, 2).weights)
    assert get_solver('ab2@power-1.2', 8).name == 'ab2@power-1.2'
    assert get_solver('adam2', 8).name == 'adam2'


def test_velocity_rules_are_those_of_the_nodes():
    nodes = uniform_grid(6) ** 1.35
    expected = adams_bashforth(6, 3, nodes)
    found = get_solver('ab3@power-1.35', 6)
    torch.testing.assert_close(found.nodes, nodes, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-14)
    heun = get_solver('heun-nfe@power-1.35', 7)
    torch.testing.assert_close(heun.nodes[::2], uniform_grid(4)[:-1] ** 1.35, rtol=0, atol=1e-15)
    assert heun.nfe == 7


def test_ddim_on_the_flow_path_is_euler_from_noise_to_data():
    ours, theirs = get_solver('ddim', 6), euler(6)
    assert ours.nodes[0] == 0
    assert relative(sample(FLOW, X0, ours), sample(FLOW, X0, theirs)) < 1e-12


@pytest.mark.parametrize('path', [LINEAR, VPPath(), DDPMPath()])
def test_every_name_worth_a_trial_spends_its_evaluations(path):
    names = classical_names(path)
    assert len({n.partition('@')[0] for n in names}) >= 5
    assert len({n.partition('@')[2] for n in names}) >= 6
    for steps in (2, 5, 10, 20):
        for name in names:
            solver = get_solver(name, steps, path)
            assert solver.nfe == steps and solver.name == name
            inside = LINEAR == path and solver.coordinates != 'velocity'
            assert abs(solver.nodes[0] - (FIRST if inside else path.t_start)) < 1e-12
            assert abs(solver.nodes[-1] - path.t_end) < 1e-12


def test_the_names_of_the_shifted_path_start_inside():
    assert get_solver('unipc-2', 8, ShiftedPath(3.0)).nodes[0] == FIRST
    assert get_solver('ddim', 8, ShiftedPath(3.0)).nodes[0] == 0


@pytest.mark.parametrize(
    'name, path, said',
    [
        ('rk5', LINEAR, 'RULE@GRID'),
        ('ab2', VPPath(), 'unipc-2'),
        ('ab2@cosine', LINEAR, 'power-P'),
        ('ab2@power-', LINEAR, "spacing='power-'"),
        ('unipc-2@shifted-0', VPPath(), 'from 0.1 to 10'),
        ('dpm-solver-2', LINEAR, 'cannot end at a clean state'),
    ],
)
def test_refusal_in_one_line(name, path, said):
    with pytest.raises(ValueError) as error:
        get_solver(name, 8, path)
    text = str(error.value)
    assert said in text and '\n' not in text and len(text) < 700


def test_rules_of_two_paths_are_one_table():
    assert set(classical_rules(VPPath())) == set(classical_rules(LINEAR)) - set(VELOCITY)
    assert np.isfinite([s.weights.abs().max() for s in (get_solver('ipndm', 5, VPPath()),)]).all()
