"The page of results: the paper's numbers and ours in one row, cards, and the page in a browser."

import shutil
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
from bs4 import BeautifulSoup

from neuralsolver.tools import side_by_side
from neuralsolver.tools.manifest import STATUS, read_items, runs_of
from neuralsolver.tools.results_page import reported_tables, write_index
from neuralsolver.tools.side_by_side import COLUMNS, pairs_of, ranked, same_order, tables_of

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / 'reports'
ITEMS = read_items()
RUNS = runs_of(ITEMS, 'embedded', ITEMS)
CHROMIUM = shutil.which('chromium') or '/usr/bin/chromium'


def pairs(name):
    "The frame of pairs of an item, from the committed results."
    item = ITEMS.set_index('item', drop=False).loc[name].to_dict()
    return pairs_of(item, RUNS[name].outputs if name in RUNS else (), REPORTS)


# the numbers


@pytest.mark.parametrize('name', ['figure-4-sit', 'table-2', 'figure-6-sit'])
def test_order_is_that_of_kendall(name):
    "Concordant pairs, from the statistic of scipy where there are no ties."
    found = pairs(name)
    found = found.dropna(subset=['paper', 'ours'])
    same, count = 0, 0
    for _, part in found.groupby(['metric', 'steps']):
        a, b = part['paper'], part['ours']
        if a.is_unique and b.is_unique and len(part) > 1:
            n = len(part) * (len(part) - 1) // 2
            same += round((scipy.stats.kendalltau(a, b).statistic + 1) / 2 * n)
            count += n
    untied = found.groupby(['metric', 'steps']).filter(
        lambda part: part['paper'].is_unique and part['ours'].is_unique
    )
    assert same_order(untied) == (same, count) and count > 10


def test_ranks_count_only_what_has_both_numbers():
    frame = pd.DataFrame(dict(solver=list('abc'), paper=[1.0, 2.0, 3.0], ours=[9.0, None, 8.0]))
    frame = frame.assign(model='', metric='FID', steps='8').reindex(columns=COLUMNS)
    found = ranked(frame)
    assert found['paper_rank'].fillna(0).tolist() == [1, 0, 2]
    assert found['ours_rank'].fillna(0).tolist() == [2, 0, 1]
    # of an inception score the larger is the better
    assert ranked(frame.assign(metric='IS'))['paper_rank'].fillna(0).tolist() == [2, 0, 1]


def test_pairs_hold_the_numbers_of_their_files():
    found = pairs('figure-4-sit').set_index(['solver', 'steps'])
    measured = pd.read_csv(REPORTS / 'curves_sit-tiny.csv').set_index(['solver', 'steps'])
    assert found.loc[('adam2', '8'), 'ours'] == measured.loc[('adam2', 8), 'fd']
    assert found.loc[('adam2', '8'), 'paper'] == 4.16
    assert found.loc[('flowdcn-b-2', '5'), 'paper'] == 4.92
    mse = pairs('mse').set_index(['solver', 'steps'])
    assert mse.loc[('sit-xl-2', '8'), 'paper'] == 0.0079
    rmse = measured.loc[('sit-xl-2', 8), 'rmse']
    assert mse.loc[('sit-xl-2', '8'), 'ours'] == pytest.approx(rmse**2)


def test_first_table_is_at_eight_steps_and_complete():
    table = tables_of(pairs('table-2'))[0]
    assert table.caption == 'FID, 8 steps'
    assert table.columns == ('solver', 'paper', 'rank', 'ours', 'rank', 'our error')
    assert table.rows[0][:3] == ('DiT-XL/2, published', '2.51', '1')
    assert len({row[0] for row in table.rows}) == len(table.rows) == 12


def test_every_reported_number_is_on_a_card(tmp_path):
    page = BeautifulSoup((REPORTS / 'index.html').read_text(encoding='utf-8'), 'html.parser')
    for item in ITEMS.to_dict('records'):
        card = page.find(id=item['item'])
        assert card and card.h3.get_text(' ').find(item['title']) >= 0
        cells = {td.get_text() for td in card.find_all('td')}
        for table in reported_tables(item['reported']) if item['reported'] else []:
            assert {c for row in table.rows for c in row} <= cells, item['item']


def test_counts_of_the_status_are_those_of_the_manifest():
    page = BeautifulSoup((REPORTS / 'index.html').read_text(encoding='utf-8'), 'html.parser')
    counts = [pill.get_text() for pill in page.find(class_='counts').find_all('span')]
    found = ITEMS['status'].value_counts()
    assert counts == [f'{found.get(status, 0)} {status}' for status in STATUS]


# what is in a file is text


def test_data_cannot_run_on_the_page(tmp_path, monkeypatch):
    evil = '<script>alert(1)</script><img src=x onerror=alert(1)>'
    claims = pd.read_csv(REPORTS / 'claims.csv').head(2).assign(claim=evil, note=evil, case=evil)
    claims.to_csv(tmp_path / 'claims.csv', index=False)
    errata = pd.read_csv(REPORTS / 'errata.csv').head(1).assign(said=evil, consequence=evil)
    errata.to_csv(tmp_path / 'errata.csv', index=False)
    pd.DataFrame({evil: [evil]}).to_csv(tmp_path / 'start.csv', index=False)
    evaluation = pd.read_csv(REPORTS / 'eval_sit-tiny_8.csv').assign(solver=evil)
    evaluation.to_csv(tmp_path / 'eval_sit-tiny_8.csv', index=False)
    monkeypatch.setattr(side_by_side, 'solver_title', lambda name: name)
    chosen = ITEMS[ITEMS['item'].isin(['claims', 'errata', 'start', 'eval'])]
    text = write_index(chosen, 'embedded', tmp_path, ITEMS).read_text(encoding='utf-8')
    page = (tmp_path / 'index.html').read_text(encoding='utf-8')
    for written in (page, text):
        assert '&lt;script&gt;' in written
        assert '<script' not in written and '<img src=x' not in written
    assert not BeautifulSoup(page, 'html.parser').find_all('script')


# in a browser


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not Path(CHROMIUM).exists():
        pytest.skip(f'{CHROMIUM} is not installed: apt-get install -y chromium')
    with api.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield made
        made.close()


SIZE = '() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]'
TOP = "id => document.getElementById(id).querySelector('h3').getBoundingClientRect().top"
CUT = """() => [...document.querySelectorAll('.card')].filter(card =>
    [...card.children].some(c => c.getBoundingClientRect().right >
                                 card.getBoundingClientRect().right + 1)).map(card => card.id)"""


@pytest.mark.parametrize('width', [390, 800, 1400])
def test_page_fits_its_window_and_anchors_land(browser, width):
    page = browser.new_page(viewport=dict(width=width, height=900))
    page.goto((REPORTS / 'index.html').as_uri(), timeout=180_000)
    assert page.evaluate(SIZE)[0] <= width
    assert page.evaluate(CUT) == []
    for item in ('figure-4-sit', 'table-2', 'claims', 'benchmark'):
        page.locator(f'.list a[href="#{item}"]').click()
        page.wait_for_timeout(100)
        top = page.evaluate(TOP, item)
        bar = page.evaluate("() => document.querySelector('nav').getBoundingClientRect().bottom")
        is_last = page.evaluate('() => scrollY + innerHeight >= document.body.scrollHeight - 2')
        assert bar <= top < 140 or (is_last and bar <= top < 900), (item, top)
        page.locator(f'#{item} a.up').click()
    page.close()


def test_cards_take_eight_screens_and_open(browser):
    page = browser.new_page(viewport=dict(width=1400, height=900))
    page.goto((REPORTS / 'index.html').as_uri(), timeout=180_000)
    assert page.locator('.card').count() == len(ITEMS)
    assert page.evaluate(SIZE)[1] < 8.5 * 900
    page.locator('.tile.confirmed > summary').click()
    claim = page.locator('.tile.confirmed .claim').first
    assert claim.locator('summary').is_visible() and not claim.locator('dl').is_visible()
    claim.locator('summary').click()
    assert claim.locator('dl').is_visible()
    page.close()


def test_dark_page_has_pictures_on_white(browser):
    page = browser.new_page(color_scheme='dark')
    page.goto((REPORTS / 'index.html').as_uri(), timeout=180_000)
    colour = "q => getComputedStyle(document.querySelector(q))['background-color']"
    assert page.evaluate(colour, '.picture') == 'rgb(255, 255, 255)'
    body = page.evaluate(colour, 'body').removeprefix('rgb(').removesuffix(')').split(',')
    assert max(map(int, body)) < 60
    page.close()
