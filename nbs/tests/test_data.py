"The data set and the committed files made from it."

import hashlib
import numpy as np, pytest, torch
from neuralsolver.data import CLASSES, balanced_indices, fashion_mnist, to_float, to_uint8
from neuralsolver.utils import data_file


def dataset(split):
    try:
        return fashion_mnist(split)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    'split, count, digest', [('train', 60_000, '2e487a6c'), ('test', 10_000, 'c867c93f')]
)
def test_fashion_mnist_is_the_published_data_set(split, count, digest):
    images, labels = dataset(split)
    assert (
        images.shape == (count, 1, 28, 28)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest().startswith(digest)
    assert labels.bincount().tolist() == [count // len(CLASSES)] * len(CLASSES)


def test_loader_agrees_with_torchvision(tmp_path):
    images, labels = dataset('test')
    import gzip
    from neuralsolver.data import find_idx
    from neuralsolver.metrics import import_torch_fidelity

    import_torch_fidelity()  # makes torchvision importable
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / 'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for stem in ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'):
        path = find_idx(stem, None)
        (raw / stem).write_bytes(
            gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        )
        (raw / stem.replace('t10k', 'train')).touch()  # torchvision asks that all four exist
    theirs = FashionMNIST(tmp_path, train=False, download=False)
    assert torch.equal(theirs.data, images[:, 0]) and torch.equal(theirs.targets, labels)
    assert all(torch.equal(a, b) for a, b in zip(fashion_mnist('test', tmp_path), (images, labels)))


def test_a_named_folder_is_binding(tmp_path, monkeypatch):
    monkeypatch.setenv('NEURALSOLVER_FASHION_MNIST', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        fashion_mnist('test')


def test_mixture_centres_are_the_first_200_of_each_class():
    with np.load(data_file('fashion_mixture.npz')) as f:
        centres, classes = f['images'], f['labels']
    images, labels = dataset('train')
    for c in range(10):
        first = [i for i, label in enumerate(labels.tolist()) if label == c][:200]
        assert (centres[classes == c] == images[first].numpy()).all()
    assert torch.equal(labels[balanced_indices(labels, 20)], torch.arange(200) % 10)


def test_uint8_rule_is_the_papers():
    x = torch.linspace(-1.2, 1.2, 100_003, dtype=torch.float64)
    expected = np.floor(np.clip((x.numpy() + 1) * 127.5 + 0.5, 0, 255)).astype(np.uint8)
    assert (to_uint8(x).numpy() == expected).all()
    for dtype in (
        torch.float16,
        torch.bfloat16,
    ):  # computed in float32, not in the half precision that a network may run in
        assert torch.equal(to_uint8(x.to(dtype)), to_uint8(x.to(dtype).float()))
    assert torch.equal(
        to_uint8(to_float(torch.arange(256, dtype=torch.uint8))),
        torch.arange(256, dtype=torch.uint8),
    )


@pytest.fixture(scope='module')
def small_dataset(tmp_path_factory):
    "The committed images four times over as IDX files: 800 training images a class and 200 test images."
    import struct

    folder = tmp_path_factory.mktemp('idx')
    with np.load(data_file('fashion_mixture.npz')) as f:
        images, labels = f['images'][:, 0], f['labels'].astype(np.uint8)
    for prefix, times in (('train', 4), ('t10k', 1)):
        for stem, array in (
            ('images-idx3', np.tile(images, (times, 1, 1))),
            ('labels-idx1', np.tile(labels, times)),
        ):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
            (folder / f'{prefix}-{stem}-ubyte').write_bytes(head + array.tobytes())
    return folder


def papermill(notebook, output, **parameters):
    import subprocess, sys
    from pathlib import Path

    options = [word for key, value in parameters.items() for word in ('-p', key, str(value))]
    source = Path(__file__).resolve().parent.parent / notebook
    subprocess.run(
        [sys.executable, '-m', 'papermill', str(source), str(output / source.name), *options],
        check=True,
        capture_output=True,
    )


def test_make_data_makes_the_committed_file(tmp_path, small_dataset):
    "Through the notebook; compared by values, as the compressed bytes may depend on zlib."
    papermill('studies/make_data.ipynb', tmp_path, root=small_dataset, out_dir=tmp_path)
    with (
        np.load(tmp_path / 'fashion_mixture.npz') as made,
        np.load(data_file('fashion_mixture.npz')) as committed,
    ):
        assert all((made[key] == committed[key]).all() for key in ('images', 'labels'))


def test_train_classifier_makes_files_that_the_metrics_accept(tmp_path, small_dataset):
    from neuralsolver.metrics import compute_metrics, extractor_name, load_reference, real_test

    papermill(
        'studies/train_classifier.ipynb',
        tmp_path,
        root=small_dataset,
        out_dir=tmp_path,
        epochs=1,
        batch_size=50,
        validation=4000,
    )
    classifier, reference = (
        tmp_path / 'fashion_classifier.safetensors',
        tmp_path / 'fashion_reference.safetensors',
    )
    assert extractor_name(classifier) != extractor_name()
    metrics = compute_metrics(
        *real_test(500, classifier, reference), load_reference(classifier, reference)
    )
    assert metrics['accuracy'] > 0.5 and metrics['fd'] < 20


def test_the_card_states_the_hashes_of_the_files():
    from neuralsolver.utils import sha256

    card = data_file('README.md').read_text()
    for name in (
        'fashion_mixture.npz',
        'fashion_classifier.safetensors',
        'fashion_reference.safetensors',
    ):
        assert f'## {name}\n\n`{sha256(data_file(name))}`' in card
