"eval.ipynb and sweep.ipynb as a user calls them: files, repeatability, batch size, refusals."

import json, re, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from neuralsolver.evaluate import evaluate, write_reports
from neuralsolver.protocol import Protocol

ROOT = Path(__file__).resolve().parents[2]
PAPERMILL = str(Path(sys.executable).parent / 'papermill')


def reports(protocol, folder):
    shards = folder / 'shards'
    return write_reports(protocol, *evaluate(protocol, False, shards), folder, shards)


SMALL = dict(
    steps=5,
    model='fashion-mixture',
    samples=40,
    seeds='0,1',
    solvers='euler,adam2,flowdcn-b-2',
    teacher_steps=10,
)


def run(out, notebook='nbs/eval.ipynb', **parameters):
    flags = [v for k, p in {**parameters, 'reports_dir': out}.items() for v in ('--p', k, str(p))]
    return subprocess.run(
        [PAPERMILL, notebook, str(out / 'executed.ipynb'), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp('first')
    done = run(out, **SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_files_and_columns(first):
    wanted = {
        f'eval_fashion-mixture_5{s}'
        for s in ('.csv', '.json', '.md', '_samples.npz', '_samples.png', '_tradeoff.png')
    }
    assert {p.name for p in first.iterdir()} == wanted | {'executed.ipynb', 'shards'}
    t = pd.read_csv(first / 'eval_fashion-mixture_5.csv').set_index('solver')
    assert {
        'model',
        'steps',
        'nfe',
        'guidance',
        'params',
        'samples',
        'fd',
        'fd_sd',
        'is',
        'precision',
        'recall',
        'kid',
        'rmse',
        'seconds',
        'reported_fid',
    } <= set(t.columns)
    assert list(t.index) == ['euler', 'adam2', 'flowdcn-b-2', 'teacher', 'real']
    assert (
        t.rmse['teacher'] == 0
        and t.reported_fid['adam2'] == 8.96
        and t.reported_fid['flowdcn-b-2'] == 4.92
        and np.isnan(t.reported_fid['euler'])
    )
    protocol = json.loads((first / 'eval_fashion-mixture_5.json').read_text())
    assert protocol['counts'] == [20, 20] and re.fullmatch(
        '[0-9a-f]{64}', protocol['identity']['weights']
    )


@pytest.mark.parametrize('batch_size', [250, 7])
def test_same_seeds_same_table_whatever_the_batch_size(first, tmp_path, batch_size):
    protocol = Protocol(**SMALL, batch_size=batch_size)
    stem = reports(protocol, tmp_path)
    a, b = (
        pd.read_csv(p).drop(columns='seconds')
        for p in (first / 'eval_fashion-mixture_5.csv', f'{stem}.csv')
    )
    if batch_size == 250:
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    else:
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'parameters, message', [(dict(steps=2.5), 'steps=2.5'), (dict(stepz=8), "did you mean 'steps'")]
)
def test_bad_values_fail_at_once(tmp_path, parameters, message):
    done = run(tmp_path, **{'model': 'fashion-mixture', **parameters})
    assert done.returncode != 0 and message in done.stderr
    assert not list(tmp_path.glob('eval_*'))


def test_left_out_rows_are_said(tmp_path):
    protocol = Protocol(
        **{**SMALL, 'steps': 4, 'solvers': 'default', 'samples': 20, 'teacher_steps': 4}
    )
    stem = reports(protocol, tmp_path)
    assert 'flowdcn-b-2' in json.loads(stem.with_name(stem.name + '.json').read_text())['left_out']
    assert (
        'Left out: sit-xl-2, no table for 4 steps' in stem.with_name(stem.name + '.md').read_text()
    )


@pytest.fixture(scope='module')
def table_2(tmp_path_factory):
    protocol = Protocol('dit-tiny', 5, samples=16, seeds='0,1', teacher_steps=10)
    stem = reports(protocol, tmp_path_factory.mktemp('table_2'))
    return protocol, stem, pd.read_csv(f'{stem}.csv').set_index('solver')


def test_table_2_has_its_rows_and_says_what_is_unusual_about_them(table_2):
    protocol, stem, t = table_2
    for method in ('dpm-solver++3m', 'unipc-3'):
        assert {
            f'{method}@{g}' for g in ('log-snr', 'time', 'optimized', 'optimized-log-snr')
        } <= set(t.index)
    assert {
        'ddim',
        'dpm-solver-2@log-snr',
        'dpm-solver-3@log-snr',
        'deis-3',
        'ipndm',
        'ipndm-v',
        'dit-xl-2',
        'dit-tiny',
        'teacher',
        'real',
    } <= set(t.index)
    assert (
        (t.nfe.drop(['teacher', 'real']) == 5).all()
        and t.rmse['teacher'] == 0
        and t.rmse.drop('real').notna().all()
    )
    assert (
        t.reported_fid['dit-xl-2'] == 7.4
        and t.reported_fid['unipc-3@optimized'] == 8.66
        and t.reported_fid['dpm-solver++3m@log-snr'] == 38.04
    )
    text = stem.with_name(stem.name + '.md').read_text()
    written = json.loads(stem.with_name(stem.name + '.json').read_text())
    assert (
        'dpm-solver-3@log-snr: its 5 evaluations make 2 steps.' in text
        and 'teacher ddim-10' in text
    )
    assert (
        written['teacher'] == 'ddim-10'
        and 'VPPath' in written['identity']['path']
        and re.fullmatch('[0-9a-f]{64}', written['identity']['weights'])
    )


def test_optimised_steps_do_not_depend_on_the_start_at_five(table_2):
    "As in the paper's table 2, where the two -opt rows are equal at N = 5."
    t = table_2[2]
    assert np.isclose(t.rmse['unipc-3@optimized'], t.rmse['unipc-3@optimized-log-snr'], rtol=2e-2)


@pytest.mark.parametrize('model, solver', [('dit-tiny', 'sit-xl-2'), ('sit-tiny', 'dit-xl-2')])
def test_a_table_of_another_path_is_refused(model, solver):
    with pytest.raises(ValueError, match=f'{solver}.*change_path'):
        Protocol(model, solvers=solver)


def test_sweep(tmp_path):
    done = run(
        tmp_path,
        'nbs/sweep.ipynb',
        models='fashion-mixture',
        steps='5',
        guidance='1',
        samples=20,
        seeds='0,1',
        teacher_steps=10,
    )
    assert done.returncode == 0, done.stderr
    everything, best = pd.read_csv(tmp_path / 'sweep_all.csv'), pd.read_csv(tmp_path / 'sweep.csv')
    classical = (
        everything[~everything.solver.isin(['flowdcn-b-2', 'sit-xl-2', 'fashion-mixture'])]
        .groupby('solver')
        .rmse.mean()
    )
    assert (
        np.isclose(best.rmse_classical[0], classical.min(), rtol=1e-5)
        and (everything.nfe == 5).all()
    )
