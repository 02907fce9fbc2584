"""Metrics: fidelity to ADM's evaluator (golden data) and to formulas written out here, determinism, batch-size independence, conventions.

data/golden/metrics_golden.*: outputs of openai/guided-diffusion evaluations/evaluator.py; tolerances are the ones stated with the data."""

import json, os, subprocess, sys
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from neuralsolver.data import fashion_mnist, to_float
from neuralsolver.fashion_features import (
    Features,
    Reference,
    extract,
    extractor_name,
    import_torch_fidelity,
    load_classifier,
    load_reference,
    read_card,
    real_test,
    register_extractor,
)
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
from neuralsolver.utils import data_file, data_root


@pytest.fixture(scope='module')
def golden():
    folder = data_root() / 'golden'
    if not folder.is_dir():
        pytest.skip('golden data are in the repository, not in the wheel')
    return json.loads((folder / 'metrics_golden.json').read_text()), load_file(
        folder / 'metrics_golden.safetensors'
    )


@pytest.fixture(scope='module')
def images():
    with np.load(data_file('fashion_mixture.npz')) as f:
        return torch.from_numpy(f['images'])


def symmetric_frechet(one, two):
    "The same distance through a symmetric eigenproblem, where no eigenvalue can be complex."
    (m1, s1), (m2, s2) = one, two
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clip(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clip(0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


# fidelity


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
    assert frechet_distance(one, two) == pytest.approx(
        expected['fid'][key]['frechet_distance_1_2'], rel=rel
    )
    assert frechet_distance(two, one) == pytest.approx(
        expected['fid'][key]['frechet_distance_1_2'], rel=rel
    )
    assert symmetric_frechet(one, two) == pytest.approx(
        expected['fid'][key]['frechet_distance_1_2'], rel=rel
    )
    assert abs(frechet_distance(one, one)) < 1e-4


@pytest.mark.parametrize('n', [8, 30, 64, 65, 300])
def test_frechet_distance_on_our_features_below_and_above_their_dimension(n):
    features = moments(real_test(n)[0].features)
    assert frechet_distance(features, load_reference()[:2]) == pytest.approx(
        symmetric_frechet(features, load_reference()[:2]), rel=1e-6
    )


def test_inception_score_is_adms(golden):
    expected, tensors = golden
    logits = tensors['is/preds'].double().log()  # softmax gives the rows back
    assert inception_score(logits) == pytest.approx(
        expected['inception_score']['split_size_5000'], rel=1e-6
    )
    # ADM's consecutive splits, the shorter last one with full weight
    by_split = [inception_score(part) for part in logits.split(500)]
    assert np.mean(by_split) == pytest.approx(
        expected['inception_score']['split_size_500'], rel=1e-6
    )


def test_inception_score_splits_at_5000_as_adm():
    logits = 3 * torch.randn(10_000, 10, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    score = lambda p: ((p * (p / p.mean(0)).log()).sum(1).mean().exp()).item()
    assert inception_score(logits[:5000]) == pytest.approx(score(p[:5000]), rel=1e-12)
    assert inception_score(logits) == pytest.approx(
        (score(p[:5000]) + score(p[5000:])) / 2, rel=1e-12
    )
    assert inception_score(logits[:6000]) == pytest.approx(
        (score(p[:5000]) + score(p[5000:6000])) / 2, rel=1e-12
    )  # a shorter last split counts as much


def test_precision_and_recall_are_adms(golden):
    expected, tensors = golden
    sample, real = tensors['pr/features_sample'], tensors['pr/features_ref']
    precision, recall = precision_recall(sample, real)
    assert precision == pytest.approx(expected['precision_recall']['precision'], abs=1e-6)
    assert recall == pytest.approx(expected['precision_recall']['recall'], abs=1e-6)
    assert (
        expected['precision_recall']['precision'] != expected['precision_recall']['recall']
    )  # so the order matters


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
    a, b = (
        torch.randn(n, d, generator=g),
        torch.randn(m, d, generator=g) * (1.1 if d < 2048 else 1) + (0.1 if d < 2048 else 0),
    )
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, verbose=False)
    assert (
        precision_recall(a, b) == pytest.approx((theirs['precision'], theirs['recall']), rel=1e-6)
        and 0 < theirs['recall']
    )
    assert inception_score(a) == pytest.approx(
        isc_features_to_metric(a.double(), splits=1)['inception_score_mean'], rel=1e-6
    )
    if (
        d < 2048 and n > d
    ):  # theirs takes the eigenvalues of a product that is not symmetric; slow for 2048, and loses digits where it is singular
        assert frechet_distance(moments(a), moments(b)) == pytest.approx(
            fid_statistics_to_metric(
                *(fid_features_to_statistics(v.double()) for v in (a, b)), verbose=False
            )['frechet_inception_distance'],
            rel=1e-6,
        )


def test_frechet_distance_of_2048_singular_dimensions():
    "Against the singular values of the centred rows: tr (S1 S2)^1/2 = |X Y^T| in the nuclear norm."
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(60, 2048, generator=g, dtype=torch.float64),
        2 * torch.randn(70, 2048, generator=g, dtype=torch.float64),
    )
    x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (a, b))
    want = (
        (a.mean(0) - b.mean(0)).square().sum()
        + x.square().sum()
        + y.square().sum()
        - 2 * torch.linalg.svdvals(x @ y.T).sum()
    )
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
    assert all(torch.equal(x, y) for x, y in zip(moments(a), moments(ca))) and ca.longest == 1000
    assert inception_score(ca) == inception_score(a) and ca.longest == 5000
    ca.longest = 0
    assert (
        precision_recall(ca, cb) == precision_recall(a, b)
        and ca.longest <= 4000
        and cb.longest <= 4000
    )
    small = dict(size=700)
    assert torch.allclose(manifold_radii(a, **small), manifold_radii(a), rtol=1e-12)  # other blocks
    assert torch.allclose(
        manifold_radii(a[:800]),
        torch.cdist(a[:800].double(), a[:800].double(), compute_mode='donot_use_mm_for_euclid_dist')
        .square()
        .topk(4, largest=False)[0][:, -1],
        rtol=1e-9,
    )
    assert inside_share(a[:900], b[:900], manifold_radii(b[:900]), **small) == pytest.approx(
        (
            (torch.cdist(a[:900].double(), b[:900].double()) <= manifold_radii(b[:900]).sqrt())
            .any(1)
            .sum()
            / 900
        ).item(),
        abs=1e-7,
    )


@pytest.mark.parametrize('shift', [0, 1e4])
def test_moments_are_numpys_however_the_rows_come(shift):
    rows = shift + torch.randn(
        2345, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    want = np.cov(rows.numpy().T)
    for size in (1, 10, 999, 2345):
        m = Moments(7)
        for part in rows.split(size):
            m.add(part)
        assert np.allclose(m.result()[0], rows.mean(0), rtol=1e-13) and np.allclose(
            m.result()[1], want, atol=1e-10
        )


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
    assert (
        all(map(torch.allclose, first.result(), want))
        and len(first) == 2345
        and all(map(torch.equal, first.result(), first.result()))
    )  # asking changes nothing


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


def test_golden_numbers_through_small_blocks(golden):
    expected, tensors = golden
    one, two = (Counting(tensors[f'fid64/x{i}']) for i in (1, 2))
    assert (
        frechet_distance(moments(one, 7), moments(two, 7))
        == pytest.approx(expected['fid']['dim64']['frechet_distance_1_2'], rel=1e-6)
        and one.longest == two.longest == 7
    )
    sample, real = (Counting(tensors[f'pr/features_{n}']) for n in ('sample', 'ref'))
    for size in (3, 64):  # fewer columns than neighbours, too
        got = precision_recall(sample, real, size=size)
        assert sample.longest == real.longest == size
        assert got == pytest.approx(
            [expected['precision_recall'][k] for k in ('precision', 'recall')], abs=1e-12
        )


def test_kernel_distance_is_the_unbiased_estimator():
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(60, 5, generator=g, dtype=torch.float64),
        torch.randn(60, 5, generator=g, dtype=torch.float64) + 0.5,
    )
    k = lambda a, b: (a @ b / 5 + 1) ** 3
    n, off = 60, [(i, j) for i in range(60) for j in range(60) if i != j]
    expected = (
        sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in off) / (n * (n - 1))
        - 2 * sum(k(a, b) for a in x for b in y) / n**2
    ).item()
    assert kernel_distance(x, y) == pytest.approx(
        expected, rel=1e-9
    )  # equal sizes <= 500: every subset is the whole set


def test_kernel_distance_has_no_bias_where_frechet_distance_has_much():
    g = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(40, 8, generator=g)
    kid = np.array([kernel_distance(draw(), draw()) for _ in range(60)])
    assert (kid < 0).sum() > 10 and (kid > 0).sum() > 10
    assert abs(kid.mean()) < 3 * kid.std() / np.sqrt(len(kid))
    real, _ = real_test()
    balanced = [
        kernel_distance(real.features[i : i + 100], load_reference().features)
        for i in range(0, 2000, 100)
    ]
    order = torch.randperm(2000, generator=g)
    random = [
        kernel_distance(real.features[order[i : i + 100]], load_reference().features)
        for i in range(0, 2000, 100)
    ]
    assert (
        np.mean(balanced) < -0.3 and abs(np.mean(random)) < 0.3
    )  # unbiased for independent draws, not for balanced labels
    small, large = (
        compute_metrics(Features(real.features[:n], real.logits[:n])) for n in (100, 2000)
    )
    assert small['fd'] > 2 * large['fd']


# conventions


def test_public_entry_point_of_torch_fidelity_gives_the_same(images):
    "calculate_metrics with the registered extractor, from images to numbers; input1 = generated, input2 = real."
    fidelity = import_torch_fidelity()

    class RGB(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i].repeat(3, 1, 1)

    fake, real = 255 - images[:100], images[100:400]
    theirs = fidelity.calculate_metrics(
        input1=RGB(fake),
        input2=RGB(real),
        feature_extractor=register_extractor(),
        cuda=False,
        fid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    theirs_kid = fidelity.calculate_metrics(
        input1=RGB(fake),
        input2=RGB(real),
        feature_extractor=register_extractor(),
        cuda=False,
        kid=True,
        kid_subsets=20,
        kid_subset_size=100,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    x, y = extract(fake), extract(real)
    ours = compute_metrics(x, reference=Reference(*moments(y.features), y.features.double()))
    assert ours['fd'] == pytest.approx(
        theirs[fidelity.KEY_METRIC_FID], rel=1e-4
    )  # their means are float32
    assert ours['is'] == pytest.approx(theirs[fidelity.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert ours['kid'] == pytest.approx(theirs_kid[fidelity.KEY_METRIC_KID_MEAN], rel=1e-3)
    assert ours['precision'] == pytest.approx(theirs[fidelity.KEY_METRIC_PRECISION], abs=0.011)
    assert ours['recall'] == pytest.approx(theirs[fidelity.KEY_METRIC_RECALL], abs=0.011)


def test_extract_is_the_classifier(images):
    features, logits = extract(images[:50])
    h, z = load_classifier().features(to_float(images[:50]))
    assert torch.allclose(features, h, atol=1e-5) and torch.allclose(logits, z, atol=1e-5)


def test_committed_features_are_what_extract_gives():
    try:
        images, labels = fashion_mnist('test')
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (features, logits), classes = real_test(500)
    index = torch.stack([(labels == c).nonzero()[:50, 0] for c in range(10)], 1).flatten()
    again = extract(images[index])
    assert torch.equal(labels[index], classes)
    assert torch.allclose(features, again.features, atol=1e-4) and torch.allclose(
        logits, again.logits, atol=1e-4
    )
    accuracy = (extract(images).logits.argmax(1) == labels).double().mean().item()
    assert accuracy >= 0.91 and accuracy == pytest.approx(
        read_card(data_file('fashion_classifier.safetensors'))['test_accuracy'], abs=2e-4
    )


def test_the_name_follows_the_weights(tmp_path):
    weights, path = (
        load_file(data_file('fashion_classifier.safetensors')),
        tmp_path / 'w.safetensors',
    )
    save_file(weights, path)
    assert extractor_name(path) == extractor_name()  # other metadata, same tensors
    weights['head.bias'][0] += 1
    save_file(weights, path)
    assert (
        extractor_name(path) != extractor_name()
        and register_extractor(path) != register_extractor()
    )
    with pytest.raises(ValueError, match='train_classifier'):
        load_reference(path)


def test_files_are_small():
    assert os.path.getsize(data_file('fashion_classifier.safetensors')) <= 1_000_000
    assert os.path.getsize(data_file('fashion_reference.safetensors')) <= 1_500_000


# determinism and independence


def test_repeating_gives_identical_numbers(images):
    before = torch.random.get_rng_state()
    first, second = (
        compute_metrics(extract(images[:300]), torch.arange(300) % 10) for _ in range(2)
    )
    assert first == second and torch.equal(before, torch.random.get_rng_state())


def test_batch_size_does_not_matter(images):
    runs = [compute_metrics(extract(images[:250], batch_size=b)) for b in (50, 250, 1, 1000)]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-4, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_device_does_not_matter(images):
    on_cpu, on_gpu = extract(images[:100]), extract(images[:100], device='cuda')
    assert on_gpu.features.device.type == 'cpu' and torch.allclose(
        on_cpu.features, on_gpu.features, atol=5e-2
    )


# sanity and refusals


def test_real_is_near_noise_is_far():
    real = compute_metrics(*real_test())
    noise = torch.randint(
        0, 256, (500, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    far = compute_metrics(extract(noise), torch.arange(500) % 10)
    assert far['fd'] > 50 * real['fd'] and far['kid'] > 50 * abs(real['kid'])
    assert (
        real['precision'] > 0.6
        and real['recall'] > 0.6
        and far['precision'] < 0.5
        and far['recall'] < 0.01
    )
    assert real['accuracy'] > 0.9 and far['accuracy'] < 0.3 and far['is'] < real['is'] <= 10


def test_refusals(images):
    real, labels = real_test(20)
    with pytest.raises(ValueError, match='samples=7'):
        compute_metrics(Features(*(v[:7] for v in real)))
    with pytest.raises(ValueError, match='not finite'):
        compute_metrics(real._replace(features=real.features * float('nan')))
    with pytest.raises(ValueError, match='one of each'):
        compute_metrics(real, labels[:19])
    with pytest.raises(ValueError, match='uint8'):
        extract(images.float())
    with pytest.raises(ValueError, match='batch_size'):
        extract(images, batch_size=0)
    with pytest.raises(ValueError, match='device'):
        extract(images, device='meta')
    with pytest.raises(ValueError, match='samples'):
        real_test(2001)


def test_import_is_lazy_and_the_remedy_works_alone():
    code = (
        'import sys, neuralsolver.metrics as m\n'
        "assert not {'torchvision', 'torch_fidelity'} & set(sys.modules)\n"
        'm.import_torch_fidelity(); m.import_torch_fidelity()\n'
        'import torch, torchvision\n'
        'assert torchvision.utils.make_grid(torch.zeros(2, 1, 4, 4)).shape == (3, 8, 14)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_the_remedy_hides_no_other_failure(monkeypatch):
    import builtins

    real_import = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == 'torchvision':
            raise RuntimeError('something else')
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', broken)
    with pytest.raises(RuntimeError, match='something else'):
        import_torch_fidelity()
