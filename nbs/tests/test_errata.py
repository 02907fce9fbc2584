"""errata.ipynb: its facts found again by other means, from the files themselves.

By default the committed numbers are tested; `-m slow` runs the notebook, small, and tests its own.
"""

import contextlib
import io
import json
import math
from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / 'nbs/errata.ipynb').read_text(encoding='utf-8'))
TABLES = json.loads((ROOT / 'data/published_solvers.json').read_text())
REPORTED = pd.read_csv(ROOT / 'data/errata_reported.csv')
SMALL = dict(steps=4, iterations=12, seeds=3, samples=60, resamples=2, network_samples=4)
EACH = [(name, int(n), t) for name, table in TABLES.items() for n, t in table['steps'].items()]


def run_cells(until=None, **parameters):
    "The code cells in this process, up to those with a tag, as papermill would run them."
    space = {'__name__': '__main__'}
    seen = False
    for cell in NOTEBOOK['cells']:
        tags = cell['metadata'].get('tags', [])
        if seen and until not in tags:
            return space
        seen = until in tags
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']), space)
            if 'parameters' in tags:
                space |= parameters
    return space


@pytest.fixture(scope='module', params=['committed', pytest.param('fresh', marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    "Files of the notebook: those in reports/, or of a small run."
    if request.param == 'committed':
        return ROOT / 'reports'
    out = tmp_path_factory.mktemp('errata')
    with contextlib.redirect_stdout(io.StringIO()):
        run_cells(reports_dir=str(out), **SMALL)
    plt.close('all')
    return out


@pytest.fixture(scope='module')
def values(folder):
    return json.loads((folder / 'errata.json').read_text())['values']


def test_every_row_was_run_or_says_why_not(folder, values):
    summary = pd.read_csv(folder / 'errata.csv')
    columns = ['id', 'where', 'said', 'found', 'consequence', 'executed']
    assert summary.columns.tolist() == columns
    assert summary.id.is_unique and not summary.isna().any().any()
    run = set(summary.id[summary.executed == 'yes'])
    assert set('abcdefghijlmn') <= run
    assert summary.id[summary.executed == 'no'].str.startswith('o').all()
    lines = (folder / 'errata.md').read_text().splitlines()
    assert len(lines) == len(summary) + 2
    assert len({line.replace('\\|', '').count('|') for line in lines}) == 1
    assert set(values) == set(summary.id)


def test_protocol_and_pictures(folder):
    protocol = json.loads((folder / 'errata.json').read_text())['protocol']
    assert set(SMALL) <= set(protocol)
    assert folder == ROOT / 'reports' or {k: protocol[k] for k in SMALL} == SMALL
    for name in ('code', 'numbers'):
        assert (folder / f'errata_{name}.png').stat().st_size > 5000


def test_counts_of_parameters(values):
    for n, found in values['e']['counts'].items():
        n = int(n)
        pairs = [(i, j) for i in range(n) for j in range(i)]
        masked = [(i, j) for i, j in pairs if n <= 6 and i >= n - 2 and j != i - 1]
        assert found == dict(formula=n + len(pairs), free=n - 1 + len(pairs) - len(masked))
        assert n > 6 or all(
            TABLES['sit-xl-2']['steps'][str(n)]['coeffs'][i][j] == 0 for i, j in masked
        )
    assert values['e']['counts']['15']['formula'] == 120


def test_sums_of_the_printed_decimals(values):
    for name, n, t in EACH:
        exact = sum(Fraction(str(v)) for v in t['timedeltas'])
        assert Fraction(str(values['f']['sums'][f'{name}-{n}'])) == exact
        assert abs(exact - 1) <= Fraction(2, 10_000)


def test_time_deltas_lie_on_a_grid(values):
    "Every table's r is found by the logarithm of a ratio, not by a scan."
    for _, _, t in EACH:
        unrounded = np.array(t['timedeltas_unrounded'])
        w = np.exp(0.02 * np.round(np.log(unrounded / unrounded[-1]) / 0.02))
        w /= w.sum()
        assert [f'{v:.4f}' for v in w] == [f'{v:.4f}' for v in t['timedeltas']]
    many = {k: v for k, v in values['f']['candidates'].items() if v != 1}
    assert many == {'flowdcn-b-2-9': 3, 'flowdcn-b-2-10': 3, 'flowdcn-b-2-15': 3}
    assert values['f']['control'] == [0, 190]


def free_hundredths(n, coefficients):
    "The searched coefficients in units of 0.01: up to 6 steps the last rows have two entries."
    for i in range(n):
        for j in range(i):
            if n > 6 or i < n - 2 or j == i - 1:
                yield round(float(coefficients[i][j]) * 100)


def test_parity_of_the_coefficients(values):
    "From the decimal digits: the last of the two that Lion's steps can reach."
    g = values['g']
    for name, n, t in EACH:
        sizes = [abs(h) for h in free_hundredths(n, t['coeffs'])]
        parities = {h % 2 for h in sizes}
        assert len(parities) == 1
        assert g['parity'][f'{name}-{n}'] == ('odd' if 1 in parities else 'even')
        assert max(sizes) <= g['least'][f'{name}-{n}'] <= 1565
    assert g['least']['flowdcn-b-2-15'] == 820
    assert g['table_1_rows'] == {'8': [[1565, 50000]], '10': [[939, 30000]]}
    assert g['parity_fits'] == {'8': True, '10': False}


def vp_alpha(t):
    return math.exp(-(0.1 * t + 19.9 * t * t / 2) / 2)


def vp_sigma(t):
    return math.sqrt(1 - vp_alpha(t) ** 2)


def test_the_double_update_by_hand(values):
    "Two plain updates a step on scalars; the oracle's predictions are all 1."
    b = values['b']
    t, signal, noise = 0.999, vp_alpha(0.999), vp_sigma(0.999)
    for i, dt in enumerate(TABLES['dit-xl-2']['steps']['10']['timedeltas'][:7]):
        ratio = vp_sigma(t - dt) / vp_sigma(t)
        added = vp_alpha(t - dt) - vp_alpha(t) * ratio
        signal = ratio * (ratio * signal + added) + added
        noise *= ratio**2
        t -= dt
        if i == 0:
            assert b['signal_first'] == pytest.approx(signal, rel=1e-9)
    assert b['signal_late'] == pytest.approx(signal, rel=1e-9)
    assert b['noise_late'] == pytest.approx(noise, rel=1e-9)
    assert b['t_late'] == pytest.approx(t)
    assert min(b['ratio']) > 2


def test_what_torch_does(values):
    x = torch.ones(4, requires_grad=True) * 2
    _, b = x.chunk(2)
    with pytest.raises(RuntimeError) as e:
        b[:1] = 0
    message = values['c']['message']
    known = 'is a view and is being modified inplace'
    assert str(e.value)[20:120] in message or known in message
    assert values['c']['steps_done'] == 1
    assert values['k1']['default_seed'] == str(torch.Generator().initial_seed())
    assert values['k1']['repeats']
    if not torch.cuda.is_available():
        assert 'RuntimeError' in values['k1']['message']


def test_rules_of_the_search(values):
    "The raw sum starts at 1 and moves, the softmax's does not; raw tables run backwards."
    a = values['a']
    assert len(a['sum_end']) >= 3 and all(abs(s - 1) > 1e-6 for s in a['sum_end'])
    assert a['least_sum'] > 2
    d = np.log(TABLES['flowdcn-b-2']['steps']['10']['timedeltas'])
    assert a['negative_steps']['flowdcn-b-2-10'] == (d - d.mean() + 0.1 < 0).sum() > 0
    assert 0 < values['d']['largest_time_gap'] <= 0.005


def test_searched_loses_at_six_steps_in_table_3(values):
    three = pd.read_csv(ROOT / 'data/reported.csv').query("where == 'table 3'")
    six = three[three.steps == 6].set_index('solver').value
    assert values['j2']['lost'] == [6] and values['j2']['dpm_rows'] == 0
    assert six['Searched (DiT-XL/2-R256)'] > six['UniPC uniform-t-opt']


def test_inception_scores_of_one_solver_differ(values):
    scores = REPORTED[REPORTED.metric == 'IS'].set_index(['where', 'steps']).value
    gaps = [scores['table 1', n] - scores['figure 4/6', n] for n in (6, 7, 8, 10)]
    assert values['j']['IS'] == gaps and values['j']['FID'] == [0, 0, 0, 0]


def test_ends_of_teacher_and_polynomials(values):
    last = math.sqrt(1 - math.exp(-(1e-4 + 19.9e-6 / 2)))
    assert values['l']['transitions'] == 99
    assert values['l']['end_sigma'] == [pytest.approx(last), pytest.approx(0.01)]
    assert values['m']['at_1'] == {'eq. 20': pytest.approx(1.01), 'eq. 21': pytest.approx(0.996)}
    ten = TABLES['sit-xl-2']['steps']['10']['timedeltas']
    shrunk = sum(d / (i + 1) for i, d in enumerate(ten))
    assert values['k2']['shrunk'][-1] == pytest.approx(shrunk, abs=1e-5)


@pytest.mark.parametrize('change', [dict(seeds=2), dict(steps=2), dict(samples=0)])
def test_refusal_of_bad_values_before_anything_is_written(tmp_path, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        run_cells('checks', reports_dir=str(tmp_path / 'out'), **change)
    assert not (tmp_path / 'out').exists()
