"What exponential integrators and time grids refuse: the error names the argument."

import pytest
from exact_cases import DDPM, VP

from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.exponential import ddim, deis, ipndm, ipndm_v
from neuralsolver.optimized_grids import GRIDS, optimized_nodes
from neuralsolver.paths import LinearPath, ShiftedPath
from neuralsolver.spacings import time_grid

LINEAR, FINITE = LinearPath(), 'finite signal-to-noise'


def refused(said, function, args, settings):
    with pytest.raises(ValueError, match=said):
        function(*args, **settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((4, VP, 'cosine'), {}, "spacing='cosine'"),
        ((0,), {}, 'steps=0'),
        ((4, VP), dict(t_start=1.5), 't_start=1.5'),
        ((4, VP), dict(t_start=0.1, t_end=0.5), 'nearer to noise'),
        ((4, LINEAR), dict(t_start=0.5, t_end=0.5), 'nearer'),
        ((4, VP, 'karras'), dict(rho=0), 'rho=0'),
        ((4, VP, 'shifted'), dict(shift=0), 'shift=0'),
        ((4, LINEAR, 'log-snr'), {}, FINITE),
        ((4, DDPM, 'karras'), dict(t_end=0.0), 'finite'),
    ],
)
def test_refusal_of_time_grid(args, settings, said):
    refused(said, time_grid, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((5, LINEAR), {}, FINITE),
        ((5, VP, 'optimized'), {}, "init='optimized'"),
        ((5,), dict(order=4), 'order=4'),
        ((5,), dict(method='BFGS'), "method='BFGS'"),
    ],
)
def test_refusal_of_optimized_nodes(args, settings, said):
    refused(said, optimized_nodes, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((2.5,), {}, 'steps=2.5'),
        ((4, VP, 'cosine'), {}, f"spacing='cosine'.*{', '.join(GRIDS)}"),
        ((4, VP, [1, 0.5, 0.1]), {}, r'steps \+ 1 = 5'),
        ((2, VP, [1, 0.1, 0.5]), {}, 'monotone'),
        ((2, VP, [0.1, 0.5, 1]), {}, 'from noise'),
        ((2, VP, [1, float('nan'), 0.1]), {}, 'monotone'),
        ((2, VP, [1.5, 1, 0.5]), {}, 'from noise'),
        ((5, DDPM, 'optimized'), dict(t_end=0.0), 'finite'),
    ],
)
def test_refusal_of_ddim(args, settings, said):
    "And of every grid that is given to a solver."
    refused(said, ddim, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 4), {}, 'order=4'),
        ((8,), dict(start='heun'), "start='heun'"),
        ((8,), dict(singlestep=True, exact=True), 'singlestep'),
        ((7, 2), dict(singlestep=True, finish='full'), 'multiple of 2'),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
        ((6, 2, LINEAR), {}, f'{FINITE}.*t_start'),
        ((1, 2, DDPM), dict(start='rk4', t_end=0.0), FINITE),
    ],
)
def test_refusal_of_dpm_solver_pp(args, settings, said):
    refused(said, dpm_solver_pp, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 0), {}, 'order=0'),
        ((8,), dict(finish='lower'), "finish='lower'"),
        ((8,), dict(start='rk4'), 'singlestep'),
        ((8, 3), dict(finish='full'), 'multiple of 3'),
    ],
)
def test_refusal_of_dpm_solver(args, settings, said):
    refused(said, dpm_solver, args, settings)


@pytest.mark.parametrize('method', [dpm_solver, dpm_solver_pp])
def test_refusal_of_a_clean_end_does_not_advise_what_is_given(method):
    "A last step of order 2 cannot reach sigma = 0; finish='low-order' is the default already."
    with pytest.raises(ValueError, match='cannot end at a clean state') as error:
        method(6, 2, DDPM, singlestep=True, t_end=0.0)
    assert 'low-order' not in str(error.value)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        (('5',), {}, "steps='5'"),
        ((8, 4), {}, 'order=4'),
        ((8,), dict(variant='bh3'), "variant='bh3'"),
        ((8,), dict(finish='lower'), "finish='lower'"),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
    ],
)
def test_refusal_of_unipc(args, settings, said):
    refused(said, unipc, args, settings)


@pytest.mark.parametrize(
    'args, settings, said',
    [
        ((8, 5), {}, 'order=5'),
        ((8,), dict(variable='sigma'), "variable='sigma'"),
        ((6, 2, DDPM), dict(t_end=0.0, finish='full'), f'{FINITE}.*low-order'),
        ((6, 2, LINEAR), {}, 't_start'),
    ],
)
def test_refusal_of_deis(args, settings, said):
    refused(said, deis, args, settings)


@pytest.mark.parametrize(
    'method, args, settings, said',
    [
        (ipndm, (8, 5), {}, 'order=5'),
        (ipndm, (6, 4, ShiftedPath()), {}, 't_start'),
        (ipndm_v, (8, 0), {}, 'order=0'),
        (ipndm_v, (6, 2, DDPM), dict(t_end=0.0), FINITE),
    ],
)
def test_refusal_of_ipndm(method, args, settings, said):
    refused(said, method, args, settings)
