"`import neuralsolver` brings in what it needs and nothing else."
import json, subprocess, sys
import pytest
import neuralsolver

def fresh(code):
    "Run code in a new interpreter; its last printed line as JSON."
    return json.loads(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.splitlines()[-1])

def test_what_a_fresh_process_imports():
    bare, core, kinds = fresh('''
import json, sys
import neuralsolver as ns
heavy = ('torch', 'torchvision', 'torch_fidelity', 'matplotlib', 'pandas', 'seaborn', 'sympy', 'scipy', 'papermill', 'nbdev')
loaded = lambda: [m for m in heavy if m in sys.modules]
bare = loaded()
ns.sample, ns.search, ns.load_model, ns.Field, ns.NeuralSolver
ns.load_model('sit-tiny'); ns.load_solver('sit-xl-2', 8)
core = loaded()
import neuralsolver.solver_search
kinds = [type(ns.search).__name__, ns.search is neuralsolver.solver_search.search, type(ns.solver_search).__name__]
print(json.dumps([bare, core, kinds]))''')
    assert bare == []
    assert core == ['torch']
    assert kinds == ['function', True, 'module']

@pytest.mark.parametrize('name', neuralsolver.__all__)
def test_every_public_name_resolves(name):
    assert getattr(neuralsolver, name) is not None and name in dir(neuralsolver)

def test_no_name_is_listed_twice_and_an_unknown_one_is_an_attribute_error():
    assert len(set(neuralsolver.__all__)) == len(neuralsolver.__all__)
    with pytest.raises(AttributeError, match='smaple'): neuralsolver.smaple
