"The package as a guest: what it asks for, what it leaves alone, what it says is missing."

import ast
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import neuralsolver

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ConfigParser(delimiters=['='], interpolation=None)
CONFIG.read(ROOT / 'settings.ini', encoding='utf-8')
SETTINGS = CONFIG['DEFAULT']
FILES = [p for p in (ROOT / 'neuralsolver').rglob('*.py') if p.stem != '_modidx']
MODULES = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in FILES]
MODULES = [name.removesuffix('.__init__') for name in MODULES]


def requirements(key):
    "What settings.ini lists for the core ('') or an extra."
    return [Requirement(r) for r in SETTINGS[f'{key}_requirements'.lstrip('_')].split()]


@functools.cache
def needed(name):
    "An installed distribution and all that it needs."
    found = {canonicalize_name(name)}
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for r in map(Requirement, lines):
        if not r.marker or r.marker.evaluate({'extra': ''}):
            if canonicalize_name(r.name) not in found:
                found |= needed(r.name)
    return found


def environment(*keys):
    "Names to import of all that the core and these extras bring."
    asked = [r for key in ('', *keys) for r in requirements(key)]
    asked = [r for r in asked if r.name != SETTINGS['lib_name']]
    brought = set().union(*(needed(r.name) for r in asked))
    owners = importlib.metadata.packages_distributions()
    return {k for k, v in owners.items() if brought & set(map(canonicalize_name, v))}


# what is asked for


def test_the_library_asks_for_lower_bounds_only():
    assert len(requirements('')) <= 9
    asked = [r for key in ('', 'diffusers', 'eval') for r in requirements(key)]
    assert all(s.operator == '>=' for r in asked for s in r.specifier)
    bounds = {r.name: str(r.specifier) for r in requirements('')}
    assert bounds['torch'] == '>=2.4' and bounds['numpy'] == '>=1.26'


def test_the_readmes_commands_get_exact_versions():
    pinned = {r.name for r in requirements('dev') if str(r.specifier).startswith('==')}
    assert pinned >= {'torch', 'torchvision', 'torch-fidelity', 'diffusers', 'nbdev', 'papermill'}


def imported(file):
    "Libraries that a module imports anywhere; not the standard library, not itself."
    nodes = list(ast.walk(ast.parse(file.read_text(encoding='utf-8'))))
    found = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    found += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    return {name.split('.')[0] for name in found} - {*sys.stdlib_module_names, 'neuralsolver'}


def test_every_library_that_is_imported_is_asked_for():
    "triton comes with torch for CUDA; docutils with Sphinx; comfy runs the nodes that import it."
    known = environment('diffusers', 'eval', 'features', 'notebooks')
    known |= {'triton', 'docutils', 'comfy', 'folder_paths'}
    unknown = {f.name: imported(f) - known for f in FILES if not imported(f) <= known}
    assert not unknown


# what is missing

IMPORT = """
import importlib, json, sys
modules, present, first = map(json.loads, sys.argv[1:])
from importlib.metadata import packages_distributions
for name in first: importlib.import_module(name)
absent = packages_distributions().keys() - set(present)
for name in absent - {'sphinx'}: sys.modules[name] = None  # scipy asks for its key
said = {}
for name in modules:
    try: importlib.import_module(name)
    except ImportError as e: said[name] = str(e)
print(json.dumps(said))
"""
MISSING = re.compile(r'[\w, ]+ cannot be found: pip install "neuralsolver\[([\w,]+)\]"\.')
CORE = """paths fields coordinates solvers classical transfer spacings integrals optimized_grids
exponential dpm_solvers neural teachers closed_form solver_search losses recipes descent starts
models flowdcn checkpoints training data store utils kernels precision metrics fashion_features
shards""".split()


def errors(modules, present, first=(), code=IMPORT):
    "What modules say when they are imported beside these libraries alone."
    arguments = [json.dumps(sorted(names)) for names in (modules, present, first)]
    command = [sys.executable, '-W', 'ignore', '-c', code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def core_errors():
    return errors(MODULES, {*environment(), 'neuralsolver'})


def test_with_the_core_alone_a_module_imports_or_names_its_extra(core_errors):
    assert not {f'neuralsolver.{name}' for name in CORE} & core_errors.keys()
    wanted = {'neuralsolver.diffusers', 'neuralsolver.evaluate', 'neuralsolver.tools.docs'}
    assert wanted <= core_errors.keys()
    assert all(MISSING.fullmatch(line) for line in core_errors.values()), core_errors


@pytest.mark.parametrize('extra', ['diffusers', 'eval', 'diffusers,eval', 'notebooks'])
def test_with_the_extra_that_it_names_a_module_imports(core_errors, extra):
    modules = [m for m, line in core_errors.items() if MISSING.fullmatch(line)[1] == extra]
    keys = extra.split(',') if extra != 'notebooks' else ['diffusers', 'eval', 'notebooks']
    assert modules and errors(modules, {*environment(*keys), 'neuralsolver'}) == {}


WITHOUT_POSIX = """
import os, signal
for name in [n for n in sys.modules if n.startswith('neuralsolver')]: del sys.modules[name]
for name in 'fcntl grp pwd resource termios tty pty'.split(): sys.modules[name] = None
for name in 'fork getpgid getuid killpg nice setsid'.split(): delattr(os, name)
for name in 'SIGALRM SIGHUP SIGKILL'.split(): delattr(signal, name)
said = {}"""


def test_modules_import_without_posix():
    "As on Windows; libraries, which have other ways there, are imported before."
    first = 'neuralsolver._scheduler matplotlib.pyplot pandas papermill.cli nbdev.showdoc filelock'
    first += ' nbconvert neuralsolver.pipelines neuralsolver.tools.docs'
    code = IMPORT.replace('\nsaid = {}', WITHOUT_POSIX)
    code = code.replace('sys.modules[name] = None  # scipy', 'pass # scipy')
    assert errors(MODULES, [], first.split(), code) == {}


# a guest beside versions that are there

THERE = dict(torch='2.8.0+cu128', torchvision='0.23.0+cu128', numpy='1.26.4', diffusers='0.32.0')
THERE |= dict(transformers='4.48.0', matplotlib='3.9.0', pandas='2.2.0', safetensors='0.4.3')
THERE |= dict(tqdm='4.66.0', filelock='3.13.0', pillow='10.4.0', scipy='1.11.0')
NEWER = dict(torch='2.15.0', torchvision='0.30.0', numpy='2.4.6', diffusers='0.42.1')
NEWER |= dict(transformers='5.24.0', matplotlib='3.12.0', pandas='3.0.0', safetensors='0.8.0')
NEWER |= dict(tqdm='4.70.1', filelock='4.3.1', pillow='12.0.0', scipy='1.18.0')
ONLY_NEW = {'fastcore': '2.2.41', 'torch-fidelity': '0.4.0', 'accelerate': '1.15.0'}


def metadata(name, version, lines=()):
    return '\n'.join(['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}', *lines, ''])


def stub_wheel(folder, name, version, text):
    "A distribution that is nothing but its metadata."
    stem = f'{name.replace("-", "_")}-{version}'
    tag = 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
    with zipfile.ZipFile(folder / f'{stem}-py3-none-any.whl', 'w') as z:
        for file, content in dict(METADATA=text, WHEEL=tag, RECORD='').items():
            z.writestr(f'{stem}.dist-info/{file}', content)


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    "Wheels: newer versions of everything, the pins of `dev`, and this package."
    folder = tmp_path_factory.mktemp('index')
    work = tmp_path_factory.mktemp('metadata')
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(work)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (work / 'neuralsolver.egg-info/PKG-INFO').read_text(encoding='utf-8')
    stub_wheel(folder, 'neuralsolver', SETTINGS['version'], text)
    pins = {r.name: str(r.specifier)[2:] for r in requirements('dev') if r.name in NEWER}
    pins = {name: pin for name, pin in pins.items() if pin.count('.') == 2}
    for versions in (NEWER, ONLY_NEW, pins):
        for name, version in versions.items():
            stub_wheel(folder, name, version, metadata(name, version))
    return folder


def plan(index, there, wanted, work):
    "What pip would install beside these versions: name -> version. No network, nothing installed."
    env = work / 'env'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(env)], check=True)
    site = next(env.rglob('site-packages'))
    for name, version in there.items():
        lines = ['Requires-Dist: torch==' + there['torch']] if name == 'xformers' else []
        info = site / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(metadata(name, version, lines))
        (info / 'INSTALLER').write_text('pip\n')
    python = next(p for p in (env / 'bin/python', env / 'Scripts/python.exe') if p.exists())
    pip = [sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q']
    pip += ['--dry-run', '--no-index', '--find-links', str(index), '--report', '-', wanted]
    variables = {k: v for k, v in os.environ.items() if not k.startswith('PIP_')}
    variables['PIP_CONFIG_FILE'] = os.devnull
    done = subprocess.run(pip, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    installed = [item['metadata'] for item in json.loads(done.stdout)['install']]
    return {item['name']: item['version'] for item in installed}


@pytest.mark.parametrize(
    'torch, extra', [('2.8.0+cu128', '[diffusers]'), ('2.15.0+cu132', '[diffusers,eval]')]
)
def test_installing_beside_a_pipeline_changes_no_installed_package(index, tmp_path, torch, extra):
    there = THERE | dict(torch=torch, xformers='0.0.32')
    new = plan(index, there, f'neuralsolver{extra}', tmp_path)
    assert new.keys() & there.keys() == set()
    assert new.keys() <= {'neuralsolver', *ONLY_NEW}


def test_pins_would_be_seen(index, tmp_path):
    "The same dry run with an exact version reports what it replaces."
    stub_wheel(index, 'pinned', '1', metadata('pinned', '1', ['Requires-Dist: torch==2.15.0']))
    assert plan(index, THERE, 'pinned', tmp_path)['torch'] == '2.15.0'


# `import neuralsolver` brings in what it needs and nothing else.


def fresh(code):
    "Run code in a new interpreter; its last printed line as JSON."
    return json.loads(
        subprocess.run(
            [sys.executable, '-c', code], check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
    )


def test_what_a_fresh_process_imports():
    bare, core, kinds = fresh("""
import json, sys
import neuralsolver as ns
heavy = '''torch torchvision torch_fidelity matplotlib pandas seaborn sympy scipy papermill nbdev
    diffusers transformers'''.split()
loaded = lambda: [m for m in heavy if m in sys.modules]
bare = loaded()
ns.sample, ns.search, ns.load_model, ns.Field, ns.NeuralSolver
ns.load_model('sit-tiny'); ns.load_solver('sit-xl-2', 8)
core = loaded()
import neuralsolver.solver_search
same = ns.search is neuralsolver.solver_search.search
kinds = [type(ns.search).__name__, same, type(ns.solver_search).__name__]
print(json.dumps([bare, core, kinds]))""")
    assert bare == []
    assert core == ['torch']
    assert kinds == ['function', True, 'module']


@pytest.mark.parametrize('name', neuralsolver.__all__)
def test_every_public_name_resolves(name):
    assert getattr(neuralsolver, name) is not None and name in dir(neuralsolver)


def test_without_diffusers_all_but_its_modules_work():
    core, errors = fresh("""
import json, sys
sys.modules['diffusers'] = None # as if it were not installed
import torch
from neuralsolver import *
import neuralsolver as ns
core = list(ns.sample(lambda x, t: -x, torch.ones(2, 3), ns.load_solver('sit-xl-2', 8)).shape)
errors = []
for name in ('diffusers', 'pipelines', 'zero_shot'):
    try: getattr(ns, name)
    except ImportError as e: errors.append(str(e))
print(json.dumps([core, errors]))""")
    assert core == [2, 3] and len(errors) == 3
    assert all(
        'diffusers cannot be found: pip install "neuralsolver[diffusers' in e for e in errors
    )


def test_the_modules_for_diffusers_resolve():
    import neuralsolver.diffusers

    assert neuralsolver.diffusers.FlowNeuralSolverScheduler.__module__ == 'neuralsolver.diffusers'
    for name in ('pipelines', 'zero_shot'):
        assert getattr(neuralsolver, name).__name__ == f'neuralsolver.{name}'


@pytest.mark.parametrize('name, now', neuralsolver._RENAMED.items())
def test_refusal_of_a_renamed_name_says_the_new_one(name, now):
    with pytest.raises(AttributeError, match=f'neuralsolver.{name} is now {now}'):
        getattr(neuralsolver, name)


def test_no_name_is_listed_twice_and_an_unknown_one_is_an_attribute_error():
    assert len(set(neuralsolver.__all__)) == len(neuralsolver.__all__)
    with pytest.raises(AttributeError, match='smaple'):
        neuralsolver.smaple
