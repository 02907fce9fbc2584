"The published tables, derived a second time from the raw numbers."
import json, math
import pytest, torch
from neuralsolver.neural import NeuralSolver, adam2, adam4, get_solver, list_solvers, load_solver
from neuralsolver.solvers import sample
from neuralsolver.utils import data_file

RAW = json.loads(data_file('published_solvers.json').read_text())
LINEAR = [(name, int(n)) for name in ('flowdcn-b-2', 'sit-xl-2') for n in RAW[name]['steps']]
VP = [('dit-xl-2', int(n)) for n in RAW['dit-xl-2']['steps']]
ALL = [*LINEAR, *VP]

def problem():
    "A random smooth field without structure, and noise."
    g = torch.Generator().manual_seed(5)
    A, b, noise = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((6, 6), (6,), (9, 6)))
    return (lambda x, t: torch.tanh(x @ A / 2 + b * t) - .3 * x), noise

def filled(coefficients):
    "The paper's matrix M, row by row: coefficients below the diagonal, one minus their sum on it."
    return [[*row[:i], 1 - math.fsum(row[:i])] for i, row in enumerate(coefficients)]

def table(name, n): return RAW[name]['steps'][str(n)]

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
    field, x = problem(); deltas = table(name, n)['timedeltas' if rounded else 'timedeltas_unrounded']
    if not rounded: deltas = [d / math.fsum(deltas) for d in deltas]
    result = sample(field, x, load_solver(name, n, rounded)); t, v = 0., []
    for dt, row in zip(deltas, filled(table(name, n)['coeffs'])):
        v.append(field(x, t)); x = x + dt * sum(m * vj for m, vj in zip(row, v)); t += dt
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('name, n', VP)
def test_vp_tables_by_a_naive_loop(name, n):
    "Eq. 19, one update a step: t from 0.999 down, clamped at 1e-3, beta from 0.1 to 20, prediction of the data."
    field, x = problem(); result = sample(field, x, load_solver(name, n)); t, v = .999, []
    def alpha_sigma(t): B = .1 * t + 19.9 * t * t / 2; return math.exp(-B / 2), math.sqrt(1 - math.exp(-B))
    for dt, row in zip(table(name, n)['timedeltas'], filled(table(name, n)['coeffs'])):
        u = max(t - dt, 1e-3); (a, s), (b, r) = alpha_sigma(t), alpha_sigma(u)
        v.append(field(x, t)); x = r / s * x + r * (b / r - a / s) * sum(m * vj for m, vj in zip(row, v)); t = u
    assert t == 1e-3
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10) # the naive sigma cancels at small t

def test_adams_rows_are_the_official_ones():
    rows = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -16 / 12, 23 / 12], 4: [-9 / 24, 37 / 24, -59 / 24, 55 / 24]} # oldest first
    for n in (1, 2, 3, 5, 8, 16):
        for solver, order in ((adam2(n), 2), (adam4(n), 4)):
            expected = torch.zeros(n, n, dtype=torch.float64)
            for i in range(n): p = min(order, i + 1); expected[i, i + 1 - p:i + 1] = torch.tensor(rows[p], dtype=torch.float64) / n
            torch.testing.assert_close(solver.weights, expected, rtol=0, atol=1e-14)
            torch.testing.assert_close(solver.nodes, torch.arange(n + 1, dtype=torch.float64) / n, rtol=0, atol=1e-15)

def test_parameter_counts_are_the_papers():
    counts = {5: 15, 6: 21, 7: 28, 8: 36, 9: 45, 10: 55, 15: 120}
    for name, n in ALL: assert load_solver(name, n).params == counts[n]
    for n, count in counts.items(): assert NeuralSolver(n)().params == count
    for n in (1, 7, 8, 15): assert sum(p.numel() for p in NeuralSolver(n).parameters()) == n * (n + 1) // 2
    assert get_solver('adam4', 8).params == 0

@pytest.mark.parametrize('n, zeros, entries', [(5, 5, 10), (6, 7, 15)])
def test_two_step_tail(n, zeros, entries):
    "The last two rows use two evaluations: in every published table and in the search space, at the same places."
    lower = torch.tril_indices(n, n, -1); assert lower.shape[1] == entries
    module = NeuralSolver(n); torch.nn.init.ones_(module.c); free = module.coefficients[tuple(lower)] != 0
    assert (~free).sum() == zeros and NeuralSolver(n, two_step_tail=False).c.numel() == entries
    for name in RAW: assert torch.equal(torch.tensor(table(name, n)['coeffs'])[tuple(lower)] != 0, free), name
    for name in RAW: # and in what is run: only the diagonal and its neighbour
        assert (load_solver(name, n).weights.tril(-1)[-2:] != 0).sum(1).tolist() == [1, 1]

@pytest.mark.parametrize('name, n', ALL)
def test_time_deltas_are_rounded_softmax_values(name, n):
    "The recovered values sum to 1, round to the printed ones, and their logits lie on Lion's grid (steps of 0.01, one parity: 0.02)."
    printed, found = table(name, n)['timedeltas'], table(name, n)['timedeltas_unrounded']
    assert abs(math.fsum(found) - 1) < 1e-7 * n
    assert [round(d, 4) for d in found] == printed
    for d in found:
        k = math.log(d / found[-1]) / .02; assert abs(k - round(k)) < .01
    solver = load_solver(name, n, rounded=False); assert solver.provenance['rounded'] is False
    if name != 'dit-xl-2': assert abs(solver.nodes[-1].item() - 1) < 1e-14 < abs(math.fsum(printed) - 1) + 1e-13

@pytest.mark.parametrize('call, words', [
    (lambda: load_solver('sit-xl-2', 11), ['sit-xl-2', 'steps=11', '5, 6, 7, 8, 9, 10']),
    (lambda: load_solver('sit-xl-2', 15), ['steps=15']), (lambda: load_solver('flowdcn-b-2', 4), ['steps=4', '9, 10, 15']),
    (lambda: load_solver('sit-xl-2'), ['steps=None', '5, 6']), (lambda: load_solver('sit-xl-2', True), ['steps=True']),
    (lambda: load_solver('sit', 8), ["solver='sit'", 'sit-xl-2', 'dit-xl-2', 'flowdcn-b-2']),
    (lambda: get_solver('adam3', 8), ["solver='adam3'", 'adam2', 'sit-xl-2']), (lambda: get_solver('', 8), ["solver=''"]),
    (lambda: get_solver('sit-xl-2', 0), ['steps=0', 'integer >= 1']), (lambda: get_solver('sit-xl-2', 8.), ['steps=8.0'])])
def test_errors_list_what_is_allowed(call, words):
    with pytest.raises(ValueError) as error: call()
    for word in words: assert word in str(error.value)

def test_a_searched_file_is_found_by_name(tmp_path, monkeypatch):
    import neuralsolver.neural as module
    (tmp_path / 'solvers').mkdir(); module.save_solver(load_solver('flowdcn-b-2', 7), tmp_path / 'solvers/my-model-7.json')
    monkeypatch.setattr(module, 'data_root', lambda: tmp_path)
    assert list_solvers()['my-model'] == [7] and get_solver('my-model', 7).digest == load_solver('flowdcn-b-2', 7).digest
    with pytest.raises(ValueError, match='steps = 7'): load_solver('my-model', 8)
