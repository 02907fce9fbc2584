"""The notebooks of searches and of the benchmark as a user runs them, with small parameters."""

import json
import shlex
import shutil
from pathlib import Path

import matplotlib.pyplot
import pandas as pd
import pytest
import torch

from neuralsolver.classical import adam2, euler
from neuralsolver.neural import load_solver
from neuralsolver.store import read_card
from neuralsolver.tools import search_runs
from neuralsolver.tools.search_runs import read_records, write_records

NBS = Path(__file__).resolve().parent.parent
SMALL = dict(
    model='fashion-mixture',
    steps=3,
    method='ours',
    options='iterations=6, batch_size=4, eval_every=2, race=0, start=ab2',
    teacher_steps=10,
    samples=12,
    heldout=4,
)
NAME = 'fashion-mixture-3_ours_s0'


def in_process(notebook, **parameters):
    "Run the code cells here, the parameters set after their cell as papermill does."
    cells = json.loads((NBS / f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    space = {'__name__': '__main__'}
    with matplotlib.rc_context({'backend': 'agg'}):
        for cell in cells:
            if cell['cell_type'] != 'code':
                continue
            exec(''.join(cell['source']), space)
            if 'parameters' in cell['metadata'].get('tags', []):
                space.update(parameters)
        matplotlib.pyplot.close('all')


def run(folder, **changes):
    in_process('search', **SMALL | dict(reports_dir=str(folder)) | changes)
    return folder / 'search'


def record(folder, name=NAME):
    return json.loads((folder / f'{name}.json').read_text())


class Interrupted(Exception):
    pass


def watch(monkeypatch, last=None):
    "Calls of the network with a gradient, `last` at most."
    load, calls = search_runs.load_model, []

    def hook(module, inputs):
        if torch.is_grad_enabled():
            if len(calls) == last:
                raise Interrupted
            calls.append(len(inputs[0]))

    def watched(*args):
        net = load(*args)
        net.register_forward_pre_hook(hook)
        return net

    monkeypatch.setattr(search_runs, 'load_model', watched)
    return calls


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with the files of one run."
    return run(tmp_path_factory.mktemp('search'))


@pytest.fixture
def nothing_computes(monkeypatch):
    monkeypatch.setattr(search_runs, 'load_model', None)  # not callable


def test_search_writes_its_files(finished):
    names = {f'{NAME}.json', f'{NAME}_solver.json', f'{NAME}_history.csv', f'{NAME}.png'}
    assert {p.name for p in finished.iterdir()} == names | {'teachers'}  # no checkpoint stays
    assert (finished / f'{NAME}.png').stat().st_size > 1000
    history, cost = (
        pd.read_csv(finished / f'{NAME}_history.csv', index_col=0),
        record(finished)['cost'],
    )
    assert history['loss'].count() == 6 and history.index.tolist() == [*range(7)]
    assert history['heldout_rmse'].dropna().index.tolist() == [0, 2, 4, 6]
    spent = history['evaluations'].dropna().astype(int)
    assert spent.iloc[-1] == sum(v for k, v in cost.items() if k != 'backward')
    # two batches of 4, 4 held-out samples, 3 steps
    assert spent.diff().dropna().tolist() == [2 * 4 * 3 + 4 * 3] * 3
    student = 6 * 4 * 3
    counted = dict(teacher=16 * 10, forward=student, backward=student, heldout=4 * 4 * 3, start=12)
    assert cost == counted  # the start is given: 12 of the identity


def test_the_solver_says_what_made_it(finished):
    found, solver = record(finished), load_solver(finished / f'{NAME}_solver.json', 3)
    assert (solver.nfe, solver.params, solver.digest) == (3, 6, found['digest'])
    expected = dict(
        searched_on='fashion-mixture',
        iterations=6,
        method='ours',
        teacher='euler-10',
        unique_samples=12,
        heldout_samples=4,
        seed=0,
        batch_size=4,
        heldout_rmse=min(found['history']['heldout_rmse']),
    )
    assert expected.items() <= solver.provenance.items()
    words = shlex.split(solver.provenance['command'])
    given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == '-p'}
    assert words[:2] == ['papermill', 'nbs/search.ipynb']
    usual = dict(guidance='1.0', seed='0', device='cpu')
    assert given == usual | {key: str(value) for key, value in SMALL.items()}


def test_a_finished_search_is_found_again(finished, nothing_computes):
    history, text = finished / f'{NAME}_history.csv', (finished / f'{NAME}.json').read_bytes()
    before = history.read_bytes()
    history.unlink()
    run(finished.parent)
    assert history.read_bytes() == before and (finished / f'{NAME}.json').read_bytes() == text


@pytest.mark.parametrize(
    'change, differ',
    [
        (dict(options=SMALL['options'] + ', lr=.01'), 'recipe.lr'),
        (dict(samples=13), 'samples'),
        (dict(method='paper', label='ours'), 'method'),
        (dict(steps='2,3', heldout=5), 'heldout'),
    ],
)
def test_refusal_of_another_search_under_its_name(finished, nothing_computes, change, differ):
    before = (finished / f'{NAME}.json').read_bytes()
    with pytest.raises(ValueError, match=f'another search .*{differ}: '):
        run(finished.parent, **change)
    assert (finished / f'{NAME}.json').read_bytes() == before


def test_resume_to_the_same_result(tmp_path, monkeypatch, finished):
    "Interrupted in the sixth iteration; the teacher is not integrated again."
    with monkeypatch.context() as m:
        watch(m, last=5 * 3)
        with pytest.raises(Interrupted):
            run(tmp_path)
    out = tmp_path / 'search'
    assert {p.name for p in out.iterdir()} == {f'{NAME}.ckpt', 'teachers'}
    assert read_card(out / f'{NAME}.ckpt')[1]['iteration'] == 4
    states = next(out.glob('teachers/*/states.npy'))
    made = states.stat().st_mtime_ns
    with pytest.raises(ValueError, match='another search .*recipe.lr'):
        run(tmp_path, options=SMALL['options'] + ', lr=.001')
    calls = watch(monkeypatch)
    run(tmp_path)
    assert len(calls) == 2 * 3 and states.stat().st_mtime_ns == made
    assert not (out / f'{NAME}.ckpt').exists()
    resumed, whole = record(out), record(finished)
    assert all(resumed[k] == whole[k] for k in ('digest', 'history', 'cost', 'iterations'))


def test_a_search_may_start_from_a_classical_solver(tmp_path):
    options = 'start=adam2, iterations=1, batch_size=4'
    out = run(tmp_path, method='paper', options=options, label='from-adam2')
    found = load_solver(out / 'fashion-mixture-3_from-adam2_s0_solver.json')
    start, made = adam2(3), found.provenance
    assert made['init'] == f'adam2 ({start.digest})'
    assert f"-p options '{options}' -p label from-adam2" in made['command']
    # one step of Lion away at most, not at Euler
    assert (found.weights - start.weights).abs().max() < 0.05
    assert (found.weights - euler(3).weights).abs().max() > 0.1


@pytest.mark.parametrize(
    'method, options, losses',
    [('least-squares', 'order=2', 0), ('non-stationary', SMALL['options'], 6)],
)
def test_histories_without_losses_or_with_negative_ones_are_drawn(
    tmp_path, method, options, losses
):
    out = run(tmp_path, method=method, steps='3,2', options=options)
    for n in (3, 2):
        name = f'fashion-mixture-{n}_{method}_s0'
        history = pd.read_csv(out / f'{name}_history.csv', index_col=0)
        assert history['loss'].count() == losses
        assert history['heldout_rmse'].count() == (4 if losses else 1)
        assert (out / f'{name}.png').stat().st_size > 1000
        assert load_solver(out / f'{name}_solver.json').nfe == n
    assert len(list(out.glob('teachers/*'))) == 1  # of both step counts


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(steps=0), 'steps=0 is not allowed: give distinct integers >= 1'),
        (dict(steps=2.5), 'steps=2.5 is not allowed'),
        (dict(steps='8,08'), 'distinct'),
        (dict(steps='8;9'), 'steps=.8;9. is not allowed'),
        (dict(model='sit-xxl'), "model='sit-xxl' is not known. Allowed: fashion-mixture"),
        (dict(method='adam'), "method='adam' is not known. Allowed: gauss-newton, ours, paper"),
        (dict(options='iterations'), 'give setting=value'),
        (dict(options='step=3'), "setting of method 'ours'='step' is not known"),
        (dict(label='a/b'), "label='a/b' is not allowed"),
        (dict(device='gpu'), "device='gpu'"),
        (dict(options='start=unipc-2'), "init='unipc-2' is in data coordinates"),
        (dict(options='batch_size=41'), 'batch_size=41'),
        (dict(options=None, samples=31), 'batch_size=32'),
        (dict(seed=-1), 'seed=-1'),
        (dict(steps='3,12'), 'teacher_steps=10'),
    ],
)
def test_refusal_before_anything_is_written(tmp_path, nothing_computes, change, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **dict(samples=40) | change)
    assert not (tmp_path / 'search').exists()


def test_benchmark_writes_its_files(tmp_path):
    small = dict(model='fashion-mixture', steps=2, batch_size=4, repeats=3, solvers='euler,rk4')
    small |= dict(imports=1, latents='1,4,8,8', samples=8)
    in_process('studies/benchmark', reports_dir=str(tmp_path), **small)
    times = pd.read_csv(tmp_path / 'benchmark.csv')
    protocol = json.loads((tmp_path / 'benchmark.json').read_text())
    variants = times.groupby('group')['variant'].nunique().to_dict()
    schedulers = {'flow scheduler': 4, 'VP scheduler': 4, 'k-diffusion': 3}
    assert variants == {'sample': 4, 'guidance': 2, 'import': 3, 'evaluation': 2} | schedulers
    assert len(times) == 3 * (4 + 2 + 4 + 4 + 3) + 3 * 2 + 3 and (times['seconds'] > 0).all()
    parts = times[times['group'] == 'evaluation']
    parts = parts.pivot(index='repeat', columns='variant', values='seconds')
    assert (parts['network'] < parts['all']).all()
    assert times[times['variant'] == 'rk4']['evaluations'].unique().tolist() == [8]
    assert protocol['nfe'] == {'euler': 2, 'rk4': 8} and protocol['hardware']
    assert protocol['versions']['torch'] == torch.__version__
    assert (tmp_path / 'benchmark.png').stat().st_size > 1000
    for change, message in (
        (dict(solvers='dit-xl-2', steps=8), 'belongs to VPPath'),
        (dict(repeats=2), 'repeats=2'),
        (dict(guidance=1), 'guidance=1'),
        (dict(latents='8x8'), 'latents='),
        (dict(samples=4), 'samples=4'),
    ):
        with pytest.raises(ValueError, match=message):
            in_process('studies/benchmark', reports_dir=str(tmp_path / 'bad'), **change)
    assert not (tmp_path / 'bad').exists()


# The study
def comparable(made, committed):
    "The rows and columns that both tables have, in one order."
    if 'model' in committed:
        there = set(zip(made.model, made.steps))
        here = [key in there for key in zip(committed.model, committed.steps)]
        committed = committed[here]
    columns = [column for column in committed if column in made]
    order = [c for c in ('model', 'steps', 'label', 'what', 'value') if c in columns]
    return [t[columns].sort_values(order, ignore_index=True) for t in (made, committed)]


def test_the_study_makes_the_committed_numbers_from_the_committed_records(tmp_path):
    reports, folder = NBS.parent / 'reports/search_study', tmp_path / 'search_study'
    folder.mkdir()
    for name in ('runs.jsonl', 'scores.jsonl'):
        shutil.copy(reports / name, folder)
    settings = dict(models='fashion-mixture', mixture_steps='8', missing='skip')
    in_process('studies/search_study', **settings, reports_dir=str(tmp_path))
    for name in ('methods', 'cheaper', 'limits', 'ablation'):
        made, committed = (pd.read_csv(f / f'{name}.csv') for f in (folder, reports))
        pd.testing.assert_frame_equal(*comparable(made, committed))
    for name in ('runs.jsonl', 'scores.jsonl'):
        assert (folder / name).read_bytes() == (reports / name).read_bytes()


TINY = dict(
    models='fashion-mixture',
    mixture_steps='4',
    mixture_seeds='0',
    paper_samples=40,
    paper_iterations=4,
    scale=0.02,
    mixture_test_samples=16,
    test_samples=16,
)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    in_process('studies/search_study', **TINY, reports_dir=str(folder))
    return folder / 'search_study'


@pytest.mark.slow
def test_the_study_compares_what_it_says(study):
    table = pd.read_csv(study / 'table.csv')
    runs = table[table.label.isin(['paper', 'ours', 'ours-short'])].set_index(['steps', 'label'])
    expected = {(4, 'paper'), (4, 'ours'), (4, 'ours-short'), (2, 'ours'), (3, 'ours')}
    assert set(runs.index) == expected
    known = {'euler', 'ab2', 'teacher', 'least-squares', 'dynamic-programming'}
    assert known <= set(table.label)
    assert table[table.label == 'teacher'].rmse.item() < 1e-5
    assert (table[table.label != 'teacher'].rmse > 0.01).all()
    row = runs.loc[(4, 'paper')]
    assert (row.calls_teacher, row.calls_forward) == (296 * 100, 4 * 32 * 4)
    assert row.work == row.calls + 2 * row.calls_backward
    cheaper = pd.read_csv(study / 'cheaper.csv').iloc[0]
    assert cheaper.ours_ratio == pytest.approx(runs.rmse[4, 'ours'] / row.rmse, rel=1e-4)
    # held-out evaluations are counted for ours only
    paid = 40 * 100 + row.calls_forward
    assert cheaper.ours_calls == pytest.approx(runs.calls[4, 'ours'] / paid, rel=1e-4)
    records = read_records(study / 'runs.jsonl')
    assert len(records) == len(list((study / 'runs').glob('*.json')))


def untimed(text):
    return pd.read_csv(text).drop(columns='seconds').astype(str).to_dict('records')


@pytest.mark.slow
def test_a_missing_run_of_the_study_is_left_out_or_made_as_asked(study):
    lost, kept = study / 'runs/fashion-mixture-3_ours_s0.json', study / 'runs.jsonl'
    before, digest = untimed(study / 'table.csv'), json.loads(lost.read_text())['digest']
    records = read_records(kept)
    assert records.pop(lost.stem) == json.loads(lost.read_text())
    lost.unlink()
    write_records(kept, records)
    in_process('studies/search_study', **TINY, reports_dir=str(study.parent), missing='skip')
    left_out = json.loads((study / 'study.json').read_text())['left_out']
    assert left_out == [lost.stem] and not lost.exists()
    in_process('studies/search_study', **TINY, reports_dir=str(study.parent))
    assert json.loads(lost.read_text())['digest'] == digest
    assert untimed(study / 'table.csv') == before


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(models='sit-xxl'), 'sit-xxl'),
        (dict(mixture_steps='1'), 'mixture_steps='),
        (dict(missing='no'), "missing='no'"),
        (dict(network_steps='5;8'), 'network_steps='),
        (dict(mixture_test_samples=100), 'mixture_test_samples=100'),
        (dict(scale=0), 'scale=0'),
    ],
)
def test_refusal_by_the_study_before_any_run(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        in_process('studies/search_study', reports_dir=str(tmp_path), **change)
    assert not (tmp_path / 'search_study').exists()


@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    "The study of seeds, two searches of a number of evaluations that has no table."
    folder = tmp_path_factory.mktemp('seeds')
    small = dict(models='fashion-mixture', steps='11', seeds='0,1', samples=12, heldout=4)
    in_process('studies/search_seeds', **small, fresh=8, choose=8, reports_dir=str(folder))
    return folder / 'search_seeds'


def test_the_study_of_seeds_ships_the_seed_that_its_own_noise_chose(seeds):
    table = pd.read_csv(seeds / 'seeds.csv').set_index('seed')
    row = pd.read_csv(seeds / 'summary.csv').iloc[0]
    shipped = load_solver(seeds / 'tables' / 'fashion-mixture-11.json')
    assert shipped.digest == table.digest[row.seed]
    assert row.new_mean == pytest.approx(table.mean_error[row.seed], rel=1e-5)
    assert row.ships == 'new' and pd.isna(row.earlier_mean)  # there was no table
    assert '-p seeds' in shipped.provenance['command']
    kept = record(seeds / 'runs', f'fashion-mixture-11_gauss-newton_s{row.seed}')
    assert kept['digest'] == shipped.digest
    calls = sum(v for k, v in kept['cost'].items() if k != 'backward')
    assert table.evaluations[row.seed] == calls


def test_the_study_of_seeds_names_a_table_by_its_guidance(tmp_path):
    small = dict(models='fashion-mixture', steps='2', seeds='0', samples=12, heldout=4)
    small |= dict(fresh=8, choose=8, guidance=2.0)
    in_process('studies/search_seeds', **small, reports_dir=str(tmp_path))
    folder = tmp_path / 'search_seeds'
    shipped = load_solver(folder / 'tables' / 'fashion-mixture-guided-2.json')
    kept = record(folder / 'runs', 'fashion-mixture-2_g2_s0')
    assert shipped.digest == kept['digest'] and shipped.provenance['guidance'] == 2
    assert shipped.provenance['command'].endswith('-p seeds 0 -p guidance 2')


@pytest.fixture(scope='module')
def guided(tmp_path_factory):
    "The study of guidance, three searches of two evaluations and one of a class."
    folder = tmp_path_factory.mktemp('guided')
    small = dict(models='fashion-mixture', steps='2', scales='1,2', samples=12, heldout=4)
    small |= dict(fresh=8, choose=8, screen='2,3,4', classes='3', class_steps=2)
    in_process('studies/guidance_tables', **small, reports_dir=str(folder))
    return folder / 'guidance_tables'


def test_the_study_of_guidance_ships_what_its_own_noise_chose(guided):
    row = pd.read_csv(guided / 'tables.csv').iloc[0]
    at = pd.read_csv(guided / 'guidance.csv').set_index(['table', 'scale'])
    choice = row.filter(like='choice: ').astype(float)
    best = choice.idxmin().removeprefix('choice: ')
    assert row.ships == ('none' if best in ('guidance 1', 'shipped') else best)
    files = list((guided / 'tables').glob('*.json'))
    assert len(files) == (row.ships != 'none')
    if files:
        solver = load_solver(files[0])
        assert (solver.name, solver.steps) == ('fashion-mixture-guided', 2)
        assert solver.digest == at.digest[row.ships, 2.0]
        expected = at.mean_error[row.ships, 2.0] / at.mean_error['guidance 1', 2.0]
        assert row.ratio == pytest.approx(expected, rel=1e-4)


def test_the_study_of_guidance_finds_its_records_again(guided):
    labels = {f.stem.split('_')[1] for f in (guided / 'runs').glob('*.json')}
    assert labels == {'gauss-newton', 'g2', 'g1-4', 'class-3'}
    ranged = record(guided / 'runs', 'fashion-mixture-2_g1-4_s0')
    assert ranged['solver']['provenance']['guidance'] == '1 to 4'
    summary = pd.read_csv(guided / 'summary.csv')
    assert (summary[summary.table == 'guidance 1'].ratio == 1).all()
    by_class = pd.read_csv(guided / 'classes.csv').iloc[0]
    expected = by_class.own_mean_error / by_class.joint_mean_error
    assert by_class['class'] == 3 and by_class.ratio == pytest.approx(expected, rel=1e-4)
