"The reader's way in: start.ipynb and play.ipynb run; pages of questions say what ratios say."

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import solve_ivp

from neuralsolver.neural import get_solver, load_solver
from neuralsolver.tools import answers
from neuralsolver.utils import indexed_noise

NBS = Path(__file__).resolve().parents[1]


def text(cell):
    return ''.join(cell['source'])


def cells(name):
    return json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def papermill(name, folder, extra, **parameters):
    "Run a notebook with a cell appended; the text that this cell printed, and all cells."
    nb = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))
    cell = dict(cell_type='code', id='appended', metadata={}, execution_count=None, outputs=[])
    nb['cells'].append(cell | dict(source=extra))
    source, target = folder / f'{name}.ipynb', folder / f'{name}_out.ipynb'
    source.write_text(json.dumps(nb), encoding='utf-8')
    command = [sys.executable, '-m', 'papermill', str(source), str(target), '--no-progress-bar']
    for key, value in parameters.items():
        command += ['-p', key, str(value)]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(target.read_text(encoding='utf-8'))['cells']
    printed = [o['text'] for o in out[-1]['outputs'] if o.get('name') == 'stdout']
    return ''.join(map(''.join, printed)), out


def in_process(name, **parameters):
    "The variables of a notebook after all its cells, run here."
    space = {'__name__': '__main__'}
    for k, cell in enumerate(c for c in cells(name) if c['cell_type'] == 'code'):
        exec(compile(text(cell), f'{name}, code cell {k}', 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', []):
            space.update(parameters)
    return space


@pytest.fixture(scope='module')
def one_thread():
    "The notebook computes on one thread and draws without a screen; both are put back."
    threads, backend = torch.get_num_threads(), matplotlib.get_backend()
    matplotlib.use('Agg')
    yield
    torch.set_num_threads(threads)
    matplotlib.use(backend)


def steps_by_hand(velocity, x, nodes, M):
    "Eq. 16 in NumPy: all states."
    states, v = [x], []
    for i, row in enumerate(M):
        v.append(velocity(x, nodes[i]))
        x = x + (nodes[i + 1] - nodes[i]) * sum(m * w for m, w in zip(row, v))
        states.append(x)
    return np.stack(states)


WEIGHTS = """
import json
layers = [m for m in field.net if hasattr(m, 'weight')]
print(json.dumps([[p.tolist() for p in (m.weight, m.bias)] for m in layers]))
"""


def network(layers):
    "The MLP in NumPy."
    layers = [[np.array(a) for a in pair] for pair in layers]

    def velocity(x, t):
        waves = [f(k * np.pi * t) for f in (np.sin, np.cos) for k in (1, 2, 4)]
        h = np.concatenate([x, np.tile([t, *waves], (len(x), 1))], 1)
        for W, b in layers[:-1]:
            h = h @ W.T + b
            h = h / (1 + np.exp(-h))
        return h @ layers[-1][0].T + layers[-1][1]

    return velocity


def exact_states(velocity, x, times, rtol=1e-7):
    "The flow by scipy, at given times [K, *x.shape]."

    def slope(t, y):
        return velocity(y.reshape(x.shape), t).ravel()

    found = solve_ivp(slope, (0, 1), x.ravel(), t_eval=times, rtol=rtol, atol=rtol / 10)
    return found.y.T.reshape(-1, *x.shape)


def points(seed):
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)).double().numpy()


def euler(n):
    return np.linspace(0, 1, n + 1), np.eye(n)


SMALL = dict(steps=3, seed=5, train_steps=150, iterations=10, pool=64, fresh=40)


@pytest.fixture(scope='module')
def started(tmp_path_factory):
    "start.ipynb by the literal papermill command, small: velocity, files, cells."
    folder = tmp_path_factory.mktemp('start')
    printed, out = papermill('start', folder, WEIGHTS, **SMALL, reports_dir=folder)
    return network(json.loads(printed)), folder, out


def test_start_writes_its_files_and_protocol(started):
    _, folder, _ = started
    protocol = json.loads((folder / 'start.json').read_text())
    table = pd.read_csv(folder / 'start.csv')
    assert protocol['parameters'] == SMALL
    assert protocol['noise_seeds'] == dict(searches=[5, 6, 7], tests=[1005, 1006, 1007])
    evaluations = [3, 3, 3, 3, 6, 12, 24, 100]
    assert list(table.evaluations) == evaluations
    names = ['euler', 'ab2', 'ab3', 'searched', 'euler', 'euler', 'euler', 'teacher']
    assert list(table.solver) == names
    written = {'start.csv', 'start.json', 'start.png', 'start_samples.npz', 'start_solver.json'}
    assert {p.name for p in folder.glob('start*')} - {'start.ipynb', 'start_out.ipynb'} == written


def test_the_table_of_start_is_true(started):
    "The network is evaluated and integrated again in NumPy."
    velocity, folder, out = started
    rows = pd.read_csv(folder / 'start.csv').set_index(['solver', 'evaluations'])
    ab2 = np.eye(3)
    ab2[1, :2] = ab2[2, 1:] = -0.5, 1.5
    solvers = {('euler', 3): euler(3), ('ab2', 3): (np.linspace(0, 1, 4), ab2)}
    solvers |= {('euler', 12): euler(12), ('teacher', 100): euler(100)}
    errors = {key: [] for key in solvers}
    for x in map(points, (1005, 1006, 1007)):
        teacher = steps_by_hand(velocity, x, *euler(100))[-1]
        exact = exact_states(velocity, x, [1], rtol=1e-8)[-1]
        for key, solver in solvers.items():
            end = steps_by_hand(velocity, x, *solver)[-1]
            errors[key].append([np.sqrt(np.square(end - e).mean()) for e in (teacher, exact)])
    for key, found in errors.items():
        found = np.array(found)
        expected = np.stack([found.mean(0), found.std(0, ddof=1)], 1).ravel()
        assert rows.loc[key].to_numpy() == pytest.approx(expected, rel=2e-3, abs=3e-6), key
    gain = re.search(r'(\d+\.\d) times nearer to the teacher than Euler', json.dumps(out))[1]
    error = rows.rmse_teacher
    assert float(gain) == pytest.approx(error['euler', 3] / error['searched', 3], abs=0.06)


def test_start_keeps_and_draws_the_searched_solver(started):
    velocity, folder, _ = started
    solver = load_solver(folder / 'start_solver.json')
    digests = json.loads((folder / 'start.json').read_text())['digests']['searched']
    assert solver.digest == digests[0] and len(set(digests)) == 3
    assert (solver.nfe, solver.params) == (3, 6)
    M = (solver.weights / solver.span[:, None]).numpy()
    states = steps_by_hand(velocity, points(1005), solver.nodes.numpy(), M)
    with np.load(folder / 'start_samples.npz') as f:
        assert np.abs(f['searched_ends'] - states[-1]).max() < 1e-4
        assert np.abs(f['searched_paths'] - states[:, :16, 0]).max() < 1e-4


def test_start_shows_the_interface_that_is_there():
    "The code in its prose is run as it stands, on fewer noise samples and one start."
    import neuralsolver as ns

    prose = '\n'.join(text(c) for c in cells('start') if c['cell_type'] == 'markdown')
    (code,) = re.findall(r'```python\n(.*?)```', prose, re.S)
    fast = 'steps=2, teacher=4, race=1, batch_size=8, progress=False'
    small = code.replace('320', '24').replace('steps=5', fast)
    assert small.count('24') == 2
    space = dict(ns=ns, torch=torch)
    exec(small, space)
    assert space['result'].solver.nfe == 2
    (call,) = re.findall(r'`(ns\.Field\(net, path=.*?\))`', prose)
    field = eval(call, dict(ns=ns, net=lambda x, t, y: x * t.view(-1, 1)))
    labels = torch.zeros(3, dtype=torch.long)
    end = ns.sample(field, torch.randn(3, 2), ns.ddim(4, path=ns.DDPMPath()), labels)
    assert end.isfinite().all()


def drawn(playground):
    "What a reader sees."
    table, _, errors = playground.picture.fig.axes
    lines = {line.get_label().split(':')[0]: line.get_data() for line in errors.lines}
    labels = [t.get_text().split(': ') for t in errors.get_legend().get_texts()]
    return dict(
        field=playground.controls.field.value,
        start=playground.controls.start.value,
        M=np.nan_to_num(np.ma.filled(table.images[0].get_array(), 0)),
        lines={name: [np.array(values) for values in line] for name, line in lines.items()},
        ends={label[0]: float(label[1]) for label in labels if len(label) == 2},
        diagonal=[float(w.value) for w in playground.grid.diagonal],
        times=[w.value for w in playground.grid.times],
        status=playground.status.value,
        picture=playground.picture.view.value,
    )


def played(playground):
    "Widgets are changed as a user would: what is drawn after every action."
    grid, controls = playground.grid, playground.controls
    log = {'first': drawn(playground)}
    grid.sliders[2, 0].value = 0.7
    log['coefficient'] = drawn(playground)
    grid.delta_sliders[0].value = 0.5
    log['delta'] = drawn(playground)
    for name in ('descend', 'search', 'reset'):
        getattr(controls, name).click()
        log[name] = drawn(playground)
    choices = (('steps', 5), ('start', 'sit-xl-2'), ('field', 'line'), ('steps', 3))
    for name, value in (*choices, ('start', 'searched')):
        getattr(controls, name).value = value
        log[f'{name} {value}'] = drawn(playground)
    return log


ANGLES = np.arange(8) * np.pi / 4
CENTRES = {
    'ring': 1.6 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1),
    'line': np.array([[-1.6], [0.1], [1.0]]),
}


def mixture_velocity(centres, std):
    "E[x_1 - x_0 | x_t] for Gaussians of equal weight, from Bayes' rule."

    def velocity(x, t):
        var = (t * std) ** 2 + (1 - t) ** 2
        gap = x[:, None] - t * centres
        p = np.exp(-(gap**2).sum(2) / (2 * var))
        p /= p.sum(1, keepdims=True)
        return (p[..., None] * (centres + (t * std**2 - (1 - t)) / var * gap)).sum(1)

    return velocity


def check_numbers(s):
    "Every number drawn, without the package's fields, sampling and teachers."
    centres = CENTRES[s['field']]
    velocity = mixture_velocity(centres, 0.15)
    noise = indexed_noise(range(40), centres.shape[1:], 0, torch.float64).numpy()
    for who in ('Euler', 'yours'):
        M = s['M'] if who == 'yours' else np.eye(len(s['M']))
        times, errors = s['lines'][who]
        nodes = np.array([0, *times])
        if who == 'Euler':
            assert nodes == pytest.approx(np.linspace(0, 1, len(M) + 1))
        right = exact_states(velocity, noise, nodes.clip(0, 1))
        gap = steps_by_hand(velocity, noise, nodes, M) - right
        expected = np.sqrt(np.square(gap).mean((1, 2)))[1:]
        assert errors == pytest.approx(expected, rel=0.02, abs=5e-4), who
        assert s['ends'][who] == pytest.approx(errors[-1], abs=6e-5)
    assert s['diagonal'] == pytest.approx(np.diag(s['M']), abs=0.006)
    assert s['M'].sum(1) == pytest.approx(np.ones(len(s['M'])))
    ends = [float(t.split(' to ')[1]) for t in s['times']]
    assert ends == pytest.approx(s['lines']['yours'][0], abs=6e-4)


@pytest.fixture(scope='module')
def log(one_thread):
    return played(in_process('play', noises=40)['playing'])


def test_play_draws_what_the_sliders_say(log):
    for s in log.values():
        check_numbers(s)
    assert len({s['picture'] for s in log.values()}) == len(log) - 1  # reset shows the first
    assert log['reset']['picture'] == log['first']['picture']
    table = np.eye(4) * 1.5 - np.eye(4, k=-1) / 2
    table[0, 0] = 1
    assert log['first']['M'] == pytest.approx(table)
    table[2, 0], table[2, 2] = 0.7, 0.8
    for key, times in (('coefficient', [0.25, 0.5, 0.75, 1]), ('delta', [0.4, 0.6, 0.8, 1])):
        assert log[key]['M'] == pytest.approx(table)
        assert log[key]['lines']['yours'][0] == pytest.approx(times)


def test_play_searches_from_what_the_sliders_say(log):
    end = {key: s['ends']['yours'] for key, s in log.items()}
    losses = re.findall(r'pool (\S+) before, (\S+) after', log['descend']['status'])[0]
    assert float(losses[1]) < float(losses[0])
    assert end['search'] < end['delta'] / 2
    assert log['search']['ends']['start'] == end['first']
    found = log['start searched']['ends']
    assert found['yours'] < min(end['steps 3'], found['Euler'])


def test_play_starts_where_it_is_told(log):
    assert log['steps 5']['start'] == 'ab2'
    assert log['steps 3']['start'] == 'ab2' and len(log['steps 3']['M']) == 3  # no such table
    published = get_solver('sit-xl-2', 5)
    M = (published.weights / published.span[:, None]).numpy()
    assert log['start sit-xl-2']['M'] == pytest.approx(M, abs=1e-3)


def test_play_is_committed_without_widgets():
    """nbdev_clean keeps the state of widgets, 100 kB that no reader can use.

    Drop it, and the widget's output, after running it. The static pictures stay.
    """
    nb = json.loads((NBS / 'play.ipynb').read_text(encoding='utf-8'))
    outputs = [o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])]
    assert set(nb['metadata']) == {'kernelspec', 'neuralsolver'}
    assert [sorted(d) for d in outputs] == [['image/png', 'text/plain']] * 2


def test_play_refuses_a_start_without_a_table(one_thread):
    with pytest.raises(ValueError, match="start='sit-xl-2' is not known. Allowed: euler, ab2, ab3"):
        in_process('play', start='sit-xl-2')


# The pages in nbs/questions say what the measured ratios say: run on invented ratios.

QUESTIONS = Path(__file__).resolve().parents[1] / 'questions'
FLOW, VP = ('toy-flow', 'sit-xl-2', 'ab2@time'), ('toy-vp', 'dit-xl-2', 'unipc-2@quadratic')


def invented(flow, vp):
    "Ratios (searched, published) of two models at every guidance and N; intervals of 0.1."
    rows = []
    for (model, published, classical), ratios in ((FLOW, flow), (VP, vp)):
        for guidance in (1, 2):
            for steps in range(5, 11):
                row = dict(model=model, guidance=guidance, steps=steps)
                row |= dict(best_published=published, best_classical=classical)
                for kind, ratio in zip(answers.KINDS, ratios):
                    ratio += 0.01 * (steps + guidance - 6)
                    row |= {f'ratio_{kind}': ratio}
                    row |= {f'ratio_{kind}_low': ratio - 0.05, f'ratio_{kind}_high': ratio + 0.05}
                rows.append(row)
    return pd.DataFrame(rows)


def said(name):
    "What the code cells of a page display."
    cells = json.loads((QUESTIONS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    space, texts = {}, []
    for cell in (c for c in cells if c['cell_type'] == 'code'):
        *body, last = ast.parse(''.join(cell['source'])).body
        exec(compile(ast.Module(body, []), name, 'exec'), space)
        texts.append(eval(compile(ast.Expression(last.value), name, 'eval'), space).data)
    return '\n'.join(texts)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    "Pages read ratios that were given."

    def write(flow, vp):
        invented(flow, vp).to_csv(tmp_path / 'sweep.csv', index=False)
        monkeypatch.setattr(answers, 'reports_root', lambda: tmp_path)

    return write


def test_which_solver_names_the_published_table_only_where_it_wins(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    text = said('which_solver')
    assert re.search(r'\| flow \| toy-flow \| 1 \| 0\.30 to 0\.35 .*\| `sit-xl-2` \| 0\.60', text)
    assert re.search(r'\| VP \| toy-vp \| 2 \| .*\| `unipc-2@quadratic` \| 1; .*1\.51', text)
    assert '0.31 [0.26, 0.36]' in text
    measured((0.3, 1.3), (0.4, 0.5))
    text = said('which_solver')
    assert '| `ab2@time` | 1; the published `sit-xl-2` has 1.30' in text
    assert '| `dit-xl-2` | 0.50 to 0.55 (better in 6, worse in 0 of 6 N)' in text


def test_better_says_yes_and_no(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    text = said('better')
    for start in ('Searched on your model, VP path', 'Searched on your model, flow path'):
        assert re.search(re.escape(start) + r'.*: yes\.', text)
    assert 'another VP model: no.' in text and 'another flow model: yes.' in text
    measured((1.2, 0.92), (0.4, 0.9))
    text = said('better')
    assert re.search(r'flow path.*: no\.', text) and 'another flow model: it depends.' in text


def test_guidance_and_diffusers_say_it_in_words(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    assert 'In 12 of 12 cases' in said('guidance')
    text = said('diffusers')
    assert 'Flow models: yes.' in text and 'VP models: no.' in text


def test_no_measured_number_is_written_by_hand():
    for file in QUESTIONS.glob('*.ipynb'):
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'markdown':
                prose = re.sub(r'```.*?```|`[^`]*`', '', ''.join(cell['source']), flags=re.S)
                assert not re.search(r'\d\.\d', prose), (file.name, prose)


def test_file_without_ratios_is_refused(tmp_path):
    (tmp_path / 'sweep.csv').write_text('model,ratio\nx,1\n')
    with pytest.raises(ValueError, match='lacks the columns guidance.*papermill nbs/sweep.ipynb'):
        answers.read_sweep(tmp_path / 'sweep.csv')
