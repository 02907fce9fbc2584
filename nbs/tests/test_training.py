"The training loop: targets, determinism under interruption, refusals, and its notebook."

import numpy as np
import pandas as pd
import pytest
import torch
from notebooks import defaults_of, run_notebook
from safetensors.torch import load_file
from test_data import small_dataset  # noqa: F401, the fixture

from neuralsolver.checkpoints import ARCHITECTURES, load_card, load_weights
from neuralsolver.data import fashion_mnist
from neuralsolver.fields import Field, GaussianMixture
from neuralsolver.models import SIZES, DiT, SiT
from neuralsolver.paths import PREDICTIONS, LinearPath, VPPath
from neuralsolver.classical import adam2
from neuralsolver.solvers import sample
from neuralsolver.store import read_card
from neuralsolver.training import regression_loss, regression_target, train
from neuralsolver.utils import data_file

SMALL = dict(hidden_size=32, depth=1, num_heads=2, learn_sigma=False)


def tiny(num_classes=10, dropout=0.1):
    torch.manual_seed(0)
    return SiT(8, 4, 1, **SMALL, class_dropout_prob=dropout, num_classes=num_classes)


@pytest.fixture
def garments():
    with np.load(data_file('fashion_mixture.npz')) as f:
        images, labels = f['images'][:200, :, 2:26:3, 2:26:3], f['labels'][:200]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


# 12 steps an epoch: the second is entered
SHORT = dict(samples=14 * 16, batch_size=16, lr=3e-3, warmup=3, save_every=4, progress=False)


class Interrupted(SiT):
    "Ctrl-C inside the forward pass of call `at`."

    at = 0

    def forward(self, x, t, y):
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        return super().forward(x, t, y)


Interrupted.__name__ = 'SiT'  # the same network to the checkpoint


def same(a, b):
    return a.losses == b.losses and all(torch.equal(v, b.weights[k]) for k, v in a.weights.items())


# fidelity: the targets


@pytest.mark.parametrize('path', [LinearPath(), VPPath()], ids=['linear', 'vp'])
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_fidelity_of_the_target_to_what_samplers_read(path, prediction):
    g = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(6, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x = path.interpolate(data, noise, t)
    target = regression_target(path, prediction, data, noise, t)
    for wanted, truth in dict(data=data, noise=noise).items():
        assert torch.allclose(path.convert(x, t, target, prediction, wanted), truth, atol=1e-9)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_fidelity_of_the_minimiser(prediction):
    "The exact field of a mixture minimises the loss: every change of it has a larger one."
    g = torch.Generator().manual_seed(0)
    n = 20_000
    centers = torch.randn(5, 4, generator=g)
    field = GaussianMixture(centers, 0.3, prediction=prediction)
    data = centers[torch.randint(5, (n,), generator=g)] + 0.3 * torch.randn(n, 4, generator=g)
    noise = torch.randn(n, 4, generator=g)
    t = torch.rand(n, generator=g)
    changes = {
        'none': lambda v, t: v,
        'smaller': lambda v, t: v * 0.9,
        'larger': lambda v, t: v * 1.1,
        'shifted': lambda v, t: v + 0.2,
        'by time': lambda v, t: v * (0.8 + 0.4 * t[:, None]),
    }

    def loss(change):
        def net(x, t, y):
            return change(field(x, t, y), t)

        return regression_loss(net, LinearPath(), prediction, data, noise, t, None).item()

    losses = {name: loss(change) for name, change in changes.items()}
    assert min(losses, key=losses.get) == 'none'
    assert sorted(losses.values())[1] > losses['none']


def test_fidelity_of_the_time_that_a_network_is_told(garments):
    "A DiT is told 1000 t of a time that its path has; its target is the noise."
    torch.manual_seed(0)
    net = DiT(8, 4, 1, **SMALL, num_classes=10)
    told = []
    net.register_forward_pre_hook(lambda m, args: told.append(args[1]))
    data, noise = torch.randn(64, 1, 8, 8), torch.randn(64, 1, 8, 8)
    t = torch.linspace(0, 1, 64)
    labels = torch.zeros(64, dtype=torch.long)
    loss = regression_loss(net, net.path, net.prediction, data, noise, t, labels)
    assert torch.equal(told[0], 1000 * t.clamp(1e-3, 1))
    assert torch.isclose(loss, noise.square().mean())  # zero-initialised: it predicts 0
    a = train(net, *garments, **SHORT)
    assert a.finished and len(told) > 1 and a.losses[0] > 0.8


def test_fidelity_of_samples_to_their_class():
    "Two classes of one image each: the loss falls, and a sample of a class is its image."
    images = torch.full((40, 1, 8, 8), 40, dtype=torch.uint8)
    images[::2, :, :, 4:] = 220
    images[1::2, :, 4:] = 220
    labels = torch.arange(40) % 2
    settings = dict(samples=250 * 32, batch_size=32, lr=1e-2, warmup=20, ema_decay=0.98)
    result = train(tiny(2), images, labels, **settings, progress=False)
    assert np.mean(result.losses[-20:]) < 0.25 * result.losses[0] and result.finished
    net = tiny(2).eval()
    net.load_state_dict(result.weights)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = sample(Field(net), noise, adam2(20), labels[:20])
    both = images[:2] / 127.5 - 1
    distance = (x[:, None] - both[None]).square().mean((2, 3, 4))
    assert (distance.argmin(1) == labels[:20]).all() and distance.min(1).values.max() < 0.1


# determinism and resume


def test_resume_changes_no_bit(tmp_path, garments):
    whole = train(tiny(), *garments, **SHORT)
    piece = train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', stop_after=5, **SHORT)
    assert piece.losses == whole.losses[:5] and not piece.finished
    assert same(train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT), whole)


@pytest.mark.parametrize('at, kept', [(1, 0), (7, 4)])
def test_resume_of_an_interrupted_network(tmp_path, garments, at, kept):
    "Interrupted before the first checkpoint and after a later one."
    file = tmp_path / 'a.ckpt'
    whole = train(tiny(), *garments, **SHORT)
    net = tiny()
    net.__class__ = Interrupted
    net.at = at
    with pytest.raises(KeyboardInterrupt):
        train(net, *garments, checkpoint=file, **SHORT)
    assert read_card(file)[1]['done'] == kept
    assert same(train(net, *garments, checkpoint=file, **SHORT), whole)
    assert [p.name for p in tmp_path.iterdir()] == ['a.ckpt']


def test_resume_of_a_finished_training_calls_nothing(tmp_path, garments):
    whole = train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT)
    net = tiny()
    net.__class__ = Interrupted
    net.at = 1  # any call would raise
    assert same(train(net, *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT), whole)


def test_determinism_leaves_the_callers_generator(garments):
    torch.manual_seed(3)
    net = tiny()
    state = torch.random.get_rng_state()
    train(net, *garments, **SHORT | dict(samples=32))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize('dropout, moves', [(0.5, True), (1e-9, False)])
def test_gradient_of_the_null_class_by_label_dropout(garments, dropout, moves):
    result = train(tiny(dropout=dropout), *garments, **SHORT)
    null = result.weights['y_embedder.embedding_table.weight'][10]
    assert torch.equal(null, tiny().y_embedder.embedding_table.weight[10]) != moves


# refusal


def test_refusal_of_a_checkpoint_of_another_training(tmp_path, garments):
    file = tmp_path / 'a.ckpt'
    images, labels = garments
    train(tiny(), images, labels, checkpoint=file, stop_after=1, **SHORT)
    before = file.read_bytes()
    others = dict(samples=320, batch_size=8, lr=1e-3, warmup=2, ema_decay=0.9, seed=1)
    for key, value in (others | dict(prediction='data', path=VPPath())).items():
        with pytest.raises(ValueError, match=rf'another training \({key}: '):
            train(tiny(), images, labels, checkpoint=file, **SHORT | {key: value})
    with pytest.raises(ValueError, match=r'\(config: another\)'):
        train(tiny(dropout=0.2), images, labels, checkpoint=file, **SHORT)
    with pytest.raises(ValueError, match=r'\(sha256: another\)'):
        train(tiny(), images.flip(3), labels, checkpoint=file, **SHORT)
    assert file.read_bytes() == before


def test_refusal_of_a_diverging_training(garments):
    net = tiny()
    torch.nn.init.constant_(net.final_layer.linear.bias, float('nan'))
    with pytest.raises(FloatingPointError, match='step 0'):
        train(net, *garments, **SHORT)


# the notebook and the committed models


def test_notebook_in_two_runs_makes_the_same_weights(tmp_path, small_dataset):  # noqa: F811
    settings = dict(samples=192, batch_size=32, lr=0.002, warmup=2, ema_decay=0.9, seed=3)
    named = dict(model='toy', patch_size=14, label_dropout=0.2)
    common = settings | named | dict(threads=1, root=small_dataset, out_dir=tmp_path)
    run_notebook('train', stop_after=2, **common)
    assert not (tmp_path / 'toy.safetensors').exists()
    assert len(pd.read_csv(tmp_path / 'toy_history.csv')) == 2
    run_notebook('train', **common)
    torch.manual_seed(3)
    net = SiT(28, 14, 1, **SIZES['tiny'], class_dropout_prob=0.2, num_classes=10, learn_sigma=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train(net, *fashion_mnist('train', small_dataset), progress=False, **settings)
    torch.set_num_threads(threads)
    made = load_weights(tmp_path / 'toy.safetensors').state_dict()
    assert all(torch.equal(v, expected.weights[k]) for k, v in made.items())
    losses = pd.read_csv(tmp_path / 'toy_history.csv')['loss']
    assert np.allclose(losses, expected.losses, rtol=1e-5) and (tmp_path / 'toy.png').exists()
    card = load_card(tmp_path / 'toy.json')
    assert card['samples'] == 192
    assert all(f'-p {k} {v} ' in card['command'] for k, v in (settings | named).items())


CHANGED = {  # what the notebook says of each model
    'sit-tiny': {},
    'dit-tiny': dict(model='dit-tiny', architecture='DiT', samples=1280000),
    'flowdcn-tiny': dict(model='flowdcn-tiny', architecture='FlowDCN', samples=768000, threads=1),
    'sit-cifar': dict(
        model='sit-cifar',
        latents='results/train/vae-cifar_latents.safetensors',
        size='mini',
        patch_size=2,
        samples=3008000,
        warmup=1000,
        hold=8000,
        ema_decay=1.0,
        times='logit-normal',
        precision='bfloat16-mixed',
        half=True,
        compiled=True,
    ),
}


@pytest.mark.parametrize('name', CHANGED)
def test_fidelity_of_the_committed_cards(name):
    "A card's command is the notebook's defaults but for what the notebook says."
    card = load_card(data_file(f'{name}.json'))
    expected = defaults_of('train') | CHANGED[name]
    words = card['command'].split()
    given = dict(zip(words[3::3], words[4::3]))
    assert words[:2] == ['papermill', 'nbs/train.ipynb'] and set(words[2::3]) == {'-p'}
    assert all(str(expected[k]) == v for k, v in given.items())
    assert CHANGED[name].keys() <= given.keys()
    settings = 'model size patch_size samples batch_size lr warmup ema_decay label_dropout seed'
    assert set(settings.split()) <= set(given)
    assert card['samples'] == expected['samples']
    file = data_file(f'{name}.safetensors')
    assert load_weights(file).config == card['config']
    net = ARCHITECTURES[card['architecture']](**card['config'])
    assert set(load_file(file)) == set(net.state_dict())
    assert f'## {name}.safetensors\n\n`{card["sha256"]}`' in data_file('README.md').read_text()
