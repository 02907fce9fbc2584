"The papermill command as a user types it, on toy notebooks in throw-away repositories."

import json, os, pty, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

COMMANDS = {
    'script': [str(Path(sys.executable).with_name('papermill'))],
    'module': [sys.executable, '-m', 'papermill'],
}


def toy(path, ours=True, tag=True):
    metadata = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'python3'}}
    if ours:
        metadata['neuralsolver'] = {'papermill': True}
    cells = [
        new_code_cell(
            'steps: int = 8  # network calls', metadata={'tags': ['parameters'] if tag else []}
        ),
        new_code_cell('from pathlib import Path; Path("ran").touch(); print(f"{steps=}")'),
    ]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(metadata=metadata, cells=cells), path)


@pytest.fixture
def repo(tmp_path):
    toy(tmp_path / 'nbs/ours.ipynb')
    toy(tmp_path / 'nbs/foreign.ipynb', ours=False)
    return tmp_path


def papermill(repo, *args, command='script', **kwargs):
    kwargs = {'stdin': subprocess.DEVNULL} | kwargs
    return subprocess.run(
        [*COMMANDS[command], *args], cwd=repo, capture_output=True, text=True, timeout=120, **kwargs
    )


def printed(nb):
    nb = json.loads(nb) if isinstance(nb, str) else json.loads(Path(nb).read_text())
    return ''.join(
        ''.join(o['text']) for o in nb['cells'][-1]['outputs'] if o.get('name') == 'stdout'
    ).strip()


@pytest.mark.parametrize('command', COMMANDS)
def test_literal_command_piped(repo, command):
    run = papermill(repo, 'nbs/ours.ipynb', '--p', 'steps', '5', command=command)
    assert run.returncode == 0, run.stderr
    assert printed(repo / 'reports/ours.ipynb') == 'steps=5'
    assert run.stdout == ''


def test_literal_command_on_a_terminal(repo):
    main, terminal = pty.openpty()
    try:  # three streams on a terminal; its buffer holds the few lines papermill writes
        run = subprocess.run(
            [*COMMANDS['script'], 'nbs/ours.ipynb', '--p', 'steps', '5', '--no-progress-bar'],
            cwd=repo,
            timeout=120,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        said = os.read(main, 10_000).decode()
    finally:
        os.close(main)
        os.close(terminal)
    assert run.returncode == 0, said
    assert printed(repo / 'reports/ours.ipynb') == 'steps=5'


def test_input_pipe_does_not_overwrite_the_notebook(repo):
    before = (repo / 'nbs/ours.ipynb').read_bytes()
    run = papermill(repo, 'nbs/ours.ipynb', '--prepare-only', stdin=None, input='')
    assert run.returncode == 0, run.stderr
    assert (repo / 'nbs/ours.ipynb').read_bytes() == before and (
        repo / 'reports/ours.ipynb'
    ).exists()


def test_reports_folder_does_not_depend_on_the_working_directory(repo):
    (repo / 'elsewhere').mkdir()
    run = papermill(repo / 'elsewhere', '../nbs/ours.ipynb', '--prepare-only')
    assert run.returncode == 0, run.stderr
    assert (repo / 'reports/ours.ipynb').exists()


@pytest.mark.parametrize('command, ours', [('script', False), ('module', True)])
def test_explicit_output_and_dashes_are_papermills(repo, command, ours):
    name = f'nbs/{"ours" if ours else "foreign"}.ipynb'
    assert (
        papermill(
            repo, '-p', 'steps', '3', name, 'out.ipynb', '--prepare-only', command=command
        ).returncode
        == 0
    )
    assert 'steps = 3' in (repo / 'out.ipynb').read_text()
    run = papermill(repo, name, '-', '--prepare-only', '-p', 'steps', '3', command=command)
    assert 'steps = 3' in json.loads(run.stdout)['cells'][1]['source'][-1]
    run = papermill(
        repo,
        '-',
        '-',
        '--prepare-only',
        command=command,
        stdin=None,
        input=(repo / name).read_text(),
    )
    assert len(json.loads(run.stdout)['cells']) == 2
    assert not (repo / 'reports').exists()


def test_foreign_notebook_is_untouched(repo):
    run = papermill(
        repo, 'nbs/foreign.ipynb', '-p', 'step', '3'
    )  # no output named: printed; unknown parameter: papermill's warning
    assert run.returncode == 0 and printed(run.stdout) == 'steps=8'
    assert not (repo / 'reports').exists()


@pytest.mark.parametrize(
    'args, said',
    [
        (
            ('--p', 'step', '5'),
            ["unknown parameter 'step'", "did you mean 'steps'", 'Allowed: steps.'],
        ),
        (('-y', '{steps: 3, guidance: 2}'), ["unknown parameter 'guidance'", 'Allowed: steps.']),
    ],
)
def test_unknown_parameter_fails_before_the_kernel(repo, args, said):
    run = papermill(repo, 'nbs/ours.ipynb', *args)
    error = [line for line in run.stderr.splitlines() if line.startswith('Error: ')]
    assert run.returncode == 2 and len(error) == 1 and 'Traceback' not in run.stderr
    assert all(s in error[0] for s in ['nbs/ours.ipynb', *said])
    assert not (repo / 'ran').exists() and not (repo / 'reports/ours.ipynb').exists()


def test_missing_tag_fails_before_the_kernel(repo):
    toy(repo / 'nbs/ours.ipynb', tag=False)
    run = papermill(repo, 'nbs/ours.ipynb')
    assert (
        run.returncode == 2
        and 'no cell is tagged `parameters`' in run.stderr
        and not (repo / 'ran').exists()
    )


API = """
import sys
{first}
import papermill
try: papermill.execute_notebook('nbs/ours.ipynb', None, parameters=dict(step=3), progress_bar=False)
except ValueError as e: print(e)
print(sys.argv[1:], [m for m in ('torch', 'numpy', 'neuralsolver.utils') if m in sys.modules])
"""


@pytest.mark.parametrize('first', ['', 'import neuralsolver.tools.papermill_engine'])
def test_api_checks_too_and_loads_light(repo, first):
    "In either import order; the command line of a program that is not papermill is its own."
    run = subprocess.run(
        [sys.executable, '-c', API.format(first=first), 'nbs/ours.ipynb', '--p'],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    message, state = run.stdout.splitlines()
    assert "unknown parameter 'step' (did you mean 'steps'?)" in message
    assert state == "['nbs/ours.ipynb', '--p'] []"
    assert not (repo / 'ran').exists()


def test_broken_notebook_gets_papermills_own_error(repo):
    (repo / 'nbs/ours.ipynb').write_text('{')
    run = papermill(repo, 'nbs/ours.ipynb', 'out.ipynb')
    assert run.returncode == 1 and 'JSON' in run.stderr and 'papermill_engine' not in run.stderr
    shutil.rmtree(repo / 'nbs')
    run = papermill(repo, 'nbs/ours.ipynb', 'out.ipynb')
    assert run.returncode == 1 and 'No such file' in run.stderr
