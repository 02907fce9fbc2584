"Networks against tensors made by the official code, exact fields against autograd and Bayes' rule."

import argparse, json, math, shutil
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from neuralsolver.fields import Field, GaussianMixture, guide
from neuralsolver.kernels import deformable_gather
from neuralsolver.checkpoints import (
    Checkpoint,
    CHECKPOINTS,
    list_models,
    load_checkpoint,
    load_model,
    load_weights,
    make_model,
    save_model,
)
from neuralsolver.flowdcn import FlowDCN
from neuralsolver.models import SIZES, DiT, SiT
from neuralsolver.neural import get_solver, load_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.transfer import change_path
from neuralsolver.classical import euler
from neuralsolver.solvers import sample
from neuralsolver.teachers import teacher_solver
from neuralsolver.utils import data_file, data_root, indexed_noise, sha256

F64 = torch.float64

# SiT against willisma/SiT, DiT against facebookresearch/DiT


@pytest.fixture(
    scope='module', params=[(SiT, 'sit_small', 1e-5), (DiT, 'dit_small', 5e-5)], ids=['SiT', 'DiT']
)
def golden(request):
    "The network with the official random weights, its tensors, and the agreement to expect (data/golden: float32 angles near t = 1000)."
    if not (data_root() / 'golden').is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    architecture, name, atol = request.param
    path = data_root() / f'golden/{name}.safetensors'
    with safe_open(path, 'pt') as f:
        config = json.loads(f.metadata()['config'])
    tensors = load_file(path)
    net = architecture(**config).eval()
    net.load_state_dict(
        {k.removeprefix('params/'): v for k, v in tensors.items() if k.startswith('params/')},
        strict=True,
    )
    return net, tensors, atol


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@torch.no_grad()
def test_forward_and_every_intermediate_tensor(golden):
    net, g, atol = golden
    found, hooks = {}, []
    for name, module in net.named_modules():
        if f'inter/{name}' in g:
            hooks.append(
                module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
            )
    try:
        close(net(g['x'], g['t'], g['y']), g['forward'], atol)
    finally:
        for hook in hooks:
            hook.remove()
    close(net.t_embedder.embedding(g['t']), g['inter/timestep_embedding'], atol)
    names = {k.removeprefix('inter/') for k in g if k.startswith('inter/')} - {'timestep_embedding'}
    assert set(found) == names and len(names) == 7
    for name in names:
        close(found[name], g[f'inter/{name}'], 2 * atol)


@torch.no_grad()
def test_forward_with_cfg(golden):
    "Their rule: real classes first, null class second, three channels guided, every other channel each half's own."
    net, g, atol = golden
    scale, half = g['cfg/cfg_scale'].item(), g['cfg/x'][:6]
    assert scale == pytest.approx(1.375) and (g['cfg/y'][6:] == net.num_classes).all()
    cond, uncond = net(torch.cat([half, half]), g['cfg/t'], g['cfg/y']).chunk(2)
    close(torch.cat([cond, uncond]), g['cfg/model_out'], atol)
    close(guide(cond, uncond, scale, channels=3), g['forward_with_cfg'][:6], 2 * atol)
    close(
        torch.cat([guide(cond, uncond, scale, channels=3)[:, :3], uncond[:, 3:]], 1),
        g['forward_with_cfg'][6:],
        2 * atol,
    )


@torch.no_grad()
def test_a_field_is_forward_with_cfg(golden):
    "One time for the whole batch, hence sample by sample; the learned variance is dropped, and t is what the network is told."
    net, g, atol = golden
    scale = g['cfg/cfg_scale'].item()
    field = Field(net, guidance=scale, guided_channels=3, network_time='t')
    for i in range(6):
        close(
            field(g['cfg/x'][i : i + 1], g['cfg/t'][i], g['cfg/y'][i : i + 1]),
            g['forward_with_cfg'][i : i + 1, :4],
            2 * atol,
        )


@torch.no_grad()
def test_a_dit_is_told_1000_t_and_guided_on_three_channels_by_default():
    torch.manual_seed(0)
    net = DiT(8, 4, 4, 32, 1, 2, num_classes=10).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 4, 9]), torch.tensor(0.7)
    cond, uncond = (
        net(x, torch.full((3,), 700.0), y),
        net(x, torch.full((3,), 700.0), torch.full((3,), 10)),
    )
    epsilon = torch.cat(
        [uncond[:, :3] + 1.5 * (cond - uncond)[:, :3], cond[:, 3:4]], 1
    )  # the learned variance, channels 4 to 7, is dropped
    field, path = Field(net, guidance=1.5), VPPath()
    close(field(x, t, y), epsilon, 1e-5)
    close(field.on(path, 'data')(x, t, y), (x - path.sigma(t) * epsilon) / path.alpha(t), 1e-3)
    low = Field(DiT(8, 4, 4, 32, 1, 2, num_classes=10).bfloat16(), network_time='1000t-1')
    told = []
    low.net.register_forward_pre_hook(lambda m, args: told.append(args[1]))
    low(x, torch.tensor(0.7817), y)
    assert (
        told[0].dtype == torch.float32 and abs(told[0][0].item() - 780.7) < 1e-3
    )  # 780.7 would be 780 in bfloat16


# FlowDCN against MCG-NJU/FlowDCN


@pytest.fixture(scope='module')
def dcn():
    if not (data_root() / 'golden').is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    path = data_root() / 'golden/flowdcn_small.safetensors'
    tensors = load_file(path)
    with safe_open(path, 'pt') as f:
        net = FlowDCN(**json.loads(f.metadata()['config'])).eval()
    net.load_state_dict(
        {k.removeprefix('params/'): v for k, v in tensors.items() if k.startswith('params/')},
        strict=True,
    )
    return net, tensors


@pytest.mark.parametrize('part', ['op', 'op_border', 'inter/blocks.0.op'])
def test_the_deformable_operator(dcn, part):
    g = dcn[1]
    v, o, w, out = (
        g[part + ('_' if 'inter' in part else '/') + k]
        for k in ('value', 'offsets', 'weights', 'out')
    )
    close(deformable_gather(v, o, w), out, 5e-6)


def test_floor_would_be_another_operator(dcn):
    "The golden data do tell the border rule: zero padding by floor is far off."
    g = dcn[1]
    points, value = g['op_border/points'], g['op_border/value']
    B, H, W = points.shape[:3]
    grid = torch.stack([2 * points[..., 0] / (W - 1) - 1, 2 * points[..., 1] / (H - 1) - 1], -1)
    floor = torch.nn.functional.grid_sample(
        value[..., 0, :].permute(0, 3, 1, 2), grid, align_corners=True
    ).permute(0, 2, 3, 1)
    gap = (floor - g['op_border/out'][..., 0, :]).abs().amax(-1)
    inside = (points >= 0).all(-1)
    assert gap[inside].max() < 1e-5 and gap.max() > 1


def test_the_operator_has_the_right_gradients():
    draw = lambda *shape, seed: torch.randn(
        *shape, dtype=F64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    v, o, w = (
        draw(1, 3, 2, 2, 3, seed=0),
        draw(1, 3, 2, 2, 4, 2, seed=1),
        draw(1, 3, 2, 2, 4, seed=2),
    )
    assert torch.autograd.gradcheck(lambda *a: deformable_gather(*a), (v, o, w))


@torch.no_grad()
def test_flowdcn_forward_intermediate_tensors_and_guidance(dcn):
    net, g = dcn
    found, hooks = {}, []
    for name, module in net.named_modules():
        if f'inter/{name}' in g:
            hooks.append(
                module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
            )
    try:
        close(net(g['x'], g['t'], g['y']), g['forward'])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(found) == 10
    for name, value in found.items():
        close(value, g[f'inter/{name}'], 2e-5)
    uncond, cond = net(g['cfg/x'], g['cfg/t'], g['cfg/y']).chunk(2)
    scale = g['cfg/cfg_scale'].item()
    close(torch.cat([uncond, cond]), g['cfg/model_out'])
    close(guide(cond, uncond, scale), g['cfg/guided_simple'], 2e-5)
    close(guide(cond, uncond, scale, 3), g['cfg/guided_c3'], 2e-5)
    field = Field(net, guidance=scale)  # what eval uses
    for i in range(6):
        close(
            field(g['cfg/x'][6 + i : 7 + i], g['cfg/t'][6 + i], g['cfg/y'][6 + i : 7 + i]),
            g['cfg/guided_simple'][i : i + 1],
            2e-5,
        )


@pytest.mark.parametrize('size', ['S', 'B', 'L', 'XL'])
def test_flowdcn_keys_in_the_order_of_the_ema_lists(size):
    if not (data_root() / 'golden').is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    manifest = json.loads(data_file(f'golden/flowdcn_{size.lower()}_2.json').read_text())
    with torch.device('meta'):
        net = make_model('FlowDCN', size)
    assert [(k, list(p.shape)) for k, p in net.named_parameters()] == list(
        manifest['keys'].items()
    ) and list(net.state_dict()) == list(manifest['keys'])
    assert (
        sum(p.numel() for p in net.parameters() if p.requires_grad)
        == manifest['n_params_learnable']
    )
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == manifest[
        'not_learnable'
    ]


@torch.no_grad()
def test_flowdcn_takes_any_size(dcn):
    "No position embedding; sides may differ."
    net, g = dcn
    x = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    assert net(x, torch.tensor([0.5]), torch.tensor([1])).shape == x.shape
    small = make_model('FlowDCN', 'tiny', 8, 2, 4, num_classes=3)
    row = small.y_embedder.embedding_table.weight
    assert (
        len(row) == 4 and small.y_embedder.dropout == 0
    )  # a null class without dropout, as official
    with pytest.raises(ValueError, match='num_groups=3 must divide'):
        FlowDCN(num_groups=3, hidden_size=64)
    with pytest.raises(ValueError, match="architecture='Dit'"):
        make_model('Dit', 'XL')


@torch.no_grad()
@pytest.mark.parametrize('dtype, atol', [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_flowdcn_in_half_precision(dcn, dtype, atol):
    "The median: where the border rule jumps, rounding may move a sample to the other side."
    net, g = dcn
    low = FlowDCN(**net.config).eval()
    low.load_state_dict(net.state_dict())
    out = low.to(dtype)(g['x'].to(dtype), g['t'], g['y'])
    gap = (out.float() - g['forward']).abs()
    assert out.dtype == dtype and gap.median() < atol and gap.square().mean().sqrt() < 5 * atol


def test_flowdcn_learns_and_is_saved(tmp_path):
    torch.manual_seed(0)
    net = FlowDCN(1, 2, 16, 2, 7, 10, False, 0.1, 28)
    x, t, y = torch.randn(8, 1, 28, 28), torch.rand(8), torch.arange(8)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        loss = (net(x, t, y) - x.flip(3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (
        losses[0] == pytest.approx(x.square().mean().item(), rel=1e-3)
        and losses[-1] < 0.5 * losses[0]
    )
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for k, p in net.named_parameters()
        if p.requires_grad
    )
    save_model(net, net.state_dict(), tmp_path / 'd.safetensors', {})
    again = load_weights(tmp_path / 'd.safetensors')
    with torch.no_grad():
        assert torch.equal(again(x, t, y), net.eval()(x, t, y))


def test_keys_are_strict(golden):
    net, *_ = golden
    state = net.state_dict()
    for broken in (
        {k: v for k, v in state.items() if k != 'pos_embed'},
        state | {'ema': torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match='pos_embed|ema'):
            net.load_state_dict(broken, strict=True)


@pytest.mark.parametrize(
    'architecture, name, size',
    [(SiT, 'sit_xl_2_256', 32), (DiT, 'dit_xl_2_256', 32), (DiT, 'dit_xl_2_512', 64)],
)
def test_xl_2_has_the_official_keys_shapes_and_count(architecture, name, size):
    if not (data_root() / 'golden').is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    manifest = json.loads(data_file(f'golden/{name}.json').read_text())
    with torch.device('meta'):
        net = architecture(size, **SIZES['XL'])
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == list(
        manifest['keys'].items()
    )  # the order too
    assert sum(p.numel() for p in net.parameters()) == manifest['n_params']
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == manifest[
        'not_learnable'
    ]


def test_vp_path_is_the_official_scheduler():
    if not (data_root() / 'golden').is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    table = json.loads(data_file('golden/vp_tables.json').read_text())['vp_continuous']
    path = VPPath()
    for part in (table, table['clamp']):
        t = torch.tensor(part['t'], dtype=F64)
        for name in part.keys() & {'alpha', 'sigma', 'beta'}:
            torch.testing.assert_close(
                getattr(path, name)(t), torch.tensor(part[name], dtype=F64), rtol=1e-12, atol=0
            )


# Official checkpoints, in small: every layout, on the meta device as the large ones are made


@pytest.fixture
def small(monkeypatch, tmp_path):
    "A 'checkpoint' of tiny size, and how to write it."
    monkeypatch.setitem(SIZES, 'small', dict(depth=2, hidden_size=16, num_heads=2))
    monkeypatch.setitem(
        CHECKPOINTS, 'small', Checkpoint('FlowDCN', 'small', 8, 'someone/FlowDCN', 'small.pt')
    )
    monkeypatch.delenv('NEURALSOLVER_CHECKPOINTS', raising=False)
    net = make_model('FlowDCN', 'small', 8)
    torch.manual_seed(0)
    for p in net.parameters():
        p.data.normal_()
    return net, tmp_path / 'small.pt'


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())
    )


LAYOUTS = {
    'plain': lambda net: net.state_dict(),
    'module': lambda net: {f'module.{k}': v for k, v in net.state_dict().items()},
    'ema before model': lambda net: dict(
        model={k: v * 0 for k, v in net.state_dict().items()},
        ema=net.state_dict(),
        opt={},
        args=argparse.Namespace(lr=0.1),
    ),
    'model': lambda net: dict(model=net.state_dict()),
    'state_dict': lambda net: dict(state_dict=net.state_dict(), epoch=3),
    'ema list': lambda net: dict(
        state_dict={k: v * 0 for k, v in net.state_dict().items()},
        optimizer_states=[dict(ema=[p.data for p in net.parameters()])],
    ),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_of_a_checkpoint_loads(small, layout, monkeypatch):
    net, path = small
    torch.save(LAYOUTS[layout](net), path)
    found = load_model('small', path=path)
    assert (
        same(found, net)
        and not found.training
        and not any(p.requires_grad for p in found.parameters())
    )
    monkeypatch.setenv('NEURALSOLVER_CHECKPOINTS', str(path.parent))
    assert same(load_model('small'), net)
    save_file(net.state_dict(), path.with_suffix('.safetensors'))
    path.unlink()
    assert same(load_model('small'), net)


def test_a_checkpoint_that_does_not_fit_says_how(small):
    net, path = small
    state = net.state_dict()
    for broken, message in (
        (dict(list(state.items())[1:]), 'missing x_embedder.proj.weight'),
        (state | {'more': torch.zeros(1)}, 'foreign more'),
        (
            state | {'blocks.0.norm1.weight': torch.zeros(3)},
            r'blocks.0.norm1.weight \[3\] instead of \[16\]',
        ),
        ({}, 'holds no weights'),
        ([1, 2], 'holds no weights'),
        (
            dict(optimizer_states=[dict(ema=[p.data for p in net.parameters()][1:])]),
            'a list of 46 tensors does not fit the 47',
        ),
        (dict(optimizer_states=[dict(ema=[p.data for p in net.parameters()][::-1])]), 'instead of'),
    ):
        torch.save(broken, path)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(make_model('FlowDCN', 'small', 8), path)


class Evil:
    def __reduce__(self):
        return print, ('executed',)


def test_a_checkpoint_cannot_run_code(small, capsys):
    net, path = small
    torch.save(dict(model=net.state_dict(), args=Evil()), path)
    with pytest.raises(Exception, match='(?i)weights.only|unsupported'):
        load_model('small', path=path)
    assert 'executed' not in capsys.readouterr().out


def test_where_checkpoints_come_from(small, monkeypatch):
    import neuralsolver.utils as utils

    net, path = small

    def offline(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(utils, '_fetch', offline)
    with pytest.raises(
        FileNotFoundError,
        match='small.pt could not be fetched from https://huggingface.co/someone/FlowDCN.*no network.*NEURALSOLVER_CHECKPOINTS',
    ):
        load_model('small')
    torch.save(net.state_dict(), path)
    monkeypatch.setattr(utils, '_fetch', lambda file, source: str(path))
    assert same(load_model('small'), net)
    monkeypatch.setitem(CHECKPOINTS, 'small', CHECKPOINTS['small']._replace(sha256='0' * 64))
    with pytest.raises(ValueError, match='is not 0000'):
        load_model('small')
    assert same(
        load_model('small', path=path), net
    )  # named by the user: another conversion of the same weights, say
    with pytest.raises(FileNotFoundError, match='not there'):
        load_model('small', path=path.with_name('none.pt'))


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_names_of_checkpoints_make_their_networks(name):
    c = CHECKPOINTS[name]
    with torch.device('meta'):
        net = make_model(c.architecture, c.size, c.input_size)
    assert (
        net.sample_shape == (4, 64 if '512' in name else 32, 64 if '512' in name else 32)
        and net.num_classes == 1000
    )
    assert name.startswith(c.architecture.lower()) and c.size.lower() in name.split('-')


# Exact fields


def problem(path, prediction):
    g = torch.Generator().manual_seed(3)
    centers, x = (torch.randn(n, 2, 3, generator=g, dtype=F64) for n in (6, 20))
    weights, labels = (
        torch.tensor([1, 2, 3, 1, 0.5, 4], dtype=F64),
        torch.tensor([0, 1, 1, 2, 0, 2]),
    )
    return (
        GaussianMixture(centers, 0.4, labels, weights, path, prediction),
        centers,
        weights,
        labels,
        x,
    )


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
@pytest.mark.parametrize('label', [None, 0, 1, 2, 3])  # 3 is the null class
def test_mixture_is_the_autograd_score_of_its_density(path, label):
    "Tweedie: E[x_1|x] = (x + sigma^2 score) / alpha, E[eps|x] = -sigma score; the density by torch.distributions."
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    for t in (
        torch.tensor(0.15, dtype=F64),
        torch.tensor(0.5, dtype=F64),
        torch.tensor(0.85, dtype=F64),
    ):
        s = t.clone().requires_grad_()
        alpha, sigma = path.alpha(s), path.sigma(s)
        alpha_dot, sigma_dot = (
            torch.autograd.grad(v, s, retain_graph=True)[0] for v in (alpha, sigma)
        )
        alpha, sigma = alpha.detach(), sigma.detach()
        for prediction in ('data', 'noise', 'velocity'):
            mixture, centers, weights, labels, x = problem(path, prediction)
            keep = torch.ones(6, dtype=torch.bool) if label in (None, 3) else labels == label
            parts = Independent(
                Normal(alpha * centers[keep], (0.16 * alpha**2 + sigma**2).sqrt()), 2
            )
            leaf = x.clone().requires_grad_()
            (score,) = torch.autograd.grad(
                MixtureSameFamily(Categorical(weights[keep]), parts).log_prob(leaf).sum(), leaf
            )
            data, noise = (x + sigma**2 * score) / alpha, -sigma * score
            expected = dict(data=data, noise=noise, velocity=alpha_dot * data + sigma_dot * noise)[
                prediction
            ]
            result = mixture(x, t) if label is None else mixture(x, t, torch.full((20,), label))
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_posterior_is_bayes_rule_for_mixed_labels(path):
    mixture, centers, weights, labels, x = problem(path, 'data')
    t = torch.tensor(0.6, dtype=F64)
    y = torch.arange(20) % 4
    p, a, s = mixture.posterior(x.flatten(1), t, y), path.alpha(t).item(), path.sigma(t).item()
    var = 0.16 * a**2 + s**2
    for i in range(20):

        def term(w, c):
            return w.item() * math.exp(-(x[i] - a * c).square().sum().item() / (2 * var))

        terms = [term(w, c) if y[i] in (3, k) else 0.0 for w, c, k in zip(weights, centers, labels)]
        torch.testing.assert_close(
            p[i], torch.tensor(terms, dtype=F64) / math.fsum(terms), rtol=1e-10, atol=1e-14
        )
    torch.testing.assert_close(mixture(x, t, y)[:1], mixture(x[:1], t, y[:1]), rtol=0, atol=1e-13)
    times = torch.linspace(0.1, 0.9, 20, dtype=F64)  # one time a sample
    torch.testing.assert_close(
        mixture(x, times, y)[7:8], mixture(x[7:8], times[7], y[7:8]), rtol=0, atol=1e-12
    )


def test_weights_are_normalised_at_the_precision_of_the_centres():
    centers = torch.zeros(3, 1, dtype=F64)
    p = GaussianMixture(
        centers, 1.0, weights=torch.tensor([1.0, 1.0, 1.0])
    ).log_weights.exp()  # float32 weights
    torch.testing.assert_close(p, torch.full((3,), 1 / 3, dtype=F64), rtol=1e-15, atol=0)


# Models by name


class Recorder(torch.nn.Module):
    "A network that notes the batches it is called with."

    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes, self.calls = net, net.num_classes, []

    def forward(self, x, t, y):
        self.calls.append((len(x), t.tolist(), y.tolist(), x.dtype))
        return self.net(x, t, y)


@pytest.mark.parametrize('name', list_models())
@torch.inference_mode()
def test_guidance_is_one_batched_call_an_evaluation(name):
    net = Recorder(load_model(name))
    x, y = indexed_noise(range(3), net.net.sample_shape), torch.tensor([1, 5, 9])
    result = sample(Field(net, guidance=1.5), x, euler(4), y)
    assert [n for n, *_ in net.calls] == [6] * 4 and all(
        labels == [1, 5, 9, 10, 10, 10] for _, _, labels, _ in net.calls
    )
    assert [t for _, t, _, _ in net.calls] == [[k / 4] * 6 for k in range(4)]

    def two_calls(x, t, y):
        c, u = net.net(x, t.expand(3), y), net.net(x, t.expand(3), torch.full_like(y, 10))
        return u + 1.5 * (c - u)

    close(result, sample(two_calls, x, euler(4), y), 2e-5)
    net.calls.clear()
    sample(Field(net), x, euler(4), y)
    assert [n for n, *_ in net.calls] == [3] * 4


@torch.inference_mode()
def test_a_network_keeps_its_dtype_and_the_caller_his():
    net = Recorder(load_model('sit-tiny'))
    x = indexed_noise(range(2), net.net.sample_shape, dtype=F64)
    field = Field(net)
    result = sample(field, x, euler(2), torch.tensor([0, 1]))
    assert result.dtype == F64 and {dtype for *_, dtype in net.calls} == {torch.float32}
    low = Field(load_model('sit-tiny').bfloat16())
    assert (sample(low, x, euler(2), torch.tensor([0, 1])) - result).square().mean().sqrt() < 0.05


@pytest.mark.parametrize(
    'name, solver',
    [('sit-tiny', 'sit-xl-2'), ('dit-tiny', 'dit-xl-2'), ('flowdcn-tiny', 'flowdcn-b-2')],
)
@torch.inference_mode()
def test_the_tiny_models_are_trained(name, solver):
    "Without any metric: they turn noise into images that their own exact counterpart, the mixture of real images, finds likely."
    net, mixture = load_model(name), load_model('fashion-mixture')
    labels = torch.arange(60) % 10
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    images = sample(
        Field(net, guidance=2.0),
        indexed_noise(range(60), net.sample_shape),
        load_solver(solver, 8),
        labels,
    )
    nearest = torch.cdist(images.flatten(1), mixture.centers).argmin(1)
    assert (mixture.labels[nearest] == labels).float().mean() >= 0.7  # 0.1 by chance


@pytest.mark.parametrize('n', [5, 6, 7, 8, 9, 10])
@torch.inference_mode()
def test_searched_on_dit_tiny_beats_classical_solvers_with_their_best_grid(n):
    "End-point RMSE to DDIM-100 without guidance, at most 0.75 of the strongest classical rows of reports/sweep.csv, on noise of no other run."
    field, x, y = (
        Field(load_model('dit-tiny')),
        indexed_noise(range(20), (1, 28, 28), 777),
        torch.arange(20) % 10,
    )
    end = sample(field, x, teacher_solver(100, VPPath()), y)
    rmse = lambda solver: (sample(field, x, solver, y) - end).square().mean().sqrt().item()
    classical = (
        'unipc-2@quadratic',
        'unipc-2',
        'unipc-3@quadratic',
        'unipc-2@optimized',
        'dpm-solver++2m@quadratic',
    )
    assert rmse(load_solver('dit-tiny', n)) <= 0.75 * min(
        rmse(get_solver(name, n, VPPath())) for name in classical
    )


@pytest.mark.parametrize('n', [5, 6, 7, 8, 9, 10])
@torch.inference_mode()
def test_searched_on_flowdcn_tiny_beats_the_adams_rules(n):
    "End-point RMSE to Euler-100 without guidance, at most 0.75 of the better of Adams-Bashforth 2 to 4, on noise of no other run."
    field, x, y = (
        Field(load_model('flowdcn-tiny')),
        indexed_noise(range(20), (1, 28, 28), 777),
        torch.arange(20) % 10,
    )
    end = sample(field, x, teacher_solver(100), y)
    rmse = lambda solver: (sample(field, x, solver, y) - end).square().mean().sqrt().item()
    assert rmse(load_solver('flowdcn-tiny', n)) <= 0.75 * min(
        rmse(get_solver(name, n)) for name in ('ab2', 'ab3', 'ab4')
    )


@torch.inference_mode()
def test_a_solver_of_another_path_is_refused():
    field, x, y = (
        Field(load_model('dit-tiny')),
        indexed_noise(range(2), (1, 28, 28)),
        torch.tensor([0, 1]),
    )
    with pytest.raises(ValueError, match='change_path'):
        sample(field, x, euler(4), y)
    assert sample(field, x, change_path(euler(4), VPPath()), y).isfinite().all()


@torch.inference_mode()
def test_fashion_mixture_works_without_labels_and_lands_on_images():
    net = load_model('fashion-mixture')
    x = indexed_noise(range(4), net.sample_shape)
    close(
        net(x, torch.tensor(0.3)),
        net(x, torch.tensor(0.3), torch.full((4,), net.num_classes)),
        1e-6,
    )
    images = sample(net, x, euler(40))
    distance = torch.cdist(images.flatten(1), net.centers).min(1).values
    assert (distance < 2 * net.std * 28).all() and (
        torch.cdist(x.flatten(1), net.centers).min(1).values > 4 * net.std * 28
    ).all()


def test_errors_about_models(tmp_path):
    with pytest.raises(
        ValueError, match="model='sit'.*fashion-mixture, dit-tiny, flowdcn-tiny, sit-tiny"
    ):
        load_model('sit')
    with pytest.raises(ValueError, match='num_heads=5'):
        SiT(8, 2, 1, 32, 1, 5)
    assert list_models()[0] == 'fashion-mixture' and 'fashion_classifier' not in list_models()


def test_damaged_replaced_or_foreign_weights_are_refused(tmp_path):
    for suffix in ('.json', '.safetensors'):
        shutil.copy(data_file(f'sit-tiny{suffix}'), tmp_path)
    path = tmp_path / 'sit-tiny.safetensors'
    card = json.loads(path.with_suffix('.json').read_text())
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_weights(path).parameters(), load_model('sit-tiny').parameters())
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged or was replaced'):
        load_weights(path)
    state = load_file(data_file('sit-tiny.safetensors'))
    for broken in (
        {k: v for k, v in state.items() if k != 'pos_embed'},
        state | {'extra': torch.zeros(1)},
    ):  # the card fits the file
        save_file(broken, path)
        path.with_suffix('.json').write_text(json.dumps(card | {'sha256': sha256(path)}))
        with pytest.raises(RuntimeError, match='pos_embed|extra'):
            load_weights(path)
