"The training loop: its targets, its determinism under interruption, what it refuses, and the notebook that calls it."

import json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from neuralsolver.data import fashion_mnist
from neuralsolver.fields import Field, GaussianMixture
from neuralsolver.checkpoints import ARCHITECTURES, load_card, load_weights
from neuralsolver.models import SIZES, DiT, SiT
from neuralsolver.paths import PREDICTIONS, LinearPath, VPPath
from neuralsolver.classical import adam2
from neuralsolver.solvers import sample
from neuralsolver.store import read_card
from neuralsolver.training import regression_loss, regression_target, train
from neuralsolver.utils import data_file
from test_data import papermill, small_dataset  # noqa: F401, the fixture


def tiny(num_classes=10, dropout=0.1):
    torch.manual_seed(0)
    return SiT(
        8,
        4,
        1,
        hidden_size=32,
        depth=1,
        num_heads=2,
        class_dropout_prob=dropout,
        num_classes=num_classes,
        learn_sigma=False,
    )


@pytest.fixture
def garments():
    with np.load(data_file('fashion_mixture.npz')) as f:
        images, labels = f['images'][:200, :, 2:26:3, 2:26:3], f['labels'][:200]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


SHORT = dict(
    samples=14 * 16, batch_size=16, lr=3e-3, warmup=3, save_every=4, progress=False
)  # 12 steps an epoch: the second is entered


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


# targets


@pytest.mark.parametrize('path', [LinearPath(), VPPath()], ids=['linear', 'vp'])
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_target_is_what_the_samplers_convert_from(path, prediction):
    g = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(6, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x, target = (
        path.interpolate(data, noise, t),
        regression_target(path, prediction, data, noise, t),
    )
    for wanted, truth in dict(data=data, noise=noise).items():
        assert torch.allclose(path.convert(x, t, target, prediction, wanted), truth, atol=1e-9)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_the_exact_field_minimises_the_loss(prediction):
    "On data from a mixture, whose conditional expectations are known in closed form, every perturbation of them has a larger loss."
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 4, generator=g)
    field = GaussianMixture(centers, 0.3, prediction=prediction)
    data = centers[torch.randint(5, (20_000,), generator=g)] + 0.3 * torch.randn(
        20_000, 4, generator=g
    )
    noise, t = torch.randn(20_000, 4, generator=g), torch.rand(20_000, generator=g)
    loss = lambda net: regression_loss(net, LinearPath(), prediction, data, noise, t, None).item()
    exact = loss(field)
    for change in (
        lambda v, t: v * 0.9,
        lambda v, t: v * 1.1,
        lambda v, t: v + 0.2,
        lambda v, t: v * (0.8 + 0.4 * t[:, None]),
    ):
        assert loss(lambda x, t, y: change(field(x, t, y), t)) > exact


def test_a_network_is_told_its_own_time(garments):
    "A DiT is trained on its own path, told 1000 t of a time that the path has; its target is the noise."
    torch.manual_seed(0)
    net = DiT(8, 4, 1, hidden_size=32, depth=1, num_heads=2, num_classes=10, learn_sigma=False)
    told = []
    net.register_forward_pre_hook(lambda m, args: told.append(args[1]))
    data, noise = torch.randn(64, 1, 8, 8), torch.randn(64, 1, 8, 8)
    t = torch.linspace(0, 1, 64)
    loss = regression_loss(
        net, net.path, net.prediction, data, noise, t, torch.zeros(64, dtype=torch.long)
    )
    assert torch.equal(told[0], 1000 * t.clamp(1e-3, 1)) and torch.isclose(
        loss, noise.square().mean()
    )  # zero-initialised: it predicts 0
    a = train(net, *garments, **SHORT)
    assert a.finished and len(told) > 1 and a.losses[0] > 0.8


def test_training_learns_which_image_belongs_to_which_class():
    "Two classes of one image each: the loss falls, and a sample of a class is its image."
    images = torch.full((40, 1, 8, 8), 40, dtype=torch.uint8)
    images[::2, :, :, 4:] = 220
    images[1::2, :, 4:] = 220
    labels = torch.arange(40) % 2
    result = train(
        tiny(2),
        images,
        labels,
        samples=250 * 32,
        batch_size=32,
        lr=1e-2,
        warmup=20,
        ema_decay=0.98,
        progress=False,
    )
    assert np.mean(result.losses[-20:]) < 0.25 * result.losses[0] and result.finished
    net = tiny(2).eval()
    net.load_state_dict(result.weights)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = sample(Field(net), noise, adam2(20), labels[:20])
    distance = (
        (x[:, None] - (images[:2] / 127.5 - 1)[None]).square().mean((2, 3, 4))
    )  # to either image
    assert (distance.argmin(1) == labels[:20]).all() and distance.min(1).values.max() < 0.1


# determinism


def test_pieces_and_interruptions_change_no_bit(tmp_path, garments):
    whole = train(tiny(), *garments, **SHORT)
    piece = train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', stop_after=5, **SHORT)
    assert piece.losses == whole.losses[:5] and not piece.finished
    assert same(train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT), whole)
    for at in (
        1,
        7,
    ):  # before the first and after a later checkpoint; the interrupted network itself resumes
        net = tiny()
        net.__class__ = Interrupted
        net.at = at
        with pytest.raises(KeyboardInterrupt):
            train(net, *garments, checkpoint=tmp_path / f'{at}.ckpt', **SHORT)
        assert read_card(tmp_path / f'{at}.ckpt')[1]['done'] == (0 if at == 1 else 4)
        assert same(train(net, *garments, checkpoint=tmp_path / f'{at}.ckpt', **SHORT), whole)
    assert not [p for p in tmp_path.iterdir() if p.suffix != '.ckpt' or p.name.startswith('.')]


def test_a_finished_training_does_nothing_more_and_the_callers_generator_is_untouched(
    tmp_path, garments
):
    whole = train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT)
    net = tiny()
    net.__class__ = Interrupted
    net.at = 1  # any call would raise
    assert same(train(net, *garments, checkpoint=tmp_path / 'a.ckpt', **SHORT), whole)
    net = tiny()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    train(net, *garments, **SHORT | dict(samples=32))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_label_dropout_happens(garments):
    "The null class's row of the table moves if and only if labels are dropped."
    for dropout, moves in ((0.5, True), (1e-9, False)):
        result = train(tiny(dropout=dropout), *garments, **SHORT)
        assert (
            torch.equal(
                result.weights['y_embedder.embedding_table.weight'][10],
                tiny().y_embedder.embedding_table.weight[10],
            )
            != moves
        )


# refusals


def test_a_checkpoint_of_another_training_is_refused(tmp_path, garments):
    train(tiny(), *garments, checkpoint=tmp_path / 'a.ckpt', stop_after=1, **SHORT)
    before = (tmp_path / 'a.ckpt').read_bytes()

    def again(net=None, images=garments[0], path=LinearPath(), **kw):
        train(
            net or tiny(), images, garments[1], path, checkpoint=tmp_path / 'a.ckpt', **SHORT | kw
        )

    for key, value in dict(
        samples=320, batch_size=8, lr=1e-3, warmup=2, ema_decay=0.9, seed=1, prediction='data'
    ).items():
        with pytest.raises(ValueError, match=rf'another training \({key}: '):
            again(**{key: value})
    with pytest.raises(ValueError, match=r'\(path: '):
        again(path=VPPath())
    with pytest.raises(ValueError, match=r'\(config: another\)'):
        again(tiny(dropout=0.2))
    with pytest.raises(ValueError, match=r'\(sha256: another\)'):
        again(images=garments[0].flip(3))
    torch.save({'net': {}}, tmp_path / 'b.ckpt')
    with pytest.raises(ValueError, match='older version: delete it'):
        train(tiny(), *garments, checkpoint=tmp_path / 'b.ckpt', **SHORT)
    assert (tmp_path / 'a.ckpt').read_bytes() == before


def test_a_diverging_training_stops(garments):
    net = tiny()
    torch.nn.init.constant_(net.final_layer.linear.bias, float('nan'))
    with pytest.raises(FloatingPointError, match='step 0'):
        train(net, *garments, **SHORT)


# the notebook


def test_notebook_in_two_runs_makes_the_weights_of_the_function(tmp_path, small_dataset):  # noqa: F811
    settings = dict(samples=192, batch_size=32, lr=0.002, warmup=2, ema_decay=0.9, seed=3)
    common = dict(
        settings,
        model='toy',
        patch_size=14,
        label_dropout=0.2,
        threads=1,
        root=small_dataset,
        out_dir=tmp_path,
    )
    papermill('train.ipynb', tmp_path, stop_after=2, **common)
    assert (
        not (tmp_path / 'toy.safetensors').exists()
        and len(pd.read_csv(tmp_path / 'toy_history.csv')) == 2
    )
    papermill('train.ipynb', tmp_path, **common)
    torch.manual_seed(3)
    net = SiT(28, 14, 1, **SIZES['tiny'], class_dropout_prob=0.2, num_classes=10, learn_sigma=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train(net, *fashion_mnist('train', small_dataset), progress=False, **settings)
    torch.set_num_threads(threads)
    made, card = load_weights(tmp_path / 'toy.safetensors'), load_card(tmp_path / 'toy.json')
    assert all(torch.equal(v, expected.weights[k]) for k, v in made.state_dict().items())
    assert (
        np.allclose(pd.read_csv(tmp_path / 'toy_history.csv')['loss'], expected.losses, rtol=1e-5)
        and (tmp_path / 'toy.png').exists()
    )
    told = settings | dict(model='toy', patch_size=14, label_dropout=0.2)
    assert card['samples'] == 192 and all(
        f'-p {k} {v} ' in card['command'] for k, v in told.items()
    )


@pytest.mark.parametrize(
    'name, changed',
    [
        ('sit-tiny', {}),
        ('dit-tiny', dict(model='dit-tiny', architecture='DiT', samples=1280000)),
        (
            'flowdcn-tiny',
            dict(model='flowdcn-tiny', architecture='FlowDCN', samples=768000, threads=1),
        ),
    ],
)
def test_the_committed_cards_name_the_notebooks_parameters(name, changed):
    "The command is the notebook's defaults but for what the notebook says, the weights are a tiny network's, and the hash is theirs."
    cells = json.loads(
        (Path(__file__).resolve().parent.parent / 'train.ipynb').read_text(encoding='utf-8')
    )['cells']
    defaults, card = {}, load_card(data_file(f'{name}.json'))
    exec(
        ''.join(next(c['source'] for c in cells if 'parameters' in c['metadata'].get('tags', []))),
        defaults,
    )
    words = card['command'].split()
    given = dict(zip(words[3::3], words[4::3]))
    assert words[:2] == ['papermill', 'nbs/train.ipynb'] and set(words[2::3]) == {'-p'}
    assert all(str((defaults | changed)[k]) == v for k, v in given.items()) and all(
        f'-p {k} {v}' in card['command'] for k, v in changed.items()
    )
    assert {
        'model',
        'size',
        'patch_size',
        'samples',
        'batch_size',
        'lr',
        'warmup',
        'ema_decay',
        'label_dropout',
        'seed',
    } <= set(given)
    assert (
        card['samples'] == (defaults | changed)['samples']
        and load_weights(data_file(f'{name}.safetensors')).config == card['config']
    )
    assert set(load_file(data_file(f'{name}.safetensors'))) == set(
        ARCHITECTURES[card['architecture']](**card['config']).state_dict()
    )
    assert f'## {name}.safetensors\n\n`{card["sha256"]}`' in data_file('README.md').read_text(
        encoding='utf-8'
    )
