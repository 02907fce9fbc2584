"Classical solvers and the loop against torchdiffeq, diffusers, scipy and finite differences."

import copy, hashlib, json, threading
from dataclasses import replace
import numpy as np, pytest, torch
from neuralsolver.fields import GaussianMixture
from neuralsolver.neural import CLASSICAL, get_solver, list_solvers, load_solver, neural_solver
from neuralsolver.solvers import save_solver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.exponential import ipndm
from neuralsolver.solvers import Solver, sample
from neuralsolver.classical import adams_bashforth, euler, heun, midpoint, rk4, uniform_grid
from neuralsolver.transfer import change_path

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


# Non-stationary solvers (arXiv 2403.01329)

VP_TIMES = torch.tensor([0.97, 0.8, 0.55, 0.5, 0.2, 0.05], dtype=F64)


def path_of(coordinates):
    return LinearPath() if coordinates == 'velocity' else VPPath()


def non_stationary(coordinates, seed=7):
    "Random a, b of x_{k+1} = a_k x_0 + sum b_kj u_j, and the same as a Solver; a changes its sign."
    a, b = 1 + 0.5 * rand(5, seed=seed), 0.4 * rand(5, 5, seed=seed + 1).tril()
    a[2] *= -1
    nodes = (
        torch.tensor([0, 0.1, 0.35, 0.4, 0.8, 1], dtype=F64)
        if coordinates == 'velocity'
        else VP_TIMES
    )
    gains = a / torch.cat([torch.ones(1, dtype=F64), a[:-1]])
    before = torch.cat([torch.zeros(1, 5, dtype=F64), b[:-1]])
    return (
        a,
        b,
        Solver(
            nodes,
            b - gains[:, None] * before,
            coordinates=coordinates,
            path=path_of(coordinates),
            gains=gains,
        ),
    )


@pytest.mark.parametrize('coordinates', ['velocity', 'data', 'noise', 'flow'])
def test_a_non_stationary_solver_is_the_formula_of_its_paper(coordinates):
    a, b, solver = non_stationary(coordinates)
    field = GaussianMixture(CENTERS, STD, path=solver.path, prediction=coordinates)
    states, u = [X0], []
    for k in range(5):
        u.append(field(states[-1], solver.nodes[k]))
        states.append(a[k] * X0 + sum(b[k, j] * u[j] for j in range(k + 1)))
    torch.testing.assert_close(
        sample(field, X0, solver, trajectory=True), torch.stack(states), rtol=0, atol=1e-12
    )
    scale = solver.scale
    unit = scale[1:] / scale[0]  # y = x / c
    torch.testing.assert_close(solver.start * unit, a, rtol=1e-12, atol=0)
    torch.testing.assert_close(solver.tableau * scale[1:, None], b, rtol=0, atol=1e-12)
    torch.testing.assert_close(solver.influence, b[-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sample(GaussianMixture(CENTERS.float(), STD, path=solver.path), X0.float(), solver),
        states[-1].float(),
        rtol=0,
        atol=1e-4,
    )
    assert count_calls(solver) == solver.nfe == 5 and not solver.consistent


@pytest.mark.parametrize(
    'solver', [adams_bashforth(5, 3), load_solver('dit-xl-2', 5), rk4(2)], ids=lambda s: s.name
)
def test_tableau_start_and_influence_are_responses(solver):
    "Predictions that are unit vectors, whatever the state: the states are the rows. Consistent, then with free gains."
    K = solver.nfe
    for s in (
        solver,
        replace(solver, gains=solver.gain),
        replace(solver, gains=1 + 0.3 * rand(K), weights=rand(K, K, seed=1).tril()),
    ):
        count = iter(range(K))
        states = sample(
            lambda x, t: torch.eye(K + 1, dtype=F64)[[next(count)]],
            torch.eye(K + 1, dtype=F64)[[K]],
            s,
            trajectory=True,
        )[:, 0]
        y = states[1:] / s.scale[1:, None]
        torch.testing.assert_close(y[:, :K], s.tableau, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(y[:, K], s.start / s.scale[0], rtol=1e-11, atol=0)
        torch.testing.assert_close(states[-1, :K], s.influence, rtol=1e-11, atol=1e-12)


def test_with_free_gains_a_linear_equation_is_solved_exactly():
    "dx/dt = rate x: whatever the gain, one weight makes the factor of a step exp(rate h). No consistent Euler step does."
    rate, nodes, gains = (
        -1.7,
        torch.tensor([0, 0.2, 0.3, 1], dtype=F64),
        torch.tensor([0.5, -2.0, 1.0], dtype=F64),
    )
    solver = Solver(nodes, torch.diag(((rate * nodes.diff()).exp() - gains) / rate), gains=gains)
    torch.testing.assert_close(
        sample(lambda x, t: rate * x, X0, solver, trajectory=True),
        X0 * (rate * nodes).exp()[:, None, None],
        rtol=1e-12,
        atol=0,
    )


def test_gradients_with_respect_to_gains_are_the_closed_form():
    "q = rate x: x_1 = (g0 + w00 rate) x_0, x_2 = (g1 + w11 rate) x_1 + w10 rate x_0."
    rate, x0 = 0.7, torch.tensor([1.3], dtype=F64)
    g0, g1, w00, w10, w11 = 1.1, -0.8, 0.3, 0.2, 0.9
    gains, weights = (
        torch.tensor([g0, g1], dtype=F64, requires_grad=True),
        torch.tensor([[w00, 0], [w10, w11]], dtype=F64, requires_grad=True),
    )
    sample(lambda x, t: rate * x, x0, Solver([0, 0.5, 1], weights, gains=gains)).sum().backward()
    x1 = (g0 + w00 * rate) * x0
    torch.testing.assert_close(gains.grad, torch.cat([(g1 + w11 * rate) * x0, x1]))
    torch.testing.assert_close(weights.grad[1], rate * torch.cat([x0, x1]))
    torch.testing.assert_close(weights.grad[0, 0], ((g1 + w11 * rate) * rate * x0)[0])


@pytest.mark.parametrize('other', ['noise', 'flow'])
def test_the_family_is_the_same_whatever_is_predicted(other):
    "q = p x + r q' at every node. With X = s x_0 + L q at the nodes, q = (1 - p L)^-1 (p s x_0 + r q'): linear algebra instead of induction."
    a, b, solver = non_stationary('data')
    alpha, sigma = solver.path.alpha(solver.nodes[:-1]), solver.path.sigma(solver.nodes[:-1])
    p, r = (
        (1 / alpha, -sigma / alpha)
        if other == 'noise'
        else (1 / (alpha + sigma), sigma / (alpha + sigma))
    )  # flow = x_1 - eps
    s, L = (
        torch.cat([torch.ones(1, dtype=F64), a[:-1]]),
        torch.cat([torch.zeros(1, 5, dtype=F64), b[:-1]]),
    )
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) - p[:, None] * L)
    A, B = a + b @ inverse @ (p * s), b @ inverse * r
    gains = A / torch.cat([torch.ones(1, dtype=F64), A[:-1]])
    weights = B - gains[:, None] * torch.cat([torch.zeros(1, 5, dtype=F64), B[:-1]])
    there = replace(solver, coordinates=other, gains=gains, weights=weights.tril())
    assert weights.triu(1).abs().max() < 1e-12
    data, same = (
        sample(
            GaussianMixture(CENTERS, STD, path=solver.path, prediction=c), X0, v, trajectory=True
        )
        for c, v in (('data', solver), (other, there))
    )
    torch.testing.assert_close(same, data, rtol=1e-9, atol=1e-9)
    assert (there.weights - solver.weights).abs().max() > 0.1


@pytest.mark.parametrize('coordinates', ['data', 'noise', 'flow'])
def test_a_non_stationary_solver_on_another_path_passes_through_the_same_states(coordinates):
    _, _, solver = non_stationary(coordinates)
    moved = change_path(solver, LinearPath())
    run = lambda s, x: sample(GaussianMixture(CENTERS, STD, path=s.path), x, s, trajectory=True)
    kappa = moved.path.sigma(moved.nodes) / solver.path.sigma(solver.nodes)
    torch.testing.assert_close(
        moved.path.log_snr(moved.nodes), solver.path.log_snr(solver.nodes), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        run(moved, X0 * kappa[0]), run(solver, X0) * kappa[:, None, None], rtol=1e-9, atol=1e-9
    )
    assert moved.coordinates == dict(flow='velocity').get(coordinates, coordinates)


def test_at_an_end_without_noise_a_moved_solver_stays_finite():
    "Data coordinates on the linear path end at sigma = 0; the VP path ends before. The states keep their size up to what the end cuts off."
    solver = Solver(
        [0.05, 0.4, 0.8, 1], rand(3, 3).tril(), coordinates='data', gains=[0.9, 1.2, 0.4]
    )
    moved = change_path(solver, VPPath())
    assert abs(moved.nodes[-1] - VPPath().t_end) < 1e-9
    kappa = 1 / torch.hypot(solver.nodes, 1 - solver.nodes)  # on VP, alpha^2 + sigma^2 = 1
    torch.testing.assert_close(moved.weights, solver.weights * kappa[1:, None], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        moved.gains, solver.gains * kappa[1:] / kappa[:-1], rtol=1e-9, atol=0
    )


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


# JSON


def every_solver():
    for name in CLASSICAL:
        yield get_solver(name, 7)
    for name, counts in list_solvers().items():
        for steps in counts:
            yield load_solver(name, steps)
    kwargs = dict(name='mine', params=3, provenance={'seed': 1, 'who': ['é']})
    yield neural_solver(
        [0.1, 0.7], [[0, 0], [-1 / 3, 0]], 'noise', VPPath(0.05, 15.0, 1e-4), 0.8, **kwargs
    )
    yield non_stationary('data')[2]


def test_json_round_trip_is_bitwise(tmp_path):
    for i, solver in enumerate(every_solver()):
        save_solver(solver, tmp_path / f'{i}.json')
        again = load_solver(tmp_path / f'{i}.json')
        for a, b in ((again.nodes, solver.nodes), (again.weights, solver.weights)):
            assert a.numpy().tobytes() == b.numpy().tobytes()
        assert again.path == solver.path and (again.gains is None) == (solver.gains is None)
        if solver.gains is not None:
            assert again.gains.numpy().tobytes() == solver.gains.numpy().tobytes()
        for key in ('name', 'steps', 'nfe', 'coordinates', 'params', 'provenance', 'digest'):
            assert getattr(again, key) == getattr(solver, key), key


GOOD = load_solver('sit-xl-2', 5).to_dict()


def broken(*keys, value):
    "The good solver with one entry replaced, as JSON."
    d = inner = copy.deepcopy(GOOD)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(d)


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        '3',
        'null',
        '{}',
        *(
            json.dumps({k: v for k, v in GOOD.items() if k != gone})
            for gone in GOOD
            if gone != 'nfe'
        ),
        broken('nodes', value=GOOD['nodes'][:-1]),
        broken('nodes', 1, value=None),
        broken('nodes', 1, value=0.9),
        broken('nodes', value='0 1'),
        broken('weights', value=GOOD['weights'][:-1]),
        broken('weights', value=None),
        broken('weights', value=[]),
        broken('weights', 0, 0, value='x'),
        broken('weights', 2, value=[*GOOD['weights'][2], 0.1]),
        broken('weights', 4, 0, value=float('nan')),
        broken('coordinates', value='score'),
        broken('gains', value=[1.0, 1.0]),
        broken('gains', value='11111'),
        broken('gains', value=[1.0, 1.0, 1.0, 1.0, 0.0]),
        broken('gains', value=[1, 1, 1, 1, None]),
        broken('path', 'name', value='cosine'),
        broken('path', 'rate', value=1),
        broken('path', value='linear'),
    ],
)
def test_malformed_files_are_value_errors_that_name_the_file(tmp_path, text):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(ValueError, match=r'bad\.json: '):
        load_solver(tmp_path / 'bad.json')


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(ValueError, match=r'none\.json'):
        load_solver(tmp_path / 'none.json')
    (tmp_path / 'bin.json').write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r'bin\.json'):
        load_solver(tmp_path / 'bin.json')


@pytest.mark.parametrize(
    'key, value',
    [
        ('steps', 'x'),
        ('steps', 2.5),
        ('steps', -1),
        ('params', 'many'),
        ('provenance', []),
        ('name', 3),
    ],
)
def test_entries_of_the_wrong_type_are_value_errors(key, value):
    with pytest.raises(ValueError, match=key):
        Solver.from_dict(GOOD | {key: value})
