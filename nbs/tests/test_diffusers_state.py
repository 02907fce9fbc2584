"State of our schedulers: what is kept, saved, read by pipelines, and forgotten."

import copy
import gc
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import F64, STABLE_DIFFUSION, VP, X0, Flow, loop, net, ours, rand
from tiny_pipelines import reference, relative, scheduler_of

from neuralsolver.classical import rk4
from neuralsolver.neural import load_solver
from neuralsolver.paths import DDPMPath, VPPath
from neuralsolver.rules import classical_solver
from neuralsolver.solvers import sample, save_solver
from neuralsolver.transfer import change_path

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
BOTH = pytest.mark.parametrize('cls', [Flow, VP])


# saved and loaded


@pytest.mark.parametrize(
    'cls, kwargs',
    [
        (Flow, dict(solver='flowdcn-b-2', shift=2.5, compose_shift=True, mean_trick='average')),
        (VP, dict(beta_end=0.012, beta_schedule='scaled_linear', solver='unipc-3')),
        (VP, dict(continuous=True)),
    ],
)
def test_saved_scheduler_is_the_same(cls, kwargs, tmp_path):
    s = cls(**kwargs)
    expected = loop(s, 8)
    s.save_pretrained(tmp_path)
    for other in (
        cls.from_pretrained(tmp_path),
        cls.from_config(cls.load_config(tmp_path)),
        cls.from_config(s.config),
        cls.from_config(dict(s.config)),
    ):
        assert torch.equal(loop(other, 8), expected)
        assert all(other.config[k] == v for k, v in kwargs.items())
    changed = cls.from_pretrained(tmp_path, solver='euler' if cls is Flow else 'ddim')
    assert not torch.allclose(loop(changed, 8), expected)
    assert cls.from_config(s.config, return_unused_kwargs=True)[1] == {}


@pytest.mark.parametrize('kind', ['searched', 'stages', 'vp', 'flow on vp'])
def test_saved_solver_is_its_content_and_its_file(kind, tmp_path):
    on_vp = change_path(load_solver('sit-xl-2', 7), VPPath(t_min=1e-4))
    solver, cls = {
        'searched': (load_solver('sit-xl-2', 7), Flow),
        'stages': (rk4(2), Flow),
        'vp': (load_solver('dit-xl-2', 6), VP),
        'flow on vp': (on_vp, VP),
    }[kind]
    n, file = solver.nfe, tmp_path / 'mine.json'
    save_solver(solver, file)
    made = [cls(solver=given) for given in (solver, solver.to_dict(), file, str(file))]
    file.unlink()
    expected = loop(made[0], n)
    if kind != 'flow on vp':
        there = change_path(solver, made[0].path)
        assert relative(expected, reference(made[0], n, there)) < 1e-9
    for s in made:
        s.save_pretrained(tmp_path / 's')
        saved = json.loads((tmp_path / 's/scheduler_config.json').read_text())
        assert saved['solver'] == solver.to_dict()
        for other in (s, cls.from_pretrained(tmp_path / 's'), copy.deepcopy(s)):
            assert torch.equal(loop(other, n), expected)
        with pytest.raises(ValueError, match=f'tables for {n} steps'):
            s.set_timesteps(n + 1)


def test_first_entry_of_a_list_with_a_table_is_used():
    names = ['sit-xl-2', 'flowdcn-b-2', 'euler']
    both = Flow(solver=names)
    chosen = {5: 'sit-xl-2', 10: 'sit-xl-2', 15: 'flowdcn-b-2', 12: 'euler', 1: 'euler'}
    for n, name in chosen.items():
        assert torch.equal(loop(both, n), loop(Flow(solver=name), n))
    mixed = Flow(solver=[rk4(2), 'flowdcn-b-2'])
    assert torch.equal(loop(mixed, 8), loop(Flow(solver=rk4(2)), 8))
    assert torch.equal(loop(mixed, 9), loop(Flow(solver='flowdcn-b-2'), 9))
    vp = VP(solver=['dit-xl-2', 'unipc-2'])
    assert torch.equal(loop(vp, 20), loop(VP(solver='unipc-2'), 20))
    assert list(Flow.from_config(both.config).config.solver) == names


OTHERS = [
    ('DDIM', {}),
    ('DDIM', STABLE_DIFFUSION | dict(steps_offset=1)),
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
]


@pytest.mark.parametrize('saved', [False, True])
@pytest.mark.parametrize('name, kwargs', OTHERS)
def test_config_of_another_scheduler_comes_back(name, kwargs, saved, tmp_path):
    theirs = scheduler_of(name, **kwargs)
    config = {k: v for k, v in theirs.config.items() if not k.startswith('_')}
    mine = ours(theirs, **(dict(solver='ddim') if 'beta_schedule' in kwargs else {}))
    if saved:
        mine.save_pretrained(tmp_path)
        mine = type(mine).from_pretrained(tmp_path)
    back = type(theirs).from_config(mine.config)
    assert {k: back.config[k] for k in config} == config
    if isinstance(mine, VP):
        used = ('beta_start', 'beta_end', 'beta_schedule', 'prediction_type')
        assert all(mine.config[k] == config[k] for k in used)
        torch.testing.assert_close(mine.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    else:
        assert mine.config.shift == config.get('flow_shift', config.get('shift'))
    dynamic = dict(mu=0.7) if config.get('use_dynamic_shifting') else {}
    for s in (theirs, back):
        s.set_timesteps(7, **dynamic)
    assert torch.equal(back.timesteps, theirs.timesteps)


def test_config_defaults_of_another_class_arrive():
    "Those of Heun differ; diffusers' own from_config drops values that were left at a default."
    theirs = scheduler_of('HeunDiscrete')
    assert theirs.config.beta_start == 0.00085
    assert VP.from_config(theirs.config).path == DDPMPath('linear', 0.00085, 0.012)
    back = type(theirs).from_config(VP().config)
    assert (back.config.beta_start, back.config.beta_end) == (1e-4, 0.02)


def test_config_with_flow_shift_gives_way_to_an_argument():
    flow = dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
    theirs = scheduler_of('UniPCMultistep', **flow)
    assert Flow.from_config(theirs.config, shift=2.0).config.shift == 2.0


# what pipelines read


@BOTH
def test_interface_that_pipelines_read(cls):
    s = cls()
    assert (len(s), s.config.num_train_timesteps) == (1000, 1000)
    assert (s.order, s.init_noise_sigma, s.begin_index, s.compatibles) == (1, 1.0, None, [])
    name = 'sit-xl-2' if cls is Flow else 'dit-xl-2'
    assert s.config['solver'] == s.config.solver == name
    assert len(s.timesteps) == 1000 and len(s.sigmas) == 1001  # for training loops
    s.set_timesteps(6)
    cpu = s.timesteps
    s.set_timesteps(6, device='meta')
    assert s.timesteps.device.type == 'meta' and s.sigmas.device.type == 'cpu'
    s.set_timesteps(num_inference_steps=6, device=None, mu=None)
    assert torch.equal(s.timesteps, cpu)
    assert (cpu.diff() < 0).all() and s.num_inference_steps == 6


@BOTH
@pytest.mark.parametrize('shape', [(2, 4, 8, 8), (2, 7, 16), (1, 4, 3, 8, 8), (5,)])
def test_interface_of_a_step(cls, shape):
    "The shape stays, the state is not changed, and a tuple has what the dictionary has."
    s, x, outputs = cls(), rand(*shape), []
    for return_dict in (True, False):
        s.set_timesteps(5)
        y = x
        for k, t in enumerate(s.timesteps):
            assert s.step_index == (None if k == 0 else k)
            assert s.scale_model_input(y, t) is y
            out = s.step(torch.sin(y), t, y, return_dict=return_dict)
            y = out.prev_sample if return_dict else out[0]
            assert y.shape == x.shape and isinstance(out, dict if return_dict else tuple)
        outputs.append(y)
    assert torch.equal(*outputs) and torch.equal(x, rand(*shape)) and s.step_index == 5


def test_default_sigmas_of_flow_pipelines_are_accepted():
    for n in (5, 10):
        s = Flow()
        s.set_timesteps(n)
        expected = s.timesteps
        array, tensor = np.linspace(1.0, 1 / n, n), torch.linspace(1, 1 / n, n)
        for sigmas in (array, [1 - k / n for k in range(n)], tensor):
            for given in ({}, dict(num_inference_steps=n)):
                s.set_timesteps(**given, sigmas=sigmas, mu=0.7, device='cpu')
                assert torch.equal(s.timesteps, expected) and s.num_inference_steps == n


LEVELS = [1.0, 0.83, 0.6, 0.31, 0.12]


def euler_of_diffusers(shift, network, x):
    "FlowMatchEulerDiscreteScheduler with the levels of a user."
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=LEVELS)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_sigmas_of_a_user_reach_a_classical_rule(shift):
    "Euler on the levels of a user is diffusers' Euler; every rule is `sample` on these nodes."

    def network(x, t):
        return torch.sin(3 * x) * (1 + t / 1000)

    x = torch.linspace(-1, 1, 12).reshape(2, 1, 2, 3)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    levels = torch.cat([shift * levels / (1 + (shift - 1) * levels), levels.new_zeros(1)])
    for name in ('euler', 'ab2', 'ab4'):
        s = Flow(name, compose_shift=shift != 1, shift=shift)
        s.set_timesteps(len(LEVELS), sigmas=LEVELS)
        ours = x
        for t in s.timesteps:
            ours = s.step(network(ours, t), t, ours).prev_sample
        solver = classical_solver(name, len(LEVELS), nodes=1 - levels)
        expected = sample(lambda x, t: -network(x, 1000 * (1 - t)), x, solver)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(s.sigmas, levels.float())
        if name == 'euler':
            theirs = euler_of_diffusers(shift, network, x)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    s.set_timesteps(len(LEVELS))
    assert s.sigmas[1] != levels[1].float()  # the next run is on its own grid again


@pytest.mark.parametrize('with_zero', [False, True])
def test_sigmas_of_a_user_on_the_path_of_ddpm_models(with_zero):
    s = VP('dpm-solver++2m')
    levels = [40.0, 9.0, 2.0, 0.5]
    s.set_timesteps(sigmas=levels + [0.0] * with_zero)
    assert s.num_inference_steps == 4 and s.sigmas[-1] == 0
    torch.testing.assert_close(s.sigmas[:-1], torch.tensor(levels), rtol=1e-5, atol=0)
    nodes = s.solver_for(4, sigmas=levels).nodes
    assert nodes[-1] == s.path.t_end
    expected = classical_solver('dpm-solver++2m', 4, s.path, nodes)
    assert torch.equal(s.solver_for(4, sigmas=levels).weights, expected.weights)


# history


@BOTH
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


@BOTH
@pytest.mark.parametrize('stop', [10, 6])
def test_history_does_not_outlive_its_run(cls, stop):
    s, x = cls(), rand(3, 11, 13)
    s.set_timesteps(10)
    for t in s.timesteps[:stop]:
        x = s.step(x.sin(), t, x).prev_sample
    if stop < 10:
        s.set_timesteps(10)
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == x.shape]
    assert len(alive) == 1


def test_history_is_copied_with_the_scheduler():
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


def test_history_survives_a_reused_output_buffer():
    "A compiled network may write every output into the same memory."
    for s in (Flow(), VP()):
        expected, buffer = loop(s, 8), torch.empty_like(X0)
        assert torch.equal(loop(s, 8, lambda x, t: buffer.copy_(net(x, t))), expected)


def test_arguments_of_a_step_are_not_changed():
    for s in (Flow(mean_trick='average'), VP(solver='deis-3')):
        s.set_timesteps(6)
        x, kept = X0.clone(), []
        for t in s.timesteps:
            out = net(x, t)
            kept += [(x, x.clone()), (out, out.clone())]
            x = s.step(out, t, x).prev_sample
        assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize('shape', [(3, 5, 4), (3, 2, 4, 5), (3, 2, 2, 3, 4)])
@pytest.mark.parametrize('kwargs', [{}, dict(mean_trick='average'), dict(mean_trick='shrunk')])
def test_batch_size_independence(shape, kwargs):
    s, x = Flow(**kwargs), rand(*shape, dtype=F64)

    def model(x, t):
        return torch.sin(2 * x + 1)

    single = torch.cat([loop(s, 8, model, v[None]) for v in x])
    torch.testing.assert_close(loop(s, 8, model, x), single, rtol=1e-12, atol=1e-12)


# the position


@BOTH
def test_position_is_counted_and_not_read_off_a_timestep(cls):
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


@BOTH
def test_position_is_found_by_the_first_timestep(cls):
    "Pipelines that do not call set_begin_index."
    s = cls()
    for begin in range(8):
        expected = loop(s, 8, begin=begin)
        s.set_timesteps(8)
        x = X0
        for t in s.timesteps[begin:]:
            x = s.step(net(x, t), t, x).prev_sample
        assert torch.equal(x, expected)
        assert s.begin_index is None and s.step_index == 8


@pytest.mark.parametrize('where', ['set', 'found'])
@pytest.mark.parametrize(
    'cls, kwargs',
    [
        (Flow, {}),
        (Flow, dict(mean_trick='average')),
        (Flow, dict(mean_trick='shrunk')),
        (Flow, dict(solver='ab3', compose_shift=True, shift=3.0)),
        (VP, {}),
    ],
)
def test_no_step_waits_for_the_device(cls, kwargs, where):
    "A tensor on 'meta' has no values: .item(), .cpu() or a comparison would raise."
    s = cls(**kwargs)
    # timesteps stay on the CPU if a value of theirs is needed
    s.set_timesteps(8, device='meta' if where == 'set' else 'cpu')
    if where == 'set':
        s.set_begin_index(0)
    x = torch.empty(2, 5, 6, device='meta')
    for t in s.timesteps:
        x = s.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == 'meta' and s.sigmas.device.type == 'cpu'
