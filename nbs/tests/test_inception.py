"The Inception heads, references of every form, and the files for OpenAI's evaluator; the network has random weights, as the real ones cannot be downloaded here."

import re
import numpy as np, pytest, torch
from PIL import Image
from neuralsolver import inception as module
from neuralsolver.inception import (
    adm_reference_file,
    center_crop,
    export_npz,
    image_metrics,
    ImageReference,
    Inception,
    inception_file,
    NpzImages,
    read_reference,
)
from neuralsolver.metrics import import_torch_fidelity, Moments, moments


def random_inception(path):
    "Weights of the right shapes and of He's variance. With PyTorch's own initialisation the features are 1e-8 and every absolute tolerance holds."
    from unittest import mock

    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with (
        torch.random.fork_rng(),
        mock.patch.object(library.FeatureExtractorInceptionV3, 'load_state_dict'),
        mock.patch.object(library, 'load_state_dict_from_url'),
    ):
        torch.manual_seed(0)
        weights = library.FeatureExtractorInceptionV3('inception-v3-compat', ['2048']).state_dict()
    torch.save(
        {
            k: v * (6**0.5 if k.endswith('conv.weight') else 20 if k == 'fc.weight' else 1)
            for k, v in weights.items()
        },
        path,
    )
    return path


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
    return Inception(random_inception(tmp_path_factory.mktemp('inception') / 'weights.pth'))


@pytest.fixture(scope='module')
def images():  # squares of random colours
    return (
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 5, 5), dtype=np.uint8))
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
    )


@pytest.fixture(scope='module')
def heads(extractor, images):
    out = extractor(images)
    distinct = {k: (v[:, None] - v).abs().amax(2).fill_diagonal_(9).min() for k, v in out.items()}
    assert min(distinct.values()) > 0.05, distinct  # the tolerances below tell images apart
    return out


def test_heads_are_those_of_the_library_and_spatial_is_in_adms_order(extractor, images, heads):
    net = extractor.net
    seen = {}
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(branch=o))
    with torch.no_grad():
        features, logits = net(images)
    hook.remove()
    assert torch.equal(heads['features'], features) and torch.equal(heads['logits'], logits)
    assert (
        heads['features'].shape == (12, 2048)
        and heads['logits'].shape == (12, 1008)
        and heads['spatial'].shape == (12, 17 * 17 * 7)
    )
    first = torch.relu(seen['branch'])[
        :, :7
    ]  # the rectified first branch: TensorFlow's mixed_6/conv
    for i, row, column, channel in [
        (0, 0, 0, 0),
        (3, 2, 5, 6),
        (11, 16, 16, 1),
        (7, 0, 9, 3),
    ]:  # flattened row, column, channel
        assert (
            heads['spatial'][i, (row * 17 + column) * 7 + channel] == first[i, channel, row, column]
        )
    assert torch.allclose(logits, features @ net.fc.weight.T, atol=1e-4)  # without the bias


@pytest.mark.parametrize(
    'bad',
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_must_be_bytes_in_colour(extractor, bad):
    with pytest.raises(ValueError, match='give uint8'):
        extractor(bad)


def test_batch_size_and_autocast_do_not_matter(extractor, images, heads):
    with torch.autocast('cpu', torch.bfloat16):
        again = {k: torch.cat([extractor(part)[k] for part in images[:6].split(4)]) for k in heads}
    for k, v in again.items():
        assert torch.allclose(v, heads[k][:6], atol=1e-4)


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ('executed',)

    torch.save(dict(a=Evil()), tmp_path / 'weights.pth')
    with pytest.raises(Exception, match='(?i)weights.only|unsupported'):
        Inception(tmp_path / 'weights.pth')
    assert 'executed' not in capsys.readouterr().out


def test_the_weights_file_is_checked_by_the_digits_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv('NEURALSOLVER_CHECKPOINTS', str(tmp_path))
    (tmp_path / module.INCEPTION).write_bytes(b'other')
    with pytest.raises(ValueError, match='is not 6726825d'):
        inception_file()
    assert inception_file(tmp_path / module.INCEPTION).exists()  # named by the user
    with pytest.raises(
        FileNotFoundError,
        match='VIRTUAL_imagenet256_labeled.npz could not be fetched from https://openaipublic.*NEURALSOLVER_CHECKPOINTS',
    ):
        monkeypatch.setattr(
            'neuralsolver.utils._fetch', lambda *a: (_ for _ in ()).throw(OSError('no network'))
        )
        adm_reference_file(256)
    (tmp_path / 'VIRTUAL_imagenet512.npz').write_bytes(b'x')
    assert adm_reference_file(512).name == 'VIRTUAL_imagenet512.npz'


def test_features_are_float32_on_every_device_and_the_callers_flags_stay(extractor, images):
    seen = []
    hook = extractor.net.Mixed_6d.register_forward_hook(
        lambda *a: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    try:
        for torch.backends.cudnn.allow_tf32 in (True, False):
            out = extractor(images[:1])['features']
            assert torch.backends.cudnn.allow_tf32 == (len(seen) == 1) and not out.is_inference()
    finally:
        torch.backends.cudnn.allow_tf32 = before
        hook.remove()
    assert seen == [False, False]


# References


def adm_batch(path, images, heads, **change):
    "A file as ADM's: images and the moments of another, larger set."
    (mu, sigma), (mu_s, sigma_s) = moments(heads['features']), moments(heads['spatial'])
    np.savez(
        path,
        **{
            k: v
            for k, v in (
                dict(
                    arr_0=images.permute(0, 2, 3, 1).numpy(),
                    mu=mu.float() + 1,
                    sigma=sigma,
                    mu_s=mu_s + 2,
                    sigma_s=sigma_s,
                )
                | change
            ).items()
            if v is not None
        },
    )


def test_adms_batch_gives_its_own_moments_and_the_features_of_its_images(
    extractor, images, heads, tmp_path
):
    adm_batch(tmp_path / 'VIRTUAL.npz', images, heads)
    cache = tmp_path / 'cache'
    ref = read_reference(
        tmp_path / 'VIRTUAL.npz', extractor, cache=cache, batch_size=5, progress=False
    )
    assert (
        torch.allclose(ref.mu, heads['features'].double().mean(0) + 1, atol=1e-5)
        and torch.allclose(ref.features, heads['features'], atol=1e-4)
        and re.fullmatch(r'VIRTUAL.npz \([0-9a-f]{10}\)', ref.name)
    )
    assert torch.allclose(ref.mu_s, heads['spatial'].double().mean(0) + 2, atol=1e-5)
    seen = extractor.net.register_forward_pre_hook(lambda *a: pytest.fail('the features are kept'))
    again = read_reference(tmp_path / 'VIRTUAL.npz', extractor, cache=cache)
    seen.remove()
    assert torch.equal(again.features, ref.features)
    scores = image_metrics(heads, ref)
    assert (
        scores['fid'] == pytest.approx(2048, rel=1e-3)
        and scores['sfid'] == pytest.approx(4 * 2023, rel=1e-3)
        and scores['precision'] == scores['recall'] == 1
    )  # shifted by 1 and by 2, the same covariance
    assert set(image_metrics(dict(features=heads['features']), ref._replace(features=None))) == {
        'fid'
    }


def test_precision_is_of_the_samples_and_recall_of_the_real_images(heads):
    f = heads['features']
    ref = ImageReference(
        *moments(f),
        None,
        None,
        torch.cat([f[:8], f[:8] + 10 * torch.arange(1, 9)[:, None]]),
        16,
        'half of it far away',
    )
    scores = image_metrics(dict(features=f[:10]), ref)
    assert scores['precision'] >= 0.8 and scores['recall'] <= 0.6


def test_images_only_and_moments_only(extractor, images, heads, tmp_path):
    adm_batch(tmp_path / 'images.npz', images, heads, mu=None, sigma=None, mu_s=None, sigma_s=None)
    ref = read_reference(
        tmp_path / 'images.npz', extractor, cache=tmp_path, batch_size=12, progress=False
    )
    assert ref.n_real == 12
    for got, want in zip(ref[:4], (*moments(heads['features']), *moments(heads['spatial']))):
        assert torch.allclose(got, want, atol=1e-5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            read_reference(tmp_path / 'images.npz', extractor, cache=tmp_path)[:5], ref[:5]
        )
    )
    adm_batch(tmp_path / 'moments.npz', images, heads, arr_0=None, mu_s=None, sigma_s=None)
    ref = read_reference(tmp_path / 'moments.npz', extractor)
    assert set(image_metrics(heads, ref)) == {'fid', 'is'}


def test_every_head_is_enough(heads, monkeypatch):
    monkeypatch.setattr(
        module,
        'frechet_distance',
        lambda a, b: (len(a[0]), a[1].trace().item(), b[1].trace().item()),
    )  # itself takes seconds
    (mu, sigma), (mu_s, sigma_s) = moments(heads['features']), moments(heads['spatial'])
    ref = ImageReference(mu, sigma, mu_s, sigma_s, heads['features'], 12, 'x')
    whole = image_metrics(heads, ref)
    assert set(whole) == {'fid', 'sfid', 'is', 'precision', 'recall'}
    for head, keys in dict(
        features={'fid', 'precision', 'recall'}, spatial={'sfid'}, logits={'is'}
    ).items():
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
    assert torch.allclose(
        ref.mu, heads['features'][:8].double().mean(0), atol=1e-5
    )  # the moments are those of all
    ref = read_reference(folder[0], extractor, 40, 5, tmp_path, progress, workers=0)
    order = folder[1]
    assert torch.allclose(
        ref.features, heads['features'][[order[i] for i in (0, 4, 8)]], atol=1e-4
    )  # one of each class


def test_files_that_are_no_reference(extractor, images, tmp_path, monkeypatch):
    np.savez(tmp_path / 'sound.npz', arr_0=images.permute(0, 2, 3, 1).numpy())
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'sound.npz').read_bytes()[:9000])
    (tmp_path / 'text.npz').write_text('no zip')
    np.savez(tmp_path / 'half.npz', mu=np.zeros(2048))
    np.savez(tmp_path / 'small.npz', mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / 'code.npz', mu=np.array([print], object), sigma=np.eye(2048))
    np.savez(tmp_path / 'few.npz', arr_0=np.zeros((7, 4, 4, 3), np.uint8))
    (tmp_path / 'cut.safetensors').write_bytes(b'abc')
    (tmp_path / 'train').mkdir()
    for name, message in {
        'cut.npz': 'not a readable .npz',
        'text.npz': 'not a readable .npz',
        'code.npz': 'not a readable .npz',
        'half.npz': 'only one of mu and sigma',
        'small.npz': r'mu is \[64\]',
        'few.npz': '>= 8',
        'cut.safetensors': 'is cut or no .safetensors',
        'none.npz': 'not there',
        'train': '>= 8',
    }.items():
        with pytest.raises(ValueError, match=message):
            read_reference(tmp_path / name, extractor, 40)
    for i in range(8):
        Image.new('RGB', (4, 4)).save(tmp_path / f'train/{i}.png')
    monkeypatch.setattr(module.os, 'access', lambda *a: False)
    with pytest.raises(ValueError, match='give cache='):
        read_reference(tmp_path / 'train', extractor, 4)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(arr_0=np.zeros((9, 4, 4), np.uint8)), 'images must be uint8'),
        (dict(arr_0=np.zeros((9, 4, 4, 3), np.float32)), 'images must be uint8'),
    ],
)
def test_batches_that_are_none(extractor, images, heads, tmp_path, change, message):
    adm_batch(tmp_path / 'bad.npz', images, heads, **change)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / 'bad.npz', extractor)


@pytest.fixture
def folder(images, tmp_path):
    for i, image in enumerate(images[:9]):
        (tmp_path / f'train/n{i % 3}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f'train/n{i % 3}/{i}.png')
    return tmp_path / 'train', [0, 3, 6, 1, 4, 7, 2, 5, 8]  # sorted names


def test_a_folder_of_images(extractor, heads, folder, tmp_path):
    path, order = folder
    ref = read_reference(path, extractor, 40, 4, tmp_path / 'cache', False, workers=0)
    for got, want in zip(
        ref[:4], (*moments(heads['features'][order]), *moments(heads['spatial'][order]))
    ):
        assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(ref.features, heads['features'][order], atol=1e-4) and ref.n_real == 9
    (kept,) = (tmp_path / 'cache').iterdir()
    assert torch.equal(read_reference(kept, extractor).mu, ref.mu)
    other = type('Other', (), dict(name='inception-0000000000'))()
    with pytest.raises(ValueError, match='make it again'):
        read_reference(kept, other)
    with pytest.raises(ValueError, match='size=None'):
        read_reference(path, extractor)


def test_a_folder_that_was_killed_goes_on_with_the_same_numbers(extractor, folder, tmp_path):
    path, _ = folder
    whole = read_reference(path, extractor, 40, 2, tmp_path / 'whole', False, 0, 1)
    calls = []

    class Killed(Exception):
        pass

    def kill(*a):
        calls.append(1)
        if len(calls) == 4:
            raise Killed

    hook = extractor.net.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        read_reference(path, extractor, 40, 2, tmp_path / 'killed', False, 0, 2)
    again = read_reference(path, extractor, 40, 2, tmp_path / 'killed', False, 0, 2)
    hook.remove()
    assert len(calls) == 4 + 3  # two batches were saved, three were left
    assert all(torch.equal(a, b) for a, b in zip(whole[:5], again[:5])) and [
        p.suffix for p in (tmp_path / 'killed').iterdir()
    ] == ['.safetensors']


def test_it_goes_on_in_the_middle_of_a_block(extractor, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'Moments', lambda dim: Moments(dim, 3))
    path, _ = folder  # blocks of 3 rows, batches of 2: rows wait when the state is saved
    whole = read_reference(path, extractor, 40, 2, tmp_path / 'whole', False, 0)
    calls = []

    class Killed(Exception):
        pass

    def kill(*a):
        calls.append(1)
        if len(calls) == 3:
            raise Killed

    hook = extractor.net.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        read_reference(path, extractor, 40, 2, tmp_path / 'killed', False, 0, 1)
    state = torch.load(next((tmp_path / 'killed').iterdir()), weights_only=True)
    assert (state['done'], state['features']['n'], len(state['features']['rest'])) == (4, 3, 1)
    again = read_reference(path, extractor, 40, 2, tmp_path / 'killed', False, 0, 1)
    hook.remove()
    assert len(calls) == 3 + 3
    assert all(torch.equal(a, b) for a, b in zip(whole[:5], again[:5]))


def test_an_image_that_cannot_be_read_is_named(extractor, folder, tmp_path):
    path, _ = folder
    (path / 'n0/broken.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='broken.jpg is not a readable image'):
        read_reference(path, extractor, 40, 20, tmp_path / 'c', False, workers=0)


def test_center_crop_is_adms_on_sizes_where_every_step_is_known():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8)
    halved = (
        a.reshape(64, 2, 96, 2, 3).astype(float).mean((1, 3))
    )  # 128 >= 2 x 64: once; then the middle 64 of 96 columns
    assert (
        np.abs(np.array(center_crop(Image.fromarray(a), 64)).astype(float) - halved[:, 16:80]).max()
        <= 1
    )  # rounded along each axis
    assert np.array_equal(np.array(center_crop(Image.fromarray(a), 128)), a[:, 32:160])


def test_exported_images_do_not_depend_on_time_and_are_one_array(images, tmp_path):
    a, b = (export_npz(images, tmp_path / f'{n}.npz').read_bytes() for n in 'ab')
    assert a == b
    with np.load(tmp_path / 'a.npz') as f:
        assert f['arr_0'].shape == (12, 40, 40, 3) and f['arr_0'].dtype == np.uint8
    assert torch.equal(torch.cat(list(NpzImages(tmp_path / 'a.npz').batches(5))), images)


def test_images_stream_out_and_in(tmp_path):
    import tracemalloc
    from test_metrics import Counting

    source = Counting(
        torch.randint(
            0, 256, (450, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
    )  # 5.5 MB
    tracemalloc.start()
    export_npz(source, tmp_path / 'a.npz')
    _, most = tracemalloc.get_traced_memory()
    assert source.longest == 100 and most < 3e6
    tracemalloc.reset_peak()
    total = sum(b.sum().item() for b in NpzImages(tmp_path / 'a.npz').batches(10))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == source.rows.sum().item() and most < 2e6
    for bad in (source.rows.float(), source.rows[:, :1], source.rows[:0]):
        with pytest.raises(ValueError, match='give uint8'):
            export_npz(bad, tmp_path / 'b.npz')
    assert not (tmp_path / 'b.npz').exists()
