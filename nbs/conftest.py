"One pytest item per library notebook: nbdev's own runner, in the notebook's folder, with the flags of settings.ini."

import contextlib, io, json, os, re, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collect_file(file_path, parent):
    if not re.fullmatch(r'(\d\d[a-z]?_.*|index)\.ipynb', file_path.name):
        return None
    metadata = json.loads(file_path.read_text(encoding='utf-8'))['metadata']
    if metadata.get('neuralsolver', {}).get('papermill'):
        return None  # run with small parameters by a test of its own
    return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name='run')


class NotebookFailure(Exception):
    pass


@contextlib.contextmanager
def process_state():
    "Undo what a notebook's shell and cells change in this process, so that no test depends on the notebooks before it."
    from IPython.core.interactiveshell import InteractiveShell
    import torch

    path, environ, main, hooks = (
        sys.path[:],
        dict(os.environ),
        sys.modules['__main__'],
        (sys.displayhook, sys.excepthook),
    )
    shell, dtype, threads, grad = (
        InteractiveShell._instance,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    try:
        with contextlib.chdir(ROOT), torch.random.fork_rng():
            yield  # nbdev looks for settings.ini from the working directory upwards
    finally:
        sys.path[:], sys.modules['__main__'] = path, main
        sys.displayhook, sys.excepthook = hooks
        os.environ.clear()
        os.environ.update(environ)
        InteractiveShell._instance = shell
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        if 'matplotlib.pyplot' in sys.modules:
            sys.modules['matplotlib.pyplot'].close('all')


class NotebookItem(pytest.Item):
    def runtest(self):
        with process_state():
            from nbdev.config import get_config
            from nbdev.test import test_nb

            error = io.StringIO()
            with contextlib.redirect_stderr(error):
                passed, _ = test_nb(
                    self.path, skip_flags=get_config(path=ROOT).tst_flags.split(), basepath=ROOT
                )
        if not passed:
            raise NotebookFailure(error.getvalue())

    def repr_failure(self, excinfo):
        return (
            str(excinfo.value)
            if excinfo.errisinstance(NotebookFailure)
            else super().repr_failure(excinfo)
        )

    def reportinfo(self):
        return self.path, None, self.path.relative_to(ROOT).as_posix()
