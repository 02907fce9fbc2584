"""Counts of the code, as a report and not a gate: `python nbs/tests/count_code.py`.

Needs the standard library; complexity is counted where radon is installed.
"""

import ast
import io
import json
import re
import subprocess
import tokenize
from collections import namedtuple
from pathlib import Path

try:
    from radon.complexity import cc_visit
except ImportError:
    cc_visit = None

ROOT = Path(__file__).resolve().parents[2]
Cell = namedtuple('Cell', 'notebook id source exported shown')
VISIBLE = ('display_data', 'execute_result', 'stream')
MOST_CELL, MOST_FUNCTION, MOST_MODULE = 30, 40, 450
MOST_COMPLEXITY, MOST_HIDDEN, MOST_FILES = 12, 60, 500


def cells_of(file):
    "Code cells of a notebook; shown = the committed notebook has an output there."
    notebook = json.loads(file.read_text(encoding='utf-8'))
    name = file.relative_to(ROOT / 'nbs').as_posix()
    for cell in notebook['cells']:
        if cell['cell_type'] != 'code':
            continue
        source = ''.join(cell['source'])
        exported = re.search(r'(?m)^#\|\s*exporti?\b', source) is not None
        shown = any(o['output_type'] in VISIBLE for o in cell['outputs'])
        yield Cell(name, cell['id'], source, exported, shown)


def is_papermill(file):
    "Does the notebook carry this project's papermill mark?"
    metadata = json.loads(file.read_text(encoding='utf-8'))['metadata']
    return metadata.get('neuralsolver', {}).get('papermill') is True


def code_lines(source):
    "Lines that are neither blank nor a comment alone."
    lines = [line.rstrip() for line in source.splitlines()]
    return [line for line in lines if line and not line.lstrip().startswith('#')]


def is_one_class(source):
    "Is the cell a class with its methods and nothing else?"
    body = ast.parse(source).body
    return len(body) == 1 and isinstance(body[0], ast.ClassDef)


def semicolon_lines(source):
    "Numbers of lines with a semicolon outside strings and comments."
    # magics and shell lines of notebooks are not Python
    python = re.sub(r'(?m)^\s*[%!].*$', '', source)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(python).readline))
    except (tokenize.TokenError, IndentationError):
        return set()
    return {t.start[0] for t in tokens if t.type == tokenize.OP and t.string == ';'}


def body_lines(function):
    "Lines of a function's body, without signature and docstring."
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(name, source):
    "Functions with more body lines than a reader takes in."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = body_lines(node)
            if lines > MOST_FUNCTION:
                found.append(f'{name}:{node.name} {lines}')
    return found


def complex_functions(name, source):
    "Functions with more branches than a reader takes in."
    functions = [block for block in cc_visit(source) if block.letter != 'C']
    tangled = [f for f in functions if f.complexity > MOST_COMPLEXITY]
    return [f'{name}:{f.name} {f.complexity}' for f in tangled]


def counts(name, sources):
    "A row of the table."
    lines = [line for source in sources for line in code_lines(source)]
    characters = sum(map(len, lines)) / max(1, len(lines))
    over_100 = sum(len(line) > 100 for line in lines)
    over_120 = sum(len(line) > 120 for line in lines)
    semicolons = sum(len(semicolon_lines(source)) for source in sources)
    return name, len(lines), f'{characters:.1f}', over_100, over_120, semicolons


def first_output(cells):
    "Exported lines before the first cell with a visible output."
    hidden = 0
    for cell in cells:
        if cell.shown:
            break
        if cell.exported:
            hidden += len(code_lines(cell.source))
    return hidden


def print_table(rows):
    "Columns of equal width."
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first = str(row[0]).ljust(widths[0])
        rest = [str(value).rjust(width) for value, width in zip(row[1:], widths[1:])]
        print('  '.join([first, *rest]))


def print_list(title, found, most=None):
    "A count, and the places where they are few enough to read."
    print(f'{title}: {len(found)}')
    if most is None or len(found) <= most:
        for line in found:
            print(f'  {line}')


def print_files():
    "How many files git tracks."
    done = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print('tracked files: not a clone')
        return
    files = len(done.stdout.splitlines())
    print(f'tracked files: {files} (wanted: under {MOST_FILES})')


def sources_below(folder):
    "Python files by name; nbdev's index is left out."
    files = sorted(f for f in folder.rglob('*.py') if f.name != '_modidx.py')
    return {f.relative_to(ROOT).as_posix(): f.read_text(encoding='utf-8') for f in files}


def late_outputs(library):
    "Notebooks that show nothing for long, the latest first."
    hidden = sorted(((first_output(cells), cells[0].notebook) for cells in library), reverse=True)
    return [f'{name} {n}' for n, name in hidden if n > MOST_HIDDEN]


def report_notebooks(library):
    "Large exported cells, and what is exported before anything is shown."
    cells = [c for notebook in library for c in notebook]
    large = [c for c in cells if c.exported and len(code_lines(c.source)) > MOST_CELL]
    classes = [c for c in large if is_one_class(c.source)]
    print(f'exported cells over {MOST_CELL} lines that are one class each: {len(classes)}')
    others = [f'{c.notebook}:{c.id} {len(code_lines(c.source))}' for c in large if c not in classes]
    print_list(f'further exported cells over {MOST_CELL} lines', others, 15)
    late = late_outputs(library)
    print_list(f'library notebooks with over {MOST_HIDDEN} exported lines before an output', late)


def report_functions(modules, tests):
    "Long functions, long modules, tangled functions."
    code = (modules | tests).items()
    long = [found for name, source in code for found in long_functions(name, source)]
    print_list(f'functions with a body over {MOST_FUNCTION} lines', long)
    lengths = {name: len(source.splitlines()) for name, source in modules.items()}
    longest = [f'{name} {n}' for name, n in lengths.items() if n > MOST_MODULE]
    print_list(f'modules over {MOST_MODULE} lines', longest)
    if cc_visit is None:
        print('complexity: skipped, radon is not installed')
        return
    tangled = [found for name, source in code for found in complex_functions(name, source)]
    print_list(f'functions of complexity over {MOST_COMPLEXITY}', tangled)


def main():
    "Print the report."
    notebooks = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    notebooks = [f for f in notebooks if '.ipynb_checkpoints' not in f.parts]
    papermill = [f for f in notebooks if is_papermill(f)]
    library = [list(cells_of(f)) for f in notebooks if f not in papermill]
    modules = sources_below(ROOT / 'neuralsolver')
    tests = sources_below(ROOT / 'nbs')
    print_table(
        [
            ('', 'code lines', 'characters a line', 'over 100', 'over 120', 'with ;'),
            counts('package', modules.values()),
            counts('library notebooks', [c.source for cells in library for c in cells]),
            counts('papermill notebooks', [c.source for f in papermill for c in cells_of(f)]),
            counts('tests', tests.values()),
        ]
    )
    report_notebooks(library)
    report_functions(modules, tests)
    print_files()


if __name__ == '__main__':
    main()
