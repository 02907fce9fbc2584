"eval.ipynb as a user calls it: files and columns, repeatability, batch size, refusals; table 2."

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_search_notebook import in_process

from neuralsolver.checkpoints import load_model
from neuralsolver.classical import euler
from neuralsolver.evaluate import evaluate, write_reports
from neuralsolver.fields import Field
from neuralsolver.neural import get_solver
from neuralsolver.protocol import Protocol
from neuralsolver.screening import SCREEN_SEED
from neuralsolver.solvers import sample
from neuralsolver.utils import indexed_noise

ROOT = Path(__file__).resolve().parents[2]
PAPERMILL = Path(sys.executable).with_name('papermill')
SMALL = dict(
    model='fashion-mixture',
    samples=40,
    seeds='0,1',
    solvers='euler,adam2,flowdcn-b-2',
    teacher_steps=10,
)
STEM = 'eval_fashion-mixture_8'


def reports(protocol, folder):
    shards = folder / 'shards'
    return write_reports(protocol, *evaluate(protocol, False, shards), folder, shards)


def read_card(stem):
    return json.loads(Path(f'{stem}.json').read_text())


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    "The command that README promises, as typed; the suite's only one through a shell."
    out = tmp_path_factory.mktemp('first')
    flags = []
    for name, value in (SMALL | dict(reports_dir=out)).items():
        flags += ['-p', name, str(value)]
    command = [PAPERMILL, 'nbs/eval.ipynb', out / 'executed.ipynb', '--p', 'steps', '8', *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return out


# files


def test_files(first):
    endings = ('.csv', '.json', '.md', '_samples.npz', '_samples.png', '_tradeoff.png')
    wanted = {f'{STEM}{ending}' for ending in endings}
    assert {f.name for f in first.iterdir()} == wanted | {'executed.ipynb', 'shards'}


def test_columns_rows_and_reported_numbers(first):
    table = pd.read_csv(first / f'{STEM}.csv').set_index('solver')
    assert list(table.index) == ['euler', 'adam2', 'flowdcn-b-2', 'teacher', 'real']
    described = {'model', 'steps', 'nfe', 'guidance', 'params', 'samples', 'seconds'}
    measured = {'fd', 'fd_sd', 'is', 'precision', 'recall', 'kid', 'rmse'}
    assert described | measured | {'reported_fid'} <= set(table.columns)
    assert table.rmse['teacher'] == 0
    assert table.reported_fid['adam2'] == 4.16
    assert table.reported_fid['flowdcn-b-2'] == 2.65
    assert np.isnan(table.reported_fid['euler'])


def test_the_protocol_goes_with_the_numbers(first):
    card = read_card(first / STEM)
    assert card['counts'] == [20, 20]
    assert re.fullmatch('[0-9a-f]{64}', card['identity']['weights'])
    assert card['protocol']['teacher_steps'] == 10
    assert card['protocol']['seeds'] == '0,1'


def test_rows_left_out_are_reported(tmp_path):
    given = SMALL | dict(steps=4, solvers='default', samples=20, teacher_steps=4)
    stem = reports(Protocol(**given), tmp_path)
    assert 'flowdcn-b-2' in read_card(stem)['left_out']
    text = Path(f'{stem}.md').read_text()
    assert 'Left out: sit-xl-2, no table for 4 steps' in text


# determinism and batch-size independence


@pytest.mark.parametrize('batch_size, tolerance', [(250, 0), (7, 1e-3)])
def test_same_seeds_same_table_whatever_the_batch_size(first, tmp_path, batch_size, tolerance):
    stem = reports(Protocol(**SMALL, steps=8, batch_size=batch_size), tmp_path)
    files = (first / f'{STEM}.csv', f'{stem}.csv')
    one, other = (pd.read_csv(file).drop(columns='seconds') for file in files)
    pd.testing.assert_frame_equal(one, other, rtol=tolerance, atol=tolerance)


# refusals


@pytest.mark.parametrize('name, value', [('steps', 2.5), ('samples', 0), ('guidance', 'much')])
def test_bad_values_are_refused_by_name_before_anything_is_written(tmp_path, name, value):
    given = dict(model='fashion-mixture', reports_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f'{name}={value!r} is not allowed') as error:
        in_process('eval', **given | {name: value})
    assert '\n' not in str(error.value)
    assert not list(tmp_path.rglob('eval_*'))


@pytest.mark.parametrize('model, solver', [('dit-tiny', 'sit-xl-2'), ('sit-tiny', 'dit-xl-2')])
def test_a_table_of_another_path_is_refused(model, solver):
    with pytest.raises(ValueError, match=f'{solver}.*change_path'):
        Protocol(model, solvers=solver)


# table 2


@pytest.fixture(scope='module')
def table_2(tmp_path_factory):
    protocol = Protocol('dit-tiny', 5, samples=16, seeds='0,1', teacher_steps=10)
    stem = reports(protocol, tmp_path_factory.mktemp('table_2'))
    return stem, pd.read_csv(f'{stem}.csv').set_index('solver')


def test_table_2_has_its_rows(table_2):
    table = table_2[1]
    grids = ('log-snr', 'time', 'optimized', 'optimized-log-snr')
    for method in ('dpm-solver++3m', 'unipc-3'):
        assert {f'{method}@{grid}' for grid in grids} <= set(table.index)
    singlestep = {'ddim', 'dpm-solver-2@log-snr', 'dpm-solver-3@log-snr'}
    multistep = {'deis-3', 'ipndm', 'ipndm-v', 'dit-xl-2', 'dit-tiny'}
    assert singlestep | multistep | {'teacher', 'real'} <= set(table.index)
    assert (table.nfe.drop(['teacher', 'real']) == 5).all()
    assert table.rmse['teacher'] == 0
    assert table.rmse.drop('real').notna().all()


def test_table_2_has_the_reported_numbers(table_2):
    reported = table_2[1].reported_fid
    assert reported['dit-xl-2'] == 7.4
    assert reported['unipc-3@optimized'] == 8.66
    assert reported['dpm-solver++3m@log-snr'] == 38.04


def test_table_2_says_what_is_unusual_about_its_rows(table_2):
    stem = table_2[0]
    text = Path(f'{stem}.md').read_text()
    assert 'dpm-solver-3@log-snr: its 5 evaluations make 2 steps.' in text
    assert 'teacher ddim-10' in text
    card = read_card(stem)
    assert card['teacher'] == 'ddim-10'
    assert 'VPPath' in card['identity']['path']
    assert re.fullmatch('[0-9a-f]{64}', card['identity']['weights'])


def test_optimised_steps_do_not_depend_on_the_start_at_five(table_2):
    "As in the paper's table 2, where the two -opt rows are equal at N = 5."
    rmse = table_2[1].rmse
    assert np.isclose(rmse['unipc-3@optimized'], rmse['unipc-3@optimized-log-snr'], rtol=2e-2)


# the sweep over models, guidance and steps


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sweep')
    in_process(
        'sweep',
        models='fashion-mixture',
        steps='5',
        guidance='1',
        samples=20,
        seeds='0,1',
        screen='4,8,16',
        teacher_steps=10,
        processes=1,
        reports_dir=str(folder),
    )
    return {n: pd.read_csv(folder / f'{n}.csv') for n in ('sweep', 'sweep_all', 'sweep_screen')}


def errors_of(solver, seed, n):
    "Errors to Euler-10 on noise of a seed, by `sample` alone."
    net = load_model('fashion-mixture')
    noise = indexed_noise(range(n), net.sample_shape, seed)
    labels = torch.arange(n) % 10
    ends = [sample(Field(net), noise, s, labels) for s in (solver, euler(10))]
    return (ends[0] - ends[1]).double().flatten(1).square().mean(1).sqrt()


def test_the_sweep_chooses_on_other_noise_than_it_reports(sweep):
    screened = sweep['sweep_screen']
    best = sweep['sweep'].iloc[0]
    classical = screened[screened.role == 'classical']
    assert classical.samples.value_counts().to_dict() == {4: 69, 8: 20, 16: 10}
    finalists = classical[classical.samples == 16].set_index('solver').mean_error
    assert best.best_classical == finalists.idxmin()
    again = errors_of(get_solver(best.best_classical, 5), SCREEN_SEED, 16)
    assert np.isclose(again.mean(), finalists.min(), rtol=1e-4)


def test_the_sweep_reports_what_sampling_gives(sweep):
    best, rows = sweep['sweep'].iloc[0], sweep['sweep_all']
    assert (rows.nfe == 5).all() and set(rows.seed) == {0, 1}
    means = {}
    for role, name in (('classical', best.best_classical), ('searched', 'fashion-mixture')):
        by_seed = [errors_of(get_solver(name, 5), seed, 20) for seed in (0, 1)]
        means[role] = torch.cat(by_seed).mean()
        rmse = np.mean([e.square().mean().sqrt() for e in by_seed])
        assert np.isclose(best[f'rmse_{role}'], rmse, rtol=1e-4)
        assert np.isclose(best[f'mean_error_{role}'], means[role], rtol=1e-4)
    assert np.isclose(best.ratio_searched, means['searched'] / means['classical'], rtol=1e-4)
    assert best.ratio_searched_low < best.ratio_searched < best.ratio_searched_high


def test_the_noise_of_the_screening_cannot_be_reported(tmp_path):
    with pytest.raises(ValueError, match='9999 is the seed of the screening'):
        in_process('sweep', models='fashion-mixture', seeds='9999', reports_dir=str(tmp_path))
