"Exponential integrators give the same values as diffusers on its own nodes."

import numpy as np
import pytest
import torch
from exact_cases import CENTERS, CUMPROD, DDPM, F64, STD, X0
from exact_cases import multistep_dpm_solver, noise_of_mixture, rand, relative

from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.exponential import deis, ipndm
from neuralsolver.fields import GaussianMixture
from neuralsolver.solvers import sample

pytestmark = pytest.mark.filterwarnings(  # its algorithm_type='dpmsolver'
    'ignore::FutureWarning', 'ignore::DeprecationWarning:diffusers.*'
)
A, B = rand(3, 3, seed=3), rand(3, seed=4)


def sine(x, i):
    "A noise prediction without structure, at an index of the table."
    return torch.sin(x @ A + B * (i + 1) / 1000)


def mixture(x, i):
    "The noise prediction of the mixture at an index of the table."
    return noise_of_mixture(x, CUMPROD[i].sqrt(), (1 - CUMPROD[i]).sqrt())


def our_sine(coordinates):
    "The same prediction in our time, as the solver wants it."

    def field(x, t):
        i = round(1000 * t.item()) - 1
        assert abs(1000 * t - i - 1) < 1e-9
        return DDPM.convert(x, t, sine(x, i), 'noise', coordinates)

    return field


def reference_loop(scheduler, steps, field):
    "The nodes in our time, and the result."
    scheduler.set_timesteps(steps)
    index = scheduler.timesteps.tolist()
    assert steps == len(index)
    ratio = ((1 - CUMPROD) / CUMPROD).sqrt()
    zero = scheduler.sigmas[-1] == 0
    sigmas = torch.cat([ratio[index], 0 * ratio[:1] if zero else ratio[:1]])
    # 1 - cumprod cancels in their float32
    torch.testing.assert_close(scheduler.sigmas, sigmas.float(), rtol=5e-4, atol=0)
    scheduler.sigmas = sigmas
    x = X0
    for i in index:
        x = scheduler.step(field(x, i), i, x, return_dict=False)[0]
    last = 0 if zero else 0.001
    return torch.tensor([*((i + 1) / 1000 for i in index), last], dtype=F64), x


def assert_same_loop(scheduler, steps, build, tolerance=1e-11, fields=(sine,)):
    for field in fields:
        nodes, expected = reference_loop(scheduler, steps, field)
        solver = build(steps, nodes)
        ours = GaussianMixture(CENTERS, STD, path=DDPM)
        if field is sine:
            ours = our_sine(solver.coordinates)
        error = relative(sample(ours, X0, solver), expected)
        assert error < tolerance, (field.__name__, steps, error)
        assert solver.nfe == steps


def both_fields_first(cases):
    "The cases, each with its fields: the exact mixture is asked once, the other always."
    for k, case in enumerate(cases):
        yield *case, (sine, mixture) if k == 0 else (sine,)


MULTISTEP_CASES = (  # lower_order_final, final_sigmas_type, steps
    (True, 'sigma_min', 10),
    (False, 'sigma_min', 5),
    (True, 'sigma_min', 16),
    (True, 'zero', 5),
    (False, 'zero', 8),
    (True, 'zero', 16),
)


@pytest.mark.parametrize(
    'kind, order', [('midpoint', 1), ('midpoint', 2), ('midpoint', 3), ('heun', 2)]
)
@pytest.mark.parametrize('algorithm', ['dpmsolver++', 'dpmsolver'])
def test_multistep_dpm_solver_is_diffusers(algorithm, kind, order):
    "Their 'heun' of order 2 is the exact integral. They cast the state to float32 in every step."
    from diffusers import DPMSolverMultistepScheduler

    data = algorithm == 'dpmsolver++'
    method = dpm_solver_pp if data else multistep_dpm_solver
    for lower, last, steps, fields in both_fields_first(MULTISTEP_CASES):
        # they ignore lower_order_final from 15 steps on; sigma = 0 then lowers the last step alone
        short = lower and steps < 15
        if last == 'zero' and order == 3 and not short:
            continue  # orders ..., 3, 3, 1, which is neither finish of ours
        if last == 'zero' and not data:
            continue  # refused by them
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type=algorithm,
            solver_type=kind,
            lower_order_final=lower,
            final_sigmas_type=last,
        )
        finish = 'low-order' if short or last == 'zero' else 'full'

        def build(n, grid):
            return method(n, order, DDPM, grid, exact=kind == 'heun', finish=finish)

        assert_same_loop(scheduler, steps, build, 1e-5, fields)


SINGLESTEP_CASES = (  # lower_order_final, final_sigmas_type, steps
    (True, 'sigma_min', 5),
    (False, 'sigma_min', 10),
    (True, 'zero', 9),
)


@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('algorithm', ['dpmsolver++', 'dpmsolver'])
def test_singlestep_dpm_solver_is_diffusers(algorithm, order):
    """Not an even number with lower_order_final: it ends in two first-order steps there.

    Here and in the paper it ends in one step of order 2.
    """
    from diffusers import DPMSolverSinglestepScheduler

    method = dpm_solver_pp if algorithm == 'dpmsolver++' else dpm_solver
    for lower, last, steps, fields in both_fields_first(SINGLESTEP_CASES):
        if last == 'zero' and algorithm == 'dpmsolver':
            continue  # refused by them
        scheduler = DPMSolverSinglestepScheduler(
            solver_order=order,
            algorithm_type=algorithm,
            lower_order_final=lower,
            final_sigmas_type=last,
        )

        def build(n, grid):
            return method(n, order, DDPM, grid, singlestep=True)

        assert_same_loop(scheduler, steps, build, fields=fields)


UNIPC_CASES = (  # lower_order_final, final_sigmas_type, steps
    (True, 'sigma_min', 16),
    (False, 'sigma_min', 10),
    (True, 'zero', 8),
)


@pytest.mark.parametrize('corrector', [True, False])
@pytest.mark.parametrize('order', [1, 2, 3])
@pytest.mark.parametrize('variant', ['bh1', 'bh2'])
def test_unipc_is_diffusers(variant, order, corrector):
    from diffusers import UniPCMultistepScheduler

    for lower, last, steps, fields in both_fields_first(UNIPC_CASES):
        if last == 'zero' and variant == 'bh1':
            continue  # NaN there: B(h) = -h is infinite, times a correction of 0
        scheduler = UniPCMultistepScheduler(
            solver_order=order,
            solver_type=variant,
            predict_x0=True,
            lower_order_final=lower,
            final_sigmas_type=last,
            disable_corrector=[] if corrector else list(range(steps)),
        )
        finish = 'low-order' if lower else 'full'

        def build(n, grid):
            return unipc(n, order, DDPM, grid, variant, corrector, finish=finish)

        assert_same_loop(scheduler, steps, build, fields=fields)


@pytest.mark.parametrize('order', [1, 2, 3])
def test_deis_in_log_snr_is_diffusers(order):
    "It ends at the table's first sigma, and ignores lower_order_final from 15 steps on."
    from diffusers import DEISMultistepScheduler

    for lower, steps, fields in both_fields_first(((True, 5), (False, 8), (True, 16))):
        finish = 'low-order' if lower and steps < 15 else 'full'
        scheduler = DEISMultistepScheduler(solver_order=order, lower_order_final=lower)

        def build(n, grid):
            return deis(n, order, DDPM, grid, 'log-snr', finish=finish)

        assert_same_loop(scheduler, steps, build, fields=fields)


@pytest.mark.parametrize('steps', [5, 10])
def test_ipndm_is_diffusers(steps):
    """Its trained_betas are the sigmas of the nodes.

    It takes v = alpha eps - sigma x_0, which it turns into eps.
    """
    from diffusers import IPNDMScheduler

    index = np.linspace(0, 999, steps + 1).round()[::-1][:-1].astype(int).tolist()
    sigma = torch.cat([(1 - CUMPROD[index]).sqrt(), torch.zeros(1, dtype=F64)])
    grid = torch.tensor([*((i + 1) / 1000 for i in index), 0], dtype=F64)
    for field in (sine, mixture):
        scheduler, x = IPNDMScheduler(trained_betas=sigma.tolist()), X0
        scheduler.set_timesteps(steps)
        scheduler.betas, scheduler.alphas = sigma, (1 - sigma**2).sqrt()
        # their float32 times coincide near pure noise, and the first step would be skipped
        scheduler.set_begin_index(0)
        for k, i in enumerate(index):
            v = (field(x, i) - sigma[k] * x) / scheduler.alphas[k]
            x = scheduler.step(v, scheduler.timesteps[k], x).prev_sample

        def ours(x, t):
            return field(x, round(1000 * t.item()) - 1)

        result = sample(ours, X0, ipndm(steps, 4, DDPM, grid))
        assert relative(result, x) < 1e-9  # the detour by v costs digits
