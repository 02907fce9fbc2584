"What is kept comes back exactly; what is another's, damaged or older is refused."

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lion_pytorch import Lion

from neuralsolver import change_path, euler, list_solvers, load_solver, sample
from neuralsolver import store as module
from neuralsolver.neural import classical_names, get_solver
from neuralsolver.paths import DDPMPath, LinearPath, VPPath
from neuralsolver.store import Damaged, Store, differences, identity_digest, read_card

IDENTITY = dict(lr=0.002, recipe=dict(loss='mse', order=None), shape=(3, 2))


def same(a, b):
    "Equal to the last bit, with types: 1 is not 1.0, a tuple is not a list."
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


# what is kept comes back


@pytest.mark.parametrize('make', [torch.optim.AdamW, Lion, torch.optim.LBFGS])
def test_the_state_of_an_optimiser_comes_back(tmp_path, make):
    weights = torch.nn.Linear(3, 2)
    optimizer = make(weights.parameters())

    def loss():
        optimizer.zero_grad()
        value = weights(torch.ones(4, 3)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    store = Store(tmp_path / 'a', IDENTITY, 'training')
    store.write(optimizer.state_dict())
    back = store.read()
    assert same(back, optimizer.state_dict())
    make(weights.parameters()).load_state_dict(back)


def test_every_kind_of_value_comes_back(tmp_path):
    view = torch.arange(12.0).reshape(3, 4)
    state = {
        'numbers': [1, 1.0, 1e-300, float('nan'), float('inf'), -0.0, True, None, 'text'],
        'pairs': (1, (2.5, [3])),
        'keys': {0: 'int', '0': torch.ones(2), 1: torch.zeros(2)},
        'escapes': {'$tensor': 1, '$dict': torch.ones(1)},
        'tensors': [view, view.T, view[1], torch.tensor(3), torch.empty(0, 5)],
        'types': [torch.ones(3).to(t) for t in (torch.bfloat16, torch.bool, torch.int64)],
        'names/clash': torch.ones(1),
        'names': {'clash': torch.ones(2)},
        'empty': {},
    }
    store = Store(tmp_path / 'a.any', IDENTITY, 'run')
    store.write(state)
    assert same(store.read(), state)
    assert oct(store.file.stat().st_mode & 0o444) == oct(0o444)
    identity, card = read_card(store.file)
    assert identity == store.identity and card['pairs'] == {'$tuple': [1, {'$tuple': [2.5, [3]]}]}


def test_records_are_plain_json(tmp_path):
    store = Store(tmp_path / 'new/a.json', IDENTITY, 'search')
    store.write(dict(label='ours', cost=[1, 2.5]))
    plain = json.loads(store.file.read_text())
    assert plain == dict(identity=store.identity, label='ours', cost=[1, 2.5])
    assert store.read() == dict(label='ours', cost=[1, 2.5])
    for bad in (dict(x=torch.ones(1)), dict(x=float('nan')), dict(identity={})):
        with pytest.raises((TypeError, ValueError)):
            store.write(bad)
    assert json.loads(store.file.read_text()) == plain


def test_an_array_grows_and_is_checked(tmp_path):
    store = Store(tmp_path / 'a/card.json', IDENTITY, 'teacher')
    store.array('x.npy', (4, 2), np.float32, 'w+')[:2] = 1
    store.array('x.npy', (4, 2), np.float32, 'r+')[2:] = 2
    read = store.array('x.npy', (4, 2), np.float32, 'c')
    assert read[:, 0].tolist() == [1, 1, 2, 2]
    read[:] = 0
    assert store.array('x.npy', (4, 2), np.float32, 'c').sum() == 12
    for shape, dtype in (((4, 3), np.float32), ((4, 2), np.float64)):
        with pytest.raises(Damaged, match=r'x.npy is float32 \[4, 2\].*delete .*a\.$'):
            store.array('x.npy', shape, dtype, 'r+')
    store.file.with_name('x.npy').write_bytes(b'\x93NUMPY')
    with pytest.raises(Damaged, match='damaged'):
        store.array('x.npy', (4, 2), np.float32, 'c')


# what is refused


@pytest.mark.parametrize('name', ['a.ckpt', 'a.json', 'a/card.json'])
def test_a_result_of_another_run_is_refused_and_left_alone(tmp_path, name):
    mine = Store(tmp_path / name, IDENTITY, 'training')
    mine.write(dict(done=3))
    before = mine.file.read_bytes()
    other = Store(mine.file, IDENTITY | dict(lr=0.001), 'training')
    kind = 'folder' if 'card' in name else 'file'
    with pytest.raises(ValueError) as e:
        other.read()
    assert not isinstance(e.value, Damaged) and mine.file.read_bytes() == before
    assert str(e.value) == (
        f'{tmp_path / name.removesuffix("/card.json")} belongs to another training (lr: 0.002 '
        f'instead of 0.001): give the same settings, name another {kind}, or delete it.'
    )


def test_differences_are_told_by_key():
    known = dict(a=1, b=dict(c=[1, 2], d='x' * 50), e=0.5, g=True)
    wanted = dict(a=1, b=dict(c=(1, 3), d='y' * 50), f='new', g=True)
    said = 'b.c: [1, 2] instead of [1, 3], b.d: another, f: missing, e: not expected'
    assert differences(known, wanted) == said
    assert differences(known, dict(reversed(known.items()))) == ''
    assert identity_digest(known) == identity_digest(dict(reversed(known.items())))


def test_only_measured_numbers_have_a_tolerance():
    known, near = dict(field=[[1.0, 100.0]], decay=0.9999), dict(field=[[1.00005, 100.0]])
    assert differences(known, near | dict(decay=0.9999), ['field']) == ''
    assert differences(known, near | dict(decay=0.9999)).startswith('field')
    assert differences(known, near | dict(decay=0.99995), ['field']).startswith('decay')
    assert differences(dict(field=[1.0]), dict(field=[1.001]), ['field'])
    assert differences(dict(field=[1.0]), dict(field=[1.0, 2.0]), ['field'])
    assert differences(dict(n=2), dict(n=2.0)) == ''


def test_a_renamed_digest_is_the_same_solver(monkeypatch):
    monkeypatch.setattr(module, 'renamed_digests', lambda: {'old': 'new', 'older': 'new'})
    assert differences(dict(solver='old'), dict(solver='new')) == ''
    assert differences(dict(solver=['old']), dict(solver=['older'])) == ''
    assert differences(dict(solver='old'), dict(solver='x')) == "solver: 'old' instead of 'x'"


def test_any_damaged_byte_and_any_cut_is_found(tmp_path):
    store = Store(tmp_path / 'a', IDENTITY, 'run')
    store.write(dict(weights=torch.arange(8.0), losses=[0.25]))
    whole = store.file.read_bytes()
    for i in range(len(whole)):
        store.file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError):
            store.read()
    for i in (whole.index(b'0.25'), len(whole) - 3):
        store.file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(Damaged, match='is damaged .*: delete it'):
            store.read()
    for size in (0, 1, 8, 100, len(whole) - 1):
        store.file.write_bytes(whole[:size])
        with pytest.raises(Damaged, match='is damaged'):
            store.read()
    record = Store(tmp_path / 'a.json', IDENTITY, 'run')
    for text in ('', '{"identity": {', '[]', '{"identity": 3}'):
        record.file.write_text(text)
        with pytest.raises(Damaged, match='a.json is damaged'):
            record.read()
    card = Store(tmp_path / 'pictures/card.json', IDENTITY, 'rendering')
    card.file.parent.mkdir()
    card.file.write_text('{')
    with pytest.raises(Damaged, match='pictures is damaged'):  # not only the card is to be deleted
        card.read()


def test_files_of_an_older_version_are_refused_in_one_sentence(tmp_path):
    store = Store(tmp_path / 'a.ckpt', IDENTITY, 'training')
    torch.save(dict(settings={}, net={}), store.file)
    with pytest.raises(ValueError, match=r'a.ckpt was written by an older version: delete it\.$'):
        store.read()
    record = Store(tmp_path / 'a.json', IDENTITY, 'search')
    record.file.write_text('{"rmse": 1}')
    with pytest.raises(ValueError, match='older version'):
        record.read()


# interruptions and other processes


def test_an_interrupted_write_leaves_the_old_state(tmp_path, monkeypatch):
    store = Store(tmp_path / 'a.ckpt', IDENTITY, 'training')
    store.write(dict(done=1))

    def half(tensors, file, metadata):
        file.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'save_file', half)
    with pytest.raises(KeyboardInterrupt):
        store.write(dict(done=2))
    assert store.read() == dict(done=1)
    assert [p.name for p in tmp_path.iterdir()] == ['a.ckpt']


HOLD = """
import sys, time
from neuralsolver.store import Store
heavy = {'pandas', 'scipy', 'matplotlib', 'torchvision', 'diffusers', 'papermill'}
print(sorted(heavy & {*sys.modules}))
store = Store(sys.argv[1], {}, 'teacher')
with store.lock():
    print('held', flush=True)
    time.sleep(2)
    store.write(dict(done=1))
"""


def test_a_second_process_waits_and_says_so(tmp_path, capfd):
    "The other process also tells that the module is cheap to import."
    store = Store(tmp_path / 'a/card.json', {}, 'teacher')
    command = [sys.executable, '-c', HOLD, str(store.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert [holder.stdout.readline() for _ in range(2)] == ['[]\n', 'held\n']
        with pytest.raises(ValueError, match='a is in use by another teacher: wait for it'):
            with store.lock(wait=False):
                pass
        with store.lock():
            assert store.read() == dict(done=1)
    said = capfd.readouterr().err
    assert 'a is in use by another teacher: waiting for it to end.' in said
    assert f'process {holder.pid} on' in said and 'gives up in 10 minutes' in said
    start = time.perf_counter()
    with store.lock():
        pass
    assert time.perf_counter() - start < 0.5


# A solver has one digest on every processor.

KNOWN = {
    ('flowdcn-b-2', 5): 'ed5727348023',
    ('sit-xl-2', 8): 'f77749c66a64',
    ('dit-xl-2', 8): '39a141da464e',
    ('dit-xl-2', 10): 'bae0fd707f7c',
}


def every_solver():
    "Every shipped table, and every classical rule on every grid."
    for name, counts in list_solvers().items():
        yield from (load_solver(name, n) for n in counts)
    for path in (LinearPath(), DDPMPath(), VPPath()):
        for name in classical_names(path):
            yield from (get_solver(name, n, path) for n in (5, 8, 10))


def printed(solvers) -> str:
    return '\n'.join(f'{s.name} {s.nfe} {s.digest}' for s in solvers)


@pytest.fixture(scope='module')
def solvers():
    "As this process makes them."
    return list(every_solver())


def digests_under(capability: str) -> str:
    "As a process of this vector width makes them; ATen falls back to what the processor has."
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    script = f'import runpy; runpy.run_path({__file__!r}, run_name="__main__")'
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize('name, steps', KNOWN)
def test_published_digests_stay(name, steps):
    assert load_solver(name, steps).digest == KNOWN[name, steps]


def test_digests_are_equal_under_three_vector_widths(solvers):
    "That of this process, by default the widest, and the two others in processes of their own."
    here = os.environ.get('ATEN_CPU_CAPABILITY', 'avx512')
    known = printed(solvers)
    assert len(known.splitlines()) > 300
    for capability in {'default', 'avx2', 'avx512'} - {here}:
        assert digests_under(capability) == known, capability


def test_last_bits_do_not_change_a_digest_and_the_ninth_digit_does(solvers):
    g = torch.Generator().manual_seed(0)
    for solver in solvers:
        if not solver.gain.all():  # ends at the data in data coordinates: no gains of its own
            continue
        bits = 1 + 4e-16 * torch.randn(solver.nodes.shape, generator=g, dtype=torch.float64)
        free = replace(solver, gains=solver.gain)
        near = replace(solver, nodes=solver.nodes * bits, gains=solver.gain)
        assert near.digest == free.digest
    solver = load_solver('sit-xl-2', 8)
    moved = solver.nodes.clone()
    moved[3] += 2e-8
    free = replace(solver, gains=torch.ones(8))
    assert replace(free, nodes=moved).digest != free.digest


def test_digests_tell_paths_coordinates_and_gains_apart():
    solver = euler(4)
    free = replace(solver, gains=torch.ones(4))
    other = change_path(solver, VPPath())
    flow = replace(free, coordinates='flow')
    assert len({s.digest for s in (solver, free, other, flow)}) == 4
    assert replace(solver, name='another').digest == solver.digest


def test_solvers_of_one_digest_are_one_sampler_in_float32():
    solver = load_solver('sit-xl-2', 8)
    near = replace(solver, nodes=solver.nodes * (1 + 1e-15), gains=torch.ones(8))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def field(x, t):
        return (1 - t) * x

    torch.testing.assert_close(sample(field, noise, solver), sample(field, noise, near))


if __name__ == '__main__':
    print(printed(every_solver()))
