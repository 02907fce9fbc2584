"The manifest, what runs when, the page; curves; and that numbers shown are numbers in files."

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from neuralsolver.curves import curve_rows, evaluate_curve, write_curve
from neuralsolver.evaluate import evaluate
from neuralsolver.protocol import Protocol
import neuralsolver.tools.reproduce as module
from neuralsolver.tools.manifest import Run, read_items, runs_of, select_items
from neuralsolver.tools.reproduce import Queue, identity, reproduce, why_run
from neuralsolver.tools.results_page import reported_tables, write_index

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / 'reports'
ITEMS = read_items()
RUNS = runs_of(ITEMS, 'embedded', ITEMS)


def run_cells(notebook, **parameters):
    "Run the code cells here; the parameters are set after their cell, as papermill does it."
    space = dict(__name__='__main__')
    nb = json.loads((ROOT / f'nbs/{notebook}.ipynb').read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']), space)
        if 'parameters' in cell['metadata'].get('tags', []):
            space.update(parameters)
    plt.close('all')
    return space


# the manifest


def test_manifest_has_every_figure_and_table_of_the_paper():
    names = ' '.join(ITEMS['item'])
    figures = [f'figure-{n}' for n in ('1', '2', '3a', '3b', '4', '5', '6')]
    tables = [f'table-{k}' for k in range(1, 8)]
    for name in ['method', *figures, *tables, *(f'appendix-{c}' for c in 'bcdj')]:
        assert re.search(rf'\b{name}\b', names), name
    distilled = ITEMS[ITEMS['item'].isin(['table-6', 'table-7'])]
    assert set(distilled['status']) == {'needs checkpoints'}
    assert distilled['why'].str.contains('09_distilled').all()


@pytest.mark.parametrize('profile', ['embedded', 'paper'])
def test_manifest_names_parameters_of_its_notebooks(profile):
    for run in set(runs_of(ITEMS, profile, ITEMS).values()):
        known = papermill.inspect_notebook(ROOT / f'nbs/{run.notebook}.ipynb')
        assert known and {k for k, _ in run.parameters} | {'reports_dir'} <= set(known), run.command


def test_manifest_names_the_committed_results():
    gone = [o for run in set(RUNS.values()) for o in run.outputs if not (REPORTS / o).is_file()]
    assert not gone, f'papermill nbs/reproduce.ipynb makes them: {gone}'


# the page


def test_page_has_every_reported_number():
    cells = re.sub(r' +', ' ', (REPORTS / 'index.md').read_text())
    for selector in {i for i in ITEMS['reported'] if i}:
        for table in reported_tables(selector):
            for row in table.rows:
                line = re.sub(r' +', ' ', f'| {" | ".join(row)} |')
                assert line in cells, (selector, row)


def test_page_links_lead_somewhere():
    page = (REPORTS / 'index.html').read_text()
    ids = set(re.findall(r'id="([^"]+)"', page))
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(targets) > 40
    for target in targets:
        if target.startswith('#'):
            assert target[1:] in ids, target
        elif not target.startswith('http'):
            assert (REPORTS / target).exists(), target


def test_page_shows_what_became_of_a_run(tmp_path):
    chosen = select_items('appendix-b,table-6,figure-1', ITEMS)
    for name in RUNS['appendix-b'].outputs:
        (tmp_path / name).write_bytes((REPORTS / name).read_bytes())
    run = RUNS['appendix-b']
    (tmp_path / 'runs').mkdir()
    outcome = dict(identity=identity(run, tmp_path), seconds=90.0, beside='1 threads, alone')
    outcome |= dict(commit='abc', changed=True, failed='ended with code 1: oh')
    stamp = tmp_path / f'runs/{run.name}.json'
    stamp.write_text(json.dumps(outcome))
    text = write_index(chosen, 'embedded', tmp_path, ITEMS).read_text()
    assert text.count('\n## ') == 3
    assert 'PeRFlow' in text and 'FAILED: ended with code 1: oh' in text
    assert '| failed |' in text and '| as committed |' in text
    page = (tmp_path / 'index.html').read_text()
    assert '<td>Adam2</td>' in page and 'needs checkpoints' in page and 'complexity.json' in page
    del outcome['failed']
    outcome['outputs'] = {name: module.sha256(tmp_path / name) for name in run.outputs}
    stamp.write_text(json.dumps(outcome))
    text = write_index(chosen, 'embedded', tmp_path, ITEMS).read_text()
    assert '| 1.5 min |' in text and 'made in 90 s\n(1 threads, alone; expected 1 min' in text


# runs


TOY = """\
reports_dir: str = None
text: str = ''
"""
WRITE = """\
import time
with open(f'{reports_dir}/toy.txt', 'w') as f:
    f.write(text)
if text == 'bad':
    raise ValueError('text=bad is not allowed')
if text == 'wait':
    time.sleep(600)
"""


@pytest.fixture
def toy(tmp_path):
    "Makes a run of a notebook that writes its text to toy.txt."
    kernel = dict(name='python3', language='python', display_name='python3')
    cells = [new_code_cell(TOY, metadata=dict(tags=['parameters'])), new_code_cell(WRITE)]
    file = tmp_path / 'nbs/toy.ipynb'
    file.parent.mkdir()
    nbformat.write(new_notebook(metadata=dict(kernelspec=kernel), cells=cells), file)

    def make(text, outputs=('toy.txt',), reads=()):
        return Run(str(file.with_suffix('')), (('text', text),), outputs, reads, 1)

    return make


def test_run_is_made_once_and_again_when_what_it_depends_on_changes(toy, tmp_path, monkeypatch):
    run = toy('hello', reads=('other*',))
    other = tmp_path / 'other.csv'
    other.write_text('1')
    assert why_run(run, tmp_path) == 'not run yet'
    said = reproduce(dict(a=run, b=run), tmp_path, 2, progress=False)
    assert list(said) == [run.name] and said[run.name].startswith('made')
    assert why_run(run, tmp_path) == ''
    assert reproduce(dict(a=run), tmp_path, progress=False) == {run.name: 'up to date'}
    (tmp_path / 'toy.txt').write_text('by hand')
    assert why_run(run, tmp_path) == 'toy.txt is missing or was changed'
    (tmp_path / 'toy.txt').write_text('hello')
    other.write_text('2')
    assert why_run(run, tmp_path) == 'reads changed'
    other.write_text('1')
    now = module.provenance() | dict(data='other')
    monkeypatch.setattr(module, 'provenance', lambda: now)
    assert why_run(run, tmp_path) == 'data changed'


def test_run_waits_for_what_it_reads(toy, tmp_path):
    "It writes what it reads, and is told that this changed while it ran."
    early = toy('early')
    late = toy('late', outputs=(), reads=('toy.tx*',))
    said = reproduce(dict(late=late, early=early), tmp_path, 2, progress=False)
    assert list(said) == [early.name, late.name]
    assert 'changed while it ran' in said[late.name]
    assert why_run(late, tmp_path) == 'failed before'


def test_run_that_fails_is_told_and_stops_no_other(toy, tmp_path):
    bad = toy('bad')
    good = toy('good', outputs=('toy.txt',))
    said = reproduce(dict(bad=bad, good=good), tmp_path, 1, progress=False)
    assert 'text=bad is not allowed' in said[bad.name]
    assert said[good.name].startswith('made')
    assert why_run(bad, tmp_path) == 'failed before'


def test_run_that_measures_time_is_alone(tmp_path):
    timed = Run('studies/benchmark', (), (), (), 1)
    others = [Run(name, (), (), (), 2) for name in ('a', 'b', 'c')]
    queue = Queue([timed, *others], tmp_path, 2)
    assert queue.waiting[-1] == timed
    queue.active = {others[0]: None}
    assert queue.has_room(others[1]) and not queue.has_room(timed)
    queue.active = {others[0]: None, others[1]: None}
    assert not queue.has_room(others[2])
    queue.active = {timed: None}
    assert not queue.has_room(others[0])


START = """
import sys
from neuralsolver.tools.manifest import Run
from neuralsolver.tools.reproduce import reproduce
run = Run(sys.argv[1], (('text', 'wait'),), (), (), 1)
reproduce(dict(run=run), sys.argv[2], progress=False)
"""


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def processes_with(word):
    "Command lines of this machine that hold a word; zombies have none."
    files = (Path('/proc') / pid / 'cmdline' for pid in os.listdir('/proc') if pid.isdigit())
    found = []
    for file in files:
        try:
            found.append(file.read_text().replace('\0', ' '))
        except OSError:
            pass
    return [line for line in found if word in line and '-m papermill' in line]


@pytest.mark.skipif(sys.platform != 'linux', reason='the system ends runs on Linux only')
def test_run_ends_when_the_process_that_started_it_is_killed(toy, tmp_path):
    run = toy('wait')
    parent = subprocess.Popen([sys.executable, '-c', START, run.notebook, str(tmp_path)])
    wait_until(lambda: (tmp_path / 'toy.txt').exists())
    assert processes_with(str(tmp_path))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not processes_with(str(tmp_path)))


def test_notebook_makes_what_is_asked_for_and_the_page(tmp_path):
    made = run_cells('reproduce', items='appendix-b,table-7', reports_dir=str(tmp_path))
    state = made['states'][RUNS['appendix-b'].name]
    assert state.startswith('made') and not made['failed']
    assert (tmp_path / 'index.md').read_text().count('\n## ') == 2
    again = run_cells('reproduce', items='appendix-b', reports_dir=str(tmp_path))
    assert set(again['states'].values()) == {'up to date'}


# curves: what is measured has a protocol and a spread


CURVES = sorted(REPORTS.glob('curves_*.csv'))
TABLES = [*CURVES, *sorted(REPORTS.glob('eval_*_8.csv'))]


@pytest.mark.parametrize('file', TABLES, ids=lambda p: p.stem)
def test_measured_has_protocol_and_spread(file):
    table = pd.read_csv(file)
    card = json.loads(file.with_suffix('.json').read_text())
    for m in ('rmse', 'fd', 'is', 'kid', 'precision', 'recall', 'accuracy'):
        assert table.loc[table[m].notna(), f'{m}_sd'].notna().all(), m
    assert len(card['counts']) >= 3
    assert len(card['identity']['weights']) == 64 and card['versions']['torch']
    assert set(card['metrics']) >= {'extractor', 'n_real_fd'}
    rows = len(table) if 'steps' in card else table['solver'].nunique()
    references = table['solver'].isin(['teacher', 'real', 'reconstructed']).sum()
    assert len(card['solvers']) == rows - references


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
MODELS = {
    'sit-tiny': 'SiT-XL/2-R256',
    'sit-cifar': 'SiT-XL/2-R256',
    'flowdcn-tiny': 'FlowDCN-XL/2-R256',
    'dit-tiny': 'DiT-XL/2-R256',
}
METRICS = dict(fid='FID', sfid='sFID', precision='Precision', recall='Recall') | {'is': 'IS'}


def steps_of(row):
    "Of a row of the paper: the teacher has 50."
    if row['solver'] == 'teacher':
        return '50'
    return '' if pd.isna(row['steps']) else f'{row["steps"]:.0f}'


@pytest.mark.parametrize('file', CURVES, ids=lambda p: p.stem)
def test_reported_is_what_the_paper_reports(file):
    "Looked up here by other means than the package's."
    table = pd.read_csv(file)
    with open(ROOT / 'data/reported.csv') as f:
        rows = list(csv.reader(f))[1:]
    source = {tuple(row[1:5]): float(row[5]) for row in rows}
    stand_in = MODELS[table['model'].iloc[0]]
    # table 1 has another inception score, precision and recall than figure 6
    metrics = dict(fid='FID') if 'table_1' in file.name else METRICS
    found = 0
    for row in table.to_dict('records'):
        for metric, name in metrics.items():
            known = source.get((stand_in, NAMES.get(row['solver']), steps_of(row), name))
            mine = row.get(f'reported_{metric}')
            assert (known is None and pd.isna(mine)) or known == mine, (row['solver'], metric)
            found += known is not None
    assert found > 5


TINY = dict(model='fashion-mixture', samples=24, seeds='0,1,2', teacher_steps=12, batch_size=8)


def test_curve_is_the_tables_of_its_steps(tmp_path):
    rows = curve_rows('3,5', 'euler,adam2', 'heun:2', 'fashion-mixture')
    protocols = [Protocol(steps=n, solvers=','.join(names), **TINY) for n, names in rows.items()]
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
        for row in table[table.steps == p.steps].itertuples():
            assert row.rmse == pytest.approx(alone.rmse[row.solver], abs=1e-6)
            assert row.fd == pytest.approx(alone.fd[row.solver], rel=1e-4)
    text = (tmp_path / 'c.md').read_text()
    assert '| heun | ' in text and '± ' in text
    assert 'heun spends 4 evaluations in 2 steps' in text


def test_refusal_of_protocols_that_differ():
    with pytest.raises(ValueError, match='differ in samples'):
        evaluate_curve([Protocol(**TINY), Protocol(**TINY | dict(samples=48))], False)


def test_curves_notebook_writes_its_files(tmp_path):
    given = TINY | dict(steps='2,3', solvers='euler,adam2', rows='heun:2', name='toy')
    run_cells('curves', **given, reports_dir=str(tmp_path))
    for suffix in ('.md', '.csv', '.json', '.png', '_metrics.png'):
        assert (tmp_path / f'curves_toy{suffix}').stat().st_size > 200
    with pytest.raises(ValueError, match='is not NAME:STEPS'):
        run_cells('curves', rows='heun', reports_dir=str(tmp_path))


# numbers of the README


@pytest.mark.parametrize('page', ['index', 'guide'])
def test_readme_tables_are_those_of_the_files(page):
    "The cells of a page, run now on the files in reports/, give the committed outputs."
    nb = json.loads((ROOT / f'nbs/{page}.ipynb').read_text())
    scope = {}
    for cell in nb['cells']:
        if cell['cell_type'] != 'code':
            continue
        shown = []
        scope['display'] = shown.append
        source = ''.join(cell['source'])
        exec(source.replace('import Markdown, display', 'import Markdown'), scope)
        outputs = [output['data'] for output in cell['outputs'] if 'data' in output]
        committed = [''.join(data.get('text/markdown', '')) for data in outputs]
        assert [s.data for s in shown] == committed, f'run nbs/{page}.ipynb again: {source[:80]}'


@pytest.mark.parametrize('page', ['index', 'guide'])
def test_readme_has_no_typed_measured_number(page):
    "Decimal numbers in its prose are settings or identifiers, each named here."
    nb = json.loads((ROOT / f'nbs/{page}.ipynb').read_text())
    prose = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    code = r'(?s)```.*?```|`[^`]*`|\]\([^)]*\)|(?m:^    .*$)|theorem \d\.\d'
    allowed = {'2505.21114', '2402.17376', '3.11', '1.375', '1.5', '0.1'}
    numbers = re.findall(r'(?<![\w.-])\d+\.\d+(?![\w-])', re.sub(code, ' ', prose))
    typed = [n for n in numbers if n not in allowed and not n.startswith('2.0')]
    assert not typed, f'let a cell of {page}.ipynb write them: {typed}'
