"""Where a search starts: as told, at the nearest known solver, in closed form, after a race."""

import functools
from dataclasses import replace

import pytest
import torch
from search_cases import FIELD, run, same_search, same_solver, TEACHER, TEACHERS, TRAIN, VP, Watched

from neuralsolver.classical import adams_bashforth, euler
from neuralsolver.closed_form import fit_rows, gits
from neuralsolver.descent import Counted, Descent, SearchState, Task
from neuralsolver.losses import heldout_rmse
from neuralsolver.neural import get_solver
from neuralsolver.recipes import Recipe
from neuralsolver.solvers import sample, Solver
from neuralsolver.starts import FITTED_MARGIN, nearest, PUBLISHED, race_grids, start_candidates
from neuralsolver.store import read_card


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
