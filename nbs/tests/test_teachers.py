"Teachers: dense output against scipy, slopes against recorded calls, folders that were killed, cut, tampered with or in use."

import fcntl, json, os, subprocess, sys, threading, time
from dataclasses import replace
from hashlib import sha256
import numpy as np, pytest, torch
from scipy.interpolate import CubicHermiteSpline
from torch.utils._python_dispatch import TorchDispatchMode
from neuralsolver import teachers
from neuralsolver.exponential import ddim, deis, ipndm
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.fields import GaussianMixture
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.classical import adams_bashforth, euler, heun
from neuralsolver.solvers import sample
from neuralsolver.teachers import (
    Teacher,
    teacher_error,
    teacher_trajectories,
    trajectory_identity,
    what_differs,
)
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
        return dict(
            velocity=lambda: (np.ones_like(b), t.numpy()),
            data=lambda: (b, a / b),
            noise=lambda: (a, b / a),
        )[solver.coordinates]()

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
    with pytest.raises(ValueError, match=r'another teacher \(conditions differ\)'):
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


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])
from test_teachers import CALLS, make, mixture, Recorded, teachers
def die(): os.kill(os.getpid(), signal.SIGKILL)
class Dies(Recorded):
    def __call__(self, x, t): return die() if len(self.answers) == CALLS + 3 * 10 + 5 else super().__call__(x, t)
def in_batch(folder): make(Dies(mixture()), folder=folder, batch_size=8)
def before_card(folder):
    write, calls = teachers.write_json, []
    teachers.write_json = lambda *args: die() if len(calls) == 2 else (calls.append(1), write(*args))
    make(folder=folder, batch_size=8)
for kind in (in_batch, before_card):
    if not (child := os.fork()): kind(f'{sys.argv[2]}/{kind.__name__}'); os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, kind
"""


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path):
    "SIGKILL in the fourth batch of 8, and after the third was written but not yet entered in the card."
    here = os.path.dirname(__file__)
    run = subprocess.run(
        [sys.executable, '-c', KILLED, here, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    whole = make(batch_size=8)
    for kind, done in (('in_batch', 24), ('before_card', 16)):
        assert json.loads((tmp_path / kind / 'card.json').read_text())['done'] == done
        field = Recorded(mixture())
        T = make(field, folder=tmp_path / kind, batch_size=8)
        assert field.trajectories == ASKED + (40 - done) * 10  # the identity, and what was missing
        assert torch.equal(T.states, whole.states) and torch.equal(
            make(folder=tmp_path / kind).states, whole.states
        )


def stopped(folder, done=24):
    "A folder in which `done` trajectories are finished, by batches of 8."

    class Stops(Recorded):
        def __call__(self, x, t):
            if len(self.answers) == CALLS + done // 8 * 10 + 1:
                raise KeyboardInterrupt
            return super().__call__(x, t)

    with pytest.raises(KeyboardInterrupt):
        make(Stops(mixture()), folder=folder, batch_size=8)
    assert json.loads((folder / 'card.json').read_text())['done'] == done


def edit(folder, **entries):
    card = folder / 'card.json'
    card.write_text(json.dumps(json.loads(card.read_text()) | entries))


@pytest.mark.parametrize('members', [40, 12])
def test_states_without_a_card_are_made_again(tmp_path, members):
    "Also if the file has another shape."
    make(noise=POOL[:members], folder=tmp_path)
    (tmp_path / 'card.json').unlink()
    field = Recorded(mixture())
    assert (
        torch.equal(make(field, folder=tmp_path).states, make().states)
        and field.trajectories == ASKED + 400
    )


def test_a_card_without_states_makes_them_again(tmp_path):
    make(folder=tmp_path)
    (tmp_path / 'states.npy').unlink()
    field = Recorded(mixture())
    assert (
        torch.equal(make(field, folder=tmp_path).states, make().states)
        and field.trajectories == ASKED + 400
    )


def cut(folder, rows):
    "Cut the file after some trajectories."
    with open(folder / 'states.npy', 'r+b') as f:
        f.truncate(128 + rows * 11 * 2 * 8)


def test_a_cut_file_is_noticed(tmp_path):
    make(folder=tmp_path)
    cut(tmp_path, 30)
    for _ in range(2):  # opening it does not heal it
        with pytest.raises(ValueError, match='damaged'):
            make(folder=tmp_path)


def test_a_file_of_another_shape_or_type_is_refused_and_left_alone(tmp_path):
    make(folder=tmp_path)
    file = tmp_path / 'states.npy'
    for other in (np.zeros((40, 11, 3)), np.zeros((40, 11, 2), np.float32)):
        np.save(file, other)
        before = file.read_bytes()
        with pytest.raises(ValueError, match='delete'):
            make(folder=tmp_path)
        assert file.read_bytes() == before


def test_a_card_that_counts_too_few_costs_time_only(tmp_path):
    stopped(tmp_path)
    edit(tmp_path, done=11)
    field = Recorded(mixture())
    assert (
        torch.equal(make(field, folder=tmp_path, batch_size=8).states, make(batch_size=8).states)
        and field.trajectories == ASKED + 29 * 10
    )


def test_a_cut_file_is_noticed_before_it_is_finished(tmp_path):
    stopped(tmp_path)
    cut(tmp_path, 10)
    size = (tmp_path / 'states.npy').stat().st_size
    for _ in range(2):  # opening it does not fill it with zeros
        with pytest.raises(ValueError, match='damaged'):
            make(folder=tmp_path, batch_size=8)
    assert (tmp_path / 'states.npy').stat().st_size == size


@pytest.mark.parametrize('done', [40, 45, -8, 24.5, '24', None])
def test_a_card_with_an_impossible_count_is_refused(tmp_path, done):
    "40 of 40 without the hash that a finished file has."
    stopped(tmp_path)
    edit(tmp_path, done=done)
    before = (tmp_path / 'states.npy').read_bytes()
    with pytest.raises(ValueError, match='card.json'):
        make(folder=tmp_path)
    assert (tmp_path / 'states.npy').read_bytes() == before


def test_a_finished_card_that_counts_too_few_is_refused(tmp_path):
    make(folder=tmp_path)
    edit(tmp_path, done=39)
    with pytest.raises(ValueError, match='card.json counts 39 of 40'):
        make(folder=tmp_path)


class Otherwise(Recorded):
    "A field that answers `factor` times as much between two times."

    def __init__(self, field, low, high, factor):
        super().__init__(field)
        self.low, self.high, self.factor = low, high, factor

    def on(self, path, coordinates):
        return self

    def __call__(self, x, t):
        return super().__call__(x, t) * (self.factor if self.low <= t.item() <= self.high else 1)


@pytest.mark.parametrize(
    'low, high', [(0, 0.05), (0.45, 0.55), (0.85, 0.95)], ids=['first', 'middle', 'last']
)
def test_a_field_that_differs_at_some_time_is_refused_and_one_that_rounds_otherwise_is_not(
    tmp_path, low, high
):
    T = make(folder=tmp_path)
    with pytest.raises(ValueError, match=r'another teacher \(field differ\)'):
        make(Otherwise(mixture(), low, high, 1.001), folder=tmp_path)
    field = Otherwise(mixture(), low, high, 1 + 1e-6)
    assert (
        torch.equal(make(field, folder=tmp_path).states, T.states) and field.trajectories == ASKED
    )


def test_one_noise_that_is_another_is_refused_though_the_field_was_not_asked_for_it(tmp_path):
    make(folder=tmp_path)
    other = POOL.clone()
    other[7, 1] += 1e-9
    with pytest.raises(ValueError, match=r'another teacher \(noise differ\)'):
        make(noise=other, folder=tmp_path)


def test_another_solver_is_refused(tmp_path):
    make(folder=tmp_path)
    with pytest.raises(ValueError, match='solver'):
        make(solver=adams_bashforth(10, 2), folder=tmp_path)


def test_identities_differ_where_numbers_do():
    "Floats up to 1e-4 in lists of any depth; everything else exactly; a key that is missing differs."
    one = dict(a=[[1.0, 2.0], [3.0]], b=5, c=None)
    assert what_differs(one, one) == what_differs(one, dict(one, a=[[1.00005, 2.0], [3.0]])) == []
    for other, differ in (
        (dict(one, a=[[1.0003, 2.0], [3.0]]), ['a']),
        (dict(one, a=[[1.0, 2.0]]), ['a']),
        (dict(one, a=[[1.0], [3.0]]), ['a']),
        (dict(one, b=5.0001), ['b']),
        (dict(one, c=0.0), ['c']),
        (dict(a=one['a'], b=5), ['c']),
        (one | dict(d=1), ['d']),
    ):
        assert what_differs(one, other) == differ == what_differs(other, one)
    identity = trajectory_identity(mixture(), POOL, None, euler(10))
    assert json.loads(json.dumps(identity)) == identity and torch.tensor(
        identity['field']
    ).shape == (3, 4)


def test_reading_writes_nothing_and_two_readers_see_the_same(tmp_path):
    digests = lambda: [
        sha256((tmp_path / f).read_bytes()).hexdigest() for f in ('card.json', 'states.npy')
    ]
    make(folder=tmp_path)
    before = digests()
    a, b = make(folder=tmp_path), make(folder=tmp_path)
    times = torch.tensor([0.31, 0.77], dtype=torch.float64)
    for T in (a, b, a):
        T.slopes(), T.at(times), T[torch.arange(5)].ends, teacher_error(mixture(), T)
    copy = a[torch.arange(40)]
    copy.states.add_(1)  # chosen by a tensor: a copy
    assert (
        digests() == before
        and torch.equal(a.states, b.states)
        and torch.equal(a.at(times), b.at(times))
        and {p.name for p in tmp_path.iterdir()} == {'card.json', 'states.npy', '.lock'}
    )
    right = b.states.clone()
    a.states.add_(1)  # the view itself: copied on write
    assert (
        digests() == before
        and torch.equal(b.states, right)
        and torch.equal(make(folder=tmp_path).states, right)
    )


def test_writing_to_the_states_does_not_reach_the_file_that_was_just_made(tmp_path):
    T = make(folder=tmp_path)
    before = (tmp_path / 'states.npy').read_bytes()
    T.states.add_(1)
    assert (tmp_path / 'states.npy').read_bytes() == before


def test_a_second_run_waits_for_the_one_in_progress_and_destroys_nothing(tmp_path, monkeypatch):
    "The second one comes between the first rows and the first card of the other."
    write, flock, calls, comes, found, second = (
        teachers.write_json,
        fcntl.flock,
        [],
        threading.Event(),
        [],
        Recorded(mixture()),
    )

    def come():
        found.append(make(second, folder=tmp_path, batch_size=8).states)

    def other_first(*args):
        if not calls:
            calls.append(threading.Thread(target=come, daemon=True))
            comes.clear()
            calls[0].start()
            comes.wait(5)
            time.sleep(0.1)
            assert not found  # it is about to take the lock, or it is none
        return write(*args)

    monkeypatch.setattr(teachers, 'write_json', other_first)
    monkeypatch.setattr(fcntl, 'flock', lambda *args: (comes.set(), flock(*args)))
    whole = make(batch_size=8).states
    first = make(folder=tmp_path, batch_size=8).states
    calls[0].join(30)
    assert (
        torch.equal(first, whole)
        and torch.equal(found[0], whole)
        and torch.equal(make(folder=tmp_path).states, whole)
        and second.trajectories == ASKED
    )  # nothing was made twice


def is_free(folder):
    with open(folder / '.lock') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def test_a_folder_is_free_when_it_is_made_found_or_refused(tmp_path):
    make(folder=tmp_path)
    assert is_free(tmp_path)
    T = make(folder=tmp_path)
    assert is_free(tmp_path)
    with pytest.raises(ValueError, match='noise') as kept:
        make(noise=-POOL, folder=tmp_path)
    assert is_free(tmp_path)
    cut(tmp_path, 30)
    with pytest.raises(ValueError, match='damaged') as kept:
        make(folder=tmp_path)
    assert is_free(tmp_path)


def test_an_interrupted_run_frees_its_folder(tmp_path):
    class Stops(Recorded):
        def __call__(self, x, t):
            if len(self.answers) == CALLS + 15:
                raise KeyboardInterrupt
            return super().__call__(x, t)

    with pytest.raises(KeyboardInterrupt) as kept:
        make(Stops(mixture()), folder=tmp_path, batch_size=8)
    assert is_free(tmp_path)


def test_without_progress_nothing_is_printed(tmp_path, capfd):
    make(folder=tmp_path)
    make(folder=tmp_path)
    assert capfd.readouterr() == ('', '')
    make(progress=True)
    assert 'euler' in capfd.readouterr().err
