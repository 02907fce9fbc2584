"Teachers in a folder: resumed after a kill, refused when cut, tampered with or another's, locked."

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from neuralsolver.store import Store
from neuralsolver.teachers import teacher_error
from test_teachers import ASKED, CALLS, make, mixture, POOL, Recorded


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_teacher_folders import CALLS, make, mixture, Recorded, Store

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Dies(Recorded):
    def __call__(self, x, t):
        if len(self.answers) == CALLS + 3 * 10 + 5:
            die()
        return super().__call__(x, t)

def in_batch(folder):
    make(Dies(mixture()), folder=folder, batch_size=8)

def before_card(folder):
    write, calls = Store.write, []
    def counted(self, state):
        if len(calls) == 2:
            die()
        calls.append(1)
        write(self, state)
    Store.write = counted
    make(folder=folder, batch_size=8)

for kind in (in_batch, before_card):
    if not (child := os.fork()):
        kind(f'{sys.argv[2]}/{kind.__name__}')
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, kind
"""


def same(T, other):
    return torch.equal(T.states, other.states)


def test_resume_after_a_kill(tmp_path):
    "SIGKILL in the fourth batch of 8, and after the third was written but not yet counted."
    command = [sys.executable, '-c', KILLED, os.path.dirname(__file__), str(tmp_path)]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    whole = make(batch_size=8)
    for kind, done in (('in_batch', 24), ('before_card', 16)):
        folder = tmp_path / kind
        assert json.loads((folder / 'card.json').read_text())['done'] == done
        field = Recorded(mixture())
        T = make(field, folder=folder, batch_size=8)
        assert field.trajectories == ASKED + (40 - done) * 10  # the identity, and what was missing
        assert same(T, whole) and same(make(folder=folder), whole)


class Stops(Recorded):
    "A field that is interrupted after some calls."

    def __init__(self, field, calls):
        super().__init__(field)
        self.calls = calls

    def on(self, path, coordinates):
        return self

    def __call__(self, x, t):
        if len(self.answers) == self.calls:
            raise KeyboardInterrupt
        return super().__call__(x, t)


def stopped(folder, done=24):
    "A folder in which `done` trajectories are finished, by batches of 8."
    with pytest.raises(KeyboardInterrupt):
        field = Stops(mixture(), CALLS + done // 8 * 10 + 1)
        make(field, folder=folder, batch_size=8)
    assert json.loads((folder / 'card.json').read_text())['done'] == done


def edit(folder, **entries):
    card = folder / 'card.json'
    card.write_text(json.dumps(json.loads(card.read_text()) | entries))


def cut(folder, rows):
    "Cut the file after some trajectories."
    with open(folder / 'states.npy', 'r+b') as f:
        f.truncate(128 + rows * 11 * 2 * 8)


@pytest.mark.parametrize(
    'lost, members', [('card.json', 40), ('card.json', 12), ('states.npy', 40)]
)
def test_half_of_a_folder_is_computed_again(tmp_path, lost, members):
    "Also if the states without a card have another shape."
    make(noise=POOL[:members], folder=tmp_path)
    (tmp_path / lost).unlink()
    field = Recorded(mixture())
    assert same(make(field, folder=tmp_path), make())
    assert field.trajectories == ASKED + 400


def test_a_card_that_counts_too_few_costs_time_only(tmp_path):
    stopped(tmp_path)
    edit(tmp_path, done=11)
    field = Recorded(mixture())
    assert same(make(field, folder=tmp_path, batch_size=8), make(batch_size=8))
    assert field.trajectories == ASKED + 29 * 10


@pytest.mark.parametrize('finished, rows', [(True, 30), (False, 10)])
def test_a_cut_file_is_refused_and_left_alone(tmp_path, finished, rows):
    "Opening it neither heals it nor fills it with zeros."
    if finished:
        make(folder=tmp_path)
    else:
        stopped(tmp_path)
    cut(tmp_path, rows)
    before = (tmp_path / 'states.npy').read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match='states.npy is damaged'):
            make(folder=tmp_path, batch_size=8)
    assert (tmp_path / 'states.npy').read_bytes() == before


@pytest.mark.parametrize('other', [np.zeros((40, 11, 3)), np.zeros((40, 11, 2), np.float32)])
def test_a_file_of_another_shape_or_type_is_refused_and_left_alone(tmp_path, other):
    make(folder=tmp_path)
    file = tmp_path / 'states.npy'
    np.save(file, other)
    before = file.read_bytes()
    with pytest.raises(ValueError, match='states.npy is float'):
        make(folder=tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize('done', [40, 45, -8, 24.5, '24', None])
def test_an_impossible_count_is_refused(tmp_path, done):
    "40 of 40 without the hash that a finished file has."
    stopped(tmp_path)
    edit(tmp_path, done=done)
    before = (tmp_path / 'states.npy').read_bytes()
    with pytest.raises(ValueError, match='card counts'):
        make(folder=tmp_path)
    assert (tmp_path / 'states.npy').read_bytes() == before


def test_a_finished_card_that_counts_too_few_is_refused(tmp_path):
    make(folder=tmp_path)
    edit(tmp_path, done=39)
    with pytest.raises(ValueError, match='card counts 39 of 40'):
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
def test_a_field_that_differs_at_some_time_is_refused_and_rounding_is_not(tmp_path, low, high):
    T = make(folder=tmp_path)
    with pytest.raises(ValueError, match='field: another'):
        make(Otherwise(mixture(), low, high, 1.001), folder=tmp_path)
    field = Otherwise(mixture(), low, high, 1 + 1e-6)
    assert same(make(field, folder=tmp_path), T)
    assert field.trajectories == ASKED


def test_one_other_noise_sample_is_refused_though_the_field_was_not_asked_for_it(tmp_path):
    make(folder=tmp_path)
    other = POOL.clone()
    other[7, 1] += 1e-9
    with pytest.raises(ValueError, match=r'another teacher \(noise: '):
        make(noise=other, folder=tmp_path)


def digests(folder):
    files = (folder / 'card.json', folder / 'states.npy')
    return [sha256(file.read_bytes()).hexdigest() for file in files]


def test_reading_writes_nothing_and_two_readers_see_the_same(tmp_path):
    made = make(folder=tmp_path)
    before = digests(tmp_path)
    a, b = make(folder=tmp_path), make(folder=tmp_path)
    times = torch.tensor([0.31, 0.77], dtype=torch.float64)
    for T in (a, b, a):
        T.slopes()
        T.at(times)
        teacher_error(mixture(), T)
    assert same(a, b) and torch.equal(a.at(times), b.at(times))
    assert {p.name for p in tmp_path.iterdir()} == {'card.json', 'states.npy', '.lock'}
    right = b.states.clone()
    a[torch.arange(40)].states.add_(1)  # chosen by a tensor: a copy
    a.states.add_(1)  # the view itself: copied on write
    made.states.add_(1)  # also that of the run that wrote the file
    assert digests(tmp_path) == before
    assert torch.equal(b.states, right) and torch.equal(make(folder=tmp_path).states, right)


def is_free(folder):
    try:
        with FileLock(folder / '.lock', timeout=0):
            return True
    except Timeout:
        return False


def test_a_second_run_waits_for_the_one_in_progress_and_destroys_nothing(tmp_path, monkeypatch):
    "The second one comes between the first rows and the first card of the other."
    write, found, second, threads = Store.write, [], Recorded(mixture()), []

    def come():
        found.append(make(second, folder=tmp_path, batch_size=8))

    def other_first(store, state):
        if not threads:
            threads.append(threading.Thread(target=come, daemon=True))
            threads[0].start()
            threads[0].join(0.3)
            assert not found and not is_free(tmp_path)
        return write(store, state)

    monkeypatch.setattr(Store, 'write', other_first)
    first, whole = make(folder=tmp_path, batch_size=8), make(batch_size=8)
    threads[0].join(30)
    assert same(first, whole) and same(found[0], whole) and same(make(folder=tmp_path), whole)
    assert second.trajectories == ASKED  # nothing was computed twice


def test_a_folder_is_free_when_it_is_made_found_refused_or_interrupted(tmp_path):
    stopped(tmp_path)
    assert is_free(tmp_path)
    for _ in range(2):
        make(folder=tmp_path)
        assert is_free(tmp_path)
    with pytest.raises(ValueError, match='noise'):
        make(noise=-POOL, folder=tmp_path)
    assert is_free(tmp_path)
    cut(tmp_path, 30)
    with pytest.raises(ValueError, match='damaged'):
        make(folder=tmp_path)
    assert is_free(tmp_path)


def test_without_progress_nothing_is_printed(tmp_path, capfd):
    make(folder=tmp_path)
    make(folder=tmp_path)
    assert capfd.readouterr() == ('', '')
    make(progress=True)
    assert 'euler' in capfd.readouterr().err
