"One pytest item per library notebook: nbdev's runner, with the flags of settings.ini."

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# two test processes share the cores; torch is not imported yet, and notebooks started here follow
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_collect_file(file_path, parent):
    "Numbered notebooks, the index and the guide; those for papermill have tests of their own."
    if not re.fullmatch(r'(\d\d_.*|index|guide)\.ipynb', file_path.name):
        return None
    metadata = json.loads(file_path.read_text(encoding='utf-8'))['metadata']
    if metadata.get('neuralsolver', {}).get('papermill'):
        return None
    return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name='run')


class NotebookFailure(Exception):
    pass


@contextlib.contextmanager
def torch_state():
    "Undo what a notebook changes in torch."
    import torch

    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    grad = torch.is_grad_enabled()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)


@contextlib.contextmanager
def process_state():
    "Undo what a notebook's shell and cells change in this process, for the tests that follow."
    from IPython.core.interactiveshell import InteractiveShell

    path = sys.path[:]
    environ = dict(os.environ)
    main = sys.modules['__main__']
    hooks = (sys.displayhook, sys.excepthook)
    shell = InteractiveShell._instance
    try:
        # nbdev looks for settings.ini from the working directory upwards
        with contextlib.chdir(ROOT), torch_state():
            yield
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environ)
        sys.modules['__main__'] = main
        sys.displayhook, sys.excepthook = hooks
        InteractiveShell._instance = shell
        if 'matplotlib.pyplot' in sys.modules:
            sys.modules['matplotlib.pyplot'].close('all')


class NotebookItem(pytest.Item):
    def runtest(self):
        with process_state():
            from nbdev.config import get_config
            from nbdev.test import test_nb

            flags = get_config(path=ROOT).tst_flags.split()
            error = io.StringIO()
            with contextlib.redirect_stderr(error):
                passed, _ = test_nb(self.path, skip_flags=flags, basepath=ROOT)
        if not passed:
            raise NotebookFailure(error.getvalue())

    def repr_failure(self, excinfo):
        if excinfo.errisinstance(NotebookFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, self.path.relative_to(ROOT).as_posix()
