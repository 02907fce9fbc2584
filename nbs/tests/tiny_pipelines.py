"Random pipelines of five families, the loop in them, and both by hand, for tests of schedulers."

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import torch

from neuralsolver._conventions import is_flow
from neuralsolver.classical import adams_bashforth
from neuralsolver._pipeline_field import DiffusersField
from neuralsolver.diffusers import FlowNeuralSolverScheduler as Flow
from neuralsolver.diffusers import VPNeuralSolverScheduler as VP
from neuralsolver.neural import load_solver
from neuralsolver.paths import LinearPath
from neuralsolver.pipelines import load_pipeline
from neuralsolver.solvers import sample

F64 = torch.float64
FLOW_PIPELINES = ('sana', 'sd3', 'flux')
PIPELINES = ('dit', 'pixart', *FLOW_PIPELINES)
STABLE_DIFFUSION = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)
NAMES = dict(
    dit='random-dit',
    pixart='random-pixart-sigma',
    sana='random-sana',
    sd3='random-sd3',
    flux='random-flux',
)
NOISE_SHAPES = dict(
    dit=(4, 8, 8), pixart=(4, 8, 8), sana=(4, 16, 16), sd3=(4, 16, 16), flux=(64, 16)
)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


# in the pipelines


def _masked(width):
    ones = torch.ones(2, 7)
    return dict(
        prompt_embeds=rand(2, 7, width),
        prompt_attention_mask=ones,
        negative_prompt=None,
        negative_prompt_embeds=rand(2, 7, width, seed=1),
        negative_prompt_attention_mask=ones,
        use_resolution_binning=False,
    )


_PAIR = dict(prompt_embeds=rand(2, 7, 32), pooled_prompt_embeds=rand(2, 64))
_NEGATIVE = dict(
    negative_prompt_embeds=rand(2, 7, 32, seed=1),
    negative_pooled_prompt_embeds=rand(2, 64, seed=1),
)
ARGUMENTS = {
    'dit': dict(class_labels=[1, 2], guidance_scale=4.0),
    'pixart': _masked(32) | dict(height=8, width=8, guidance_scale=4.5),
    'sana': _masked(8) | dict(height=32, width=32, guidance_scale=4.5),
    'sd3': _PAIR | _NEGATIVE | dict(height=16, width=16, guidance_scale=7.0),
    'flux': _PAIR | dict(height=16, width=16, guidance_scale=3.5),
}


@cache
def shared(name):
    "One pipeline a family for the whole process."
    return load_pipeline(NAMES[name])


def ours(scheduler, **kwargs):
    "Our scheduler for the family of one of diffusers."
    cls = Flow if is_flow(scheduler.config) else VP
    return cls.from_config(scheduler.config, **kwargs)


@contextmanager
def using(name, scheduler=None, **kwargs):
    "The shared pipeline with one of our schedulers, for the time being."
    pipe = shared(name)
    own = pipe.scheduler
    pipe.scheduler = scheduler or ours(own, **kwargs)
    try:
        yield pipe
    finally:
        pipe.scheduler = own


def absent(pipe):
    return {k: None for k, v in pipe.components.items() if v is None}


def generators():
    return [torch.Generator().manual_seed(i) for i in (1, 2)]


def images(pipe, name, n=8, **kwargs):
    given = {**ARGUMENTS[name], **kwargs}
    run = pipe(**given, num_inference_steps=n, generator=generators(), output_type='np')
    return run.images


def noise_for(name):
    return torch.cat([torch.randn(1, *NOISE_SHAPES[name], generator=g) for g in generators()])


def latents(pipe, name, n, **kwargs):
    "The result from `noise_for`; DiT has no latent output, so its decoder is listened to."
    arguments = {**ARGUMENTS[name], 'num_inference_steps': n, **kwargs}
    if name != 'dit':
        return pipe(**arguments, latents=noise_for(name), output_type='latent').images
    heard = decoded(pipe, **arguments, generator=generators())
    return heard * pipe.vae.config.scaling_factor


def decoded(pipe, **arguments):
    "What the decoder of a pipeline is given."
    decode, heard = pipe.vae.decode, []

    def listen(z):
        heard.append(z)
        return decode(z)

    pipe.vae.decode = listen
    try:
        pipe(**arguments, output_type='np')
    finally:
        del pipe.vae.decode
    return heard[0]


# the same by hand


def _table_log_alpha(t):
    "log alpha of the linear DDPM table between its knots."
    betas = np.linspace(1e-4, 0.02, 1000)
    knots = np.concatenate([[0], np.log1p(-betas).cumsum() / 2])
    return np.interp(t * 1000, np.arange(1001), knots)


def alpha_sigma(t, continuous):
    log_alpha = -(0.1 * t + 19.9 * t * t / 2) / 2 if continuous else _table_log_alpha(t)
    return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))


def _call_dit(net, x, t, a):
    labels = torch.tensor([*a['class_labels'], 1000, 1000])
    c, u = net(torch.cat([x, x]), timestep=t, class_labels=labels).sample[:, :4].chunk(2)
    return u + a['guidance_scale'] * (c - u)


def _call_flux(net, x, t, a):
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    return net(
        hidden_states=x,
        timestep=t[:2] / 1000,
        guidance=torch.full((2,), a['guidance_scale']),
        pooled_projections=a['pooled_prompt_embeds'],
        encoder_hidden_states=a['prompt_embeds'],
        txt_ids=torch.zeros(7, 3),
        img_ids=torch.stack([0 * rows, rows, columns], -1).reshape(64, 3),
        return_dict=False,
    )[0]


def _call_text(name, net, x, t, a):
    def both(key):
        return torch.cat([a['negative_' + key], a[key]])

    if name == 'sd3':
        more = dict(pooled_projections=both('pooled_prompt_embeds'))
    else:
        more = dict(encoder_attention_mask=both('prompt_attention_mask'))
    if name == 'pixart':
        more['added_cond_kwargs'] = dict(resolution=None, aspect_ratio=None)
    if name == 'sana':
        t = t * net.config.timestep_scale
    text = both('prompt_embeds')
    out = net(torch.cat([x, x]), timestep=t, encoder_hidden_states=text, return_dict=False, **more)
    u, c = out[0].chunk(2)
    return (u + a['guidance_scale'] * (c - u))[:, :4]


def by_hand(name, continuous=False):
    "The field that a pipeline's network stands for, in this package's conventions."
    net, arguments = shared(name).transformer, ARGUMENTS[name]

    @torch.no_grad()
    def out(x, told):
        t = torch.full((4,), told)
        if name == 'dit':
            return _call_dit(net, x, t, arguments)
        if name == 'flux':
            return _call_flux(net, x, t, arguments)
        return _call_text(name, net, x, t, arguments)

    def field(x, t):
        t = t.item()
        if name in FLOW_PIPELINES:
            return -out(x, 1000 * (1 - t))
        alpha, sigma = alpha_sigma(t, continuous)
        return (x - sigma * out(x, 1000 * t - (not continuous))) / alpha

    return field


def field_of(name):
    "The same as a DiffusersField, its conditions named by hand."
    a, pipe = ARGUMENTS[name], shared(name)
    names = {
        'prompt_embeds': 'encoder_hidden_states',
        'pooled_prompt_embeds': 'pooled_projections',
        'prompt_attention_mask': 'encoder_attention_mask',
    }
    conditions = {new: a[old] for old, new in names.items() if old in a}
    if name == 'flux':
        rows = torch.arange(64).div(8, rounding_mode='floor')
        ids = torch.stack([0 * rows, rows, torch.arange(64) % 8], 1).float()
        more = dict(img_ids=ids, txt_ids=torch.zeros(7, 3), guidance=torch.full((2,), 3.5))
        return DiffusersField(pipe.transformer, ours(pipe.scheduler), conditions, more, 0.001)
    negative = {new: a['negative_' + old] for old, new in names.items() if 'negative_' + old in a}
    nothing = dict.fromkeys(('added_cond_kwargs.resolution', 'added_cond_kwargs.aspect_ratio'))
    return DiffusersField(
        pipe.transformer,
        ours(pipe.scheduler),
        conditions,
        nothing if name == 'pixart' else {},
        guidance_scale=a['guidance_scale'],
        negative=negative,
    )


# the loop that is inside every pipeline

A, B = rand(6, 6, seed=3, dtype=F64) / 2, rand(6, seed=4, dtype=F64)
X0 = rand(4, 3, 6, seed=5, dtype=F64)


def net(x, timestep):
    out = torch.tanh(x.double() @ A + B * timestep.double() / 1000) + 0.3 * x.double()
    return out.to(x.dtype)


def told(s, t):
    if isinstance(s, Flow):
        return (1000 * (1 - t)).float()
    return (1000 * t - int(not s.config.continuous)).float()


def loop(scheduler, n, model=net, x=X0, begin=None, **kwargs):
    scheduler.set_timesteps(n, **kwargs)
    if begin is not None:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin or 0 :]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def reference(scheduler, n, solver, x=X0, model=net):
    "The same by `sample`."
    assert solver.nfe == n and solver.path == scheduler.path

    def field(x, t):
        out = model(x, told(scheduler, t))
        if isinstance(scheduler, Flow):
            return -out
        a, s = alpha_sigma(t.item(), scheduler.config.continuous)
        return (x - s * out) / a

    return sample(field, x, solver)


def free_solver(path=LinearPath(), n=6):
    "A solver with free gains and rows."
    g = torch.Generator().manual_seed(11)

    def near(*shape):
        return 1 + 0.2 * torch.randn(*shape, generator=g, dtype=F64)

    if path.coordinates == 'velocity':
        s = adams_bashforth(n, 3, torch.linspace(0, 1, n + 1, dtype=F64) ** 1.3)
    else:
        s = load_solver('dit-xl-2', n)
    weights = (s.weights * near(n, n)).tril()
    return replace(s, name='free', weights=weights, gains=s.gain * near(n))


def scheduler_of(name, **kwargs):
    return getattr(diffusers, name + 'Scheduler')(**kwargs)
