"Short searches on an exact field, for the tests of searches."

import pytest
import torch

from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.recipes import METHODS, Phase
from neuralsolver.solver_search import search
from neuralsolver.teachers import teacher_trajectories
from neuralsolver.utils import indexed_noise

CENTRES = [[1.2, -0.4], [-0.8, 1.0], [0.3, 0.9], [-1.1, -1.3], [1.6, 1.1]]
CENTRES = torch.tensor(CENTRES, dtype=torch.float64)
POOL = indexed_noise(range(60), (2,), seed=1, dtype=torch.float64)
TRAIN = 48  # the rest is held out
FIELD, VP = GaussianMixture(CENTRES, 0.2), GaussianMixture(CENTRES, 0.2, path=VPPath())
GRADIENT = [name for name, recipe in METHODS.items() if hasattr(recipe, 'iterations')]
SHORT = dict(iterations=12, eval_every=4, batch_size=16, race=0)
BRIEF = {
    'gauss-newton': dict(
        race=2,
        phases=(
            Phase(1.0, 2, members=24),
            Phase(0.0, 2, runners=1),
            Phase(0.0, 2, scale=0.1),
        ),
    )
}
TEACHERS = {
    field.path: teacher_trajectories(field, POOL, steps=40, progress=False) for field in (FIELD, VP)
}
TEACHER = TEACHERS[LinearPath()]
fields = pytest.mark.parametrize('field', [FIELD, VP], ids=['linear', 'vp'])


def run(field=FIELD, steps=4, method='ours', **settings):
    "A short search, without a race of starts."
    given = dict(noise=POOL, teacher=TEACHERS[field.path], heldout=12, progress=False)
    short = SHORT if method in GRADIENT else BRIEF.get(method, {})
    return search(field, steps=steps, method=method, **given | short | settings)


def ratios(solver):
    return solver.weights / solver.span[:, None]  # M


def close(a, b, atol):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_solver(a, b, atol):
    close(a.nodes, b.nodes, atol)
    close(a.weights, b.weights, atol)


def same_search(a, b):
    return (a.solver.digest, a.history, a.cost) == (b.solver.digest, b.history, b.cost)


class Interrupted(Exception):
    pass


class Watched:
    "A field that keeps what it is asked; `factor(self)` scales answers, `last` bounds gradients."

    path = LinearPath()

    def __init__(self, factor=None, last=None):
        self.factor, self.last = factor, last
        self.calls, self.graded = [], 0

    def __call__(self, x, t):
        if torch.is_grad_enabled():
            if self.graded == self.last:
                raise Interrupted
            self.graded += 1
        self.calls.append((t.item(), x.detach().clone(), torch.is_grad_enabled()))
        return FIELD(x, t) * (1 if self.factor is None else self.factor(self))

    @property
    def begun(self):
        "Batches of the student at its start."
        return [x for t, x, grad in self.calls if t == 0 and grad]


def nan_at(*iterations, steps=4):
    "No numbers in some iterations."

    def factor(field):
        bad = torch.is_grad_enabled() and (field.graded - 1) // steps in iterations
        return float('nan') if bad else 1

    return factor


# Numbers: what commit db3acad (before the recipes) answers to
# search(field, N, POOL, teacher=40, iterations=120, lr=.004, batch_size=16, seed=3, heldout=12).
# Coefficients of the best iterate in units of lr, its nodes, first and last loss, held-out history.
FROZEN = {
    'linear-5': (
        FIELD,
        [[], [-70], [-70, -70], [0, 0, -70], [0, 0, 0, -70]],
        [0.0, 0.25257232424048687, 0.4678002616067778, 0.6571692895848406, 0.8333830208281646, 1.0],
        [0.21054991555329639, 0.08409787692346354],
        [
            0.11665505897943824,
            0.09923282059733111,
            0.08482456612796573,
            0.0741526662222519,
            0.06492956588249679,
            0.05286199170010793,
            0.03815364449898839,
            0.02576182616383993,
            0.03099464001214795,
            0.04876010769952796,
            0.0647873062912439,
            0.07441647602790072,
            0.06880716110799553,
        ],
    ),
    'linear-7': (
        FIELD,
        [
            [],
            [-20],
            [-20, -20],
            [-20, -20, -20],
            [-20, -20, -20, -20],
            [-12, -10, -8, -8, -2],
            [-2, -2, -2, 0, -6, -20],
        ],
        [
            0.0,
            0.15100707895229715,
            0.3020141579045943,
            0.44944021115800636,
            0.5945262178526145,
            0.7384561668899292,
            0.8713202555808699,
            1.0,
        ],
        [0.14254069952793666, 0.024574761576462184],
        [
            0.10053598521780563,
            0.06761734484555226,
            0.02552507184466528,
            0.027769927848415116,
            0.031068545660964036,
            0.03255052056690885,
            0.03785763935456935,
            0.04433038307405407,
            0.04958092627708411,
            0.045663233934135204,
            0.046829558920971806,
            0.0483985821597311,
            0.046328306550845674,
        ],
    ),
    'vp-6': (
        VP,
        [[], [-50], [-50, -50], [-50, -50, -50], [0, 0, 0, -50], [0, 0, 0, 0, -50]],
        [
            0.999,
            0.811756526790749,
            0.624513053581498,
            0.43726958037224695,
            0.250026107162996,
            0.12451305358149789,
            0.001,
        ],
        [0.2577919649805643, 0.06723967463288263],
        [
            0.15599818106182803,
            0.13296714512263158,
            0.11018806125686008,
            0.0871524970862525,
            0.06504878951478454,
            0.05040299902922583,
            0.056747935207407466,
            0.08301583338112785,
            0.10071574537037531,
            0.09227782437212384,
            0.07658722194371634,
            0.06370710830183983,
            0.07415790122142696,
        ],
    ),
}
