"What stock pipelines ask of a scheduler, read from the installed diffusers, and how ours answer."

import ast
import inspect
import logging
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import F64, VP, X0, Flow, loop, net, rand, relative, scheduler_of

from neuralsolver._conventions import DEMANDS, known_schedule
from neuralsolver._forms import EDMPath, TablePath
from neuralsolver.classical import adams_bashforth
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import get_solver, load_solver
from neuralsolver.paths import DDPMPath, LinearPath
from neuralsolver.solvers import Solver, sample

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
FOLDER = Path(diffusers.__file__).parent / 'pipelines'
# pipelines that sample words, proteins, masks or stages: no state of ours
ELSEWHERE = ('llada2', 'rfd4_proteina', 'amused', 'repaint', 'helios_pyramid', 'gemma', 'karras_ve')


def asked(method):
    "Keywords that the sources of the pipelines hand to a method of a scheduler, with the files."
    found = {}
    for file in FOLDER.rglob('*.py'):
        if any(name in file.name for name in ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == method and ast.unparse(node.func.value).endswith('scheduler'):
                for keyword in node.keywords:
                    found.setdefault(keyword.arg, set()).add(file.name)
    found.pop(None, None)
    return found


def defaults(name):
    "The values that the schedulers of the library have for an argument of `step`."
    values = []
    for cls in vars(diffusers.schedulers).values():
        installed = inspect.isclass(cls) and cls.__module__.startswith('diffusers.schedulers')
        if installed and hasattr(cls, 'step'):
            parameter = inspect.signature(cls.step).parameters.get(name)
            if parameter is not None and parameter.default is not inspect.Parameter.empty:
                values.append(parameter.default)
    return values


VALUES = {  # what pipelines hand over, where it is not a default
    'model_output': X0,
    'timestep': None,
    'sample': X0,
    'generator': torch.Generator(),
    'prev_timestep': 500,
    'pred_original_sample': X0,
    'per_token_timesteps': None,
}


@pytest.mark.parametrize('cls', [Flow, VP])
def test_step_takes_what_stock_pipelines_hand_over(cls):
    keywords = asked('step')
    assert {'generator', 'eta', 'prev_timestep', 'per_token_timesteps'} <= set(keywords)
    for name, files in keywords.items():
        for value in [VALUES[name]] if name in VALUES else defaults(name):
            s = cls()
            s.set_timesteps(6)
            given = dict(model_output=X0, timestep=s.timesteps[0], sample=X0)
            if value is not None:
                given[name] = value
            assert s.step(**given).prev_sample.shape == X0.shape, (name, files)


@pytest.mark.parametrize('cls', [Flow, VP])
def test_set_timesteps_takes_what_stock_pipelines_hand_over(cls):
    values = dict(device='cpu', mu=0.8, num_inference_steps=6, timesteps=None, sigmas=None)
    for name in asked('set_timesteps'):
        s = cls()
        s.set_timesteps(**(dict(num_inference_steps=6) | {name: values[name]}))
        assert len(s.timesteps) == 6
    s.set_timesteps(6, device='cpu', original_inference_steps=50)  # LCM, through `**kwargs`
    assert len(s.timesteps) == 6


@pytest.mark.parametrize('cls', [Flow, VP])
def test_default_arguments_of_every_scheduler_change_nothing(cls):
    plain = loop(cls(), 6)
    for name in ('DDIM', 'DDPM', 'EulerDiscrete', 'FlowMatchEulerDiscrete', 'LCM', 'UnCLIP'):
        parameters = inspect.signature(scheduler_of(name).step).parameters.values()
        given = {
            p.name: p.default
            for p in parameters
            if p.default is not p.empty and p.name != 'return_dict'
        }
        s, x = cls(), X0
        s.set_timesteps(6)
        for t in s.timesteps:
            x = s.step(net(x, t), t, x, **given).prev_sample
        assert torch.equal(x, plain), name


def test_noise_that_was_asked_for_is_refused_in_a_sentence():
    for given in (
        dict(eta=0.5),
        dict(s_churn=40.0),
        dict(s_noise=1.003),
        dict(variance_noise=X0),
        dict(use_clipped_model_output=True),
        dict(never_heard_of=1),
        dict(return_dict=X0),
    ):
        s = Flow()
        s.set_timesteps(6)
        with pytest.raises(ValueError) as error:
            s.step(X0, s.timesteps[0], X0, **given)
        said = str(error.value)
        assert 'pipeline' in said and '\n' not in said and len(said) < 300
        assert s.step_index is None


def test_missing_methods_name_the_demand_of_the_pipeline():
    for name in DEMANDS:
        assert not hasattr(Flow(), name)
        with pytest.raises(AttributeError, match='pipeline'):
            getattr(Flow(), name)


def test_step_returns_the_data_too():
    mixture = GaussianMixture(rand(5, 18, dtype=F64).view(5, 3, 6), 0.1, prediction='velocity')
    s, x = Flow(), rand(4, 3, 6, dtype=F64)
    s.set_timesteps(8)
    for t in s.timesteps:
        time = s.time_of(t.double())
        expected = x + (1 - time) * mixture(x, time)
        x, data = s.step(-mixture(x, time), t, x, return_dict=False)
        torch.testing.assert_close(data, expected, rtol=0, atol=1e-6)


# schedules that pipelines bring along


def recipes():
    from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule as mochi
    from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import logsnr_sigma_schedule

    u = np.linspace(1, 0, 9)[:-1]
    return {
        'flux': (dict(sigmas=np.linspace(1, 1 / 8, 8)), 'even'),
        'qwen': (dict(sigmas=list(u)), 'even'),
        'bria': (dict(sigmas=get_original_sigmas(1000, 8)), 'even'),
        'helios': (dict(sigmas=np.linspace(0.999, 0, 9)[:-1]), 'even'),
        'cogview4': (
            dict(
                timesteps=np.linspace(1000, 1, 8).astype(np.int64).astype(np.float32),
                sigmas=np.linspace(1000, 1, 8).astype(np.int64) / 1000,
            ),
            'even',
        ),
        'ace-step': (dict(sigmas=(3 * u / (1 + 2 * u)).tolist()), 'shifted'),
        'ltx': (dict(timesteps=linear_quadratic_schedule(8) * 1000), 'linear-quadratic'),
        'mochi': (dict(sigmas=np.array(mochi(8, 0.025))), 'linear-quadratic'),
        'stable-audio-3': (dict(sigmas=logsnr_sigma_schedule(8, -6.2, 2.0)), 'log-SNR'),
    }


@pytest.mark.parametrize('name', recipes())
def test_schedules_of_stock_pipelines_say_how_many_steps(name, caplog):
    given, recipe = recipes()[name]
    s = Flow(num_train_timesteps=1) if name == 'ace-step' else Flow()
    with caplog.at_level(logging.WARNING, 'neuralsolver'):
        for _ in range(2):
            s.set_timesteps(**given)
    assert len(s.timesteps) == 8
    assert torch.equal(s._run.solver.nodes, load_solver('sit-xl-2', 8).nodes)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (recipe != 'even') and all(recipe in line for line in said)


def test_schedules_of_users_are_not_taken_for_a_recipe():
    for levels in ([1, 0.9, 0.5, 0.3, 0.1], [1, 0.7, 0.2], [0.9, 0.6, 0.3], [1, 0.5, 0.5, 0.1]):
        assert known_schedule(torch.tensor(levels, dtype=F64)) is None
    assert known_schedule(torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=F64)) == 'even'


# families


def test_inverted_noise_levels_are_the_same_run():
    "Mochi, OmniGen, LongCat: told 1000 t, and the network predicts data minus noise."
    one = scheduler_of('FlowMatchEulerDiscrete', invert_sigmas=True)
    s, plain = Flow.from_config(one.config), Flow()
    expected = loop(plain, 8)
    s.set_timesteps(8)
    x = X0
    torch.testing.assert_close(s.timesteps, 1000 - plain.timesteps)
    torch.testing.assert_close(s.sigmas, 1 - plain.sigmas)
    for t in s.timesteps:
        x = s.step(-net(x, 1000 - t), t, x).prev_sample
    assert relative(x, expected) < 1e-6
    one.set_timesteps(8)
    assert s.sigmas[-1] == one.sigmas[-1] == 1


def test_one_training_timestep():
    "ACE-Step: the network is told sigma itself."
    s, plain = Flow(num_train_timesteps=1), Flow()
    expected = loop(plain, 8)
    assert relative(loop(s, 8, lambda x, t: net(x, 1000 * t)), expected) < 1e-6
    s.set_timesteps(8)
    x = X0
    for t in s.timesteps[2:]:
        x = s.step(net(x, 1000 * t), t, x).prev_sample
    assert s.step_index == 8


def test_tokens_at_the_timestep_or_clean_are_stepped():
    "LTX with conditions: the negative output, and clean tokens that the pipeline puts back."
    s, plain = Flow(), Flow()
    expected = loop(plain, 6)
    s.set_timesteps(6)
    x = X0
    for t in s.timesteps:
        times = t.expand(4, 3).clone()
        times[0] = 0
        x = s.step(-net(x, t), t, x, per_token_timesteps=times).prev_sample
    assert torch.equal(x[1:], expected[1:])
    s.set_timesteps(6)
    with pytest.raises(ValueError, match='per_token_timesteps differ'):
        s.step(X0, s.timesteps[0], X0, per_token_timesteps=torch.full((4, 3), 300.0))


def edm_network(path, unit, kind, centers):
    "A field as a network of EDM's form, and the same as a prediction of the data."
    mixture = GaussianMixture(centers, 0.2, path=path, prediction='data')

    def network(scaled, level):
        size = math.hypot(level, unit)
        x = scaled * size
        t = torch.as_tensor(2 / math.pi * math.atan(level / unit), dtype=F64)
        data = unit * mixture(path.alpha(t) / unit * x, t)
        sign = 1 if kind == 'epsilon' else -1
        return (data - (unit / size) ** 2 * x) * size / (sign * level * unit)

    return mixture, network


EDM = {  # config, and what the network is told; the second class needs torchsde
    'cosmos': (
        dict(sigma_data=0.5, sigma_max=80.0, sigma_min=0.002, prediction_type='epsilon'),
        lambda level: math.log(level) / 4,
    ),
    'stable-audio': (
        dict(
            sigma_data=1.0,
            sigma_max=500.0,
            sigma_min=0.3,
            prediction_type='v_prediction',
            _class_name='CosineDPMSolverMultistepScheduler',
        ),
        lambda level: math.atan(level) / math.pi * 2,
    ),
    'stable-video': (
        dict(
            sigma_max=700.0,
            sigma_min=0.002,
            prediction_type='v_prediction',
            timestep_type='continuous',
            beta_start=0.00085,
        ),
        lambda level: math.log(level) / 4,
    ),
}


@pytest.mark.parametrize('guided', [False, True])
@pytest.mark.parametrize('name', EDM)
def test_edm_pipelines_do_what_sample_does(name, guided):
    "Also with Cosmos's second call in every step, for the data of both branches."
    config, told = EDM[name]
    unit, largest = config.get('sigma_data', 1.0), config['sigma_max']
    s = VP.from_config(config)
    mixture, network = edm_network(
        s.path, unit, config['prediction_type'], rand(4, 6, seed=9, dtype=F64).view(4, 2, 3) / 2
    )
    assert isinstance(s.path, EDMPath) and s.init_noise_sigma == largest
    noise = rand(5, 2, 3, dtype=F64)
    s.set_timesteps(8)
    solver = s.solver_for(8)
    x = largest * noise
    for i, t in enumerate(s.timesteps):
        level = unit * (-solver.path.log_snr(solver.nodes[i])).exp().item()
        if i:  # the first state is the pipeline's noise, whatever its size
            assert math.isclose(s.sigmas[i].item(), level, rel_tol=1e-6)
            assert math.isclose(t.item(), told(level), rel_tol=1e-5, abs_tol=1e-6)
        level = min(level, largest)
        out = network(s.scale_model_input(x, t), level)
        if guided:
            data = s.step(torch.cat([out, out]), t, torch.cat([x, x]), return_dict=False)[1]
            s._step_index -= 1
            data = data.chunk(2)[0]
            x = s.step(data, t, x, return_dict=False, pred_original_sample=data)[0]
        else:
            x = s.step(out, t, x, return_dict=False)[0]
    expected = sample(mixture, noise * solver.path.sigma(solver.nodes[0]), solver)
    assert relative(x, unit / solver.path.alpha(solver.nodes[-1]) * expected) < 1e-3


def test_cosmos_2_counts_as_edm_on_a_flow_model():
    "Its constructor writes sigma_data into the config of whatever scheduler it is given."
    s = Flow()
    s.register_to_config(
        sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type='sigma_min'
    )
    mixture = GaussianMixture(rand(5, 6, dtype=F64).view(5, 2, 3), 0.1, prediction='velocity')
    noise = rand(4, 2, 3, seed=2, dtype=F64)
    s.set_timesteps(sigmas=torch.linspace(0, 1, 8, dtype=F64))
    s.sigmas[-1] = s.sigmas[-2]
    x = 80 * noise
    for i, t in enumerate(s.timesteps):
        level = s.sigmas[i].double()
        time = 1 / (1 + level)
        state = x * time
        data = state + (1 - time) * mixture(state, time)
        x = s.step((x - data) / level, t, x, return_dict=False)[0]
    expected = sample(mixture, noise, load_solver('sit-xl-2', 8))
    assert relative(x, expected) < 2e-2


@pytest.mark.parametrize(
    'name, given',
    [
        ('DDIM', dict(trained_betas=np.linspace(1e-4, 0.02, 500))),
        ('CogVideoXDDIM', dict(rescale_betas_zero_snr=False, snr_shift_scale=3.0)),
        ('CogVideoXDDIM', {}),
        ('HeunDiscrete', dict(beta_schedule='exp', num_train_timesteps=1024)),
        ('DDIM', dict(beta_start=1e-4, beta_end=0.03)),
    ],
)
def test_table_is_that_of_the_pipeline(name, given):
    own = scheduler_of(name, **given)
    s = VP.from_config(own.config, solver=['dit-xl-2'], carry='time')
    ours, theirs = s.alphas_cumprod, own.alphas_cumprod.float()
    assert len(s) == len(theirs)
    zero = own.config.get('rescale_betas_zero_snr')
    torch.testing.assert_close(
        ours[: -1 if zero else None], theirs[: -1 if zero else None], rtol=2e-4, atol=1e-7
    )
    torch.testing.assert_close((1 - s.betas).cumprod(0), ours, rtol=2e-4, atol=1e-7)
    s.set_timesteps(6)
    assert s.timesteps[0] < len(s) and torch.isfinite(loop(s, 6)).all()


def test_solver_on_a_table_of_its_own_is_saved(tmp_path):
    s = VP(trained_betas=np.linspace(1e-4, 0.02, 1000))
    solver = s.solver_for(6)
    assert isinstance(solver.path, TablePath)
    again = Solver.from_dict(solver.to_dict())
    assert again.path == solver.path and again.digest == solver.digest
    assert len(repr(solver.path)) < 100
    s.save_pretrained(tmp_path)
    assert torch.equal(VP.from_pretrained(tmp_path).betas, s.betas)
    assert relative(loop(s, 6), loop(VP(), 6)) < 1e-4


def test_trained_betas_of_two_entries_are_kept(tmp_path):
    "A case of the library's own tests; the refusal comes with the number of steps."
    s = VP(trained_betas=np.array([0.1, 0.3]))
    np.testing.assert_allclose(s.betas, [0.1, 0.3], rtol=1e-6)
    with pytest.raises(ValueError, match='beyond the ends'):
        s.set_timesteps(5)


def test_thresholding_is_that_of_ddpm():
    "Imagen's dynamic thresholding, and learned variances that DDPM drops by itself (IF)."
    given = dict(thresholding=True, sample_max_value=1.5, variance_type='learned_range')
    own = scheduler_of('DDPM', **given)
    s = VP.from_config(own.config)
    s.set_timesteps(6)
    x = 3 * rand(2, 3, 8, 8)
    out = rand(2, 6, 8, 8, seed=1)
    _, data = s.step(out, s.timesteps[0], x, return_dict=False)
    alpha, sigma = s._signal_and_noise(s.solver_for(6).nodes[0])
    expected = own._threshold_sample((x - sigma * out[:, :3]) / alpha)
    torch.testing.assert_close(data, expected.float(), rtol=1e-4, atol=1e-4)
    for t in s.timesteps[1:]:
        x = s.step(out, t, x).prev_sample
    assert torch.isfinite(x).all()


def test_strength_of_latent_consistency_starts_in_the_table():
    s = VP()
    s.set_timesteps(8, original_inference_steps=50, strength=0.5)
    assert len(s.timesteps) == 4 and s.begin_index == 4
    x = X0
    for t in s.timesteps:
        x, data = s.step(net(x, t), t, x, return_dict=False)
    assert s.step_index == 8


def test_whole_timesteps_index_a_table():
    s = VP(integer_timesteps=True)
    s.set_timesteps(8)
    assert s.timesteps.dtype == torch.int64
    assert torch.equal(s.timesteps, s.timestep_of(s.solver_for(8).nodes[:-1]).round().long())
    assert s.alphas_cumprod[s.timesteps].shape == (8,)


@pytest.mark.parametrize('name', ['DDIM', 'DDPM'])
def test_velocity_for_training_is_that_of_diffusers(name):
    own = scheduler_of(name)
    data, noise = rand(3, 2, 4), rand(3, 2, 4, seed=1)
    timesteps = torch.tensor([0, 500, 999])
    ours = VP.from_config(own.config).get_velocity(data, noise, timesteps)
    torch.testing.assert_close(ours, own.get_velocity(data, noise, timesteps), rtol=1e-4, atol=1e-4)
    assert torch.equal(Flow().get_velocity(data, noise, timesteps), noise - data)


def test_no_noise_is_left_with_a_solver_that_ends_at_0():
    path = DDPMPath()
    mixture = GaussianMixture(torch.zeros(1, 4, dtype=F64), 1e-9, path=path, prediction='noise')
    x = {}
    for name, solver in dict(
        named='dpm-solver++2m', clean=dpm_solver_pp(8, path=path, t_start=0.999, t_end=0.0)
    ).items():
        s = VP(solver=solver)
        x[name] = loop(s, 8, lambda x, t: mixture(x, s.time_of(t.double())), rand(9, 4, dtype=F64))
    assert x['clean'].abs().max() < 1e-6 < 1e-3 < x['named'].abs().max() < 0.1


def test_edm_path_and_classical_rules_reach_its_ends():
    path = EDMPath(160.0)
    solver = get_solver('dpm-solver++2m', 6, path)
    level = (-path.log_snr(solver.nodes)).exp()
    assert abs(level[0] - 160) < 1e-6 and abs(level[-1] - 2e-3) < 1e-9
    t = torch.linspace(0.01, 0.99, 9, dtype=F64, requires_grad=True)
    for value, rate in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        torch.testing.assert_close(torch.autograd.grad(value(t).sum(), t)[0], rate(t))
    assert LinearPath() != path and adams_bashforth(4, 2).path == LinearPath()
