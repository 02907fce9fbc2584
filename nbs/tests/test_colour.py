"Colour models: images, autoencoder, latents, features, from an archive of a few images, offline."

import importlib.util
import io
import json
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from notebooks import defaults_of, run_notebook
from PIL import Image
from safetensors.torch import load_file, save_file
from test_search_notebook import in_process

import neuralsolver as ns
from neuralsolver.autoencoder import (
    AutoencoderRecipe,
    critic_loss,
    encode,
    feature_distance,
    make_autoencoder,
    make_critic,
    read_latents,
    reconstruction_psnr,
    train_autoencoder,
)
from neuralsolver.checkpoints import Autoencoder, load_card, load_weights
from neuralsolver.cifar import CIFAR_CLASSES, cifar10
from neuralsolver.data import balanced_indices, to_uint8
from neuralsolver.fashion_features import import_torch_fidelity, read_card
from neuralsolver.metrics import compute_metrics, frechet_distance, moments
from neuralsolver.photo_features import (
    EarlyLayers,
    PhotoExtractor,
    PhotoNet,
    efficientnet_lite0,
    fit_axes,
    load_photo_reference,
    photo_features,
    photo_metrics,
    read_reconstructions,
    register_photo_extractor,
    write_reconstructions,
)
from neuralsolver.protocol import Protocol, protocol_sentence
from neuralsolver.training import learning_rate, train
from neuralsolver.utils import data_file, indexed_noise, sha256

COUNTS = dict(train=24, test=8)  # images of each class


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    "Two-coloured images, one pair of colours a class, in the layout of the JPEG copy."
    file = tmp_path_factory.mktemp('cifar') / 'cifar10_q75.tar.xz'
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 2, 3))
    with tarfile.open(file, 'w:xz', preset=0) as tar:
        for split, count in COUNTS.items():
            for c, name in enumerate(CIFAR_CLASSES):
                for i in range(count):
                    pixels = np.empty((32, 32, 3), np.uint8)
                    edge = rng.integers(8, 24)
                    pixels[:, :edge], pixels[:, edge:] = colours[c]
                    raw = io.BytesIO()
                    Image.fromarray(pixels).save(raw, 'jpeg', quality=75)
                    member = tarfile.TarInfo(f'{split}/{name}/{i:04}.jpg')
                    member.size = raw.tell()
                    raw.seek(0)
                    tar.addfile(member, raw)
    return file


@pytest.fixture(scope='module')
def statistics(archive, tmp_path_factory):
    "Statistics of the archive's images by EfficientNet-Lite0, on eight axes."
    file = tmp_path_factory.mktemp('statistics') / 'reference.safetensors'
    settings = dict(axes=8, per_class=24, test_per_class=8, threads=1)
    run_notebook('studies/photo_reference', root=archive, out=file, **settings)
    return file


@pytest.fixture(scope='module')
def made(archive, statistics, tmp_path_factory):
    "What train_autoencoder.ipynb leaves, made in two runs."
    out = tmp_path_factory.mktemp('autoencoder')
    settings = dict(channels=2, samples=30 * 16, batch_size=16, warmup=3, lr=4e-3)
    settings |= dict(root=archive, reference=statistics, out_dir=out, model='vae-toy')
    run_notebook('train_autoencoder', stop_after=11, **settings)
    assert not (out / 'vae-toy').exists()
    run_notebook('train_autoencoder', **settings)
    return out


# the autoencoder


def test_the_notebook_in_two_runs_makes_the_same_autoencoder(archive, made):
    card = load_card(made / 'vae-toy' / 'card.json')
    images, labels = cifar10('train', archive)
    torch.manual_seed(0)
    net = make_autoencoder(2)
    recipe = AutoencoderRecipe(samples=30 * 16, batch_size=16, warmup=3, lr=4e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train_autoencoder(net, images, recipe, progress=False)
    torch.set_num_threads(threads)
    before = make_autoencoder(2)
    before.load_state_dict(result.weights)
    decoder = Autoencoder(str(made / 'vae-toy'), scale=1.0)
    x = cifar10('test', archive)[0]
    same = reconstruction_psnr(before.eval(), x), reconstruction_psnr(decoder.net, x)
    assert torch.allclose(*same, atol=1e-2)  # the normalisation of the latents changes no image
    assert abs(same[0].mean().item() - card['psnr']) < 0.02
    assert card['data'] == 'CIFAR-10 (JPEG q75), 240 training images'
    given = dict(zip(card['command'].split()[3::3], card['command'].split()[4::3]))
    assert given['channels'] == '2' and given['samples'] == '480'
    assert given.keys() >= defaults_of('train_autoencoder').keys() - {
        *('stop_after', 'start', 'reference', 'root', 'out_dir')
    }


def test_latents_are_those_of_the_images_and_their_mirror_images(archive, made):
    latents, labels, made_from = read_latents(made / 'vae-toy_latents.safetensors')
    images, classes = cifar10('train', archive)
    net = Autoencoder(str(made / 'vae-toy'), scale=1.0).net
    assert torch.equal(labels, torch.cat([classes, classes])) and len(latents) == 480
    assert torch.allclose(latents[:240], encode(net, images), atol=1e-4)
    assert torch.allclose(latents[240:], encode(net, images.flip(3)), atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert made_from.endswith('240 training images and their mirror images')


def test_a_frozen_encoder_keeps_the_latents(archive):
    images, _ = cifar10('train', archive)
    torch.manual_seed(0)
    net = make_autoencoder(2)
    net.encoder.requires_grad_(False)
    net.quant_conv.requires_grad_(False)
    before = encode(net, images[:8])
    decoded = net.decode(before).sample.detach()
    train_autoencoder(net, images, AutoencoderRecipe(samples=64), progress=False)
    assert torch.equal(encode(net, images[:8]), before)
    assert not torch.allclose(net.decode(before).sample, decoded, atol=1e-3)


def test_a_sharper_decoder_for_the_same_latents(archive, statistics, made, tmp_path):
    "The notebook's second run trains the decoder by features and a critic; the encoder stays."
    settings = dict(start=str(made / 'vae-toy'), model='sharp', samples=12 * 16, batch_size=16)
    settings |= dict(feature_weight=0.05, critic_weight=0.01, warmup=2, precision='float32')
    settings |= dict(root=archive, reference=statistics, out_dir=tmp_path)
    run_notebook('train_autoencoder', stop_after=5, **settings)
    run_notebook('train_autoencoder', **settings)
    before, after = (
        load_file(folder / 'diffusion_pytorch_model.safetensors')
        for folder in (made / 'vae-toy', tmp_path / 'sharp')
    )
    changed = {key.split('.')[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {'decoder', 'post_quant_conv'}
    card = load_card(tmp_path / 'sharp' / 'card.json')
    assert card['start_sha256'] == load_card(made / 'vae-toy' / 'card.json')['sha256']
    assert '-p feature_weight 0.05 -p critic_weight 0.01' in card['command']
    assert card['reconstructions']['fd'] > 0 and not list(tmp_path.glob('*_latents*'))


def test_features_and_critic_pull_a_decoder_where_they_say():
    "Gradients of the two terms with respect to a reconstruction, by central differences."
    torch.manual_seed(0)
    x, decoded = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    critic = make_critic(0).double()
    bank = torch.nn.Conv2d(3, 4, 3).double()

    def decoders_loss(y):
        features = 0.5 * feature_distance([bank(y)], [bank(x)])
        return features - 0.3 * critic(y).mean()

    y = decoded.clone().requires_grad_()
    total = 0.5 * feature_distance([bank(y)], [bank(x)]) + critic_loss(critic, x, y, 0.3)
    total.backward()
    direction, h = torch.randn_like(y), 1e-3
    with torch.no_grad():
        slope = decoders_loss(decoded + h * direction) - decoders_loss(decoded - h * direction)
    expected = pytest.approx(slope.item() / (2 * h), rel=0.05)  # float32 terms, kinks of the critic
    assert (y.grad * direction).sum().item() == expected


def test_refusal_of_a_feature_weight_without_features(archive):
    images, _ = cifar10('train', archive)
    recipe = AutoencoderRecipe(samples=64, feature_weight=0.1)
    with pytest.raises(ValueError, match='feature_weight=0.1 with no features'):
        train_autoencoder(make_autoencoder(2), images, recipe, progress=False)


# a model on the latents


def test_train_notebook_on_latents(made, tmp_path):
    latents = made / 'vae-toy_latents.safetensors'
    settings = dict(model='toy', latents=latents, vae=str(made / 'vae-toy'), patch_size=4)
    settings |= dict(samples=4 * 16, batch_size=16, warmup=2, hold=3, ema_decay=1.0)
    settings |= dict(times='logit-normal', precision='bfloat16-mixed', half=True)
    space = run_notebook('train', out_dir=tmp_path, threads=1, **settings)
    assert space['pixels'].shape == (30, 3, 32, 32)
    card = load_card(tmp_path / 'toy.json')
    assert card['data'] == read_latents(latents)[2] and '-p hold 3 ' in card['command']
    net = load_weights(tmp_path / 'toy.safetensors')
    assert net.sample_shape == (2, 8, 8)
    size = (tmp_path / 'toy.safetensors').stat().st_size
    assert size < 2.2 * sum(p.numel() for p in net.parameters())
    longer = settings | dict(samples=6 * 16)
    space = run_notebook('train', out_dir=tmp_path, threads=1, **longer)
    assert len(space['result'].losses) == 6 and load_card(tmp_path / 'toy.json')['samples'] == 96


def test_ends_that_are_measured_are_the_learning_curve_of_the_card(made, tmp_path, monkeypatch):
    "Features of samples are replaced by random ones; a line is what these give."
    file = data_file('cifar_reference.safetensors')
    photos = load_photo_reference(file, read_card(file)['extractor'])

    def raw(images, *_, **__):
        g = torch.Generator().manual_seed(int(images.sum()))
        sizes = dict(features=len(photos.axes.mean), spatial=len(photos.spatial[0]))
        return {head: torch.randn(len(images), n, generator=g) for head, n in sizes.items()}

    monkeypatch.setattr('neuralsolver.photo_features.photo_features', raw)
    settings = dict(model='toy', patch_size=4, hold=3, batch_size=16, measure=100, threads=1)
    settings |= dict(latents=made / 'vae-toy_latents.safetensors', vae=str(made / 'vae-toy'))
    for images in (32, 64, 64):
        space = run_notebook('train', samples=images, out_dir=tmp_path, **settings)
    lines = load_card(tmp_path / 'toy.json')['quality']
    assert [line['images'] for line in lines] == [32, 64]
    decoded = space['decoded']
    assert decoded.shape == (100, 3, 32, 32)
    heads = photos.axes(raw(decoded)['features'])._asdict() | dict(spatial=raw(decoded)['spatial'])
    expected = photo_metrics(heads, torch.arange(100) % 10, photos)
    assert all(lines[1][name] == pytest.approx(v, rel=1e-4) for name, v in expected.items())
    with pytest.raises(ValueError, match='measure=99: give 100 or more'):
        run_notebook('train', samples=32, **settings | dict(measure=99))


def test_train_notebook_goes_on_from_weights(made, tmp_path):
    latents = made / 'vae-toy_latents.safetensors'
    settings = dict(model='toy', latents=latents, patch_size=4, samples=32, batch_size=16)
    run_notebook('train', out_dir=tmp_path / 'first', threads=1, half=True, **settings)
    first = tmp_path / 'first' / 'toy.safetensors'
    still = dict(start=first, lr=1e-12, seed=1, out_dir=tmp_path / 'second', threads=1)
    run_notebook('train', **settings | still)
    begun, ended = (load_weights(tmp_path / k / 'toy.safetensors') for k in ('first', 'second'))
    for (key, a), b in zip(begun.state_dict().items(), ended.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-9), key
    before, card = load_card(first), load_card(tmp_path / 'second' / 'toy.json')
    assert card['samples'] == 64
    assert card['start'] == dict(sha256=before['sha256'], command=before['command'])
    with pytest.raises(ValueError, match='start=.*as architecture, size and patch_size say'):
        run_notebook('train', **settings | still | dict(patch_size=2))


def test_the_rate_without_an_end_does_not_depend_on_the_end():
    rates = [learning_rate(k, 10, 1.0, 4, hold=100) for k in range(1000)]
    assert rates == [learning_rate(k, 10**6, 1.0, 4, hold=100) for k in range(1000)]
    assert rates[3:101] == [1.0] * 98 and rates[400] == pytest.approx(0.5)


@pytest.mark.parametrize('wrong', [dict(hold=0), dict(times='late'), dict(precision='bfloat16')])
def test_refusal_of_settings_of_a_training(made, wrong):
    latents, labels, _ = read_latents(made / 'vae-toy_latents.safetensors')
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}='):
        train(torch.nn.Linear(1, 1), latents, labels, samples=16, batch_size=16, **wrong)


# features


class StandIn(torch.nn.Module):
    "Random features with the interface of an EfficientNet."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self._blocks = torch.nn.ModuleList([torch.nn.Conv2d(3, 16, 16, 16)])
        self._conv_head = torch.nn.Conv2d(16, 40, 1)

    def extract_features(self, x):
        return self._conv_head(self._blocks[0](x).relu()).relu()


def stand_in():
    return register_photo_extractor('tests-stand-in', lambda: PhotoNet(StandIn(), middle=0))


def test_distance_of_torch_fidelity_on_the_registered_extractor(archive):
    "calculate_metrics with the registered extractor gives the distance of the whole features."
    fidelity = import_torch_fidelity()
    one, two = (cifar10(split, archive)[0] for split in ('train', 'test'))
    name = stand_in()
    quiet = dict(cuda=False, cache=False, save_cpu_ram=True, verbose=False)
    sets = dict(input1=Images(one), input2=Images(two))
    theirs = fidelity.calculate_metrics(fid=True, feature_extractor=name, **sets, **quiet)
    features = [moments(photo_features(x, name)['features']) for x in (one, two)]
    ours = frechet_distance(*features)
    assert ours == pytest.approx(theirs[fidelity.KEY_METRIC_FID], rel=1e-3, abs=1e-6)


class Images(torch.utils.data.Dataset):
    "A tensor as a data set of images."

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_distance_on_all_axes_is_that_of_the_features():
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(300, 6, generator=g), 1.5 * torch.randn(300, 6, generator=g) + 0.2
    labels = torch.arange(300) % 3
    whole = frechet_distance(moments(one), moments(two))
    for count, close in ((6, True), (3, False)):
        axes = fit_axes(one, labels, count)
        on_axes = [moments(axes(x).features) for x in (one, two)]
        assert (abs(frechet_distance(*on_axes) - whole) < 1e-3 * whole) == close


def test_fidelity_of_the_committed_files():
    "The data card states their hashes; the reference is complete and interleaved by class."
    card = data_file('README.md').read_text()
    weights = data_file('vae-cifar/diffusion_pytorch_model.safetensors')
    for file in (weights, data_file('cifar_reference.safetensors')):
        assert f'`{sha256(file)}`' in card
    assert load_card(data_file('vae-cifar/card.json'))['sha256'] == sha256(weights)
    net = Autoencoder(str(weights.parent), scale=1.0).net
    assert net.config.latent_channels == 6 and net.config.scaling_factor == 1
    name = read_card(data_file('cifar_reference.safetensors'))['extractor']
    reference = load_photo_reference(data_file('cifar_reference.safetensors'), name)
    axes = reference.axes.axes
    assert torch.allclose(axes.T @ axes, torch.eye(64), atol=1e-5)
    scores = compute_metrics(reference.test, torch.arange(2000) % 10, reference.real)
    assert scores['accuracy'] == pytest.approx(0.672, abs=0.01) and scores['fd'] < 25


def test_the_data_page_has_the_numbers_of_the_report():
    card, reports = (
        data_file('README.md').read_text(),
        data_file('README.md').parents[1] / 'reports',
    )
    table = pd.read_csv(reports / 'eval_sit-cifar_5.csv').set_index('solver')
    assert table.samples['teacher'] == 4000
    fd = table.fd.round().astype(int)
    share = (100 * table.accuracy).round().astype(int)
    said = (
        f'the distance is {fd["teacher"]}; that of test images through the autoencoder is '
        f'{fd["reconstructed"]}, that of test images {fd["real"]}. The classifier finds the class '
        f'in {share["teacher"]} % of the samples, in {share["reconstructed"]} % of the '
        f'reconstructions and in {share["real"]} % of the test images.'
    )
    assert said in card


def test_reference_of_another_extractor_is_refused(tmp_path):
    file = tmp_path / 'r.safetensors'
    card = json.dumps(dict(extractor='another'))
    save_file(dict(mu=torch.zeros(1)), file, dict(card=card))
    with pytest.raises(ValueError, match='was made with another, the network in use is'):
        load_photo_reference(file, stand_in())


def test_a_bad_image_is_refused():
    with pytest.raises(ValueError, match='give uint8'):
        photo_features(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), 'any')


def test_efficientnet_with_fused_norms_is_the_published_one():
    "The packages' own network, unfused, on images of 64 pixels."
    import efficientnet_lite_pytorch as package

    from neuralsolver.photo_features import efficientnet_file

    published = package.EfficientNet.from_name('efficientnet-lite0')
    published.load_state_dict(torch.load(efficientnet_file(), weights_only=True))
    published.eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        theirs = published.extract_features((images.float() - 127) / 128).mean((2, 3))
    ours = PhotoNet(efficientnet_lite0())(images)
    assert torch.allclose(ours['features'], theirs, atol=1e-3)
    assert ours['spatial'].shape == (2, 64)


def test_early_layers_are_those_of_the_network():
    net = efficientnet_lite0()
    kept = {}
    for i in (0, 2, 4):
        net._blocks[i].register_forward_hook(lambda m, a, out, i=i: kept.update({i: out}))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    PhotoNet(net)(images)
    early = EarlyLayers(net)((images.float() - 127.5) / 127.5)
    assert [list(f.shape[1:]) for f in early] == [[16, 32, 32], [24, 16, 16], [40, 8, 8]]
    for layer, i in zip(early, (0, 2, 4)):
        assert torch.allclose(layer, kept[i], atol=1e-4)


# the protocol of colour models


@pytest.fixture(scope='module')
def toy(made, tmp_path_factory):
    "A model on the toy latents, trained for some steps."
    out = tmp_path_factory.mktemp('toy')
    settings = dict(latents=made / 'vae-toy_latents.safetensors', patch_size=4, label_dropout=0.1)
    settings |= dict(samples=40 * 16, batch_size=16, lr=3e-3, warmup=4, threads=1)
    run_notebook('train', model='toy', out_dir=out, **settings)
    return out / 'toy.safetensors'


@pytest.fixture(scope='module')
def given(toy, made, statistics):
    "Parameters of a tiny evaluation."
    parts = dict(model=str(toy), vae=str(made / 'vae-toy'), reference=str(statistics))
    sizes = dict(steps=4, samples=32, seeds='0,1', teacher_steps=8, batch_size=6)
    return parts | sizes | dict(solvers='euler,adam2')


@pytest.fixture(scope='module')
def evaluated(given, tmp_path_factory):
    "The folder of eval.ipynb."
    folder = tmp_path_factory.mktemp('evaluated')
    in_process('eval', **given, reports_dir=str(folder))
    return folder


def test_a_model_of_colour_latents_is_evaluated_by_photographs(given):
    p = Protocol(**given)
    assert (p.protocol, p.vae_scale, p.guidance) == ('photo', 1.0, 2.0)
    assert (p.sample_shape, p.image_shape) == ((2, 8, 8), (3, 32, 32))
    assert Protocol('sit-tiny').protocol == 'fashion'


def test_the_table_is_that_of_latents_decoder_and_features(evaluated, given, made, statistics):
    "Every number of a row, computed step by step from the noise."
    table = pd.read_csv(evaluated / 'eval_toy_4.csv').set_index('solver')
    assert list(table.index) == ['euler', 'adam2', 'teacher', 'real', 'reconstructed']
    reference = load_photo_reference(statistics, register_photo_extractor())
    field = ns.Field(load_weights(given['model']), guidance=2.0)
    vae = Autoencoder(str(made / 'vae-toy'), scale=1.0)
    labels = torch.arange(16) % 10
    scores = []
    for seed in (0, 1):
        noise = indexed_noise(range(16), (2, 8, 8), seed)
        images = to_uint8(vae.decode(ns.sample(field, noise, ns.adam2(4), labels)))
        raw = photo_features(images)
        heads = reference.axes(raw['features'])._asdict() | dict(spatial=raw['spatial'])
        scores.append(photo_metrics(heads, labels, reference))
    for metric, mean in pd.DataFrame(scores).mean().items():
        assert table.loc['adam2', metric] == pytest.approx(mean, rel=1e-2, abs=1e-2), metric
    for metric in ('fd', 'sfd'):
        above = table[metric] - table[metric]['teacher']
        paired = table[f'{metric}_above']
        assert above['euler'] == pytest.approx(paired['euler'], rel=1e-3, abs=1e-3)
    assert table.rmse['teacher'] == 0 < table.rmse['adam2'] < table.rmse['euler']


def test_real_and_reconstructed_rows(evaluated, archive, made, statistics):
    "Test images, and the same through the autoencoder, as many a seed as there are samples."
    table = pd.read_csv(evaluated / 'eval_toy_4.csv').set_index('solver')
    reference = load_photo_reference(statistics, register_photo_extractor())
    images, classes = cifar10('test', archive)
    images = images[balanced_indices(classes, 8)]
    vae = Autoencoder(str(made / 'vae-toy'), scale=1.0)
    through = to_uint8(vae.decode(encode(vae.net, images)))
    for name, shown in dict(real=images, reconstructed=through).items():
        raw = photo_features(shown)
        heads = reference.axes(raw['features'])._asdict() | dict(spatial=raw['spatial'])
        parts = [{k: v[a : a + 16] for k, v in heads.items()} for a in (0, 16)]
        labels = torch.arange(32) % 10
        fd = [photo_metrics(h, labels[a : a + 16], reference) for h, a in zip(parts, (0, 16))]
        mean = np.mean([score['fd'] for score in fd])
        assert table.fd[name] == pytest.approx(mean, rel=1e-2)
    assert table.fd['reconstructed'] > table.fd['real']
    assert table.nfe[['real', 'reconstructed']].isna().all()


def test_reconstructions_of_other_weights_are_not_used(archive, made, statistics, tmp_path):
    reference = load_photo_reference(statistics, register_photo_extractor())
    assert read_reconstructions(made / 'vae-toy', reference) is not None
    net = Autoencoder(str(made / 'vae-toy'), scale=1.0).net
    net.decoder.conv_out.bias += 0.1
    net.save_pretrained(tmp_path)
    assert read_reconstructions(tmp_path, reference) is None
    images = cifar10('test', archive)[0][:10]
    heads = write_reconstructions(tmp_path, images, reference)
    again = read_reconstructions(tmp_path, reference)
    assert torch.allclose(again['logits'], heads['logits'], atol=0.02, rtol=1e-2)
    fewer = reference._replace(axes=reference.axes._replace(axes=reference.axes.axes[:, :4]))
    assert read_reconstructions(tmp_path, fewer) is None


def test_the_same_command_gives_the_same_bytes(evaluated, given, tmp_path):
    "Computed anew, but for the seconds; and read back from the shards, to the last byte."
    before = {f: (evaluated / f).read_bytes() for f in ('eval_toy_4.csv', 'eval_toy_4.md')}
    in_process('eval', **given, reports_dir=str(evaluated))
    assert all((evaluated / f).read_bytes() == bytes_ for f, bytes_ in before.items())
    in_process('eval', **given, reports_dir=str(tmp_path))
    one, other = (pd.read_csv(d / 'eval_toy_4.csv') for d in (evaluated, tmp_path))
    pd.testing.assert_frame_equal(
        one.drop(columns='seconds'), other.drop(columns='seconds'), check_exact=True
    )
    assert (tmp_path / 'eval_toy_4.md').read_bytes() == before['eval_toy_4.md']


def test_the_names_of_the_numbers_say_their_features(evaluated, given):
    text = (evaluated / 'eval_toy_4.md').read_text()
    head = text.splitlines()[0]
    assert 'FD (EfficientNet-Lite0)' in head and 'sFD above teacher, paired' in head
    assert ' FID |' not in head.replace('FID reported', '') and 'fashion' not in text
    assert 'not FID and sFID' in protocol_sentence(Protocol(**given))
    card = json.loads((evaluated / 'eval_toy_4.json').read_text())
    assert card['identity']['extractor'].startswith('efficientnet-lite0-')
    assert card['metrics']['axes'] == 8 and card['metrics']['n_real_fd'] == 240
    assert set(card['identity']['vae']) >= {'config.json', 'scale'}


def test_curves_of_a_colour_model(given, tmp_path):
    settings = dict(given, steps='3,4', solvers='euler,adam2', reports_dir=str(tmp_path))
    in_process('curves', **settings)
    table = pd.read_csv(next(tmp_path.glob('curves*.csv')))
    assert set(table.solver) == {'euler', 'adam2', 'teacher', 'real', 'reconstructed'}
    assert table.sfd.notna().all() and len(list(tmp_path.glob('curves*.png'))) == 2
    text = next(tmp_path.glob('curves*.md')).read_text()
    assert '**sFD (EfficientNet-Lite0), measured**' in text and 'reconstructed images:' in text


def test_refusals_of_the_protocol(given, made, monkeypatch, tmp_path):
    wrong = {
        'images of 1 x 28 x 28, those of': dict(protocol='fashion'),
        'decodes latents of 6 channels': dict(vae='vae-cifar'),
        'is not there or not known': dict(reference='nowhere'),
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            Protocol(**given | changes)
    with pytest.raises(ValueError, match='those of sit-tiny are 1 x 28 x 28: give fashion'):
        Protocol('sit-tiny', protocol='photo')
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name.startswith('efficientnet') else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, 'find_spec', absent)
    install = (
        r'needs efficientnet_lite_pytorch and .*: pip install "neuralsolver\[diffusers,features'
    )
    with pytest.raises(ValueError, match=install):
        Protocol(**given)


def test_a_reference_that_is_no_reference_is_refused(tmp_path):
    file = tmp_path / 'other.safetensors'
    save_file(dict(mu=torch.zeros(1)), file)
    with pytest.raises(ValueError, match='is no reference of photographs'):
        load_photo_reference(file, stand_in())


@torch.inference_mode()
def test_fidelity_of_the_latent_model_to_its_classes():
    "The classifier of the reference finds the class asked for in decoded samples."
    file = data_file('cifar_reference.safetensors')
    photos = load_photo_reference(file, register_photo_extractor())
    net, labels = ns.load_model('sit-cifar'), torch.arange(100) % 10
    noise = indexed_noise(range(100), net.sample_shape)
    latents = ns.sample(ns.Field(net, guidance=2.0), noise, ns.load_solver('sit-xl-2', 8), labels)
    pixels = to_uint8(Autoencoder('vae-cifar', scale=1.0).decode(latents))
    found = PhotoExtractor(photos.axes)(pixels)['logits'].argmax(1)
    assert (found == labels).float().mean() >= 0.3  # 0.1 by chance
