"The manifest, what runs when, the page; curves; and that numbers shown are numbers in files."

import json, re
from pathlib import Path
import pandas as pd, papermill, pytest
from neuralsolver.curves import curve_rows, evaluate_curve, write_curve
from neuralsolver.evaluate import evaluate
from neuralsolver.protocol import Protocol
from neuralsolver.tools.reproduce import identity, reproduce, why_run
from neuralsolver.tools.manifest import read_items, Run, runs_of
from neuralsolver.tools.results_page import reported_table

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / 'reports'
ITEMS = read_items()
RUNS = runs_of(ITEMS, 'embedded', ITEMS)
TOY = Run(
    'studies/complexity',
    (('steps', '4'),),
    ('complexity.md', 'complexity.csv', 'complexity.json'),
    (),
    1,
)


def execute(notebook, tmp_path, **parameters):
    papermill.execute_notebook(
        ROOT / f'nbs/{notebook}.ipynb',
        tmp_path / f'{notebook}.ipynb',
        parameters,
        progress_bar=False,
        cwd=ROOT / 'nbs',
    )
    return json.loads((tmp_path / f'{notebook}.ipynb').read_text())


# the manifest
def test_every_figure_and_table_of_the_paper_is_an_item():
    names = ' '.join(ITEMS['item'])
    for n in (
        'method',
        'figure-1',
        'figure-2',
        'figure-3a',
        'figure-3b',
        'figure-4',
        'figure-5',
        'figure-6',
        *(f'table-{k}' for k in range(1, 8)),
        *(f'appendix-{c}' for c in 'bcdj'),
    ):
        assert re.search(rf'\b{n}\b', names), n
    assert set(ITEMS[ITEMS['item'].isin(['table-6', 'table-7'])].status) == {'not reproducible'}


@pytest.mark.parametrize('profile', ['embedded', 'paper'])
def test_notebooks_of_the_manifest_take_its_parameters(profile):
    "papermill warns of unknown parameters only when it is too late."
    for run in set(runs_of(ITEMS, profile, ITEMS).values()):
        file = ROOT / f'nbs/{run.notebook}.ipynb'
        known = papermill.inspect_notebook(file)
        assert known and {k for k, _ in run.parameters} | {'reports_dir'} <= set(known), run.command


def test_committed_results_are_those_of_the_manifest():
    gone = [o for run in set(RUNS.values()) for o in run.outputs if not (REPORTS / o).is_file()]
    assert not gone, f'papermill nbs/reproduce.ipynb makes them: {gone}'
    assert (REPORTS / 'index.md').is_file() and (REPORTS / 'index.html').is_file()


def test_every_reported_number_stands_on_the_page():
    text = (REPORTS / 'index.md').read_text()
    values = pd.read_csv(ROOT / 'data/reported.csv', dtype=str)
    for i, v in values.iterrows():
        if v['where'] == 'figure 4/6' and v.model == 'SiT-XL/2-R256' and v.metric == 'FID':
            assert re.search(rf'(\| |: ){float(v.value):g}\b', text), v.to_dict()
    for where in (
        'table 1',
        'table 2',
        'table 3',
        'table 4',
        'table 5',
        'figure 3a',
        'figure 3b',
        'appendix C',
        'table 6',
        'table 7',
        'tools mse',
        'figure 4/6|FlowDCN-XL/2-R512|FID',
        'figure 4/6|FlowDCN-XL/2-R512|sFID,IS,Precision,Recall',
    ):
        assert reported_table(where) in text, where


# what is measured has a protocol and a spread; what is reported is what the paper reports
CURVES = sorted(REPORTS.glob('curves_*.csv'))


@pytest.mark.parametrize(
    'file', [*CURVES, *sorted(REPORTS.glob('eval_*_8.csv'))], ids=lambda p: p.stem
)
def test_measured_has_protocol_and_spread(file):
    table, card = pd.read_csv(file), json.loads(file.with_suffix('.json').read_text())
    for m in ('rmse', 'fd', 'is', 'kid', 'precision', 'recall', 'accuracy'):
        assert table.loc[table[m].notna(), f'{m}_sd'].notna().all(), m
    assert (
        len(card['counts']) >= 3
        and len(card['identity']['weights']) == 64
        and card['versions']['torch']
        and set(card['metrics']) >= {'extractor', 'n_real_fd'}
    )
    assert len(card['solvers']) == (
        table.solver.nunique() - 2 if 'steps' not in card else len(table) - 2
    )


NAMES = {
    'adam2': 'Adam2',
    'adam4': 'Adam4',
    'heun': 'Heun',
    'flowdcn-b-2': 'Searched',
    'sit-xl-2': 'Searched on SiT-XL/2',
    'teacher': 'Euler',
    'dpm-solver++3m@log-snr': 'DPM-Solver++ uniform-λ',
    'dpm-solver++3m@time': 'DPM-Solver++ uniform-t',
    'dpm-solver++3m@optimized': 'DPM-Solver++ uniform-t-opt',
    'unipc-3@log-snr': 'UniPC uniform-λ',
    'unipc-3@time': 'UniPC uniform-t',
    'unipc-3@optimized': 'UniPC uniform-t-opt',
    'dit-xl-2': 'Searched-Solver',
}


@pytest.mark.parametrize('file', CURVES, ids=lambda p: p.stem)
def test_reported_is_what_the_paper_reports(file):
    "Looked up here by other means than the package's."
    table = pd.read_csv(file)
    source = {}
    with open(ROOT / 'data/reported.csv') as f:
        for line in f.read().splitlines()[1:]:
            w = line.split(',')
            source[w[1], w[2], w[3], w[4]] = float(w[5])
    stand_in = {
        'sit-tiny': 'SiT-XL/2-R256',
        'flowdcn-tiny': 'FlowDCN-XL/2-R256',
        'dit-tiny': 'DiT-XL/2-R256',
    }[table.model.iloc[0]]
    found = 0
    for r in table.to_dict('records'):
        for m, name in (
            ('fid', 'FID'),
            ('sfid', 'sFID'),
            ('is', 'IS'),
            ('precision', 'Precision'),
            ('recall', 'Recall'),
        )[
            : 1 if 'table_1' in file.name else 5
        ]:  # table 1 has other IS, precision and recall than figure 6
            steps = (
                '50'
                if r['solver'] == 'teacher'
                else ''
                if pd.isna(r['steps'])
                else f'{r["steps"]:.0f}'
            )
            known = source.get((stand_in, NAMES.get(r['solver']), steps, name))
            mine = r.get(f'reported_{m}')
            assert (known is None and pd.isna(mine)) or known == mine, (r['solver'], steps, m)
            found += known is not None
    assert found > 5


# curves
TINY = dict(model='fashion-mixture', samples=24, seeds='0,1,2', teacher_steps=12, batch_size=8)


def test_a_curve_is_the_tables_of_its_steps(tmp_path):
    protocols = [
        Protocol(steps=n, solvers=','.join(names), **TINY)
        for n, names in curve_rows('3,5', 'euler,adam2', 'heun:2', 'fashion-mixture').items()
    ]
    table = evaluate_curve(protocols, False, tmp_path / 'shards')
    write_curve(protocols, table, tmp_path / 'c', tmp_path / 'shards')
    assert list(zip(table.solver, table.steps.fillna(0))) == [
        ('heun', 2),
        ('euler', 3),
        ('euler', 5),
        ('adam2', 3),
        ('adam2', 5),
        ('teacher', 12),
        ('real', 0),
    ]
    for p in protocols:
        alone = evaluate(p, False)[0].set_index('solver')
        for r in table[table.steps == p.steps].itertuples():
            assert r.rmse == pytest.approx(
                alone.rmse[r.solver], abs=1e-6
            ) and r.fd == pytest.approx(alone.fd[r.solver], rel=1e-4)
    text = (tmp_path / 'c.md').read_text()
    assert '| heun | ' in text and 'heun spends 4 evaluations in 2 steps' in text and '± ' in text


def test_protocols_of_a_curve_agree():
    with pytest.raises(ValueError, match='differ in samples'):
        evaluate_curve([Protocol(**TINY), Protocol(**TINY | dict(samples=48))], False)


def test_curves_notebook(tmp_path):
    execute(
        'curves',
        tmp_path,
        **{k: v for k, v in TINY.items()},
        steps='2,3',
        solvers='euler,adam2',
        rows='heun:2',
        name='toy',
        reports_dir=str(tmp_path / 'r'),
    )
    for suffix in ('.md', '.csv', '.json', '.png', '_metrics.png'):
        assert (tmp_path / f'r/curves_toy{suffix}').stat().st_size > 200
    with pytest.raises(Exception, match='is not NAME:STEPS'):
        execute('curves', tmp_path, rows='heun', reports_dir=str(tmp_path / 'r'))


# running
def test_a_run_is_made_once_and_again_when_what_it_rests_on_changes(tmp_path, monkeypatch):
    assert why_run(TOY, tmp_path) == 'not run yet'
    assert (
        reproduce({'a': TOY, 'b': TOY}, tmp_path, 2, progress=False).popitem()[1].startswith('made')
        and why_run(TOY, tmp_path) == ''
    )
    (tmp_path / 'complexity.csv').write_text('by hand')
    assert why_run(TOY, tmp_path) == 'complexity.csv is missing or was changed'
    reproduce({'a': TOY}, tmp_path, 1, progress=False)
    assert why_run(TOY, tmp_path) == ''
    import neuralsolver.tools.reproduce as r

    now = r.provenance() | dict(data='other')
    monkeypatch.setattr(r, 'provenance', lambda: now)
    assert why_run(TOY, tmp_path) == 'data changed'
    assert identity(TOY, tmp_path)['data'] == 'other'


def test_a_run_waits_for_what_it_reads(tmp_path):
    "And is told of when that changed under it: this one writes what it reads."
    second = Run('studies/complexity', (('steps', '5'),), (), ('complexity.cs*',), 1)
    said = reproduce({'late': second, 'early': TOY}, tmp_path, 2, progress=False)
    assert (
        list(said) == [TOY.name, second.name]
        and 'changed while it ran' in said[second.name]
        and why_run(second, tmp_path) == 'failed before'
    )


def test_a_run_is_made_again_when_what_it_reads_changes(tmp_path):
    (tmp_path / 'other.csv').write_text('1')
    run = Run(*(getattr(TOY, k) for k in ('notebook', 'parameters', 'outputs')), ('other*',), 1)
    reproduce({'a': run}, tmp_path, 1, progress=False)
    assert why_run(run, tmp_path) == ''
    (tmp_path / 'other.csv').write_text('2')
    assert why_run(run, tmp_path) == 'reads changed'


def test_a_failed_run_is_told_and_stops_no_other(tmp_path):
    bad = Run('studies/complexity', (('steps', '1'),), ('complexity.csv',), (), 1)
    said = reproduce({'bad': bad, 'good': TOY}, tmp_path, 1, progress=False)
    assert (
        'steps=1' in said[bad.name]
        and said[TOY.name].startswith('made')
        and why_run(bad, tmp_path) == 'failed before'
    )


def test_the_notebook_makes_the_page(tmp_path):
    for again in (False, True):
        nb = execute(
            'reproduce', tmp_path, items='appendix-b,table-7', reports_dir=str(tmp_path / 'r')
        )
        said = ''.join(
            ''.join(o.get('text', '')) for c in nb['cells'] for o in c.get('outputs', [])
        )
        assert ('up to date' in said) == again
    page = (tmp_path / 'r/index.html').read_text()
    text = (tmp_path / 'r/index.md').read_text()
    assert (
        '<td>adam2</td>' in page
        and 'SDXL-Turbo' in page
        and 'not reproducible' in page
        and 'complexity.json' in page
        and text.count('\n## ') == 2
    )
    with pytest.raises(Exception, match='figure-4-sit'):
        execute('reproduce', tmp_path, items='figure-9', reports_dir=str(tmp_path / 'r'))


def test_links_of_the_committed_page_lead_somewhere():
    page = (REPORTS / 'index.html').read_text()
    ids = set(re.findall(r'id="([^"]+)"', page))
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(targets) > 40
    for t in targets:
        assert t.startswith('http') or (
            t[1:] in ids if t.startswith('#') else (REPORTS / t).exists()
        ), t


# numbers of the README
def prose_and_outputs():
    nb = json.loads((ROOT / 'nbs/index.ipynb').read_text())
    prose = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'(?s)```.*?```|`[^`]*`|\]\([^)]*\)|(?m:^    .*$)|theorem \d\.\d', ' ', prose), nb


def test_tables_of_the_readme_are_those_of_the_files():
    "The cells of index.ipynb, run now on the files in reports/, give the outputs that are committed."
    _, nb = prose_and_outputs()
    scope = {}
    for c in nb['cells']:
        if c['cell_type'] != 'code':
            continue
        shown = []
        scope['display'] = shown.append
        source = ''.join(c['source'])
        exec(
            compile(
                re.sub(
                    r'from IPython.display import Markdown, display',
                    'from IPython.display import Markdown',
                    source,
                ),
                'index',
                'exec',
            ),
            scope,
        )
        committed = [
            ''.join(o['data'].get('text/markdown', '')) for o in c['outputs'] if 'data' in o
        ]
        assert [s.data for s in shown] == committed, f'run nbs/index.ipynb again: {source[:80]}'


def test_no_measured_number_is_typed_into_the_readme():
    "Decimal numbers in its prose are settings or identifiers, each named here."
    prose, _ = prose_and_outputs()
    allowed = {'2505.21114', '2402.17376', '3.11', '1.375', '1.5', '0.1'}
    typed = [
        n
        for n in re.findall(r'(?<![\w.-])\d+\.\d+(?![\w-])', prose)
        if n not in allowed and not n.startswith('2.0')
    ]
    assert not typed, f'let a cell of index.ipynb write them: {typed}'
