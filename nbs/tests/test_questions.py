"The pages in nbs/questions say what the measured ratios say: run on invented ratios."

import ast
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from neuralsolver.tools import answers

QUESTIONS = Path(__file__).resolve().parents[1] / 'questions'
FLOW, VP = ('toy-flow', 'sit-xl-2', 'ab2@time'), ('toy-vp', 'dit-xl-2', 'unipc-2@quadratic')


def invented(flow, vp):
    "Ratios (searched, published) of two models at every guidance and N; intervals of 0.1."
    rows = []
    for (model, published, classical), ratios in ((FLOW, flow), (VP, vp)):
        for guidance in (1, 2):
            for steps in range(5, 11):
                row = dict(model=model, guidance=guidance, steps=steps)
                row |= dict(best_published=published, best_classical=classical)
                for kind, ratio in zip(answers.KINDS, ratios):
                    ratio += 0.01 * (steps + guidance - 6)
                    row |= {f'ratio_{kind}': ratio}
                    row |= {f'ratio_{kind}_low': ratio - 0.05, f'ratio_{kind}_high': ratio + 0.05}
                rows.append(row)
    return pd.DataFrame(rows)


def said(name):
    "What the code cells of a page display."
    cells = json.loads((QUESTIONS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    space, texts = {}, []
    for cell in (c for c in cells if c['cell_type'] == 'code'):
        *body, last = ast.parse(''.join(cell['source'])).body
        exec(compile(ast.Module(body, []), name, 'exec'), space)
        texts.append(eval(compile(ast.Expression(last.value), name, 'eval'), space).data)
    return '\n'.join(texts)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    "Pages read ratios that were given."

    def write(flow, vp):
        invented(flow, vp).to_csv(tmp_path / 'sweep.csv', index=False)
        monkeypatch.setattr(answers, 'reports_root', lambda: tmp_path)

    return write


def test_which_solver_names_the_published_table_only_where_it_wins(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    text = said('which_solver')
    assert re.search(r'\| flow \| toy-flow \| 1 \| 0\.30 to 0\.35 .*\| `sit-xl-2` \| 0\.60', text)
    assert re.search(r'\| VP \| toy-vp \| 2 \| .*\| `unipc-2@quadratic` \| 1; .*1\.51', text)
    assert '0.31 [0.26, 0.36]' in text
    measured((0.3, 1.3), (0.4, 0.5))
    text = said('which_solver')
    assert '| `ab2@time` | 1; the published `sit-xl-2` has 1.30' in text
    assert '| `dit-xl-2` | 0.50 to 0.55 (better in 6, worse in 0 of 6 N)' in text


def test_better_says_yes_and_no(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    text = said('better')
    for start in ('Searched on your model, VP path', 'Searched on your model, flow path'):
        assert re.search(re.escape(start) + r'.*: yes\.', text)
    assert 'another VP model: no.' in text and 'another flow model: yes.' in text
    measured((1.2, 0.92), (0.4, 0.9))
    text = said('better')
    assert re.search(r'flow path.*: no\.', text) and 'another flow model: it depends.' in text


def test_guidance_and_diffusers_say_it_in_words(measured):
    measured((0.3, 0.6), (0.4, 1.5))
    assert 'In 12 of 12 cases' in said('guidance')
    text = said('diffusers')
    assert 'Flow models: yes.' in text and 'VP models: no.' in text


def test_no_measured_number_is_written_by_hand():
    for file in QUESTIONS.glob('*.ipynb'):
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'markdown':
                prose = re.sub(r'```.*?```|`[^`]*`', '', ''.join(cell['source']), flags=re.S)
                assert not re.search(r'\d\.\d', prose), (file.name, prose)


def test_file_without_ratios_is_refused(tmp_path):
    (tmp_path / 'sweep.csv').write_text('model,ratio\nx,1\n')
    with pytest.raises(ValueError, match='lacks the columns guidance.*papermill nbs/sweep.ipynb'):
        answers.read_sweep(tmp_path / 'sweep.csv')
