"search.ipynb and benchmark.ipynb as a user runs them, with small parameters."

import json, os, shlex, subprocess, sys
from pathlib import Path
import matplotlib.pyplot, pandas as pd, pytest, torch
from neuralsolver.neural import load_solver
from neuralsolver.solver_search import _Run
from neuralsolver.classical import adam2, euler
from neuralsolver.tools.search_runs import read_records, write_records

NBS = Path(__file__).resolve().parent.parent
SMALL = dict(
    model='fashion-mixture',
    steps=3,
    options='iterations=6, batch_size=4, eval_every=2, race=0',
    teacher_steps=10,
    samples=12,
    heldout=4,
)


def papermill(notebook, output, **parameters):
    options = [word for key, value in parameters.items() for word in ('-p', key, str(value))]
    command = [
        sys.executable,
        '-m',
        'papermill',
        NBS / f'{notebook}.ipynb',
        output / f'{notebook}.ipynb',
        '--log-level',
        'ERROR',
        *options,
    ]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )


def in_process(notebook, **parameters):
    "Run the code cells here, the parameters set after their cell as papermill does: papermill itself is slow to start."
    nb, space = (
        json.loads((NBS / f'{notebook}.ipynb').read_text(encoding='utf-8')),
        {'__name__': '__main__'},
    )
    with matplotlib.rc_context({'backend': 'agg'}):
        for cell in nb['cells']:
            if cell['cell_type'] != 'code':
                continue
            exec(''.join(cell['source']), space)
            if 'parameters' in cell['metadata'].get('tags', []):
                space.update(parameters)
        matplotlib.pyplot.close('all')


def record(folder, name='fashion-mixture-3_ours_s0'):
    return json.loads((folder / 'search' / f'{name}.json').read_text())


def same(a, b):
    return all(a[k] == b[k] for k in ('digest', 'history', 'cost', 'iterations'))


class Killed(Exception):
    pass


def count_steps(monkeypatch, last=None):
    "The iterations that are done, and a death before iteration `last` + 1."
    step, done = _Run.step, []

    def counted(self):
        if self.iteration == last:
            raise Killed
        done.append(self.iteration)
        step(self)

    monkeypatch.setattr(_Run, 'step', counted)
    return done


def test_search_writes_its_files_and_finds_them_again(tmp_path, monkeypatch):
    "By papermill; a second run computes nothing, a run with other settings is refused before it computes anything."
    run = papermill('search', tmp_path, reports_dir=tmp_path, **SMALL)
    assert run.returncode == 0, run.stderr[-2000:]
    out, name = tmp_path / 'search', 'fashion-mixture-3_ours_s0'
    found = record(tmp_path)
    assert {p.name for p in out.iterdir()} == {
        f'{name}.json',
        f'{name}_solver.json',
        f'{name}_history.csv',
        f'{name}.png',
        'teachers',
    }  # no checkpoint and no temporary file stays behind
    history = pd.read_csv(out / f'{name}_history.csv', index_col=0)
    assert (
        history['loss'].count() == 6
        and history.index.tolist() == [*range(7)]
        and history['heldout_rmse'].dropna().index.tolist() == [0, 2, 4, 6]
    )
    spent = history['evaluations'].dropna().astype(int)
    cost = found['cost']
    assert (
        spent.iloc[-1] == sum(v for k, v in cost.items() if k != 'backward')
        and spent.diff().dropna().tolist() == [2 * 4 * 3 + 4 * 3] * 3
    )  # two batches of 4, 4 held-out noises, 3 steps
    assert (cost['teacher'], cost['forward'], cost['backward'], cost['heldout']) == (
        16 * 10,
        6 * 4 * 3,
        6 * 4 * 3,
        4 * 4 * 3,
    ) and cost['start'] > 0
    solver = load_solver(out / f'{name}_solver.json', 3)
    p = solver.provenance
    assert (
        solver.nfe,
        solver.params,
        solver.digest,
        p['searched_on'],
        p['iterations'],
        p['method'],
    ) == (3, 6, found['digest'], 'fashion-mixture', 6, 'ours')
    assert (
        p['teacher'],
        p['unique_samples'],
        p['heldout_samples'],
        p['seed'],
        p['batch_size'],
        p['heldout_rmse'],
    ) == ('euler-10', 12, 4, 0, 4, min(found['history']['heldout_rmse']))
    assert (out / f'{name}.png').stat().st_size > 1000

    words = shlex.split(p['command'])
    given = {
        words[i + 1]: words[i + 2] for i, w in enumerate(words) if w == '-p'
    }  # the command says what was given, and gives it again
    assert words[:2] == ['papermill', 'nbs/search.ipynb'] and given == dict(
        model='fashion-mixture',
        steps='3',
        method='ours',
        samples='12',
        heldout='4',
        guidance='1.0',
        teacher_steps='10',
        seed='0',
        options=SMALL['options'],
        device='cpu',
    )

    text, done = (out / f'{name}.json').read_bytes(), count_steps(monkeypatch)
    monkeypatch.setattr(
        'neuralsolver.tools.search_runs.load_model', None
    )  # not callable: nothing is computed
    (out / f'{name}_history.csv').unlink()
    in_process('search', reports_dir=str(tmp_path), **SMALL)
    assert (
        pd.read_csv(out / f'{name}_history.csv', index_col=0).equals(history)
        and (out / f'{name}.json').read_bytes() == text
        and not done
    )
    for change, differ in (
        (dict(options=SMALL['options'] + ', lr=.01'), 'recipe'),
        (dict(samples=13), 'samples'),
        (dict(guidance=2.0), 'guidance'),
        (dict(method='paper', label='ours'), 'method, recipe'),
        (dict(steps='2,3', heldout=5), 'heldout'),
    ):
        with pytest.raises(ValueError, match=rf'belongs to another search \({differ} differ\)'):
            in_process('search', reports_dir=str(tmp_path), **SMALL | change)
    assert (out / f'{name}.json').read_bytes() == text and not done


@pytest.mark.parametrize(
    'method, options', [('ours', SMALL['options']), ('paper', SMALL['options'] + ', patience=None')]
)
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, monkeypatch, method, options):
    settings, name = (
        SMALL | dict(method=method, options=options, label='try', teacher_steps=11),
        'fashion-mixture-3_try_s0',
    )
    in_process('search', reports_dir=str(tmp_path / 'whole'), **settings)
    with monkeypatch.context() as m:
        count_steps(m, last=5)
        with pytest.raises(Killed):
            in_process('search', reports_dir=str(tmp_path / 'killed'), **settings)
    out = tmp_path / 'killed/search'
    checkpoint = out / f'{name}.ckpt'
    assert {p.name for p in out.iterdir()} == {f'{name}.ckpt', 'teachers'} and torch.load(
        checkpoint, weights_only=True
    )['iteration'] == 4
    states = next(out.glob('teachers/*/states.npy'))
    made = states.stat().st_mtime_ns
    with pytest.raises(ValueError, match='other settings'):
        in_process(
            'search',
            reports_dir=str(tmp_path / 'killed'),
            **settings | dict(options=options + ', lr=.001'),
        )
    done = count_steps(monkeypatch)
    in_process('search', reports_dir=str(tmp_path / 'killed'), **settings)
    assert done == [4, 5] and states.stat().st_mtime_ns == made and not checkpoint.exists()
    assert same(record(tmp_path / 'killed', name), record(tmp_path / 'whole', name))


def test_a_search_may_start_from_a_classical_solver(tmp_path):
    in_process(
        'search',
        reports_dir=str(tmp_path),
        **SMALL
        | dict(
            method='paper', options='start=adam2, iterations=1, batch_size=4', label='from-adam2'
        ),
    )
    found = load_solver(tmp_path / 'search' / 'fashion-mixture-3_from-adam2_s0_solver.json')
    start = adam2(3)
    assert (
        found.provenance['init'] == f'adam2 ({start.digest})'
        and "-p options 'start=adam2, iterations=1, batch_size=4' -p label from-adam2"
        in found.provenance['command']
    )
    assert (
        found.weights - start.weights
    ).abs().max() < 0.05  # one step of Lion away at most, not at Euler
    assert (found.weights - euler(3).weights).abs().max() > 0.1


@pytest.mark.parametrize(
    'method', ['dynamic-programming', 'least-squares', 'non-stationary']
)  # no losses, no losses, losses below 0
def test_every_kind_of_history_is_drawn(tmp_path, method):
    in_process(
        'search',
        reports_dir=str(tmp_path),
        **SMALL
        | dict(
            method=method,
            steps='3,2',
            options=SMALL['options'] if method == 'non-stationary' else 'order=2',
        ),
    )
    for n in (3, 2):
        name = f'fashion-mixture-{n}_{method}_s0'
        history = pd.read_csv(tmp_path / f'search/{name}_history.csv', index_col=0)
        assert (history['loss'].count(), history['heldout_rmse'].count()) == (
            (6, 4) if method == 'non-stationary' else (0, 1)
        )
        assert (tmp_path / f'search/{name}.png').stat().st_size > 1000 and load_solver(
            tmp_path / f'search/{name}_solver.json'
        ).nfe == n
    assert len(list(tmp_path.glob('search/teachers/*'))) == 1  # of both step counts


def test_a_bad_value_ends_papermill_with_an_error(tmp_path):
    run = papermill('search', tmp_path, reports_dir=tmp_path, **SMALL | {'steps': 0})
    assert (
        run.returncode != 0
        and 'ValueError: steps=0 is not allowed: give integers >= 1' in run.stderr
    )
    assert not (tmp_path / 'search').exists()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(steps=2.5), 'steps=2.5 is not allowed: give integers >= 1'),
        (dict(steps='8,8'), 'distinct'),
        (dict(steps='8,08'), 'distinct'),
        (dict(steps='8;9'), 'steps=.8;9. is not allowed'),
        (dict(model='sit-xxl'), "model='sit-xxl' is not known. Allowed: fashion-mixture"),
        (dict(options='iterations=0'), 'iterations=0'),
        (dict(method='adam'), "method='adam' is not known. Allowed: ours, paper"),
        (dict(options='iterations'), 'give setting=value'),
        (dict(options='step=3'), "setting of method 'ours'='step' is not known"),
        (dict(method='least-squares', options='lr=.1'), "setting of method 'least-squares'"),
        (dict(label='a/b'), "label='a/b' is not allowed"),
        (dict(device='gpu'), "device='gpu'"),
        (dict(options='start=unipc-2'), "solver='unipc-2' is not known. Allowed: euler"),
        (dict(options='start=heun'), 'one a step'),
        (dict(options='start=ab3, order=2'), 'uses more than 2 evaluations'),
        (dict(method='least-squares', options='start=heun'), 'one a step'),
        (dict(options='batch_size=41'), 'batch_size=41'),
        (dict(options='', samples=31), 'batch_size=32'),
        (dict(seed=-1), 'seed=-1'),
        (dict(heldout=0), 'heldout=0'),
        (dict(samples=0), 'samples=0'),
        (dict(teacher_steps=0), 'teacher_steps=0'),
        (dict(steps='3,12'), 'teacher_steps=10'),
        (dict(guidance=-1.0), 'guidance=-1.0'),
        (dict(options='lr=-.01'), 'lr=-0.01'),
    ],
)
def test_search_refuses_bad_values_before_it_writes(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(
        'neuralsolver.tools.search_runs.load_model', None
    )  # not callable: nothing is computed
    with pytest.raises(ValueError, match=message):
        in_process('search', reports_dir=str(tmp_path), **SMALL | dict(samples=40) | change)
    assert not (tmp_path / 'search').exists()


def test_benchmark_writes_its_files(tmp_path):
    small = dict(
        model='fashion-mixture',
        steps=2,
        batch_size=4,
        repeats=3,
        solvers='euler,rk4',
        imports=1,
        latents='1,4,8,8',
        samples=8,
    )
    in_process('studies/benchmark', reports_dir=str(tmp_path), **small)
    times, protocol = (
        pd.read_csv(tmp_path / 'benchmark.csv'),
        json.loads((tmp_path / 'benchmark.json').read_text()),
    )
    assert times.groupby('group')['variant'].nunique().to_dict() == {
        'sample': 4,
        'guidance': 2,
        'import': 3,
        'evaluation': 2,
        'flow scheduler': 4,
        'VP scheduler': 4,
    }
    assert len(times) == 3 * (4 + 2 + 4 + 4) + 3 * 2 + 3 and (times['seconds'] > 0).all()
    whole = times[times['group'] == 'evaluation'].pivot(
        index='repeat', columns='variant', values='seconds'
    )
    assert (whole['network'] < whole['all']).all()
    assert times[times['variant'] == 'rk4']['evaluations'].unique().tolist() == [8]
    assert protocol['nfe'] == {'euler': 2, 'rk4': 8} and protocol['hardware']
    assert protocol['versions']['torch'] == torch.__version__
    assert (tmp_path / 'benchmark.png').stat().st_size > 1000
    bad = (
        (dict(solvers='dit-xl-2', steps=8), 'belongs to VPPath'),
        (dict(repeats=2), 'repeats=2'),
        (dict(guidance=1), 'guidance=1'),
        (dict(latents='8x8'), 'latents='),
        (dict(samples=4), 'samples=4'),
    )
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            in_process('studies/benchmark', reports_dir=str(tmp_path / 'bad'), **change)
    assert not (tmp_path / 'bad').exists()


def test_search_study_runs_and_is_found_again(tmp_path):
    "A tiny study; what has a file is not run again, and a missing one is left out or made, as asked."
    tiny = dict(
        models='fashion-mixture',
        mixture_steps='4',
        mixture_seeds='0',
        paper_samples=40,
        paper_iterations=4,
        scale=0.02,
        mixture_test_samples=16,
        test_samples=16,
        reports_dir=str(tmp_path),
    )
    in_process('studies/search_study', **tiny)
    out = tmp_path / 'search_study'
    first = {p.name: p.read_bytes() for p in out.glob('*.csv')}
    table = pd.read_csv(out / 'table.csv')
    runs = table[table.label.isin(['paper', 'ours', 'ours-short'])].set_index(['steps', 'label'])
    assert {(4, 'paper'), (4, 'ours'), (4, 'ours-short'), (2, 'ours'), (3, 'ours')} == set(
        runs.index
    ) and {'euler', 'ab2', 'teacher', 'least-squares', 'dynamic-programming'} <= set(table.label)
    assert (
        table[table.label == 'teacher'].rmse.item() < 1e-5
        and (table[table.label != 'teacher'].rmse > 0.01).all()
    )
    row = runs.loc[(4, 'paper')]
    assert (row.calls_teacher, row.calls_forward, row.work) == (
        296 * 100,
        4 * 32 * 4,
        row.calls + 2 * row.calls_backward,
    )
    cheaper = pd.read_csv(out / 'cheaper.csv').iloc[0]
    assert cheaper.ours_ratio == pytest.approx(runs.rmse[4, 'ours'] / row.rmse, rel=1e-4)
    assert cheaper.ours_calls == pytest.approx(
        runs.calls[4, 'ours'] / (40 * 100 + row.calls_forward), rel=1e-4
    )  # held-out evaluations counted for ours only
    dropped, table_file = out / 'runs' / 'fashion-mixture-3_ours_s0.json', out / 'runs.jsonl'
    kept, records = dropped.read_bytes(), read_records(table_file)
    assert records[dropped.stem] == json.loads(kept)
    assert len(records) == len(list((out / 'runs').glob('*.json')))
    dropped.unlink()
    del records[dropped.stem]
    write_records(table_file, records)
    in_process('studies/search_study', **tiny, missing='skip')
    assert not dropped.exists() and json.loads((out / 'study.json').read_text())['left_out'] == [
        'fashion-mixture-3_ours_s0'
    ]
    in_process('studies/search_study', **tiny)
    again = {p.name: p.read_bytes() for p in out.glob('*.csv')}
    same = lambda text: [
        {k: v for k, v in r.items() if k != 'seconds'}
        for r in pd.read_csv(text).astype(str).to_dict('records')
    ]
    assert (
        json.loads(dropped.read_text())['digest'] == json.loads(kept)['digest']
        and same(out / 'table.csv')
        == [
            {k: v for k, v in r.items() if k != 'seconds'}
            for r in table.astype(str).to_dict('records')
        ]
        and first.keys() == again.keys()
    )


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
def test_bad_values_of_the_study_are_refused_before_any_run(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        in_process('studies/search_study', reports_dir=str(tmp_path), **change)
    assert not (tmp_path / 'search_study').exists()
