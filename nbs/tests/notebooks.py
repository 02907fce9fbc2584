"Notebooks run in the process of the tests: papermill itself takes seconds to start."

import json
from pathlib import Path

import matplotlib.pyplot
import torch

NBS = Path(__file__).resolve().parent.parent


def cells_of(notebook):
    "Sources of the code cells, and whether a cell holds the parameters."
    cells = json.loads((NBS / f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    return [(''.join(c['source']), 'parameters' in c['metadata'].get('tags', [])) for c in code]


def defaults_of(notebook):
    "The parameters of a notebook with their defaults."
    space = {}
    exec(next(source for source, parameters in cells_of(notebook) if parameters), space)
    return {k: v for k, v in space.items() if not k.startswith('__')}


def run_notebook(notebook, stop=None, **parameters):
    "Run the code cells, or those before the one with the text `stop`; returns their names."
    unknown = parameters.keys() - defaults_of(notebook).keys()
    assert not unknown, f'{notebook}: no such parameters {unknown}'
    space = {'__name__': '__main__'}
    threads = torch.get_num_threads()
    with matplotlib.rc_context({'backend': 'agg'}), torch.random.fork_rng():
        try:
            for source, tagged in cells_of(notebook):
                if stop and stop in source:
                    break
                exec(source, space)
                if tagged:
                    space.update(parameters)
        finally:
            torch.set_num_threads(threads)
            matplotlib.pyplot.close('all')
    return space
