"The repository as a whole: generated files, the wheel, README's commands, continuous integration."

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]"'
TEST = f'{INSTALL} && .venv/bin/pytest'
RUN = f'{INSTALL} && .venv/bin/papermill nbs/eval.ipynb --p steps 8'


def metadata(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['metadata']


NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
PAPERMILL = [p for p in NOTEBOOKS if metadata(p).get('neuralsolver', {}).get('papermill')]


def run(*args, cwd, **kwargs):
    "What a command prints; it must succeed."
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


@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    "A copy of the working tree: what git tracks, and what it would add."
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git clone')
    copy = tmp_path_factory.mktemp('tree')
    for name in filter(None, listed.stdout.split('\0')):
        if (ROOT / name).is_file():  # else deleted, not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


# generated files


def contents(root):
    files = (p for p in root.rglob('*') if p.is_file() and p.name != '.last_checked')
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def test_generated_files_are_those_of_the_notebooks(tree):
    "nbdev_clean and nbdev_export change nothing; tags and marks survive."
    before = contents(tree)
    env = os.environ | dict(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE='1')
    run(BIN / 'nbdev_clean', cwd=tree, env=env)
    run(BIN / 'nbdev_export', cwd=tree, env=env)
    after = contents(tree)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, 'run nbdev_clean and nbdev_export, and commit what they change'


def test_generated_readme_is_the_index_notebook(tree, tmp_path):
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    command = settings['tool']['neuralsolver']['readme']
    (tmp_path / 'nbs').mkdir()
    shutil.copy(tree / 'nbs/index.ipynb', tmp_path / 'nbs')
    path = f'{BIN}{os.pathsep}{os.environ["PATH"]}'
    run('bash', '-euo', 'pipefail', '-c', command, cwd=tmp_path, env=os.environ | dict(PATH=path))
    made = (tmp_path / 'README.md').read_text(encoding='utf-8')
    assert made == (ROOT / 'README.md').read_text(encoding='utf-8'), f'run: {command}'


def test_readme_commands_are_those_that_are_tested():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'^```[^\n]*\n(.*?)^```', readme, re.M | re.S)
    fenced = [line for block in blocks for line in block.splitlines()]
    assert fenced.count(TEST) == 1 and fenced.count(RUN) == 1


def subtitle(nb):
    "The line below the title, which is the docstring of the page's module."
    first = json.loads(nb.read_text(encoding='utf-8'))['cells'][0]
    lines = ''.join(first['source']).splitlines()
    return next(line for line in lines if line.startswith('> ')).removeprefix('> ')


def test_readme_is_short():
    assert (ROOT / 'README.md').stat().st_size <= 8000


def test_guide_lists_every_page_with_its_subtitle():
    "In the order of the folders; notebooks that are run are named with their command."
    cells = json.loads((ROOT / 'nbs/guide.ipynb').read_text(encoding='utf-8'))['cells']
    guide = '\n'.join(''.join(cell['source']) for cell in cells)
    names = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]
    pages = {name: p for name, p in zip(names, NOTEBOOKS) if p.stem[:2].isdigit()}
    listed = re.findall(r'(?m)^\| \[(\w+)\]\(\.\./(nbs/\S+)\) \| (.*) \|$', guide)
    rows = [row for row in listed if row[1] in pages]
    assert rows == [(p.stem, name, subtitle(p)) for name, p in sorted(pages.items())]
    assert [name for name in names if name not in guide and name != 'nbs/guide.ipynb'] == []


MACHINE = re.compile(r'(?<![\w.~])/(?:tmp|work|home|root|Users)/')
TEXT = ('.ipynb', '.json', '.jsonl', '.csv', '.md', '.html')


def test_committed_files_name_no_folder_of_a_machine(tree):
    "Notebooks with their outputs, data, pages."
    found = []
    for file in sorted(p for p in tree.rglob('*') if p.suffix in TEXT):
        lines = file.read_text(encoding='utf-8').splitlines()
        for i, line in enumerate(lines, 1):
            if 'image/png' not in line and MACHINE.search(line):
                found.append(f'{file.relative_to(tree)}:{i}')
    assert not found, f'absolute paths: {found}'


# parameters


def comment_lines(source):
    "Numbers of the lines with a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT}


@pytest.mark.parametrize('nb', PAPERMILL, ids=lambda p: p.stem)
def test_parameters_are_typed_and_explained(nb):
    "One cell, the first with code; `name: type = literal or None  # text`, as papermill reads it."
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    assert [c['id'] for c in tagged] == [code[0]['id']]
    source = ''.join(tagged[0]['source'])
    comments = comment_lines(source)
    names = []
    for node in ast.parse(source).body:
        line = f'line {node.lineno}'
        assert isinstance(node, ast.AnnAssign), f'{line} is not `name: type = value  # comment`'
        value = ast.literal_eval(node.value)
        kinds = (ast.unparse(node.annotation), 'NoneType')
        assert type(value).__name__ in kinds, f'{line}: type and default differ'
        assert node.end_lineno in comments, f'{line} has no comment'
        names.append(node.target.id)
    shown = papermill.inspect_notebook(nb)
    assert list(shown) == names, 'papermill does not understand a line: no = in its comment'
    assert all(p['help'] and p['inferred_type_name'] != 'None' for p in shown.values())


# the wheel


USE = """
import json, pathlib, torch, neuralsolver as ns
from neuralsolver.utils import data_root, reports_root
result = ns.sample(lambda x, t: -x, torch.ones(2, 3), ns.load_solver('sit-xl-2', steps=8))
print(json.dumps([ns.__file__, str(data_root()), str(reports_root()), list(result.shape)]))
"""
DATA = ('.json', '.jsonl', '.safetensors', '.npz', '.csv', '.md')


def check_files(tree, target):
    "Modules and data files are complete; those of the tests stay behind."
    files = [p.relative_to(tree / 'data') for p in (tree / 'data').rglob('*') if p.is_file()]
    wanted = {f for f in files if f.suffix in DATA and f.parts[0] != 'golden'}
    assets = target / 'neuralsolver/assets'
    assert wanted == {p.relative_to(assets) for p in assets.rglob('*') if p.is_file()}
    modules = {p.relative_to(tree) for p in (tree / 'neuralsolver').rglob('*.py')}
    assert modules == {p.relative_to(target) for p in (target / 'neuralsolver').rglob('*.py')}
    at_the_top = {p.name for p in target.iterdir() if p.suffix != '.dist-info'}
    assert at_the_top <= {'neuralsolver', 'bin'}  # neither nbs nor data


def check_used(target, work):
    "The installed package works in another folder."
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(target))
    file, data, reports, shape = json.loads(run(sys.executable, '-c', USE, cwd=work, env=env))
    assert Path(file) == target / 'neuralsolver/__init__.py'
    assert Path(data) == target / 'neuralsolver/assets'
    assert Path(reports) == work / 'reports' and shape == [2, 3]


@pytest.fixture
def source(tree, tmp_path):
    "What a wheel is built from; a file that must stay behind."
    copy = tmp_path / 'source'
    for name in ('neuralsolver', 'data'):
        shutil.copytree(tree / name, copy / name)
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(tree / name, copy)
    (copy / 'data/golden').mkdir(parents=True, exist_ok=True)
    (copy / 'data/golden/big.json').write_text('{}')
    return copy


def test_wheel_has_all_files_and_works_outside_the_repository(tree, source, tmp_path):
    "The build step of a wheel without the packing."
    target = tmp_path / 'target'
    run(sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', target, cwd=source)
    check_files(tree, target)
    check_used(target, tmp_path / 'work')


@pytest.mark.slow
def test_wheel_is_built_and_installed(tree, source, tmp_path):
    wheels = tmp_path / 'wheels'
    target = tmp_path / 'target'
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q')
    no_network = ('--no-deps', '--no-build-isolation')
    run(*pip, 'wheel', *no_network, '-w', wheels, source, cwd=tmp_path)
    wheel = next(wheels.glob('neuralsolver-*.whl'))
    run(*pip, 'install', '--no-deps', '--target', target, wheel, cwd=tmp_path)
    check_files(tree, target)
    check_used(target, tmp_path / 'work')
    entry_points = next(target.glob('*.dist-info/entry_points.txt')).read_text()
    engine = 'neuralsolver.tools.papermill_engine:NeuralSolverEngine'
    assert f'[papermill.engine]\nneuralsolver = {engine}' in entry_points


# continuous integration, with stand-ins for python3 and for the tools of its environment


CLOSING = '=== 3 passed in 1.00s ==='
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >> "$LOG"\n'
CORE = 'case "$*" in *venv*) mkdir -p "$3/bin" && cp "$(dirname "$0")"/p* "$3/bin";; esac'
TOOLS = dict(pip='', pytest=f'echo "{CLOSING}"', python=CORE, twine='', ruff='')
TOOLS |= dict(nbdev_clean='echo noise', nbdev_export='')
COMMANDS = [
    'python3 nbs/tests/count_code.py',
    'python3 -m venv .venv',
    'pip install -q -e .[dev]',
    'pytest ',
    'python -m build -q --no-isolation -o CLONE/dist .',
    'twine check --strict CLONE/dist/*',
    'python -m venv CLONE/core',
    'pip install -q CLONE/dist/*.whl torch==1',
    'python CLONE/installed.py',
    'ruff check',
    'ruff format --check',
    'nbdev_clean ',
    'nbdev_export ',
]


def executable(file, body):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{STUB}{body}\n')
    file.chmod(0o755)


@pytest.fixture
def repo(tmp_path):
    "A repository with README's commands, and a developer's environment that must survive."
    repo = tmp_path / 'repo'
    shutil.copytree(ROOT / '.ci', repo / '.ci')
    shutil.copy(ROOT / '.gitignore', repo)
    (repo / 'README.md').write_text(f'```sh\n{RUN}\n{TEST}\n```\n')
    (repo / 'settings.ini').write_text('dev_requirements = torch==1 ruff==2\n')
    executable(repo / 'nbs/tests/installed.py', '')
    git = 'git -c user.name=t -c user.email=t@example.org -c commit.gpgsign=false'.split()
    git += ['-c', 'core.hooksPath=/dev/null']
    for args in ('init -q', 'add -A', 'commit -q -m first'):
        run(*git, *args.split(), cwd=repo)
    (repo / '.venv').mkdir()
    return repo


@pytest.mark.parametrize(
    'changes, code, commands',
    [
        ({}, 0, COMMANDS),
        (dict(pytest='exit 3'), 3, COMMANDS[:4]),
        (dict(twine='exit 1'), 1, COMMANDS[:6]),
        (dict(ruff='exit 1'), 1, COMMANDS[:10]),
        (dict(nbdev_export='echo changed >> README.md'), 1, COMMANDS),
        (dict(nbdev_export='touch new.py'), 1, COMMANDS),
    ],
    ids=['green', 'tests', 'wheel', 'linter', 'change', 'new'],
)
def test_ci_runs_readmes_command_in_a_fresh_clone(repo, tmp_path, changes, code, commands):
    for name, body in (TOOLS | changes).items():
        executable(tmp_path / 'stubs' / name, body)
    executable(tmp_path / 'bin/python3', f'mkdir -p .venv/bin; cp {tmp_path}/stubs/* .venv/bin/')
    path = f'{tmp_path}/bin{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        [str(repo / '.ci/run')],
        cwd=tmp_path,
        env=os.environ | dict(PATH=path, LOG=f'{tmp_path}/log', TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    log = re.sub(rf'{re.escape(str(tmp_path))}/tmp\.\w+', 'CLONE', (tmp_path / 'log').read_text())
    assert log.splitlines() == commands
    if not code:
        assert done.stdout.splitlines() == [CLOSING] and done.stderr == ''
    assert list((repo / '.venv').iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {'repo', 'bin', 'stubs', 'log'}
