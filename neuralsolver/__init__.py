"""NeuralSolver: few-step diffusion samplers as data, searched through the sampler (arXiv 2505.21114).

Attributes are imported on first use, so that `import neuralsolver` is cheap.
The modules are exported from nbs/ by nbdev.
"""
__version__ = "0.2.0"

import importlib
import pkgutil

_EXPORTS = {  # module: its names that are reached as neuralsolver.NAME
    'paths': ['NoisePath', 'LinearPath', 'ShiftedPath', 'VPPath', 'DDPMPath'],
    'fields': ['Field', 'GuidanceRange', 'GaussianMixture', 'guide'],
    'solvers': ['Solver', 'sample', 'save_solver'],
    'classical': ['uniform_grid', 'euler', 'midpoint', 'heun', 'rk4', 'adams_bashforth', 'adam2', 'adam4'],
    'transfer': ['change_path'],
    'spacings': ['time_grid'],
    'optimized_grids': ['optimized_nodes'],
    'exponential': ['ddim', 'deis', 'ipndm', 'ipndm_v'],
    'dpm_solvers': ['dpm_solver', 'dpm_solver_pp', 'unipc'],
    'neural': ['NeuralSolver', 'neural_solver', 'list_solvers', 'load_solver', 'get_solver'],
    'teachers': ['Teacher', 'teacher_trajectories', 'teacher_error'],
    'closed_form': ['fit_rows', 'gits'],
    'solver_search': ['search'],
    'models': ['SiT', 'DiT'],
    'flowdcn': ['FlowDCN'],
    'checkpoints': ['list_models', 'load_model'],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_RENAMED = {  # earlier name: what it is called now
    'Path': 'neuralsolver.NoisePath',
    'papermill_engine': 'neuralsolver.tools.papermill_engine',
    'search_runs': 'neuralsolver.tools.search_runs',
    'reproduce': 'neuralsolver.tools.reproduce',
    'docs': 'neuralsolver.tools.docs',
}
_MODULES = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith('_')]
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)
        globals()[name] = value
        return value
    if name in _RENAMED:
        raise AttributeError(f'neuralsolver.{name} is now {_RENAMED[name]}.')
    if name in _MODULES:
        return importlib.import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES})
