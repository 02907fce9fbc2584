"Solvers with free gains, other paths, and solvers as JSON files."

import copy
import json
from dataclasses import replace

import pytest
import torch
from exact_cases import F64, count_calls, rand

from neuralsolver.classical import adams_bashforth, rk4
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import get_solver, list_solvers, load_solver, neural_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.rules import VELOCITY
from neuralsolver.solvers import Solver, sample, save_solver
from neuralsolver.transfer import change_path

CENTERS, STD = rand(4, 3, seed=1), 0.5
X0 = rand(16, 3, seed=2)
ONE = torch.ones(1, dtype=F64)


def assert_near(actual, expected, rtol, atol=0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def mixture_for(solver, prediction='velocity'):
    return GaussianMixture(CENTERS, STD, path=solver.path, prediction=prediction)


# Non-stationary solvers (arXiv 2403.01329)

LINEAR_TIMES = torch.tensor([0, 0.1, 0.35, 0.4, 0.8, 1], dtype=F64)
VP_TIMES = torch.tensor([0.97, 0.8, 0.55, 0.5, 0.2, 0.05], dtype=F64)


def before(values, first):
    "What held before every step: the first value, then those of the steps but the last."
    return torch.cat([first, values[:-1]])


def increments(a, b):
    "Gains and weights of the steps, from the states x_{k+1} = a_k x_0 + sum b_kj u_j."
    gains = a / before(a, ONE)
    return gains, b - gains[:, None] * before(b, torch.zeros(1, 5, dtype=F64))


def non_stationary(coordinates, seed=7):
    "Random a, b of x_{k+1} = a_k x_0 + sum b_kj u_j, and the same as a Solver; a changes its sign."
    a, b = 1 + 0.5 * rand(5, seed=seed), 0.4 * rand(5, 5, seed=seed + 1).tril()
    a[2] *= -1
    gains, weights = increments(a, b)
    straight = coordinates == 'velocity'
    path = LinearPath() if straight else VPPath()
    nodes = LINEAR_TIMES if straight else VP_TIMES
    return a, b, Solver(nodes, weights, coordinates=coordinates, path=path, gains=gains)


@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise', 'flow'])
def test_a_non_stationary_solver_is_the_formula_of_its_paper(coordinates):
    a, b, solver = non_stationary(coordinates)
    field = mixture_for(solver, coordinates)
    states, u = [X0], []
    for k in range(5):
        u.append(field(states[-1], solver.nodes[k]))
        states.append(a[k] * X0 + sum(b[k, j] * u[j] for j in range(k + 1)))
    ours = sample(field, X0, solver, trajectory=True)
    assert_near(ours, torch.stack(states), rtol=0, atol=1e-12)
    scale = solver.scale
    unit = scale[1:] / scale[0]  # y = x / c
    assert_near(solver.from_start * unit, a, rtol=1e-12)
    assert_near(solver.tableau * scale[1:, None], b, rtol=0, atol=1e-12)
    assert_near(solver.influence, b[-1], rtol=0, atol=1e-12)
    single = GaussianMixture(CENTERS.float(), STD, path=solver.path)
    assert_near(sample(single, X0.float(), solver), states[-1].float(), rtol=0, atol=1e-4)
    assert count_calls(solver) == solver.nfe == 5 and not solver.consistent


@pytest.mark.parametrize(
    'solver', [adams_bashforth(5, 3), load_solver('dit-xl-2', 5), rk4(2)], ids=lambda s: s.name
)
def test_tableau_start_and_influence_are_responses(solver):
    """Predictions that are unit vectors, whatever the state: the states are the rows.

    Consistent, then with free gains.
    """
    K = solver.nfe
    units = torch.eye(K + 1, dtype=F64)
    free = replace(solver, gains=1 + 0.3 * rand(K), weights=rand(K, K, seed=1).tril())
    for s in (solver, replace(solver, gains=solver.gain), free):
        count = iter(range(K))
        states = sample(lambda x, t: units[[next(count)]], units[[K]], s, trajectory=True)[:, 0]
        y = states[1:] / s.scale[1:, None]
        assert_near(y[:, :K], s.tableau, rtol=1e-11, atol=1e-12)
        assert_near(y[:, K], s.from_start / s.scale[0], rtol=1e-11)
        assert_near(states[-1, :K], s.influence, rtol=1e-11, atol=1e-12)


def test_with_free_gains_a_linear_equation_is_solved_exactly():
    """dx/dt = rate x: whatever the gain, one weight makes the factor of a step exp(rate h).

    No consistent Euler step does.
    """
    rate = -1.7
    nodes = torch.tensor([0, 0.2, 0.3, 1], dtype=F64)
    gains = torch.tensor([0.5, -2.0, 1.0], dtype=F64)
    weights = torch.diag(((rate * nodes.diff()).exp() - gains) / rate)
    solver = Solver(nodes, weights, gains=gains)
    states = sample(lambda x, t: rate * x, X0, solver, trajectory=True)
    assert_near(states, X0 * (rate * nodes).exp()[:, None, None], rtol=1e-12)


def test_gradients_with_respect_to_gains_are_the_closed_form():
    "q = rate x: x_1 = (g0 + w00 rate) x_0, x_2 = (g1 + w11 rate) x_1 + w10 rate x_0."
    rate, x0 = 0.7, torch.tensor([1.3], dtype=F64)
    g0, g1 = 1.1, -0.8
    w00, w10, w11 = 0.3, 0.2, 0.9
    gains = torch.tensor([g0, g1], dtype=F64, requires_grad=True)
    weights = torch.tensor([[w00, 0], [w10, w11]], dtype=F64, requires_grad=True)
    sample(lambda x, t: rate * x, x0, Solver([0, 0.5, 1], weights, gains=gains)).sum().backward()
    x1 = (g0 + w00 * rate) * x0
    torch.testing.assert_close(gains.grad, torch.cat([(g1 + w11 * rate) * x0, x1]))
    torch.testing.assert_close(weights.grad[1], rate * torch.cat([x0, x1]))
    torch.testing.assert_close(weights.grad[0, 0], ((g1 + w11 * rate) * rate * x0)[0])


@pytest.mark.parametrize('other', ['noise', 'flow'])
def test_the_family_is_the_same_whatever_is_predicted(other):
    """q = p x + r q' at every node; by linear algebra instead of induction.

    With X = s x_0 + L q at the nodes, q = (1 - p L)^-1 (p s x_0 + r q').
    """
    a, b, solver = non_stationary('data')
    alpha, sigma = solver.path.alpha(solver.nodes[:-1]), solver.path.sigma(solver.nodes[:-1])
    if other == 'noise':
        p, r = 1 / alpha, -sigma / alpha
    else:  # flow = x_1 - eps
        p, r = 1 / (alpha + sigma), sigma / (alpha + sigma)
    s, L = before(a, ONE), before(b, torch.zeros(1, 5, dtype=F64))
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) - p[:, None] * L)
    gains, weights = increments(a + b @ inverse @ (p * s), b @ inverse * r)
    there = replace(solver, coordinates=other, gains=gains, weights=weights.tril())
    assert weights.triu(1).abs().max() < 1e-12
    data = sample(mixture_for(solver, 'data'), X0, solver, trajectory=True)
    same = sample(mixture_for(solver, other), X0, there, trajectory=True)
    assert_near(same, data, rtol=1e-9, atol=1e-9)
    assert (there.weights - solver.weights).abs().max() > 0.1


@pytest.mark.parametrize('coordinates', ['data', 'noise', 'flow'])
def test_a_non_stationary_solver_on_another_path_passes_through_the_same_states(coordinates):
    _, _, solver = non_stationary(coordinates)
    there = change_path(solver, LinearPath())
    kappa = there.path.sigma(there.nodes) / solver.path.sigma(solver.nodes)
    levels = solver.path.log_snr(solver.nodes)
    assert_near(there.path.log_snr(there.nodes), levels, rtol=1e-9, atol=1e-9)
    states = sample(mixture_for(solver), X0, solver, trajectory=True)
    moved = sample(mixture_for(there), X0 * kappa[0], there, trajectory=True)
    assert_near(moved, states * kappa[:, None, None], rtol=1e-9, atol=1e-9)
    assert there.coordinates == dict(flow='velocity').get(coordinates, coordinates)


def test_at_an_end_without_noise_a_moved_solver_stays_finite():
    """Data coordinates on the linear path end at sigma = 0; the VP path ends before.

    The states keep their size up to what the end cuts off.
    """
    weights, gains = rand(3, 3).tril(), [0.9, 1.2, 0.4]
    solver = Solver([0.05, 0.4, 0.8, 1], weights, coordinates='data', gains=gains)
    moved = change_path(solver, VPPath())
    assert abs(moved.nodes[-1] - VPPath().t_end) < 1e-9
    kappa = 1 / torch.hypot(solver.nodes, 1 - solver.nodes)  # on VP, alpha^2 + sigma^2 = 1
    assert_near(moved.weights, solver.weights * kappa[1:, None], rtol=1e-9)
    assert_near(moved.gains, solver.gains * kappa[1:] / kappa[:-1], rtol=1e-9)


# JSON


def every_solver():
    for name in (*VELOCITY, 'ipndm'):
        yield get_solver(name, 7)
    for name, counts in list_solvers().items():
        for steps in counts:
            yield load_solver(name, steps)
    kwargs = dict(name='mine', params=3, provenance={'seed': 1, 'who': ['é']})
    yield neural_solver(
        [0.1, 0.7], [[0, 0], [-1 / 3, 0]], 'noise', VPPath(0.05, 15.0, 1e-4), 0.8, **kwargs
    )
    yield non_stationary('data')[2]


def test_json_round_trip_is_bitwise(tmp_path):
    for i, solver in enumerate(every_solver()):
        save_solver(solver, tmp_path / f'{i}.json')
        again = load_solver(tmp_path / f'{i}.json')
        for a, b in ((again.nodes, solver.nodes), (again.weights, solver.weights)):
            assert a.numpy().tobytes() == b.numpy().tobytes()
        assert again.path == solver.path and (again.gains is None) == (solver.gains is None)
        if solver.gains is not None:
            assert again.gains.numpy().tobytes() == solver.gains.numpy().tobytes()
        for key in ('name', 'steps', 'nfe', 'coordinates', 'params', 'provenance', 'digest'):
            assert getattr(again, key) == getattr(solver, key), key


GOOD = load_solver('sit-xl-2', 5).to_dict()


def broken(*keys, value):
    "The good solver with one entry replaced, as JSON."
    d = inner = copy.deepcopy(GOOD)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(d)


def without(key):
    "The good solver without one entry, as JSON."
    return json.dumps({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        '3',
        'null',
        '{}',
        *(without(key) for key in GOOD if key != 'nfe'),
        broken('nodes', value=GOOD['nodes'][:-1]),
        broken('nodes', 1, value=None),
        broken('nodes', 1, value=0.9),
        broken('nodes', value='0 1'),
        broken('weights', value=GOOD['weights'][:-1]),
        broken('weights', value=None),
        broken('weights', value=[]),
        broken('weights', 0, 0, value='x'),
        broken('weights', 2, value=[*GOOD['weights'][2], 0.1]),
        broken('weights', 4, 0, value=float('nan')),
        broken('coordinates', value='score'),
        broken('gains', value=[1.0, 1.0]),
        broken('gains', value='11111'),
        broken('gains', value=[1.0, 1.0, 1.0, 1.0, 0.0]),
        broken('gains', value=[1, 1, 1, 1, None]),
        broken('path', 'name', value='cosine'),
        broken('path', 'rate', value=1),
        broken('path', value='linear'),
    ],
)
def test_malformed_files_are_value_errors_that_name_the_file(tmp_path, text):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(ValueError, match=r'bad\.json'):
        load_solver(tmp_path / 'bad.json')


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(ValueError, match=r'none\.json'):
        load_solver(tmp_path / 'none.json')
    (tmp_path / 'bin.json').write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r'bin\.json'):
        load_solver(tmp_path / 'bin.json')


@pytest.mark.parametrize(
    'key, value',
    [
        ('steps', 'x'),
        ('steps', 2.5),
        ('steps', -1),
        ('params', 'many'),
        ('provenance', []),
        ('name', 3),
    ],
)
def test_entries_of_the_wrong_type_are_value_errors(key, value):
    with pytest.raises(ValueError, match=key):
        Solver.from_dict(GOOD | {key: value})
