"Solvers without gradients: rows against other linear algebra, nodes against enumeration."

import itertools
import pytest
import torch
from neuralsolver.closed_form import (
    fit_rows,
    gits,
    optimal_path,
    ridge_solve,
    RULES,
    step_costs,
)
from neuralsolver.exponential import ddim
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.classical import adams_bashforth, euler, uniform_grid
from neuralsolver.solvers import sample, Solver
from neuralsolver.teachers import teacher_trajectories

PATHS = [LinearPath(), VPPath()]


def problem(path=LinearPath(), members=40):
    "An exact mixture in the plane and its teacher."
    g = torch.Generator().manual_seed(3)
    centers = torch.randn(5, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(members, 2, generator=g, dtype=torch.float64)
    field = GaussianMixture(centers, 0.3, path=path)
    return field, teacher_trajectories(field, noise, steps=40, progress=False)


def student_nodes(teacher, steps):
    return teacher.solver.nodes[torch.linspace(0, teacher.solver.nfe, steps + 1).round().long()]


def replay(field, teacher, solver):
    "The states and predictions of a student by a naive loop."
    field = field.on(solver.path, solver.coordinates)
    x, q, out = teacher.noise, [], []
    for k in range(solver.nfe):
        q.append(field(x, solver.nodes[k]))
        out.append((x, list(q)))
        x = solver.gain[k] * x + sum(solver.weights[k, j] * q[j] for j in range(k + 1))
    return out


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_rows_solve_the_constrained_problem(path):
    "Lagrange multipliers: min |D w - r|^2 with sum w = span as one KKT system."
    field, teacher = problem(path)
    solver = fit_rows(field, teacher, student_nodes(teacher, 4), ridge=0)
    for k, (x, q) in enumerate(replay(field, teacher, solver)):
        A = torch.stack([v.flatten() for v in q], 1)
        r = (teacher.at(solver.nodes[k + 1 : k + 2])[0] - solver.gain[k] * x).flatten()
        one = torch.ones(k + 1, 1, dtype=torch.float64)
        kkt = torch.cat(
            [
                torch.cat([A.T @ A, one], 1),
                torch.cat([one.T, torch.zeros(1, 1, dtype=torch.float64)], 1),
            ]
        )
        w = torch.linalg.solve(kkt, torch.cat([A.T @ r, solver.span[k : k + 1]]))[:-1]
        torch.testing.assert_close(solver.weights[k, : k + 1], w, rtol=1e-6, atol=1e-7)
        assert solver.provenance['rmse_of_states'][k] == pytest.approx(
            (A @ w - r).square().mean().sqrt().item(), rel=1e-6
        )


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_free_rows_solve_the_unconstrained_problem(path):
    "The gain is one more unknown; lstsq on the columns themselves."
    field, teacher = problem(path)
    solver = fit_rows(field, teacher, student_nodes(teacher, 3), ridge=0, consistent=False)
    assert not solver.consistent
    for k, (x, q) in enumerate(replay(field, teacher, solver)):
        A = torch.stack([x.flatten(), *(v.flatten() for v in q)], 1)
        w = torch.linalg.lstsq(
            A, teacher.at(solver.nodes[k + 1 : k + 2])[0].reshape(-1, 1)
        ).solution[:, 0]
        torch.testing.assert_close(
            torch.cat([solver.gain[k : k + 1], solver.weights[k, : k + 1]]), w, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize('consistent', [True, False])
def test_no_other_row_is_better(consistent):
    "Any change of the last row makes the end points worse on the trajectories of the fit."
    field, teacher = problem()
    nodes = student_nodes(teacher, 3)

    def error(s):
        return (sample(field, teacher.noise, s) - teacher.ends).square().mean().item()

    solver = fit_rows(field, teacher, nodes, ridge=0, consistent=consistent)
    best = error(solver)
    for change in (
        [1e-3, 0, -1e-3],
        [0, 1e-3, -1e-3],
        [-1e-3, 0, 1e-3],
        [0, -1e-3, 1e-3],
        *([] if consistent else [[1e-3, 0, 0], [0, 0, -1e-3]]),
    ):
        weights = solver.weights.clone()
        weights[2] += torch.tensor(change, dtype=torch.float64)
        assert error(Solver(solver.nodes, weights, gains=solver.gains)) > best


def test_ridge_draws_towards_euler():
    field, teacher = problem()
    nodes = student_nodes(teacher, 5)
    plain = euler(5, nodes).weights
    away = [
        (fit_rows(field, teacher, nodes, ridge=r).weights - plain)[1].abs().max().item()
        for r in (0, 1e-4, 1e-2, 1, 1e9)
    ]
    assert away == sorted(away, reverse=True) and away[0] > 0.01 and away[-1] < 1e-8


def test_nearly_collinear_columns_stay_tame():
    "Rows that differ in the ninth digit: the plain solution is thousands, the ridge's below one."
    g = torch.Generator().manual_seed(0)
    a, noise, r = torch.randn(3, 500, generator=g, dtype=torch.float64)
    D = torch.stack([a, a + 1e-9 * noise])
    r = a + 1e-3 * r
    assert (
        ridge_solve(D @ D.T, D @ r, 1e-4).abs().max()
        < 1
        < 1e3
        < torch.linalg.lstsq(D.T, r[:, None]).solution.abs().max()
    )
    assert ridge_solve(
        torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0
    ).tolist() == [0, 0]


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_result_does_not_depend_on_batches_and_calls_are_counted(path):
    field, teacher = problem(path, 37)
    seen = []

    def counted(x, t):
        seen.append(len(x))
        return field.on(path, teacher.solver.coordinates)(x, t)

    whole = fit_rows(counted, teacher, student_nodes(teacher, 4))
    assert seen == [37] * 4
    parts = fit_rows(field, teacher, student_nodes(teacher, 4), batch_size=8)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        step_costs(teacher).triu(1),
        step_costs(teacher, batch_size=5).triu(1),
        rtol=1e-12,
        atol=1e-15,
        equal_nan=True,
    )


def test_index_and_order():
    "Chosen members equal a teacher of those members; params are the free numbers."
    field, teacher = problem()
    nodes = student_nodes(teacher, 5)
    chosen = torch.tensor([3, 30, 7, 11])
    a, b = (
        fit_rows(field, teacher, nodes, chosen, order=2),
        fit_rows(field, teacher[chosen], nodes, order=2),
    )
    assert (
        a.digest == b.digest
        and not a.weights.tril(-2).any()
        and a.weights.diagonal(-1).all()
        and a.params == 4
    )
    assert fit_rows(field, teacher, nodes, consistent=False).params == 10 + 10
    torch.testing.assert_close(
        step_costs(teacher, chosen).triu(1), step_costs(teacher[chosen]).triu(1), equal_nan=True
    )
    assert fit_rows(field, teacher, nodes, order=1).digest == euler(5, nodes).digest


def test_conditions_and_single_precision():
    "Labels reach the field with their trajectory; float32 gives a few digits of float64."
    g = torch.Generator().manual_seed(1)
    centers = torch.randn(6, 1, 2, 2, generator=g, dtype=torch.float64)
    labels = torch.arange(6) % 3
    noise, y = torch.randn(30, 1, 2, 2, generator=g, dtype=torch.float64), torch.arange(30) % 3
    made = {}
    for dtype in (torch.float64, torch.float32):
        net = GaussianMixture(centers.to(dtype), 0.4, labels)
        start = noise.to(dtype)
        teacher = teacher_trajectories(net, start, y, 40, progress=False)
        kept = teacher.states.clone()
        made[dtype] = fit_rows(net, teacher, uniform_grid(4), order=2, batch_size=7)
        assert torch.equal(teacher.noise, noise.to(dtype)) and torch.equal(kept, teacher.states)
        torch.testing.assert_close(
            made[dtype].weights,
            fit_rows(net, teacher, uniform_grid(4), order=2, batch_size=30).weights,
            rtol=1e-4,
            atol=1e-4,
        )
    torch.testing.assert_close(
        made[torch.float32].weights, made[torch.float64].weights, rtol=1e-3, atol=1e-3
    )
    shuffled = teacher_trajectories(net, start, y.roll(1), 40, progress=False)
    assert (
        fit_rows(net, shuffled, uniform_grid(4), order=2).weights - made[torch.float32].weights
    ).abs().max() > 1e-3


def test_known_solver_is_recovered():
    "The nodes and the order of a teacher give its weights back, in data coordinates too."
    field, _ = problem()
    g = torch.Generator().manual_seed(2)
    noise = torch.randn(60, 2, generator=g, dtype=torch.float64)
    for order in (2, 3):
        known = adams_bashforth(6, order)
        teacher = teacher_trajectories(field, noise, solver=known, progress=False)
        for o in (order, None):
            torch.testing.assert_close(
                fit_rows(field, teacher, known.nodes, order=o, ridge=0).weights,
                known.weights,
                rtol=0,
                atol=1e-6,
            )
    vp, _ = problem(VPPath())
    known = ddim(5, t_start=0.99)
    teacher = teacher_trajectories(vp, noise, solver=known, progress=False)
    for consistent in (True, False):
        found = fit_rows(vp, teacher, known.nodes, ridge=0, order=2, consistent=consistent)
        torch.testing.assert_close(found.weights, known.weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.gain, known.gain, rtol=0, atol=1e-6)


def test_free_solver_survives_json():
    field, teacher = problem()
    solver = fit_rows(field, teacher, uniform_grid(3), consistent=False)
    assert Solver.from_dict(solver.to_dict()).digest == solver.digest


def test_weight_moves_nodes():
    "A larger coefficient makes late jumps dearer: they become shorter, and the first one longer."
    _, teacher = problem()
    costs = step_costs(teacher)
    first = [optimal_path(costs, 5, w)[1].item() for w in (0.5, 1.0, 2.0)]
    assert first == sorted(first) and first[0] < first[-1]


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_gits(path):
    "All steps give the teacher's nodes, Euler on them the teacher; more steps cost less."
    field, teacher = problem(path)
    calls = []
    field.register_forward_hook(lambda *_: calls.append(1))
    whole = gits(teacher, 40, order=1)
    assert torch.equal(whole.nodes, teacher.solver.nodes)
    for rule in ('ipndm', 'ipndm-v') if path.coordinates == 'velocity' else RULES:
        s = gits(teacher, 5, rule=rule, index=slice(0, 10))
        delta = s.nodes.diff() * (path.t_data - path.t_noise)
        assert (
            s.nfe == 5
            and (delta > 0).all()
            and torch.equal(s.nodes[[0, -1]], teacher.solver.nodes[[0, -1]])
            and all(n in teacher.solver.nodes for n in s.nodes)
            and s.params == 4
        )
    assert not calls  # no evaluation of the field
    ends = sample(field, teacher.noise, whole)
    assert len(calls) == 40 and (ends - teacher.ends).abs().max() < 1e-9
    costs = step_costs(teacher)
    price = [
        sum(costs[i, j].item() for i, j in itertools.pairwise(optimal_path(costs, n, 1.0).tolist()))
        for n in range(1, 20)
    ]
    assert price == sorted(price, reverse=True)


def test_euler_on_chosen_nodes_beats_uniform_time_where_the_path_bends_late():
    "A field without x: errors add up unchanged, so the cost is the error."

    def field(x, t):
        return torch.zeros_like(x) + torch.exp(6 * (t - 1))

    teacher = teacher_trajectories(
        field, torch.zeros(1, 1, dtype=torch.float64), steps=60, progress=False
    )
    solver = gits(teacher, 6, order=1)

    def error(s):
        return (sample(field, teacher.noise, s) - teacher.ends).abs().item()

    others = [torch.tensor([0, *inner, 60]) for inner in itertools.combinations(range(5, 60, 6), 5)]
    assert error(solver) <= min(error(euler(6, teacher.solver.nodes[o])) for o in others) and error(
        solver
    ) < 0.7 * error(euler(6))


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda f, t: fit_rows(f, t, [0.0, 0.5, 0.9]), 'from 0 to 1'),
        (lambda f, t: fit_rows(f, t, [0.1, 0.5, 1.0]), 'from 0 to 1'),
        (lambda f, t: fit_rows(f, t, [0.0, 0.7, 0.5, 1.0]), 'monotone'),
        (lambda f, t: fit_rows(f, t, uniform_grid(3).flip(0)), 'from 0 to 1'),
        (lambda f, t: fit_rows(f, t, [0.0]), 'nodes='),
        (lambda f, t: fit_rows(f, t, [0.0, float('nan'), 1.0]), 'nodes='),
        (
            lambda f, t: fit_rows(f, t, uniform_grid(3), index=torch.zeros(0, dtype=torch.int64)),
            'at least one',
        ),
        (lambda f, t: fit_rows(f, t, uniform_grid(3), order=2.0), 'order=2.0'),
        (lambda f, t: fit_rows(f, t, uniform_grid(3), ridge=-1.0), 'ridge=-1'),
        (lambda f, t: fit_rows(f, t, uniform_grid(3), batch_size=0), 'batch_size=0'),
        (lambda f, t: fit_rows(problem(VPPath())[0], t, uniform_grid(3)), 'belongs to'),
        (lambda f, t: gits(t, 41), 'steps=41'),
        (lambda f, t: gits(t, 0), 'steps=0'),
        (lambda f, t: gits(t, 4, index=slice(0, 0)), 'at least one'),
        (lambda f, t: gits(t, 4, rule='heun'), 'ipndm-v'),
        (lambda f, t: gits(t, 4, rule='unipc'), 'unipc'),
        (lambda f, t: gits(t, 4, weight=0), 'weight=0'),
        (lambda f, t: optimal_path(torch.full((4, 4), float('inf')), 2), 'finite above'),
        (lambda f, t: optimal_path(torch.rand(3, 4), 2), 'square'),
    ],
)
def test_errors_before_compute(call, message):
    field, teacher = problem(members=3)
    field.register_forward_hook(lambda *_: pytest.fail('computed before the error'))
    with pytest.raises(ValueError, match=message):
        call(field, teacher)
