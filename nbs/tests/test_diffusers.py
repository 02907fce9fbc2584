"Our schedulers in the stock pipelines of diffusers, against `sample`, hand-written fields, numpy loops and diffusers' own schedulers."

import copy, gc, json, math, subprocess, sys
from dataclasses import replace
from contextlib import contextmanager
from functools import cache
import numpy as np, pytest, torch
from neuralsolver.diffusers import compose_shift, FlowNeuralSolverScheduler as Flow, keep_times, VPNeuralSolverScheduler as VP
from neuralsolver._conventions import convert_output, is_flow, output_factors
from neuralsolver._pipeline_field import DiffusersField, pipeline_field
from neuralsolver.exponential import ddim
import diffusers
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import list_solvers, load_solver
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.pipelines import load_pipeline
from neuralsolver.solvers import Solver, sample, save_solver
from neuralsolver.classical import adams_bashforth, euler, heun, rk4
from neuralsolver.transfer import change_path

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
F64 = torch.float64
PIPELINES, FLOW_PIPELINES = ('dit', 'pixart', 'sana', 'sd3', 'flux'), ('sana', 'sd3', 'flux')
FLOW_TABLES = [(name, n) for name in ('flowdcn-b-2', 'sit-xl-2') for n in list_solvers()[name]]
VP_TABLES = [(n, continuous) for n in list_solvers()['dit-xl-2'] for continuous in (False, True)]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


# Tiny pipelines without files

NAMES = dict(
    dit='random-dit',
    pixart='random-pixart-sigma',
    sana='random-sana',
    sd3='random-sd3',
    flux='random-flux',
)


def tiny(name, seed=0):
    return load_pipeline(NAMES[name], seed=seed)


def masked(width):
    return dict(
        prompt_embeds=rand(2, 7, width),
        prompt_attention_mask=torch.ones(2, 7),
        negative_prompt=None,
        negative_prompt_embeds=rand(2, 7, width, seed=1),
        negative_prompt_attention_mask=torch.ones(2, 7),
        use_resolution_binning=False,
    )


ARGUMENTS = {
    'dit': dict(class_labels=[1, 2], guidance_scale=4.0),
    'pixart': masked(32) | dict(height=8, width=8, guidance_scale=4.5),
    'sana': masked(8) | dict(height=32, width=32, guidance_scale=4.5),
    'sd3': dict(
        prompt_embeds=rand(2, 7, 32),
        pooled_prompt_embeds=rand(2, 64),
        negative_prompt_embeds=rand(2, 7, 32, seed=1),
        negative_pooled_prompt_embeds=rand(2, 64, seed=1),
        height=16,
        width=16,
        guidance_scale=7.0,
    ),
    'flux': dict(
        prompt_embeds=rand(2, 7, 32),
        pooled_prompt_embeds=rand(2, 64),
        height=16,
        width=16,
        guidance_scale=3.5,
    ),
}


@cache
def shared(name):
    return tiny(name)


@contextmanager
def using(name, scheduler=None, **kwargs):
    "The shared pipeline with one of our schedulers, for the time being."
    pipe = shared(name)
    own = pipe.scheduler
    pipe.scheduler = scheduler or family(own)(own, **kwargs)
    try:
        yield pipe
    finally:
        pipe.scheduler = own


def family(scheduler):
    return lambda s, **kw: (Flow if is_flow(scheduler.config) else VP).from_config(s.config, **kw)


def generators():
    return [torch.Generator().manual_seed(i) for i in (1, 2)]


def images(pipe, name, n=8, **kwargs):
    return pipe(
        **{**ARGUMENTS[name], **kwargs},
        num_inference_steps=n,
        generator=generators(),
        output_type='np',
    ).images


NOISE_SHAPES = {
    'dit': (4, 8, 8),
    'pixart': (4, 8, 8),
    'sana': (4, 16, 16),
    'sd3': (4, 16, 16),
    'flux': (64, 16),
}


def absent(pipe):
    return {k: None for k, v in pipe.components.items() if v is None}


def noise_for(name):
    return torch.cat([torch.randn(1, *NOISE_SHAPES[name], generator=g) for g in generators()])


def latents(pipe, name, n, **kwargs):
    "The result from `noise_for`; DiT has no latent output, so its decoder is listened to."
    arguments = {**ARGUMENTS[name], 'num_inference_steps': n, **kwargs}
    if name != 'dit':
        return pipe(**arguments, latents=noise_for(name), output_type='latent').images
    decode, heard = pipe.vae.decode, []
    pipe.vae.decode = lambda z: heard.append(z) or decode(z)
    try:
        pipe(**arguments, generator=generators(), output_type='np')
    finally:
        del pipe.vae.decode
    return heard[0] * pipe.vae.config.scaling_factor


def cumprod_log_alpha(t, betas=np.linspace(1e-4, 0.02, 1000)):
    "log alpha of the DDPM table between its knots, from numpy alone."
    return np.interp(
        t * 1000, np.arange(1001), np.concatenate([[0], np.log1p(-betas).cumsum() / 2])
    )


def vp_log_alpha(t):
    return -(0.1 * t + 19.9 * t * t / 2) / 2


def alpha_sigma(t, continuous):
    la = (vp_log_alpha if continuous else cumprod_log_alpha)(t)
    return math.exp(la), math.sqrt(-math.expm1(2 * la))


@torch.no_grad()
def by_hand(name, continuous=False):
    "The field that a pipeline's network stands for, in this package's conventions."
    net, a = shared(name).transformer, ARGUMENTS[name]
    w = a.get('guidance_scale')
    both = lambda k: torch.cat([a['negative_' + k], a[k]])

    def out(x, told):
        two = torch.cat([x, x])
        t = torch.full((4,), told)
        if name == 'dit':
            c, u = (
                net(two, timestep=t, class_labels=torch.tensor([*a['class_labels'], 1000, 1000]))
                .sample[:, :4]
                .chunk(2)
            )
            return u + w * (c - u)
        if name == 'flux':
            rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
            where = torch.stack([0 * rows, rows, columns], -1).reshape(64, 3)
            return net(
                hidden_states=x,
                timestep=t[:2] / 1000,
                guidance=torch.full((2,), w),
                pooled_projections=a['pooled_prompt_embeds'],
                encoder_hidden_states=a['prompt_embeds'],
                txt_ids=torch.zeros(7, 3),
                img_ids=where,
                return_dict=False,
            )[0]
        if name == 'sd3':
            more = dict(pooled_projections=both('pooled_prompt_embeds'))
        else:
            more = dict(encoder_attention_mask=both('prompt_attention_mask'))
        if name == 'pixart':
            more['added_cond_kwargs'] = dict(resolution=None, aspect_ratio=None)
        if name == 'sana':
            t = t * net.config.timestep_scale
        u, c = net(
            two, timestep=t, encoder_hidden_states=both('prompt_embeds'), return_dict=False, **more
        )[0].chunk(2)
        return (u + w * (c - u))[:, :4]

    def field(x, t):
        t = t.item()
        with torch.no_grad():
            if name in FLOW_PIPELINES:
                return -out(x, 1000 * (1 - t))
            alpha, sigma = alpha_sigma(t, continuous)
            return (x - sigma * out(x, 1000 * t - (not continuous))) / alpha

    return field


# In the pipelines


@pytest.mark.parametrize('name', PIPELINES)
def test_a_stock_pipeline_runs_and_is_saved_with_its_solver(name, tmp_path):
    solver = 'sit-xl-2' if name in FLOW_PIPELINES else 'dit-xl-2'
    with using(name, solver=solver) as pipe:
        first = images(pipe, name)
        pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'scheduler/scheduler_config.json').read_text())
    assert (
        saved['solver'] == solver
        and saved['_class_name']
        == ('Flow' if name in FLOW_PIPELINES else 'VP') + 'NeuralSolverScheduler'
    )
    again = type(pipe).from_pretrained(tmp_path, **absent(pipe))
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is (Flow if name in FLOW_PIPELINES else VP)
    assert (
        np.isfinite(first).all()
        and first.std() > 0.05
        and np.array_equal(images(again, name), first)
    )
    assert not np.array_equal(images(shared(name), name), first)


def test_a_saved_pipeline_needs_the_import_and_nothing_else(tmp_path, monkeypatch):
    with using('sd3', solver='sit-xl-2') as pipe:
        expected = images(pipe, 'sd3')
        pipe.save_pretrained(tmp_path / 'pipe')
    torch.save((ARGUMENTS['sd3'], absent(pipe)), tmp_path / 'arguments.pt')
    code = '\n'.join(
        [
            'import neuralsolver.diffusers',
            'import numpy as np, torch',
            'from diffusers import DiffusionPipeline',
            'torch.set_num_threads(1)',
            'arguments, absent = torch.load("arguments.pt"); g = [torch.Generator().manual_seed(i) for i in (1, 2)]',
            'pipe = DiffusionPipeline.from_pretrained("pipe", **absent)',
            'out = pipe(**arguments, num_inference_steps=8, generator=g, output_type="np").images',
            'np.save("out.npy", out)',
        ]
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / 'out.npy'), expected, rtol=0, atol=1e-6
    )  # another number of threads sums in another order
    monkeypatch.delitem(sys.modules, 'neuralsolver.diffusers')
    with pytest.raises(
        ValueError, match='import neuralsolver.diffusers before calling `from_pretrained`'
    ):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'pipe')


@pytest.mark.parametrize(
    'name, kwargs, n',
    [
        *(('flux', dict(solver=s), n) for s, n in FLOW_TABLES),
        *(('sana', dict(solver=s), n) for s, n in FLOW_TABLES if n in (5, 15)),
        ('sd3', dict(solver='sit-xl-2'), 7),
        ('sd3', dict(solver='flowdcn-b-2', compose_shift=True), 8),
        *((name, dict(continuous=c), n) for name in ('dit', 'pixart') for n, c in VP_TABLES),
    ],
)
def test_a_pipeline_gets_what_sample_gives(name, kwargs, n):
    "The reference calls the network by hand."
    with using(name, **kwargs) as pipe:
        result = latents(pipe, name, n)
    if name in FLOW_PIPELINES:
        solver = load_solver(kwargs['solver'], n)
        if 'compose_shift' in kwargs:
            solver = compose_shift(solver, 3.0)
    else:
        solver = change_path(
            load_solver('dit-xl-2', n), VPPath() if kwargs['continuous'] else DDPMPath()
        )
    expected = sample(by_hand(name, kwargs.get('continuous')), noise_for(name), solver)
    assert result.dtype == torch.float32 and relative(result, expected) < 1e-5


def test_flux_composes_the_shift_that_it_computes():
    "mu from the number of tokens: a line through (256, .5) and (4096, 1.15)."
    with using('flux', compose_shift=True) as pipe:
        result = latents(pipe, 'flux', 6)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (64 - 256)
    solver = compose_shift(load_solver('sit-xl-2', 6), math.exp(mu))
    assert relative(result, sample(by_hand('flux'), noise_for('flux'), solver)) < 1e-5


@pytest.mark.parametrize('name', ['flux', 'sana', 'pixart'])
def test_a_pipeline_in_bfloat16_is_close_to_float32(name):
    with using(name) as pipe:
        exact = images(pipe, name)
    pipe = tiny(name)
    pipe.scheduler = family(pipe.scheduler)(pipe.scheduler)
    pipe.to(torch.bfloat16)
    half = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and 'embeds' in k else v
        for k, v in ARGUMENTS[name].items()
    }
    result = images(pipe, name, **half)
    assert np.isfinite(result).all() and np.abs(result - exact).mean() < 0.1 * exact.std()


# The loop that is inside every pipeline

A, B = rand(6, 6, seed=3, dtype=F64) / 2, rand(6, seed=4, dtype=F64)
X0 = rand(4, 3, 6, seed=5, dtype=F64)


def net(x, timestep):
    return (torch.tanh(x.double() @ A + B * timestep.double() / 1000) + 0.3 * x.double()).to(
        x.dtype
    )


def told(s, t):
    return (
        1000 * (1 - t) if isinstance(s, Flow) else 1000 * t - int(not s.config.continuous)
    ).float()


def loop(scheduler, n, model=net, x=X0, **kwargs):
    scheduler.set_timesteps(n, **kwargs)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def reference(scheduler, n, solver, x=X0, model=net):
    path = scheduler.path

    def field(x, t):
        out, when = model(x, told(scheduler, t)), t.item()
        if isinstance(scheduler, Flow):
            return -out
        a, s = alpha_sigma(when, scheduler.config.continuous)
        return (x - s * out) / a

    assert solver.nfe == n and solver.path == path
    return sample(field, x, solver)


EVERY = [
    *((Flow, dict(solver=s), n) for s, n in FLOW_TABLES),
    *((VP, dict(continuous=c), n) for n, c in VP_TABLES),
]


@pytest.mark.parametrize('cls, kwargs, n', EVERY)
def test_every_published_table_in_every_precision(cls, kwargs, n):
    s = cls(**kwargs)
    solver = change_path(load_solver(kwargs.get('solver', 'dit-xl-2'), n), s.path)
    exact = reference(s, n, solver)
    result = loop(s, n)
    assert result.dtype == F64 and relative(result, exact) < 1e-9
    assert len(s.timesteps) == n and len(s.sigmas) == n + 1 and s.sigmas[-1] == 0
    torch.testing.assert_close(s.timesteps, told(s, solver.nodes[:-1]), rtol=0, atol=1e-4)
    noise_level = [
        np.divide(*alpha_sigma(t, s.config.continuous)[::-1]) if cls is VP else 1 - t
        for t in solver.nodes[:-1].tolist()
    ]
    np.testing.assert_allclose(s.sigmas[:-1], noise_level, rtol=1e-5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        result = loop(s, n, x=X0.to(dtype))
        assert result.dtype == dtype and relative(result.double(), exact) < tolerance


def test_the_result_has_the_dtype_of_the_model_output():
    "Mixed precision: diffusers' rule too."
    for s in (Flow(), VP()):
        for out, x in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float16, F64),
            (F64, torch.float32),
        ):
            s.set_timesteps(6)
            assert s.step(X0.to(out), s.timesteps[0], X0.to(x)).prev_sample.dtype == out


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_a_step(dtype):
    for half, full in (
        (Flow(), Flow()),
        (VP(), VP()),
        (Flow(mean_trick='average'), Flow(mean_trick='average')),
    ):
        half.set_timesteps(8)
        full.set_timesteps(8)
        x = X0.to(dtype)
        for t in half.timesteps:
            out = net(x, t)
            exact = full.step(out.float(), t, x.float()).prev_sample
            x = half.step(out, t, x).prev_sample
            assert torch.equal(x, exact.to(dtype))


@pytest.mark.parametrize('kind', ['epsilon', 'sample', 'v_prediction'])
@pytest.mark.parametrize('continuous', [False, True])
def test_what_the_network_predicts_does_not_matter(kind, continuous):
    "The exact mixture in diffusers' three parametrisations."
    path = VPPath() if continuous else DDPMPath()
    mixture = GaussianMixture(rand(4, 3, 6, seed=1, dtype=F64) * 1.5, 0.5, path=path)
    s = VP(prediction_type=kind, continuous=continuous)
    solver = change_path(load_solver('dit-xl-2', 8), path)

    def model(x, timestep):
        t = (timestep.double() + (not continuous)) / 1000
        a, sigma = path.alpha(t), path.sigma(t)
        eps, data = (mixture.on(path, p)(x, t) for p in ('noise', 'data'))
        return {'epsilon': eps, 'sample': data, 'v_prediction': a * eps - sigma * data}[kind]

    assert relative(loop(s, 8, model), sample(mixture, X0, solver)) < 1e-6  # float32 times


@pytest.mark.parametrize('kind', ['epsilon', 'sample', 'v_prediction'])
@pytest.mark.parametrize('t', [0.9, 0.3, 0.02])
def test_output_factors_are_those_of_the_definitions(kind, t):
    path = DDPMPath()
    a, s = alpha_sigma(t, False)
    data, eps = rand(3, seed=1, dtype=F64), rand(3, seed=2, dtype=F64)
    x = a * data + s * eps
    m = {'epsilon': eps, 'sample': data, 'v_prediction': a * eps - s * data}[kind]
    for target, expected in (('data', data), ('noise', eps)):
        p, r = output_factors(path, t, kind, target)
        torch.testing.assert_close(p * x + r * m, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            convert_output(path, x, torch.tensor(t, dtype=F64), m, kind, target),
            expected,
            rtol=0,
            atol=1e-9,
        )
    v = rand(3, seed=3, dtype=F64)
    for target in ('velocity', 'flow'):
        assert output_factors(LinearPath(), t, 'flow_prediction', target) == (0, -1)
    assert torch.equal(
        convert_output(
            LinearPath(), x, torch.tensor(t, dtype=F64), v, 'flow_prediction', 'velocity'
        ),
        -v,
    )


# What diffusers expects of a scheduler


@pytest.mark.parametrize(
    'cls, kwargs',
    [
        (Flow, dict(solver='flowdcn-b-2', shift=2.5, compose_shift=True, mean_trick='average')),
        (VP, dict(beta_end=0.012, beta_schedule='scaled_linear', solver='unipc-3')),
        (VP, dict(continuous=True)),
    ],
)
def test_a_scheduler_is_saved_and_loaded(cls, kwargs, tmp_path):
    s = cls(**kwargs)
    expected = loop(s, 8)
    s.save_pretrained(tmp_path)
    s.save_config(tmp_path / 'other')
    for other in (
        cls.from_pretrained(tmp_path),
        cls.from_config(cls.load_config(tmp_path / 'other')),
        cls.from_config(s.config),
        cls.from_config(dict(s.config)),
    ):
        assert torch.equal(loop(other, 8), expected) and all(
            other.config[k] == v for k, v in kwargs.items()
        )
    changed = cls.from_pretrained(tmp_path, solver='euler' if cls is Flow else 'ddim')
    assert not torch.allclose(loop(changed, 8), expected)
    assert cls.from_config(s.config, return_unused_kwargs=True)[1] == {}


@pytest.mark.parametrize('cls', [Flow, VP])
@pytest.mark.parametrize('shape', [(2, 4, 8, 8), (2, 7, 16), (1, 4, 3, 8, 8), (5,)])
def test_steps_keep_the_shape_and_a_tuple_is_the_dictionary(cls, shape):
    s, x, outputs = cls(), rand(*shape), []
    for return_dict in (True, False):
        s.set_timesteps(5)
        y = x
        for k, t in enumerate(s.timesteps):
            assert s.step_index == (None if k == 0 else k) and s.scale_model_input(y, t) is y
            out = s.step(torch.sin(y), t, y, return_dict=return_dict)
            y = out.prev_sample if return_dict else out[0]
            assert y.shape == x.shape and isinstance(out, dict if return_dict else tuple)
        outputs.append(y)
    assert torch.equal(*outputs) and torch.equal(x, rand(*shape)) and s.step_index == 5


def test_a_step_changes_none_of_its_arguments():
    for s in (Flow(mean_trick='average'), VP(solver='deis-3')):
        s.set_timesteps(6)
        x, kept = X0.clone(), []
        for k, t in enumerate(s.timesteps):
            out = net(x, t)
            kept += [(x, x.clone()), (out, out.clone())]
            x = s.step(out, t, x).prev_sample
        assert all(torch.equal(a, b) for a, b in kept)


def test_a_reused_output_buffer_is_harmless():
    "A compiled network may write every output into the same memory."
    for s in (Flow(), VP()):
        expected, buffer = loop(s, 8), torch.empty_like(X0)
        assert torch.equal(loop(s, 8, lambda x, t: buffer.copy_(net(x, t))), expected)


@pytest.mark.parametrize('cls', [Flow, VP])
def test_what_pipelines_read(cls):
    s = cls()
    assert (len(s), s.config.num_train_timesteps, s.order, s.init_noise_sigma, s.begin_index) == (
        1000,
        1000,
        1,
        1.0,
        None,
    )
    assert (
        s.config['solver'] == s.config.solver == ('sit-xl-2' if cls is Flow else 'dit-xl-2')
        and s.compatibles == []
    )
    assert (
        len(s.timesteps) == 1000 and len(s.sigmas) == 1001
    )  # before set_timesteps: for training loops
    s.set_timesteps(6)
    cpu = s.timesteps
    s.set_timesteps(6, device='meta')
    assert s.timesteps.device.type == 'meta' and s.sigmas.device.type == 'cpu'
    s.set_timesteps(num_inference_steps=6, device=None, mu=None)
    assert torch.equal(s.timesteps, cpu)
    assert (cpu.diff() < 0).all() and s.num_inference_steps == 6


SCHEDULES = [
    ('linear', 1e-4, 0.02),
    ('scaled_linear', 0.00085, 0.012),
    ('squaredcos_cap_v2', 1e-4, 0.02),
]


@pytest.mark.parametrize('schedule, start, end', SCHEDULES)
def test_noise_is_added_as_ddpm_does(schedule, start, end):
    kwargs = dict(beta_schedule=schedule, beta_start=start, beta_end=end)
    theirs = diffusers.DDPMScheduler(**kwargs)
    s, t = VP(**kwargs, solver='ddim'), torch.tensor([0, 1, 7, 250, 500, 998, 999])
    x, noise = rand(7, 3, 4), rand(7, 3, 4, seed=1)
    torch.testing.assert_close(
        s.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        s.add_noise(x, noise, t[3]), theirs.add_noise(x, noise, t[3:4]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(s.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert s.add_noise(x.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16
    assert torch.equal(s.scale_noise(x, t, noise), s.add_noise(x, noise, t))


@pytest.mark.parametrize('begin', [None, 2])
def test_noise_is_scaled_as_flow_matching_does(begin):
    theirs, s = diffusers.FlowMatchEulerDiscreteScheduler(), Flow(solver='euler')
    sigmas = (1 - np.arange(8) / 8).tolist()
    theirs.set_timesteps(sigmas=sigmas)
    s.set_timesteps(8)
    torch.testing.assert_close(s.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    if begin is not None:
        theirs.set_begin_index(begin)
        s.set_begin_index(begin)
    x, noise, t = (
        rand(3, 4, 5),
        rand(3, 4, 5, seed=1),
        s.timesteps[[2, 2, 2] if begin else [0, 2, 7]],
    )
    torch.testing.assert_close(
        s.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise), rtol=0, atol=1e-5
    )
    assert torch.equal(s.add_noise(x, noise, t), s.scale_noise(x, t, noise))


OTHERS = [
    ('DDIM', {}),
    (
        'DDIM',
        dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, steps_offset=1),
    ),
    ('DDPM', {}),
    ('DPMSolverMultistep', dict(use_karras_sigmas=True)),
    ('UniPCMultistep', dict(solver_order=3)),
    ('EulerDiscrete', dict(prediction_type='v_prediction')),
    ('HeunDiscrete', {}),
    ('FlowMatchEulerDiscrete', dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.3)),
    ('FlowMatchHeunDiscrete', dict(shift=2.0)),
    (
        'DPMSolverMultistep',
        dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0),
    ),
    (
        'UniPCMultistep',
        dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=5.0),
    ),
]


def scheduler_of(name, **kwargs):
    return getattr(diffusers, name + 'Scheduler')(**kwargs)


@pytest.mark.parametrize('saved', [False, True])
@pytest.mark.parametrize('name, kwargs', OTHERS)
def test_from_another_scheduler_and_back(name, kwargs, saved, tmp_path):
    theirs = scheduler_of(name, **kwargs)
    config = {k: v for k, v in theirs.config.items() if not k.startswith('_')}
    ours = family(theirs)(theirs, **dict(solver='ddim') if kwargs.get('beta_schedule') else {})
    if saved:
        ours.save_pretrained(tmp_path)
        ours = type(ours).from_pretrained(tmp_path)
    back = type(theirs).from_config(ours.config)
    assert {k: back.config[k] for k in config} == config
    if isinstance(ours, VP):
        assert all(
            ours.config[k] == config[k]
            for k in ('beta_start', 'beta_end', 'beta_schedule', 'prediction_type')
        )
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    else:
        assert ours.config.shift == config.get('flow_shift', config.get('shift'))
    for s in (theirs, back):
        s.set_timesteps(7, **dict(mu=0.7) if config.get('use_dynamic_shifting') else {})
    assert torch.equal(back.timesteps, theirs.timesteps)


@pytest.mark.parametrize('name', PIPELINES)
def test_back_to_its_own_scheduler_a_pipeline_gives_its_own_images(name):
    pipe = shared(name)
    own = pipe.scheduler
    expected = images(pipe, name)
    back = type(own).from_config(family(own)(own).config)
    with using(name, back):
        assert np.array_equal(images(pipe, name), expected)


def test_the_defaults_of_heun_arrive():
    "They are not those of DDIM, and diffusers' own from_config drops values that were left at a default."
    theirs = scheduler_of('HeunDiscrete')
    assert theirs.config.beta_start == 0.00085
    assert VP.from_config(theirs.config).path == DDPMPath('linear', 0.00085, 0.012)
    back = type(theirs).from_config(VP().config)
    assert (back.config.beta_start, back.config.beta_end) == (1e-4, 0.02)


# One image after another


@pytest.mark.parametrize('cls', [Flow, VP])
def test_history_ends_with_set_timesteps(cls):
    s = cls()
    expected = [loop(cls(), n) for n in (8, 5)]
    for stop in range(8):
        s.set_timesteps(8)
        x = -X0
        for t in s.timesteps[:stop]:
            x = s.step(net(x, t), t, x).prev_sample
        for _ in range(2):
            assert torch.equal(loop(s, 8), expected[0]) and torch.equal(loop(s, 5), expected[1])


@pytest.mark.parametrize('stop', [10, 6])
@pytest.mark.parametrize('cls', [Flow, VP])
def test_no_prediction_outlives_its_run(cls, stop):
    s, x = cls(), rand(3, 11, 13)
    s.set_timesteps(10)
    for t in s.timesteps[:stop]:
        x = s.step(x.sin(), t, x).prev_sample
    if stop < 10:
        s.set_timesteps(10)
    gc.collect()
    assert sum(type(o) is torch.Tensor and o.shape == x.shape for o in gc.get_objects()) == 1


@pytest.mark.parametrize('shape', [(3, 5, 4), (3, 2, 4, 5), (3, 2, 2, 3, 4)])
@pytest.mark.parametrize('kwargs', [{}, dict(mean_trick='average'), dict(mean_trick='shrunk')])
def test_samples_of_a_batch_do_not_mix(shape, kwargs):
    s, x, model = Flow(**kwargs), rand(*shape, dtype=F64), lambda x, t: torch.sin(2 * x + 1)
    torch.testing.assert_close(
        loop(s, 8, model, x),
        torch.cat([loop(s, 8, model, v[None]) for v in x]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_copy_in_the_middle_goes_its_own_way():
    for s in (Flow(), VP(), Flow(mean_trick='average')):
        expected = loop(s, 8)
        s.set_timesteps(8)
        x = X0
        for t in s.timesteps[:4]:
            x = s.step(net(x, t), t, x).prev_sample
        runs = [(copy.deepcopy(s), x), (s, x)]
        for other, y in runs:
            for t in other.timesteps[4:]:
                y = other.step(net(y, t), t, y).prev_sample
            assert torch.equal(y, expected)


def test_pipelines_may_share_a_scheduler():
    one, other = shared('flux'), shared('sd3')
    s = Flow.from_config(one.scheduler.config, use_dynamic_shifting=False)
    with using('flux', s), using('sd3', s):
        first = {}
        for name, pipe, n in [
            ('flux', one, 8),
            ('sd3', other, 5),
            ('flux', one, 8),
            ('sd3', other, 5),
        ]:
            result = images(pipe, name, n)
            assert np.array_equal(result, first.setdefault(name, result))
        with using('flux', Flow()):
            assert np.array_equal(images(one, 'flux'), first['flux'])


@pytest.mark.parametrize('name', FLOW_PIPELINES)
def test_an_interrupted_call_leaves_nothing(name):
    def stop(pipe, step, t, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with using(name) as pipe:
        expected = images(pipe, name)
        with pytest.raises(KeyboardInterrupt):
            images(pipe, name, n=10, callback_on_step_end=stop)
        assert np.array_equal(images(pipe, name), expected)


# Against diffusers' schedulers


@pytest.mark.parametrize(
    'kwargs, mu',
    [
        ({}, None),
        (dict(shift=3.0), None),
        (dict(shift=0.5), None),
        (dict(use_dynamic_shifting=True), 0.9),
        (dict(use_dynamic_shifting=True, time_shift_type='linear'), 2.5),
    ],
)
def test_euler_is_flow_match_euler(kwargs, mu):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)
    ours = Flow.from_config(theirs.config, solver='euler', compose_shift=True)
    for n in (1, 4, 9):
        theirs.set_timesteps(sigmas=(1 - np.arange(n) / n).tolist(), mu=mu)
        x = X0.float()
        for t in theirs.timesteps:
            x = theirs.step(net(x, t), t, x).prev_sample
        result = loop(ours, n, x=X0.float(), mu=mu)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
        assert relative(result, x) < 1e-5


SAME = [
    ('ddim', 'DPMSolverMultistep', dict(solver_order=1)),
    ('dpm-solver++2m', 'DPMSolverMultistep', {}),
    ('dpm-solver++3m', 'DPMSolverMultistep', dict(solver_order=3)),
    ('unipc-2', 'UniPCMultistep', {}),
    ('unipc-3', 'UniPCMultistep', dict(solver_order=3)),
    ('unipc-2-bh1', 'UniPCMultistep', dict(solver_type='bh1')),
]


@pytest.mark.parametrize('name, other, kwargs', SAME)
@pytest.mark.parametrize('n', [5, 8, 10])
def test_classical_names_are_diffusers_on_our_nodes(name, other, kwargs, n):
    theirs = scheduler_of(other, **kwargs)
    ours = VP.from_config(theirs.config, solver=name)
    result = loop(ours, n)
    nodes = np.linspace(0.999, 0.001, n + 1)
    np.testing.assert_allclose(ours.timesteps, 1000 * nodes[:-1] - 1, rtol=0, atol=1e-3)
    theirs.set_timesteps(n)
    theirs.timesteps = ours.timesteps
    theirs.set_begin_index(0)
    x = X0.float()
    theirs.sigmas = torch.tensor([np.divide(*alpha_sigma(t, False)[::-1]) for t in nodes])
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, return_dict=False)[0].float()
    assert relative(result, x.double()) < 1e-5


# Image to image


@pytest.mark.parametrize(
    'cls, kwargs, n',
    [
        (Flow, dict(solver='flowdcn-b-2'), 15),
        (Flow, {}, 8),
        (VP, {}, 8),
        (VP, dict(continuous=True), 6),
        (VP, dict(solver='unipc-3'), 7),
        (Flow, dict(solver='ab4'), 9),
    ],
)
def test_a_run_may_begin_at_every_node(cls, kwargs, n):
    "The first prediction stands for those that are missing, in a numpy loop; without set_begin_index the first timestep says where."
    s = cls(**kwargs)
    solver = s.solver_for(n)
    W, gain = solver.weights.numpy(), solver.gain.numpy()
    for begin in range(n):
        results = []
        for given in (True, False):
            s.set_timesteps(n)
            x = X0
            if given:
                s.set_begin_index(begin)
            assert s.begin_index == (begin if given else None)
            for t in s.timesteps[begin:]:
                x = s.step(net(x, t), t, x).prev_sample
            results.append(x)
            assert s.step_index == n
        y, q = X0.numpy(), []
        for k in range(begin, n):
            t = solver.nodes[k].item()
            m = net(torch.from_numpy(y), told(s, solver.nodes[k])).numpy()
            if cls is VP:
                a, sigma = alpha_sigma(t, s.config.continuous)
                m = {'data': (y - sigma * m) / a, 'noise': m}[solver.coordinates]
            else:
                m = -m
            q.append(m)
            history = [q[max(j - begin, 0)] for j in range(k + 1)]
            y = gain[k] * y + sum(w * h for w, h in zip(W[k], history))
        assert torch.equal(*results) and relative(results[0], torch.from_numpy(y)) < 1e-9


@pytest.mark.parametrize(
    'cls, kwargs, n',
    [
        (Flow, dict(solver='flowdcn-b-2'), 10),
        (Flow, dict(compose_shift=True, shift=3.0), 7),
        (VP, dict(prediction_type='sample'), 9),
    ],
)
def test_a_constant_prediction_is_exact_from_every_node(cls, kwargs, n):
    s, c = cls(**kwargs), rand(6, seed=7, dtype=F64)
    for begin in range(n):
        s.set_timesteps(n)
        s.set_begin_index(begin)
        x = X0
        nodes = s.solver_for(n).nodes.tolist()
        a, b = nodes[begin], nodes[-1]
        for t in s.timesteps[begin:]:
            x = s.step(c.expand_as(x), t, x).prev_sample
        if cls is Flow:
            expected = X0 - (b - a) * c
        else:
            (alpha, sigma), (alpha1, sigma1) = alpha_sigma(a, False), alpha_sigma(b, False)
            expected = sigma1 / sigma * (X0 - alpha * c) + alpha1 * c
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', ['sd3', 'flux'])
@pytest.mark.parametrize('strength', [0.5, 1.0, 0.2])
def test_image_to_image_pipelines(name, strength):
    pipe = shared(name)
    cls = dict(sd3=diffusers.StableDiffusion3Img2ImgPipeline, flux=diffusers.FluxImg2ImgPipeline)[
        name
    ]
    with using(name) as own:
        other = cls.from_pipe(pipe)
        other.scheduler = own.scheduler
        other.set_progress_bar_config(disable=True)
        calls = []
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            out = images(
                other,
                name,
                8,
                image=torch.rand(2, 3, 16, 16, generator=generators()[0]),
                strength=strength,
            )
        finally:
            hook.remove()
        assert (
            np.isfinite(out).all()
            and len(calls) == math.floor(8 * strength + 0.999)
            and other.scheduler.step_index == 8
        )


@pytest.mark.parametrize('cls', [Flow, VP])
def test_with_set_begin_index_no_timestep_is_looked_at(cls):
    s = cls()
    expected = loop(s, 10)
    for times in (s.timesteps.bfloat16(), [None] * 10, torch.zeros(10), s.timesteps.flip(0)):
        s.set_timesteps(10)
        s.set_begin_index(0)
        x = X0
        for t, wrong in zip(s.timesteps, times):
            x = s.step(net(x, t), wrong, x).prev_sample
        assert torch.equal(x, expected)
    s.set_timesteps(10)
    x = X0
    for t in s.timesteps:
        x = s.step(net(x, t), t.bfloat16(), x, return_dict=False)[0]
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(mean_trick='average'),
        dict(mean_trick='shrunk'),
        dict(solver='ab3', compose_shift=True, shift=3.0),
    ],
)
@pytest.mark.parametrize('where', ['set', 'found'])
def test_no_step_waits_for_the_device(kwargs, where):
    "A tensor on 'meta' has no values: .item(), .cpu() or a comparison would raise. Timesteps stay on the CPU if their value is needed."
    for s in (Flow(**kwargs), *([VP()] if not kwargs else [])):
        s.set_timesteps(8, device='meta' if where == 'set' else 'cpu')
        x = torch.empty(2, 5, 6, device='meta')
        if where == 'set':
            s.set_begin_index(0)
        for t in s.timesteps:
            x = s.step(torch.empty_like(x), t, x).prev_sample
        assert x.device.type == 'meta' and s.sigmas.device.type == 'cpu'


# The mean trick, shifts, lists


@pytest.mark.parametrize('trick', ['shrunk', 'average', None])
@pytest.mark.parametrize('shape', [(2, 5, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize('begin', [0, 3])
def test_the_mean_trick_by_a_naive_loop(trick, shape, begin):
    s = Flow(solver='flowdcn-b-2', mean_trick=trick)
    solver = load_solver('flowdcn-b-2', 8)
    W, dt = solver.weights.numpy(), solver.nodes.diff().numpy()
    model = lambda x, t: torch.tanh(1.5 * x + t / 1000) + 0.5  # its mean is not zero
    s.set_timesteps(8)
    s.set_begin_index(begin)
    x = start = rand(*shape, dtype=F64)
    for t in s.timesteps[begin:]:
        x = s.step(model(x, t), t, x).prev_sample
    y, q, means, axes = start.numpy(), [], [], (1,) if len(shape) == 3 else (2, 3)
    for k in range(begin, 8):
        v = -model(torch.from_numpy(y), s.timesteps[k]).numpy()
        m = v.mean(axes, keepdims=True) if trick else np.zeros(1)
        q.append(v - m)
        means.append(m)
        done = k - begin
        mean = {'shrunk': m / (done + 1), 'average': sum(means) / (done + 1), None: 0}[trick]
        y = y + sum(W[k, j] * q[max(j - begin, 0)] for j in range(k + 1)) + dt[k] * mean
    torch.testing.assert_close(x, torch.from_numpy(y), rtol=1e-12, atol=1e-12)


def test_no_mean_trick_is_plain():
    assert torch.equal(loop(Flow(mean_trick=None), 8, x=X0), loop(Flow(), 8, x=X0))


@pytest.mark.parametrize('shape', [(2, 5, 3), (2, 3, 4, 5)])
def test_the_mean_trick_on_a_constant_field(shape):
    c = 1.7
    field = lambda x, t: torch.full_like(x, -c)
    x = rand(*shape, dtype=F64)
    for name, n in (('sit-xl-2', 6), ('flowdcn-b-2', 10)):
        dt = load_solver(name, n).nodes.diff().tolist()
        whole, shrunk = math.fsum(dt), math.fsum(d / (k + 1) for k, d in enumerate(dt))
        for trick, expected in (('average', c * whole), ('shrunk', c * shrunk), (None, c * whole)):
            moved = loop(Flow(solver=name, mean_trick=trick), n, field, x) - x
            torch.testing.assert_close(moved, torch.full_like(x, expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shift', [3.0, 0.4, 1.0, 7.5])
def test_shifts_compose(shift):
    for solver in (
        load_solver('flowdcn-b-2', 15),
        load_solver('sit-xl-2', 5),
        adams_bashforth(6, 3),
    ):
        moved = compose_shift(solver, shift)
        back = compose_shift(moved, 1 / shift)
        sigma = 1 - solver.nodes
        torch.testing.assert_close(
            1 - moved.nodes, shift * sigma / (1 + (shift - 1) * sigma), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(moved.weights.sum(1), moved.nodes.diff(), rtol=0, atol=1e-12)
        M = lambda s: s.weights / s.nodes.diff()[:, None]
        torch.testing.assert_close(M(moved), M(solver), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back.nodes, solver.nodes, rtol=0, atol=1e-12)
        torch.testing.assert_close(back.weights, solver.weights, rtol=1e-9, atol=1e-9)


def test_every_size_of_image_has_its_own_shift():
    s = Flow(compose_shift=True, use_dynamic_shifting=True)
    for mu in (0.5, 1.15, 0.5):
        assert torch.equal(loop(s, 8, mu=mu), loop(Flow(compose_shift=True, shift=math.exp(mu)), 8))


def test_classical_rules_are_derived_for_the_shifted_grid():
    s = Flow(solver='ab3', compose_shift=True, shift=3.0)
    u = torch.linspace(0, 1, 9, dtype=F64)
    grid = u / (u + 3 * (1 - u))
    expected = reference(s, 8, adams_bashforth(8, 3, grid))
    assert relative(loop(s, 8), expected) < 1e-9
    assert relative(reference(s, 8, compose_shift(adams_bashforth(8, 3), 3.0)), expected) > 1e-4


def test_the_grid_stays_unless_composing_is_asked_for():
    assert torch.equal(loop(Flow(shift=3.0), 8), loop(Flow(), 8))
    assert torch.equal(loop(Flow(use_dynamic_shifting=True), 8, mu=1.0), loop(Flow(), 8))
    assert not torch.allclose(loop(Flow(shift=3.0, compose_shift=True), 8), loop(Flow(), 8))


def test_of_a_list_the_first_with_a_table_is_used():
    both = Flow(solver=['sit-xl-2', 'flowdcn-b-2', 'euler'])
    for n, name in (
        (5, 'sit-xl-2'),
        (10, 'sit-xl-2'),
        (15, 'flowdcn-b-2'),
        (12, 'euler'),
        (1, 'euler'),
    ):
        assert torch.equal(loop(both, n), loop(Flow(solver=name), n))
    own = rk4(2)
    mixed = Flow(solver=[own, 'flowdcn-b-2'])
    assert torch.equal(loop(mixed, 8), loop(Flow(solver=own), 8)) and torch.equal(
        loop(mixed, 9), loop(Flow(solver='flowdcn-b-2'), 9)
    )
    assert torch.equal(loop(VP(solver=['dit-xl-2', 'unipc-2']), 20), loop(VP(solver='unipc-2'), 20))
    again = Flow.from_config(both.config)
    assert list(again.config.solver) == ['sit-xl-2', 'flowdcn-b-2', 'euler']


@pytest.mark.parametrize('kind', ['searched', 'stages', 'vp', 'flow on vp'])
def test_a_users_solver_its_content_and_its_file_are_one(kind, tmp_path):
    solver, cls = {
        'searched': (load_solver('sit-xl-2', 7), Flow),
        'stages': (rk4(2), Flow),
        'vp': (load_solver('dit-xl-2', 6), VP),
        'flow on vp': (change_path(load_solver('sit-xl-2', 7), VPPath(t_min=1e-4)), VP),
    }[kind]
    file = tmp_path / 'mine.json'
    save_solver(solver, file)
    made = [cls(solver=given) for given in (solver, solver.to_dict(), file, str(file))]
    file.unlink()
    expected = (
        reference(made[0], solver.nfe, change_path(solver, made[0].path))
        if kind != 'flow on vp'
        else loop(made[0], 7)
    )
    for s in made:
        s.save_pretrained(tmp_path / 's')
        loaded = cls.from_pretrained(tmp_path / 's')
        result = loop(s, solver.nfe)
        assert (
            json.loads((tmp_path / 's/scheduler_config.json').read_text())['solver']
            == solver.to_dict()
        )
        assert torch.equal(loop(loaded, solver.nfe), result) and torch.equal(
            loop(copy.deepcopy(s), solver.nfe), result
        )
        assert relative(result, expected) < 1e-9
        with pytest.raises(ValueError, match=f'tables for {solver.nfe} steps'):
            s.set_timesteps(solver.nfe + 1)


# Solvers with gains of their own


def free_solver(path=LinearPath(), n=6):
    g = torch.Generator().manual_seed(11)
    near = lambda *shape: 1 + 0.2 * torch.randn(*shape, generator=g, dtype=F64)
    s = (
        adams_bashforth(n, 3, torch.linspace(0, 1, n + 1, dtype=F64) ** 1.3)
        if path.coordinates == 'velocity'
        else load_solver('dit-xl-2', n)
    )
    return replace(s, name='free', weights=(s.weights * near(n, n)).tril(), gains=s.gain * near(n))


@pytest.mark.parametrize('cls, path', [(Flow, LinearPath()), (VP, VPPath())], ids=['flow', 'vp'])
def test_a_solver_with_gains_runs_and_is_saved(cls, path, tmp_path):
    solver = free_solver(path)
    own = dict(continuous=True) if cls is VP else {}
    s = cls(solver=solver, **own)
    assert s.solver_for(6).digest == solver.digest
    expected = reference(s, 6, solver)
    assert relative(loop(s, 6), expected) < (
        1e-9 if cls is Flow else 1e-6
    )  # diffusers keeps timesteps in float32
    s.save_pretrained(tmp_path)
    assert torch.equal(loop(cls.from_pretrained(tmp_path), 6), loop(s, 6))
    assert (
        relative(
            loop(s, 6),
            reference(
                s,
                6,
                load_solver('dit-xl-2', 6) if cls is VP else adams_bashforth(6, 3, solver.nodes),
            ),
        )
        > 1e-2
    )


def test_a_solver_with_gains_in_float32_is_sample_on_an_exact_field():
    centers = rand(4, 18, seed=3)
    field, solver = GaussianMixture(centers, 0.5), free_solver()
    x = rand(4, 18, seed=4)
    result = loop(Flow(solver=solver), 6, lambda x, t: -field(x, 1 - t / 1000), x)
    assert relative(result, sample(field, x, solver)) < 2e-5
    exact, y = GaussianMixture(centers.double(), 0.5), x.double()
    s = Flow(solver=solver)
    s.set_timesteps(6)
    for t, node in zip(s.timesteps, solver.nodes):
        y = s.step(-exact(y, node), t, y).prev_sample  # told the nodes in full precision
    assert relative(y, sample(exact, x.double(), solver)) < 1e-12


def test_a_solver_with_gains_comes_to_the_table_at_equal_log_snr():
    solver = free_solver(VPPath())
    s = VP(solver=solver)
    there = s.solver_for(6)
    assert (
        there.path == s.path
        and there.digest == change_path(solver, s.path).digest
        and not there.consistent
    )
    assert relative(loop(s, 6), reference(s, 6, there)) < 1e-6


# A pipeline's network as a field


def field_of(name):
    a, pipe = ARGUMENTS[name], shared(name)
    own = family(pipe.scheduler)(pipe.scheduler)
    names = {
        'prompt_embeds': 'encoder_hidden_states',
        'pooled_prompt_embeds': 'pooled_projections',
        'prompt_attention_mask': 'encoder_attention_mask',
    }
    conditions = {new: a[old] for old, new in names.items() if old in a}
    negative = {new: a['negative_' + old] for old, new in names.items() if 'negative_' + old in a}
    if name == 'flux':
        rows = torch.arange(64).div(8, rounding_mode='floor')
        ids = torch.stack([0 * rows, rows, torch.arange(64) % 8], 1).float()
        shared_ = dict(img_ids=ids, txt_ids=torch.zeros(7, 3), guidance=torch.full((2,), 3.5))
        return DiffusersField(pipe.transformer, own, conditions, shared_, time_scale=0.001)
    extra = (
        {'added_cond_kwargs.resolution': None, 'added_cond_kwargs.aspect_ratio': None}
        if name == 'pixart'
        else {}
    )
    return DiffusersField(
        pipe.transformer,
        own,
        conditions,
        extra,
        guidance_scale=a['guidance_scale'],
        negative=negative,
    )


@pytest.mark.parametrize('name', ['flux', 'sd3', 'pixart'])
@pytest.mark.parametrize('n', [5, 10])
@torch.no_grad()
def test_sample_on_a_field_is_the_pipeline(name, n):
    field = field_of(name)
    with using(name) as pipe:
        expected = latents(pipe, name, n)
    result = sample(field, noise_for(name), field.scheduler.solver_for(n), torch.tensor([0, 1]))
    assert relative(result, expected) < 1e-5
    swapped = sample(field, noise_for(name), field.scheduler.solver_for(n), torch.tensor([1, 0]))
    assert relative(swapped, expected) > 1e-4


@torch.no_grad()
def test_a_field_gives_every_prediction_and_its_own_by_default():
    for name, default in (('sd3', 'velocity'), ('pixart', 'data')):
        field, x, rows = field_of(name), noise_for(name), torch.tensor([0, 1])
        t = torch.tensor(0.6)
        path = field.path
        assert torch.equal(field(x, t, rows), field.on(path, default)(x, t, rows))
        data, noise = (field.on(path, k)(x, t, rows) for k in ('data', 'noise'))
        torch.testing.assert_close(path.interpolate(data, noise, t), x, rtol=0, atol=1e-4)
        torch.testing.assert_close(field(x, t, rows), by_hand(name)(x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', PIPELINES)
def test_a_pipeline_gives_its_own_field(name):
    "Without classifier-free guidance; Flux's scale is an input of the network."
    plain = {} if name == 'flux' else dict(guidance_scale=1.0)

    def arguments(rows):
        pick = lambda v: (
            v[rows]
            if isinstance(v, torch.Tensor)
            else [v[r] for r in rows]
            if isinstance(v, list)
            else v
        )
        return {k: pick(v) for k, v in ARGUMENTS[name].items()} | plain

    with using(name) as pipe:
        own = pipe.scheduler
        expected = latents(pipe, name, 6, **plain)
    field, shape = pipeline_field(shared(name), [0, 1], own, arguments)
    assert shape == NOISE_SHAPES[name]
    with torch.no_grad():
        result = sample(field, noise_for(name), own.solver_for(6), torch.tensor([0, 1]))
    assert relative(result, expected) < 1e-5 and type(shared(name).scheduler) is not type(own)


# Errors


def stepped(s, n=6, begin=None, steps=1, timestep=None, out=X0, **kwargs):
    s.set_timesteps(n, **kwargs)
    if begin is not None:
        s.set_begin_index(begin)
    for t in (s.timesteps.tolist() * 2)[:steps]:
        s.step(out, t if timestep is None else timestep, X0)


FLOW_CONFIG, VP_CONFIG = (
    diffusers.FlowMatchEulerDiscreteScheduler().config,
    diffusers.DDIMScheduler().config,
)
NOT_A_SOLVER = {k: v for k, v in euler(4).to_dict().items() if k != 'nodes'}
BROKEN = euler(4).to_dict() | dict(
    weights=[[0.5], [0.0, 0.25], [0.0, 0.0, 0.25], [0.0, 0.0, 0.0, 0.25]]
)

STABLE_DIFFUSION = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)

MISTAKES = {
    'prediction of the flow scheduler': (
        lambda: Flow(prediction_type='epsilon'),
        "prediction_type='epsilon'.*VPNeuralSolverScheduler",
    ),
    'prediction of the vp scheduler': (
        lambda: VP(prediction_type='flow_prediction'),
        "'flow_prediction'.*FlowNeuralSolverScheduler",
    ),
    'unknown prediction': (
        lambda: VP(prediction_type='score'),
        "prediction_type='score'.*epsilon, sample, v_prediction",
    ),
    'no table for N': (
        lambda: Flow().set_timesteps(12),
        r'num_inference_steps=12 .*tables for 5, 6, 7, 8, 9, 10 steps',
    ),
    'no table in a list': (
        lambda: Flow(solver=['sit-xl-2', 'flowdcn-b-2', rk4(1)]).set_timesteps(12),
        r'4, 5, 6, 7, 8, 9, 10, 15 steps',
    ),
    'the vp table there': (
        lambda: VP().set_timesteps(50),
        r'num_inference_steps=50 .*tables for 5, 6, 7, 8, 9, 10 steps',
    ),
    'N is a float': (lambda: Flow().set_timesteps(8.0), 'num_inference_steps=8.0'),
    'N is 0': (lambda: Flow(solver='euler').set_timesteps(0), 'num_inference_steps=0'),
    'no N': (lambda: Flow().set_timesteps(), 'num_inference_steps=None'),
    'vp solver to flow': (
        lambda: Flow(solver='dit-xl-2'),
        "'?dit-xl-2.*VPNeuralSolverScheduler.*change_path",
    ),
    'vp solver object to flow': (
        lambda: Flow(solver=load_solver('dit-xl-2', 5)),
        'VPNeuralSolverScheduler.*change_path',
    ),
    'flow solver to vp': (
        lambda: VP(solver='sit-xl-2'),
        'sit-xl-2.*FlowNeuralSolverScheduler.*change_path',
    ),
    'flow solver in a list to vp': (
        lambda: VP(solver=['dit-xl-2', euler(4)]),
        'euler.*FlowNeuralSolverScheduler',
    ),
    'flow config to vp': (
        lambda: VP.from_config(FLOW_CONFIG),
        'config of .*flow model.*use FlowNeuralSolverScheduler',
    ),
    'vp config to flow': (
        lambda: Flow.from_config(VP_CONFIG),
        'config of .*DDPM model.*use VPNeuralSolverScheduler',
    ),
    'our flow config to vp': (
        lambda: VP.from_config(Flow().config),
        'use FlowNeuralSolverScheduler',
    ),
    'our vp config to flow': (lambda: Flow.from_config(VP().config), 'use VPNeuralSolverScheduler'),
    'custom sigmas': (
        lambda: Flow().set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.3, 0.1]),
        r'sigmas=\[1.0, 0.9.*refused.*num_inference_steps',
    ),
    'sigmas to vp': (
        lambda: VP().set_timesteps(sigmas=(1 - np.arange(5) / 5).tolist()),
        'sigmas=.*refused',
    ),
    'sigmas and another N': (
        lambda: Flow().set_timesteps(6, sigmas=(1 - np.arange(5) / 5)),
        '5 sigmas do not fit num_inference_steps=6',
    ),
    'custom timesteps': (
        lambda: Flow().set_timesteps(timesteps=[999, 500, 100]),
        r'timesteps=\[999, 500, 100\].*refused',
    ),
    'custom timesteps to vp': (
        lambda: VP().set_timesteps(timesteps=torch.tensor([999, 500])),
        'timesteps=.*refused',
    ),
    'step before set_timesteps': (lambda: Flow().step(X0, 999.0, X0), 'set_timesteps.*before step'),
    'step after the end': (lambda: stepped(Flow(), steps=7), 'all 6 steps are done.*set_timesteps'),
    'vp step after the end': (
        lambda: stepped(VP(), steps=7),
        'all 6 steps are done.*set_timesteps',
    ),
    'begin_index too large': (
        lambda: stepped(Flow(), begin=6),
        'begin_index=6 leaves none of the 6 steps',
    ),
    'begin_index beyond': (lambda: stepped(Flow(), begin=7), 'begin_index=7.*from 0 to 5'),
    'begin_index negative': (lambda: stepped(Flow(), begin=-1), 'begin_index=-1'),
    'begin_index before set_timesteps': (lambda: Flow().set_begin_index(-1), 'begin_index=-1'),
    'unknown name': (lambda: Flow(solver='sit-xl'), "solver='sit-xl'.*sit-xl-2.*euler"),
    'unknown name to vp': (lambda: VP(solver='euler'), "solver='euler'.*dit-xl-2.*ddim"),
    'unknown grid': (lambda: VP(solver='ddim@cosine'), "grid='cosine'"),
    'unknown name in a list': (lambda: Flow(solver=['sit-xl-2', 'none']), "solver='none'"),
    'empty list': (lambda: Flow(solver=[]), r'solver=\[\]'),
    'a number': (lambda: Flow(solver=8), 'solver=8'),
    'nothing': (lambda: VP(solver=None), 'solver=None'),
    'no such file': (lambda: Flow(solver='nowhere.json'), 'nowhere.json'),
    'unknown argument': (
        lambda: Flow.from_config(FLOW_CONFIG, solvers='euler'),
        'no argument solvers. Allowed: .*solver',
    ),
    'unknown argument to vp': (lambda: VP.from_config(VP_CONFIG, shift=3.0), 'no argument shift'),
    'not a solver': (lambda: Flow(solver=NOT_A_SOLVER), 'not a solver.*nodes'),
    'not a solver at all': (lambda: VP(solver={}), 'not a solver'),
    'inconsistent solver': (lambda: Flow(solver=BROKEN), 'must sum to the span'),
    'beta schedule': (
        lambda: VP(beta_schedule='sigmoid'),
        "beta_schedule='sigmoid'.*linear, scaled_linear, squaredcos_cap_v2",
    ),
    'beta schedule of a config': (
        lambda: VP.from_config(scheduler_of('DDPM', beta_schedule='sigmoid').config),
        "beta_schedule='sigmoid'",
    ),
    'trained betas': (lambda: VP(trained_betas=[0.1, 0.2]), 'trained_betas=.*not supported'),
    'thresholding': (
        lambda: VP.from_config(scheduler_of('DDIM', thresholding=True).config),
        'thresholding=True.*not supported',
    ),
    'zero snr': (
        lambda: VP.from_config(scheduler_of('DDIM', rescale_betas_zero_snr=True).config),
        'zero_snr=True.*not supp',
    ),
    'continuous': (
        lambda: VP(continuous=True, beta_schedule='scaled_linear'),
        'continuous=True.*linear.*scaled_linear',
    ),
    'several evaluations a step': (
        lambda: stepped(Flow(solver='rk4')),
        "solver='rk4' spends 24 evaluations on num_inference_steps=6",
    ),
    'heun': (lambda: stepped(Flow(solver='heun')), "spends 12 evaluations.*'heun-nfe'"),
    'midpoint': (lambda: stepped(Flow(solver='midpoint')), 'spends 12 evaluations'),
    'timestep not there': (
        lambda: stepped(Flow(), timestep=970.0),
        r'timestep=970 is not on the schedule \[1000.0',
    ),
    'an index for a timestep': (
        lambda: stepped(VP(), timestep=4),
        'timestep=4 is not on the schedule',
    ),
    'shapes': (
        lambda: stepped(VP(), out=torch.cat([X0, X0], 1)),
        r'model_output \[4, 6, 6\] and sample \[4, 3, 6\].*learned variances',
    ),
    'mean of vectors': (
        lambda: loop(Flow(mean_trick='average'), 8, x=X0[:, 0]),
        r'states \[B, tokens, C\].*\[4, 6\]',
    ),
    'mean trick': (lambda: Flow(mean_trick='mean'), "mean_trick='mean'.*shrunk, average"),
    'shift': (lambda: Flow(shift=-3.0), 'shift=-3.0'),
    'no shift': (lambda: Flow(shift=0, compose_shift=True), 'shift=0'),
    'shift of a solver': (lambda: compose_shift(euler(4), -1.0), 'shift=-1.0'),
    'shift of stages': (lambda: compose_shift(rk4(2), 3.0), "'rk4' cannot be shifted"),
    'shift of free gains': (
        lambda: compose_shift(free_solver(), 3.0),
        "'free' cannot be shifted.*gains and row sums",
    ),
    'composed free gains': (
        lambda: Flow(solver=free_solver(), compose_shift=True),
        "'free' cannot be shifted",
    ),
    'kept times of free gains': (
        lambda: VP(solver=free_solver(VPPath()), carry='time'),
        "'free' cannot be shifted",
    ),
    'mean of free gains': (
        lambda: Flow(solver=free_solver(), mean_trick='average'),
        'mean_trick needs rows',
    ),
    'shift of a vp solver': (
        lambda: compose_shift(load_solver('dit-xl-2', 5), 3.0),
        'cannot be shifted.*linear path',
    ),
    'inverted sigmas': (
        lambda: Flow.from_config(scheduler_of('FlowMatchEulerDiscrete', invert_sigmas=True).config),
        'invert_sigmas=True',
    ),
    'no mu': (
        lambda: stepped(Flow(compose_shift=True, use_dynamic_shifting=True)),
        'mu=None.*compose_shift',
    ),
    'shift type': (
        lambda: Flow(time_shift_type='log'),
        "time_shift_type='log'.*exponential, linear",
    ),
    'no noise': (lambda: Flow().scale_noise(X0, torch.tensor([500.0])), 'noise=None'),
    'table length': (lambda: VP(num_train_timesteps=1), 'num_train_timesteps=1'),
    'betas': (lambda: VP(beta_start=0.5, beta_end=0.1), 'beta_start=0.5'),
    'a table that starts too noisy': (
        lambda: VP(**STABLE_DIFFUSION).set_timesteps(8),
        "dit-xl-2.*beyond the ends of.*carry='time'",
    ),
    'an EDM config': (lambda: VP.from_config(scheduler_of('EDMEuler').config), 'config'),
    'a consistency model': (
        lambda: Flow.from_config(scheduler_of('CMStochasticIterative').config),
        'config',
    ),
    'shifted SNR': (
        lambda: VP.from_config(scheduler_of('CogVideoXDDIM').config),
        'snr_shift_scale',
    ),
    'reversed betas, continuous': (
        lambda: VP(continuous=True, beta_start=0.02, beta_end=1e-4),
        'beta_start=0.02',
    ),
    'field without one of ours': (
        lambda: DiffusersField(shared('sd3').vae, shared('sd3').scheduler),
        'FlowMatch.*from_config',
    ),
    'field of unequal rows': (
        lambda: DiffusersField(shared('sd3').vae, Flow(), dict(a=X0, b=X0[:2])),
        r'\[2, 4\] rows',
    ),
    'field without a negative': (
        lambda: DiffusersField(shared('sd3').vae, Flow(), dict(a=X0), guidance_scale=2.0),
        'negative.*a',
    ),
    'negative guidance': (
        lambda: DiffusersField(shared('sd3').vae, Flow(), dict(a=X0), guidance_scale=-1.0),
        'guidance_scale=-1',
    ),
    'field on another path': (
        lambda: sample(field_of('sd3'), noise_for('sd3'), load_solver('dit-xl-2', 5)),
        'VPPath.*change_path',
    ),
    'field without rows': (
        lambda: field_of('sd3')(noise_for('sd3'), torch.tensor(0.5)),
        '2 rows: give cond',
    ),
}


@pytest.mark.parametrize('call, message', MISTAKES.values(), ids=MISTAKES)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_a_mistake_in_a_pipeline_is_an_error_there():
    with using('sd3') as pipe:
        with pytest.raises(ValueError, match='num_inference_steps=28 has no table'):
            images(pipe, 'sd3', 28)
        with pytest.raises(ValueError, match='refused'):
            images(pipe, 'sd3', sigmas=[1.0, 0.7, 0.2])
    with using('pixart') as pipe, pytest.raises(ValueError, match='timesteps=.*refused'):
        images(pipe, 'pixart', timesteps=[900, 500, 100])
    with using('flux') as pipe, pytest.raises(ValueError, match='refused'):
        images(pipe, 'flux', 5, sigmas=[1.0, 0.9, 0.5, 0.3, 0.1])


def test_the_default_sigmas_of_flow_pipelines_are_accepted():
    for n in (5, 6, 10):
        s = Flow()
        s.set_timesteps(n)
        expected = s.timesteps
        for sigmas in (
            np.linspace(1.0, 1 / n, n),
            [1 - k / n for k in range(n)],
            torch.linspace(1, 1 / n, n),
        ):
            for given in ({}, dict(num_inference_steps=n)):
                s.set_timesteps(**given, sigmas=sigmas, mu=0.7, device='cpu')
                assert torch.equal(s.timesteps, expected) and s.num_inference_steps == n


def test_a_failed_set_timesteps_does_not_spoil_the_next():
    for s in (Flow(), VP()):
        expected = loop(s, 8)
        with pytest.raises(ValueError):
            s.set_timesteps(11)
        assert torch.equal(loop(s, 8), expected)
    assert isinstance(s.solver_for(8), Solver)


# Tables on other noise schedules

SD = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)


def test_kept_times_are_the_same_method_on_the_other_table():
    "DDIM carried over is DDIM derived there; of a searched table, times and coefficients stay."
    path = VP(**SD, carry='time').path
    own = ddim(7, VPPath(), t_start=0.999)
    carried, there = keep_times(own, path), ddim(7, path, own.nodes)
    assert torch.equal(carried.nodes, there.nodes) and torch.allclose(
        carried.weights, there.weights, rtol=1e-12
    )
    table = load_solver('dit-xl-2', 8)
    s = VP(**SD, carry='time')
    solver = s.solver_for(8)
    assert torch.equal(solver.nodes, table.nodes) and solver.path == path
    assert torch.allclose(
        solver.weights / solver.span[:, None], table.weights / table.span[:, None]
    )
    s.set_timesteps(8)
    torch.testing.assert_close(s.timesteps, (1000 * table.nodes[:-1] - 1).float())
    assert keep_times(table, VPPath()) is table
    with pytest.raises(ValueError, match='stages'):
        keep_times(replace(heun(4), path=VPPath()), path)


def test_equal_log_snr_is_not_equal_time():
    a, b = (
        VP(carry=c, beta_schedule='squaredcos_cap_v2').solver_for(8) for c in ('log-snr', 'time')
    )
    source = load_solver('dit-xl-2', 8)
    assert torch.allclose(
        a.path.log_snr(a.nodes), VPPath().log_snr(source.nodes.clamp(0.001, 1)), atol=1e-6
    ) and torch.equal(b.nodes, source.nodes.clamp(0, 1))
    with pytest.raises(ValueError, match="carry='equal'.*log-snr, time"):
        VP(carry='equal')
    with pytest.raises(ValueError, match="nodes beyond the ends.*carry='time'"):
        VP(**SD).solver_for(8)
