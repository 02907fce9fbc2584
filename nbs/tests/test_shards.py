"Evaluation at scale: killed, damaged, foreign, divided among processes."

import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_search_notebook import in_process

import neuralsolver as ns
from neuralsolver.evaluate import evaluate, write_reports
from neuralsolver.models import SiT
from neuralsolver.checkpoints import save_model
from neuralsolver.protocol import Protocol
from neuralsolver.sampling import compute_shards
from neuralsolver.store import Store, read_card

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(
    model='fashion-mixture',
    steps=5,
    samples=80,
    seeds='0,1',
    solvers='euler,adam2',
    teacher_steps=8,
    batch_size=10,
    shard_batches=2,
)


def numbers(csv):
    "A table without the times."
    return pd.read_csv(csv).drop(columns='seconds').to_csv()


def table(p, folder):
    "The CSV that a user gets, but for the times."
    shards = folder / 'shards'
    return numbers(f'{write_reports(p, *evaluate(p, False, shards), folder, shards)}.csv')


def shard_files(folder):
    return sorted(folder.rglob('[0-9]*.safetensors'))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A small evaluation: its folder, and its table."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('small')
    return folder, table(Protocol(**SMALL), folder)


@pytest.fixture
def copied(small, tmp_path):
    "The files of a copy of its shards."
    shutil.copytree(small[0] / 'shards', tmp_path / 'shards')
    return shard_files(tmp_path)


# resume: killed


def in_shards(count):
    "A protocol of one seed in shards of 40 images."
    given = dict(samples=40 * count, seeds='0', batch_size=40, shard_batches=1)
    return Protocol(**SMALL | given)


def child(count, folder):
    torch.set_num_threads(1)
    compute_shards(in_shards(count), folder, False)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.is_alive():
        assert time.time() < end, 'the run makes no progress'
        time.sleep(0.03)


@pytest.fixture
def forkserver(tmp_path, monkeypatch):
    "Processes that have imported what they need begin at once."
    (tmp_path / 'preloaded.py').write_text(
        'import accelerate, neuralsolver.evaluate, neuralsolver.metrics as m\n'
        'm.import_torch_fidelity()\n'
        'import torch_fidelity.utils\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preloaded'])
    return context


@pytest.mark.parametrize('kills, count', [(5, 8), pytest.param(20, 24, marks=pytest.mark.slow)])
def test_killed_again_and_again_the_table_is_the_same_to_the_byte(
    tmp_path, forkserver, kills, count
):
    p = in_shards(count)
    wanted = table(p, tmp_path / 'whole')
    shards = tmp_path / 'killed/shards'
    rng, kept = random.Random(0), {}
    for _ in range(kills):
        process = forkserver.Process(target=child, args=(count, shards))
        process.start()
        goal = len(kept) + rng.choice((1, 1, 2))
        wait_for(lambda: len(shard_files(shards)) >= goal, process)
        time.sleep(rng.uniform(0, 0.05))  # somewhere in the next shard
        assert process.is_alive(), 'the kills must fall into the run'
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for file in shard_files(shards):
            Store(file, read_card(file)[0], 'evaluation').read()  # never half written
            made = file.stat().st_mtime_ns
            assert kept.setdefault(file, made) == made  # never computed twice
    assert kills <= len(kept) < 3 * count
    assert table(p, tmp_path / 'killed') == wanted


# resume: damaged, foreign, longer


@pytest.mark.parametrize('damage', ['missing', 'one bit', 'not a file of ours'])
def test_a_damaged_shard_is_computed_again_and_only_it(small, copied, tmp_path, damage):
    victim = copied[len(copied) // 2]
    good = victim.read_bytes()
    before = {file: file.stat().st_mtime_ns for file in copied}
    victim.unlink()
    if damage == 'one bit':
        victim.write_bytes(good[:-9] + bytes([good[-9] ^ 16]) + good[-8:])
    elif damage == 'not a file of ours':
        victim.write_bytes(b'hello' * 100)
    assert table(Protocol(**SMALL), tmp_path) == small[1]
    assert {file for file in copied if file.stat().st_mtime_ns != before[file]} == {victim}


def test_a_longer_run_resumes_a_shorter_one(small, copied, tmp_path):
    longer = Protocol(**SMALL | dict(samples=120))
    before = {file: file.stat().st_mtime_ns for file in copied}
    resumed = table(longer, tmp_path)
    assert resumed == table(longer, tmp_path / 'fresh')
    assert before == {file: file.stat().st_mtime_ns for file in copied}


@pytest.mark.parametrize('shard_batches', [1, 7])
def test_other_shards_same_bytes(small, tmp_path, shard_batches):
    assert table(Protocol(**SMALL | dict(shard_batches=shard_batches)), tmp_path) == small[1]


def test_weights_that_change_are_another_identity(tmp_path, capsys):
    torch.manual_seed(0)
    net = SiT(28, 14, 1, 16, 1, 2, num_classes=10, learn_sigma=False)
    file = tmp_path / 'mine.safetensors'
    ends = []
    for scale in (1.0, 3.0):
        with torch.no_grad():
            net.final_layer.linear.weight.fill_(scale / 10)
        save_model(net, net.state_dict(), file, {})
        p = Protocol(**SMALL | dict(model=str(file), samples=16, steps=2, solvers='euler'))
        ends.append(evaluate(p, False, tmp_path / 'shards')[0].rmse[0])
    assert ends[0] != ends[1]
    assert 'computed anew' in capsys.readouterr().out


# refusal


def test_a_shard_of_another_protocol_is_refused_and_kept(copied, tmp_path):
    other = Protocol(**SMALL | dict(guidance=1.5, samples=40, seeds='0'))
    evaluate(other, False, tmp_path / 'other')
    mine = copied[0]
    row = mine.parent.name.rpartition('-')[0]
    foreign = next((tmp_path / 'other').rglob(f'{row}-*/{mine.name}')).read_bytes()
    mine.write_bytes(foreign)
    said = r'belongs to another evaluation \(.*guidance: 1.5 instead of 2.0'
    with pytest.raises(ValueError, match=said):
        evaluate(Protocol(**SMALL), False, tmp_path / 'shards')
    assert mine.read_bytes() == foreign


def test_a_shard_under_another_name_is_refused(copied, tmp_path):
    copied[0].replace(copied[1])
    with pytest.raises(ValueError, match='rows 0 to 20'):
        evaluate(Protocol(**SMALL), False, tmp_path / 'shards')


# determinism: many processes


def processes_of(folder):
    return {read_card(file)[1]['info']['process'] for file in shard_files(folder)}


def test_two_processes_of_accelerate_give_the_numbers_of_one(small, tmp_path):
    # accelerate's own launcher starts several processes on CPUs only through MPI; torchrun sets
    # what its PartialState reads, as `accelerate launch` does on GPUs
    flags = [word for name, value in SMALL.items() for word in (f'--{name}', str(value))]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command = [*torchrun, '--nproc_per_node', '2', '-m', 'neuralsolver.evaluate', *flags]
    done = subprocess.run(
        [*command, '--reports_dir', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(tmp_path / 'eval_fashion-mixture_5.csv') == small[1]
    assert processes_of(tmp_path) == {'0 of 2', '1 of 2'}


@pytest.mark.slow
def test_two_processes_from_a_notebook(small, tmp_path, monkeypatch):
    "With as many threads as torch likes: no process may wait for the threads of its parent."
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    torch.set_num_threads(2)
    in_process('eval', **SMALL, processes=2, reports_dir=str(tmp_path))
    measured = pd.read_csv(io.StringIO(numbers(tmp_path / 'eval_fashion-mixture_5.csv')))
    pd.testing.assert_frame_equal(measured, pd.read_csv(io.StringIO(small[1])), rtol=1e-4)
    assert processes_of(tmp_path) == {'0 of 2', '1 of 2'}


# what is not a number


@pytest.mark.parametrize('broken, other', [('euler', 'teacher'), ('teacher', 'euler')])
def test_a_diverged_row_has_no_metrics_and_a_diverged_teacher_takes_only_the_distances(
    tmp_path, monkeypatch, broken, other
):
    steps = dict(euler=5, teacher=8)[broken]

    def one_sample_gone(field, x, solver, y):
        out = ns.sample(field, x, solver, y)
        gone = torch.tensor([1] if solver.steps == steps else [], dtype=torch.long)
        return out.index_fill(0, gone, float('nan'))

    monkeypatch.setattr('neuralsolver.sampling.sample', one_sample_gone)
    t, examples = evaluate(Protocol(**SMALL | dict(solvers='euler')), False, tmp_path)
    t = t.set_index('solver')
    assert t.loc[broken, ['fd', 'is']].isna().all()
    assert t.loc[other, ['fd', 'is']].notna().all()
    assert np.isnan(t.rmse['euler'])
    assert examples['euler'].shape == (10, 1, 28, 28)
