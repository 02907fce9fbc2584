"""The classifier as feature extractor: conventions, determinism, independence of the batch size."""

import builtins
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuralsolver.data import fashion_mnist, to_float
from neuralsolver.fashion_features import Features, Reference, extract, extractor_name
from neuralsolver.fashion_features import import_torch_fidelity, load_classifier, load_reference
from neuralsolver.fashion_features import read_card, real_test, register_extractor
from neuralsolver.metrics import compute_metrics, moments
from neuralsolver.utils import data_file


@pytest.fixture(scope='module')
def images():
    with np.load(data_file('fashion_mixture.npz')) as f:
        return torch.from_numpy(f['images'])


class RGB(torch.utils.data.Dataset):
    "Grey images in three channels."

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].repeat(3, 1, 1)


def test_public_entry_point_of_torch_fidelity_gives_the_same(images):
    "calculate_metrics with the registered extractor; input1 = generated, input2 = real."
    fidelity = import_torch_fidelity()
    fake, real = 255 - images[:100], images[100:400]
    common = dict(
        input1=RGB(fake),
        input2=RGB(real),
        feature_extractor=register_extractor(),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    theirs = fidelity.calculate_metrics(fid=True, isc=True, prc=True, isc_splits=1, **common)
    subsets = dict(kid_subsets=20, kid_subset_size=100)
    theirs |= fidelity.calculate_metrics(kid=True, **subsets, **common)
    y = extract(real)
    reference = Reference(*moments(y.features), y.features.double())
    ours = compute_metrics(extract(fake), reference=reference)
    for key, name, tolerance in (
        ('fd', fidelity.KEY_METRIC_FID, dict(rel=1e-4)),  # their means are float32
        ('is', fidelity.KEY_METRIC_ISC_MEAN, dict(rel=1e-6)),
        ('kid', fidelity.KEY_METRIC_KID_MEAN, dict(rel=1e-3)),
        ('precision', fidelity.KEY_METRIC_PRECISION, dict(abs=0.011)),
        ('recall', fidelity.KEY_METRIC_RECALL, dict(abs=0.011)),
    ):
        assert ours[key] == pytest.approx(theirs[name], **tolerance), key


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
    assert torch.allclose(features, again.features, atol=1e-4)
    assert torch.allclose(logits, again.logits, atol=1e-4)
    accuracy = (extract(images).logits.argmax(1) == labels).double().mean().item()
    card = read_card(data_file('fashion_classifier.safetensors'))
    assert accuracy >= 0.91 and accuracy == pytest.approx(card['test_accuracy'], abs=2e-4)


def test_the_name_follows_the_weights(tmp_path):
    weights = load_file(data_file('fashion_classifier.safetensors'))
    path = tmp_path / 'w.safetensors'
    save_file(weights, path)
    assert extractor_name(path) == extractor_name()  # other metadata, same tensors
    weights['head.bias'][0] += 1
    save_file(weights, path)
    assert extractor_name(path) != extractor_name()
    assert register_extractor(path) != register_extractor()
    with pytest.raises(ValueError, match='train_classifier'):
        load_reference(path)


def test_files_are_small():
    assert os.path.getsize(data_file('fashion_classifier.safetensors')) <= 1_000_000
    assert os.path.getsize(data_file('fashion_reference.safetensors')) <= 1_500_000


def test_repeating_gives_identical_numbers(images):
    before, labels = torch.random.get_rng_state(), torch.arange(300) % 10
    first, second = (compute_metrics(extract(images[:300]), labels) for _ in range(2))
    assert first == second and torch.equal(before, torch.random.get_rng_state())


def test_batch_size_does_not_matter(images):
    runs = [compute_metrics(extract(images[:250], batch_size=b)) for b in (50, 250, 1, 1000)]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-4, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_device_does_not_matter(images):
    on_cpu, on_gpu = extract(images[:100]), extract(images[:100], device='cuda')
    assert on_gpu.features.device.type == 'cpu'
    assert torch.allclose(on_cpu.features, on_gpu.features, atol=5e-2)


def test_real_is_near_noise_is_far():
    real = compute_metrics(*real_test())
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (500, 1, 28, 28), dtype=torch.uint8, generator=g)
    far = compute_metrics(extract(noise), torch.arange(500) % 10)
    assert far['fd'] > 50 * real['fd'] and far['kid'] > 50 * abs(real['kid'])
    assert real['precision'] > 0.6 and real['recall'] > 0.6
    assert far['precision'] < 0.5 and far['recall'] < 0.01
    assert real['accuracy'] > 0.9 and far['accuracy'] < 0.3
    assert far['is'] < real['is'] <= 10


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
    real_import = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == 'torchvision':
            raise RuntimeError('something else')
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', broken)
    with pytest.raises(RuntimeError, match='something else'):
        import_torch_fidelity()
