"Networks against tensors made by the official code, exact fields against autograd and Bayes' rule."
import json, math, shutil
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from neuralsolver.fields import Field, GaussianMixture, guide
from neuralsolver.models import SIZES, DiT, SiT, list_models, load_model, load_weights
from neuralsolver.neural import get_solver, load_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.solver_search import teacher_solver
from neuralsolver.solvers import change_path, euler, sample
from neuralsolver.utils import data_file, data_root, indexed_noise, sha256

F64 = torch.float64

# SiT against willisma/SiT, DiT against facebookresearch/DiT

@pytest.fixture(scope='module', params=[(SiT, 'sit_small', 1e-5), (DiT, 'dit_small', 5e-5)], ids=['SiT', 'DiT'])
def golden(request):
    "The network with the official random weights, its tensors, and the agreement to expect (data/golden: float32 angles near t = 1000)."
    if not (data_root() / 'golden').is_dir(): pytest.skip('data/golden is not carried by the wheel')
    architecture, name, atol = request.param; path = data_root() / f'golden/{name}.safetensors'
    with safe_open(path, 'pt') as f: config = json.loads(f.metadata()['config'])
    tensors = load_file(path); net = architecture(**config).eval()
    net.load_state_dict({k.removeprefix('params/'): v for k, v in tensors.items() if k.startswith('params/')}, strict=True)
    return net, tensors, atol

def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=atol)

@torch.no_grad()
def test_forward_and_every_intermediate_tensor(golden):
    net, g, atol = golden; found, hooks = {}, []
    for name, module in net.named_modules():
        if f'inter/{name}' in g: hooks.append(module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o})))
    try: close(net(g['x'], g['t'], g['y']), g['forward'], atol)
    finally:
        for hook in hooks: hook.remove()
    close(net.t_embedder.embedding(g['t']), g['inter/timestep_embedding'], atol)
    names = {k.removeprefix('inter/') for k in g if k.startswith('inter/')} - {'timestep_embedding'}
    assert set(found) == names and len(names) == 7
    for name in names: close(found[name], g[f'inter/{name}'], 2 * atol)

@torch.no_grad()
def test_forward_with_cfg(golden):
    "Their rule: real classes first, null class second, three channels guided, every other channel each half's own."
    net, g, atol = golden; scale, half = g['cfg/cfg_scale'].item(), g['cfg/x'][:6]
    assert scale == pytest.approx(1.375) and (g['cfg/y'][6:] == net.num_classes).all()
    cond, uncond = net(torch.cat([half, half]), g['cfg/t'], g['cfg/y']).chunk(2)
    close(torch.cat([cond, uncond]), g['cfg/model_out'], atol)
    close(guide(cond, uncond, scale, channels=3), g['forward_with_cfg'][:6], 2 * atol)
    close(torch.cat([guide(cond, uncond, scale, channels=3)[:, :3], uncond[:, 3:]], 1), g['forward_with_cfg'][6:], 2 * atol)

@torch.no_grad()
def test_a_field_is_forward_with_cfg(golden):
    "One time for the whole batch, hence sample by sample; the learned variance is dropped, and t is what the network is told."
    net, g, atol = golden; scale = g['cfg/cfg_scale'].item()
    field = Field(net, guidance=scale, guided_channels=3, network_time='t')
    for i in range(6): close(field(g['cfg/x'][i:i + 1], g['cfg/t'][i], g['cfg/y'][i:i + 1]), g['forward_with_cfg'][i:i + 1, :4], 2 * atol)

@torch.no_grad()
def test_a_dit_is_told_1000_t_and_guided_on_three_channels_by_default():
    torch.manual_seed(0); net = DiT(8, 4, 4, 32, 1, 2, num_classes=10).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 4, 9]), torch.tensor(.7)
    cond, uncond = net(x, torch.full((3,), 700.), y), net(x, torch.full((3,), 700.), torch.full((3,), 10))
    epsilon = torch.cat([uncond[:, :3] + 1.5 * (cond - uncond)[:, :3], cond[:, 3:4]], 1) # the learned variance, channels 4 to 7, is dropped
    field, path = Field(net, guidance=1.5), VPPath()
    close(field(x, t, y), epsilon, 1e-5); close(field.on(path, 'data')(x, t, y), (x - path.sigma(t) * epsilon) / path.alpha(t), 1e-3)
    low = Field(DiT(8, 4, 4, 32, 1, 2, num_classes=10).bfloat16(), network_time='1000t-1'); told = []
    low.net.register_forward_pre_hook(lambda m, args: told.append(args[1])); low(x, torch.tensor(.7817), y)
    assert told[0].dtype == torch.float32 and abs(told[0][0].item() - 780.7) < 1e-3 # 780.7 would be 780 in bfloat16

def test_keys_are_strict(golden):
    net, *_ = golden; state = net.state_dict()
    for broken in ({k: v for k, v in state.items() if k != 'pos_embed'}, state | {'ema': torch.zeros(1)}):
        with pytest.raises(RuntimeError, match='pos_embed|ema'): net.load_state_dict(broken, strict=True)

@pytest.mark.parametrize('architecture, name, size', [(SiT, 'sit_xl_2_256', 32), (DiT, 'dit_xl_2_256', 32), (DiT, 'dit_xl_2_512', 64)])
def test_xl_2_has_the_official_keys_shapes_and_count(architecture, name, size):
    if not (data_root() / 'golden').is_dir(): pytest.skip('data/golden is not carried by the wheel')
    manifest = json.loads(data_file(f'golden/{name}.json').read_text())
    with torch.device('meta'): net = architecture(size, **SIZES['XL'])
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == list(manifest['keys'].items()) # the order too
    assert sum(p.numel() for p in net.parameters()) == manifest['n_params']
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == manifest['not_learnable']

def test_vp_path_is_the_official_scheduler():
    if not (data_root() / 'golden').is_dir(): pytest.skip('data/golden is not carried by the wheel')
    table = json.loads(data_file('golden/vp_tables.json').read_text())['vp_continuous']; path = VPPath()
    for part in (table, table['clamp']):
        t = torch.tensor(part['t'], dtype=F64)
        for name in part.keys() & {'alpha', 'sigma', 'beta'}:
            torch.testing.assert_close(getattr(path, name)(t), torch.tensor(part[name], dtype=F64), rtol=1e-12, atol=0)

# Exact fields

def problem(path, prediction):
    g = torch.Generator().manual_seed(3); centers, x = (torch.randn(n, 2, 3, generator=g, dtype=F64) for n in (6, 20))
    weights, labels = torch.tensor([1, 2, 3, 1, .5, 4], dtype=F64), torch.tensor([0, 1, 1, 2, 0, 2])
    return GaussianMixture(centers, .4, labels, weights, path, prediction), centers, weights, labels, x

@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
@pytest.mark.parametrize('label', [None, 0, 1, 2, 3]) # 3 is the null class
def test_mixture_is_the_autograd_score_of_its_density(path, label):
    "Tweedie: E[x_1|x] = (x + sigma^2 score) / alpha, E[eps|x] = -sigma score; the density by torch.distributions."
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
    for t in (torch.tensor(.15, dtype=F64), torch.tensor(.5, dtype=F64), torch.tensor(.85, dtype=F64)):
        s = t.clone().requires_grad_(); alpha, sigma = path.alpha(s), path.sigma(s)
        alpha_dot, sigma_dot = (torch.autograd.grad(v, s, retain_graph=True)[0] for v in (alpha, sigma))
        alpha, sigma = alpha.detach(), sigma.detach()
        for prediction in ('data', 'noise', 'velocity'):
            mixture, centers, weights, labels, x = problem(path, prediction)
            keep = torch.ones(6, dtype=torch.bool) if label in (None, 3) else labels == label
            parts = Independent(Normal(alpha * centers[keep], (.16 * alpha ** 2 + sigma ** 2).sqrt()), 2)
            leaf = x.clone().requires_grad_()
            score, = torch.autograd.grad(MixtureSameFamily(Categorical(weights[keep]), parts).log_prob(leaf).sum(), leaf)
            data, noise = (x + sigma ** 2 * score) / alpha, -sigma * score
            expected = dict(data=data, noise=noise, velocity=alpha_dot * data + sigma_dot * noise)[prediction]
            result = mixture(x, t) if label is None else mixture(x, t, torch.full((20,), label))
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('path', [LinearPath(), VPPath()])
def test_posterior_is_bayes_rule_for_mixed_labels(path):
    mixture, centers, weights, labels, x = problem(path, 'data'); t = torch.tensor(.6, dtype=F64); y = torch.arange(20) % 4
    p, a, s = mixture.posterior(x.flatten(1), t, y), path.alpha(t).item(), path.sigma(t).item(); var = .16 * a ** 2 + s ** 2
    for i in range(20):
        def term(w, c): return w.item() * math.exp(-(x[i] - a * c).square().sum().item() / (2 * var))
        terms = [term(w, c) if y[i] in (3, k) else 0. for w, c, k in zip(weights, centers, labels)]
        torch.testing.assert_close(p[i], torch.tensor(terms, dtype=F64) / math.fsum(terms), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(mixture(x, t, y)[:1], mixture(x[:1], t, y[:1]), rtol=0, atol=1e-13)
    times = torch.linspace(.1, .9, 20, dtype=F64) # one time a sample
    torch.testing.assert_close(mixture(x, times, y)[7:8], mixture(x[7:8], times[7], y[7:8]), rtol=0, atol=1e-12)

def test_weights_are_normalised_at_the_precision_of_the_centres():
    centers = torch.zeros(3, 1, dtype=F64)
    p = GaussianMixture(centers, 1., weights=torch.tensor([1., 1., 1.])).log_weights.exp() # float32 weights
    torch.testing.assert_close(p, torch.full((3,), 1 / 3, dtype=F64), rtol=1e-15, atol=0)

# Models by name

class Recorder(torch.nn.Module):
    "A network that notes the batches it is called with."
    def __init__(self, net): super().__init__(); self.net, self.num_classes, self.calls = net, net.num_classes, []
    def forward(self, x, t, y): self.calls.append((len(x), t.tolist(), y.tolist(), x.dtype)); return self.net(x, t, y)

@pytest.mark.parametrize('name', list_models())
@torch.inference_mode()
def test_guidance_is_one_batched_call_an_evaluation(name):
    net = Recorder(load_model(name)); x, y = indexed_noise(range(3), net.net.sample_shape), torch.tensor([1, 5, 9])
    result = sample(Field(net, guidance=1.5), x, euler(4), y)
    assert [n for n, *_ in net.calls] == [6] * 4 and all(labels == [1, 5, 9, 10, 10, 10] for _, _, labels, _ in net.calls)
    assert [t for _, t, _, _ in net.calls] == [[k / 4] * 6 for k in range(4)]
    def two_calls(x, t, y):
        c, u = net.net(x, t.expand(3), y), net.net(x, t.expand(3), torch.full_like(y, 10))
        return u + 1.5 * (c - u)
    close(result, sample(two_calls, x, euler(4), y), 2e-5)
    net.calls.clear(); sample(Field(net), x, euler(4), y)
    assert [n for n, *_ in net.calls] == [3] * 4

@torch.inference_mode()
def test_a_network_keeps_its_dtype_and_the_caller_his():
    net = Recorder(load_model('sit-tiny')); x = indexed_noise(range(2), net.net.sample_shape, dtype=F64)
    field = Field(net); result = sample(field, x, euler(2), torch.tensor([0, 1]))
    assert result.dtype == F64 and {dtype for *_, dtype in net.calls} == {torch.float32}
    low = Field(load_model('sit-tiny').bfloat16())
    assert (sample(low, x, euler(2), torch.tensor([0, 1])) - result).square().mean().sqrt() < .05

@pytest.mark.parametrize('name, solver', [('sit-tiny', 'sit-xl-2'), ('dit-tiny', 'dit-xl-2')])
@torch.inference_mode()
def test_the_tiny_models_are_trained(name, solver):
    "Without any metric: they turn noise into images that their own exact counterpart, the mixture of real images, finds likely."
    net, mixture = load_model(name), load_model('fashion-mixture'); labels = torch.arange(60) % 10
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    images = sample(Field(net, guidance=2.), indexed_noise(range(60), net.sample_shape), load_solver(solver, 8), labels)
    nearest = torch.cdist(images.flatten(1), mixture.centers).argmin(1)
    assert (mixture.labels[nearest] == labels).float().mean() >= .7 # 0.1 by chance

@pytest.mark.parametrize('n', [5, 6, 7, 8, 9, 10])
@torch.inference_mode()
def test_searched_on_dit_tiny_beats_classical_solvers_with_their_best_grid(n):
    "End-point RMSE to DDIM-100 without guidance, at most 0.75 of the strongest classical rows of reports/sweep.csv, on noise of no other run."
    field, x, y = Field(load_model('dit-tiny')), indexed_noise(range(20), (1, 28, 28), 777), torch.arange(20) % 10
    end = sample(field, x, teacher_solver(100, VPPath()), y)
    rmse = lambda solver: (sample(field, x, solver, y) - end).square().mean().sqrt().item()
    classical = ('unipc-2@quadratic', 'unipc-2', 'unipc-3@quadratic', 'unipc-2@optimized', 'dpm-solver++2m@quadratic')
    assert rmse(load_solver('dit-tiny', n)) <= .75 * min(rmse(get_solver(name, n, VPPath())) for name in classical)

@torch.inference_mode()
def test_a_solver_of_another_path_is_refused():
    field, x, y = Field(load_model('dit-tiny')), indexed_noise(range(2), (1, 28, 28)), torch.tensor([0, 1])
    with pytest.raises(ValueError, match='change_path'): sample(field, x, euler(4), y)
    assert sample(field, x, change_path(euler(4), VPPath()), y).isfinite().all()

@torch.inference_mode()
def test_fashion_mixture_works_without_labels_and_lands_on_images():
    net = load_model('fashion-mixture'); x = indexed_noise(range(4), net.sample_shape)
    close(net(x, torch.tensor(.3)), net(x, torch.tensor(.3), torch.full((4,), net.num_classes)), 1e-6)
    images = sample(net, x, euler(40)); distance = torch.cdist(images.flatten(1), net.centers).min(1).values
    assert (distance < 2 * net.std * 28).all() and (torch.cdist(x.flatten(1), net.centers).min(1).values > 4 * net.std * 28).all()

def test_errors_about_models(tmp_path):
    with pytest.raises(ValueError, match="model='sit'.*fashion-mixture, dit-tiny, sit-tiny"): load_model('sit')
    with pytest.raises(ValueError, match='num_heads=5'): SiT(8, 2, 1, 32, 1, 5)
    assert list_models()[0] == 'fashion-mixture' and 'fashion_classifier' not in list_models()

def test_damaged_replaced_or_foreign_weights_are_refused(tmp_path):
    for suffix in ('.json', '.safetensors'): shutil.copy(data_file(f'sit-tiny{suffix}'), tmp_path)
    path = tmp_path / 'sit-tiny.safetensors'; card = json.loads(path.with_suffix('.json').read_text())
    assert all(torch.equal(a, b) for a, b in zip(load_weights(path).parameters(), load_model('sit-tiny').parameters()))
    content = bytearray(path.read_bytes()); content[len(content) // 2] ^= 1; path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged or was replaced'): load_weights(path)
    state = load_file(data_file('sit-tiny.safetensors'))
    for broken in ({k: v for k, v in state.items() if k != 'pos_embed'}, state | {'extra': torch.zeros(1)}): # the card fits the file
        save_file(broken, path); path.with_suffix('.json').write_text(json.dumps(card | {'sha256': sha256(path)}))
        with pytest.raises(RuntimeError, match='pos_embed|extra'): load_weights(path)
