"The papermill command on toy notebooks: as a user types it, and in this process."

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import papermill.cli
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook

from neuralsolver.tools.papermill_engine import ParameterError, register, rewrite

PARAMETERS = """\
steps: int = 8  # network calls
samples: int = None  # images
label: str = None  # text
"""
QUIET = ('--log-level', 'ERROR')
BODY = """\
from pathlib import Path
Path("ran").touch()
print(f"{steps=} {samples=} {label=}")
"""


def toy(path, ours=True, tag=True):
    "A notebook that leaves a trace when it runs."
    kernel = dict(name='python3', language='python', display_name='python3')
    metadata = dict(kernelspec=kernel)
    if ours:
        metadata['neuralsolver'] = dict(papermill=True)
    tags = ['parameters'] if tag else []
    cells = [new_code_cell(PARAMETERS, metadata=dict(tags=tags)), new_code_cell(BODY)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(metadata=metadata, cells=cells), path)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    toy(tmp_path / 'nbs/ours.ipynb')
    toy(tmp_path / 'nbs/foreign.ipynb', ours=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch, *args):
    "The command in this process: the command line is rewritten, then read by papermill."
    monkeypatch.setattr(sys, 'argv', ['papermill', *args])
    register()
    return CliRunner().invoke(papermill.cli.papermill, sys.argv[1:])


def process(*command, **streams):
    "The command as a process."
    return subprocess.run(command, timeout=120, text=True, **streams)


def printed(notebook):
    "What the last cell of an executed notebook printed."
    outputs = json.loads(Path(notebook).read_text())['cells'][-1]['outputs']
    return ''.join(''.join(o['text']) for o in outputs if o.get('name') == 'stdout').strip()


# commands: as typed


SCRIPT = str(Path(sys.executable).with_name('papermill'))


def test_command_literal_in_a_pipe(repo):
    "Values arrive as the types of the notebook: `-r` gives text, `-p` a number."
    args = '--p steps 5 -r samples 7 --p label 8'.split()
    run = process(SCRIPT, 'nbs/ours.ipynb', *args, stdin=subprocess.DEVNULL, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ''
    assert printed('results/ours.ipynb') == "steps=5 samples=7 label='8'"


def test_command_as_a_module_does_not_overwrite_the_notebook(repo):
    "With a pipe as its input, plain papermill takes a single path for the output."
    before = Path('nbs/ours.ipynb').read_bytes()
    args = '-m papermill nbs/ours.ipynb --p steps 5 --prepare-only'.split()
    run = process(sys.executable, *args, input='', capture_output=True)
    assert run.returncode == 0, run.stderr
    assert Path('nbs/ours.ipynb').read_bytes() == before
    assert 'steps = 5' in Path('results/ours.ipynb').read_text()


# command line: where the output goes


def test_output_does_not_depend_on_the_working_directory(repo):
    (repo / 'elsewhere').mkdir()
    with contextlib.chdir('elsewhere'):
        args = rewrite(['../nbs/ours.ipynb'])
        assert args == [*QUIET, '../nbs/ours.ipynb', '../results/ours.ipynb']


@pytest.mark.parametrize(
    'args',
    [
        '-p steps 3 nbs/ours.ipynb out.ipynb',
        'nbs/ours.ipynb -',
        '- -',
        'nbs/foreign.ipynb -p step 3',
        'nbs/foreign.ipynb out.ipynb',
    ],
)
def test_output_that_is_named_or_foreign_is_papermills(repo, args):
    quiet = [*QUIET] if 'nbs/ours' in args else []
    assert rewrite(args.split()) == quiet + args.split()
    assert not (repo / 'results').exists()


# refusal: one line, before the kernel


@pytest.mark.parametrize(
    'args, said',
    [
        ('--p step 5', "unknown parameter 'step' (did you mean 'steps'?). Allowed: steps, "),
        ('-y {guidance:2}', "unknown parameter 'guidance'. Allowed: steps, samples, label."),
        ('-p steps many', "steps='many' is not allowed: give an integer."),
        ('-p steps None', 'steps=None is not allowed: give an integer.'),
        ('-p samples 7.5', 'samples=7.5 is not allowed: give an integer, or None.'),
        ('-p samples True', 'samples=True is not allowed: give an integer, or None.'),
    ],
)
def test_refusal_of_a_parameter(repo, monkeypatch, args, said):
    args = [word.replace(':', ': ') for word in args.split()]
    run = command(monkeypatch, 'nbs/ours.ipynb', *args)
    errors = [line for line in run.stderr.splitlines() if line.startswith('Error: ')]
    assert run.exit_code == 2
    assert len(errors) == 1 and errors[0].startswith(f'Error: nbs/ours.ipynb: {said}')
    assert not (repo / 'ran').exists() and not (repo / 'results/ours.ipynb').exists()


def test_refusal_of_a_notebook_without_tag(repo):
    toy(repo / 'nbs/ours.ipynb', tag=False)
    with pytest.raises(ParameterError, match='no cell is tagged `parameters`'):
        papermill.execute_notebook('nbs/ours.ipynb', None, progress_bar=False)
    assert not (repo / 'ran').exists()


def test_foreign_notebook_keeps_papermills_warning(repo):
    given = dict(step=3, steps='4')
    papermill.execute_notebook('nbs/foreign.ipynb', 'out.ipynb', given, progress_bar=False)
    assert printed('out.ipynb') == "steps='4' samples=None label=None"


@pytest.mark.parametrize('content, said', [('{', 'JSON'), (None, 'No such file')])
def test_broken_notebook_gets_papermills_own_error(repo, monkeypatch, content, said):
    shutil.rmtree(repo / 'nbs')
    if content:
        (repo / 'nbs').mkdir()
        (repo / 'nbs/ours.ipynb').write_text(content)
    run = command(monkeypatch, 'nbs/ours.ipynb', 'out.ipynb')
    assert run.exit_code == 1 and said in repr(run.exception)


# imports


API = """
import sys
{first}
import papermill
try:
    papermill.execute_notebook('nbs/ours.ipynb', None, dict(step=3), progress_bar=False)
except ValueError as e:
    print(e)
print(sys.argv[1:], [m for m in ('torch', 'numpy', 'neuralsolver.utils') if m in sys.modules])
"""


@pytest.mark.parametrize('first', ['', 'import neuralsolver.tools.papermill_engine'])
def test_import_in_either_order_is_light(repo, first):
    "The API is checked, too; the command line of a program that is not papermill is its own."
    program = API.format(first=first)
    run = process(sys.executable, '-c', program, 'nbs/ours.ipynb', '--p', stdout=subprocess.PIPE)
    message, state = run.stdout.splitlines()
    assert "unknown parameter 'step' (did you mean 'steps'?)" in message
    assert state == "['nbs/ours.ipynb', '--p'] []"
    assert not (repo / 'ran').exists()
