"Classical solvers and the loop against torchdiffeq, diffusers, scipy and finite differences."

import threading

import numpy as np
import pytest
import torch
from exact_cases import F64, count_calls, rand, rms, slope

from neuralsolver.classical import adams_bashforth, euler, heun, midpoint, rk4, uniform_grid
from neuralsolver.exponential import ipndm
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import get_solver, list_solvers, load_solver, neural_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.rules import VELOCITY
from neuralsolver.solvers import Solver, sample

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2
CENTERS, STD = rand(4, 3, seed=1), 0.5
MIXTURE, X0 = GaussianMixture(CENTERS, STD), rand(16, 3, seed=2)
STEPS = (60, 120, 240)


def warped(n):
    "Smooth; its first steps are not of higher order in 1 / n."
    u = uniform_grid(n)
    return (u + u**2) / 2


WARPED = {n: warped(n) for n in (5, *STEPS)}


def assert_near(actual, expected, atol, rtol=0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(scope='module')
def exact():
    "States of the true trajectory at given times, by scipy's DOP853."
    from scipy.integrate import solve_ivp

    def f(t, x):
        x = torch.from_numpy(x).view_as(X0)
        return MIXTURE(x, torch.tensor(t, dtype=F64)).flatten().numpy()

    times = np.unique(np.concatenate(list(WARPED.values())))
    dense = solve_ivp(f, (0, 1), X0.flatten().numpy(), 'DOP853', times, rtol=1e-12, atol=1e-13)
    assert dense.success

    def at(times):
        states = dense.y[:, np.searchsorted(dense.t, np.asarray(times))].T
        return torch.from_numpy(states.copy()).view(-1, *X0.shape)

    return at


# Same values as other implementations


@pytest.mark.parametrize(
    'ours, theirs', [(euler, 'euler'), (midpoint, 'midpoint'), (heun, 'heun2')]
)
def test_runge_kutta_is_torchdiffeqs_on_the_same_grid(ours, theirs):
    from torchdiffeq import odeint

    states = odeint(lambda t, x: MIXTURE(x, t), X0, WARPED[5], method=theirs)
    result = sample(MIXTURE, X0, ours(5, WARPED[5]), trajectory=True)
    assert_near(result[:: len(result) // 5], states, atol=1e-13)


def test_rk4_has_the_order_of_torchdiffeqs_rk4_but_not_its_values(exact):
    "torchdiffeq's 'rk4' is the 3/8 rule."
    from torchdiffeq import odeint

    end, errors = exact([1.0])[0], []
    for n in STEPS:
        a = sample(MIXTURE, X0, rk4(n, WARPED[n]))
        b = odeint(lambda t, x: MIXTURE(x, t), X0, WARPED[n], method='rk4')[-1]
        errors.append([rms(a - end), rms(b - end)])
        assert rms(a - b) > 0.1 * rms(b - end)
    for column in zip(*errors):
        assert abs(slope(STEPS, column) - 4) < 0.2


@pytest.mark.parametrize(
    'name, ours, settings, calls',
    [
        ('FlowMatchEulerDiscreteScheduler', euler, {}, 6),
        ('FlowMatchHeunDiscreteScheduler', heun, dict(euler_end=True), 11),
    ],
)
def test_full_loops_of_diffusers_flow_schedulers(name, ours, settings, calls):
    """Their time runs from sigma = 1 to 0 and their velocity is noise - data.

    Hence t = 1 - sigma, and the sign flips.
    """
    import diffusers

    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_timesteps(6)
    x, count, field = X0.float(), 0, GaussianMixture(CENTERS.float(), STD)
    for t in scheduler.timesteps:
        x = scheduler.step(-field(x, 1 - t / 1000), t, x, return_dict=False)[0]
        count += 1
    first, inner, last = scheduler.sigmas.tensor_split([1, -1])
    sigmas = torch.cat([first, inner.unique_consecutive(), last]).double()
    assert sigmas[0] == 1 and sigmas[-1] == 0
    solver = ours(6, 1 - sigmas, **settings)
    assert solver.nfe == count == calls
    assert_near(sample(field, X0.float(), solver), x, atol=2e-5)


@pytest.mark.parametrize('order', [1, 2, 3, 4])
@pytest.mark.parametrize('descending', [False, True])
def test_adams_bashforth_weights_are_diffusers_lms_coefficients(order, descending):
    from diffusers import LMSDiscreteScheduler

    grid = torch.tensor([0, 0.03, 0.1, 0.14, 0.3, 0.38, 0.7, 1], dtype=F64)
    grid = grid.flip(0) if descending else grid
    scheduler = LMSDiscreteScheduler()
    scheduler.sigmas = grid.numpy()
    weights = adams_bashforth(7, order, grid).weights
    for i in range(7):
        p = min(order, i + 1)
        expected = torch.zeros(7, dtype=F64)
        for j in range(p):
            expected[i - j] = scheduler.get_lms_coefficient(p, i, j)
        assert_near(weights[i], expected, atol=1e-12)


def naive_expectations(x, alpha, sigma):
    "E[x_1 | x] and E[eps | x] of the mixture, from Bayes' rule with torch.distributions."
    total = STD**2 * alpha**2 + sigma**2
    parts = [torch.distributions.Normal(alpha * c, total**0.5) for c in CENTERS]
    p = torch.stack([part.log_prob(x).sum(1) for part in parts], 1).softmax(1)
    means = [c + alpha * STD**2 / total * (x - alpha * c) for c in CENTERS]
    data = sum(p[:, k : k + 1] * mean for k, mean in enumerate(means))
    return data, (x - alpha * data) / sigma


@pytest.mark.parametrize('coordinates', ['data', 'noise'])
@pytest.mark.parametrize('steps', [5, 20])
def test_euler_in_data_and_noise_coordinates_is_diffusers_ddim(coordinates, steps):
    "On the reference's own alphas: the times of our path that have them."
    from diffusers import DDIMScheduler

    prediction = dict(data='sample', noise='epsilon')[coordinates]
    scheduler = DDIMScheduler(
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction,
        beta_schedule='linear',
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    x, squares = X0, []
    for t in scheduler.timesteps:
        squares.append(scheduler.alphas_cumprod[t])
        a, s = squares[-1].sqrt(), (1 - squares[-1]).sqrt()
        x = scheduler.step(naive_expectations(x, a, s)[coordinates == 'noise'], t, x).prev_sample
    path = VPPath(t_min=1e-6)
    squares = torch.stack([*squares, scheduler.final_alpha_cumprod])
    b0, b1 = path.beta_min, path.beta_max - path.beta_min
    integral = -squares.log()  # b0 t + b1 t^2 / 2
    t = ((b0**2 + 2 * b1 * integral).sqrt() - b0) / b1
    solver = neural_solver(-t.diff(), torch.zeros(steps, steps), coordinates, path, t[0].item())
    assert_near(path.alpha(solver.nodes) ** 2, squares, rtol=1e-11, atol=0)
    field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
    assert_near(sample(field, X0, solver), x, atol=1e-9)


def test_coordinates_agree_with_the_closed_form_of_ddim():
    """Data and noise coordinates with zero coefficients are one method.

    One step is alpha' x_1 + sigma' eps.
    """
    path, t0, t1 = VPPath(), torch.tensor(0.9, dtype=F64), torch.tensor(0.4, dtype=F64)
    data, noise = naive_expectations(X0, path.alpha(t0), path.sigma(t0))
    for coordinates in ('data', 'noise'):
        solver = neural_solver([0.5], [[0.0]], coordinates, path, 0.9)
        field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
        expected = path.alpha(t1) * data + path.sigma(t1) * noise
        assert_near(sample(field, X0, solver), expected, atol=1e-12)


# Orders


@pytest.mark.parametrize('method, order', [(euler, 1), (midpoint, 2), (heun, 2)])
def test_measured_order_of_runge_kutta(exact, method, order):
    "That of rk4 is measured beside torchdiffeq's."
    end = exact([1.0])[0]
    errors = [rms(sample(MIXTURE, X0, method(n, WARPED[n])) - end) for n in STEPS]
    assert abs(slope(STEPS, errors) - order) < 0.2


@pytest.mark.parametrize('order', [2, 3, 4])
def test_measured_order_of_adams_bashforth(exact, order):
    """By an RK4 start, and by history taken from the true trajectory.

    The cheap start hides every order above 2. Order 1 is Euler's method.
    """
    end, errors = exact([1.0])[0], []
    for n in STEPS:
        grid = WARPED[n]
        W, states = adams_bashforth(n, order, grid).weights, exact(grid)
        v = [MIXTURE(states[i], grid[i]) for i in range(order - 1)]
        x = states[order - 1]
        for i in range(order - 1, n):
            v.append(MIXTURE(x, grid[i]))
            x = x + sum(W[i, j] * v[j] for j in range(i + 1))
        methods = [adams_bashforth(n, order, grid, start) for start in ('rk4', 'low-order')]
        ends = [x, *(sample(MIXTURE, X0, method) for method in methods)]
        errors.append([rms(x - end) for x in ends])
    seeded, rk4_start, cheap_start = (slope(STEPS, e) for e in zip(*errors))
    assert abs(seeded - order) < 0.2 and abs(rk4_start - order) < 0.2
    assert abs(cheap_start - min(order, 2)) < 0.3


# Number of evaluations

EXPECTED_NFE = {'midpoint': 2, 'heun': 2, 'rk4': 4}  # per step; 1 for all others


@pytest.mark.parametrize('name', (*VELOCITY, 'ipndm'))
def test_nfe_is_the_number_of_calls(name):
    for steps in (1, 2, 3, 4, 5, 8, 15):
        solver = get_solver(name, steps)
        assert count_calls(solver) == solver.nfe == EXPECTED_NFE.get(name, 1) * steps
        if not name.startswith('heun-nfe'):
            assert solver.steps == steps


def test_nfe_of_starts_and_of_every_table():
    for order in (1, 2, 3, 4):
        for steps in (1, 2, 5):
            solver = adams_bashforth(steps, order, start='rk4')
            assert count_calls(solver) == solver.nfe == steps + 3 * min(order - 1, steps)
    for name, counts in list_solvers().items():
        for steps in counts:
            assert count_calls(load_solver(name, steps)) == load_solver(name, steps).nfe == steps


# Gradients


def central_differences(f, inputs, which, h=1e-5):
    "The gradient of f with respect to one of its inputs."
    gradient = torch.zeros_like(inputs[which])
    for k in range(gradient.numel()):
        step = torch.zeros_like(gradient)
        step.view(-1)[k] = h
        ends = []
        for sign in (1, -1):
            moved = [v + sign * step if i == which else v for i, v in enumerate(inputs)]
            ends.append(f(*moved))
        gradient.view(-1)[k] = (ends[0] - ends[1]) / (2 * h)
    return gradient


@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise'])
def test_gradients_are_finite_differences(coordinates):
    "With respect to time deltas, coefficients (zeros among them) and noise."
    path, t_start = (LinearPath(), None) if coordinates == 'velocity' else (VPPath(), 0.95)
    field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
    c = rand(4, 4, seed=3).tril(-1) * 0.3
    c[3, 1] = 0
    c[2] = 0
    deltas = torch.tensor([0.1, 0.2, 0.3, 0.15], dtype=F64)
    lower = tuple(torch.tril_indices(4, 4, -1))
    target = rand(5, 3, seed=4)

    def loss(deltas, free, noise):
        coefficients = torch.zeros(4, 4, dtype=F64).index_put(lower, free)
        solver = neural_solver(deltas, coefficients, coordinates, path, t_start)
        return (sample(field, noise, solver) - target).square().mean()

    inputs = [v.clone().requires_grad_() for v in (deltas, c[lower], X0[:5])]
    grads = torch.autograd.grad(loss(*inputs), inputs)
    with torch.no_grad():
        for which, grad in enumerate(grads):
            assert (grad != 0).all()  # also where the coefficient is zero now
            numeric = central_differences(loss, inputs, which)
            assert_near(grad, numeric, rtol=1e-6, atol=1e-8)


# Dtype, device, shape


@pytest.mark.parametrize('shape', [(5,), (5, 3), (2, 3, 4, 4), (1, 2, 3, 4, 5)])
def test_shapes(shape):
    noise = rand(*shape)
    result = sample(lambda x, t: -x, noise, rk4(20))
    assert_near(result, noise * np.exp(-1), rtol=1e-6, atol=0)
    assert sample(lambda x, t: -x, noise, rk4(2), trajectory=True).shape == (9, *shape)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_state_accumulates_in_float32_or_float64(dtype):
    "The field sees the caller's dtype, times at full precision; half precision would stall."
    seen, noise, n = set(), rand(4, 3).to(dtype), 400

    def field(x, t):
        seen.add((x.dtype, t.dtype, t.ndim))
        return torch.full_like(x, 0.25)

    result = sample(field, noise, euler(n))
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == dtype and seen == {(dtype, inner, 0)}
    expected = (noise.to(inner) + 0.25).to(dtype)
    assert_near(result, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert sample(field, noise, euler(2), trajectory=True).dtype == dtype


def test_the_device_is_the_noises():
    "The meta device stands in for an accelerator: a tensor left on the CPU would raise."
    noise = torch.zeros(2, 3, device='meta')
    devices = set()

    def field(x, t):
        devices.update((x.device.type, t.device.type))
        return x * t

    for solver in (get_solver('adam4', 6), load_solver('dit-xl-2', 5)):
        assert sample(field, noise, solver).device.type == 'meta'
    assert devices == {'meta'}


def test_noise_is_not_modified_and_cond_reaches_the_field():
    noise, labels = rand(4, 3), torch.arange(4)
    before = noise.clone()
    seen = []

    def field(x, t, y):
        seen.append(y)
        return x

    sample(field, noise, heun(2), labels)
    assert torch.equal(noise, before) and len(seen) == 4 and all(y is labels for y in seen)


def test_two_interleaved_runs_do_not_disturb_each_other():
    solvers = [load_solver('sit-xl-2', 8), get_solver('adam4', 8)]
    separate = [sample(MIXTURE, X0, s) for s in solvers]
    barrier, together = threading.Barrier(2), [None, None]

    def run(k):
        def field(x, t):
            barrier.wait(20)
            return MIXTURE(x, t)

        together[k] = sample(field, X0, solvers[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(separate, together))
    assert torch.equal(sample(MIXTURE, X0, solvers[0]), separate[0])


# Refusals


def decay(x, t):
    return -x


def one_column(x, t):
    return x[:, :1]


@pytest.mark.parametrize(
    'field, noise, solver, said',
    [
        (decay, X0, 'euler', 'must be a Solver, not str'),
        (decay, X0.long(), euler(2), 'floating-point'),
        (decay, X0.tolist(), euler(2), 'floating-point'),
        (one_column, X0, euler(2), r'\[16, 1\] for a state of shape \[16, 3\]'),
    ],
)
def test_refusal_of_sample(field, noise, solver, said):
    with pytest.raises(ValueError, match=said):
        sample(field, noise, solver)


@pytest.mark.parametrize(
    'rule, args, settings, said',
    [
        (euler, (0,), {}, 'steps=0'),
        (rk4, (2.5,), {}, 'steps=2.5'),
        (heun, (True,), {}, 'steps=True'),
        (euler, (3, [0, 0.5, 1]), {}, r'steps \+ 1 = 4'),
        (euler, (2, [0, 1, 0.5]), {}, 'strictly monotone'),
        (euler, (2, [0, float('nan'), 1]), {}, 'monotone'),
        (adams_bashforth, (8, 5), {}, 'order=5'),
        (adams_bashforth, (8, 2), dict(start='exact'), "start='exact'"),
        (ipndm, (8, 0), {}, 'order=0'),
        (get_solver, ('euler', '8'), {}, "steps='8'"),
    ],
)
def test_refusal_of_a_classical_rule(rule, args, settings, said):
    with pytest.raises(ValueError, match=said):
        rule(*args, **settings)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
    'nodes, weights, settings, said',
    [
        ([0, 1], [[NAN]], {}, 'finite'),
        ([0, 1], [[0.5]], {}, 'span of its step'),
        ([0, 1], [[0.5]], dict(gains=[0.0]), r'gains must be K = 1 .*\[0.0\]'),
        ([0, 1], [[0.5]], dict(gains=[1.0, 1.0]), 'gains must be K = 1'),
        ([0, 1], [[0.5]], dict(gains=[INF]), 'gains must be'),
        ([0, 1], [[NAN]], dict(gains=[1.0]), 'weights must be finite'),
        ([0, 0.5, 1], [[0.5, 0.1], [0, 0.5]], dict(gains=[1.0, 1.0]), 'lower triangular'),
        ([0, 1, 2], [[1]], {}, 'do not fit'),
        ([0, 1], [[1]], dict(coordinates='score'), "coordinates='score'"),
    ],
)
def test_refusal_of_a_solver(nodes, weights, settings, said):
    with pytest.raises(ValueError, match=said):
        Solver(nodes, weights, **settings)


@pytest.mark.parametrize(
    'deltas, coefficients, said',
    [
        ([0.5, 0.5], torch.ones(2, 2), 'strictly lower'),
        ([1.5, -0.5], torch.zeros(2, 2), 'positive'),
    ],
)
def test_refusal_of_neural_solver(deltas, coefficients, said):
    with pytest.raises(ValueError, match=said):
        neural_solver(deltas, coefficients)
