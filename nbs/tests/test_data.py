"The data set and the committed files made from it."

import gzip
import hashlib
import re
import struct

import numpy as np
import pytest
import torch
from notebooks import run_notebook

from neuralsolver.data import (
    balanced_indices,
    CLASSES,
    fashion_mnist,
    find_idx,
    to_float,
    to_uint8,
)
from neuralsolver.metrics import compute_metrics
from neuralsolver.fashion_features import (
    extractor_name,
    import_torch_fidelity,
    load_reference,
    real_test,
)
from neuralsolver.utils import data_file, sha256


def dataset(split):
    try:
        return fashion_mnist(split)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def committed():
    with np.load(data_file('fashion_mixture.npz')) as f:
        return f['images'], f['labels']


@pytest.fixture(scope='session')
def small_dataset(tmp_path_factory):
    "IDX files of the committed images, 800 a class for training and 200 for the test."
    folder = tmp_path_factory.mktemp('idx')
    images, labels = committed()
    for prefix, times in (('train', 4), ('t10k', 1)):
        arrays = {
            'images-idx3': np.tile(images[:, 0], (times, 1, 1)),
            'labels-idx1': np.tile(labels.astype(np.uint8), times),
        }
        for stem, array in arrays.items():
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
            (folder / f'{prefix}-{stem}-ubyte').write_bytes(head + array.tobytes())
    return folder


# fidelity


@pytest.mark.parametrize(
    'split, count, digest', [('train', 60_000, '2e487a6c'), ('test', 10_000, 'c867c93f')]
)
def test_fidelity_of_the_data_set(split, count, digest):
    images, labels = dataset(split)
    assert images.shape == (count, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest().startswith(digest)
    assert labels.bincount().tolist() == [count // len(CLASSES)] * len(CLASSES)


def test_fidelity_of_the_loader_to_torchvision(tmp_path):
    images, labels = dataset('test')
    import_torch_fidelity()  # makes torchvision importable
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / 'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for stem in ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'):
        path = find_idx(stem, None)
        content = path.read_bytes()
        (raw / stem).write_bytes(gzip.decompress(content) if path.suffix == '.gz' else content)
        (raw / stem.replace('t10k', 'train')).touch()  # torchvision asks that all four exist
    theirs = FashionMNIST(tmp_path, train=False, download=False)
    assert torch.equal(theirs.data, images[:, 0]) and torch.equal(theirs.targets, labels)
    assert all(map(torch.equal, fashion_mnist('test', tmp_path), (images, labels)))


def test_fidelity_of_the_mixture_centres():
    "The first 200 images of each class."
    centres, classes = committed()
    images, labels = dataset('train')
    for c in range(10):
        first = [i for i, label in enumerate(labels.tolist()) if label == c][:200]
        assert (centres[classes == c] == images[first].numpy()).all()
    assert torch.equal(labels[balanced_indices(labels, 20)], torch.arange(200) % 10)


def test_fidelity_of_the_uint8_rule():
    "The paper's; in float32 whatever half precision a network runs in."
    x = torch.linspace(-1.2, 1.2, 100_003, dtype=torch.float64)
    expected = np.floor(np.clip((x.numpy() + 1) * 127.5 + 0.5, 0, 255)).astype(np.uint8)
    assert (to_uint8(x).numpy() == expected).all()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(to_uint8(x.to(dtype)), to_uint8(x.to(dtype).float()))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_fidelity_of_the_card():
    "It states the hashes of the files."
    card = data_file('README.md').read_text()
    for name in ('mixture.npz', 'classifier.safetensors', 'reference.safetensors'):
        file = data_file(f'fashion_{name}')
        assert f'## {file.name}\n\n`{sha256(file)}`' in card


# refusal


def test_refusal_of_a_named_folder_without_files(tmp_path, monkeypatch):
    monkeypatch.setenv('NEURALSOLVER_FASHION_MNIST', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        fashion_mnist('test')


# notebooks


def test_notebook_make_data_makes_the_committed_file(tmp_path, small_dataset):
    "Compared by values, as the compressed bytes may depend on zlib."
    run_notebook('studies/make_data', root=small_dataset, out_dir=tmp_path)
    with np.load(tmp_path / 'fashion_mixture.npz') as made:
        for key, values in zip(('images', 'labels'), committed()):
            assert (made[key] == values).all()


def test_notebook_train_classifier_makes_what_the_metrics_accept(tmp_path, small_dataset):
    small = dict(epochs=1, batch_size=50, validation=4000)
    run_notebook('studies/train_classifier', root=small_dataset, out_dir=tmp_path, **small)
    classifier = tmp_path / 'fashion_classifier.safetensors'
    reference = tmp_path / 'fashion_reference.safetensors'
    assert extractor_name(classifier) != extractor_name()
    samples = real_test(500, classifier, reference)
    metrics = compute_metrics(*samples, load_reference(classifier, reference))
    assert metrics['accuracy'] > 0.5 and metrics['fd'] < 20


# licences


def test_published_tables_carry_the_notice_of_their_source():
    "The MIT licence asks for both, in all copies: also in the wheel, which takes data/*.md."
    notice = data_file('published_solvers.LICENSE.md').read_text(encoding='utf-8')
    assert 'MIT License' in notice and 'Copyright (c) 2024 wang shuai' in notice
    assert 'shall be included in all copies' in notice and 'WITHOUT WARRANTY' in notice
    readme = data_file('README.md').read_text(encoding='utf-8')
    assert readme.count('published_solvers.LICENSE.md') >= 2


def test_citation_names_the_paper_and_the_version():
    root = data_file('README.md').parents[1]
    if not (root / 'settings.ini').exists():
        pytest.skip('not a clone')
    text = (root / 'CITATION.cff').read_text(encoding='utf-8')
    version = re.search(r'(?m)^version = (\S+)', (root / 'settings.ini').read_text())[1]
    assert f'\nversion: {version}\n' in text and 'arXiv:2505.21114' in text
    paper = text[text.index('preferred-citation') :]
    assert (
        re.findall(r'family-names: (\w+)', paper) == 'Wang Li Zhang Song Li Ge Zheng Wang'.split()
    )
