"The sampler of k-diffusion's signature and the nodes of ComfyUI."

import importlib
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from neuralsolver import comfyui
from neuralsolver.classical import rk4
from neuralsolver.fields import GaussianMixture
from neuralsolver.k_diffusion import neural_sigmas, path_of_model, sample_neural, solver_on
from neuralsolver.neural import get_solver, list_solvers, load_solver
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.solvers import sample, save_solver
from neuralsolver.utils import data_file, import_torchvision

F64 = torch.float64
SOLVERS = [(name, n) for name, steps in list_solvers().items() for n in {steps[0], steps[-1]}]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def denoiser(field):
    "An exact field as a model of k-diffusion, and the noise levels it was asked at."
    path, levels = field.path, []
    const = path.coordinates == 'velocity'

    def model(x, sigma, **more):
        assert sigma.shape == (len(x),)
        level = sigma[0].double()
        levels.append(level.item())
        t = 1 - level if const else path.time_of_log_snr(-level.log())
        return field.on(path, 'data')(x if const else path.alpha(t) * x, t)

    return model, levels


def mixture(path):
    return GaussianMixture(rand(6, 3, 4, seed=5), 0.2, path=path)


@pytest.mark.parametrize('name, steps', SOLVERS)
def test_fidelity_of_every_table_to_sample(name, steps):
    solver = load_solver(name, steps)
    model, levels = denoiser(mixture(solver.path))
    sigmas = neural_sigmas(name, steps).double()
    noise = rand(5, 3, 4, seed=1)
    result = sample_neural(model, sigmas[0] * noise, sigmas, disable=True, solver=name)
    start = solver.path.sigma(solver.nodes[0]) * noise
    expected = sample(mixture(solver.path), start, solver)
    if not isinstance(solver.path, LinearPath):
        expected = expected / solver.path.alpha(solver.nodes[-1])
    assert len(levels) == steps and len(sigmas) == steps + 1
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fidelity_in_float32_and_half():
    solver = load_solver('sit-xl-2', 6)
    noise = rand(5, 3, 4, seed=1)
    expected = sample(mixture(solver.path), noise, solver)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        field = mixture(solver.path)

        def model(x, sigma):
            return denoiser(field)[0](x.double(), sigma.double()).to(x.dtype)

        sigmas = neural_sigmas(solver)
        x = sample_neural(model, noise.to(dtype), sigmas, disable=True, solver=solver)
        assert x.dtype == dtype
        assert (x.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_callback_and_arguments_of_the_model():
    solver, seen, given = load_solver('flowdcn-b-2', 5), [], []
    model, _ = denoiser(mixture(solver.path))

    def listening(x, sigma, **more):
        given.append(more)
        return model(x, sigma)

    sigmas = neural_sigmas(solver)
    more = dict(cond=1)
    sample_neural(listening, rand(2, 3, 4), sigmas, more, seen.append, True, solver)
    assert given == [more] * 5 and [s['i'] for s in seen] == list(range(5))
    assert all({'x', 'i', 'sigma', 'sigma_hat', 'denoised'} == s.keys() for s in seen)
    assert [s['sigma'] for s in seen] == list(sigmas[:-1])


def test_part_of_the_sigmas_is_a_part_of_the_run():
    solver = load_solver('sit-xl-2', 8)
    model, levels = denoiser(mixture(solver.path))
    sigmas, noise = neural_sigmas(solver).double(), rand(4, 3, 4)
    first = sample_neural(model, noise, sigmas[:4], disable=True, solver=solver)
    states = sample(mixture(solver.path), noise, solver, trajectory=True)
    assert (first - states[3]).abs().max() < 1e-5
    rest = sample_neural(model, first, sigmas[3:], disable=True, solver=solver)
    assert len(levels) == 8 and torch.isfinite(rest).all()


def test_wrong_sigmas_are_refused_before_the_first_call():
    def model(*args):
        raise AssertionError('called')

    solver = load_solver('sit-xl-2', 8)
    for sigmas in (torch.linspace(1, 0, 9), neural_sigmas('sit-xl-2', 7), torch.ones(1)):
        with pytest.raises(ValueError, match='neural_sigmas'):
            sample_neural(model, rand(1, 2), sigmas, solver=solver)
    with pytest.raises(ValueError, match='only solvers of flow models are shifted'):
        neural_sigmas('dit-xl-2', 5, shift=3.0)
    with pytest.raises(ValueError, match='spends 16 evaluations'):
        sample_neural(model, rand(1, 2), torch.linspace(1, 0, 5), solver='rk4')


class CONST:
    "As in ComfyUI."


def comfy_model(const, field):
    "A guider around a model with `model_sampling`, nested as ComfyUI nests them."
    if const:
        sampling = CONST()
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
        squares = (1 - betas).cumprod(0)
        sampling = SimpleNamespace(sigmas=((1 - squares) / squares).sqrt())

    class Wrapped:
        inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))

        def __call__(self, x, sigma, **more):
            return denoiser(field)[0](x.double(), sigma)

        def get_model_object(self, name):
            return sampling

    return Wrapped(), sampling


def test_solver_comes_to_the_table_of_a_stable_diffusion_model():
    table = DDPMPath('scaled-linear', 0.00085, 0.012)
    model, _ = comfy_model(False, mixture(table))
    solver = solver_on(load_solver('dit-xl-2', 8), path_of_model(model))
    t = torch.rand(50, dtype=F64)
    torch.testing.assert_close(solver.path.log_snr(t), table.log_snr(t), rtol=0, atol=1e-9)
    sigmas = neural_sigmas('dit-xl-2', 8, model=model).double()
    assert 14 < sigmas[0] < 14.7
    noise = rand(3, 3, 4)
    x = sample_neural(model, sigmas[0] * noise, sigmas, disable=True, solver='dit-xl-2')
    start = solver.path.alpha(solver.nodes[0]) * sigmas[0] * noise
    field = GaussianMixture(rand(6, 3, 4, seed=5), 0.2, path=solver.path)
    expected = sample(field, start, solver) / solver.path.alpha(solver.nodes[-1])
    assert (x - expected).abs().max() < 1e-5 * expected.abs().max()


def test_vp_solver_runs_on_a_flow_model():
    model, _ = comfy_model(True, mixture(LinearPath()))
    sigmas = neural_sigmas('dit-xl-2', 8, model=model)
    assert 0.99 < sigmas[0] < 1
    x = sample_neural(model, rand(3, 3, 4), sigmas.double(), disable=True, solver='dit-xl-2')
    fine = sample(mixture(LinearPath()), rand(3, 3, 4), rk4(100))
    assert (x - fine).abs().mean() < 0.1 * fine.abs().mean()


@pytest.mark.parametrize('name', ['ab2', 'euler', 'dpm-solver++2m', 'ddim'])
def test_classical_rules_take_any_sigmas(name):
    flow = name in ('ab2', 'euler')
    sigmas = torch.tensor([1, 0.9, 0.6, 0.2, 0] if flow else [80, 20, 5, 1, 0.05], dtype=F64)
    field = mixture(LinearPath() if flow else VPPath())
    model, levels = denoiser(field)
    x = sample_neural(model, sigmas[0] * rand(2, 3, 4), sigmas, disable=True, solver=name)
    assert torch.isfinite(x).all()
    torch.testing.assert_close(torch.tensor(levels, dtype=F64), sigmas[:-1])


def test_fidelity_to_k_diffusion_itself():
    "With the real package, where it is installed."
    import_torchvision()  # which the package imports
    k = pytest.importorskip('k_diffusion.sampling')
    model, _ = denoiser(mixture(VPPath()))
    sigmas = torch.tensor([80, 20, 5, 1, 0.3, 0], dtype=F64)
    x = 80 * rand(4, 3, 4)
    for ours, theirs in (('dpm-solver++2m', k.sample_dpmpp_2m), ('ddim', k.sample_euler)):
        a = sample_neural(model, x, sigmas, disable=True, solver=ours)
        b = theirs(model, x, sigmas, disable=True)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    flow = denoiser(mixture(LinearPath()))[0]
    grid = torch.linspace(1, 0, 6, dtype=F64)
    a = sample_neural(flow, rand(4, 3, 4), grid, disable=True, solver='euler')
    torch.testing.assert_close(a, k.sample_euler(flow, rand(4, 3, 4), grid, disable=True))


# nodes


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    "ComfyUI's published interface, as far as the nodes use it."
    root, samplers, folders = ModuleType('comfy'), ModuleType('comfy.samplers'), ModuleType('f')

    class KSamplerX0Inpaint:
        def __init__(self, model, sigmas):
            self.inner_model = model
            self.sigmas = sigmas  # of the run, not of the model

        def __call__(self, x, sigma, denoise_mask, model_options={}, seed=None):
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)

    class KSAMPLER:
        def __init__(self, sampler_function, extra_options={}, inpaint_options={}):
            self.sampler_function = sampler_function
            self.extra_options = extra_options

        def sample(self, model_wrap, sigmas, extra_args, callback, noise):
            def told(at):
                callback(at['i'], at['denoised'], at['x'], len(sigmas) - 1)

            extra_args['denoise_mask'] = None
            return self.sampler_function(
                KSamplerX0Inpaint(model_wrap, sigmas),
                sigmas[0] * noise,
                sigmas,
                extra_args=extra_args,
                callback=told,
                disable=True,
                **self.extra_options,
            )

    samplers.KSAMPLER = KSAMPLER
    root.samplers = samplers
    folders.get_input_directory = lambda: str(tmp_path)
    for name, module in (('comfy', root), ('comfy.samplers', samplers), ('folder_paths', folders)):
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path


def test_nodes_have_the_published_interface(comfy):
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for cls in comfyui.NODE_CLASS_MAPPINGS.values():
        required = cls.INPUT_TYPES()['required']
        assert isinstance(cls.RETURN_TYPES, tuple) and isinstance(cls.CATEGORY, str)
        assert callable(getattr(cls, cls.FUNCTION))
        names, _ = required['solver']
        assert names[: len(SOLVERS)] and all(isinstance(n, str) for n in names)
        counts = {name: steps for name, steps in list_solvers().items()}
        assert {n.rpartition(', ')[0] for n in names} == set(counts)
    json.dumps([cls.INPUT_TYPES() for cls in comfyui.NODE_CLASS_MAPPINGS.values()])  # /object_info


@pytest.mark.parametrize('denoise, steps', [(1.0, 8), (0.5, 4), (0.0, 0)])
def test_nodes_make_what_sample_makes(comfy, denoise, steps):
    field = mixture(LinearPath())
    model, _ = comfy_model(True, field)
    (sampler,) = comfyui.NeuralSolverSampler().get_sampler('sit-xl-2, 8 steps')
    (sigmas,) = comfyui.NeuralSolverSigmas().get_sigmas(model, 'sit-xl-2, 8 steps', denoise=denoise)
    assert len(sigmas) == (steps + 1 if steps else 0)
    if denoise == 1:
        seen = []
        noise = rand(3, 3, 4)
        x = sampler.sample(model, sigmas.double(), {}, lambda *a: seen.append(a[0]), noise)
        expected = sample(field, noise, load_solver('sit-xl-2', 8))
        assert (x - expected).abs().max() < 1e-5 and seen == list(range(8))


def test_file_of_the_input_folder_is_chosen(comfy):
    solver = get_solver('ab3', 7)
    save_solver(solver, comfy / 'mine.json')
    (comfy.parent / 'outside.json').write_text((comfy / 'mine.json').read_text())
    assert 'mine.json' in comfyui.solver_names()
    assert comfyui.chosen_solver('mine.json').digest == solver.digest
    for name in ('../outside.json', '/etc/passwd', 'sit-xl-2, 12 steps', 'none.json'):
        with pytest.raises(ValueError, match='not in the list'):
            comfyui.chosen_solver(name)


def test_shift_of_both_nodes_must_agree(comfy):
    model, _ = comfy_model(True, mixture(LinearPath()))
    name = 'sit-xl-2, 6 steps'
    (sampler,) = comfyui.NeuralSolverSampler().get_sampler(name, 3.0)
    (sigmas,) = comfyui.NeuralSolverSigmas().get_sigmas(model, name, 3.0)
    assert torch.isfinite(sampler.sample(model, sigmas.double(), {}, print, rand(2, 3, 4))).all()
    (other,) = comfyui.NeuralSolverSigmas().get_sigmas(model, name, 1.0)
    with pytest.raises(ValueError, match='shift'):
        sampler.sample(model, other, {}, print, rand(2, 3, 4))


def test_one_line_installs_the_nodes(tmp_path, monkeypatch):
    line = 'from neuralsolver.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS\n'
    (tmp_path / 'neuralsolver_nodes').mkdir()
    (tmp_path / 'neuralsolver_nodes/__init__.py').write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    nodes = importlib.import_module('neuralsolver_nodes')
    assert set(nodes.NODE_CLASS_MAPPINGS) == {'NeuralSolverSampler', 'NeuralSolverSigmas'}


def test_workflow_is_complete():
    workflow = json.loads(data_file('comfyui_workflow.json').read_text())
    for node in workflow.values():
        for value in node['inputs'].values():
            assert not isinstance(value, list) or value[0] in workflow
        cls = comfyui.NODE_CLASS_MAPPINGS.get(node['class_type'])
        if cls:
            required = cls.INPUT_TYPES()['required']
            assert node['inputs'].keys() == required.keys()
            assert node['inputs']['solver'] in required['solver'][0]
            assert math.isfinite(node['inputs']['shift'])


WRONG = {
    'sigmas in a list': dict(sigmas=[1.0, 0.5, 0.0]),
    'no sigmas': dict(sigmas=torch.zeros(0)),
    'one sigma': dict(sigmas=torch.ones(1)),
    'a table of sigmas': dict(sigmas=torch.ones(2, 2)),
    'sigmas that rise': dict(sigmas=torch.tensor([0.0, 0.5, 1.0])),
    'sigmas without end': dict(sigmas=torch.tensor([float('inf'), 1.0, 0.0])),
    'sigmas that are no numbers': dict(sigmas=torch.tensor([1.0, float('nan'), 0.0])),
    'sigmas without bound': dict(sigmas=torch.linspace(1, 0, 5001)),
    'whole numbers': dict(x=torch.ones(2, 3, dtype=torch.int64)),
    'no state': dict(x=None),
    'no solver': dict(solver=None),
    'a list of solvers': dict(solver=['ab2']),
    'a model of one sample': dict(model=lambda x, s: x[:1]),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_ends_in_one_line(case):
    given = dict(model=lambda x, s: x / 2, x=torch.randn(2, 3), solver='ab2', disable=True)
    given |= dict(sigmas=torch.tensor([1.0, 0.5, 0.0])) | WRONG[case]
    with pytest.raises(ValueError, match='.') as error:
        sample_neural(**given)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300
