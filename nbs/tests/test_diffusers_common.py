"""What diffusers asks of every scheduler in its common tests (`SchedulerCommonTest`), of ours.

Ten checks, in three configurations of each scheduler. Networks of flow models have no betas.
"""

import inspect
import logging
import warnings

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import STABLE_DIFFUSION, VP, Flow, rand

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
CONFIGURATIONS = [
    (VP, {}, 10),
    (VP, dict(STABLE_DIFFUSION, solver='dpm-solver++2m', prediction_type='v_prediction'), 12),
    (VP, dict(solver=['dit-xl-2', 'ddim'], rescale_betas_zero_snr=True), 50),
    (Flow, {}, 10),
    (Flow, dict(solver='ab2', shift=3.0, compose_shift=True), 12),
    (Flow, dict(solver=['flowdcn-b-2', 'euler'], mean_trick='shrunk'), 50),
]


@pytest.fixture(
    params=CONFIGURATIONS,
    ids=[f'{c.__name__[:4]}{i % 3}' for i, (c, _, _) in enumerate(CONFIGURATIONS)],
)
def case(request):
    return request.param


def sample():
    return rand(4, 3, 8, 8).abs() / 4


def stepped(scheduler, steps, **kwargs):
    "The first step, with all that the common tests hand over."
    x = sample()
    scheduler.set_timesteps(steps)
    if 'generator' in inspect.signature(scheduler.step).parameters:
        kwargs['generator'] = torch.Generator().manual_seed(0)
    return scheduler.step(0.1 * x, scheduler.timesteps[0], x, **kwargs)


def test_from_save_pretrained(case, tmp_path):
    cls, kwargs, steps = case
    scheduler = cls(**kwargs)
    scheduler.save_config(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    expected = stepped(scheduler, steps).prev_sample
    assert torch.equal(stepped(loaded, steps).prev_sample, expected)


def test_compatibles(case, monkeypatch):
    cls, kwargs, _ = case
    monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)  # where it looks for them
    scheduler = cls(**kwargs)
    assert scheduler.compatibles == [cls]
    for other in scheduler.compatibles:
        back = cls.from_config(other.from_config(scheduler.config).config)
        known = {k: v for k, v in back.config.items() if k in scheduler.config}
        added = back.config.keys() - scheduler.config.keys()
        assert known == dict(scheduler.config)
        assert not added & inspect.signature(cls.__init__).parameters.keys()


def test_from_pretrained(case, tmp_path):
    cls, kwargs, _ = case
    scheduler = cls(**kwargs)
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config['_use_default_values']
    assert cls.from_pretrained(tmp_path).config == config


def test_step_shape(case):
    cls, kwargs, steps = case
    scheduler, x = cls(**kwargs), sample()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[:2]:
        assert scheduler.step(0.1 * x, t, x).prev_sample.shape == x.shape


def test_scheduler_outputs_equivalence(case):
    cls, kwargs, steps = case
    scheduler = cls(**kwargs)
    as_dict = stepped(scheduler, steps)
    as_tuple = stepped(scheduler, steps, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict.values())
    for a, b in zip(as_tuple, as_dict.values()):
        assert torch.allclose(a, b, atol=1e-5)


def test_scheduler_public_api(case):
    cls, kwargs, steps = case
    scheduler = cls(**kwargs)
    assert hasattr(scheduler, 'init_noise_sigma') and hasattr(scheduler, 'step')
    assert scheduler.scale_model_input(sample(), 0.0).shape == sample().shape
    scheduler.set_timesteps(steps)
    assert scheduler.order == 1 and len(scheduler.timesteps) == steps


def test_add_noise_device(case):
    cls, kwargs, steps = case
    scheduler, x = cls(**kwargs), sample()
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[5][None]
    noised = scheduler.add_noise(scheduler.scale_model_input(x, 0.0), rand(*x.shape), t)
    assert noised.shape == x.shape and noised.device == x.device
    velocity = scheduler.get_velocity(x, rand(*x.shape), t)
    assert velocity.shape == x.shape and velocity.dtype == x.dtype


def test_deprecated_kwargs(case):
    cls = case[0]
    assert 'kwargs' not in inspect.signature(cls.__init__).parameters
    assert not cls._deprecated_kwargs


@pytest.mark.parametrize('kwargs', [kwargs for cls, kwargs, _ in CONFIGURATIONS if cls is VP])
@pytest.mark.parametrize('kind', [np.array, list, torch.tensor])
def test_trained_betas(kwargs, kind, tmp_path):
    scheduler = VP(**kwargs, trained_betas=kind([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    loaded = VP.from_pretrained(tmp_path)
    assert scheduler.betas.tolist() == loaded.betas.tolist()
    if not loaded.config.rescale_betas_zero_snr:
        assert np.allclose(loaded.betas, [0.1, 0.3])


def test_getattr_is_correct(case, caplog):
    cls, kwargs, _ = case
    scheduler = cls(**kwargs)
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, 'diffusers'):
        warnings.simplefilter('error')
        assert hasattr(scheduler, 'dummy_attribute') and scheduler.dummy_attribute == 5
        assert scheduler.save_pretrained == getattr(scheduler, 'save_pretrained')
    assert not caplog.records
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError) as error:
        scheduler.does_not_exist
    assert str(error.value) == f"'{cls.__name__}' object has no attribute 'does_not_exist'"
