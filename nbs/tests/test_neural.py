"The published tables, derived a second time from the raw numbers."

import json
import math
from dataclasses import replace
import pytest
import torch
from neuralsolver.neural import (
    FAMILIES,
    NeuralSolver,
    error_bound,
    get_solver,
    list_solvers,
    load_solver,
    neural_solver,
)
from neuralsolver.classical import adam2, adam4
from neuralsolver.paths import VPPath
from neuralsolver.solvers import Solver, sample
from neuralsolver.utils import data_file

RAW = json.loads(data_file('published_solvers.json').read_text())
LINEAR = [(name, int(n)) for name in ('flowdcn-b-2', 'sit-xl-2') for n in RAW[name]['steps']]
VP = [('dit-xl-2', int(n)) for n in RAW['dit-xl-2']['steps']]
ALL = [*LINEAR, *VP]


def problem():
    "A random smooth field without structure, and noise."
    g = torch.Generator().manual_seed(5)
    A, b, noise = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((6, 6), (6,), (9, 6))
    )
    return (lambda x, t: torch.tanh(x @ A / 2 + b * t) - 0.3 * x), noise


def filled(coefficients):
    "The paper's matrix M, row by row: coefficients below the diagonal, one minus their sum on it."
    return [[*row[:i], 1 - math.fsum(row[:i])] for i, row in enumerate(coefficients)]


def table(name, n):
    return RAW[name]['steps'][str(n)]


def test_what_there_is():
    assert len(LINEAR) == 13 and len(VP) == 6
    listed = list_solvers()
    five_to_ten = [5, 6, 7, 8, 9, 10]
    expected = {'flowdcn-b-2': [*five_to_ten, 15], 'sit-xl-2': five_to_ten, 'dit-xl-2': five_to_ten}
    assert {name: listed[name] for name in RAW} == expected


@pytest.mark.parametrize('name, n', LINEAR)
@pytest.mark.parametrize('rounded', [True, False])
def test_linear_tables_by_a_naive_loop(name, n, rounded):
    "Eq. 16."
    field, x = problem()
    deltas = table(name, n)['timedeltas' if rounded else 'timedeltas_unrounded']
    if not rounded:
        deltas = [d / math.fsum(deltas) for d in deltas]
    result = sample(field, x, load_solver(name, n, rounded))
    t, v = 0.0, []
    for dt, row in zip(deltas, filled(table(name, n)['coeffs'])):
        v.append(field(x, t))
        x = x + dt * sum(m * vj for m, vj in zip(row, v))
        t += dt
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name, n', VP)
def test_vp_tables_by_a_naive_loop(name, n):
    "Eq. 19, one update a step: t from 0.999 down to 1e-3, beta 0.1 to 20, data prediction."
    field, x = problem()
    result = sample(field, x, load_solver(name, n))
    t, v = 0.999, []

    def alpha_sigma(t):
        B = 0.1 * t + 19.9 * t * t / 2
        return math.exp(-B / 2), math.sqrt(1 - math.exp(-B))

    for dt, row in zip(table(name, n)['timedeltas'], filled(table(name, n)['coeffs'])):
        u = max(t - dt, 1e-3)
        (a, s), (b, r) = alpha_sigma(t), alpha_sigma(u)
        v.append(field(x, t))
        x = r / s * x + r * (b / r - a / s) * sum(m * vj for m, vj in zip(row, v))
        t = u
    assert t == 1e-3
    torch.testing.assert_close(
        result, x, rtol=1e-10, atol=1e-10
    )  # the naive sigma cancels at small t


@pytest.mark.parametrize('n, zeros, entries', [(5, 5, 10), (6, 7, 15)])
def test_two_step_tail(n, zeros, entries):
    "The last two rows use two evaluations, in the published tables and the search space alike."
    lower = torch.tril_indices(n, n, -1)
    assert lower.shape[1] == entries
    module = NeuralSolver(n)
    torch.nn.init.ones_(module.c)
    free = module.coefficients[tuple(lower)] != 0
    assert (~free).sum() == zeros and NeuralSolver(n, two_step_tail=False).c.numel() == entries
    for name in RAW:
        assert torch.equal(torch.tensor(table(name, n)['coeffs'])[tuple(lower)] != 0, free), name
    for name in RAW:  # and in what is run: only the diagonal and its neighbour
        assert (load_solver(name, n).weights.tril(-1)[-2:] != 0).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize('name, n', ALL)
def test_time_deltas_are_rounded_softmax_values(name, n):
    "Recovered values sum to 1, round to the printed ones; logits lie on Lion's grid of 0.02."
    printed, found = table(name, n)['timedeltas'], table(name, n)['timedeltas_unrounded']
    assert abs(math.fsum(found) - 1) < 1e-7 * n
    assert [round(d, 4) for d in found] == printed
    for d in found:
        k = math.log(d / found[-1]) / 0.02
        assert abs(k - round(k)) < 0.01
    solver = load_solver(name, n, rounded=False)
    assert solver.provenance['rounded'] is False
    if name != 'dit-xl-2':
        assert abs(solver.nodes[-1].item() - 1) < 1e-14 < abs(math.fsum(printed) - 1) + 1e-13


def refused(words, function, *args, **settings):
    with pytest.raises(ValueError) as error:
        function(*args, **settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    'args, words',
    [
        (('sit-xl-2', 11), ['sit-xl-2', 'steps=11', '5, 6, 7, 8, 9, 10']),
        (('sit-xl-2', 15), ['steps=15']),
        (('flowdcn-b-2', 4), ['steps=4', '9, 10, 15']),
        (('sit-xl-2',), ['steps=None', '5, 6']),
        (('sit-xl-2', True), ['steps=True']),
        (('sit', 8), ["solver='sit'", 'sit-xl-2', 'dit-xl-2', 'flowdcn-b-2']),
    ],
)
def test_refusal_of_load_solver(args, words):
    refused(words, load_solver, *args)


@pytest.mark.parametrize(
    'args, words',
    [
        (('adam3', 8), ["solver='adam3'", 'adam2', 'sit-xl-2']),
        (('', 8), ["solver=''"]),
        (('sit-xl-2', 0), ['steps=0', 'an integer from 1']),
        (('sit-xl-2', 8.0), ['steps=8.0']),
    ],
)
def test_refusal_of_get_solver(args, words):
    refused(words, get_solver, *args)


@pytest.fixture
def searched_lines(tmp_path, monkeypatch):
    "A function that makes the searched tables those of its arguments."
    import neuralsolver.neural as module

    file, there = tmp_path / 'searched_solvers.jsonl', module.data_file
    file.write_text('')

    def write(*tables):
        file.write_text(''.join(json.dumps(table.to_dict()) + '\n' for table in tables))

    monkeypatch.setattr(
        module, 'data_file', lambda name: file if name == file.name else there(name)
    )
    monkeypatch.setattr(module, '_searched', module._searched.__wrapped__)
    return write


def test_a_searched_file_is_found_by_name(searched_lines):
    searched_lines(replace(load_solver('flowdcn-b-2', 7), name='my-model'))
    assert list_solvers()['my-model'] == [7]
    assert get_solver('my-model', 7).digest == load_solver('flowdcn-b-2', 7).digest
    with pytest.raises(ValueError, match='steps = 7'):
        load_solver('my-model', 8)


def test_a_table_searched_with_guidance_is_a_row_where_there_is_guidance(searched_lines):
    from neuralsolver.protocol import Protocol
    from neuralsolver.screening import Case, compare

    table, model = load_solver('flowdcn-b-2', 7), 'fashion-mixture'
    guided = replace(load_solver('sit-xl-2', 7), name=f'{model}-guided')
    searched_lines(replace(table, name=model), guided)
    assert load_solver(f'{model}-guided', 7).digest == guided.digest
    assert [*Protocol(model, 7, guidance=2.0).chosen][-2:] == [model, f'{model}-guided']
    assert [*Protocol(model, 7, guidance=1.0).chosen][-1] == model
    assert f'{model}-guided' not in {**Protocol(model, 6, guidance=2.0).left_out}
    for scale, roles in ((2.0, ['unguided', 'searched']), (1.0, ['searched'])):
        case = Case(model, scale, (7,), 4, (0,), ((1, None), (2, 2)), teacher_steps=10)
        rows = compare(case)[1]
        assert [row['role'] for row in rows if row['solver'].startswith(model)] == roles


# Families

F64 = torch.float64


def randomised(*args, seed=0, **kwargs):
    module = NeuralSolver(*args, **kwargs)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=F64))
    return module


@pytest.mark.parametrize('family', ['scaled', 'non-stationary'])
@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise'])
def test_the_larger_families_by_a_naive_loop(family, coordinates):
    "x_{i+1} = (1 + g) c'/c x + (1 + d) span sum M q, VP schedule from its formula."
    field, x = problem()
    module = randomised(5, False, family=family)
    where = (
        dict(coordinates=coordinates, path=VPPath(), t_start=0.95)
        if coordinates != 'velocity'
        else {}
    )
    solver = module(**where)
    result = sample(field, x, solver)
    t, q = where.get('t_start', 0.0), []

    def alpha_sigma(t):
        B = 0.1 * t + 19.9 * t * t / 2
        return math.exp(-B / 2), math.sqrt(1 - math.exp(-B))

    r, c = [math.exp(v) for v in module.r.tolist()], iter(module.c.tolist())
    for i in range(5):
        dt = r[i] / math.fsum(r)
        row = [next(c) for _ in range(i)]
        d, g = module.d[i].item(), 0 if module.g is None else module.g[i].item()
        u = t + dt if coordinates == 'velocity' else max(t - dt, 1e-3)
        (a, s), (b, z) = alpha_sigma(t), alpha_sigma(u)
        gain, span = 1, dt
        if coordinates == 'data':
            gain, span = z / s, b - z * a / s
        if coordinates == 'noise':
            gain, span = b / a, z - b * s / a
        q.append(field(x, t))
        update = sum(m * v for m, v in zip([*row, 1 - math.fsum(row)], q))
        x = (1 + g) * gain * x + (1 + d) * span * update
        t = u
    torch.testing.assert_close(result, x, rtol=1e-9, atol=1e-9)
    assert not solver.consistent and solver.params == dict(scaled=20).get(family, 25)


def one_descent_step(family, order):
    "From adam2, on a loss that depends on everything: the module, and the names that moved."
    field, noise = problem()
    module = NeuralSolver(7, init=adam2(7), family=family, order=order)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    sample(field, noise, module()).square().mean().backward()
    optimiser.step()
    after = module.state_dict()
    assert set(before) == {'r', 'c', *FAMILIES[family]}
    return module, tuple(k for k in after if not torch.equal(after[k], before[k]))


def in_every_family(test):
    test = pytest.mark.parametrize('order', [None, 2])(test)
    return pytest.mark.parametrize('family', FAMILIES)(test)


def shares(solver):
    return solver.weights / solver.weights.sum(1, keepdim=True)


@in_every_family
def test_only_what_is_free_moves(family, order):
    module, moved = one_descent_step(family, order)
    assert moved == FAMILIES[family]
    old, new = adam2(7), module()
    if 'r' not in moved:
        torch.testing.assert_close(new.nodes, old.nodes, rtol=0, atol=1e-14)
    if 'c' not in moved:
        torch.testing.assert_close(shares(new), shares(old), rtol=1e-12, atol=1e-12)
    if 'd' not in moved:
        torch.testing.assert_close(new.weights.sum(1), new.nodes.diff(), rtol=0, atol=1e-12)
    if 'g' not in moved:
        assert torch.equal(new.gain, torch.ones(7, dtype=F64))


@in_every_family
def test_a_state_dict_keeps_the_solver(family, order):
    module, _ = one_descent_step(family, order)
    other = NeuralSolver(7, False, family=family, order=order)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    called = torch.func.functional_call(other, state, (), dict(name='called'))
    assert (called.digest, called.name) == (module().digest, 'called')
    other.load_state_dict(state)
    assert other().digest == module().digest


def test_numbers_of_the_families():
    for n in (5, 8):
        counts = dict(consistent=n * (n + 1) // 2, times=n, coefficients=n * (n - 1) // 2)
        counts |= {
            'scaled': counts['consistent'] + n,
            'non-stationary': counts['consistent'] + 2 * n,
        }
        assert {
            f: NeuralSolver(n, family=f)().params for f in FAMILIES
        } == counts  # n = 5: masked ones included
    for order, free in ((1, 0), (2, 7), (3, 13), (8, 28), (99, 28)):
        module = randomised(8, order=order)
        assert module.c.numel() == free and module().params == 8 + free
        used = module().weights != 0
        assert [row.nonzero().flatten().tolist() for row in used] == [
            list(range(max(0, i + 1 - order), i + 1)) for i in range(8)
        ]
    assert NeuralSolver(8, True, order=3).c.numel() == 13 - 2  # both masks


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'solver',
    [load_solver('sit-xl-2', 6), load_solver('dit-xl-2', 7), get_solver('unipc-3', 6, VPPath())],
    ids=lambda s: s.name,
)
def test_every_family_starts_at_a_consistent_solver(family, solver):
    again = NeuralSolver(solver.nfe, init=solver, family=family)(
        coordinates=solver.coordinates, path=solver.path, t_start=solver.nodes[0].item()
    )
    torch.testing.assert_close(again.weights, solver.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again.gain, solver.gain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('family', ['scaled', 'non-stationary'])
@pytest.mark.parametrize(
    'where', [{}, dict(coordinates='data', path=VPPath(), t_start=0.95)], ids=['velocity', 'data']
)
def test_a_larger_family_starts_at_its_own_solvers(family, where):
    module = randomised(6, False, family=family, seed=3)
    solver = module(**where)
    again = NeuralSolver(6, init=solver, family=family)(**where)
    for key in ('nodes', 'weights', 'gains'):
        torch.testing.assert_close(getattr(again, key), getattr(solver, key), rtol=1e-9, atol=1e-10)
    wider = NeuralSolver(6, init=solver, family='non-stationary')
    torch.testing.assert_close(wider(**where).weights, solver.weights, rtol=1e-9, atol=1e-10)
    if family == 'scaled':
        assert wider.g.abs().max() < 1e-12


FREE = Solver([0, 0.3, 0.6, 1], [[0.4, 0, 0], [0.1, 0.2, 0], [0, 0.1, 0.5]], gains=[1, 1.1, 0.9])


ZERO_ROW = replace(FREE, weights=[[0.4, 0, 0], [-0.1, 0.1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    'args, settings, words',
    [
        ((3,), dict(family='bns'), ["family='bns'", 'consistent', 'non-stationary']),
        ((3,), dict(order=0), ['order=0']),
        ((3,), dict(init=FREE), ["init='solver'", "family='non-stationary'"]),
        ((3,), dict(init=FREE, family='times'), ["family='times'"]),
        ((3,), dict(init=FREE, family='scaled'), ["family='scaled'"]),
        ((3,), dict(init=ZERO_ROW, family='non-stationary'), ['sums to 0']),
        ((8,), dict(init=adam4(8), order=3), ['3 evaluations', 'order=None']),
        ((8, True, adam4(8)), dict(order=4), ['two_step_tail=False']),
    ],
)
def test_refusal_of_a_search_space(args, settings, words):
    refused(words, NeuralSolver, *args, **settings)


@pytest.mark.parametrize(
    'factors, words',
    [(torch.ones(2), ['factors', '[2]', '[2, 2]']), (torch.eye(2), ['gains'])],
)
def test_refusal_of_factors(factors, words):
    refused(words, neural_solver, [0.5, 0.5], torch.zeros(2, 2), factors=factors)


def test_the_error_bound_counts_the_gains():
    "x_1 = -2 x_0 + 3 q_0, x_2 = .5 x_1 - q_0 + q_1: .5 * 3 + 1 + 1, or sharply |1.5 - 1| + 1."
    assert error_bound(Solver([0, 0.5, 1], [[3, 0], [-1, 1]], gains=[-2, 0.5])) == (
        3.5,
        1.5,
    ) and error_bound(FREE) != error_bound(replace(FREE, gains=[1, 2, 2]))
