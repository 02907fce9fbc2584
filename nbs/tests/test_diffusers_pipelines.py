"Our schedulers in the stock pipelines of diffusers, and the networks of pipelines as fields."

import json
import math
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import ARGUMENTS, FLOW_PIPELINES, NAMES, NOISE_SHAPES, PIPELINES, VP, Flow
from tiny_pipelines import absent, by_hand, field_of, generators, images, latents, noise_for
from tiny_pipelines import ours, relative, shared, using

from neuralsolver.diffusers import compose_shift
from neuralsolver._pipeline_field import pipeline_field
from neuralsolver.neural import load_solver
from neuralsolver.paths import DDPMPath, VPPath
from neuralsolver.pipelines import load_pipeline
from neuralsolver.solvers import sample
from neuralsolver.transfer import change_path

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
EVERY = pytest.mark.parametrize('name', PIPELINES)


@EVERY
def test_saved_pipeline_makes_the_same_pictures(name, tmp_path):
    cls, solver = (Flow, 'sit-xl-2') if name in FLOW_PIPELINES else (VP, 'dit-xl-2')
    with using(name, solver=solver) as pipe:
        first = images(pipe, name)
        pipe.save_pretrained(tmp_path)
    assert np.isfinite(first).all() and first.std() > 0.05
    assert not np.array_equal(images(shared(name), name), first)
    saved = json.loads((tmp_path / 'scheduler/scheduler_config.json').read_text())
    assert saved['solver'] == solver and saved['_class_name'] == cls.__name__
    index = json.loads((tmp_path / 'model_index.json').read_text())
    assert index['scheduler'] == ['neuralsolver.diffusers', cls.__name__]
    again = type(pipe).from_pretrained(tmp_path, **absent(pipe))
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is cls
    assert np.array_equal(images(again, name), first)


def test_saved_pipeline_asks_for_the_import(tmp_path, monkeypatch):
    with using('sd3', solver='sit-xl-2') as pipe:
        pipe.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, 'neuralsolver.diffusers')
    said = 'import neuralsolver.diffusers before calling `from_pretrained`'
    with pytest.raises(ValueError, match=said):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)


LOAD = """
import neuralsolver.diffusers
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
arguments, absent = torch.load("arguments.pt")
generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
pipe = DiffusionPipeline.from_pretrained("pipe", **absent)
run = pipe(**arguments, num_inference_steps=8, generator=generators, output_type="np")
np.save("out.npy", run.images)
"""


@pytest.mark.slow
def test_saved_pipeline_loads_in_a_new_process(tmp_path):
    with using('sd3', solver='sit-xl-2') as pipe:
        expected = images(pipe, 'sd3')
        pipe.save_pretrained(tmp_path / 'pipe')
    torch.save((ARGUMENTS['sd3'], absent(pipe)), tmp_path / 'arguments.pt')
    command = [sys.executable, '-c', LOAD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # another number of threads sums in another order
    np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'name, kwargs, n',
    [
        ('flux', dict(solver='sit-xl-2'), 5),
        ('flux', dict(solver='flowdcn-b-2'), 15),
        ('sana', dict(solver='flowdcn-b-2'), 5),
        ('sd3', dict(solver='sit-xl-2'), 7),
        ('sd3', dict(solver='flowdcn-b-2', compose_shift=True), 8),
        ('dit', dict(continuous=False), 10),
        ('dit', dict(continuous=True), 5),
        ('pixart', dict(continuous=False), 5),
        ('pixart', dict(continuous=True), 10),
    ],
)
def test_fidelity_of_a_pipeline_to_sample(name, kwargs, n):
    "The reference calls the network by hand."
    with using(name, **kwargs) as pipe:
        result = latents(pipe, name, n)
    solver = load_solver(kwargs.get('solver', 'dit-xl-2'), n)
    if 'compose_shift' in kwargs:
        solver = compose_shift(solver, 3.0)
    if name not in FLOW_PIPELINES:
        solver = change_path(solver, VPPath() if kwargs['continuous'] else DDPMPath())
    expected = sample(by_hand(name, kwargs.get('continuous')), noise_for(name), solver)
    assert result.dtype == torch.float32 and relative(result, expected) < 1e-5


def test_fidelity_of_the_shift_that_flux_computes():
    "mu from the number of tokens: a line through (256, .5) and (4096, 1.15)."
    with using('flux', compose_shift=True) as pipe:
        result = latents(pipe, 'flux', 6)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (64 - 256)
    solver = compose_shift(load_solver('sit-xl-2', 6), math.exp(mu))
    assert relative(result, sample(by_hand('flux'), noise_for('flux'), solver)) < 1e-5


@pytest.mark.parametrize('name', ['flux', 'sana', 'pixart'])
def test_precision_of_a_pipeline_in_bfloat16(name):
    with using(name) as pipe:
        exact = images(pipe, name)
    pipe = load_pipeline(NAMES[name])
    pipe.scheduler = ours(pipe.scheduler)
    pipe.to(torch.bfloat16)
    given = {k: v.bfloat16() for k, v in ARGUMENTS[name].items() if 'embeds' in k}
    result = images(pipe, name, **given)
    assert np.isfinite(result).all() and np.abs(result - exact).mean() < 0.1 * exact.std()


@EVERY
def test_own_scheduler_restored_makes_its_own_pictures(name):
    own = shared(name).scheduler
    expected = images(shared(name), name)
    with using(name, type(own).from_config(ours(own).config)) as pipe:
        assert np.array_equal(images(pipe, name), expected)


def test_shared_scheduler_serves_two_pipelines():
    one, other = shared('flux'), shared('sd3')
    s = Flow.from_config(one.scheduler.config, use_dynamic_shifting=False)
    with using('flux', s), using('sd3', s):
        first = {}
        for name, pipe, n in [('flux', one, 8), ('sd3', other, 5)] * 2:
            result = images(pipe, name, n)
            assert np.array_equal(result, first.setdefault(name, result))
        with using('flux', Flow()):
            assert np.array_equal(images(one, 'flux'), first['flux'])


@pytest.mark.parametrize('name', FLOW_PIPELINES)
def test_interrupted_call_leaves_nothing(name):
    def stop(pipe, step, t, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with using(name) as pipe:
        expected = images(pipe, name)
        with pytest.raises(KeyboardInterrupt):
            images(pipe, name, n=10, callback_on_step_end=stop)
        assert np.array_equal(images(pipe, name), expected)


@pytest.mark.parametrize(
    'name, kind',
    [('sd3', diffusers.StableDiffusion3Img2ImgPipeline), ('flux', diffusers.FluxImg2ImgPipeline)],
)
@pytest.mark.parametrize('strength', [0.5, 1.0, 0.2])
def test_image_to_image_makes_its_share_of_calls(name, kind, strength):
    pipe, calls = shared(name), []
    image = torch.rand(2, 3, 16, 16, generator=generators()[0])
    with using(name) as own:
        other = kind.from_pipe(pipe)
        other.scheduler = own.scheduler
        other.set_progress_bar_config(disable=True)
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            out = images(other, name, 8, image=image, strength=strength)
        finally:
            hook.remove()
        assert np.isfinite(out).all() and other.scheduler.step_index == 8
        assert len(calls) == math.floor(8 * strength + 0.999)


# a pipeline's network as a field


@pytest.mark.parametrize('name, n', [('flux', 5), ('sd3', 10), ('pixart', 5)])
@torch.no_grad()
def test_fidelity_of_a_field_made_by_hand(name, n):
    field = field_of(name)
    with using(name) as pipe:
        expected = latents(pipe, name, n)
    solver = field.scheduler.solver_for(n)
    result, swapped = (
        sample(field, noise_for(name), solver, torch.tensor(rows)) for rows in ([0, 1], [1, 0])
    )
    assert relative(result, expected) < 1e-5 and relative(swapped, expected) > 1e-4


@torch.no_grad()
def test_field_gives_every_prediction_and_its_own_by_default():
    t, rows = torch.tensor(0.6), torch.tensor([0, 1])
    for name, default in (('sd3', 'velocity'), ('pixart', 'data')):
        field, x = field_of(name), noise_for(name)
        path = field.path
        assert torch.equal(field(x, t, rows), field.on(path, default)(x, t, rows))
        data, noise = (field.on(path, k)(x, t, rows) for k in ('data', 'noise'))
        torch.testing.assert_close(path.interpolate(data, noise, t), x, rtol=0, atol=1e-4)
        torch.testing.assert_close(field(x, t, rows), by_hand(name)(x, t), rtol=1e-4, atol=1e-4)


@EVERY
def test_fidelity_of_a_field_taken_from_its_pipeline(name):
    "Without classifier-free guidance; Flux's scale is an input of the network."
    plain = {} if name == 'flux' else dict(guidance_scale=1.0)

    def pick(value, rows):
        if isinstance(value, list):
            return [value[r] for r in rows]
        return value[rows] if isinstance(value, torch.Tensor) else value

    def arguments(rows):
        return {k: pick(v, rows) for k, v in ARGUMENTS[name].items()} | plain

    with using(name) as pipe:
        own = pipe.scheduler
        expected = latents(pipe, name, 6, **plain)
    field, shape = pipeline_field(shared(name), [0, 1], own, arguments)
    assert shape == NOISE_SHAPES[name] and type(shared(name).scheduler) is not type(own)
    with torch.no_grad():
        result = sample(field, noise_for(name), own.solver_for(6), torch.tensor([0, 1]))
    assert relative(result, expected) < 1e-5
