"What a person sees of a command: on a terminal of 80 columns, in a pipe, and when it fails."

import ast
import fcntl
import hashlib
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from notebooks import NBS, cells_of, defaults_of, run_notebook

from neuralsolver.utils import results_folder

ROOT = NBS.parent
PAPERMILL = str(Path(sys.executable).with_name('papermill'))
BAR = re.compile(r'\w+  ((.* )?\|[^|]*\| +\d+ %  \S+ left|cell \d+ of \d+)')
SMALL = dict(
    steps=2,
    model='fashion-mixture',
    samples=16,
    seeds='0,1',
    solvers='euler,adam2',
    teacher_steps=8,
)


def heed_interrupts():
    "A command of a background job ignores ctrl-C, and so do its children."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def on_terminal(cwd, *args, stop_at=None):
    "Exit code and text of the command on a terminal of 24 x 80; ctrl-C once it shows `stop_at`."
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    process = subprocess.Popen(
        [PAPERMILL, *args], cwd=cwd, start_new_session=True, preexec_fn=heed_interrupts, **streams
    )
    os.close(terminal)
    text = b''
    while True:
        try:
            text += os.read(main, 10_000)
        except OSError:  # the other end is closed
            break
        if stop_at and stop_at in text.decode(errors='replace'):
            process.send_signal(signal.SIGINT)
            stop_at = None
    os.close(main)
    return process.wait(timeout=60), text.decode()


def in_pipe(cwd, *args):
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.run([PAPERMILL, *args], cwd=cwd, text=True, timeout=300, **streams)


def tracked():
    "Hashes and times of the files that git tracks."
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split('\0') if name and (ROOT / name).exists()]
    return {f: (hashlib.sha256(f.read_bytes()).digest(), f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The command of README, small: its words, its folder, what a terminal showed."
    folder = results_folder('eval', SMALL)
    shutil.rmtree(folder)
    executed = tmp_path_factory.mktemp('small') / 'eval.ipynb'
    flags = [word for name, value in SMALL.items() for word in ('--p', name, str(value))]
    shards = ['--p', 'shards_dir', str(executed.parent / 'shards')]  # nothing is there to resume
    words = ['nbs/eval.ipynb', str(executed), *flags, *shards]
    before = tracked()
    code, text = on_terminal(ROOT, *words)
    assert code == 0, text
    assert tracked() == before
    yield words, folder, text
    shutil.rmtree(folder)


def check_result(lines, folder):
    "A table, a sentence and the paths of files that exist."
    assert re.fullmatch(
        r'solver +evaluations +mean error +Frechet distance above teacher', lines[0]
    )
    assert [line.split()[0] for line in lines[1:4]] == ['euler', 'adam2', 'teacher']
    assert f'{folder.relative_to(ROOT)}/' in lines
    named = [folder / line.split()[1] for line in lines if line.startswith('  ')]
    kinds = {file.suffix for file in named if file.exists()}
    assert {'.md', '.png'} <= kinds
    assert lines[-1].startswith('git ignores results/')
    assert all(len(line) <= 80 for line in lines)


def test_terminal_shows_bars_then_the_result(small):
    words, folder, text = small
    live, _, rest = text.rpartition('\r' + 79 * ' ' + '\r')
    shown = [piece.rstrip() for piece in live.split('\r') if piece.strip()]
    assert all(BAR.fullmatch(piece) and len(piece) < 80 for piece in shown), shown
    assert any(re.search(r'2 steps, solver \d/3 \w+, seed \d/2', piece) for piece in shown)
    assert '\n' not in live
    check_result(rest.strip().splitlines(), folder)


def test_pipe_gets_lines_and_the_result(small):
    words, folder, _ = small
    run = in_pipe(ROOT, *words)
    assert run.returncode == 0, run.stderr
    assert run.stderr and all(BAR.fullmatch(line) for line in run.stderr.splitlines())
    assert '\r' not in run.stdout + run.stderr
    check_result(run.stdout.strip().splitlines(), folder)


# what a user can correct: one line, exit code 2


def test_bad_value_ends_in_one_line(tmp_path):
    run = in_pipe(ROOT, 'nbs/eval.ipynb', str(tmp_path / 'eval.ipynb'), '--p', 'steps', '0')
    assert run.returncode == 2 and run.stdout == ''
    last = run.stderr.splitlines()[-1]
    assert last == 'Error: nbs/eval.ipynb: steps=0 is not allowed: give an integer >= 1.'
    assert 'Traceback' not in run.stderr
    assert not list(ROOT.glob('results/eval_steps-0*'))


def toy(repo, body, **marks):
    "A notebook of ours that runs `body`."
    kernel = dict(name='python3', language='python', display_name='python3')
    metadata = dict(kernelspec=kernel, neuralsolver=dict(papermill=True) | marks)
    cells = [new_code_cell('n: int = 1', metadata=dict(tags=['parameters'])), new_code_cell(body)]
    (repo / 'nbs').mkdir(exist_ok=True)
    nbformat.write(new_notebook(metadata=metadata, cells=cells), repo / 'nbs/toy.ipynb')


@pytest.mark.parametrize('name', ['nbs/toi.ipynb', 'toy.ipynb', 'nbs/toy'])
def test_wrong_notebook_ends_in_one_line(tmp_path, name):
    toy(tmp_path, '')
    run = in_pipe(tmp_path, name, '--p', 'n', '2')
    assert run.returncode == 2
    assert run.stderr == f'Error: {name} is not there: did you mean nbs/toy.ipynb?\n'


def test_missing_file_ends_in_one_line(tmp_path):
    toy(tmp_path, 'open("pool.npz")')
    run = in_pipe(tmp_path, 'nbs/toy.ipynb')
    assert run.returncode == 2 and 'Traceback' not in run.stderr
    assert run.stderr.splitlines()[-1].endswith("No such file or directory: 'pool.npz'")


@pytest.mark.parametrize('body', ['1 / 0', 'int("x")'])
def test_unexpected_error_keeps_its_traceback(tmp_path, body):
    toy(tmp_path, body)
    run = in_pipe(tmp_path, 'nbs/toy.ipynb')
    assert run.returncode == 1 and 'Traceback' in run.stderr


WORK = """\
import time
from tqdm import tqdm
for _ in tqdm(range(600), desc='at work'):
    time.sleep(0.1)
"""


@pytest.mark.parametrize('resumes, said', [(True, 'the same command resumes.'), (False, 'nothing')])
def test_interruption_is_one_line(tmp_path, resumes, said):
    toy(tmp_path, WORK, resumes=resumes)
    began = time.monotonic()
    code, text = on_terminal(tmp_path, 'nbs/toy.ipynb', stop_at='at work')
    assert code == 130 and time.monotonic() - began < 50
    last = text.strip().splitlines()[-1].rpartition('\r')[2]
    assert last.startswith(f'Interrupted: {said}')
    assert 'Traceback' not in text


# every notebook


COMMANDS = [
    file.relative_to(NBS).with_suffix('').as_posix()
    for file in sorted([*NBS.glob('*.ipynb'), *NBS.glob('studies/*.ipynb')])
    if nbformat.read(file, 4).metadata.get('neuralsolver')
]
ZERO = ('seed', 'guided_channels', 'warmup', 'tf32')  # numbers that may be zero


def counts(notebook):
    "Parameters that count something."
    tagged = next((source for source, parameters in cells_of(notebook) if parameters), '')
    numbers = [line.target.id for line in ast.parse(tagged).body if line.annotation.id == 'int']
    return [(notebook, name) for name in numbers if name not in ZERO]


@pytest.mark.parametrize('notebook', [name for name in COMMANDS if name != 'play'])
def test_last_cell_is_the_summary(notebook):
    last = nbformat.read(NBS / f'{notebook}.ipynb', 4).cells[-1]
    assert last.metadata.get('tags') == ['summary'] and 'print_result(' in last.source


@pytest.mark.parametrize('notebook, name', [pair for n in COMMANDS for pair in counts(n)])
def test_zero_is_refused_before_anything_is_written(notebook, name, tmp_path):
    given = {
        key: str(tmp_path) for key in ('reports_dir', 'out_dir') if key in defaults_of(notebook)
    }
    with pytest.raises(ValueError, match=f'{name}=0 is not ') as error:
        run_notebook(notebook, **given, **{name: 0})
    assert '\n' not in str(error.value)
    assert not [file for file in tmp_path.rglob('*') if file.is_file()]
