"Teachers: dense output against scipy, slopes against recorded calls, what is read from a file."

from dataclasses import replace
import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from torch.utils._python_dispatch import TorchDispatchMode
from neuralsolver.exponential import ddim, deis, ipndm
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.classical import adams_bashforth, euler, heun
from neuralsolver.solvers import sample
from neuralsolver.teachers import Teacher, teacher_trajectories
from neuralsolver.utils import indexed_noise

CENTRES = torch.tensor(
    [[1.2, -0.4], [-0.8, 1.0], [0.3, 0.9], [-1.1, -1.3], [1.6, 1.1]], dtype=torch.float64
)
LABELS = torch.tensor([0, 1, 2, 0, 1])
ASKED, CALLS = 12, 3  # evaluations of the identity: four members at three nodes
POOL = indexed_noise(range(40), (2,), seed=1, dtype=torch.float64)


def mixture(path=LinearPath(), dtype=torch.float64):
    return GaussianMixture(CENTRES.to(dtype), 0.3, LABELS, path=path)


def make(field=None, noise=POOL, **kwargs):
    return teacher_trajectories(
        field or mixture(), noise, **{'steps': 10, 'progress': False} | kwargs
    )


class Recorded:
    "A field that keeps what it answered."

    def __init__(self, field, answers=None):
        self.field, self.path, self.answers = field, field.path, [] if answers is None else answers

    def on(self, path, coordinates):
        return type(self)(self.field.on(path, coordinates), self.answers)

    def __call__(self, x, t, *cond):
        self.answers.append(self.field(x, t, *cond))
        return self.answers[-1]

    @property
    def trajectories(self) -> int:
        return sum(map(len, self.answers))


VP = dict(t_start=VPPath().t_start)
TEACHERS = {  # by name: path, solver of L = 12 evaluations
    'euler': (LinearPath(), euler(12)),
    'ab2': (LinearPath(), adams_bashforth(12, 2)),
    'ab4': (LinearPath(), adams_bashforth(12, 4)),
    'ab4 on a cubic grid': (
        LinearPath(),
        adams_bashforth(12, 4, torch.linspace(0, 1, 13, dtype=torch.float64) ** 3),
    ),
    'ddim': (VPPath(), ddim(12, **VP)),
    'dpm-solver++2m': (VPPath(), dpm_solver_pp(12, 2, **VP)),
    'dpm-solver++3m, log-snr': (VPPath(), dpm_solver_pp(12, 3, spacing='log-snr', **VP)),
    'deis': (VPPath(), deis(12, 3, **VP)),
    'ipndm': (VPPath(), ipndm(12, 4, VPPath(), **VP)),
    'ddim on the DDPM path': (DDPMPath(), ddim(12, DDPMPath(), t_start=DDPMPath().t_start)),
}
of_each_kind = pytest.mark.parametrize('name', TEACHERS)


@of_each_kind
def test_slopes_are_the_calls_that_were_made(name):
    path, solver = TEACHERS[name]
    field = Recorded(mixture(path))
    T = make(field, solver=solver)
    assert len(field.answers) == solver.nfe
    torch.testing.assert_close(T.slopes(), torch.stack(field.answers), rtol=0, atol=1e-8)
    some = torch.tensor([7, 0, 31])
    torch.testing.assert_close(
        T.slopes(some), torch.stack(field.answers)[:, some], rtol=0, atol=1e-8
    )


@of_each_kind
def test_dense_output_is_the_cubic_hermite_spline_of_scipy(name):
    "In y = x / c over s; after the last node nothing was evaluated: the parabola's slope."
    path, solver = TEACHERS[name]
    field = Recorded(mixture(path))
    T = make(field, solver=solver)

    def change(t):  # (c, s) of the coordinates by their definition
        a, b = path.alpha(t).numpy(), path.sigma(t).numpy()
        if solver.coordinates == 'velocity':
            return np.ones_like(b), t.numpy()
        return (b, a / b) if solver.coordinates == 'data' else (a, b / a)

    sign = -1 if solver.coordinates == 'noise' else 1  # scipy wants s to rise
    c, s = change(solver.nodes)
    y, q = T.states.numpy() / c[:, None, None], torch.stack(field.answers).numpy()
    last = 2 * (y[-1] - y[-2]) / (s[-1] - s[-2]) - q[-1]
    spline = CubicHermiteSpline(sign * s, y, sign * np.concatenate([q, last[None]]))
    times = torch.lerp(
        solver.nodes[0],
        solver.nodes[-1],
        torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )  # in any order
    c, s = change(times)
    right = torch.from_numpy(c[:, None, None] * spline(sign * s))
    torch.testing.assert_close(T.at(times), right, rtol=0, atol=1e-8)
    some = torch.tensor([3, 39, 3])
    torch.testing.assert_close(T.at(times, some), right[:, some], rtol=0, atol=1e-8)
    torch.testing.assert_close(T.at(times, slice(4, 9)), right[:, 4:9], rtol=0, atol=1e-8)


@pytest.mark.parametrize('name', ['ddim', 'dpm-solver++2m', 'ipndm'])
def test_dense_output_is_differentiable_in_the_times_on_the_vp_path(name):
    path, solver = TEACHERS[name]
    T = make(mixture(path), POOL[:3], solver=solver)
    times = torch.tensor([0.92, 0.51, 0.13, 0.02], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(T.at, [times], eps=1e-7, atol=1e-5)


@of_each_kind
def test_the_pool_in_single_precision_has_its_own_type_and_the_digits_of_it(name):
    path, solver = TEACHERS[name]
    exact, T = (
        make(mixture(path), solver=solver),
        make(mixture(path, torch.float32), POOL.float(), solver=solver),
    )
    times = torch.lerp(
        solver.nodes[0], solver.nodes[-1], torch.linspace(0, 1, 30, dtype=torch.float64)
    )
    assert {T.states.dtype, T.ends.dtype, T.slopes().dtype, T.at(times).dtype} == {torch.float32}
    assert (T.states - exact.states).abs().max() < 2e-5 and (
        T.at(times) - exact.at(times)
    ).abs().max() < 1e-4


def with_gains():
    return replace(adams_bashforth(6, 2), gains=torch.linspace(0.9, 1.1, 6, dtype=torch.float64))


def test_gains_of_a_solver_are_part_of_its_slopes():
    "Such a solver is not made a teacher; the algebra of its states holds nevertheless."
    solver, field = with_gains(), Recorded(mixture())
    states = sample(field, POOL, solver, trajectory=True)
    torch.testing.assert_close(
        Teacher(POOL, None, solver, states).slopes(), torch.stack(field.answers), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize('solver', [with_gains(), heun(6)], ids=['gains', 'two evaluations'])
def test_what_cannot_be_a_teacher_is_refused_before_it_is_asked(tmp_path, solver):
    field = Recorded(mixture())
    with pytest.raises(ValueError, match='cannot be a teacher'):
        make(field, solver=solver, folder=tmp_path / 'new')
    assert not field.answers and not (tmp_path / 'new').exists()


@pytest.mark.parametrize('folder', [False, True])
def test_the_batch_size_changes_nothing(tmp_path, folder):
    whole = make(cond=LABELS.repeat(8), batch_size=40)
    for size in (1, 7, 250):
        T = make(
            cond=LABELS.repeat(8), batch_size=size, folder=tmp_path / str(size) if folder else None
        )
        torch.testing.assert_close(T.states, whole.states, rtol=0, atol=1e-12)
        torch.testing.assert_close(T.slopes(), whole.slopes(), rtol=0, atol=1e-10)


def test_every_trajectory_has_its_own_condition(tmp_path):
    cond = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    T = make(cond=cond, batch_size=16, folder=tmp_path)
    for k in range(3):
        torch.testing.assert_close(
            T[cond == k].states,
            sample(mixture(), POOL[cond == k], T.solver, cond[cond == k], trajectory=True),
            rtol=0,
            atol=1e-12,
        )
    assert (T[cond == 1].cond == 1).all() and (
        make(cond=(cond + 1) % 3).ends - T.ends
    ).abs().max() > 0.1


def test_a_folder_of_other_conditions_is_refused_even_if_the_first_ones_are_equal(tmp_path):
    cond = LABELS.repeat(8)
    make(cond=cond, folder=tmp_path)
    other = cond.clone()
    other[30] = (other[30] + 1) % 3
    with pytest.raises(ValueError, match=r'another teacher \(conditions: '):
        make(cond=other, folder=tmp_path)
    with pytest.raises(ValueError, match='conditions'):
        make(folder=tmp_path)


class Largest(TorchDispatchMode):
    "The largest tensor that is made, views of `source` aside."

    def __init__(self, source):
        super().__init__()
        self.source, self.numel = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for v in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() != self.source:
                self.numel = max(self.numel, v.numel())
        return out


@pytest.mark.parametrize(
    'index', [torch.tensor([5, 201, 7, 399]), slice(20, 24)], ids=['tensor', 'slice']
)
def test_dense_output_of_some_members_reads_these_only(tmp_path, index):
    "3 times of 4 members in the plane: two nodes and two slopes each, whatever the pool has."
    pool = indexed_noise(range(400), (2,), seed=2, dtype=torch.float64)
    T = make(noise=pool, steps=6, folder=tmp_path)
    times = torch.tensor([0.1, 0.52, 0.9], dtype=torch.float64)
    with Largest(T.states) as seen:
        part = T.at(times, index)
    assert 0 < seen.numel <= 2 * 3 * 4 * 2
    with Largest(T.states) as seen:
        ends = T[index].ends
    assert seen.numel <= (6 + 1) * 4 * 2
    with Largest(T.states) as seen:
        T.at(times)
    assert seen.numel > 400  # the count sees what is read
    torch.testing.assert_close(part, T.at(times)[:, index], rtol=0, atol=0)
    assert torch.equal(ends, T.ends[index])
