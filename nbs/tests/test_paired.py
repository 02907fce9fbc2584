"Statistics of an evaluation: errors, distances above the teacher seed by seed, ratios to the best."

import numpy as np
import pandas as pd
import pytest
import torch

import neuralsolver as ns
from neuralsolver.evaluate import above_teacher, evaluate, evaluate_shards, ratios_to_best
from neuralsolver.evaluate import table_markdown
from neuralsolver.protocol import Protocol
from neuralsolver.utils import indexed_noise

SMALL = dict(model='fashion-mixture', steps=5, teacher_steps=10, solvers='euler,adam2,sit-xl-2')
SEEDS = (0, 3, 7)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp('shards')


@pytest.fixture(scope='module')
def protocol():
    return Protocol(**SMALL, samples=30, seeds=','.join(map(str, SEEDS)))


@pytest.fixture(scope='module')
def table(protocol, shards):
    return evaluate(protocol, False, shards)[0].set_index('solver')


def errors_by_hand(name):
    "Errors of all samples, sampled here, a row a seed [3, 10]."
    field = ns.Field(ns.load_model('fashion-mixture'), guidance=2.0)
    solver = ns.load_solver(name, 5) if name == 'sit-xl-2' else getattr(ns, name)(5)
    rows = []
    for seed in SEEDS:
        noise, labels = indexed_noise(range(10), (1, 28, 28), seed), torch.arange(10)
        x, target = (ns.sample(field, noise, s, labels) for s in (solver, ns.euler(10)))
        rows.append(((x - target).double() ** 2).mean((1, 2, 3)).sqrt().numpy())
    return np.stack(rows)


@pytest.mark.parametrize('name', ['euler', 'adam2', 'sit-xl-2'])
def test_errors_are_the_statistics_of_samples_averaged_over_seeds(table, protocol, name):
    assert protocol.guidance == 2
    errors, row = errors_by_hand(name), table.loc[name]
    by_seed = dict(
        rmse=np.sqrt((errors**2).mean(1)),
        mean_error=errors.mean(1),
        median_error=np.sort(errors, 1)[:, 4],  # torch takes the lower of the two in the middle
        strays=(errors > 0.2).mean(1),
    )
    for metric, values in by_seed.items():
        assert row[metric] == pytest.approx(values.mean(), rel=1e-4, abs=1e-9), metric
        assert row[f'{metric}_sd'] == pytest.approx(values.std(ddof=1), rel=1e-3, abs=1e-9), metric


def test_distances_above_the_teacher_are_differences_seed_by_seed(table, shards):
    differences = []
    for seed in SEEDS:  # ten images each, as above
        alone = evaluate(Protocol(**SMALL, samples=10, seeds=str(seed)), False, shards)[0]
        alone = alone.set_index('solver')
        differences.append(alone.fd['adam2'] - alone.fd['teacher'])
        assert np.isnan(alone.fd_above_sd['adam2']) and np.isnan(alone.fd_above_low['adam2'])
    row = table.loc['adam2']
    sd = np.std(differences, ddof=1)
    assert row.fd_above == pytest.approx(np.mean(differences))
    assert row.fd_above_sd == pytest.approx(sd)
    # Student's t with two degrees of freedom: 4.302653
    assert row.fd_above_high - row.fd_above == pytest.approx(4.302653 * sd / 3**0.5, rel=1e-5)
    assert row.fd_above - row.fd_above_low == pytest.approx(row.fd_above_high - row.fd_above)


def test_pairing_takes_away_what_all_rows_share():
    common = np.array([0.0, 5.0, -3.0])
    rows = [dict(fd=7 + c + d) for c, d in zip(common, (1.0, 1.1, 0.9))]
    teacher = [dict(fd=7 + c) for c in common]
    above = above_teacher(rows, teacher, 'fd')
    assert above['fd_above'] == pytest.approx(1) and above['fd_above_sd'] == pytest.approx(0.1)
    with pytest.raises(ValueError):  # another number of seeds is no pairing
        above_teacher(rows, teacher[:2], 'fd')


def test_ratio_to_the_best_classical_row_by_explicit_resampling(table):
    errors = {name: errors_by_hand(name).ravel() for name in ('euler', 'adam2', 'sit-xl-2')}
    best = min(errors['euler'].mean(), errors['adam2'].mean())
    rng, drawn = np.random.default_rng(0), []
    for _ in range(1000):
        index = rng.integers(0, 30, 30)
        means = {name: e[index].mean() for name, e in errors.items()}
        drawn.append(means['sit-xl-2'] / min(means['euler'], means['adam2']))
    row = table.loc['sit-xl-2']
    assert row.ratio == pytest.approx(errors['sit-xl-2'].mean() / best, rel=1e-4)
    assert row.ratio_low == pytest.approx(np.quantile(drawn, 0.025), rel=1e-3)
    assert row.ratio_high == pytest.approx(np.quantile(drawn, 0.975), rel=1e-3)


def test_rows_that_spend_more_are_no_baseline(tmp_path):
    given = SMALL | dict(solvers='euler,heun')  # Heun: two evaluations a step
    t = evaluate(Protocol(**given, samples=16, seeds='0'), False, tmp_path)[0].set_index('solver')
    assert t.mean_error['heun'] < t.mean_error['euler']
    assert t.ratio['euler'] == 1 and t.ratio['heun'] < 1


def test_a_row_without_baseline_or_with_samples_lost_has_no_ratio():
    errors = dict(mine=np.ones(8), lost=np.full(8, np.nan))
    assert ratios_to_best(errors, []).isna().all().all()
    assert ratios_to_best(errors, ['lost']).isna().all().all()
    assert ratios_to_best(errors | dict(rule=2 * np.ones(8)), ['rule', 'lost']).ratio['mine'] == 0.5


def test_a_sample_lost_takes_all_statistics_of_the_error(tmp_path, monkeypatch):
    def one_gone(field, x, solver, y):
        out = ns.sample(field, x, solver, y)
        return out if solver.steps == 10 else out.index_fill(0, torch.tensor([1]), float('nan'))

    monkeypatch.setattr('neuralsolver.sampling.sample', one_gone)
    given = SMALL | dict(solvers='euler')
    t = evaluate(Protocol(**given, samples=16, seeds='0'), False, tmp_path)[0].set_index('solver')
    lost = ['rmse', 'mean_error', 'median_error', 'strays', 'fd', 'fd_above', 'ratio']
    assert t.loc['euler', lost].isna().all()


def test_the_table_for_readers_is_narrow_and_says_what_its_columns_are(protocol, shards):
    frame = evaluate_shards(protocol, shards)[0]
    text = table_markdown(frame, protocol)
    head, _, *rows = [line for line in text.splitlines() if line.startswith('|')]
    assert head.count('|') == 10
    cells = {row.split('|')[1].strip(): [c.strip() for c in row.split('|')[3:-1]] for row in rows}
    mean, median = frame.mean_error[1], frame.median_error[1]
    assert cells['adam2'][0] == f'{mean:.4f} ({median:.4f})'
    assert cells['adam2'][1].endswith(' %')
    assert cells['teacher'][:3] == ['', '', ''] and cells['real'][4:] == ['', '', '']
    for word in ('Strays: share of samples', 'on the same seed', 'In the CSV as well: IS, KID'):
        assert word in text
    assert pd.Series(frame.columns).is_unique
