"`import neuralsolver` brings in what it needs and nothing else."

import json
import subprocess
import sys
import pytest
import neuralsolver


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
