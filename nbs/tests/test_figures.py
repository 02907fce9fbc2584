"Figures: what they show, that no texts overlap, that pictures are shown and as new as their data."

import json
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from neuralsolver.curve_figures import best_grids, curve_metrics, curves, headline
from neuralsolver.figures import best_of_kinds, picture_data, sample_grid, save_figure, split_table
from neuralsolver.figures import trade_off
from neuralsolver.utils import sha256

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / 'reports'
COLUMN = 6.45  # inches: a page of 17 cm; pictures are shown at this width


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def shown_texts(fig):
    fig.canvas.draw()
    box = fig.bbox.extents + np.array([-99, -99, 99, 99])
    for text in fig.findobj(Text):
        extent = text.get_window_extent()
        inside = box[0] < extent.x0 and extent.x1 < box[2] and box[1] < extent.y0
        if text.get_text().strip() and text.get_visible() and inside and extent.y1 < box[3]:
            yield text


def check_layout(fig):
    "Texts of at least 7 points at the width of a page, none over another."
    texts = list(shown_texts(fig))
    scale = min(1, COLUMN * fig.dpi / fig.get_tightbbox().transformed(fig.dpi_scale_trans).width)
    small = {t.get_text() for t in texts if t.get_fontsize() * scale < 6.4}
    assert not small, (scale, small)
    boxes = [t.get_window_extent().shrunk(0.9, 0.8) for t in texts]
    hidden = set()
    for ax in fig.axes:
        ticks = (*ax.get_xticklabels(), *ax.get_yticklabels())
        hidden |= {label for label in ticks if not _is_drawn(label, ax)}
    for i, one in enumerate(boxes):
        for j in range(i):
            if hidden & {texts[i], texts[j]}:
                continue
            both = f'{texts[i].get_text()!r} and {texts[j].get_text()!r}'
            assert not one.overlaps(boxes[j]), both


def _is_drawn(label, ax):
    "Is a tick inside its axis?"
    extent, ax = label.get_window_extent(), ax.get_window_extent()
    middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
    inside_x = ax.x0 - 2 <= middle[0] <= ax.x1 + 2
    inside_y = ax.y0 - 2 <= middle[1] <= ax.y1 + 2
    return inside_x or inside_y


def write_card(stem, **changes):
    card = dict(protocol=dict(seeds='0,1,2,3')) | changes
    Path(f'{stem}.json').write_text(json.dumps(card))


def solver_row(solver, error, above, **changes):
    row = dict(model='toy', solver=solver, steps=8, nfe=8, guidance=2, samples=1000)
    row |= dict(mean_error=error, mean_error_sd=error / 9, median_error=error / 2, rmse=error)
    row |= dict(fd=7 + above, fd_above=above, fd_above_low=above - 0.1, fd_above_high=above + 0.1)
    return row | dict(reported_fid=np.nan) | changes


@pytest.fixture
def table(tmp_path):
    "An evaluation, rows in no order."
    rows = [
        solver_row('euler', 0.1, 3.0),
        solver_row('sit-xl-2', 0.03, 0.1),
        solver_row('heun', 0.02, 0.5, nfe=16),
        solver_row('flowdcn-b-2', 0.04, -0.2),
        solver_row('sit-tiny', 0.01, 0.0),
        solver_row('adam2', 0.05, 0.6),
        dict(model='toy', solver='teacher', nfe=100, guidance=2, samples=1000, mean_error=0),
        dict(model='toy', solver='real', samples=1000),
    ]
    stem = tmp_path / 'eval_toy_8'
    pd.DataFrame(rows).to_csv(f'{stem}.csv', index=False)
    rng = np.random.default_rng(0)
    images = {r['solver']: rng.integers(0, 255, (10, 1, 28, 28), 'uint8') for r in rows[:-1]}
    np.savez(f'{stem}_samples.npz', **images)
    write_card(stem)
    return stem


# evaluations


def test_the_best_of_every_kind_is_chosen_within_the_budget(table):
    rows = split_table(pd.read_csv(f'{table}.csv'))[0]
    assert best_of_kinds(rows) == ['adam2', 'sit-xl-2', 'sit-tiny']  # not heun with 16


def test_solvers_stand_in_the_order_of_their_errors(table):
    fig = trade_off(table)
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    first = ['sit-tiny', 'Heun (16 evaluations)', 'SiT-XL/2', 'FlowDCN-B/2', 'Adams 2', 'Euler']
    assert names == first
    title = fig.get_suptitle()
    assert title == 'toy, guidance 2, 1,000 images in 4 seeds, 8 evaluations'
    lowest, highest = fig.axes[1].get_xlim()
    assert lowest < -0.2 and highest > 3  # all of them inside
    check_layout(fig)


@pytest.mark.parametrize(
    'above, ticks',
    [((-0.2, 3.0), [-0.2, 0, 0.2, 1]), ((-60.0, 82.0), [-20, -5, -1, 0, 1, 5, 20])],
)
def test_distances_on_both_sides_of_the_teacher_have_ticks(table, above, ticks):
    rows = pd.read_csv(f'{table}.csv')
    for solver, value in zip(('flowdcn-b-2', 'euler'), above):
        columns = ['fd_above', 'fd_above_low', 'fd_above_high']
        rows.loc[rows.solver == solver, columns] = [value, value - 0.1, value + 0.1]
    rows.to_csv(f'{table}.csv', index=False)
    fig = trade_off(table)
    assert list(fig.axes[1].get_xticks()) == ticks
    check_layout(fig)


def test_a_picture_names_the_network_of_its_distances(table):
    rows = pd.read_csv(f'{table}.csv').assign(sfd=100)
    rows.to_csv(f'{table}.csv', index=False)
    assert trade_off(table).get_suptitle().endswith('8 evaluations, features of EfficientNet-Lite0')


def test_the_grid_shows_the_teacher_and_four_times_the_difference(table):
    fig = sample_grid(table)
    assert len(fig.axes) == 7  # teacher; three solvers with differences
    with np.load(f'{table}_samples.npz') as f:
        difference = (f['adam2'].astype(float) - f['teacher'])[0, 0] / 127.5
    drawn = fig.axes[2].images[0].get_array()[:, :28]
    assert np.allclose(drawn, 4 * difference)
    label = fig.axes[2].get_ylabel()
    assert 'x 4' in label and '0.050' in label
    check_layout(fig)


# curves


@pytest.fixture
def curve(tmp_path):
    rows = []
    for n in (5, 6, 8):
        for i, name in enumerate(('unipc-3@time', 'unipc-3@log-snr', 'dit-xl-2', 'dit-tiny')):
            row = solver_row(name, 0.1 / n / (i + 1), 3 / n / (i + 1) - 0.2, steps=n, nfe=n)
            row |= {'precision': 0.9, 'precision_sd': 0.01, 'is': 6 + i / 9, 'kid': 0.1 * i}
            row['reported_fid'] = {'dit-tiny': np.nan}.get(name, 4 - i + 10 / n)
            row['reported_sfid'] = row['reported_fid'] + 2
            rows.append(row)
    rows.append(dict(model='toy', solver='teacher', reported_fid=2.2, precision=0.92))
    rows.append(dict(model='toy', solver='real'))
    stem = tmp_path / 'curves_toy'
    pd.DataFrame(rows).to_csv(f'{stem}.csv', index=False)
    write_card(stem)
    return stem


def lines_of(ax):
    return [line.get_label().replace('\n', ' ') for line in ax.get_lines()]


def test_a_rule_is_drawn_on_its_best_grid(curve):
    rows = split_table(pd.read_csv(f'{curve}.csv'))[0]
    best = set(best_grids(rows, 'mean_error').solver)
    assert best == {'unipc-3@log-snr', 'dit-xl-2', 'dit-tiny'}


def test_curves_have_the_teacher_at_zero_and_reported_numbers_apart(curve):
    fig = curves(curve)
    above, error, reported = fig.axes
    measured = ['UniPC 3, uniform log-SNR', 'DiT-XL/2', 'dit-tiny']
    assert lines_of(error) == measured and lines_of(above) == [*measured, 'teacher']
    assert lines_of(reported) == [*measured[:2], 'Euler, 50 steps']
    assert list(above.get_lines()[-1].get_ydata()) == [0, 0]
    assert list(reported.get_lines()[-1].get_ydata()) == [2.2, 2.2]
    check_layout(fig)


def test_without_reported_numbers_there_is_no_panel_of_them(curve):
    table = pd.read_csv(f'{curve}.csv').assign(reported_fid=np.nan, reported_sfid=np.nan)
    table.to_csv(f'{curve}.csv', index=False)
    assert len(curves(curve).axes) == 2
    titles = [ax.get_title() for ax in curve_metrics(curve).axes]
    assert titles == ['inception score, measured', 'precision, measured', 'KID, measured']


def test_metrics_show_what_there_is(curve):
    fig = curve_metrics(curve)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:3] == ['inception score, measured', 'precision, measured', 'KID, measured']
    assert titles[3:] == ['sFID, reported']
    check_layout(fig)


def test_a_paired_metric_has_the_teacher_at_zero(curve):
    table = pd.read_csv(f'{curve}.csv')
    table['sfd'] = 100 + table.kid
    table['sfd_above'] = table.kid
    table.to_csv(f'{curve}.csv', index=False)
    panels = {ax.get_title(): ax for ax in curve_metrics(curve).axes}
    assert 'sFD (EfficientNet-Lite0), measured' not in panels
    teacher = panels['sFD above teacher, measured'].get_lines()[-1]
    assert teacher.get_label() == 'teacher' and list(teacher.get_ydata()) == [0, 0]


# the headline


def test_the_headline_shows_three_kinds_on_three_models(tmp_path):
    rows = []
    for model in ('sit-cifar', 'fashion-mixture', 'dit-tiny', 'flowdcn-tiny'):
        for guidance in (1, 2):
            for n in range(5, 11):
                row = dict(model=model, guidance=guidance, steps=n)
                for i, kind in enumerate(('classical', 'published', 'searched')):
                    value = guidance / n**2 / (i + 1)
                    row |= {f'mean_error_{kind}': value, f'mean_error_{kind}_sd': value / 8}
                rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / 'sweep.csv', index=False)
    card = dict(samples_per_seed=100, seeds='0,1,2')
    (tmp_path / 'sweep.json').write_text(json.dumps(card))
    fig = headline(tmp_path / 'sweep.csv')
    titles = [ax.get_title() for ax in fig.axes]
    assert ['sit-cifar' in titles[0], 'dit-tiny' in titles[1], 'exact' in titles[2]] == [True] * 3
    for ax in fig.axes:
        assert lines_of(ax) == ['classical', 'published', 'searched here']
        assert ax.get_yscale() == 'log'
        classical = ax.get_lines()[0].get_ydata()
        assert np.allclose(classical, [2 / n**2 for n in range(5, 11)])  # guidance 2
    said = fig.axes[1].get_xlabel()
    assert 'guidance 2' in said and '300 noise samples' in said
    check_layout(fig)
    save_figure(fig, tmp_path / 'headline', [tmp_path / 'sweep.csv'])
    assert (tmp_path / 'headline.png').stat().st_size < 100_000
    assert list(picture_data(tmp_path / 'headline.png')) == ['sweep.csv']


# pictures under version control


def committed(pattern):
    done = subprocess.run(['git', 'ls-files', pattern], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()]


PICTURES = committed('reports/*.png')
# drawn again since pictures hold the hashes of their data
HASHED = (
    r'(eval|curves|claims|zero_shot)_.*|(headline|sweep|start|benchmark)\.png'
    r'|search_study/.*|solver_figures/sample_grid\.png'
)


def test_every_picture_is_shown_by_a_page():
    pages = [ROOT / 'README.md', *committed('reports/*.md'), *committed('nbs/*.ipynb')]
    text = '\n'.join(page.read_text(encoding='utf-8') for page in pages)
    shown = set(re.findall(r'[\w.-]+\.png', re.sub(r'"image/png": "[^"]*"', '', text)))
    assert not [p.name for p in PICTURES if p.name not in shown]


def stale(picture):
    "Files that are not those a picture was drawn from."
    for name, known in picture_data(picture).items():
        file = picture.parent / name
        if not file.exists() or not sha256(file).startswith(known):
            yield name


@pytest.mark.parametrize('picture', PICTURES, ids=lambda p: p.relative_to(REPORTS).as_posix())
def test_no_picture_is_older_than_its_data(picture):
    assert not [*stale(picture)], 'run the notebook that draws it again'
    if re.fullmatch(HASHED, picture.relative_to(REPORTS).as_posix()):
        assert picture_data(picture), 'its notebook names no data in save_figure'


def test_a_picture_older_than_its_data_is_found(tmp_path):
    (tmp_path / 'a.csv').write_text('x\n1')
    save_figure(plt.figure(figsize=(1, 1)), tmp_path / 'a')
    save_figure(plt.figure(figsize=(1, 1)), tmp_path / 'b')  # without data
    assert [*stale(tmp_path / 'a.png')] == [] and picture_data(tmp_path / 'b.png') == {}
    (tmp_path / 'a.csv').write_text('x\n2')
    assert [*stale(tmp_path / 'a.png')] == ['a.csv']
    (tmp_path / 'a.csv').unlink()
    assert [*stale(tmp_path / 'a.png')] == ['a.csv']


def test_the_same_figure_gives_the_same_file(tmp_path):
    for name in 'ab':
        fig, ax = plt.subplots(figsize=(2, 2))
        ax.plot([1, 2, 3])
        save_figure(fig, tmp_path / name)
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
