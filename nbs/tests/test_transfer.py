"Solvers with free gains, other paths, and solvers as JSON files."

import copy
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import CLASSICAL, get_solver, list_solvers, load_solver, neural_solver
from neuralsolver.solvers import save_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.solvers import Solver, sample
from neuralsolver.classical import adams_bashforth, rk4, uniform_grid
from neuralsolver.transfer import change_path

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CENTERS, STD = rand(4, 3, seed=1), 0.5
MIXTURE, X0 = GaussianMixture(CENTERS, STD), rand(16, 3, seed=2)
STEPS = (64, 128, 256)
WARPED = {
    n: (u + u**2) / 2 for n in (5, *STEPS) for u in [uniform_grid(n)]
}  # smooth, first steps not of higher order in 1 / n


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def rms(x):
    return x.square().mean().sqrt().item()


def count_calls(solver):
    calls = []
    sample(lambda x, t: (calls.append(float(t)), -x)[1], torch.ones(2, 1, dtype=F64), solver)
    assert calls == solver.nodes[:-1].tolist()  # at the nodes, in their order
    return len(calls)


# Non-stationary solvers (arXiv 2403.01329)

VP_TIMES = torch.tensor([0.97, 0.8, 0.55, 0.5, 0.2, 0.05], dtype=F64)


def path_of(coordinates):
    return LinearPath() if coordinates == 'velocity' else VPPath()


def non_stationary(coordinates, seed=7):
    "Random a, b of x_{k+1} = a_k x_0 + sum b_kj u_j, and the same as a Solver; a changes its sign."
    a, b = 1 + 0.5 * rand(5, seed=seed), 0.4 * rand(5, 5, seed=seed + 1).tril()
    a[2] *= -1
    nodes = (
        torch.tensor([0, 0.1, 0.35, 0.4, 0.8, 1], dtype=F64)
        if coordinates == 'velocity'
        else VP_TIMES
    )
    gains = a / torch.cat([torch.ones(1, dtype=F64), a[:-1]])
    before = torch.cat([torch.zeros(1, 5, dtype=F64), b[:-1]])
    return (
        a,
        b,
        Solver(
            nodes,
            b - gains[:, None] * before,
            coordinates=coordinates,
            path=path_of(coordinates),
            gains=gains,
        ),
    )


@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise', 'flow'])
def test_a_non_stationary_solver_is_the_formula_of_its_paper(coordinates):
    a, b, solver = non_stationary(coordinates)
    field = GaussianMixture(CENTERS, STD, path=solver.path, prediction=coordinates)
    states, u = [X0], []
    for k in range(5):
        u.append(field(states[-1], solver.nodes[k]))
        states.append(a[k] * X0 + sum(b[k, j] * u[j] for j in range(k + 1)))
    torch.testing.assert_close(
        sample(field, X0, solver, trajectory=True), torch.stack(states), rtol=0, atol=1e-12
    )
    scale = solver.scale
    unit = scale[1:] / scale[0]  # y = x / c
    torch.testing.assert_close(solver.from_start * unit, a, rtol=1e-12, atol=0)
    torch.testing.assert_close(solver.tableau * scale[1:, None], b, rtol=0, atol=1e-12)
    torch.testing.assert_close(solver.influence, b[-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sample(GaussianMixture(CENTERS.float(), STD, path=solver.path), X0.float(), solver),
        states[-1].float(),
        rtol=0,
        atol=1e-4,
    )
    assert count_calls(solver) == solver.nfe == 5 and not solver.consistent


@pytest.mark.parametrize(
    'solver', [adams_bashforth(5, 3), load_solver('dit-xl-2', 5), rk4(2)], ids=lambda s: s.name
)
def test_tableau_start_and_influence_are_responses(solver):
    "Predictions that are unit vectors, whatever the state: the states are the rows. Consistent, then with free gains."
    K = solver.nfe
    for s in (
        solver,
        replace(solver, gains=solver.gain),
        replace(solver, gains=1 + 0.3 * rand(K), weights=rand(K, K, seed=1).tril()),
    ):
        count = iter(range(K))
        states = sample(
            lambda x, t: torch.eye(K + 1, dtype=F64)[[next(count)]],
            torch.eye(K + 1, dtype=F64)[[K]],
            s,
            trajectory=True,
        )[:, 0]
        y = states[1:] / s.scale[1:, None]
        torch.testing.assert_close(y[:, :K], s.tableau, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(y[:, K], s.from_start / s.scale[0], rtol=1e-11, atol=0)
        torch.testing.assert_close(states[-1, :K], s.influence, rtol=1e-11, atol=1e-12)


def test_with_free_gains_a_linear_equation_is_solved_exactly():
    "dx/dt = rate x: whatever the gain, one weight makes the factor of a step exp(rate h). No consistent Euler step does."
    rate, nodes, gains = (
        -1.7,
        torch.tensor([0, 0.2, 0.3, 1], dtype=F64),
        torch.tensor([0.5, -2.0, 1.0], dtype=F64),
    )
    solver = Solver(nodes, torch.diag(((rate * nodes.diff()).exp() - gains) / rate), gains=gains)
    torch.testing.assert_close(
        sample(lambda x, t: rate * x, X0, solver, trajectory=True),
        X0 * (rate * nodes).exp()[:, None, None],
        rtol=1e-12,
        atol=0,
    )


def test_gradients_with_respect_to_gains_are_the_closed_form():
    "q = rate x: x_1 = (g0 + w00 rate) x_0, x_2 = (g1 + w11 rate) x_1 + w10 rate x_0."
    rate, x0 = 0.7, torch.tensor([1.3], dtype=F64)
    g0, g1, w00, w10, w11 = 1.1, -0.8, 0.3, 0.2, 0.9
    gains, weights = (
        torch.tensor([g0, g1], dtype=F64, requires_grad=True),
        torch.tensor([[w00, 0], [w10, w11]], dtype=F64, requires_grad=True),
    )
    sample(lambda x, t: rate * x, x0, Solver([0, 0.5, 1], weights, gains=gains)).sum().backward()
    x1 = (g0 + w00 * rate) * x0
    torch.testing.assert_close(gains.grad, torch.cat([(g1 + w11 * rate) * x0, x1]))
    torch.testing.assert_close(weights.grad[1], rate * torch.cat([x0, x1]))
    torch.testing.assert_close(weights.grad[0, 0], ((g1 + w11 * rate) * rate * x0)[0])


@pytest.mark.parametrize('other', ['noise', 'flow'])
def test_the_family_is_the_same_whatever_is_predicted(other):
    "q = p x + r q' at every node. With X = s x_0 + L q at the nodes, q = (1 - p L)^-1 (p s x_0 + r q'): linear algebra instead of induction."
    a, b, solver = non_stationary('data')
    alpha, sigma = solver.path.alpha(solver.nodes[:-1]), solver.path.sigma(solver.nodes[:-1])
    p, r = (
        (1 / alpha, -sigma / alpha)
        if other == 'noise'
        else (1 / (alpha + sigma), sigma / (alpha + sigma))
    )  # flow = x_1 - eps
    s, L = (
        torch.cat([torch.ones(1, dtype=F64), a[:-1]]),
        torch.cat([torch.zeros(1, 5, dtype=F64), b[:-1]]),
    )
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) - p[:, None] * L)
    A, B = a + b @ inverse @ (p * s), b @ inverse * r
    gains = A / torch.cat([torch.ones(1, dtype=F64), A[:-1]])
    weights = B - gains[:, None] * torch.cat([torch.zeros(1, 5, dtype=F64), B[:-1]])
    there = replace(solver, coordinates=other, gains=gains, weights=weights.tril())
    assert weights.triu(1).abs().max() < 1e-12
    data, same = (
        sample(
            GaussianMixture(CENTERS, STD, path=solver.path, prediction=c), X0, v, trajectory=True
        )
        for c, v in (('data', solver), (other, there))
    )
    torch.testing.assert_close(same, data, rtol=1e-9, atol=1e-9)
    assert (there.weights - solver.weights).abs().max() > 0.1


@pytest.mark.parametrize('coordinates', ['data', 'noise', 'flow'])
def test_a_non_stationary_solver_on_another_path_passes_through_the_same_states(coordinates):
    _, _, solver = non_stationary(coordinates)
    moved = change_path(solver, LinearPath())
    run = lambda s, x: sample(GaussianMixture(CENTERS, STD, path=s.path), x, s, trajectory=True)
    kappa = moved.path.sigma(moved.nodes) / solver.path.sigma(solver.nodes)
    torch.testing.assert_close(
        moved.path.log_snr(moved.nodes), solver.path.log_snr(solver.nodes), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        run(moved, X0 * kappa[0]), run(solver, X0) * kappa[:, None, None], rtol=1e-9, atol=1e-9
    )
    assert moved.coordinates == dict(flow='velocity').get(coordinates, coordinates)


def test_at_an_end_without_noise_a_moved_solver_stays_finite():
    "Data coordinates on the linear path end at sigma = 0; the VP path ends before. The states keep their size up to what the end cuts off."
    solver = Solver(
        [0.05, 0.4, 0.8, 1], rand(3, 3).tril(), coordinates='data', gains=[0.9, 1.2, 0.4]
    )
    moved = change_path(solver, VPPath())
    assert abs(moved.nodes[-1] - VPPath().t_end) < 1e-9
    kappa = 1 / torch.hypot(solver.nodes, 1 - solver.nodes)  # on VP, alpha^2 + sigma^2 = 1
    torch.testing.assert_close(moved.weights, solver.weights * kappa[1:, None], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        moved.gains, solver.gains * kappa[1:] / kappa[:-1], rtol=1e-9, atol=0
    )


# JSON


def every_solver():
    for name in CLASSICAL:
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


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        '3',
        'null',
        '{}',
        *(
            json.dumps({k: v for k, v in GOOD.items() if k != gone})
            for gone in GOOD
            if gone != 'nfe'
        ),
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
    with pytest.raises(ValueError, match=r'bad\.json: '):
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
