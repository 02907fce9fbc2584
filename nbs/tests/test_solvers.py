"Classical solvers and the loop against torchdiffeq, diffusers, scipy and finite differences."

import threading
import numpy as np
import pytest
import torch
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import (
    CLASSICAL,
    get_solver,
    list_solvers,
    load_solver,
    neural_solver,
)
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.exponential import ipndm
from neuralsolver.solvers import Solver, sample
from neuralsolver.classical import adams_bashforth, euler, heun, midpoint, rk4, uniform_grid

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CENTERS, STD = rand(4, 3, seed=1), 0.5
MIXTURE, X0 = GaussianMixture(CENTERS, STD), rand(16, 3, seed=2)
STEPS = (64, 128, 256)
WARPED = {
    n: (u + u**2) / 2 for n in (5, *STEPS) for u in [uniform_grid(n)]
}  # smooth, first steps not of higher order in 1 / n


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(scope='module')
def exact():
    "States of the true trajectory at given times, by scipy's DOP853."
    from scipy.integrate import solve_ivp

    def f(t, x):
        return (
            MIXTURE(torch.from_numpy(x).view_as(X0), torch.tensor(t, dtype=F64)).flatten().numpy()
        )

    times = np.unique(np.concatenate([g for g in WARPED.values()]))
    dense = solve_ivp(f, (0, 1), X0.flatten().numpy(), 'DOP853', times, rtol=1e-12, atol=1e-13)
    assert dense.success

    def at(times):
        return torch.from_numpy(
            dense.y[:, np.searchsorted(dense.t, np.asarray(times))].T.copy()
        ).view(-1, *X0.shape)

    return at


# Same values as other implementations


@pytest.mark.parametrize(
    'ours, theirs', [(euler, 'euler'), (midpoint, 'midpoint'), (heun, 'heun2')]
)
def test_runge_kutta_is_torchdiffeqs_on_the_same_grid(ours, theirs):
    from torchdiffeq import odeint

    states = odeint(lambda t, x: MIXTURE(x, t), X0, WARPED[5], method=theirs)
    result = sample(MIXTURE, X0, ours(5, WARPED[5]), trajectory=True)
    torch.testing.assert_close(result[:: len(result) // 5], states, rtol=0, atol=1e-13)


def test_rk4_has_the_order_of_torchdiffeqs_rk4_but_not_its_values(exact):
    "torchdiffeq's 'rk4' is the 3/8 rule."
    from torchdiffeq import odeint

    end, errors = exact([1.0])[0], []
    for n in STEPS:
        a, b = (
            sample(MIXTURE, X0, rk4(n, WARPED[n])),
            odeint(lambda t, x: MIXTURE(x, t), X0, WARPED[n], method='rk4')[-1],
        )
        errors.append([rms(a - end), rms(b - end)])
        assert rms(a - b) > 0.1 * rms(b - end)
    for column in zip(*errors):
        assert abs(slope(STEPS, column) - 4) < 0.2


@pytest.mark.parametrize(
    'name, ours, calls',
    [
        ('FlowMatchEulerDiscreteScheduler', euler, 6),
        ('FlowMatchHeunDiscreteScheduler', lambda n, g: heun(n, g, euler_end=True), 11),
    ],
)
def test_full_loops_of_diffusers_flow_schedulers(name, ours, calls):
    "Their time runs from sigma = 1 to 0 and their velocity is noise - data: t = 1 - sigma, and the sign flips."
    import diffusers

    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_timesteps(6)
    x, count, field = X0.float(), 0, GaussianMixture(CENTERS.float(), STD)
    for t in scheduler.timesteps:
        x = scheduler.step(-field(x, 1 - t / 1000), t, x, return_dict=False)[0]
        count += 1
    sigmas = torch.cat(
        [scheduler.sigmas[:1], scheduler.sigmas[1:-1].unique_consecutive(), scheduler.sigmas[-1:]]
    ).double()
    assert sigmas[0] == 1 and sigmas[-1] == 0
    solver = ours(6, 1 - sigmas)
    assert solver.nfe == count == calls
    torch.testing.assert_close(sample(field, X0.float(), solver), x, rtol=0, atol=2e-5)


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
        torch.testing.assert_close(weights[i], expected, rtol=0, atol=1e-12)


def naive_expectations(x, alpha, sigma):
    "E[x_1 | x] and E[eps | x] of the mixture, from Bayes' rule with torch.distributions."
    total = STD**2 * alpha**2 + sigma**2
    logp = torch.stack(
        [torch.distributions.Normal(alpha * c, total**0.5).log_prob(x).sum(1) for c in CENTERS], 1
    )
    p = (logp - logp.logsumexp(1, keepdim=True)).exp()
    data = sum(
        p[:, k : k + 1] * (c + alpha * STD**2 / total * (x - alpha * c))
        for k, c in enumerate(CENTERS)
    )
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
    b0, b1 = path.beta_min, path.beta_max - path.beta_min
    integral = -torch.stack([*squares, scheduler.final_alpha_cumprod]).log()  # b0 t + b1 t^2 / 2
    t = ((b0**2 + 2 * b1 * integral).sqrt() - b0) / b1
    solver = neural_solver(-t.diff(), torch.zeros(steps, steps), coordinates, path, t[0].item())
    torch.testing.assert_close(
        path.alpha(solver.nodes) ** 2,
        torch.stack([*squares, scheduler.final_alpha_cumprod]),
        rtol=1e-11,
        atol=0,
    )
    field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
    torch.testing.assert_close(sample(field, X0, solver), x, rtol=0, atol=1e-9)


def test_coordinates_agree_with_the_closed_form_of_ddim():
    "Data and noise coordinates with zero coefficients are one method; one step is alpha' x_1 + sigma' eps."
    path, t0, t1 = VPPath(), torch.tensor(0.9, dtype=F64), torch.tensor(0.4, dtype=F64)
    data, noise = naive_expectations(X0, path.alpha(t0), path.sigma(t0))
    for coordinates in ('data', 'noise'):
        solver = neural_solver([0.5], [[0.0]], coordinates, path, 0.9)
        field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
        torch.testing.assert_close(
            sample(field, X0, solver),
            path.alpha(t1) * data + path.sigma(t1) * noise,
            rtol=0,
            atol=1e-12,
        )


# Orders


@pytest.mark.parametrize('method, order', [(euler, 1), (midpoint, 2), (heun, 2), (rk4, 4)])
def test_measured_order_of_runge_kutta(exact, method, order):
    end = exact([1.0])[0]
    errors = [rms(sample(MIXTURE, X0, method(n, WARPED[n])) - end) for n in STEPS]
    assert abs(slope(STEPS, errors) - order) < 0.2


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_measured_order_of_adams_bashforth(exact, order):
    "By an RK4 start, and by history taken from the true trajectory; the cheap start hides every order above 2."
    end, errors = exact([1.0])[0], []
    for n in STEPS:
        grid = WARPED[n]
        W, states = adams_bashforth(n, order, grid).weights, exact(grid)
        v = [MIXTURE(states[i], grid[i]) for i in range(order - 1)]
        x = states[order - 1]
        for i in range(order - 1, n):
            v.append(MIXTURE(x, grid[i]))
            x = x + sum(W[i, j] * v[j] for j in range(i + 1))
        whole = (
            sample(MIXTURE, X0, adams_bashforth(n, order, grid, start))
            for start in ('rk4', 'low-order')
        )
        errors.append([rms(x - end), *(rms(w - end) for w in whole)])
    seeded, rk4_start, cheap_start = (slope(STEPS, e) for e in zip(*errors))
    assert abs(seeded - order) < 0.2 and abs(rk4_start - order) < 0.2
    assert abs(cheap_start - min(order, 2)) < 0.3


# Number of evaluations

EXPECTED_NFE = {'midpoint': 2, 'heun': 2, 'rk4': 4}  # per step; 1 for all others


def count_calls(solver):
    calls = []
    sample(lambda x, t: (calls.append(float(t)), -x)[1], torch.ones(2, 1, dtype=F64), solver)
    assert calls == solver.nodes[:-1].tolist()  # at the nodes, in their order
    return len(calls)


@pytest.mark.parametrize('name', CLASSICAL)
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


@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise'])
def test_gradients_are_finite_differences(coordinates):
    "With respect to time deltas, coefficients (zeros among them) and noise."
    path = LinearPath() if coordinates == 'velocity' else VPPath()
    field = GaussianMixture(CENTERS, STD, path=path, prediction=coordinates)
    c = rand(4, 4, seed=3).tril(-1) * 0.3
    c[3, 1] = 0
    c[2] = 0
    deltas, lower, target = (
        torch.tensor([0.1, 0.2, 0.3, 0.15], dtype=F64),
        torch.tril_indices(4, 4, -1),
        rand(5, 3, seed=4),
    )

    def loss(deltas, free, noise):
        coefficients = torch.zeros(4, 4, dtype=F64).index_put(tuple(lower), free)
        solver = neural_solver(
            deltas, coefficients, coordinates, path, None if coordinates == 'velocity' else 0.95
        )
        return (sample(field, noise, solver) - target).square().mean()

    inputs = [v.clone().requires_grad_() for v in (deltas, c[tuple(lower)], X0[:5])]
    grads = torch.autograd.grad(loss(*inputs), inputs)
    with torch.no_grad():
        for which, grad in enumerate(grads):
            assert (grad != 0).all()  # also where the coefficient is zero now
            numeric = torch.zeros_like(grad)
            for k in range(grad.numel()):
                h, ends = torch.zeros_like(grad), []
                h.view(-1)[k] = 1e-5
                for sign in (1, -1):
                    ends.append(
                        loss(*[v + sign * h if i == which else v for i, v in enumerate(inputs)])
                    )
                numeric.view(-1)[k] = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


# Dtype, device, shape


@pytest.mark.parametrize('shape', [(5,), (5, 3), (2, 3, 4, 4), (1, 2, 3, 4, 5)])
def test_shapes(shape):
    noise = rand(*shape)
    result = sample(lambda x, t: -x, noise, rk4(20))
    torch.testing.assert_close(result, noise * np.exp(-1), rtol=1e-6, atol=0)
    assert sample(lambda x, t: -x, noise, rk4(2), trajectory=True).shape == (9, *shape)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_state_accumulates_in_float32_or_float64(dtype):
    "The field sees the caller's dtype, times at full precision; a half-precision state would stall."
    seen, noise, n = set(), rand(4, 3).to(dtype), 400

    def field(x, t):
        seen.add((x.dtype, t.dtype, t.ndim))
        return torch.full_like(x, 0.25)

    result = sample(field, noise, euler(n))
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == dtype and seen == {(dtype, inner, 0)}
    torch.testing.assert_close(
        result, (noise.to(inner) + 0.25).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4
    )
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
    sample(lambda x, t, y: (seen.append(y), x)[1], noise, heun(2), labels)
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


# Errors


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: sample(MIXTURE, X0, 'euler'), 'must be a Solver, not str'),
        (lambda: sample(MIXTURE, X0.long(), euler(2)), 'floating-point'),
        (lambda: sample(MIXTURE, X0.tolist(), euler(2)), 'floating-point'),
        (
            lambda: sample(lambda x, t: x[:, :1], X0, euler(2)),
            r'\[16, 1\] for a state of shape \[16, 3\]',
        ),
        (lambda: euler(0), 'steps=0'),
        (lambda: rk4(2.5), 'steps=2.5'),
        (lambda: heun(True), 'steps=True'),
        (lambda: get_solver('euler', '8'), "steps='8'"),
        (lambda: adams_bashforth(8, 5), 'order=5'),
        (lambda: adams_bashforth(8, 2, start='exact'), "start='exact'"),
        (lambda: ipndm(8, 0), 'order=0'),
        (lambda: euler(3, [0, 0.5, 1]), 'steps \\+ 1 = 4'),
        (lambda: euler(2, [0, 1, 0.5]), 'strictly monotone'),
        (lambda: euler(2, [0, float('nan'), 1]), 'monotone'),
        (lambda: Solver([0, 1], [[float('nan')]]), 'finite'),
        (lambda: Solver([0, 1], [[0.5]]), 'span of its step'),
        (lambda: Solver([0, 1], [[0.5]], gains=[0.0]), r'gains must be K = 1 .*\[0.0\]'),
        (lambda: Solver([0, 1], [[0.5]], gains=[1.0, 1.0]), 'gains must be K = 1'),
        (lambda: Solver([0, 1], [[0.5]], gains=[float('inf')]), 'gains must be'),
        (lambda: Solver([0, 1], [[float('nan')]], gains=[1.0]), 'weights must be finite'),
        (lambda: Solver([0, 0.5, 1], [[0.5, 0.1], [0, 0.5]], gains=[1.0, 1.0]), 'lower triangular'),
        (lambda: Solver([0, 1, 2], [[1]]), 'do not fit'),
        (lambda: Solver([0, 1], [[1]], coordinates='score'), "coordinates='score'"),
        (lambda: neural_solver([0.5, 0.5], torch.ones(2, 2)), 'strictly lower'),
        (lambda: neural_solver([1.5, -0.5], torch.zeros(2, 2)), 'positive'),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
