"claims.ipynb: its statistics against closed forms and other libraries, and a small run of all of it."

import json, math, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, scipy.stats, torch
import neuralsolver as ns
from neuralsolver.classical import adams_bashforth

NBS = Path(__file__).resolve().parent.parent
CELLS = [
    c
    for c in json.loads((NBS / 'claims.ipynb').read_text(encoding='utf-8'))['cells']
    if c['cell_type'] == 'code'
]


def checked(reports_dir, **parameters):
    "The cells up to the checks of the parameters."
    space = {'__name__': '__main__'}
    exec(''.join(CELLS[0]['source']), space)
    space.update(dict(reports_dir=str(reports_dir)) | parameters)
    exec(''.join(CELLS[1]['source']), space)
    return space


@pytest.fixture(scope='module')
def claims(tmp_path_factory):
    "The functions of the notebook, nothing measured."
    space = checked(tmp_path_factory.mktemp('claims'), bootstrap=300)
    for c in CELLS:
        if 'functions' in c['metadata'].get('tags', []):
            exec(''.join(c['source']), space)
    return space


@pytest.mark.parametrize(
    'bad',
    [
        dict(seeds='1,10000'),
        dict(seeds='a'),
        dict(steps='4'),
        dict(networks='nope'),
        dict(networks='fashion-mixture'),
        dict(exact_samples=7),
        dict(bootstrap=0),
        dict(guided_samples=99),
        dict(device='tpu'),
    ],
)
def test_bad_parameters_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=next(iter(bad)) if 'networks' not in bad else 'model'):
        checked(tmp_path, **bad)


def test_every_verdict_can_be_reached(claims):
    verdict, every = claims['verdict'], claims['every']
    assert [
        verdict(*ci, (0, 1)) for ci in ((0.2, 0.9), (1.1, 1.5), (0.9, 1.1), (math.nan, 1.0))
    ] == ['confirmed', 'refuted', 'not at this scale', 'not measured']
    assert [
        verdict(*ci, (-0.05, 0.05))
        for ci in ((-0.04, 0.04), (-0.2, -0.1), (0.06, 0.1), (-0.06, 0.0))
    ] == ['confirmed', 'refuted', 'refuted', 'not at this scale']  # equivalence has two outsides
    assert [verdict(*ci, (0.5, 2), (-2, 0.3)) for ci in ((0.6, 0.9), (0, 0.2), (0.32, 0.45))] == [
        'confirmed',
        'refuted',
        'not at this scale',
    ]  # between the two ranges
    assert (
        every(['confirmed', 'not measured', 'confirmed']) == 'confirmed'
        and every(['confirmed', 'refuted', 'not at this scale']) == 'refuted'
    )
    assert (
        every(['confirmed', 'not at this scale']) == 'not at this scale'
        and every(['not measured']) == every([]) == 'not measured'
    )


def test_statistics(claims):
    rng = np.random.default_rng(1)
    base = rng.uniform(1, 2, 50)
    assert np.allclose(
        claims['paired_ratio'](4 * base, [base, 9 * base]), 2, rtol=1e-12
    )  # paired: no spread, and the better baseline
    assert claims['share_interval'](0, 10) == pytest.approx((0, 1 - 0.025**0.1)) and claims[
        'share_interval'
    ](10, 10) == pytest.approx((0.025**0.1, 1))
    ci = scipy.stats.binomtest(3, 11).proportion_ci(method='exact')
    assert claims['share_interval'](3, 11) == pytest.approx((ci.low, ci.high))
    one = rng.normal(size=(30, 2))
    assert claims['rank_correlation']([one]) == pytest.approx(
        scipy.stats.spearmanr(*one.T).statistic
    )
    steps = [
        np.c_[a := rng.normal(size=8), -a] + 100 * k for k in range(3)
    ]  # against each other within the groups, together over all
    assert (
        claims['rank_correlation'](steps) == pytest.approx(-1)
        and scipy.stats.spearmanr(*np.concatenate(steps).T).statistic > 0.5
    )
    value, low, high, n = claims['rank_interval'](
        [np.c_[x := rng.normal(size=40), x + rng.normal(size=40)]]
    )
    assert low < value < high and n == 40 and low > 0
    x, y = np.arange(9.0), 2 * np.arange(9.0) + rng.normal(size=9) * 0.1
    slope, low, high = claims['slope_interval'](x, y)
    fit = np.polyfit(x, y, 1, cov=True)
    assert slope == pytest.approx(fit[0][0]) and (high - low) / 2 == pytest.approx(
        scipy.stats.t.ppf(0.975, 7) * fit[1][0, 0] ** 0.5
    )
    assert claims['fraction_left'](3.0, [5.0, 7.0], 1.0, [0, 0, 0, 0])[0] == 0.5
    normal, t = (claims['fraction_left'](3.0, [5.0, 7.0], 1.0, [0.05] * 4, df) for df in (None, 3))
    assert (
        t[0] == normal[0] and t[1] < normal[1] < 0.5 < normal[2] < t[2]
    )  # fewer degrees of freedom, wider


def test_slopes_within_groups(claims):
    "Against least squares with one constant per group; group means must not act as a trend, and cost degrees of freedom."
    rng = np.random.default_rng(2)
    group = np.repeat([7, 3, 5], [5, 4, 6])
    x = rng.normal(size=15) + group
    y = 0.7 * x - 3 * group + rng.normal(size=15) * 0.2
    design = np.c_[x, group[:, None] == np.unique(group)]
    beta, residual, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    half_width = scipy.stats.t.ppf(0.975, 15 - 4) * math.sqrt(
        residual[0] / (15 - rank) * np.linalg.inv(design.T @ design)[0, 0]
    )
    assert (
        claims['slope_interval'](pd.Series(x), pd.Series(y), pd.Series(group))
        == pytest.approx((beta[0], beta[0] - half_width, beta[0] + half_width))
        and claims['slope_interval'](x, y)[0] < 0
    )
    assert math.isnan(
        claims['slope_interval']([0.0, 1, 2], [0.0, 1, 3], [0, 0, 1])[1]
    )  # two groups and a slope leave nothing of three runs


def test_ratios_on_two_paths_and_of_distances(claims):
    rng = np.random.default_rng(3)
    e, floor = rng.uniform(1, 2, 40), rng.uniform(1, 2, (3, 40))
    f = claims['ratio_of_ratios']
    assert np.allclose(f(e, floor, e, floor), 1, rtol=1e-12) and np.allclose(
        f(9 * e, floor, e, floor), 3, rtol=1e-12
    )  # the same noises on both: no spread
    value, low, high = f(e, floor, e[::-1], 4 * floor)
    one = lambda a, b: np.sqrt(a.mean() / b.mean(1).min())
    assert value == pytest.approx(one(e, floor) / one(e, 4 * floor)) and low < value < high
    value, low, high = claims['distance_ratio'](6.0, 3.0, (0.3, 0.2), 3)
    assert value == 2 and math.log(high / 2) == pytest.approx(math.log(2 / low)) == pytest.approx(
        3.182446305 * math.hypot(0.05, 0.2 / 3)
    )  # t(3), 97.5 %
    assert math.isnan(claims['distance_ratio'](6.0, 3.0, (0.3, 0.2), 0)[1])


def coefficients(claims, mixture, count=64, N=8):
    "Best coefficient of the evaluation before, for every trajectory and step, on true trajectories."
    noise = torch.randn(
        count,
        *mixture.sample_shape,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    teacher = ns.teachers.teacher_trajectories(
        mixture, noise, solver=adams_bashforth(2000, 4), progress=False
    )
    nodes = torch.linspace(0, 1, N + 1, dtype=torch.float64)
    x, v = claims['exact_history'](mixture, teacher, nodes)
    return torch.stack(
        [
            claims['best_coefficients'](*claims['step_statistics'](x, v, nodes, i, 2)[1:])[:, 0]
            for i in range(1, N)
        ]
    )


def test_nothing_depends_on_x_in_a_linear_field(claims):
    "One Gaussian at 0: x(t) = x(0) s(t), s^2 = (t std)^2 + (1 - t)^2, so C has a closed form without x; two Gaussians: it depends on x."
    std, N = 0.3, 8
    C = coefficients(claims, ns.GaussianMixture(torch.zeros(1, 3, dtype=torch.float64), std))
    t = np.arange(N + 1) / N
    s = np.sqrt((t * std) ** 2 + (1 - t) ** 2)
    slope = (t * std**2 - (1 - t)) / s
    i = np.arange(1, N)
    closed = ((s[i + 1] - s[i]) * N - slope[i]) / (slope[i - 1] - slope[i])
    assert np.allclose(C.mean(1), closed, rtol=1e-4) and (C.std(1) < 1e-6 * C.abs().mean(1)).all()
    other = coefficients(
        claims,
        ns.GaussianMixture(torch.tensor([[1.0, 0, 0], [-1, 0, 1]], dtype=torch.float64), std),
    )
    assert (other.std(1) > 0.05 * other.abs().mean(1)).any()


def test_least_squares_is_the_best_constant_and_the_mean_is_not(claims):
    "Squared errors by Gram matrices equal those of vectors; the mean of the coefficients is the best constant only for equal lengths (orthonormal v)."
    g = torch.Generator().manual_seed(3)
    x, v = (torch.randn(4, 20, 50, generator=g, dtype=torch.float64) for _ in range(2))
    nodes = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    s = claims['step_statistics'](x, v, nodes, 2, 3)
    c = torch.tensor([0.3, -0.7], dtype=torch.float64)
    direct = (
        ((x[3] - x[2]) / 0.5 - v[2] - c[0] * (v[1] - v[2]) - c[1] * (v[0] - v[2])).square().mean(1)
    )
    assert torch.allclose(claims['squared_error'](*s, c.expand(20, 2)), direct)
    loss = lambda c: claims['squared_error'](*s, c.expand(20, 2)).mean().item()
    least, mean = (
        claims['best_coefficients'](s[1].sum(0), s[2].sum(0)),
        claims['best_coefficients'](s[1], s[2]).mean(0),
    )
    assert loss(least) < loss(mean) and all(
        loss(least + d) > loss(least) for d in 1e-3 * torch.eye(2, dtype=torch.float64)
    )
    each = claims['best_coefficients'](s[1], s[2])
    vector = np.linalg.lstsq(
        np.stack([(v[1] - v[2])[0], (v[0] - v[2])[0]], 1),
        ((x[3] - x[2]) / 0.5 - v[2])[0].numpy(),
        rcond=None,
    )[0]
    assert np.allclose(each[0], vector)


def test_the_bound_is_tight_without_feedback_and_broken_with_it(claims):
    "v = 0: errors add up to what the weights say. v = a x, two Euler steps, a constant error: 1 + a / 4 times the bound, by hand."
    noise, solver = torch.zeros(5, 7, dtype=torch.float64), ns.adam2(6)
    nothing = lambda x, t: 0 * x
    for kind in claims['KINDS']:
        still, moved = claims['bound_ratios'](nothing, noise, None, solver, kind, 0.1)
        assert np.allclose(still, moved) and (still <= 1).all()
    euler = claims['bound_ratios'](nothing, noise, None, ns.euler(4), 'smooth', 0.1)
    assert np.allclose(euler, 1)
    still, moved = claims['bound_ratios'](
        lambda x, t: 2 * x, noise, None, ns.euler(2), 'smooth', 0.1
    )
    assert np.allclose(still, 1) and np.allclose(moved, 1.5)


def test_local_errors(claims):
    "v = t: a Euler step of length h misses h^2 / 2, an Adams step after the first nothing."
    field = lambda x, t: torch.ones_like(x) * t
    teacher = ns.teachers.teacher_trajectories(
        field,
        torch.zeros(3, 4, dtype=torch.float64),
        solver=adams_bashforth(200, 4),
        progress=False,
    )
    assert np.allclose(
        claims['local_errors'](field, teacher, ns.euler(5)), 5 * 0.2**2 / 2, rtol=1e-2
    ) and np.allclose(claims['local_errors'](field, teacher, ns.adam2(5)), 0.2**2 / 2, rtol=1e-2)


def test_small_run(tmp_path):
    "By papermill; evidence is read from the folder that is written to; what is in the files agrees with other ways to get it."
    (tmp_path / 'search_study').mkdir()
    for f in (
        'search_study/table.csv',
        'curves_sit-tiny.csv',
        'curves_sit-tiny.json',
        'eval_dit-tiny_8.csv',
        'eval_dit-tiny_8.json',
    ):
        shutil.copy(NBS.parent / 'reports' / f, tmp_path / f)
    study = pd.read_csv(tmp_path / 'search_study/table.csv')
    pd.DataFrame(
        {
            'model': ['sit-tiny', 'sit-tiny'],
            'steps': [5, 8],
            'ours': [0.1, 0.1],
            'ours_sd': [0.001, 0.001],
            'order 2': [np.nan, 1.5],
        }
    ).to_csv(tmp_path / 'search_study/limits.csv', index=False)
    small = dict(
        exact_samples=8,
        network_samples=4,
        guided_samples=2,
        steps='5,8',
        networks='sit-tiny',
        guidance_scales='1,2',
        teacher_steps=20,
        search_iterations=2,
        bootstrap=50,
        reports_dir=tmp_path,
    )
    options = [w for k, v in small.items() for w in ('-p', k, str(v))]
    run = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            str(NBS / 'claims.ipynb'),
            str(tmp_path / 'out.ipynb'),
            '--log-level',
            'ERROR',
            *options,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    table = pd.read_csv(tmp_path / 'claims.csv')
    assert (
        table.id.is_unique
        and len(table) > 40
        and table.rule.str.startswith('confirmed if').all()
        and table.meaning.notna().all()
    )
    assert (
        set(table.verdict)
        <= {'confirmed', 'refuted', 'not at this scale', 'undecided', 'not measured'}
        and (table.low[table.n > 0] <= table.value[table.n > 0] + 1e-9).all()
    )
    single = table[(table.n == 1) & table.id.str.match(r'^(?:2[ab]|8[a-f]|10)')]
    assert ((single.n_confirmed == 1) == (single.verdict == 'confirmed')).all()
    row = table.set_index('id')
    on_paper = row.index.isin('4c 6b 6d 7a 8a 8b 8c 8d 8e 8f 10a 10c 11a 11b'.split())
    assert (
        not (row.verdict[on_paper] == 'not at this scale').any()
        and not (row.verdict[~on_paper] == 'undecided').any()
        and row.verdict['8c'] == 'undecided'
    )
    assert set(row.index[row.whose == 'ours']) == set(
        '2c 2d 2e 5b 5c 5e 7b 7c 9b 9c 10b 10d'.split()
    ) and set(row.whose) == {'ours', 'paper'}
    assert (
        row.n['9c'] == 1
        and row.verdict['9c'] == 'confirmed'
        and row.case['9c'] == 'sit-tiny, N = 8'
        and row.verdict['11c'] == 'not measured'
    )  # no sweep in the folder
    fd = pd.read_csv(tmp_path / 'curves_sit-tiny.csv').set_index(['solver', 'steps'])
    least = fd.loc[[('adam2', 10), ('adam4', 10)]].sort_values('fd').iloc[0]
    teacher = fd.xs('teacher').iloc[0]
    closed = least.fd - teacher.fd <= max(least.fd_sd, teacher.fd_sd)
    assert (row.n['4b'] == 0) == closed and ('sit-tiny' in row.note['4b']) == closed
    teacher = pd.read_csv(tmp_path / 'eval_dit-tiny_8.csv').set_index('solver').fd['teacher']
    assert f'{teacher:.3g}' in row.note['11d'] and row.n['11d'] == 1
    part = study[
        (study.model == 'fashion-mixture')
        & (study.steps == 8)
        & study.label.str.match(r'^(?:ours|samples-\d+)$')
    ]
    log_x = np.log2(part.label.map(lambda l: 256 if l == 'ours' else int(l.split('-')[1])))
    dummies = np.c_[log_x, part.seed.to_numpy()[:, None] == part.seed.unique()].astype(float)
    assert row.value['6c'] == pytest.approx(
        np.linalg.lstsq(dummies, np.log(part.rmse_exact), rcond=None)[0][0], rel=1e-3
    )
    text = (tmp_path / 'claims.md').read_text()
    counted = text.splitlines()[2]
    assert (
        f'{(table.whose == "paper").sum()} claims of the paper' in counted
        and '12 questions of ours' in counted
    )
    assert (
        all(f'| {i} |' in text for i in table.id)
        and len({l.count('|') for l in text.splitlines() if l.startswith('|')}) == 1
    )  # no cell holds a bar
    bound = (
        pd.read_csv(tmp_path / 'claims_bound.csv').set_index(['solver', 'steps']).bound
    )  # Euler: 1; Adams 2 after one Euler step: (1 + 2 (N - 1)) / N
    for n in (5, 8):
        assert np.allclose(bound['euler', n], 1) and np.allclose(bound['adam2', n], 2 - 1 / n)
    pairs = pd.read_csv(tmp_path / 'claims_reported_pairs.csv')
    worse = pairs[(pairs.id == '8c') & (pairs.a > pairs.b)]
    assert worse.steps.tolist() == [6]  # paper.md 2.5: at NFE 6 searched is worse
    fig4 = pairs[pairs.id == '8a']
    assert len(fig4) == 18 and (fig4.a < fig4.b).all()
    nodes = pd.read_csv(tmp_path / 'claims_nodes.csv')
    mine = nodes[(nodes.solver == 'sit-xl-2') & (nodes.steps == 10)].time
    assert np.allclose(
        mine, [0.0279, 0.0758, 0.1404, 0.2063, 0.3108, 0.4174, 0.5529, 0.7151, 0.9093], atol=2e-4
    )  # paper.md 3
    paired = pd.read_csv(tmp_path / 'claims_paired.csv')
    assert (
        len(paired[paired.id == '5h']) == len(paired[paired.id == '5e']) == 8
        and (paired.ratio[paired.id == '5h'] - 1).abs().max() < 0.5
    )
    own = paired[paired.id == '4a']
    assert np.allclose(
        own.ratio,
        own.rmse / own[['rmse_baseline_adam2', 'rmse_baseline_adam4']].min(axis=1),
        rtol=1e-4,
    ) and set(own.used_on) == {'fashion-mixture', 'sit-tiny'}
    assert set(json.loads((tmp_path / 'claims.json').read_text())['parameters']) >= set(small) - {
        'reports_dir'
    }
    for figure in ('x_dependence', 'bound', 'transfer', 'noise', 'nodes'):
        assert (tmp_path / f'claims_{figure}.png').stat().st_size > 5000
