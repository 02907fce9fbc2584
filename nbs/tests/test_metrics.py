"""Metrics: fidelity to ADM's evaluator (golden data), to torch-fidelity, and to formulas.

data/golden/metrics_golden.* are outputs of openai/guided-diffusion evaluations/evaluator.py;
the tolerances are those stated with the data.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neuralsolver.fashion_features import Features, import_torch_fidelity, load_reference, real_test
from neuralsolver.metrics import (
    Moments,
    compute_metrics,
    frechet_distance,
    inception_score,
    inside_share,
    kernel_distance,
    manifold_radii,
    moments,
    precision_recall,
)
from neuralsolver.utils import data_root


@pytest.fixture(scope='module')
def golden():
    "Numbers and tensors of ADM's evaluator."
    folder = data_root() / 'golden'
    if not folder.is_dir():
        pytest.skip('golden data are in the repository, not in the wheel')
    expected = json.loads((folder / 'metrics_golden.json').read_text())
    return expected, load_file(folder / 'metrics_golden.safetensors')


def symmetric_frechet(one, two):
    "The same distance through a symmetric eigenproblem, where no eigenvalue can be complex."
    (m1, s1), (m2, s2) = one, two
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clip(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clip(0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


@pytest.mark.parametrize(
    'case, key, rel',
    [
        ('fid16', 'dim16', 1e-6),
        ('fid64', 'dim64', 1e-6),
        ('fid64_singular', 'dim64_singular', 1e-5),
    ],
)
def test_frechet_distance_is_adms(golden, case, key, rel):
    expected, tensors = golden
    one, two = (moments(tensors[f'{case}/x{i}']) for i in (1, 2))
    for i, (mu, sigma) in enumerate((one, two), 1):
        assert torch.allclose(mu, tensors[f'{case}/mu{i}'].double(), rtol=1e-6, atol=1e-6)
        assert torch.allclose(sigma, tensors[f'{case}/sigma{i}'], rtol=1e-10, atol=1e-12)
    want = pytest.approx(expected['fid'][key]['frechet_distance_1_2'], rel=rel)
    assert frechet_distance(one, two) == want
    assert frechet_distance(two, one) == want
    assert symmetric_frechet(one, two) == want
    assert abs(frechet_distance(one, one)) < 1e-4


@pytest.mark.parametrize('n', [8, 30, 64, 65, 300])
def test_frechet_distance_on_our_features_below_and_above_their_dimension(n):
    features = moments(real_test(n)[0].features)
    assert frechet_distance(features, load_reference()[:2]) == pytest.approx(
        symmetric_frechet(features, load_reference()[:2]), rel=1e-6
    )


def test_inception_score_is_adms(golden):
    expected, tensors = golden
    want = expected['inception_score']
    logits = tensors['is/preds'].double().log()  # softmax gives the rows back
    assert inception_score(logits) == pytest.approx(want['split_size_5000'], rel=1e-6)
    # ADM's consecutive splits, the shorter last one with full weight
    by_split = [inception_score(part) for part in logits.split(500)]
    assert np.mean(by_split) == pytest.approx(want['split_size_500'], rel=1e-6)


def test_inception_score_splits_at_5000_as_adm():
    logits = 3 * torch.randn(10_000, 10, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)

    def score(p):
        return ((p * (p / p.mean(0)).log()).sum(1).mean().exp()).item()

    first = score(p[:5000])
    assert inception_score(logits[:5000]) == pytest.approx(first, rel=1e-12)
    whole = (first + score(p[5000:])) / 2
    assert inception_score(logits) == pytest.approx(whole, rel=1e-12)
    # a shorter last split counts as much
    shorter = (first + score(p[5000:6000])) / 2
    assert inception_score(logits[:6000]) == pytest.approx(shorter, rel=1e-12)


def test_precision_and_recall_are_adms(golden):
    expected, tensors = golden
    want = expected['precision_recall']
    precision, recall = precision_recall(tensors['pr/features_sample'], tensors['pr/features_ref'])
    assert precision == pytest.approx(want['precision'], abs=1e-6)
    assert recall == pytest.approx(want['recall'], abs=1e-6)
    assert want['precision'] != want['recall']  # so the order matters


def test_radii_are_adms(golden):
    tensors = golden[1]
    for name in ('sample', 'ref'):
        assert torch.allclose(
            manifold_radii(tensors[f'pr/features_{name}']),
            tensors[f'pr/radii_{name}'].double().flatten(),
            rtol=1e-5,
        )


@pytest.mark.parametrize('n, m, d', [(400, 300, 64), (37, 90, 5), (300, 280, 2048)])
def test_everything_agrees_with_torch_fidelity_on_the_same_features(n, m, d):
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    g = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    if d < 2048:
        b = b * 1.1 + 0.1
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, verbose=False)
    want = (theirs['precision'], theirs['recall'])
    assert precision_recall(a, b) == pytest.approx(want, rel=1e-6) and want[1] > 0
    want = isc_features_to_metric(a.double(), splits=1)['inception_score_mean']
    assert inception_score(a) == pytest.approx(want, rel=1e-6)
    # theirs takes the eigenvalues of a product that is not symmetric:
    # slow for 2048, and digits are lost where it is singular
    if d < 2048 and n > d:
        statistics = [fid_features_to_statistics(v.double()) for v in (a, b)]
        theirs = fid_statistics_to_metric(*statistics, verbose=False)
        want = pytest.approx(theirs['frechet_inception_distance'], rel=1e-6)
        assert frechet_distance(moments(a), moments(b)) == want


def test_frechet_distance_of_2048_singular_dimensions():
    "With the singular values of the centred rows: tr (S1 S2)^1/2 = |X Y^T| in the nuclear norm."
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 2048, generator=g, dtype=torch.float64)
    b = 2 * torch.randn(70, 2048, generator=g, dtype=torch.float64)
    x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (a, b))
    want = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    want -= 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(want.item(), rel=1e-5)


class Counting:
    "A source that says which rows were asked for."

    def __init__(self, rows):
        self.rows, self.longest = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        a, b, step = part.indices(len(self))
        assert step == 1
        self.longest = max(self.longest, b - a)
        return self.rows[part]


def test_sources_are_read_in_blocks_and_give_the_same_numbers():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9500, 6, generator=g), torch.randn(4200, 6, generator=g)
    ca, cb = Counting(a), Counting(b)
    assert all(map(torch.equal, moments(a), moments(ca)))
    assert ca.longest == 1000
    assert inception_score(ca) == inception_score(a)
    assert ca.longest == 5000
    ca.longest = 0
    assert precision_recall(ca, cb) == precision_recall(a, b)
    assert max(ca.longest, cb.longest) <= 4000


def test_radii_and_shares_in_small_blocks_are_those_of_all_distances():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9500, 6, generator=g), torch.randn(4200, 6, generator=g)
    assert torch.allclose(manifold_radii(a, size=700), manifold_radii(a), rtol=1e-12)
    few, other = a[:900], b[:900]
    exact = dict(compute_mode='donot_use_mm_for_euclid_dist')
    squares = torch.cdist(a[:800].double(), a[:800].double(), **exact).square()
    want = squares.topk(4, largest=False)[0][:, -1]
    assert torch.allclose(manifold_radii(a[:800]), want, rtol=1e-9)
    radii = manifold_radii(other)
    inside = torch.cdist(few.double(), other.double()) <= radii.sqrt()
    want = pytest.approx((inside.any(1).sum() / 900).item(), abs=1e-7)
    assert inside_share(few, other, radii, size=700) == want


def test_golden_numbers_through_small_blocks(golden):
    expected, tensors = golden
    one, two = (Counting(tensors[f'fid64/x{i}']) for i in (1, 2))
    want = pytest.approx(expected['fid']['dim64']['frechet_distance_1_2'], rel=1e-6)
    assert frechet_distance(moments(one, 7), moments(two, 7)) == want
    assert one.longest == two.longest == 7
    sample, real = (Counting(tensors[f'pr/features_{n}']) for n in ('sample', 'ref'))
    want = [expected['precision_recall'][k] for k in ('precision', 'recall')]
    for size in (3, 64):  # fewer columns than neighbours, too
        got = precision_recall(sample, real, size=size)
        assert sample.longest == real.longest == size
        assert got == pytest.approx(want, abs=1e-12)


def test_kernel_distance_is_the_unbiased_estimator():
    "Equal sizes up to 500: every subset is the whole set."
    n, g = 60, torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = torch.randn(n, 5, generator=g, dtype=torch.float64) + 0.5

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    same = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in off) / (n * (n - 1))
    mixed = sum(k(a, b) for a in x for b in y) / n**2
    want = (same - 2 * mixed).item()
    assert kernel_distance(x, y) == pytest.approx(want, rel=1e-9)


def test_kernel_distance_has_no_bias_where_frechet_distance_has_much():
    g = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(40, 8, generator=g)

    kid = np.array([kernel_distance(draw(), draw()) for _ in range(60)])
    assert (kid < 0).sum() > 10 and (kid > 0).sum() > 10
    assert abs(kid.mean()) < 3 * kid.std() / np.sqrt(len(kid))
    real, _ = real_test()
    reference = load_reference().features
    order = torch.randperm(2000, generator=g)
    parts = [slice(i, i + 100) for i in range(0, 2000, 100)]
    balanced = [kernel_distance(real.features[part], reference) for part in parts]
    random = [kernel_distance(real.features[order[part]], reference) for part in parts]
    # unbiased for independent draws, not for balanced labels
    assert np.mean(balanced) < -0.3 and abs(np.mean(random)) < 0.3
    few, many = (Features(real.features[:n], real.logits[:n]) for n in (100, 2000))
    assert compute_metrics(few)['fd'] > 2 * compute_metrics(many)['fd']


# Mean and covariance: numpy's, whatever the pieces the rows come in, also after a pause.


@pytest.mark.parametrize('shift', [0, 1e4])
def test_moments_are_numpys_however_the_rows_come(shift):
    g = torch.Generator().manual_seed(1)
    rows = shift + torch.randn(2345, 7, generator=g, dtype=torch.float64)
    want = np.cov(rows.numpy().T)
    for size in (1, 10, 999, 2345):
        m = Moments(7)
        for part in rows.split(size):
            m.add(part)
        mean, covariance = m.result()
        assert np.allclose(mean, rows.mean(0), rtol=1e-13)
        assert np.allclose(covariance, want, atol=1e-10)


@pytest.mark.parametrize('dim', [5, 2023])
def test_moments_do_not_depend_on_the_pieces_nor_on_a_pause(dim, tmp_path):
    rows = torch.randn(2345, dim, generator=torch.Generator().manual_seed(2))
    want = moments(rows)
    for size in (53, 999, 1000, 2345):
        m = Moments(dim)
        for k, part in enumerate(rows.split(size)):
            m.add(part)
            if k == 20 or size == 999:
                torch.save(m.state_dict(), tmp_path / 'm')
                m = Moments(dim).load_state_dict(torch.load(tmp_path / 'm', weights_only=True))
        assert all(map(torch.equal, m.result(), want)) and len(m) == 2345
    first, second = Moments(dim).add(rows[:1234]), Moments(dim).add(rows[1234:])
    first.merge(second)
    first.merge(Moments(dim))
    assert all(map(torch.allclose, first.result(), want)) and len(first) == 2345
    assert all(map(torch.equal, first.result(), first.result()))  # asking changes nothing


def test_moments_refuse_what_has_none():
    with pytest.raises(ValueError, match='samples=7'):
        moments(torch.zeros(7, 3))
    with pytest.raises(ValueError, match='not finite'):
        moments(torch.full((9, 3), float('nan')))
    with pytest.raises(ValueError, match=r'give \[m, 3\]'):
        Moments(3).add(torch.zeros(3))
    with pytest.raises(ValueError, match='block='):
        moments(torch.zeros(9, 3), 0)
    rows = torch.ones(4, 2, dtype=torch.float64)
    m = Moments(2).add(rows)
    rows += 1  # a buffer that is used again
    assert m.add(rows).result()[0].tolist() == [1.5, 1.5]
