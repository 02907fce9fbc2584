"The repository as a whole: generated files are in step, the wheel is complete, README's commands are those that are run."

import ast, io, json, os, re, shutil, subprocess, sys, tokenize, tomllib
from pathlib import Path
import papermill, pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TEST = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]" && .venv/bin/pytest'
RUN = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]" && .venv/bin/papermill nbs/eval.ipynb --p steps 8'


def metadata(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['metadata']


NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
PAPERMILL = [p for p in NOTEBOOKS if metadata(p).get('neuralsolver', {}).get('papermill')]


def run(*args, cwd, **kwargs):
    done = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )
    assert done.returncode == 0, f'{args}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of the working tree: what git tracks, and what it would add."
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git clone')
    copy = tmp_path_factory.mktemp('tree')
    for name in filter(None, listed.stdout.split('\0')):
        if not (ROOT / name).is_file():
            continue  # deleted, not yet committed
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def contents(root):
    files = (p for p in root.rglob('*') if p.is_file() and p.name != '.last_checked')
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def test_clean_and_export_change_nothing(tree):
    before = contents(tree)
    env = os.environ | {'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1'}
    run(BIN / 'nbdev_clean', cwd=tree, env=env)
    run(BIN / 'nbdev_export', cwd=tree, env=env)
    after = contents(tree)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, 'run nbdev_clean and nbdev_export, and commit what they change'


def test_clean_keeps_tag_and_mark_but_not_the_rest(tmp_path):
    "On a notebook as an editor saves it; this guards the two allow-lists in settings.ini."
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    nb = tmp_path / 'nbs/toy.ipynb'
    nb.parent.mkdir()
    cell = {
        'cell_type': 'code',
        'id': 'a',
        'execution_count': 7,
        'outputs': [],
        'source': 'steps: int = 8',
        'metadata': {'tags': ['parameters'], 'collapsed': True},
    }
    kernel = {'name': 'python3', 'language': 'python', 'display_name': 'mine'}
    nb.write_text(
        json.dumps(
            {
                'cells': [cell],
                'nbformat': 4,
                'nbformat_minor': 5,
                'metadata': {
                    'kernelspec': kernel,
                    'language_info': {'name': 'python'},
                    'neuralsolver': {'papermill': True},
                },
            }
        )
    )
    run(BIN / 'nbdev_clean', cwd=tmp_path)
    cleaned = json.loads(nb.read_text())
    assert cleaned['metadata'] == {
        'kernelspec': kernel | {'display_name': 'python3'},
        'neuralsolver': {'papermill': True},
    }
    assert (
        cleaned['cells'][0]['metadata'] == {'tags': ['parameters']}
        and cleaned['cells'][0]['execution_count'] is None
    )


@pytest.mark.parametrize('nb', PAPERMILL, ids=lambda p: p.stem)
def test_parameters_cell(nb):
    "One cell, the first with code; every parameter typed, a literal, commented, and seen by papermill --help-notebook."
    code = [
        c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
    ]
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and tagged[0]['id'] == code[0]['id']
    source = ''.join(tagged[0]['source'])
    comments = {
        t.start[0]
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    names = []
    for node in ast.parse(source).body:
        assert isinstance(node, ast.AnnAssign), (
            f'line {node.lineno} is not `name: type = value  # comment`'
        )
        assert type(ast.literal_eval(node.value)).__name__ == ast.unparse(node.annotation), (
            f'line {node.lineno}: type and default differ'
        )
        assert node.end_lineno in comments, f'line {node.lineno} has no comment'
        names.append(node.target.id)
    shown = papermill.inspect_notebook(nb)
    assert list(shown) == names and all(
        p['help'] and p['inferred_type_name'] != 'None' for p in shown.values()
    )


USE = """
import json, pathlib, torch, neuralsolver as ns
from neuralsolver.utils import data_root, reports_root
result = ns.sample(lambda x, t: -x, torch.ones(2, 3), ns.load_solver('sit-xl-2', steps=8))
print(json.dumps([ns.__file__, str(data_root()), str(reports_root()), list(result.shape)]))
"""

MACHINE = re.compile(r'(?<![\w.~])/(?:tmp|work|home|root|Users)/')
TEXT = ('.ipynb', '.json', '.jsonl', '.csv', '.md', '.html')


def test_no_committed_file_names_a_folder_of_a_machine(tree):
    "Notebooks with their outputs, data, pages."
    found = []
    for file in sorted(p for p in tree.rglob('*') if p.suffix in TEXT):
        lines = file.read_text(encoding='utf-8').splitlines()
        wrong = [
            i for i, line in enumerate(lines, 1) if 'image/png' not in line and MACHINE.search(line)
        ]
        found += [f'{file.relative_to(tree)}:{i}' for i in wrong]
    assert not found, f'absolute paths: {found}'


def test_wheel_works_outside_the_repository(tree, tmp_path):
    source, wheels, target, work = (tmp_path / n for n in ('source', 'wheels', 'target', 'work'))
    shutil.copytree(tree, source)
    work.mkdir()
    (source / 'data/golden').mkdir(parents=True, exist_ok=True)
    (source / 'data/golden/big.json').write_text('{}')  # must stay behind
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q')
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, source, cwd=work)
    run(
        *pip,
        'install',
        '--no-deps',
        '--target',
        target,
        *wheels.glob('neuralsolver-*.whl'),
        cwd=work,
    )

    wanted = {
        p.relative_to(tree / 'data').as_posix()
        for p in (tree / 'data').rglob('*')
        if p.suffix in ('.json', '.safetensors', '.npz', '.csv', '.md') and 'golden' not in p.parts
    }
    assert wanted and wanted == {
        p.relative_to(target / 'neuralsolver/assets').as_posix()
        for p in (target / 'neuralsolver/assets').rglob('*')
        if p.is_file()
    }
    assert {p.name for p in target.iterdir() if p.suffix != '.dist-info'} <= {
        'neuralsolver',
        'bin',
    }  # neither nbs nor data at the top
    entry_points = next(target.glob('*.dist-info/entry_points.txt')).read_text()
    assert (
        '[papermill.engine]\nneuralsolver = neuralsolver.tools.papermill_engine:NeuralSolverEngine'
        in entry_points
    )

    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONPATH': str(target)}
    file, data, reports, shape = json.loads(run(sys.executable, '-c', USE, cwd=work, env=env))
    assert (
        Path(file) == target / 'neuralsolver/__init__.py'
        and Path(data) == target / 'neuralsolver/assets'
    )
    assert Path(reports) == work / 'reports' and shape == [2, 3]


@pytest.fixture
def readme():
    if not (ROOT / 'README.md').exists():
        pytest.skip('README.md is not made yet')
    return (ROOT / 'README.md').read_text(encoding='utf-8')


def test_readme_is_made_from_the_index_notebook(readme, tree, tmp_path):
    command = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['neuralsolver']['readme']
    shutil.copytree(tree / 'nbs', tmp_path / 'nbs')
    run(
        'bash',
        '-euo',
        'pipefail',
        '-c',
        command,
        cwd=tmp_path,
        env=os.environ | {'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'},
    )
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == readme, (
        f'README.md is not nbs/index.ipynb: {command}'
    )


def test_readme_commands(readme):
    fenced = [
        line
        for block in re.findall(r'^```[^\n]*\n(.*?)^```', readme, re.M | re.S)
        for line in block.splitlines()
    ]
    assert fenced.count(TEST) == 1 and fenced.count(RUN) == 1


# Stand-ins for python3 and for what its virtual environment would hold: each logs its arguments.
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >> "$LOG"\n'
CLOSING = '=== 3 passed in 1.00s ==='


@pytest.mark.parametrize(
    'pytest_exit, export, code',
    [(0, '', 0), (3, '', 3), (0, 'echo changed >> README.md', 1), (0, 'touch new.py', 1)],
)
def test_ci_runs_readmes_command_in_a_fresh_clone(tmp_path, pytest_exit, export, code):
    repo, bin, stubs = (tmp_path / n for n in ('repo', 'bin', 'stubs'))
    for d in (repo, bin, stubs):
        d.mkdir()
    shutil.copytree(ROOT / '.ci', repo / '.ci')
    shutil.copy(ROOT / '.gitignore', repo)
    (repo / 'README.md').write_text(f'```sh\n{RUN}\n{TEST}\n```\n')
    tails = {
        'pip': '',
        'pytest': f'echo "{CLOSING}"; exit {pytest_exit}',
        'nbdev_clean': 'echo noise',
        'nbdev_export': export,
    }
    for name, tail in tails.items():
        (stubs / name).write_text(STUB + tail + '\n')
    (bin / 'python3').write_text(STUB + f'mkdir -p .venv/bin; cp {stubs}/* .venv/bin/\n')
    for f in (*stubs.iterdir(), bin / 'python3'):
        f.chmod(0o755)
    git = (
        'git',
        '-c',
        'user.name=t',
        '-c',
        'user.email=t@example.org',
        '-c',
        'commit.gpgsign=false',
        '-c',
        'core.hooksPath=/dev/null',
    )
    for args in (('init', '-q'), ('add', '-A'), ('commit', '-q', '-m', 'first')):
        run(*git, *args, cwd=repo)
    (repo / '.venv').mkdir()  # a developer's environment, which must survive
    env = os.environ | {
        'PATH': f'{bin}{os.pathsep}{os.environ["PATH"]}',
        'LOG': str(tmp_path / 'log'),
        'TMPDIR': str(tmp_path),
    }
    done = subprocess.run(
        [str(repo / '.ci/run')],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    log = (tmp_path / 'log').read_text().splitlines()
    assert log[:4] == [
        'python3 nbs/tests/count_code.py',
        'python3 -m venv .venv',
        'pip install -q -e .[dev]',
        'pytest ',
    ]
    if not pytest_exit:
        assert log[4:] == ['nbdev_clean ', 'nbdev_export ']
    if not code:
        assert done.stdout.splitlines() == [CLOSING] and done.stderr == ''
    assert list((repo / '.venv').iterdir()) == [] and {p.name for p in tmp_path.iterdir()} == {
        'repo',
        'bin',
        'stubs',
        'log',
    }
