"What our schedulers refuse: the error names the argument and says what to do, in one line."

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import STABLE_DIFFUSION, VP, X0, Flow, field_of, free_solver, images
from tiny_pipelines import loop, noise_for, scheduler_of, shared, using

from neuralsolver.classical import euler, rk4
from neuralsolver._pipeline_field import DiffusersField
from neuralsolver.diffusers import compose_shift
from neuralsolver.neural import load_solver
from neuralsolver.paths import VPPath
from neuralsolver.solvers import Solver, sample

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
NOT_A_SOLVER = {k: v for k, v in euler(4).to_dict().items() if k != 'nodes'}
BROKEN = euler(4).to_dict()
BROKEN['weights'][0] = [0.5]
FLOW_TO_VP = ('VPNeuralSolverScheduler', 'change_path')
VP_TO_FLOW = ('FlowNeuralSolverScheduler', 'change_path')

SOLVERS = [  # class, solver, what the error says
    (Flow, 'dit-xl-2', ('dit-xl-2', *FLOW_TO_VP)),
    (Flow, load_solver('dit-xl-2', 5), FLOW_TO_VP),
    (VP, 'sit-xl-2', ('sit-xl-2', *VP_TO_FLOW)),
    (VP, ['dit-xl-2', euler(4)], ('euler', *VP_TO_FLOW)),
    (Flow, 'sit-xl', ("solver='sit-xl'", 'sit-xl-2', 'euler')),
    (VP, 'euler', ("solver='euler'", 'dit-xl-2', 'ddim')),
    (VP, 'ddim@cosine', ("spacing='cosine'",)),
    (Flow, ['sit-xl-2', 'none'], ("solver='none'",)),
    (Flow, [], ('solver=[]',)),
    (Flow, 8, ('solver=8',)),
    (VP, None, ('solver=None',)),
    (Flow, 'nowhere.json', ('nowhere.json',)),
    (Flow, NOT_A_SOLVER, ('not a solver', 'nodes')),
    (VP, {}, ('not a solver',)),
    (Flow, BROKEN, ('must sum to the span',)),
]

ARGUMENTS = [  # class, arguments, what the error says
    (Flow, dict(prediction_type='epsilon'), ("prediction_type='epsilon'", FLOW_TO_VP[0])),
    (VP, dict(prediction_type='flow_prediction'), ("'flow_prediction'", VP_TO_FLOW[0])),
    (VP, dict(prediction_type='score'), ("prediction_type='score'", 'epsilon, sample')),
    (VP, dict(beta_schedule='sigmoid'), ("beta_schedule='sigmoid'", 'squaredcos_cap_v2')),
    (VP, dict(trained_betas=[0.1, 0.2, -0.1]), ('log_alphas must fall',)),
    (VP, dict(thresholding='yes'), ("thresholding='yes'",)),
    (VP, dict(sigma_data=0.5), ('sigma_max=None',)),
    (VP, dict(sigma_data=0.5, sigma_max=80.0, prediction_type='sample'), ('of EDM', 'epsilon')),
    (Flow, dict(num_train_timesteps=0), ('num_train_timesteps=0',)),
    (VP, dict(continuous=True, beta_schedule='scaled_linear'), ('continuous=True', 'linear')),
    (VP, dict(num_train_timesteps=1), ('num_train_timesteps=1',)),
    (VP, dict(beta_start=0.5, beta_end=0.1), ('beta_start=0.5',)),
    (VP, dict(continuous=True, beta_start=0.02, beta_end=1e-4), ('beta_start=0.02',)),
    (VP, dict(carry='equal'), ("carry='equal'", 'log-snr, time')),
    (VP, STABLE_DIFFUSION, ('dit-xl-2', "carry='time'")),
    (Flow, dict(mean_trick='mean'), ("mean_trick='mean'", 'shrunk, average')),
    (Flow, dict(shift=-3.0), ('shift=-3.0',)),
    (Flow, dict(shift=0, compose_shift=True), ('shift=0',)),
    (Flow, dict(time_shift_type='log'), ("time_shift_type='log'", 'exponential, linear')),
    (Flow, dict(solver=free_solver(), compose_shift=True), ("'free' cannot be shifted",)),
    (VP, dict(solver=free_solver(VPPath()), carry='time'), ("'free' cannot be shifted",)),
    (Flow, dict(solver=free_solver(), mean_trick='average'), ('mean_trick needs rows',)),
]


def refused(call, said):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    missing = [words for words in said if words not in message]
    assert not missing and '\n' not in message, message


@pytest.mark.parametrize('cls, solver, said', SOLVERS)
def test_refused_solver_is_named(cls, solver, said):
    refused(lambda: cls(solver=solver), said)


@pytest.mark.parametrize('cls, arguments, said', ARGUMENTS)
def test_refused_argument_is_named(cls, arguments, said):
    refused(lambda: cls(**arguments), said)


def test_refused_config_is_named():
    flow, ddim = scheduler_of('FlowMatchEulerDiscrete').config, scheduler_of('DDIM').config
    noisy = scheduler_of('FlowMatchEulerDiscrete', stochastic_sampling=True).config
    told = scheduler_of('EulerDiscrete', timestep_type='continuous').config
    for cls, config, arguments, said in (
        (VP, flow, {}, ('flow model', 'use FlowNeuralSolverScheduler')),
        (Flow, ddim, {}, ('DDPM model', 'use VPNeuralSolverScheduler')),
        (VP, Flow().config, {}, ('use FlowNeuralSolverScheduler',)),
        (Flow, VP().config, {}, ('use VPNeuralSolverScheduler',)),
        (Flow, flow, dict(solvers='euler'), ('no argument solvers. Allowed: ', 'solver')),
        (VP, ddim, dict(shift=3.0), ('no argument shift',)),
        (Flow, noisy, {}, ('stochastic_sampling=True',)),
        (VP, told, {}, ("timestep_type='continuous'", 'v_prediction')),
        (Flow, scheduler_of('CMStochasticIterative').config, {}, ('config',)),
        (VP, scheduler_of('DDPM', beta_schedule='sigmoid').config, {}, ('beta_schedule=',)),
    ):
        refused(lambda: cls.from_config(config, **arguments), said)


def test_refused_number_of_steps_lists_the_tables():
    several = Flow(solver=['sit-xl-2', 'flowdcn-b-2', rk4(1)])
    for scheduler, n, said in (
        (Flow(), 12, ('num_inference_steps=12', 'tables for 5, 6, 7, 8, 9, 10 steps')),
        (several, 12, ('4, 5, 6, 7, 8, 9, 10, 15 steps',)),
        (VP(), 50, ('num_inference_steps=50', 'tables for 5, 6, 7, 8, 9, 10 steps')),
        (Flow(), 8.0, ('num_inference_steps=8.0',)),
        (Flow(solver='euler'), 0, ('num_inference_steps=0',)),
        (Flow(), None, ('num_inference_steps=None',)),
        (Flow(solver='rk4'), 6, ("solver='rk4' spends 24 evaluations",)),
        (Flow(solver='heun'), 6, ('spends 12 evaluations on num_inference_steps=6', 'heun-nfe')),
        (Flow(solver='midpoint'), 6, ('spends 12 evaluations',)),
    ):
        refused(lambda: scheduler.set_timesteps(n), said)


def test_refused_schedule_is_named():
    for cls, given, said in (
        (Flow, dict(sigmas=[1.0, 0.9, 0.5, 0.3, 0.1]), ('sigmas from 1 to 0.1 (5', 'pipeline')),
        (VP, dict(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2]), ('sigmas from 1', 'refused')),
        (Flow, dict(num_inference_steps=6, sigmas=1 - np.arange(5) / 5), ('5 sigmas', '=6')),
        (Flow, dict(timesteps=[999, 500, 100]), ('timesteps from 999 to 100', 'refused')),
        (VP, dict(timesteps=torch.tensor([999, 300, 100])), ('timesteps from 999', 'refused')),
        (Flow, dict(sigmas='none'), ("sigmas='none'",)),
        (Flow, dict(num_inference_steps=6, start_time=0.2), ('start_time=0.2', 'pipeline')),
        (Flow, dict(num_inference_steps=6, jump_length=10), ('jump_length=10', 'pipeline')),
    ):
        refused(lambda: cls().set_timesteps(**given), said)
    refused(lambda: Flow('ab2').set_timesteps(sigmas=[1.2, 0.5]), ('noise levels from 1 to 0',))
    refused(lambda: VP('ddim').set_timesteps(sigmas=[1e9, 0.5]), ('noise levels from',))
    refused(lambda: VP('ddim').set_timesteps(sigmas=[1.0, 1e-9]), ('noise levels from',))
    dynamic = Flow(compose_shift=True, use_dynamic_shifting=True)
    refused(lambda: dynamic.set_timesteps(6), ('mu=None', 'compose_shift'))


def stepped(cls, steps=1, timestep=None, out=X0, begin=None):
    "A run of 6 steps that goes wrong."
    s = cls()
    s.set_timesteps(6)
    if begin is not None:
        s.set_begin_index(begin)
    for t in (s.timesteps.tolist() * 2)[:steps]:
        s.step(out, t if timestep is None else timestep, X0)


def test_refused_step_says_why():
    wide = torch.cat([X0, X0], 1)
    refused(lambda: Flow().step(X0, 999.0, X0), ('set_timesteps', 'before step'))
    refused(lambda: Flow().set_begin_index(-1), ('begin_index=-1',))
    refused(lambda: Flow().scale_noise(X0, torch.tensor([500.0])), ('noise=None',))
    for cls, given, said in (
        (Flow, dict(steps=7), ('all 6 steps are done', 'set_timesteps')),
        (VP, dict(steps=7), ('all 6 steps are done', 'set_timesteps')),
        (Flow, dict(begin=6), ('begin_index=6 leaves none of the 6 steps',)),
        (Flow, dict(begin=7), ('begin_index=7', 'from 0 to 5')),
        (Flow, dict(begin=-1), ('begin_index=-1',)),
        (Flow, dict(timestep=970.0), ('timestep=970 is not on the schedule [1000.0',)),
        (VP, dict(timestep=4), ('timestep=4 is not on the schedule',)),
        (VP, dict(out=wide), ('model_output [4, 6, 6]', '[4, 3, 6]', 'learned variances')),
    ):
        refused(lambda: stepped(cls, **given), said)
    flat = Flow(mean_trick='average')
    refused(lambda: loop(flat, 8, x=X0[:, 0]), ('states [B, tokens, C]', '[4, 6]'))


def test_refused_shift_is_named():
    for solver, shift, said in (
        (euler(4), -1.0, ('shift=-1.0',)),
        (rk4(2), 3.0, ("'rk4' cannot be shifted",)),
        (free_solver(), 3.0, ("'free' cannot be shifted", 'gains and row sums')),
        (load_solver('dit-xl-2', 5), 3.0, ('cannot be shifted', 'linear path')),
    ):
        refused(lambda: compose_shift(solver, shift), said)


def test_refused_field_says_why():
    vae, own = shared('sd3').vae, shared('sd3').scheduler
    rows = dict(a=X0, b=X0[:2])
    for scheduler, given, said in (
        (own, {}, ('FlowMatch', 'from_config')),
        (Flow(), dict(conditions=rows), ('[2, 4] rows',)),
        (Flow(), dict(conditions=dict(a=X0), guidance_scale=2.0), ('negative', 'a')),
        (Flow(), dict(conditions=dict(a=X0), guidance_scale=-1.0), ('guidance_scale=-1',)),
    ):
        refused(lambda: DiffusersField(vae, scheduler, **given), said)
    field, noise = field_of('sd3'), noise_for('sd3')
    refused(lambda: sample(field, noise, load_solver('dit-xl-2', 5)), ('VPPath', 'change_path'))
    refused(lambda: field(noise, torch.tensor(0.5)), ('2 rows: give cond',))


def test_refusal_reaches_the_user_of_a_pipeline():
    for name, given, said in (
        ('sd3', dict(n=28), 'num_inference_steps=28 has no table'),
        ('sd3', dict(sigmas=[1.0, 0.7, 0.2]), 'refused'),
        ('pixart', dict(timesteps=[900, 500, 100]), 'timesteps from 900'),
        ('flux', dict(n=5, sigmas=[1.0, 0.9, 0.5, 0.3, 0.1]), 'refused'),
    ):
        with using(name) as pipe:
            refused(lambda: images(pipe, name, **given), (said,))


def test_refused_number_of_steps_leaves_the_scheduler_usable():
    for s in (Flow(), VP()):
        expected = loop(s, 8)
        with pytest.raises(ValueError):
            s.set_timesteps(11)
        assert torch.equal(loop(s, 8), expected)
        assert isinstance(s.solver_for(8), Solver)


@pytest.mark.parametrize(
    'name, demand',
    [
        ('CMStochasticIterative', 'jumps to the data from any noise level'),
        ('DDPMWuerstchen', 'ratio of a noise schedule'),
        ('Piflow', 'integrates a policy'),
        ('BlockRefinement', 'samples words'),
        ('EntropyBound', 'samples words'),
        ('DiscreteDDIM', 'samples words'),
        ('KarrasVe', 'adds noise in every step'),
        ('ScoreSdeVe', 'predicts and corrects'),
        ('SCM', 'distilled on the arc of TrigFlow'),
        ('HeliosDMD', 'stages of growing resolution'),
        ('FlowMapEulerDiscrete', 'where a step ends'),
    ],
)
@pytest.mark.parametrize('cls', [Flow, VP])
def test_pipelines_that_no_table_can_serve_are_told_why(cls, name, demand, tmp_path):
    theirs = getattr(diffusers, f'{name}Scheduler')()
    theirs.save_pretrained(tmp_path)
    loaded = type(theirs).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'the pipeline of this config .*{demand}'):
        cls.from_config(loaded.config)


WRONG = {
    'numpy output': lambda s, x, t: s.step(x.numpy(), t, x),
    'no output': lambda s, x, t: s.step(None, t, x),
    'whole numbers': lambda s, x, t: s.step(x.long(), t, x),
    'whole state': lambda s, x, t: s.step(x, t, x.long()),
    'complex output': lambda s, x, t: s.step(x.to(torch.complex64), t, x),
    'text as time': lambda s, x, t: s.step(x, 'first', x),
    'no number as time': lambda s, x, t: s.step(x, float('nan'), x),
    'steps in a list': lambda s, x, t: s.set_timesteps([5]),
    'steps without bound': lambda s, x, t: s.set_timesteps(10**9),
    'levels without bound': lambda s, x, t: s.set_timesteps(sigmas=np.linspace(1, 1e-3, 10**5)),
    'text as strength': lambda s, x, t: s.set_timesteps(5, strength='all'),
    'strength above 1': lambda s, x, t: s.set_timesteps(5, strength=2),
    'training beyond the noise': lambda s, x, t: s.add_noise(x, x, torch.tensor([10**6, 3])),
    'training before the data': lambda s, x, t: s.get_velocity(x, x, torch.tensor([-50, 3])),
    'training at no time': lambda s, x, t: s.add_noise(x, x, torch.tensor([float('nan')])),
    'three times for two': lambda s, x, t: s.add_noise(x, x, torch.tensor([1, 2, 3])),
    'networks without bound': lambda s, x, t: type(s)(num_train_timesteps=10**9),
}


@pytest.mark.parametrize('case', WRONG)
@pytest.mark.parametrize('cls, rule', [(Flow, 'euler'), (VP, 'ddim')])
def test_wrong_input_ends_in_one_line(cls, rule, case):
    s, x = cls(rule), torch.randn(2, 3)
    s.set_timesteps(4)
    with pytest.raises(ValueError, match='.') as error:
        WRONG[case](s, x, s.timesteps[0])
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


@pytest.mark.parametrize('mu', ['large', float('nan'), 1e9, [1.0]])
def test_wrong_shift_of_a_pipeline_is_named(mu):
    with pytest.raises(ValueError, match='mu=.* is not allowed'):
        Flow(compose_shift=True, use_dynamic_shifting=True).set_timesteps(5, mu=mu)


@pytest.mark.parametrize(
    'betas', ['abc', [[0.1, 0.2]], 0.1, [], [0.1], [0.1, float('nan')], [0.1, 2]]
)
def test_wrong_betas_are_named(betas):
    with pytest.raises(ValueError, match='beta'):
        VP(trained_betas=betas)
