"""Runs, scores and rows of many searches: records, identities, noise, refusals."""

import json
import math
import os

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from neuralsolver.classical import adams_bashforth, euler
from neuralsolver.fields import Field
from neuralsolver.losses import heldout_rmse
from neuralsolver.recipes import METHODS
from neuralsolver.solvers import sample, Solver
from neuralsolver.store import read_card
from neuralsolver.teachers import teacher_solver, teacher_trajectories
from neuralsolver.tools import search_runs
from neuralsolver.tools.search_runs import run_search, SCORE_GROUPS, Scorer, search_pool, Row
from neuralsolver.tools.search_runs import begin_records, read_records, SearchPlan, write_records

# the exact mixture of images
SETTINGS = dict(iterations=4, batch_size=8, eval_every=2, race=2)
SMALL = dict(model='fashion-mixture', steps=3, samples=16, heldout=8, teacher_steps=10)
SMALL |= dict(method='ours', settings=SETTINGS)
IMAGE = dict(model='fashion-mixture', samples=8, teacher_steps=10)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "A folder with one finished run, and its record."
    folder = tmp_path_factory.mktemp('runs')
    record = run_search(SearchPlan(**SMALL), folder, provenance=dict(note='x'), progress=False)
    return folder, record


def test_a_record_comes_back_from_its_file(kept):
    folder, record = kept
    text = (folder / 'fashion-mixture-3_ours_s0.json').read_text()
    assert json.loads(text) == record == run_search(SearchPlan(**SMALL), folder)
    solver = Solver.from_dict(record['solver'])
    made = solver.provenance
    assert solver.digest == record['digest']
    assert (made['note'], made['searched_on'], made['guidance']) == ('x', 'fashion-mixture', 1.0)
    labelled = SearchPlan(**SMALL, label='a.b-c_1')
    assert labelled.name == 'fashion-mixture-3_a.b-c_1_s0'


def test_refusal_names_every_difference(kept, monkeypatch):
    folder, _ = kept
    other = dict(method='paper', label='ours', heldout=9, guidance=2.0, teacher_steps=11)
    with pytest.raises(ValueError, match='another search') as refused:
        run_search(SearchPlan(**SMALL | other), folder)
    for key in ('method', 'heldout', 'guidance', 'teacher_steps', 'recipe.lr'):
        assert f'{key}: ' in str(refused.value)
    monkeypatch.setattr(search_runs, 'sha256', lambda file: 'f' * 64)
    with pytest.raises(ValueError, match='weights: '):  # other weights of the model
        run_search(SearchPlan(**SMALL), folder)


def test_identity_holds_the_whole_recipe(kept, monkeypatch):
    "A default that is given is no difference; a default that changes is one."
    folder, record = kept
    same = SearchPlan(**SMALL | dict(settings=dict(lr=METHODS['ours'].lr, **SETTINGS)))
    assert same.identity == record['identity'] and run_search(same, folder) == record
    shuffled = SearchPlan(**SMALL | dict(settings=dict(reversed(SETTINGS.items()))))
    assert run_search(shuffled, folder) == record
    monkeypatch.setitem(METHODS, 'ours', replace(METHODS['ours'], lr=0.031))
    with pytest.raises(ValueError, match=r'recipe.lr: 0.03 instead of 0.031'):
        run_search(SearchPlan(**SMALL), folder)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(teacher_steps=2), 'teacher_steps=2'),
        (dict(settings=dict(batch_size=17)), 'batch_size=17'),
        (dict(settings=dict(start='heun')), 'one a step'),
        (dict(settings=dict(start='dit-xl-2')), 'dit-xl-2'),
        (dict(settings=dict(start='ab3', order=2, batch_size=8)), 'more than 2'),
        (dict(seed=-1), 'seed='),
        (dict(seed=10_000), 'seed='),  # would reach the test noise
        (dict(seed=True), 'seed='),
        (dict(seed='0'), 'seed='),
        (dict(label=''), 'label='),
    ],
)
def test_refusal_of_a_plan_when_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        SearchPlan(**SMALL | change)


def test_seeds_share_no_noise_with_each_other_or_with_the_test(tmp_path):
    judge = Scorer(**IMAGE, folder=tmp_path)
    judge.prepare()
    test = judge.plain[1]
    tiny = dict(steps=1, samples=1, heldout=1, teacher_steps=1, settings=dict(batch_size=1))
    first = []
    for seed in (0, 1, 9999):
        plan = SearchPlan(**SMALL | tiny | dict(seed=seed))
        first.append(search_runs.search_pool(plan, tmp_path, progress=False)[1].noise[0])
    everything = torch.stack([*first, *test]).flatten(1)
    assert torch.cdist(everything, everything).fill_diagonal_(99).min() > 10
    assert torch.equal(judge.guided[1], test)


def test_a_search_with_an_iteration_without_numbers_is_recorded(tmp_path, monkeypatch):
    calls = []

    def spoil(module, inputs, out):
        calls.append(torch.is_grad_enabled())
        return out * math.nan if calls[-1] and sum(calls) == 5 else out

    def load(*args):
        net = load_model(*args)
        net.register_forward_hook(spoil)
        return net

    load_model = search_runs.load_model
    monkeypatch.setattr(search_runs, 'load_model', load)
    plan = SearchPlan(**SMALL | dict(settings=SETTINGS | dict(start='euler')))
    losses = run_search(plan, tmp_path, progress=False)['history']['loss']
    assert len(losses) == 4 and losses.count(None) == 1


CHILDREN = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from search_cases import run, Watched
from test_search_runs import run_search, search_runs, SearchPlan, SMALL
def fork(work):
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)
def die(field):
    if field.graded == 4 * 10 + 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1
child = fork(lambda: run(Watched(die), checkpoint=f'{sys.argv[2]}/killed/c'))
assert os.waitpid(child, 0)[1] == signal.SIGKILL
both = sys.argv[2] + '/both'
search_runs.search_pool(SearchPlan(**SMALL), both + '/teachers', progress=False)
pair = [fork(lambda: run_search(SearchPlan(**SMALL), both, progress=False)) for _ in range(2)]
assert [os.waitpid(child, 0)[1] for child in pair] == [0, 0]
"""


@pytest.mark.slow
def test_processes_that_are_killed_or_work_at_once_leave_whole_files(tmp_path, kept):
    command = [sys.executable, '-c', CHILDREN, os.path.dirname(__file__), str(tmp_path)]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in (tmp_path / 'killed').iterdir()] == ['c']
    assert read_card(tmp_path / 'killed/c')[1]['iteration'] == 8
    names = {p.name for p in (tmp_path / 'both').iterdir()}
    assert names == {'fashion-mixture-3_ours_s0.json', 'teachers'}
    both = run_search(SearchPlan(**SMALL), tmp_path / 'both')
    assert both['cost'] == kept[1]['cost']
    assert both['solver']['nodes'] == pytest.approx(kept[1]['solver']['nodes'], abs=1e-6)


# Scores
@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    return Scorer(**IMAGE | dict(samples=9, guided_samples=8), folder=tmp_path_factory.mktemp('s'))


def test_scores_do_not_depend_on_the_batch_size(judge, tmp_path):
    solver = adams_bashforth(3, 2)
    same = IMAGE | dict(samples=9, guided_samples=8)
    a = judge.score(solver)
    b = Scorer(**same, folder=tmp_path, batch_size=3).score(solver)
    # A Frechet distance (127 here) is of rounded pixels, of which one may fall to the other side.
    # Other CPUs pick other kernels by batch size, and a teacher of ten steps enlarges rounding.
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=0, abs=0.1 if key == 'fd' else 1e-4)


def test_the_teacher_has_no_distance_to_itself_with_guidance_either(judge):
    score = judge.score(teacher_solver(10))
    assert score['rmse'] == [0.0] * SCORE_GROUPS == score['rmse_guided']
    assert min(score['rmse_exact']) > 1e-3


def test_the_groups_make_up_the_whole(judge):
    "Every distance against sampling by hand; 9 samples are groups of 3, 2, 2 and 2."
    score = judge.score(euler(3))
    assert [len(v) for v in judge.plain[1:]] == [9, 9]
    assert [len(v) for v in judge.guided[1:]] == [8, 8]
    field, noise, labels = judge.plain
    T = teacher_trajectories(field, noise, labels, 10, progress=False)
    gap = sample(field, noise, euler(3), labels) - T.ends
    square = gap.square().flatten(1).mean(1)
    bounds = ((0, 3), (3, 5), (5, 7), (7, 9))
    expected = [square[a:b].mean().sqrt().item() for a, b in bounds]
    assert score['rmse'] == pytest.approx(expected, rel=0, abs=1e-6)
    assert score['median'] == pytest.approx(square.sqrt().median().item(), rel=1e-5)
    field, noise, labels = judge.guided
    T = teacher_trajectories(field, noise, labels, 10, progress=False)
    whole = heldout_rmse(field, euler(3), noise, labels, T.ends)
    mean = sum(v * v for v in score['rmse_guided']) / SCORE_GROUPS
    assert mean == pytest.approx(whole**2, rel=1e-5)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(samples=7), 'samples=7'),
        (dict(guided_samples=7), 'guided_samples=7'),
        (dict(guided_samples=9), 'guided_samples=9'),
        (dict(guidance=-1), 'guidance=-1'),
        (dict(teacher_steps=0), 'teacher_steps=0'),
        (dict(batch_size=0), 'batch_size=0'),
    ],
)
def test_refusal_of_a_scorer(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Scorer(**IMAGE | change, folder=tmp_path)


def test_scores_lie_in_a_folder_of_their_protocol_and_are_found_there(tmp_path):
    judge = Scorer(**IMAGE, folder=tmp_path)
    score = judge.score(euler(2))
    file = tmp_path / judge.key / f'{euler(2).digest}.json'
    assert judge.key.startswith('fashion-mixture_n8-8_g2_L10_')
    assert json.loads(file.read_text()) == score
    assert list(tmp_path.rglob('*.json')) == [file]
    again = Scorer(**IMAGE, folder=tmp_path)
    assert again.score(euler(2)) == score and again.ready is None  # nothing was prepared
    changes = (
        dict(samples=12),
        dict(guidance=3.0),
        dict(teacher_steps=11),
        dict(samples=12, guided_samples=8),
    )
    keys = {Scorer(**IMAGE | change, folder=tmp_path).key for change in ({}, *changes)}
    assert len(keys) == 5  # other protocols are kept apart


# Rows
@pytest.mark.parametrize('guidance, calls', [(1.0, 1), (2.0, 2)])
def test_a_row_counts_the_calls_of_the_network(guidance, calls):
    "A guided evaluation is two calls; a gradient costs two more of an evaluation that was made."
    cost = dict(teacher=100, start=20, forward=30, backward=30, heldout=7)
    record = dict(
        identity=dict(model='m', steps=3, method='ours', seed=0, guidance=guidance, samples=16),
        label='l',
        iterations=4,
        seconds=[1.0, 2.0],
        digest='d',
        cost=cost,
        solver=dict(params=6, provenance=dict(init='ab2 (123)')),
    )
    score = dict(rmse=[3.0, 4.0, 0.0, 0.0], median=0.5, fd=7.0)
    row = Row.from_search(record, score).as_dict()
    assert {k: row[f'calls_{k}'] for k in cost} == {k: calls * v for k, v in cost.items()}
    assert (row['calls'], row['work']) == (calls * 157, calls * (157 + 2 * 30))
    assert (row['start'], row['seconds'], row['median'], row['fd']) == ('ab2', 2.0, 0.5, 7.0)
    spread = torch.tensor(score['rmse']).std().item()
    assert row['rmse'] == 2.5 and row['rmse_sd'] == pytest.approx(spread, rel=1e-6)
    assert 'fd_sd' not in row


def test_a_search_over_a_range_of_guidance_scales(tmp_path):
    "Its samples have scales of their own; its record says so and is found again."
    plan = SearchPlan(**SMALL, guidance_to=4.0)
    field, teacher = search_pool(plan, tmp_path / 'teachers', progress=False)
    labels, scales = teacher.cond.unbind(1)
    assert (labels == torch.arange(24) % 10).all()
    assert scales.min() == 1 and 3.5 < scales.max() < 4 and len(set(scales.tolist())) == 24
    for i in (0, 5, 23):
        one = Field(field.net, guidance=scales[i].item())
        end = sample(one, teacher.noise[i : i + 1], teacher.solver, labels[i : i + 1].long())
        assert torch.allclose(end, teacher.ends[i : i + 1], atol=1e-4)
    record = run_search(plan, tmp_path, progress=False)
    assert record['solver']['provenance']['guidance'] == '1 to 4'
    row = Row.from_search(record, dict(nfe=3)).as_dict()
    assert row['guidance'] == '1 to 4'
    evaluations = sum(v for k, v in record['cost'].items() if k != 'backward')
    assert row['calls'] == 2 * evaluations
    with pytest.raises(ValueError, match='guidance_to'):
        run_search(SearchPlan(**SMALL), tmp_path, progress=False)
    assert run_search(plan, tmp_path, progress=False) == record


def test_a_search_on_one_class(tmp_path):
    plan = SearchPlan(**SMALL, only_class=3)
    _, teacher = search_pool(plan, tmp_path, progress=False)
    assert (teacher.cond == 3).all()
    _, joint = search_pool(SearchPlan(**SMALL), tmp_path, progress=False)
    assert torch.equal(joint.noise, teacher.noise) and not torch.equal(joint.ends, teacher.ends)
    assert run_search(plan, tmp_path, progress=False)['solver']['provenance']['only_class'] == 3
    with pytest.raises(ValueError, match='only_class='):
        SearchPlan(**SMALL, only_class=-1)


def test_a_study_begins_with_committed_records_of_the_same_searches(tmp_path, monkeypatch):
    plans = [
        SearchPlan('fashion-mixture', 2, seed=seed, samples=8, heldout=4) for seed in (0, 1, 2)
    ]
    same, other = (dict(identity=p.identity, digest=p.name) for p in plans[:2])
    other['identity'] = replace(plans[1], samples=16).identity
    (tmp_path / 'search_study').mkdir()
    write_records(tmp_path / 'search_study/runs.jsonl', {plans[0].name: same, plans[1].name: other})
    monkeypatch.setattr(search_runs, 'reports_root', lambda: tmp_path)
    own = {plans[2].name: dict(identity=plans[2].identity, digest='own')}
    write_records(tmp_path / 'runs.jsonl', own)
    begin_records(tmp_path / 'runs', plans)
    found = read_records(tmp_path / 'runs.jsonl')
    assert {name: r['digest'] for name, r in found.items()} == {
        plans[0].name: plans[0].name,
        plans[2].name: 'own',
    }
