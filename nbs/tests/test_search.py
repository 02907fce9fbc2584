"""Searches: numbers, what a recipe may change, what may influence a search, resume, refusals."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from search_cases import close, fields, FIELD, FROZEN, GRADIENT, Interrupted, nan_at, POOL, ratios
from search_cases import run, same_search, same_solver, TEACHER, TEACHERS, TRAIN, VP, Watched

from neuralsolver.classical import adams_bashforth, euler
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.recipes import METHODS
from neuralsolver.store import read_card
from neuralsolver.teachers import teacher_trajectories
from neuralsolver.utils import indexed_noise


@pytest.mark.parametrize('name', FROZEN)
def test_fidelity_of_the_papers_search(name):
    field, units, nodes, losses, rmse = FROZEN[name]
    settings = dict(iterations=120, lr=0.004, eval_every=10, seed=3, teacher=40)
    found = run(field, len(units), 'paper', **settings)
    M = ratios(found.solver)
    lower = [v for k in range(len(units)) for v in M[k, :k].tolist()]
    close(lower, [0.004 * u for row in units for u in row], 1e-9)
    close(found.solver.nodes, nodes, 1e-9)
    close(found.history['heldout_rmse'], rmse, 1e-9)
    close([found.history['loss'][0], found.history['loss'][-1]], losses, 1e-9)
    assert found.history['iteration'] == [*range(0, 121, 10)]


# Families
STARTING = {
    LinearPath(): adams_bashforth(6, 2),
    VPPath(): dpm_solver_pp(6, 2, t_start=VPPath().t_start),
}
FREE = {  # nodes, M, row sums, gains
    'times': (True, False, False, False),
    'coefficients': (False, True, False, False),
    'consistent': (True, True, False, False),
    'scaled': (True, True, True, False),
    'non-stationary': (True, True, True, True),
}


@fields
@pytest.mark.parametrize('family', FREE)
def test_family_changes_what_it_may_and_nothing_else(field, family):
    start = STARTING[field.path]
    s = run(field, 6, init=start, family=family).solver
    sums = s.weights.sum(1)
    assert s.provenance['best_iteration'] > 0
    assert (s.path, s.coordinates) == (start.path, start.coordinates)
    close(s.nodes[[0, -1]], start.nodes[[0, -1]], 1e-12)
    unit = s.scale[1:] / s.scale[:-1]
    gains = unit if s.gains is None else s.gains
    changes = (
        s.nodes - start.nodes,
        s.weights / sums[:, None] - ratios(start),
        sums / s.span - 1,
        gains / unit - 1,
    )
    for change, free in zip(changes, FREE[family]):
        gap = change.abs().max().item()
        assert gap > 1e-3 if free else gap < 1e-9
    assert s.consistent == (not FREE[family][2])


@pytest.mark.parametrize('order', [1, 2, 3])
def test_order_bounds_what_a_step_uses(order):
    W = run(steps=6, start='euler', order=order).solver.weights
    assert not W.tril(-order).any() and (W.diagonal(1 - order) != 0).all()


@pytest.mark.parametrize('tail, full', [(True, False), (False, True)])
def test_two_step_tail_bounds_the_last_two_rows_only(tail, full):
    W = run(steps=7, start='euler', two_step_tail=tail).solver.weights
    assert bool(W[5:].tril(3).any()) == full
    assert (W[4, :5] != 0).all() and (W.diagonal(-1) != 0).all()


def test_the_published_rule_for_the_tail_belongs_to_the_papers_method():
    tails = [run(steps=n, method='paper').solver.provenance['two_step_tail'] for n in (6, 7)]
    assert tails == [True, False]
    assert not run(steps=6, start='euler').solver.provenance['two_step_tail']


# Batches and noise
def test_noise_samples_move_inside_their_balls():
    field, radius = Watched(), 0.05
    run(field, method='times', radius=radius, iterations=40)
    begun = torch.cat(field.begun)
    distance = (begun[:, None] - POOL[:TRAIN]).square().mean(2).sqrt().min(1).values
    assert 0.5 * radius < distance.max() <= radius * (1 + 1e-9)
    assert (distance[:16] == 0).all()  # at first they have not moved


@pytest.mark.parametrize('method', METHODS)
def test_held_out_noise_chooses_the_iterate_and_nothing_else(tmp_path, method):
    "The same training part with other held-out noise: the same losses and last parameters."
    more = indexed_noise(range(12), (2,), seed=9, dtype=torch.float64)
    other = torch.cat([POOL[:TRAIN], more])
    T = teacher_trajectories(FIELD, other, steps=40, progress=False)
    a = run(method=method, checkpoint=tmp_path / 'a')
    b = run(method=method, noise=other, teacher=T, checkpoint=tmp_path / 'b')
    assert a.history['heldout_rmse'][0] != b.history['heldout_rmse'][0]
    assert a.history['loss'] == b.history['loss']
    if method == 'gauss-newton':
        return
    if method not in GRADIENT:
        assert a.solver.digest == b.solver.digest
        return
    last = [
        {k: v for k, v in load_file(tmp_path / name).items() if k.startswith('module/')}
        for name in 'ab'
    ]
    assert last[0] and last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


@pytest.mark.parametrize('method', ['ours', 'paper'])
def test_an_epoch_sees_every_training_sample_once_and_no_other(method):
    field = Watched()
    run(field, method=method, iterations=6)

    def rows(v):
        return sorted(map(tuple, v.tolist()))

    begun = field.begun
    for epoch in (begun[:3], begun[3:]):
        assert rows(torch.cat(epoch)) == rows(POOL[:TRAIN])
    assert rows(begun[0]) != rows(begun[3])


def test_determinism_and_the_seed_of_the_batches():
    losses = [run(seed=seed, method='paper').history['loss'] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] and losses[0][0] != losses[2][0]


@pytest.mark.parametrize('method', ['ours', 'least-squares'])
def test_batch_size_of_evaluations_changes_nothing(method):
    a, b = (run(method=method, teacher=20, eval_batch_size=size) for size in (5, 250))
    same_solver(a.solver, b.solver, 1e-8)
    close(a.history['heldout_rmse'], b.history['heldout_rmse'], 1e-8)
    assert a.cost == b.cost


@pytest.mark.parametrize('method', METHODS)
def test_without_progress_nothing_is_printed(capfd, method):
    run(method=method, teacher=20)
    assert capfd.readouterr() == ('', '')


# Resume
@pytest.mark.parametrize('method', GRADIENT)
def test_resume_to_the_last_bit(tmp_path, method):
    "Interrupted in the 11th iteration; the identity costs 12 evaluations, the start is kept."
    per_step = 12 if method == 'l-bfgs' else 4  # of whole batches
    with pytest.raises(Interrupted):
        run(Watched(last=10 * per_step + 2), method=method, checkpoint=tmp_path / 'c')
    done = read_card(tmp_path / 'c')[1]['iteration']
    assert 0 < done < 12 and [p.name for p in tmp_path.iterdir()] == ['c']
    field = Watched()
    resumed = run(field, method=method, checkpoint=tmp_path / 'c')
    assert [(len(x), grad) for _, x, grad in field.calls[:4]] == [(4, False)] * 3 + [(16, True)]
    whole = run(method=method, checkpoint=tmp_path / 'whole')
    assert same_search(resumed, whole)
    alone = run(method=method)
    assert alone.solver.digest == whole.solver.digest
    assert whole.cost == alone.cost | dict(start=alone.cost['start'] + 12)
    again = Watched()
    assert same_search(run(again, method=method, checkpoint=tmp_path / 'c'), whole)
    assert not again.graded  # a finished search is found in its checkpoint


def test_resume_by_a_field_that_rounds_otherwise(tmp_path):
    "Another number of threads, another library: the last digits of every answer differ."
    with pytest.raises(Interrupted):
        run(Watched(last=4 * 6), checkpoint=tmp_path / 'c')
    found = run(Watched(lambda field: 1 + 2**-50), checkpoint=tmp_path / 'c')
    assert found.iterations == 12
    same_solver(found.solver, run().solver, 1e-6)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    file = tmp_path_factory.mktemp('finished') / 'c'
    run(checkpoint=file, iterations=4)
    return file


@pytest.mark.parametrize(
    'change, differ',
    [
        (dict(lr=0.02), 'recipe.lr: 0.03 instead of 0.02'),
        (dict(seed=1), 'seed: 0 instead of 1'),
        (dict(method='paper'), 'method: '),
        (dict(heldout=11), 'train: 48 instead of 49'),
        (dict(init=adams_bashforth(4, 2)), 'init: '),
        (dict(noise=POOL.flip(0)), 'noise: '),
        (dict(field=Watched(lambda field: 1.001)), 'field: another'),
        (dict(teacher=41), 'solver: '),
        (dict(steps=5), 'steps: 4 instead of 5'),
    ],
)
def test_refusal_of_a_checkpoint_of_another_search(finished, change, differ):
    before = finished.read_bytes()
    if 'noise' in change:
        teacher = teacher_trajectories(FIELD, change['noise'], steps=40, progress=False)
        change = change | dict(teacher=teacher)
    with pytest.raises(ValueError, match=f'another search .*{differ}'):
        run(**dict(checkpoint=finished, iterations=4) | change)
    assert finished.read_bytes() == before


# Refusals
@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(start='nonsense'), 'is not known'),
        (dict(start='heun'), 'one a step'),
        (dict(start='ddim'), 'is not known|LinearPath'),
        (dict(start='ab3', order=2), 'uses more than 2 evaluations'),
        (dict(init=adams_bashforth(4, 3), order=2), 'uses more than 2 evaluations'),
        (dict(init=adams_bashforth(5, 2)), 'has 5 evaluations'),
        (dict(init=dpm_solver_pp(4, 2, t_start=VPPath().t_start)), 'velocity coordinates'),
        (dict(init=euler(4, torch.linspace(0.1, 1, 5, dtype=torch.float64))), 'runs from t = 0.1'),
        (dict(steps=7, start='ab4', two_step_tail=True), 'tail|evaluations'),
        (dict(method='least-squares', start='heun'), 'one a step'),
        (dict(teacher=3), 'teacher=3'),
        (dict(noise=8), r'call search\(field, noise, steps=8, \.\.\.\)'),
        (dict(checkpoint='c.json'), 'without .json'),
    ],
)
def test_refusal_before_any_gradient(settings, message):
    "The teacher would be made here, on a field that says how often it was asked."
    field = Watched()
    with pytest.raises(ValueError, match=message):
        run(field, **dict(teacher=40) | settings)
    assert not field.graded and (not field.calls or 'checkpoint' in settings)


def changed(members, row, value):
    states = TEACHER.states.clone()
    states[row:, members] = value
    return replace(TEACHER, states=states)


def test_refusal_of_a_teacher_of_another_pool():
    other, cond = POOL.clone(), torch.zeros(60, dtype=torch.int64)
    other[31, 1] += 1e-9
    conditioned = replace(TEACHER, cond=cond)
    for change in (
        dict(noise=POOL.flip(0)),
        dict(noise=other),
        dict(noise=POOL[:50]),
        dict(cond=cond),
        dict(teacher=conditioned),
        dict(teacher=conditioned, cond=cond + 1),
    ):
        with pytest.raises(ValueError, match=r'another pool \(noise or cond'):
            run(**change)


def test_refusal_of_a_teacher_of_other_ends_or_another_grid():
    times = torch.linspace(0, 1, 21, dtype=torch.float64)
    part, cubic = (
        teacher_trajectories(FIELD, POOL, solver=adams_bashforth(20, 2, nodes), progress=False)
        for nodes in (0.1 + 0.9 * times, times**3)
    )
    for settings, message in (
        (dict(teacher=part), 'teacher runs from t = 0.1 to 1'),
        (dict(teacher=TEACHERS[VP.path]), 'teacher runs from t = 0.999'),
        (dict(teacher=cubic, method='paper'), 'uniform grid'),
    ):
        with pytest.raises(ValueError, match=message):
            run(**settings)
    assert run(teacher=cubic).iterations == 12  # other losses use it


@pytest.mark.parametrize('member', [3, 59])  # of the training part, of the held-out one
def test_refusal_of_a_trajectory_without_numbers(member):
    field = Watched()
    teacher = changed([member], 20, float('nan'))
    with pytest.raises(ValueError, match=rf'not finite for members \[{member}\]'):
        run(field, teacher=teacher)
    assert not field.calls


# Numbers that are none
@pytest.mark.parametrize('method', ['ours', 'paper', 'times'])
def test_an_iteration_without_numbers_changes_nothing(method):
    found = run(Watched(nan_at(5)), method=method, eval_every=1, start='ab2')
    loss, rmse = (torch.tensor(found.history[k]) for k in ('loss', 'heldout_rmse'))
    assert loss.isnan().nonzero().flatten().tolist() == [5] and rmse.isfinite().all()
    still = (rmse.diff() == 0).nonzero().flatten().tolist()
    assert 5 in still and len(still) <= 2  # the last step of the cosine may be as good as none


@pytest.mark.parametrize('method', ['ours', 'paper', 'times'])
def test_a_search_without_a_single_number_ends_at_its_start(method):
    found = run(Watched(nan_at(*range(99))), method=method, start='ab2', patience=None)
    same_solver(found.solver, adams_bashforth(4, 2), 1e-9)
    assert found.iterations == 12


def test_lbfgs_survives_an_evaluation_without_numbers():
    def factor(field):
        bad = torch.is_grad_enabled() and 45 <= field.graded < 60
        return float('nan') if bad else 1

    found = run(Watched(factor), method='l-bfgs')
    assert found.solver.nodes.isfinite().all()
    assert found.solver.provenance['heldout_rmse'] < found.history['heldout_rmse'][0]
