"""The Inception heads, references of every form, and the files for OpenAI's evaluator.

The network has random weights, as the real ones cannot be downloaded here. What does not depend
on the network runs with a small random projection in its place.
"""

import functools
import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import Counting

from neuralsolver import inception as module
from neuralsolver.image_files import NpzImages, center_crop, export_npz
from neuralsolver.inception import ImageReference, Inception, adm_reference_file, image_metrics
from neuralsolver.inception import inception_file, read_reference
from neuralsolver.metrics import Moments, moments
from neuralsolver.fashion_features import import_torch_fidelity
from neuralsolver.store import read_card


@functools.cache
def random_weights():
    """Weights of the right shapes and of He's variance.

    With PyTorch's own initialisation the features are 1e-8 and every absolute tolerance holds.
    """
    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3
    with (
        torch.random.fork_rng(),
        mock.patch.object(network, 'load_state_dict'),
        mock.patch.object(library, 'load_state_dict_from_url'),
    ):
        torch.manual_seed(0)
        weights = network('inception-v3-compat', ['2048']).state_dict()
    for name, value in weights.items():
        if name.endswith('conv.weight'):
            weights[name] = value * 6**0.5
        elif name == 'fc.weight':
            weights[name] = value * 20
    return weights


def random_inception(path):
    "A file of random weights."
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope='session')
def network(tmp_path_factory):
    return Inception(random_inception(tmp_path_factory.mktemp('inception') / 'weights.pth'))


@pytest.fixture(scope='session')
def images():
    "Squares of random colours [12, 3, 40, 40]."
    colours = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 5), dtype=np.uint8)
    return torch.from_numpy(colours).repeat_interleave(8, 2).repeat_interleave(8, 3)


# The network


@pytest.fixture(scope='session')
def network_heads(network, images):
    out = network(images[:4])
    for head in out.values():
        apart = (head[:, None] - head).abs().amax(2).fill_diagonal_(9).min()
        assert apart > 0.05  # the tolerances below tell images apart
    return out


def test_fidelity_of_the_heads_and_adms_order_of_the_spatial_one(network, images, network_heads):
    seen = {}
    branch = network.net.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda m, i, o: seen.update(branch=o))
    with torch.no_grad():
        features, logits = network.net(images[:4])
    hook.remove()
    heads = network_heads
    assert torch.equal(heads['features'], features) and torch.equal(heads['logits'], logits)
    assert heads['features'].shape == (4, 2048) and heads['logits'].shape == (4, 1008)
    # the rectified first branch is TensorFlow's mixed_6/conv; flattened: row, column, channel
    first = torch.relu(seen['branch'])[:, :7]
    assert torch.equal(heads['spatial'], first.permute(0, 2, 3, 1).reshape(4, 17 * 17 * 7))
    for i, row, column, channel in [(0, 0, 0, 0), (3, 2, 5, 6), (1, 16, 16, 1), (2, 0, 9, 3)]:
        place = (row * 17 + column) * 7 + channel
        assert heads['spatial'][i, place] == first[i, channel, row, column]
    assert torch.allclose(logits, features @ network.net.fc.weight.T, atol=1e-4)  # without the bias


def test_batch_size_independence_also_under_autocast(network, images, network_heads):
    with torch.autocast('cpu', torch.bfloat16):
        parts = [network(part) for part in images[:4].split(3)]
    for name, head in network_heads.items():
        assert torch.allclose(torch.cat([part[name] for part in parts]), head, atol=1e-4)


def test_features_are_float32_and_the_callers_flags_stay(network, images):
    seen = []
    flags = torch.backends.cudnn
    hook = network.net.Mixed_6d.register_forward_hook(lambda *a: seen.append(flags.allow_tf32))
    before = flags.allow_tf32
    try:
        for flag in (True, False):
            flags.allow_tf32 = flag
            assert not network(images[:1])['features'].is_inference()
            assert flags.allow_tf32 == flag
    finally:
        flags.allow_tf32 = before
        hook.remove()
    assert seen == [False, False]


@pytest.mark.parametrize('shape, dtype', [((2, 3, 8, 8), None), ((2, 1, 8, 8), torch.uint8)])
def test_refusal_of_images_that_are_not_bytes_in_colour(network, shape, dtype):
    with pytest.raises(ValueError, match='give uint8'):
        network(torch.zeros(shape, dtype=dtype))


def test_refusal_of_weights_that_would_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ('executed',)

    torch.save(dict(a=Evil()), tmp_path / 'weights.pth')
    with pytest.raises(Exception, match='(?i)weights.only|unsupported'):
        Inception(tmp_path / 'weights.pth')
    assert 'executed' not in capsys.readouterr().out


def test_refusal_of_weights_whose_digits_do_not_match_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv('NEURALSOLVER_CHECKPOINTS', str(tmp_path))
    (tmp_path / module.INCEPTION).write_bytes(b'other')
    with pytest.raises(ValueError, match='is not 6726825d'):
        inception_file()
    assert inception_file(tmp_path / module.INCEPTION).exists()  # named by the user


def test_adms_batch_is_looked_for_and_its_source_named(tmp_path, monkeypatch):
    def no_network(*arguments):
        raise OSError('no network')

    monkeypatch.setenv('NEURALSOLVER_CHECKPOINTS', str(tmp_path))
    monkeypatch.setattr('neuralsolver.assets._fetch', no_network)
    said = 'imagenet256_labeled.npz could not be fetched from https://openaipublic.*_CHECKPOINTS'
    with pytest.raises(FileNotFoundError, match=said):
        adm_reference_file(256)
    (tmp_path / 'VIRTUAL_imagenet512.npz').write_bytes(b'x')
    assert adm_reference_file(512).name == 'VIRTUAL_imagenet512.npz'


# References: the same code with small heads


class Projection:
    "Three heads that are random projections of the pixels; counts its calls."

    name = 'projection-0123456789'

    def __init__(self, heads):
        g = torch.Generator().manual_seed(0)
        self.matrices = {name: torch.randn(75, n, generator=g) for name, n in heads.items()}
        self.calls = 0
        self.killed_at = None

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        pixels = torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1) / 255
        return {name: pixels @ matrix for name, matrix in self.matrices.items()}


@pytest.fixture
def extractor(monkeypatch):
    heads = dict(features=24, spatial=15, logits=10)
    monkeypatch.setattr(module, 'HEADS', heads)
    return Projection(heads)


@pytest.fixture
def heads(extractor, images):
    out = extractor(images)
    extractor.calls = 0
    return out


def adm_batch(path, images, heads, **change):
    "A file as ADM's: images and the moments of another, larger set."
    (mu, sigma), (mu_s, sigma_s) = moments(heads['features']), moments(heads['spatial'])
    arrays = dict(arr_0=images.permute(0, 2, 3, 1).numpy(), mu=mu.float() + 1, sigma=sigma)
    arrays |= dict(mu_s=mu_s + 2, sigma_s=sigma_s) | change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_adms_batch_gives_its_own_moments_and_the_features_of_its_images(
    extractor, images, heads, tmp_path
):
    file, cache = adm_batch(tmp_path / 'VIRTUAL.npz', images, heads), tmp_path / 'cache'
    ref = read_reference(file, extractor, cache=cache, batch_size=5, progress=False)
    assert torch.allclose(ref.mu, heads['features'].double().mean(0) + 1, atol=1e-5)
    assert torch.allclose(ref.mu_s, heads['spatial'].double().mean(0) + 2, atol=1e-5)
    assert torch.allclose(ref.features, heads['features'], atol=1e-4)
    assert re.fullmatch(r'VIRTUAL.npz \([0-9a-f]{10}\)', ref.name) and ref.n_real is None
    calls = extractor.calls
    again = read_reference(file, extractor, cache=cache)
    assert torch.equal(again.features, ref.features) and extractor.calls == calls  # kept
    scores = image_metrics(heads, ref)  # shifted by 1 and by 2, the same covariance
    assert scores['fid'] == pytest.approx(24, rel=1e-3)
    assert scores['sfid'] == pytest.approx(4 * 15, rel=1e-3)
    assert scores['precision'] == scores['recall'] == 1
    only = image_metrics(dict(features=heads['features']), ref._replace(features=None))
    assert set(only) == {'fid'}


def test_a_missing_second_pair_of_moments_stays_missing(extractor, images, heads, tmp_path):
    "The 10,000 images of a batch do not stand in for the training set."
    file = adm_batch(tmp_path / 'a.npz', images, heads, mu_s=None, sigma_s=None)
    ref = read_reference(file, extractor, progress=False)
    assert ref.mu_s is None and ref.features is not None


def test_precision_is_of_the_samples_and_recall_of_the_real_images(heads):
    f = heads['features']
    far = torch.cat([f[:8], f[:8] + 10 * torch.arange(1, 9)[:, None]])
    ref = ImageReference(*moments(f), None, None, far, 16, 'half of it far away')
    scores = image_metrics(dict(features=f[:10]), ref)
    assert scores['precision'] >= 0.8 and scores['recall'] <= 0.6


def test_images_only_and_moments_only(extractor, images, heads, tmp_path):
    none = dict(mu=None, sigma=None, mu_s=None, sigma_s=None)
    file = adm_batch(tmp_path / 'images.npz', images, heads, **none)
    ref = read_reference(file, extractor, cache=tmp_path, batch_size=12, progress=False)
    assert ref.n_real == 12
    for got, want in zip(ref[:4], (*moments(heads['features']), *moments(heads['spatial']))):
        assert torch.allclose(got, want, atol=1e-5)
    again = read_reference(file, extractor, cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again[:5], ref[:5]))
    change = dict(arr_0=None, mu_s=None, sigma_s=None)
    ref = read_reference(adm_batch(tmp_path / 'm.npz', images, heads, **change), extractor)
    assert set(image_metrics(heads, ref)) == {'fid', 'is'}


def test_every_head_is_enough(heads):
    (mu, sigma), (mu_s, sigma_s) = moments(heads['features']), moments(heads['spatial'])
    ref = ImageReference(mu, sigma, mu_s, sigma_s, heads['features'], 12, 'x')
    whole = image_metrics(heads, ref)
    assert set(whole) == {'fid', 'sfid', 'is', 'precision', 'recall'}
    of_head = dict(features={'fid', 'precision', 'recall'}, spatial={'sfid'}, logits={'is'})
    for head, keys in of_head.items():
        assert image_metrics({head: heads[head]}, ref) == {k: whole[k] for k in whole if k in keys}
    for bad in ({}, dict(features=heads['features'], pool=heads['logits'])):
        with pytest.raises(ValueError, match='give one or more of features, spatial, logits'):
            image_metrics(bad, ref)


@pytest.mark.parametrize('progress', [False, True])
def test_no_more_features_are_kept_than_said(
    extractor, images, heads, folder, tmp_path, progress, monkeypatch
):
    monkeypatch.setattr(module, 'MOST', 3)
    np.savez(tmp_path / 'images.npz', arr_0=images[:8].permute(0, 2, 3, 1).numpy())
    ref = read_reference(tmp_path / 'images.npz', extractor, batch_size=2, progress=progress)
    assert torch.allclose(ref.features, heads['features'][:3], atol=1e-4)
    mean = heads['features'][:8].double().mean(0)  # the moments are those of all
    assert torch.allclose(ref.mu, mean, atol=1e-5)
    path, order = folder
    ref = read_reference(path, extractor, 40, 5, tmp_path, progress, workers=0)
    one_of_each_class = [order[i] for i in (0, 4, 8)]
    assert torch.allclose(ref.features, heads['features'][one_of_each_class], atol=1e-4)


@pytest.mark.parametrize(
    'name, arrays, message',
    [
        ('half.npz', dict(mu=np.zeros(24)), 'only one of mu and sigma'),
        ('small.npz', dict(mu=np.zeros(6), sigma=np.eye(6)), r'mu is \[6\]'),
        ('code.npz', dict(mu=np.array([print], object)), 'not a readable .npz'),
        ('few.npz', dict(arr_0=np.zeros((7, 4, 4, 3), np.uint8)), '>= 8'),
        ('grey.npz', dict(arr_0=np.zeros((9, 4, 4), np.uint8)), 'images must be uint8'),
        ('float.npz', dict(arr_0=np.zeros((9, 4, 4, 3), np.float32)), 'images must be uint8'),
    ],
)
def test_refusal_of_arrays_that_are_no_reference(extractor, tmp_path, name, arrays, message):
    np.savez(tmp_path / name, **arrays)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / name, extractor, 40)


@pytest.mark.parametrize(
    'name, message',
    [
        ('cut.npz', 'not a readable .npz'),
        ('cut.safetensors', 'is cut or no .safetensors'),
        ('none.npz', 'not there'),
        ('train', '>= 8'),
    ],
)
def test_refusal_of_files_that_are_no_reference(extractor, images, tmp_path, name, message):
    np.savez(tmp_path / 'sound.npz', arr_0=images.permute(0, 2, 3, 1).numpy())
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'sound.npz').read_bytes()[:9000])
    (tmp_path / 'cut.safetensors').write_bytes(b'abc')
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / name, extractor, 40)


def test_refusal_of_a_folder_that_cannot_be_written_to(extractor, folder, monkeypatch):
    monkeypatch.setattr(module.os, 'access', lambda *a: False)
    with pytest.raises(ValueError, match='give cache='):
        read_reference(folder[0], extractor, 40)


@pytest.fixture
def folder(images, tmp_path):
    "Nine images in three folders, and the order of their names."
    for i, image in enumerate(images[:9]):
        file = tmp_path / f'train/n{i % 3}/{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return tmp_path / 'train', [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_a_folder_of_images(extractor, heads, folder, tmp_path):
    path, order = folder
    ref = read_reference(path, extractor, 40, 4, tmp_path / 'cache', False, workers=0)
    f, s = heads['features'][order], heads['spatial'][order]
    for got, want in zip(ref[:4], (*moments(f), *moments(s))):
        assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(ref.features, f, atol=1e-4) and ref.n_real == 9
    (kept,) = (tmp_path / 'cache').iterdir()
    assert torch.equal(read_reference(kept, extractor).mu, ref.mu)
    assert read_reference(kept, extractor).name == ref.name
    extractor.name = 'inception-0000000000'
    with pytest.raises(ValueError, match='make it again'):
        read_reference(kept, extractor)
    with pytest.raises(ValueError, match='size=None'):
        read_reference(path, extractor)


def killed(extractor, folder, cache, call, save_every):
    "A run that ends at this call of the network."
    extractor.calls, extractor.killed_at = 0, call
    with pytest.raises(KeyboardInterrupt):
        read_reference(folder, extractor, 40, 2, cache, False, 0, save_every)
    extractor.calls, extractor.killed_at = 0, None


def test_resume_of_a_killed_folder_gives_the_same_numbers(extractor, folder, tmp_path):
    whole = read_reference(folder[0], extractor, 40, 2, tmp_path / 'whole', False, 0, 1)
    killed(extractor, folder[0], tmp_path / 'killed', 4, save_every=2)
    again = read_reference(folder[0], extractor, 40, 2, tmp_path / 'killed', False, 0, 2)
    assert extractor.calls == 3  # two batches of five were saved
    assert all(torch.equal(a, b) for a, b in zip(whole[:5], again[:5]))
    assert [p.suffix for p in (tmp_path / 'killed').iterdir()] == ['.safetensors']


def test_resume_in_the_middle_of_a_block(extractor, folder, tmp_path, monkeypatch):
    "Blocks of 3 rows, batches of 2: rows wait when the state is saved."
    monkeypatch.setattr(module, 'Moments', lambda dim: Moments(dim, 3))
    whole = read_reference(folder[0], extractor, 40, 2, tmp_path / 'whole', False, 0)
    killed(extractor, folder[0], tmp_path / 'killed', 3, save_every=1)
    (partial,) = (tmp_path / 'killed').iterdir()
    identity, state = read_card(partial)
    assert (identity['extractor'], state['done'], state['features']['n']) == (extractor.name, 4, 3)
    again = read_reference(folder[0], extractor, 40, 2, tmp_path / 'killed', False, 0, 1)
    assert extractor.calls == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[:5], again[:5]))


def test_an_image_that_cannot_be_read_is_named(extractor, folder, tmp_path):
    (folder[0] / 'n0/broken.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='broken.jpg is not a readable image'):
        read_reference(folder[0], extractor, 40, 20, tmp_path / 'c', False, workers=0)


# Files of images


def test_center_crop_is_adms_on_sizes_where_every_step_is_known():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # 128 >= 2 x 64: halved once; then the middle 64 of 96 columns
    halved = pixels.reshape(64, 2, 96, 2, 3).astype(float).mean((1, 3))
    off = np.array(center_crop(image, 64)).astype(float) - halved[:, 16:80]
    assert np.abs(off).max() <= 1  # rounded along each axis
    assert np.array_equal(np.array(center_crop(image, 128)), pixels[:, 32:160])


def test_exported_images_do_not_depend_on_time(images, tmp_path):
    a, b = (export_npz(images, tmp_path / f'{n}.npz').read_bytes() for n in 'ab')
    assert a == b
    assert torch.equal(torch.cat(list(NpzImages(tmp_path / 'a.npz').batches(5))), images)


def test_images_stream_out_and_in(tmp_path):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (450, 3, 64, 64), dtype=torch.uint8, generator=g)
    source = Counting(pixels)  # 5.5 MB
    tracemalloc.start()
    export_npz(source, tmp_path / 'a.npz')
    _, most = tracemalloc.get_traced_memory()
    assert source.longest == 100 and most < 3e6
    tracemalloc.reset_peak()
    total = sum(batch.sum().item() for batch in NpzImages(tmp_path / 'a.npz').batches(10))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == pixels.sum().item() and most < 2e6
    for bad in (pixels.float(), pixels[:, :1], pixels[:0]):
        with pytest.raises(ValueError, match='give uint8'):
            export_npz(bad, tmp_path / 'b.npz')
    assert not (tmp_path / 'b.npz').exists()
