"An exact field of three dimensions and the measures of errors, for tests of solvers and grids."

from functools import partial

import numpy as np
import torch

from neuralsolver.dpm_solvers import dpm_solver, dpm_solver_pp, unipc
from neuralsolver.exponential import ddim, deis, ipndm
from neuralsolver.paths import DDPMPath, VPPath
from neuralsolver.solvers import sample

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CENTERS, STD = rand(4, 3, seed=1) * 1.5, 1.0
X0 = rand(8, 3, seed=2)
VP, DDPM = VPPath(), DDPMPath()
CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)  # of the DDPM table


def rms(x):
    return x.square().mean().sqrt().item()


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def slope(steps, errors):
    "The measured order."
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def count_calls(solver):
    "How often the field is called: at the nodes, in their order."
    seen = []

    def field(x, t):
        seen.append(float(t))
        return -x

    sample(field, torch.ones(2, 1, dtype=F64), solver)
    assert seen == solver.nodes[:-1].tolist()
    return len(seen)


def multistep_dpm_solver(*args, **settings):
    return dpm_solver(*args, singlestep=False, **settings)


def noise_of_mixture(x, a, s):
    "E[eps | x] of the mixture by Bayes' rule with torch.distributions."
    total = (a * STD) ** 2 + s**2
    parts = [torch.distributions.Normal(a * c, total**0.5) for c in CENTERS]
    p = torch.stack([part.log_prob(x).sum(1) for part in parts], 1).softmax(1)
    return s / total * (x - a * (p @ CENTERS))


def alpha_sigma_of_vp(t):
    "By the formula of the path, with numpy."
    log_alpha = -(0.1 * t + 19.9 * t * t / 2) / 2
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


# Every exponential integrator by name, as method(steps, path, **ends)


def _of_order(method, order, **settings):
    def build(steps, path, **ends):
        return method(steps, order, path, **settings, **ends)

    return build


_pp, _dpm = partial(_of_order, dpm_solver_pp), partial(_of_order, dpm_solver)
_unipc, _deis = partial(_of_order, unipc), partial(_of_order, deis)

DATA = {  # predictions of the data
    'ddim': ddim,
    'dpm_solver_pp-2-multi': _pp(2),
    'dpm_solver_pp-3-multi': _pp(3),
    'dpm_solver_pp-3-exact': _pp(3, exact=True),
    'dpm_solver_pp-2-single': _pp(2, singlestep=True),
    'dpm_solver_pp-3-single': _pp(3, singlestep=True),
    'unipc-2-bh1': _unipc(2, variant='bh1'),
    'unipc-2-bh2': _unipc(2),
    'unipc-3-bh1': _unipc(3, variant='bh1'),
    'unipc-3-bh2': _unipc(3),
    'unipc-3-predictor': _unipc(3, corrector=False),
}
NOISE = {  # predictions of the noise
    'dpm_solver-2-single': _dpm(2),
    'dpm_solver-3-single': _dpm(3),
    'dpm_solver-2-multi': _dpm(2, singlestep=False),
    'dpm_solver-3-multi': _dpm(3, singlestep=False),
    'dpm_solver-3-exact': _dpm(3, singlestep=False, exact=True),
    'deis-3-time': _deis(3),
    'deis-4-s': _deis(4, variable='s'),
    'deis-3-log-snr': _deis(3, variable='log-snr'),
    'ipndm-4': _of_order(ipndm, 4),
}
