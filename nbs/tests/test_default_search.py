"""The default search: its matrix, its starts, its steps, resume, and what it says of its result."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from search_cases import (
    FIELD,
    POOL,
    TEACHER,
    TEACHERS,
    TRAIN,
    VP,
    Interrupted,
    Watched,
    fields,
    run,
    same_search,
    same_solver,
)

from neuralsolver.classical import adams_bashforth, euler
from neuralsolver.closed_form import fit_rows, gits
from neuralsolver.descent import Counted, Descent, SearchState, Task
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.fields import Field, GaussianMixture
from neuralsolver.gauss_newton import Landscape, Runner, advance, phase_loss
from neuralsolver.losses import end_distances, heldout_rmse
from neuralsolver.neural import get_solver, list_solvers
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.race import RaceState, confidence_of, far_members, mean_interval, starts_of
from neuralsolver.recipes import GaussNewton, Phase, Recipe
from neuralsolver.solvers import Solver, sample
from neuralsolver.starts import FITTED_MARGIN, PUBLISHED, nearest, race_grids, start_candidates
from neuralsolver.store import read_card
from neuralsolver.teachers import teacher_trajectories


def race(field=FIELD, **settings):
    return run(field, method='gauss-newton', **settings)


def start_on(path):
    if path.coordinates == 'velocity':
        return adams_bashforth(4, 2)
    return dpm_solver_pp(4, 2, t_start=path.t_start)


def exact(landscape, point, task, phase):
    "Gradient and matrix from the Jacobian, a column at a time by forward-mode products."
    index = torch.arange(task.train)
    names = [n for n, p in landscape.module.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in landscape.free]
    form = dict(path=task.path, coordinates=task.path.coordinates, t_start=task.path.t_start)

    def residuals(theta):
        parts = dict(zip(names, theta.split(sizes)))
        solver = torch.func.functional_call(landscape.module, parts, (), form)
        x = sample(task.field, task.pool.noise, solver, trajectory=True)[1:]
        y = torch.cat([task.pool.at(solver.nodes[1:-1], index), task.pool.ends[None]])
        return (x - y).flatten(2) / x[0, 0].numel() ** 0.5

    columns = torch.eye(len(point), dtype=torch.float64)
    J = torch.stack([torch.func.jvp(residuals, (point,), (v,))[1] for v in columns])
    r = residuals(point).detach()
    loss, weight = phase_loss(r.square().sum(2).sqrt(), phase)
    weight = weight[..., None]
    rows = (J * weight.sqrt()).flatten(1)
    gradient = (J * weight * r).flatten(1).sum(1)
    return loss.mean(), gradient / task.train, rows @ rows.T / task.train


# The matrix
@fields
@pytest.mark.parametrize('family', ['consistent', 'times', 'non-stationary'])
@pytest.mark.parametrize('scale', [None, 0.1])
def test_the_sketch_has_the_exact_matrix_as_its_mean(field, family, scale):
    task = Task(field, 4, TEACHERS[field.path], TRAIN)
    recipe = GaussNewton(family=family, projections=300, batch_size=48, influence=None)
    landscape = Landscape(task, recipe, start_on(field.path), dict(forward=0, backward=0))
    phase = Phase(0.3, 1, scale=scale)
    signs = torch.Generator().manual_seed(0)
    moved = torch.randn(len(landscape.start), generator=signs, dtype=torch.float64)
    point = landscape.start + 0.03 * moved  # `sample` leaves out weights that are 0
    loss, gradient, matrix = exact(landscape, point, task, phase)
    found = landscape.linear(point, phase, torch.arange(TRAIN), signs)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-6, atol=1e-9)
    assert (found.matrix - matrix).norm() < 0.1 * matrix.norm()


@pytest.mark.parametrize('scale', [None, 0.1])
def test_the_weights_are_those_of_the_loss_for_errors_of_every_size(scale):
    e = torch.logspace(-6, 0.9, 60, dtype=torch.float64).expand(3, -1).clone().requires_grad_()
    loss, weight = phase_loss(e, Phase(0.3, 1, scale=scale))
    (slope,) = torch.autograd.grad(loss.sum(), e)
    torch.testing.assert_close(slope, weight * e)


def test_members_that_stand_for_several_count_as_often():
    task = Task(FIELD, 4, TEACHER, TRAIN)
    recipe = GaussNewton(projections=400, influence=None)
    landscape = Landscape(task, recipe, start_on(task.path), dict(forward=0, backward=0))
    phase, signs = Phase(0.2, 1), torch.Generator().manual_seed(0)
    index, counts = torch.tensor([3, 5, 8]), torch.tensor([1.0, 3.0, 2.0])
    again = index.repeat_interleave(counts.long())
    a = landscape.linear(landscape.start, phase, index, signs, counts=counts)
    b = landscape.linear(landscape.start, phase, again, signs)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient)
    assert (a.matrix - b.matrix).norm() < 0.15 * b.matrix.norm()


def test_far_members_estimate_the_mean_of_the_pool():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(300, generator=generator, dtype=torch.float64) ** 8
    index, counts = far_members(errors, 100, generator)
    assert len(index.unique()) == 100 and counts.sum() == 300
    assert set(errors.topk(50).indices.tolist()) <= set(index.tolist())
    found = (errors[index] * counts).sum() / 300
    plain = errors[torch.randperm(300, generator=generator)[:100]].mean()
    assert (found - errors.mean()).abs() < 0.002 < 0.01 < (plain - errors.mean()).abs()


def test_batches_and_recomputation_change_nothing():
    a, b, c = (
        race(batch_size=size, gradient_checkpointing=again)
        for size, again in ((48, False), (48, True), (48, False))
    )
    assert a.solver.digest == b.solver.digest == c.solver.digest
    assert a.history == c.history


def test_the_cost_counts_every_call():
    field = Watched()
    found = race(field, projections=3)
    calls = sum(len(x) for _, x, _ in field.calls) + 2  # it refused two times at once
    kept = {k: v for k, v in found.cost.items() if k not in ('teacher', 'backward')}
    assert sum(kept.values()) == calls
    graded = sum(len(x) for _, x, grad in field.calls if grad)
    assert found.cost['backward'] == 4 * graded  # three sketches and the gradient


# The iterations
def test_a_linear_problem_is_solved_by_least_squares():
    "A field that depends on time only, fixed times, a loss that is a square."
    shape = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def field(x, t):
        t = torch.as_tensor(t).reshape(-1, 1)
        return torch.sin(t * torch.arange(1, 7)) @ shape + 0 * x

    noise = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = teacher_trajectories(field, noise, steps=40, progress=False)
    task = Task(field, 3, teacher, 40)
    recipe = GaussNewton(family='coefficients', projections=8)
    start = adams_bashforth(3, 1)
    landscape = Landscape(task, recipe, start, dict(forward=0, backward=0))
    runner = Runner('euler', None, landscape.start, 1e-4)
    phase = Phase(0.0, 20, scale=1e4)
    for k in range(20):
        signs = torch.Generator().manual_seed(k)
        advance(runner, landscape, phase, torch.arange(40), signs)
    with torch.no_grad():
        solver = landscape.solver(runner.parameters)
    # x_3 = x_0 + sum_kj W_kj q_j: three free corrections q_j - q_k
    q = torch.cat([field(noise[:1], t) for t in start.nodes[:3]])
    target = teacher.ends[0] - noise[0] - q.mean(0)
    D = torch.stack([q[0] - q[1], q[0] - q[2], q[1] - q[2]]).T / 3
    best = target - D @ torch.linalg.pinv(D) @ target
    reached = end_distances(field, solver, teacher).mean()
    assert reached.item() == pytest.approx(best.square().mean().sqrt().item(), rel=1e-4)


def test_a_step_that_does_not_help_is_refused():
    task = Task(FIELD, 4, TEACHER, TRAIN)
    landscape = Landscape(task, GaussNewton(), start_on(task.path), dict(forward=0, backward=0))
    runner = Runner('ab2', None, landscape.start, 1e-9)
    phase, index = Phase(0.0, 9, scale=0.01), torch.arange(TRAIN)
    for k in range(9):
        advance(runner, landscape, phase, index, torch.Generator().manual_seed(k))
    assert (torch.tensor(runner.losses).diff() <= 0).all()
    assert runner.at['loss'] == runner.losses[-1]


def test_a_very_sensitive_sample_is_bounded():
    task = Task(FIELD, 4, TEACHER, TRAIN)
    landscape = Landscape(task, GaussNewton(influence=4.0), start_on(task.path), {})
    vectors = torch.ones(3, 9, 5, dtype=torch.float64)
    vectors[:, 4] *= 100
    found = landscape.tempered(vectors)
    torch.testing.assert_close(found[1:, 4], torch.full_like(found[1:, 4], 2.0))  # sqrt(4)
    torch.testing.assert_close(found[0, 4], torch.full_like(found[0, 4], 100 * 4e-4))
    rest = [k for k in range(9) if k != 4]
    assert torch.equal(found[:, rest], vectors[:, rest])


def test_a_point_that_cannot_be_better_is_given_up_early():
    task = Task(FIELD, 4, TEACHER, TRAIN)
    cost = dict(forward=0, backward=0)
    landscape = Landscape(task, GaussNewton(batch_size=8), start_on(task.path), cost)
    phase, index, signs = Phase(0.0, 1), torch.arange(TRAIN), torch.Generator()
    here = landscape.linear(landscape.start, phase, index, signs)
    assert cost['forward'] == TRAIN * 4
    bad = landscape.start + torch.linspace(-2, 2, len(landscape.start)).double()
    assert landscape.linear(bad, phase, index, signs, here.loss) is None
    assert cost['forward'] < TRAIN * 4 + TRAIN * 4
    assert landscape.linear(bad, phase, index, signs).loss > here.loss


def test_a_field_of_one_time_is_differentiated_all_the_same():
    class Single(Watched):
        def __call__(self, x, t):
            assert t.ndim == 0
            return FIELD(x, t)

    a, b = race(), race(Single())
    same_solver(a.solver, b.solver, 0.03)
    assert b.cost['forward'] > a.cost['forward']


def test_a_guided_network_answers_at_times_of_its_own():
    net = GaussianMixture(FIELD.centers, 0.2, labels=torch.tensor([0, 0, 1, 1, 1]))
    field, labels = Field(net, guidance=2.0), torch.tensor([0, 1, 0, 1])
    x, t = POOL[:4], torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)
    each = [field(x[i : i + 1], t[i], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(field(x, t, labels), torch.cat(each))


# Starts
def test_every_known_source_is_among_the_starts():
    for steps, path in ((8, LinearPath()), (8, FIELD.path)):
        task = Task(FIELD, steps, TEACHERS[path], TRAIN)
        names = set(starts_of(task, GaussNewton(), dict(start=0)))
        published = {n for n in PUBLISHED if steps in list_solvers()[n]} - {'dit-xl-2'}
        classical = {'euler', 'ab2', 'ab3', 'ab4', 'ab2@power-1.35', 'ab3@log-snr-3'}
        fitted = {'least-squares@power-1.6', 'least-squares@dynamic-programming'}
        assert published | classical | fitted <= names


def test_published_tables_move_to_another_path():
    from neuralsolver.starts import moved_tables

    other = VPPath(beta_max=18.0)
    moved = moved_tables(8, other)
    assert set(moved) == {'dit-xl-2'} and moved['dit-xl-2'].path == other
    table = moved['dit-xl-2']
    assert table.nodes[[0, -1]].tolist() == [other.t_start, other.t_end]
    assert not moved_tables(8, LinearPath())  # other coordinates


def test_a_start_that_is_given_is_the_only_one():
    for settings in (dict(init=adams_bashforth(4, 3)), dict(start='ab3')):
        found = race(**settings)
        assert not found.confidence.runners  # no second one
        assert found.solver.provenance['init'].startswith(('ab3', 'adams'))
        assert found.cost['start'] <= 6  # the trial of the times only


# Resume
@pytest.mark.parametrize('last', [3, 20, 34])
def test_resume_to_the_last_bit(tmp_path, last):
    with pytest.raises(Interrupted):
        race(Watched(last=last), checkpoint=tmp_path / 'c')
    resumed = race(Watched(), checkpoint=tmp_path / 'c')
    whole = race(Watched(), checkpoint=tmp_path / 'whole')
    assert same_search(resumed, whole)
    assert torch.equal(resumed.confidence.errors, whole.confidence.errors)
    again = Watched()
    assert same_search(race(again, checkpoint=tmp_path / 'c'), whole)
    assert not again.graded  # a finished search is found in its checkpoint


def test_another_seed_draws_other_signs_and_a_checkpoint_knows_it(tmp_path):
    a, b = (race(seed=seed) for seed in (0, 1))
    assert a.solver.digest != b.solver.digest
    race(checkpoint=tmp_path / 'c')
    with pytest.raises(ValueError, match='another search'):
        race(checkpoint=tmp_path / 'c', seed=1)
    with pytest.raises(ValueError, match='another search'):
        race(checkpoint=tmp_path / 'c', projections=3)


# What it says
def test_the_verdict_is_about_held_out_samples():
    found = race()
    e = end_distances(FIELD, found.solver, TEACHER[TRAIN:])
    torch.testing.assert_close(found.confidence.errors, e, rtol=1e-6, atol=1e-9)
    low, high = found.confidence.interval
    assert low < e.mean() < high
    assert found.history['heldout_error'][-1] >= min(found.history['heldout_error'])
    assert f'{e.mean():.4g}' in found.confidence.verdict
    assert found.solver.provenance['heldout_error'] == pytest.approx(e.mean().item())


def test_the_interval_holds_the_mean_though_few_samples_are_strays():
    "A bootstrap alone is not enough: most draws of 60 samples hold no stray of 0.5 %."
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        strays = torch.rand(count, generator=generator) < 0.005
        near = torch.rand(count, generator=generator, dtype=torch.float64) * 0.002
        far = 0.2 + 0.6 * torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.where(strays, far, near)

    mean, held = draw(400_000).mean().item(), {True: 0, False: 0}
    for _ in range(100):
        errors = draw(60)
        for known in held:
            low, high = mean_interval(errors, 0.8 if known else errors.max().item(), 300)
            held[known] += low <= mean <= high
    assert held[True] >= 95 > 60 > held[False]


@pytest.mark.parametrize('known, warns', [(0.01, True), (0.9, False)])
def test_a_result_worse_than_a_known_table_warns(known, warns):
    errors = torch.full((20,), 0.1, dtype=torch.float64)
    judged = dict(name='a', errors=errors, mean=0.1, losses=[0.3, 0.2], start=None, parameters=None)
    state = RaceState(judged=[judged], known={'sit-xl-2': torch.full_like(errors, known)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = confidence_of(state)
    assert bool(caught) == warns == ('sit-xl-2' in found.verdict)
    if warns:
        assert 'worse on held-out samples than sit-xl-2' in str(caught[0].message)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(phases=(Phase(1.0, 2, members=24),)), 'last phase'),
        (dict(phases=(Phase(0.0, 2),)), 'one runner'),
        (dict(projections=0), 'projections=0'),
        (dict(start='nonsense'), 'is not known'),
        (dict(lr=0.1), "setting of method 'gauss-newton'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        race(**settings)


# Where a search starts: as told, at the nearest known solver, in closed form, after a race.


def begin(field=FIELD, steps=8, **settings):
    return run(field, steps, iterations=1, lr=1e-12, **settings).solver  # the start, to 1e-11


def distance(field, solver):
    T = TEACHERS[field.path][:TRAIN]  # all that are trained on: fewer than 64
    return (sample(field, T.noise, solver) - T.ends).square().mean(1).sqrt().mean().item()


@functools.cache
def known(field, steps, published, grids=False):
    candidates = start_candidates(steps, field.path, published, grids)
    return {name: distance(field, s) for name, s in candidates.items()}


def started_at(solver):
    return solver.provenance['init'].split(' ')[0]


@pytest.mark.parametrize(
    'start, expected, atol',
    [
        ('euler', euler(8), 1e-9),
        ('ab3', adams_bashforth(8, 3), 1e-9),
        ('sit-xl-2', get_solver('sit-xl-2', 8), 1e-4),  # printed deltas sum to 1 to 4 digits
    ],
)
def test_a_search_starts_where_it_is_told(start, expected, atol):
    same_solver(begin(start=start), expected, atol)


@pytest.mark.parametrize('field, steps', [(FIELD, 4), (FIELD, 8), (VP, 6)])
def test_the_best_classical_start_is_the_nearest_classical_rule(field, steps):
    "Nothing is fitted, no published table is tried."
    s, d = begin(field, steps, start='best-classical'), known(field, steps, False, True)
    name = min(d, key=d.get)
    assert not set(d) & set(PUBLISHED) and started_at(s) == name
    same_solver(s, get_solver(name, steps, field.path), 1e-9)


@pytest.mark.parametrize(
    'field, start, steps, taken',
    [
        (FIELD, 'best', 4, False),
        (FIELD, 'best-published', 8, True),
        (VP, 'best-published', 4, False),
        (VP, 'best', 6, True),
    ],
)
def test_a_fitted_start_is_taken_where_it_is_clearly_nearer_and_only_there(
    field, start, steps, taken
):
    "Against rows fitted here, on the nodes of the nearest known solver and of the programming."
    s, d = begin(field, steps, start=start), known(field, steps, start == 'best-published')
    name = min(d, key=d.get)
    pool = TEACHERS[field.path][:TRAIN]
    grids = {
        name: start_candidates(steps, field.path)[name].nodes,
        'dynamic-programming': gits(pool, steps).nodes,
    }
    fit = {f'least-squares@{n}': fit_rows(field, pool, nodes) for n, nodes in grids.items()}
    errors = {n: distance(field, solver) for n, solver in fit.items()}
    best = min(errors, key=errors.get)
    assert (errors[best] * FITTED_MARGIN < d[name]) == taken
    assert started_at(s) == (best if taken else name)
    same_solver(s, fit[best] if taken else get_solver(name, steps, field.path), 1e-6)


@pytest.mark.parametrize('field', [FIELD, pytest.param(VP, marks=pytest.mark.slow)])
def test_a_race_is_won_by_the_start_that_is_nearest_after_a_few_iterations(tmp_path, field):
    "Every runner is searched here from its start; a resumed search does not race again."
    s = run(field, checkpoint=tmp_path / 'c', race=5)
    pool, d = TEACHERS[field.path][:TRAIN], known(field, 4, False)
    name = min(d, key=d.get)
    first = get_solver(name, 4, field.path)
    grids = {name: first.nodes, 'dynamic-programming': gits(pool, 4).nodes}
    grids |= race_grids(4, field.path)
    runners = {f'least-squares@{n}': fit_rows(field, pool, nodes) for n, nodes in grids.items()}
    after = {}
    for n, solver in ({name: first} | runners).items():
        short = Recipe(iterations=5, batch_size=16)
        descent = Descent(Task(field, 4, pool, TRAIN), short, SearchState(init=solver))
        for _ in range(5):
            descent.step()
        with torch.no_grad():
            after[n] = descent.solver()
    best = min(after, key=lambda n: distance(field, after[n]))
    assert s.solver.provenance['init'].startswith(f'{best}, raced')
    won = Solver.from_dict(read_card(tmp_path / 'c')[1]['init'])
    same_solver(won, after[best], 1e-6)
    paid = (12 + 5 * len(after)) * 16 * 4
    assert s.cost['forward'] == s.cost['backward'] == paid
    again = Watched()
    assert field is VP or same_search(run(again, checkpoint=tmp_path / 'c', race=5), s)
    assert not again.graded


@pytest.mark.parametrize('settings', [dict(steps=8), dict(init=adams_bashforth(4, 2))])
def test_there_is_no_race_where_the_start_is_clear_or_given(settings):
    assert same_search(run(**settings, race=5), run(**settings))


def test_published_tables_are_tried_by_best_published_only():
    cost = {s: run(steps=8, start=s).cost['start'] for s in ('best', 'best-published')}
    tables = set(known(FIELD, 8, True)) - set(known(FIELD, 8, False))
    assert tables == {'flowdcn-b-2', 'sit-xl-2'}  # dit-xl-2 belongs to the other path
    assert cost['best-published'] - cost['best'] == len(tables) * 8 * TRAIN


def test_a_few_strays_do_not_choose_the_start():
    "Two members on which the nearest rule is the worst by far: the RMSE would choose another."
    T, solvers = TEACHER[:TRAIN], dict(best=adams_bashforth(8, 2), other=adams_bashforth(8, 3))
    near, far = (sample(FIELD, T.noise, s) for s in solvers.values())
    states = T.states.clone()
    states[-1] = near  # at `best`, but for two that lie beyond `other`
    states[-1, :2] = far[:2] + 1000 * (far - near)[:2]
    T = replace(T, states=states)
    chosen = nearest(Counted(FIELD, dict(start=0), 'start'), Task(FIELD, 8, T, TRAIN), solvers)
    rmse = {n: heldout_rmse(FIELD, s, T.noise, None, T.ends) for n, s in solvers.items()}
    assert chosen.name == 'best' and rmse['other'] < rmse['best']
    expected = (near - T.ends).square().mean(1).sqrt().mean().item()
    assert chosen.distance == pytest.approx(expected, rel=1e-4)
