"""What an installed core must do, without pytest: `python installed.py` in its environment.

Solvers, a search, files, models; every other module says which extra it needs.
"""

import importlib
import pkgutil
import re
import sys
import tempfile
from pathlib import Path

import torch

import neuralsolver as ns

torch.set_num_threads(1)
RULES = ('euler', 'adams_bashforth', 'ddim', 'deis', 'ipndm', 'dpm_solver_pp', 'unipc')


def decay(x, t):
    return -x


def check_solvers():
    "Tables and rules solve x' = -x."
    x = torch.ones(2, 3, dtype=torch.float64)
    nearest = {n: min(have, key=lambda k: abs(k - 8)) for n, have in ns.list_solvers().items()}
    solvers = [ns.load_solver(name, steps) for name, steps in nearest.items()]
    solvers += [getattr(ns, rule)(8) for rule in RULES]
    assert len(solvers) >= 14
    for solver in solvers:
        end = ns.sample(decay, x, solver)
        assert end.isfinite().all(), solver.name
        if solver.path.coordinates == 'velocity':  # else its times are not those of this equation
            assert (end - x / torch.e).abs().max() < 0.05, solver.name


def check_search():
    "The default recipe and the paper's; a solver is the same after a file."
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def field(x, t):
        return torch.tanh(2 * x) - x

    for method, iterations in (('ours', 40), ('paper', 20)):
        found = ns.search(
            field, noise, steps=5, method=method, iterations=iterations, progress=False
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'mine.json'
            ns.save_solver(found.solver, file)
            again = ns.load_solver(file)
        assert torch.equal(ns.sample(field, noise, found.solver), ns.sample(field, noise, again))


def check_models():
    "Models in the package, with guidance."
    names = ns.list_models()
    assert len(names) >= 3
    for name in ('sit-tiny', 'flowdcn-tiny'):
        field = ns.Field(ns.load_model(name), guidance=2.0)
        x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        assert (
            ns.sample(field, x, ns.load_solver('sit-xl-2', steps=5), torch.arange(2))
            .isfinite()
            .all()
        )


def modules():
    "Names of all modules."
    found = pkgutil.walk_packages(ns.__path__, 'neuralsolver.')
    return [m.name for m in found if not m.name.split('.')[-1] == '_modidx']


def check_extras():  # names of modules that are not of the core
    "A module imports, or says in one line which extra it needs."
    outside = []
    for name in modules():
        try:
            importlib.import_module(name)
        except ImportError as e:
            assert re.fullmatch(
                r'.* cannot be found: pip install "neuralsolver\[[\w,]+\]"\.', str(e)
            ), (
                name,
                e,
            )
            outside.append(name)
    return outside


if __name__ == '__main__':
    check_solvers()
    check_search()
    check_models()
    outside = check_extras()
    print(f'torch {torch.__version__}, Python {sys.version.split()[0]}: core works; {ns.__file__}')
    print(f'{len(outside)} modules wait for their extra')
