"DiT, SiT and FlowDCN against the official code; the exact field against autograd and Bayes."

import json
import math
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from neuralsolver.checkpoints import load_weights, make_model, save_model
from neuralsolver.fields import Field, GaussianMixture, GuidanceRange, guide
from neuralsolver.flowdcn import FlowDCN
from neuralsolver.kernels import deformable_gather
from neuralsolver.models import DiT, SiT, attend
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.utils import data_root

GOLDEN = data_root() / 'golden'
Official = namedtuple('Official', 'net tensors atol')


def golden_file(name):
    if not GOLDEN.is_dir():
        pytest.skip('data/golden is not carried by the wheel')
    return GOLDEN / name


def official(architecture, name, atol):
    "The network with the official random weights, its tensors, and the agreement to expect."
    path = golden_file(f'{name}.safetensors')
    with safe_open(path, 'pt') as f:
        net = architecture(**json.loads(f.metadata()['config'])).eval()
    tensors = load_file(path)
    net.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith('params/')})
    return Official(net, tensors, atol)


@pytest.fixture(scope='module', params=['SiT', 'DiT'])
def golden(request):
    "DiT: float32 angles near t = 1000."
    if request.param == 'SiT':
        return official(SiT, 'sit_small', 1e-5)
    return official(DiT, 'dit_small', 5e-5)


@pytest.fixture(scope='module')
def dcn():
    return official(FlowDCN, 'flowdcn_small', 1e-5)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def with_intermediates(net, g):
    "The prediction, and the outputs of all modules that the golden file has."
    found, hooks = {}, []
    for name, module in net.named_modules():
        if f'inter/{name}' in g:

            def keep(module, inputs, output, name=name):
                found[name] = output

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        out = net(g['x'], g['t'], g['y'])
    for hook in hooks:
        hook.remove()
    return out, found


# fidelity of DiT to facebookresearch/DiT, of SiT to willisma/SiT


def test_fidelity_of_prediction_and_intermediate_tensors(golden):
    net, g, atol = golden
    out, found = with_intermediates(net, g)
    close(out, g['forward'], atol)
    close(net.t_embedder.embedding(g['t']), g['inter/timestep_embedding'], atol)
    names = {k.removeprefix('inter/') for k in g if k.startswith('inter/')}
    assert set(found) == names - {'timestep_embedding'} and len(found) == 7
    for name, value in found.items():
        close(value, g[f'inter/{name}'], 2 * atol)


@torch.no_grad()
def test_fidelity_of_guidance(golden):
    "Real classes first, null class second; three channels guided, the others each half's own."
    net, g, atol = golden
    scale, half = g['cfg/cfg_scale'].item(), g['cfg/x'][:6]
    assert scale == pytest.approx(1.375) and (g['cfg/y'][6:] == net.num_classes).all()
    cond, uncond = net(torch.cat([half, half]), g['cfg/t'], g['cfg/y']).chunk(2)
    close(torch.cat([cond, uncond]), g['cfg/model_out'], atol)
    guided = guide(cond, uncond, scale, channels=3)
    close(guided, g['forward_with_cfg'][:6], 2 * atol)
    second = torch.cat([guided[:, :3], uncond[:, 3:]], 1)
    close(second, g['forward_with_cfg'][6:], 2 * atol)


@torch.no_grad()
def test_fidelity_of_a_field(golden):
    "One time for a whole batch, hence sample by sample; the learned variance is dropped."
    net, g, atol = golden
    scale = g['cfg/cfg_scale'].item()
    field = Field(net, guidance=scale, guided_channels=3, network_time='t')
    for i in range(6):
        one = slice(i, i + 1)
        out = field(g['cfg/x'][one], g['cfg/t'][i], g['cfg/y'][one])
        close(out, g['forward_with_cfg'][one, :4], 2 * atol)


@torch.no_grad()
def test_fidelity_of_a_dit_field_without_options():
    "Told 1000 t, guided on three channels, the learned variance (channels 4 to 7) dropped."
    torch.manual_seed(0)
    net = DiT(8, 4, 4, 32, 1, 2, num_classes=10).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 4, 9]), torch.tensor(0.7)
    told = torch.full((3,), 700.0)
    cond, uncond = net(x, told, y), net(x, told, torch.full((3,), 10))
    guided = uncond[:, :3] + 1.5 * (cond - uncond)[:, :3]
    epsilon = torch.cat([guided, cond[:, 3:4]], 1)
    field, path = Field(net, guidance=1.5), VPPath()
    close(field(x, t, y), epsilon, 1e-5)
    each = torch.stack([y.float(), torch.full((3,), 1.5)], 1)
    close(GuidanceRange(net)(x, t, each), epsilon, 1e-5)
    close(field.on(path, 'data')(x, t, y), (x - path.sigma(t) * epsilon) / path.alpha(t), 1e-3)


def test_fidelity_of_the_time_in_half_precision():
    "780.7 would be 780 in bfloat16."
    low = Field(DiT(8, 4, 4, 32, 1, 2, num_classes=10).bfloat16(), network_time='1000t-1')
    told = []
    low.net.register_forward_pre_hook(lambda m, args: told.append(args[1]))
    low(torch.randn(3, 4, 8, 8), torch.tensor(0.7817), torch.tensor([1, 4, 9]))
    assert told[0].dtype == torch.float32 and abs(told[0][0].item() - 780.7) < 1e-3


XL = [('SiT', 'sit_xl_2_256', 32), ('DiT', 'dit_xl_2_256', 32), ('DiT', 'dit_xl_2_512', 64)]
DCN = [('FlowDCN', f'flowdcn_{size}_2', 32) for size in ('s', 'b', 'l', 'xl')]


@pytest.mark.parametrize('architecture, name, input_size', XL + DCN)
def test_fidelity_of_keys_shapes_and_order(architecture, name, input_size):
    "The order of the parameters is that of the averages without names in the checkpoints."
    manifest = json.loads(golden_file(f'{name}.json').read_text())
    with torch.device('meta'):
        net = make_model(architecture, name.split('_')[1].upper(), input_size)
    wanted = list(manifest['keys'].items())
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == wanted
    assert [k for k, _ in net.named_parameters()] == list(manifest['keys'])
    assert sum(p.numel() for p in net.parameters()) == manifest['n_params']
    fixed = [k for k, p in net.named_parameters() if not p.requires_grad]
    assert fixed == manifest['not_learnable']


def test_fidelity_of_the_vp_path():
    "The official scheduler."
    table = json.loads(golden_file('vp_tables.json').read_text())['vp_continuous']
    path = VPPath()
    for part in (table, table['clamp']):
        t = torch.tensor(part['t'], dtype=torch.float64)
        for name in part.keys() & {'alpha', 'sigma'}:
            wanted = torch.tensor(part[name], dtype=torch.float64)
            torch.testing.assert_close(getattr(path, name)(t), wanted, rtol=1e-12, atol=0)


# fidelity of FlowDCN to MCG-NJU/FlowDCN


@pytest.mark.parametrize('part', ['op/', 'op_border/', 'inter/blocks.0.op_'])
def test_fidelity_of_the_deformable_operator(dcn, part):
    value, offsets, weights, out = (
        dcn.tensors[part + k] for k in ('value', 'offsets', 'weights', 'out')
    )
    close(deformable_gather(value, offsets, weights), out, 5e-6)


def test_fidelity_data_tell_the_border_rule(dcn):
    "Zero padding by floor is far off below zero, and right above."
    g = dcn.tensors
    points, value = g['op_border/points'], g['op_border/value']
    H, W = points.shape[1:3]
    grid = torch.stack([2 * points[..., 0] / (W - 1) - 1, 2 * points[..., 1] / (H - 1) - 1], -1)
    planes = value[..., 0, :].permute(0, 3, 1, 2)
    floor = torch.nn.functional.grid_sample(planes, grid, align_corners=True).permute(0, 2, 3, 1)
    gap = (floor - g['op_border/out'][..., 0, :]).abs().amax(-1)
    inside = (points >= 0).all(-1)
    assert gap[inside].max() < 1e-5 and gap.max() > 1


@torch.no_grad()
def test_fidelity_of_flowdcn(dcn):
    net, g, _ = dcn
    out, found = with_intermediates(net, g)
    close(out, g['forward'])
    assert len(found) == 10
    for name, value in found.items():
        close(value, g[f'inter/{name}'], 2e-5)
    uncond, cond = net(g['cfg/x'], g['cfg/t'], g['cfg/y']).chunk(2)
    scale = g['cfg/cfg_scale'].item()
    close(torch.cat([uncond, cond]), g['cfg/model_out'])
    close(guide(cond, uncond, scale), g['cfg/guided_simple'], 2e-5)
    close(guide(cond, uncond, scale, 3), g['cfg/guided_c3'], 2e-5)
    field = Field(net, guidance=scale)  # what eval uses
    for i in range(6, 12):
        one = field(g['cfg/x'][i : i + 1], g['cfg/t'][i], g['cfg/y'][i : i + 1])
        close(one, g['cfg/guided_simple'][i - 6 : i - 5], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize('dtype, atol', [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_fidelity_of_flowdcn_in_half_precision(dcn, dtype, atol):
    "The median: where the border rule jumps, rounding may move a sample to the other side."
    net, g, _ = dcn
    low = FlowDCN(**net.config).eval()
    low.load_state_dict(net.state_dict())
    out = low.to(dtype)(g['x'].to(dtype), g['t'], g['y'])
    gap = (out.float() - g['forward']).abs()
    assert out.dtype == dtype and gap.median() < atol and gap.square().mean().sqrt() < 5 * atol


@torch.no_grad()
def test_flowdcn_takes_any_size_and_always_has_a_null_class():
    net = make_model('FlowDCN', 'tiny', 8, 2, 4, num_classes=3)
    x = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    assert net(x, torch.tensor([0.5]), torch.tensor([1])).shape == x.shape
    embedder = net.y_embedder
    assert len(embedder.embedding_table.weight) == 4 and embedder.dropout == 0


# gradient


def test_gradient_of_the_deformable_operator():
    def draw(*shape, seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()

    value = draw(1, 3, 2, 2, 3, seed=0)
    offsets = draw(1, 3, 2, 2, 4, 2, seed=1)
    weights = draw(1, 3, 2, 2, 4, seed=2)
    assert torch.autograd.gradcheck(deformable_gather, (value, offsets, weights))


def test_gradient_of_flowdcn_reaches_every_parameter(tmp_path):
    "It learns, and what was learnt is saved."
    torch.manual_seed(0)
    net = FlowDCN(1, 2, 16, 2, 7, 10, False, 0.1, 28)
    x, t, y = torch.randn(8, 1, 28, 28), torch.rand(8), torch.arange(8)
    learnable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnable, 1e-2)
    losses = []
    for _ in range(60):
        loss = (net(x, t, y) - x.flip(3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(x.square().mean().item(), rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnable)
    save_model(net, net.state_dict(), tmp_path / 'd.safetensors', {})
    again = load_weights(tmp_path / 'd.safetensors')
    with torch.no_grad():
        assert torch.equal(again(x, t, y), net.eval()(x, t, y))


# refusal


def test_refusal_of_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match='num_heads=5'):
        SiT(8, 2, 1, 32, 1, 5)
    with pytest.raises(ValueError, match='num_groups=3 must divide'):
        FlowDCN(num_groups=3, hidden_size=64)
    with pytest.raises(ValueError, match="architecture='Dit'"):
        make_model('Dit', 'XL')


@pytest.mark.parametrize('mixed', [False, True])
def test_attention_is_the_softmax_of_the_products_also_in_mixed_precision(mixed):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 16, 32, generator=g).bfloat16().float().requires_grad_()
    dtype = torch.bfloat16 if mixed else torch.float32
    with torch.autocast('cpu', torch.bfloat16, enabled=mixed):
        found = attend(q.to(dtype), k.to(dtype), v.to(dtype))
    expected = (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    found, expected = (
        torch.autograd.grad(x.sum(), v, retain_graph=True)[0] for x in (found, expected)
    )
    assert torch.allclose(found, expected, atol=1e-2 if mixed else 1e-5)


# The exact field of a Gaussian mixture against autograd and Bayes' rule.

F64 = torch.float64
STD = 0.4
WEIGHTS = torch.tensor([1, 2, 3, 1, 0.5, 4], dtype=F64)
LABELS = torch.tensor([0, 1, 1, 2, 0, 2])
G = torch.Generator().manual_seed(3)
CENTERS = torch.randn(6, 2, 3, generator=G, dtype=F64)
X = torch.randn(20, 2, 3, generator=G, dtype=F64)


def mixture(path, prediction):
    return GaussianMixture(CENTERS, STD, LABELS, WEIGHTS, path, prediction)


def score(path, t, keep):
    "The gradient of the log density, by torch.distributions and autograd."
    alpha, sigma = path.alpha(t), path.sigma(t)
    std = (STD**2 * alpha**2 + sigma**2).sqrt()
    parts = Independent(Normal(alpha * CENTERS[keep], std), 2)
    leaf = X.clone().requires_grad_()
    density = MixtureSameFamily(Categorical(WEIGHTS[keep]), parts)
    return torch.autograd.grad(density.log_prob(leaf).sum(), leaf)[0]


def derivatives(path, t):
    s = t.clone().requires_grad_()
    return [torch.autograd.grad(v, s, retain_graph=True)[0] for v in (path.alpha(s), path.sigma(s))]


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
@pytest.mark.parametrize('label', [None, 0, 1, 2, 3])  # 3 is the null class
def test_gradient_of_the_density_is_the_field(path, label):
    "Tweedie: E[x_1|x] = (x + sigma^2 score) / alpha, E[eps|x] = -sigma score."
    keep = torch.ones(6, dtype=torch.bool) if label in (None, 3) else LABELS == label
    for t in torch.tensor([0.15, 0.5, 0.85], dtype=F64):
        alpha, sigma = path.alpha(t), path.sigma(t)
        alpha_dot, sigma_dot = derivatives(path, t)
        gradient = score(path, t, keep)
        data, noise = (X + sigma**2 * gradient) / alpha, -sigma * gradient
        expected = dict(data=data, noise=noise, velocity=alpha_dot * data + sigma_dot * noise)
        for prediction, wanted in expected.items():
            given = () if label is None else (torch.full((20,), label),)
            result = mixture(path, prediction)(X, t, *given)
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_fidelity_of_the_posterior_to_bayes_rule(path):
    t = torch.tensor(0.6, dtype=F64)
    y = torch.arange(20) % 4
    a, s = path.alpha(t).item(), path.sigma(t).item()
    p = mixture(path, 'data').posterior(X.flatten(1), t, y)
    for i in range(20):
        terms = []
        for w, c, k in zip(WEIGHTS, CENTERS, LABELS):
            distance = (X[i] - a * c).square().sum().item()
            density = math.exp(-distance / (2 * (STD**2 * a**2 + s**2)))
            terms.append(w.item() * density if y[i] in (3, k) else 0.0)
        wanted = torch.tensor(terms, dtype=F64) / math.fsum(terms)
        torch.testing.assert_close(p[i], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_batch_size_independence(path):
    "Of samples with their labels, and with a time for each."
    field = mixture(path, 'data')
    t = torch.tensor(0.6, dtype=F64)
    y = torch.arange(20) % 4
    torch.testing.assert_close(field(X, t, y)[:1], field(X[:1], t, y[:1]), rtol=0, atol=1e-13)
    times = torch.linspace(0.1, 0.9, 20, dtype=F64)
    one = field(X[7:8], times[7], y[7:8])
    torch.testing.assert_close(field(X, times, y)[7:8], one, rtol=0, atol=1e-12)


def test_fidelity_of_weights_at_the_precision_of_the_centres():
    centers = torch.zeros(3, 1, dtype=F64)
    field = GaussianMixture(centers, 1.0, weights=torch.ones(3))  # float32 weights
    third = torch.full((3,), 1 / 3, dtype=F64)
    torch.testing.assert_close(field.log_weights.exp(), third, rtol=1e-15, atol=0)
