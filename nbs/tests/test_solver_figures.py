"solver_figures.ipynb as a user runs it, with small parameters; its numbers against others' formulas."

import json, os, re, subprocess, sys
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
import neuralsolver as ns
from neuralsolver.fields import Field
from neuralsolver.checkpoints import load_model
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.utils import data_file, indexed_noise, sha256

NBS = Path(__file__).resolve().parent.parent
NAMES = (
    'method',
    *(
        f'figure_1_{p}'
        for p in (
            'published',
            'ours',
            'ours_other',
            'classical',
            'comparison_linear',
            'comparison_vp',
        )
    ),
    'time_steps',
    'trajectory_error',
    'sample_grid',
)
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
EQ20, EQ21 = (
    np.array([-1.96, 3.51, -0.97, 0.43, 0]),
    np.array([-2.73, 6.30, -4.744, 2.17, 0]),
)  # arXiv 2505.21114


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('figures')
    options = [w for k, v in (SMALL | dict(reports_dir=out)).items() for w in ('-p', k, str(v))]
    command = [
        sys.executable,
        '-m',
        'papermill',
        NBS / 'studies/solver_figures.ipynb',
        out / 'out.ipynb',
        '--log-level',
        'ERROR',
        *options,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / 'solver_figures'


def published():
    return json.loads(data_file('published_solvers.json').read_text())


def test_files_fit_a_page_and_carry_their_protocol(made):
    for name in NAMES:
        card = json.loads((made / f'{name}.json').read_text())
        layout = card['layout']
        assert (
            layout['overlapping_texts'] == []
            and layout['smallest_font_pt'] >= 6
            and layout['width_cm'] <= 17
            and layout['height_cm'] <= 25
        ), (name, layout)
        width = plt.imread(made / f'{name}.png').shape[1] / 150 * 2.54
        assert 15 < width <= 17 and width == pytest.approx(
            layout['width_cm'], abs=0.2
        )  # the file itself
        assert (made / f'{name}.png').stat().st_size < 6e5 and all(
            (made / d).exists() for d in card['data']
        )
        assert card['versions']['torch'] == torch.__version__ and card['caption']
    card = json.loads((made / 'trajectory_error.json').read_text())['protocol']
    assert card['models'] == [
        dict(name=m, weights_sha256=sha256(data_file(f'{m}.safetensors')))
        for m in ('sit-tiny', 'dit-tiny')
    ] and card['seeds'] == [0, 1, 2]
    assert {(s['name'], s['steps'], s['digest']) for s in card['solvers']} >= {
        ('sit-tiny', 5, ns.load_solver('sit-tiny', 5).digest),
        ('adam4', 5, ns.adam4(5).digest),
    }
    page = (made.parent / 'solver_figures.md').read_text()
    assert all(f'](solver_figures/{n}.png)' in page for n in NAMES) and '-4.744' in page


def test_every_table_is_drawn_in_the_units_of_the_paper(made):
    table = pd.read_csv(made / 'figure_1.csv')
    found = {k: g for k, g in table.groupby(['solver', 'steps'])}
    assert {
        (n, k) for n, counts in ns.list_solvers().items() for k in counts
    } <= found.keys()  # whatever there is today
    sums = table[table.consistent].groupby(['solver', 'steps', 'row']).value.sum()
    assert len(sums) > 300 and np.allclose(sums, 1, atol=1e-9)
    matrix = lambda name, n: (
        found[name, n].pivot(index='row', columns='column', values='value').fillna(0).to_numpy()
    )
    for name, t in published().items():
        for n, s in t['steps'].items():
            M = np.tril(s['coeffs'], -1)
            assert np.allclose(matrix(name, int(n)), M + np.diag(1 - M.sum(1)), atol=1e-8)
    assert np.allclose(
        matrix('adam2', 8)[1:],
        [[0] * (k - 1) + [-1 / 2, 3 / 2] + [0] * (7 - k) for k in range(1, 8)],
    )
    assert np.allclose(matrix('adam4', 8)[7], [0, 0, 0, 0, -9 / 24, 37 / 24, -59 / 24, 55 / 24])


def test_exponential_solvers_in_data_coordinates(made):
    "UniPC against its own tableau, DPM-Solver++ 2M against the formula of its paper on a VP schedule written out here."
    table, times = pd.read_csv(made / 'figure_1.csv'), pd.read_csv(made / 'figure_1_times.csv')
    matrix = lambda name, n: (
        table[(table.solver == name) & (table.steps == n)]
        .pivot(index='row', columns='column', values='value')
        .fillna(0)
        .to_numpy()
    )
    for name in ('unipc-2', 'unipc-3'):
        s = ns.get_solver(name, 7, VPPath())
        span, scale = s.span.numpy(), s.scale.numpy()
        assert np.allclose(
            (matrix(name, 7) * (span / scale[1:])[:, None]).cumsum(0),
            s.tableau.numpy(),
            atol=1e-6,
            rtol=1e-6,
        )
    t = times[(times.solver == 'dpm-solver++2m') & (times.steps == 7)].time.to_numpy()
    half = (0.1 * t + 19.9 * t**2 / 2) / 2
    h = np.diff(-half - 0.5 * np.log(-np.expm1(-2 * half)))
    M = matrix('dpm-solver++2m', 7)  # of log(alpha / sigma)
    for k in range(1, 6):
        r = h[k - 1] / h[k]
        assert M[k, k - 1 : k + 1] == pytest.approx([-1 / (2 * r), 1 + 1 / (2 * r)], rel=1e-5)
    assert M[6, 6] == 1


def test_polynomials_and_residuals(made):
    poly, res = (
        pd.read_csv(made / 'time_steps_polynomials.csv'),
        pd.read_csv(made / 'time_steps_residuals.csv'),
    )
    reported = poly[poly.what == 'reported'].set_index('path').at_1
    assert reported['linear'] == pytest.approx(1.01) and reported['vp'] == pytest.approx(0.996)
    nodes = {}  # from the file of published numbers, not through Solver
    for name, t in published().items():
        for n, s in t['steps'].items():
            e = np.r_[0, np.cumsum(s['timedeltas_unrounded'])]
            nodes[name, int(n)] = e / e[-1]
    for name, eq in (('sit-xl-2', EQ20), ('dit-xl-2', EQ21), ('flowdcn-b-2', EQ20)):
        own = {n: e for (m, n), e in nodes.items() if m == name}
        x, y = np.concatenate([np.arange(n + 1) / n for n in own]), np.concatenate([*own.values()])
        c = np.polyfit(x, y, 4)
        row = poly[(poly.tables == name) & poly.constant].iloc[0]
        assert row[list('abcde')].to_numpy(float) == pytest.approx(
            c, abs=1e-6
        ) and row.rms == pytest.approx(np.sqrt(np.mean((np.polyval(c, x) - y) ** 2)), rel=1e-6)
        if name == 'sit-xl-2':
            assert np.allclose(c[:4].round(2), EQ20[:4])  # eq. 20 is this fit
        for n, e in own.items():
            assert res[(res.solver == name) & (res.steps == n)].reported.item() == pytest.approx(
                np.sqrt(np.mean((np.polyval(eq, np.arange(1, n) / n) - e[1:-1]) ** 2)), abs=1e-7
            )
    x = np.concatenate([np.arange(n + 1) / n for (m, n) in nodes if m == 'dit-xl-2'])
    y = np.concatenate([e for (m, _), e in nodes.items() if m == 'dit-xl-2'])
    A = np.stack([x**4, x**3, x**2, x], 1)
    assert poly[(poly.tables == 'dit-xl-2') & ~poly.constant][list('abcd')].to_numpy()[
        0
    ] == pytest.approx(np.linalg.solve(A.T @ A, A.T @ y), abs=1e-6)  # normal equations


def test_errors_are_those_of_the_end_points(made):
    e = pd.read_csv(made / 'trajectory_error.csv')
    assert (e[e.node == 0].rmse < 1e-5).all() and set(e.seed) == {0, 1, 2}
    field = Field(load_model('sit-tiny'), guidance=2.0)
    x, y = indexed_noise(range(4), (1, 28, 28), seed=1), torch.arange(4)
    with torch.no_grad():
        for name, s in (('adam2', ns.adam2(5)), ('sit-tiny', ns.load_solver('sit-tiny', 5))):
            want = (
                (ns.sample(field, x, s, y) - (end := ns.sample(field, x, ns.euler(10), y)))
                .square()
                .mean()
                .sqrt()
                .item()
            )  # the last node needs no dense output
            row = e[
                (e.model == 'sit-tiny') & (e.solver == name) & (e.seed == 1) & (e.node == 5)
            ].iloc[0]
            assert row.rmse == pytest.approx(want, rel=1e-4) and row.rms == pytest.approx(
                end.square().mean().sqrt().item(), rel=1e-4
            )


def test_method_figure_is_a_real_run(made):
    "Its states follow eq. 16 with its own matrix and time deltas, on a velocity that is written out here."
    with np.load(made / 'method.npz') as f:
        d = dict(f)

    def velocity(x, t):  # E[data - noise | x] for a mixture with standard deviation .25
        var = (0.25 * t) ** 2 + (1 - t) ** 2
        gap = x[:, None] - t * d['centres']
        p = np.exp(-(gap**2).sum(-1) / (2 * var))
        p /= p.sum(1, keepdims=True)
        return (p[..., None] * (d['centres'] + (t * 0.25**2 - (1 - t)) / var * gap)).sum(1)

    x, Q = d['after_states'][0], []
    for i, t in enumerate(d['nodes'][:-1]):
        Q.append(velocity(x, t))
        x = x + d['timedeltas'][i] * sum(m * v for m, v in zip(d['matrix'][i], Q))
        assert np.allclose(x, d['after_states'][i + 1], atol=1e-9)
    assert (
        np.allclose(d['matrix'].sum(1), 1)
        and d['timedeltas'].sum() == pytest.approx(1)
        and d['teacher_states'].shape == (101, 3, 2)
        and np.allclose(
            d['before_states'][1], d['before_states'][0] + 0.2 * velocity(d['before_states'][0], 0)
        )
    )


def test_samples_are_the_pictures_of_their_errors(made):
    table = pd.read_csv(made / 'sample_grid.csv')
    with np.load(made / 'sample_grid.npz') as f:
        pictures = dict(f)
    for r in table.itertuples():
        a, b = (
            pictures[k].astype(float) / 127.5
            for k in (f'{r.model}|{r.solver}|{r.steps}', f'{r.model}|teacher|10')
        )
        assert a.shape == (2, 1, 28, 28)
        assert (
            0 < np.sqrt(np.mean((a - b) ** 2)) <= r.rmse + 0.005
        )  # clipping to [-1, 1] can only bring them closer, rounding adds little
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
def test_bad_parameters_are_refused_before_anything_is_written(name, value, tmp_path):
    cells, space = (
        [
            c
            for c in json.loads((NBS / 'studies/solver_figures.ipynb').read_text(encoding='utf-8'))[
                'cells'
            ]
            if c['cell_type'] == 'code'
        ][:2],
        {},
    )
    exec(''.join(cells[0]['source']), space)
    space.update({name: value, 'reports_dir': str(tmp_path / 'reports')})
    with pytest.raises(ValueError, match=name.removeprefix('error_').rstrip('s')):
        exec(''.join(cells[1]['source']), space)
    assert not (tmp_path / 'reports').exists()
