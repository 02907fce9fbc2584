"""solver_figures.ipynb with small parameters; its numbers against others' formulas.

All data are computed once and two of the ten figures are drawn; `-m slow` draws all.
"""

import contextlib
import io
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import neuralsolver as ns
from neuralsolver.fields import Field
from neuralsolver.checkpoints import load_model
from neuralsolver.paths import VPPath
from neuralsolver.utils import data_file, indexed_noise, sha256

NOTEBOOK = Path(__file__).resolve().parent.parent / 'studies/solver_figures.ipynb'
PAGES = ('published', 'ours', 'ours_other', 'classical', 'comparison_linear', 'comparison_vp')
NAMES = ['method', *(f'figure_1_{page}' for page in PAGES)]
NAMES += ['time_steps', 'trajectory_error', 'sample_grid']
DRAWN = ['time_steps', 'trajectory_error']
SMALL = dict(
    steps='5',
    error_models='sit-tiny,dit-tiny',
    seeds='0,1,2',
    noises=4,
    sample_models='sit-tiny,dit-tiny',
    sample_steps='5',
    images=2,
    teacher_steps=10,
    compare_steps=6,
    iterations=10,
)
# arXiv 2505.21114, highest power first
EQ20 = np.array([-1.96, 3.51, -0.97, 0.43, 0])
EQ21 = np.array([-2.73, 6.30, -4.744, 2.17, 0])


def run_cells(until=None, **parameters):
    "The code cells in this process, up to those with a tag, as papermill would run them."
    space = {'__name__': '__main__'}
    seen = False
    for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']:
        tags = cell['metadata'].get('tags', [])
        if seen and until not in tags:
            return
        seen = until in tags
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']), space)
            if 'parameters' in tags:
                space |= parameters


def run(out, **parameters):
    with contextlib.redirect_stdout(io.StringIO()), matplotlib.rc_context():
        run_cells(reports_dir=str(out), **SMALL | parameters)
    plt.close('all')
    return out / 'solver_figures'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp('figures'), drawn=','.join(DRAWN))


def published():
    return json.loads(data_file('published_solvers.json').read_text())


def check_layout(folder, name):
    card = json.loads((folder / f'{name}.json').read_text())
    layout = card['layout']
    assert layout['overlapping_texts'] == []
    assert layout['smallest_font_pt'] >= 7
    assert layout['width_cm'] <= 17 and layout['height_cm'] <= 25
    picture = folder / f'{name}.png'
    width = plt.imread(picture).shape[1] / 150 * 2.54  # of the file itself
    assert 15 < width <= 17 and width == pytest.approx(layout['width_cm'], abs=0.2)
    assert picture.stat().st_size < 6e5 and all((folder / d).exists() for d in card['data'])
    assert card['versions']['torch'] == torch.__version__ and card['caption']


@pytest.mark.parametrize('name', DRAWN)
def test_figures_fit_a_page(made, name):
    check_layout(made, name)


@pytest.mark.slow
def test_all_figures_fit_a_page(tmp_path):
    folder = run(tmp_path)
    for name in NAMES:
        check_layout(folder, name)
    page = (folder.parent / 'solver_figures.md').read_text()
    assert all(f'](solver_figures/{name}.png)' in page for name in NAMES)


def test_cards_carry_the_protocol(made):
    card = json.loads((made / 'trajectory_error.json').read_text())['protocol']
    files = [(m, data_file(f'{m}.safetensors')) for m in ('sit-tiny', 'dit-tiny')]
    assert card['models'] == [dict(name=m, weights_sha256=sha256(f)) for m, f in files]
    assert card['seeds'] == [0, 1, 2]
    used = {(s['name'], s['steps'], s['digest']) for s in card['solvers']}
    for name, s in (('sit-tiny', ns.load_solver('sit-tiny', 5)), ('adam4', ns.adam4(5))):
        assert (name, 5, s.digest) in used
    page = (made.parent / 'solver_figures.md').read_text()
    assert all(f'](solver_figures/{name}.png)' in page for name in DRAWN) and '-4.744' in page


def matrix_of(table, name, steps):
    "The matrix of a table, as it is drawn."
    rows = table[(table.solver == name) & (table.steps == steps)]
    return rows.pivot(index='row', columns='column', values='value').fillna(0).to_numpy()


def test_every_table_is_drawn_in_the_units_of_the_paper(made):
    table = pd.read_csv(made / 'figure_1.csv')
    drawn = set(zip(table.solver, table.steps))
    # whatever there is today
    assert {(n, k) for n, counts in ns.list_solvers().items() for k in counts} <= drawn
    sums = table[table.consistent].groupby(['solver', 'steps', 'row']).value.sum()
    assert len(sums) > 300 and np.allclose(sums, 1, atol=1e-9)
    for name, t in published().items():
        for n, s in t['steps'].items():
            M = np.tril(s['coeffs'], -1)
            M += np.diag(1 - M.sum(1))
            assert np.allclose(matrix_of(table, name, int(n)), M, atol=1e-8)
    adams = [[0] * (k - 1) + [-1 / 2, 3 / 2] + [0] * (7 - k) for k in range(1, 8)]
    assert np.allclose(matrix_of(table, 'adam2', 8)[1:], adams)
    last = [0, 0, 0, 0, -9 / 24, 37 / 24, -59 / 24, 55 / 24]
    assert np.allclose(matrix_of(table, 'adam4', 8)[7], last)


@pytest.mark.parametrize('name', ['unipc-2', 'unipc-3'])
def test_unipc_is_its_own_tableau(made, name):
    table = pd.read_csv(made / 'figure_1.csv')
    s = ns.get_solver(name, 7, VPPath())
    unit = s.span.numpy() / s.scale.numpy()[1:]
    tableau = (matrix_of(table, name, 7) * unit[:, None]).cumsum(0)
    assert np.allclose(tableau, s.tableau.numpy(), atol=1e-6, rtol=1e-6)


def test_dpm_solver_is_the_formula_of_its_paper(made):
    "DPM-Solver++ 2M on a VP schedule that is written out here."
    table, times = pd.read_csv(made / 'figure_1.csv'), pd.read_csv(made / 'figure_1_times.csv')
    t = times[(times.solver == 'dpm-solver++2m') & (times.steps == 7)].time.to_numpy()
    half = (0.1 * t + 19.9 * t**2 / 2) / 2
    h = np.diff(-half - 0.5 * np.log(-np.expm1(-2 * half)))  # steps in log(alpha / sigma)
    M = matrix_of(table, 'dpm-solver++2m', 7)
    for k in range(1, 6):
        r = h[k - 1] / h[k]
        assert M[k, k - 1 : k + 1] == pytest.approx([-1 / (2 * r), 1 + 1 / (2 * r)], rel=1e-5)
    assert M[6, 6] == 1


def published_nodes(name):
    "Cumulated time deltas by number of evaluations; from the published numbers, not by Solver."
    sums = {
        int(n): np.cumsum(s['timedeltas_unrounded']) for n, s in published()[name]['steps'].items()
    }
    return {n: np.r_[0, e / e[-1]] for n, e in sums.items()}


def points(nodes):
    "All nodes of some tables: part of the steps, time elapsed."
    x = np.concatenate([np.arange(n + 1) / n for n in nodes])
    return x, np.concatenate([*nodes.values()])


def root_mean_square(v):
    return np.sqrt(np.mean(np.square(v)))


def test_reported_polynomials_do_not_end_at_1(made):
    table = pd.read_csv(made / 'time_steps_polynomials.csv')
    at_1 = table[table.what == 'reported'].set_index('path').at_1
    assert at_1['linear'] == pytest.approx(1.01) and at_1['vp'] == pytest.approx(0.996)


@pytest.mark.parametrize('name', ['sit-xl-2', 'dit-xl-2', 'flowdcn-b-2'])
def test_polynomials_with_a_constant_are_those_of_numpy(made, name):
    table = pd.read_csv(made / 'time_steps_polynomials.csv')
    x, y = points(published_nodes(name))
    c = np.polyfit(x, y, 4)
    row = table[(table.tables == name) & table.constant].iloc[0]
    assert row[list('abcde')].to_numpy(float) == pytest.approx(c, abs=1e-6)
    assert row.rms == pytest.approx(root_mean_square(np.polyval(c, x) - y), rel=1e-6)
    if name == 'sit-xl-2':
        assert np.allclose(c[:4].round(2), EQ20[:4])  # eq. 20 is this fit


def test_polynomials_through_0_solve_the_normal_equations(made):
    table = pd.read_csv(made / 'time_steps_polynomials.csv')
    x, y = points(published_nodes('dit-xl-2'))
    A = np.stack([x**4, x**3, x**2, x], 1)
    row = table[(table.tables == 'dit-xl-2') & ~table.constant].iloc[0]
    want = np.linalg.solve(A.T @ A, A.T @ y)
    assert row[list('abcd')].to_numpy(float) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    'name, equation', [('sit-xl-2', EQ20), ('dit-xl-2', EQ21), ('flowdcn-b-2', EQ20)]
)
def test_residuals_are_over_the_inner_nodes(made, name, equation):
    table = pd.read_csv(made / 'time_steps_residuals.csv')
    found = table[table.solver == name].set_index('steps').reported
    for n, e in published_nodes(name).items():
        gap = np.polyval(equation, np.arange(1, n) / n) - e[1:-1]
        assert found[n] == pytest.approx(root_mean_square(gap), abs=1e-7)


@torch.no_grad()
def test_errors_are_those_of_the_end_points(made):
    "At the last node, which needs no dense output of the teacher."
    e = pd.read_csv(made / 'trajectory_error.csv')
    assert (e[e.node == 0].rmse < 1e-5).all() and set(e.seed) == {0, 1, 2}
    rows = e[(e.model == 'sit-tiny') & (e.seed == 1) & (e.node == 5)].set_index('solver')
    field = Field(load_model('sit-tiny'), guidance=2.0)
    x, y = indexed_noise(range(4), (1, 28, 28), seed=1), torch.arange(4)
    end = ns.sample(field, x, ns.euler(10), y)
    for name, s in (('adam2', ns.adam2(5)), ('sit-tiny', ns.load_solver('sit-tiny', 5))):
        gap = ns.sample(field, x, s, y) - end
        assert rows.rmse[name] == pytest.approx(root_mean_square(gap.numpy()), rel=1e-4)
        assert rows.rms[name] == pytest.approx(root_mean_square(end.numpy()), rel=1e-4)


def velocity(x, t, centres):
    "E[data - noise | x] for a mixture with standard deviation 0.25."
    var = (0.25 * t) ** 2 + (1 - t) ** 2
    gap = x[:, None] - t * centres
    p = np.exp(-(gap**2).sum(-1) / (2 * var))
    p /= p.sum(1, keepdims=True)
    return (p[..., None] * (centres + (t * 0.25**2 - (1 - t)) / var * gap)).sum(1)


def test_method_figure_is_a_real_run(made):
    "Its states follow eq. 16 with its own matrix and time deltas, on the velocity above."
    with np.load(made / 'method.npz') as f:
        d = dict(f)
    x, Q = d['after_states'][0], []
    for i, t in enumerate(d['nodes'][:-1]):
        Q.append(velocity(x, t, d['centres']))
        x = x + d['timedeltas'][i] * sum(m * v for m, v in zip(d['matrix'][i], Q))
        assert np.allclose(x, d['after_states'][i + 1], atol=1e-9)
    assert np.allclose(d['matrix'].sum(1), 1)
    assert d['timedeltas'].sum() == pytest.approx(1)
    assert d['teacher_states'].shape == (101, 3, 2)
    first, second = d['before_states'][:2]
    assert np.allclose(second, first + 0.2 * velocity(first, 0, d['centres']))


def test_samples_are_the_pictures_of_their_errors(made):
    "Clipping to [-1, 1] can only bring them closer, rounding adds little."
    table = pd.read_csv(made / 'sample_grid.csv')
    with np.load(made / 'sample_grid.npz') as f:
        pictures = {k: f[k] / 127.5 for k in f.files}
    for r in table.itertuples():
        student, teacher = (
            pictures[f'{r.model}|{r.solver}|{r.steps}'],
            pictures[f'{r.model}|teacher|10'],
        )
        assert student.shape == (2, 1, 28, 28)
        assert 0 < root_mean_square(student - teacher) <= r.rmse + 0.005
    assert set(table.solver) == {'adam2', 'sit-tiny', 'dpm-solver++2m', 'dit-tiny'}


@pytest.mark.parametrize(
    'name, value',
    [
        ('figures', 'method,figure_2'),
        ('seeds', '0,10000'),
        ('steps', '5,x'),
        ('error_models', 'sit-huge'),
        ('teacher_steps', 7),
        ('limit', 0.0),
        ('noises', 0),
    ],
)
def test_refusal_of_bad_parameters_before_anything_is_written(name, value, tmp_path):
    parameters = {name: value, 'reports_dir': str(tmp_path / 'reports')}
    with pytest.raises(ValueError, match=name.removeprefix('error_').rstrip('s')):
        run_cells('checks', **parameters)
    assert not (tmp_path / 'reports').exists()
