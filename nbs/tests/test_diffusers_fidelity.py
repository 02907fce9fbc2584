"The numbers of our schedulers: against `sample`, NumPy loops and the schedulers of diffusers."

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import F64, STABLE_DIFFUSION, VP, X0, Flow, alpha_sigma, free_solver, loop
from tiny_pipelines import net, rand, reference, relative, scheduler_of, told

from neuralsolver._conventions import convert_output, output_factors
from neuralsolver.classical import adams_bashforth, heun
from neuralsolver.diffusers import compose_shift, keep_times
from neuralsolver.exponential import ddim
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import load_solver
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.solvers import sample
from neuralsolver.transfer import change_path

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
KINDS = ('epsilon', 'sample', 'v_prediction')
TABLES = [  # smallest and largest of every family, both readings of the DDPM table
    (Flow, dict(solver='sit-xl-2'), 5),
    (Flow, dict(solver='sit-xl-2'), 10),
    (Flow, dict(solver='flowdcn-b-2'), 15),
    (VP, dict(continuous=False), 5),
    (VP, dict(continuous=False), 10),
    (VP, dict(continuous=True), 5),
    (VP, dict(continuous=True), 10),
]


@pytest.mark.parametrize('cls, kwargs, n', TABLES)
def test_fidelity_of_published_tables_in_every_precision(cls, kwargs, n):
    s = cls(**kwargs)
    solver = change_path(load_solver(kwargs.get('solver', 'dit-xl-2'), n), s.path)
    exact = reference(s, n, solver)
    result = loop(s, n)
    assert result.dtype == F64 and relative(result, exact) < 1e-9
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        result = loop(s, n, x=X0.to(dtype))
        assert result.dtype == dtype and relative(result.double(), exact) < tolerance


@pytest.mark.parametrize('cls, kwargs, n', TABLES)
def test_fidelity_of_timesteps_and_sigmas(cls, kwargs, n):
    s = cls(**kwargs)
    s.set_timesteps(n)
    nodes = s.solver_for(n).nodes[:-1]
    assert len(s.timesteps) == n and len(s.sigmas) == n + 1 and s.sigmas[-1] == 0
    torch.testing.assert_close(s.timesteps, told(s, nodes), rtol=0, atol=1e-4)
    levels = (1 - nodes).tolist()
    if cls is VP:
        pairs = [alpha_sigma(t, s.config.continuous) for t in nodes.tolist()]
        levels = [sigma / alpha for alpha, sigma in pairs]
    np.testing.assert_allclose(s.sigmas[:-1], levels, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('cls, kwargs', [(Flow, {}), (VP, {}), (Flow, dict(mean_trick='average'))])
def test_precision_half_rounds_once_a_step(cls, kwargs, dtype):
    half, full = cls(**kwargs), cls(**kwargs)
    half.set_timesteps(8)
    full.set_timesteps(8)
    x = X0.to(dtype)
    for t in half.timesteps:
        out = net(x, t)
        exact = full.step(out.float(), t, x.float()).prev_sample
        x = half.step(out, t, x).prev_sample
        assert torch.equal(x, exact.to(dtype))


def test_precision_is_that_of_the_model_output():
    "Mixed precision: diffusers' rule too."
    half, double = torch.float16, F64
    pairs = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (half, double))
    for s in (Flow(), VP()):
        for out, x in (*pairs, (double, torch.float32)):
            s.set_timesteps(6)
            assert s.step(X0.to(out), s.timesteps[0], X0.to(x)).prev_sample.dtype == out


# predictions


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('continuous', [False, True])
def test_fidelity_does_not_depend_on_what_the_network_predicts(kind, continuous):
    "The exact mixture in diffusers' three parametrisations."
    path = VPPath() if continuous else DDPMPath()
    mixture = GaussianMixture(rand(4, 3, 6, seed=1, dtype=F64) * 1.5, 0.5, path=path)
    s = VP(prediction_type=kind, continuous=continuous)
    solver = change_path(load_solver('dit-xl-2', 8), path)

    def model(x, timestep):
        t = (timestep.double() + (not continuous)) / 1000
        a, sigma = path.alpha(t), path.sigma(t)
        noise, data = (mixture.on(path, p)(x, t) for p in ('noise', 'data'))
        outputs = {'epsilon': noise, 'sample': data, 'v_prediction': a * noise - sigma * data}
        return outputs[kind]

    assert relative(loop(s, 8, model), sample(mixture, X0, solver)) < 1e-6  # float32 times


@pytest.mark.parametrize('kind', KINDS)
def test_output_factors_are_those_of_the_definitions(kind):
    path, data, noise = DDPMPath(), rand(3, seed=1, dtype=F64), rand(3, seed=2, dtype=F64)
    for t in (0.9, 0.3, 0.02):
        a, s = alpha_sigma(t, False)
        x = a * data + s * noise
        m = {'epsilon': noise, 'sample': data, 'v_prediction': a * noise - s * data}[kind]
        for target, expected in (('data', data), ('noise', noise)):
            p, r = output_factors(path, t, kind, target)
            torch.testing.assert_close(p * x + r * m, expected, rtol=0, atol=1e-9)
            found = convert_output(path, x, torch.tensor(t, dtype=F64), m, kind, target)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_output_factors_of_flow_models_are_a_sign():
    for target in ('velocity', 'flow'):
        assert output_factors(LinearPath(), 0.3, 'flow_prediction', target) == (0, -1)
    v = rand(3, seed=3, dtype=F64)
    t = torch.tensor(0.3, dtype=F64)
    assert torch.equal(convert_output(LinearPath(), v, t, v, 'flow_prediction', 'velocity'), -v)


# noise


@pytest.mark.parametrize(
    'schedule, start, end',
    [
        ('linear', 1e-4, 0.02),
        ('scaled_linear', 0.00085, 0.012),
        ('squaredcos_cap_v2', 1e-4, 0.02),
    ],
)
def test_fidelity_of_added_noise_to_ddpm(schedule, start, end):
    kwargs = dict(beta_schedule=schedule, beta_start=start, beta_end=end)
    theirs, s = diffusers.DDPMScheduler(**kwargs), VP(**kwargs, solver='ddim')
    x, noise, t = rand(7, 3, 4), rand(7, 3, 4, seed=1), torch.tensor([0, 1, 7, 250, 500, 998, 999])
    for ours, single in ((t, t), (t[3], t[3:4])):
        expected = theirs.add_noise(x, noise, single)
        torch.testing.assert_close(s.add_noise(x, noise, ours), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(s.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert s.add_noise(x.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16
    assert torch.equal(s.scale_noise(x, t, noise), s.add_noise(x, noise, t))


@pytest.mark.parametrize('begin', [None, 2])
def test_fidelity_of_scaled_noise_to_flow_matching(begin):
    theirs, s = diffusers.FlowMatchEulerDiscreteScheduler(), Flow(solver='euler')
    theirs.set_timesteps(sigmas=(1 - np.arange(8) / 8).tolist())
    s.set_timesteps(8)
    torch.testing.assert_close(s.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    if begin is not None:
        theirs.set_begin_index(begin)
        s.set_begin_index(begin)
    x, noise = rand(3, 4, 5), rand(3, 4, 5, seed=1)
    t = s.timesteps[[2, 2, 2] if begin else [0, 2, 7]]
    scaled, expected = s.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)
    assert torch.equal(s.add_noise(x, noise, t), s.scale_noise(x, t, noise))


# the schedulers of diffusers


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
def test_fidelity_of_euler_to_flow_match_euler(kwargs, mu):
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


@pytest.mark.parametrize(
    'name, other, kwargs',
    [
        ('ddim', 'DPMSolverMultistep', dict(solver_order=1)),
        ('dpm-solver++2m', 'DPMSolverMultistep', {}),
        ('dpm-solver++3m', 'DPMSolverMultistep', dict(solver_order=3)),
        ('unipc-2', 'UniPCMultistep', {}),
        ('unipc-3', 'UniPCMultistep', dict(solver_order=3)),
        ('unipc-2-bh1', 'UniPCMultistep', dict(solver_type='bh1')),
    ],
)
def test_fidelity_of_classical_rules_to_diffusers_on_our_nodes(name, other, kwargs):
    theirs = scheduler_of(other, **kwargs)
    ours = VP.from_config(theirs.config, solver=name)
    for n in (5, 8):
        result = loop(ours, n)
        nodes = np.linspace(0.999, 0.001, n + 1)
        np.testing.assert_allclose(ours.timesteps, 1000 * nodes[:-1] - 1, rtol=0, atol=1e-3)
        theirs.set_timesteps(n)
        theirs.timesteps = ours.timesteps
        theirs.set_begin_index(0)
        levels = [np.divide(*alpha_sigma(t, False)[::-1]) for t in nodes]
        theirs.sigmas = torch.tensor(levels)
        x = X0.float()
        for t in theirs.timesteps:
            x = theirs.step(net(x, t), t, x, return_dict=False)[0].float()
        assert relative(result, x.double()) < 1e-5


# image to image


@pytest.mark.parametrize(
    'cls, kwargs, n',
    [
        (Flow, dict(solver='flowdcn-b-2'), 10),
        (VP, {}, 8),
        (VP, dict(continuous=True), 6),
        (VP, dict(solver='unipc-3'), 7),
        (Flow, dict(solver='ab4'), 9),
    ],
)
def test_fidelity_of_a_run_from_every_node(cls, kwargs, n):
    "The first prediction stands for those that are missing, in a NumPy loop."
    s = cls(**kwargs)
    solver = s.solver_for(n)
    W, gain = solver.weights.numpy(), solver.gain.numpy()
    for begin in range(n):
        y, q = X0.numpy(), []
        for k in range(begin, n):
            m = net(torch.from_numpy(y), told(s, solver.nodes[k])).numpy()
            if cls is VP and solver.coordinates == 'data':
                a, sigma = alpha_sigma(solver.nodes[k].item(), s.config.continuous)
                m = (y - sigma * m) / a
            q.append(m if cls is VP else -m)
            history = [q[max(j - begin, 0)] for j in range(k + 1)]
            y = gain[k] * y + sum(w * h for w, h in zip(W[k], history))
        assert relative(loop(s, n, begin=begin), torch.from_numpy(y)) < 1e-9
        assert s.begin_index == begin and s.step_index == n


@pytest.mark.parametrize(
    'cls, kwargs, n',
    [
        (Flow, dict(solver='flowdcn-b-2'), 10),
        (Flow, dict(compose_shift=True, shift=3.0), 7),
        (VP, dict(prediction_type='sample'), 9),
    ],
)
def test_consistency_of_a_constant_prediction_from_every_node(cls, kwargs, n):
    s, c = cls(**kwargs), rand(6, seed=7, dtype=F64)
    nodes = s.solver_for(n).nodes.tolist()
    for begin in range(n):
        a, b = nodes[begin], nodes[-1]
        x = loop(s, n, lambda x, t: c.expand_as(x), begin=begin)
        if cls is Flow:
            expected = X0 - (b - a) * c
        else:
            (alpha, sigma), (alpha1, sigma1) = alpha_sigma(a, False), alpha_sigma(b, False)
            expected = sigma1 / sigma * (X0 - alpha * c) + alpha1 * c
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


# the mean trick


@pytest.mark.parametrize('trick', ['shrunk', 'average', None])
@pytest.mark.parametrize('shape, axes', [((2, 5, 3), (1,)), ((2, 3, 4, 5), (2, 3))])
@pytest.mark.parametrize('begin', [0, 3])
def test_fidelity_of_the_mean_trick_to_a_naive_loop(trick, shape, axes, begin):
    s = Flow(solver='flowdcn-b-2', mean_trick=trick)
    solver = load_solver('flowdcn-b-2', 8)
    W, dt = solver.weights.numpy(), solver.nodes.diff().numpy()

    def model(x, t):
        return torch.tanh(1.5 * x + t / 1000) + 0.5  # its mean is not zero

    start = rand(*shape, dtype=F64)
    x = loop(s, 8, model, start, begin)
    y, q, means = start.numpy(), [], []
    for k in range(begin, 8):
        v = -model(torch.from_numpy(y), s.timesteps[k]).numpy()
        m = v.mean(axes, keepdims=True) if trick else np.zeros(1)
        q.append(v - m)
        means.append(m)
        done = k - begin + 1
        mean = {'shrunk': m / done, 'average': sum(means) / done, None: 0}[trick]
        y = y + sum(W[k, j] * q[max(j - begin, 0)] for j in range(k + 1)) + dt[k] * mean
    torch.testing.assert_close(x, torch.from_numpy(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shape', [(2, 5, 3), (2, 3, 4, 5)])
def test_consistency_of_the_mean_trick_on_a_constant_field(shape):
    c, x = 1.7, rand(*shape, dtype=F64)
    for name, n in (('sit-xl-2', 6), ('flowdcn-b-2', 10)):
        dt = load_solver(name, n).nodes.diff().tolist()
        whole, shrunk = math.fsum(dt), math.fsum(d / (k + 1) for k, d in enumerate(dt))
        for trick, part in (('average', whole), ('shrunk', shrunk), (None, whole)):
            s = Flow(solver=name, mean_trick=trick)
            moved = loop(s, n, lambda x, t: torch.full_like(x, -c), x) - x
            expected = torch.full_like(x, c * part)
            torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


# shifts and other tables


@pytest.mark.parametrize('shift', [3.0, 0.4])
def test_shift_keeps_the_coefficients_per_unit_of_span(shift):
    tables = load_solver('flowdcn-b-2', 15), load_solver('sit-xl-2', 5), adams_bashforth(6, 3)
    for solver in tables:
        moved = compose_shift(solver, shift)
        back = compose_shift(moved, 1 / shift)
        sigma = 1 - solver.nodes
        expected = shift * sigma / (1 + (shift - 1) * sigma)
        torch.testing.assert_close(1 - moved.nodes, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(moved.weights.sum(1), moved.nodes.diff(), rtol=0, atol=1e-12)
        per_unit, known = (s.weights / s.nodes.diff()[:, None] for s in (moved, solver))
        torch.testing.assert_close(per_unit, known, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back.nodes, solver.nodes, rtol=0, atol=1e-12)
        torch.testing.assert_close(back.weights, solver.weights, rtol=1e-9, atol=1e-9)


def test_shift_follows_the_size_of_the_image():
    s = Flow(compose_shift=True, use_dynamic_shifting=True)
    for mu in (0.5, 1.15, 0.5):
        static = Flow(compose_shift=True, shift=math.exp(mu))
        assert torch.equal(loop(s, 8, mu=mu), loop(static, 8))


def test_shift_derives_classical_rules_anew():
    s = Flow(solver='ab3', compose_shift=True, shift=3.0)
    u = torch.linspace(0, 1, 9, dtype=F64)
    derived = adams_bashforth(8, 3, u / (u + 3 * (1 - u)))
    assert relative(loop(s, 8), reference(s, 8, derived)) < 1e-9
    moved = compose_shift(adams_bashforth(8, 3), 3.0)
    assert relative(reference(s, 8, moved), reference(s, 8, derived)) > 1e-4


def test_shift_is_used_only_when_composing_is_asked_for():
    plain = loop(Flow(), 8)
    assert torch.equal(loop(Flow(shift=3.0), 8), plain)
    assert torch.equal(loop(Flow(use_dynamic_shifting=True), 8, mu=1.0), plain)
    assert not torch.allclose(loop(Flow(shift=3.0, compose_shift=True), 8), plain)


def test_kept_times_are_the_same_method_on_the_other_table():
    "DDIM carried over is DDIM derived there; of a searched table, times and coefficients stay."
    s = VP(**STABLE_DIFFUSION, carry='time')
    own = ddim(7, VPPath(), t_start=0.999)
    carried, there = keep_times(own, s.path), ddim(7, s.path, own.nodes)
    assert torch.equal(carried.nodes, there.nodes)
    assert torch.allclose(carried.weights, there.weights, rtol=1e-12)
    table, solver = load_solver('dit-xl-2', 8), s.solver_for(8)
    assert torch.equal(solver.nodes, table.nodes) and solver.path == s.path
    per_unit, known = (v.weights / v.span[:, None] for v in (solver, table))
    assert torch.allclose(per_unit, known)
    s.set_timesteps(8)
    torch.testing.assert_close(s.timesteps, (1000 * table.nodes[:-1] - 1).float())
    assert keep_times(table, VPPath()) is table
    with pytest.raises(ValueError, match='stages'):
        keep_times(replace(heun(4), path=VPPath()), s.path)


def test_equal_log_snr_is_not_equal_time():
    source = load_solver('dit-xl-2', 8)
    cosine = dict(beta_schedule='squaredcos_cap_v2')
    a, b = (VP(carry=carry, **cosine).solver_for(8) for carry in ('log-snr', 'time'))
    expected = VPPath().log_snr(source.nodes.clamp(0.001, 1))
    assert torch.allclose(a.path.log_snr(a.nodes), expected, atol=1e-6)
    assert torch.equal(b.nodes, source.nodes.clamp(0, 1))


# free gains


@pytest.mark.parametrize('cls, path', [(Flow, LinearPath()), (VP, VPPath())], ids=['flow', 'vp'])
def test_fidelity_of_free_gains(cls, path, tmp_path):
    solver = free_solver(path)
    s = cls(solver=solver, **(dict(continuous=True) if cls is VP else {}))
    assert s.solver_for(6).digest == solver.digest
    bound = 1e-9 if cls is Flow else 1e-6  # diffusers keeps timesteps in float32
    assert relative(loop(s, 6), reference(s, 6, solver)) < bound
    s.save_pretrained(tmp_path)
    assert torch.equal(loop(cls.from_pretrained(tmp_path), 6), loop(s, 6))
    plain = load_solver('dit-xl-2', 6) if cls is VP else adams_bashforth(6, 3, solver.nodes)
    assert relative(loop(s, 6), reference(s, 6, plain)) > 1e-2


def test_fidelity_of_free_gains_in_float32():
    centers, x, solver = rand(4, 18, seed=3), rand(4, 18, seed=4), free_solver()
    field = GaussianMixture(centers, 0.5)
    result = loop(Flow(solver=solver), 6, lambda x, t: -field(x, 1 - t / 1000), x)
    assert relative(result, sample(field, x, solver)) < 2e-5
    exact, y = GaussianMixture(centers.double(), 0.5), x.double()
    s = Flow(solver=solver)
    s.set_timesteps(6)
    for t, node in zip(s.timesteps, solver.nodes):
        y = s.step(-exact(y, node), t, y).prev_sample  # told the nodes in full precision
    assert relative(y, sample(exact, x.double(), solver)) < 1e-12


def test_free_gains_come_to_the_table_at_equal_log_snr():
    solver = free_solver(VPPath())
    s = VP(solver=solver)
    there = s.solver_for(6)
    assert there.path == s.path and not there.consistent
    assert there.digest == change_path(solver, s.path).digest
    assert relative(loop(s, 6), reference(s, 6, there)) < 1e-6
