"The site: built once by papermill, read as files, then in headless Chromium. Slow parts: one build, one visit to every page."

import importlib, inspect, json, re, shutil, subprocess, sys, xml.etree.ElementTree as ET
from pathlib import Path
import pytest
from bs4 import BeautifulSoup
from fastcore.docments import docments
from PIL import Image
from neuralsolver.tools.docs import build_site, check_site

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / 'nbs'
FILES = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NOTEBOOKS = {
    p.relative_to(NBS).as_posix().removesuffix('.ipynb'): json.loads(p.read_text(encoding='utf-8'))
    for p in FILES
}
MODULES = sorted(p.stem for p in (ROOT / 'neuralsolver').glob('*.py') if not p.stem.startswith('_'))
CHROMIUM = '/usr/bin/chromium'
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-dev-shm-usage',
]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('docs')
    command = [
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs/docs.ipynb',
        folder / 'run.ipynb',
        '-p',
        'out_dir',
        folder / 'site',
        '--log-level',
        'ERROR',
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((folder / 'run.ipynb').read_text())['cells']
    said = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
    assert ' 0 warnings' in said, said
    return folder / 'site'


@pytest.fixture(scope='module')
def soup(site):
    pages = {}

    def read(name):
        if name not in pages:
            pages[name] = BeautifulSoup((site / name).read_text(encoding='utf-8'), 'html.parser')
        return pages[name]

    return read


def html_of(stem):
    return 'index.html' if stem == 'index' else f'nbs/{stem}.html'


# as files


def test_every_notebook_has_a_page_in_the_navigation(site, soup):
    linked = {a['href'] for a in soup('index.html').select('.sidebar-tree a')}
    for stem in NOTEBOOKS:
        assert (site / html_of(stem)).exists() and (stem == 'index' or html_of(stem) in linked), (
            stem
        )
        title = (
            ''.join(NOTEBOOKS[stem]['cells'][0]['source'])
            .splitlines()[0]
            .removeprefix('# ')
            .replace('`', '')
        )
        assert (
            re.search(r'<h1>([^<]*)<', (site / html_of(stem)).read_text(encoding='utf-8'))[
                1
            ].strip()
            == title
        )


def test_links_lead_somewhere_and_the_checker_can_fail(site, tmp_path):
    assert check_site(site) == []
    copy = tmp_path / 'copy'
    shutil.copytree(site, copy)
    page = copy / 'nbs/method/07_neural.html'
    text = page.read_text(encoding='utf-8')
    page.write_text(
        text.replace(
            '</article>',
            '<a href="07_nowhere.html">x</a><a href="04_solvers.html#nowhere">y</a><img src="../../_images/nowhere.png"></article>',
            1,
        ),
        encoding='utf-8',
    )
    (copy / 'api/paths.html').unlink()
    found = check_site(copy)
    assert (
        sum('07_nowhere.html' in p and 'no such file' in p for p in found) == 1
        and sum('#nowhere' in p and 'no such anchor' in p for p in found) == 1
    )
    assert any('nowhere.png' in p for p in found) and any('paths.html' in p for p in found)


def test_pictures_open(site):
    pictures = 0
    for page in site.rglob('*.html'):
        for src in re.findall(r'<img\b[^>]*?\bsrc="([^"]+)"', page.read_text(encoding='utf-8')):
            file = (page.parent / src).resolve()
            pictures += 1
            if file.suffix == '.svg':
                assert ET.parse(file).getroot().tag.endswith('svg')
            else:
                Image.open(file).verify()
    assert pictures > 20


def table_of(entry):
    "Rows of the parameters' table of a name, its own, not its methods'; the result's row has no code in front."
    tables = [
        t
        for t in entry.parent.find('dd', recursive=False).find_all('table')
        if t.find_parent('dl') is entry.parent
    ]
    return (
        [
            [c.get_text().strip() for c in row.find_all('td')]
            for row in tables[0].find_all('tr')[1:]
            if row.td.code
        ]
        if tables
        else []
    )


@pytest.mark.parametrize('module', MODULES)
def test_api_has_every_name_with_all_parameters(module, soup):
    "Against the imported objects, and fastcore's reading of the comments; the reference is made from the source without either."
    live, page = importlib.import_module(f'neuralsolver.{module}'), soup(f'api/{module}.html')
    assert live.__all__
    for name in live.__all__:
        entry, obj = page.find(id=f'neuralsolver.{module}.{name}'), getattr(live, name)
        assert entry is not None, name
        assert entry.parent.select_one('a.docs-source'), name
        if inspect.isfunction(obj):
            wanted = inspect.signature(obj).parameters.values()
        elif inspect.isclass(obj) and obj.__module__ == live.__name__:
            if not hasattr(obj, '_fields') and not getattr(
                obj.__init__, '__module__', ''
            ).startswith('neuralsolver.'):
                continue  # a base's of elsewhere
            wanted = list(inspect.signature(obj).parameters.values())
        else:
            continue
        rows = table_of(entry)
        stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
        assert [r[0] for r in rows] == [stars.get(p.kind, '') + p.name for p in wanted], name
        assert all(bool(r[2]) == (p.default is not p.empty) for r, p in zip(rows, wanted)), name
        if not inspect.isfunction(obj):
            continue
        words = lambda s: re.sub(r'[`\s]+', '', s or '')
        meant = docments(obj, full=True)
        for r in rows:
            text = meant.get(r[0].lstrip('*'), {}).get('docment')
            if text:
                assert words(r[3]) == words(text), (name, r[0])


def test_solutions_are_folded(soup):
    solutions = [
        (stem, c)
        for stem, nb in NOTEBOOKS.items()
        for c in nb['cells']
        if 'solution' in c['metadata'].get('tags', [])
    ]
    for stem, cell in solutions:
        lines = [
            l.strip()
            for l in ''.join(cell['source']).splitlines()
            if l.strip() and not l.startswith('#|')
        ]
        if cell['cell_type'] == 'code':
            places = soup(html_of(stem)).find(id=f'cell-{cell["id"]}').find_all('details')
        else:
            places = soup(html_of(stem)).select('details.solution')
        assert places and all(
            'Solution' in p.summary.get_text() and not p.has_attr('open') for p in places
        ), (stem, cell['id'])
        if cell['cell_type'] == 'code':
            assert lines[0] in places[0].get_text() and lines[-1] in places[0].get_text()
    if not solutions:
        pytest.skip('no cell has the tag solution; 05_docs tests one')


SETTINGS = '[DEFAULT]\nlib_name = toy\nlib_path = toy\ntitle = toy\ncopyright = me\ngit_url = https://example.org/me/toy\nbranch = main\n'


def toy_repository(root, text):
    (root / 'nbs').mkdir(parents=True)
    (root / 'toy').mkdir()
    (root / 'settings.ini').write_text(SETTINGS)
    (root / 'toy/one.py').write_text(
        '"One."\n__all__ = ["f"]\n# %% ../nbs/00_one.ipynb #aaaa\ndef f(\n    x: int | None = 1, # a|b, $5 * 2\n) -> int: # sum\n    "Does it."\n'
    )
    cells = [
        dict(
            cell_type='code',
            id='aaaa',
            metadata={},
            execution_count=None,
            outputs=[],
            source='#| export\ndef f(): pass',
        )
    ]
    for name, cells in (
        ('00_one', cells),
        ('unknown', []),
        ('index', [dict(cell_type='markdown', id='b', metadata={}, source=text)]),
    ):
        first = dict(cell_type='markdown', id='first', metadata={}, source=f'# {name}')
        kernel = dict(
            kernelspec=dict(name='python3', language='python', display_name='python3'),
            language_info=dict(name='python'),
        )
        (root / f'nbs/{name}.ipynb').write_text(
            json.dumps(dict(cells=[first, *cells], metadata=kernel, nbformat=4, nbformat_minor=5))
        )


def test_build_leaves_the_old_site_if_a_link_is_dead(tmp_path):
    "Links of every kind in one page; then one of them dies."
    (tmp_path / 'a/data').mkdir(parents=True)
    (tmp_path / 'a/data/x.csv').write_text('1')
    (tmp_path / 'a/data/more.md').write_text('no title, [back](../nbs/00_one.ipynb)')
    (tmp_path / 'a/data/big.bin').write_bytes(bytes(3 * 2**20))
    Image.new('L', (2, 2)).save(tmp_path / 'a/data/p.png')
    text = (
        '[n](00_one.ipynb) [h](00_one.ipynb#00_one) [x](../data/x.csv) [m](../data/more.md) [b](../data/big.bin) [d](../data) ![p](../data/p.png) '
        '<img alt="" src="../data/p.png"> $x_1$ `one.f` [w](https://example.org)'
    )
    toy_repository(tmp_path / 'a', text)
    out = tmp_path / 'a/_docs'
    assert build_site(out, tmp_path / 'a') == []
    home = BeautifulSoup((out / 'index.html').read_text(), 'html.parser').article
    links = {a.get_text(): a['href'] for a in home.select('p a')}
    assert (
        links['n'] == 'nbs/00_one.html'
        and links['m'] == 'data/more.html'
        and links['x'].endswith('x.csv')
        and links['one.f'] == 'api/one.html#neuralsolver.one.f'
    )
    assert (
        links['b'] == 'https://example.org/me/toy/blob/main/data/big.bin'
        and links['d'] == 'https://example.org/me/toy/tree/main/data'
    )
    assert (
        len(home.select('img')) == 2
        and home.select_one('span.math').get_text() == r'\(x_1\)'
        and 'unknown' in (out / 'index.html').read_text()
    )
    row = [
        c.get_text()
        for c in BeautifulSoup((out / 'api/one.html').read_text(), 'html.parser').select('table td')
    ][:4]
    assert row == ['x', 'int | None', '1', 'a|b, $5 * 2']

    before = {p.relative_to(out): p.read_bytes() for p in out.rglob('*') if p.is_file()}
    (tmp_path / 'a/data/more.md').unlink()
    with pytest.raises(ValueError, match='more.md'):
        build_site(out, tmp_path / 'a')
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob('*') if p.is_file()} == before
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == [
        '_docs',
        'data',
        'nbs',
        'settings.ini',
        'toy',
    ]  # nothing half-made


# in a browser


def formulas(text):
    "How many formulas Jupyter sees in a Markdown cell."
    text = re.sub(r'^ {0,3}(```+|~~~+).*?^ {0,3}\1`*\s*?$', '', text, flags=re.M | re.S)
    text = re.sub(r'(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)', '', text, flags=re.S)
    text, display = re.subn(r'\$\$.+?\$\$', '', text, flags=re.S)
    text, blocks = re.subn(
        r'\\begin\{(align|equation|gather)\*?\}.+?\\end\{\1\*?\}', '', text, flags=re.S
    )
    return (
        display + blocks + len(re.findall(r'(?<![\\$])\$(?![\s$])(?:\\.|[^$\\])+?(?<!\s)\$', text))
    )


def formulas_of(nb):
    count = 0
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            count += formulas(source)
        elif not re.search(r'^#\| *(hide|default_exp)', source, re.M):
            count += sum(
                formulas(''.join(o['data'][mime]))
                for o in cell['outputs']
                for mime in ('text/markdown', 'text/html')
                if mime in o.get('data', {})
            )
    return count


def test_formulas_are_counted():
    assert formulas('$a$ `$b$` $$c\n$$ \\$5\n```\n$d$\n```\n$e_{f}$ and $g$') == 4


LOOK = r"""async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const raw = [], walk = document.createTreeWalker(document.querySelector('article') || document.body, NodeFilter.SHOW_TEXT);
  for (let n; n = walk.nextNode();) {
    if (n.parentElement.closest('code, pre, script, style, mjx-container, dt.sig, title')) continue;
    if (/\$[^$\n]+\$|\\(frac|sum|int|mathbb|mathcal|mathrm|left|right|begin|end|text|alpha|sigma|lambda|cdot|le|ge|approx|Delta|big|tag|to)\b|\\[\[\]()]/.test(n.data)) raw.push(n.data.slice(0, 80));
  }
  return {raw, formulas: document.querySelectorAll('mjx-container').length, empty: [...document.querySelectorAll('mjx-container')].filter(m => !m.querySelector('svg')).length,
    errors: [...document.querySelectorAll('[data-mjx-error], mjx-merror, [data-mml-node=merror]')].map(e => e.getAttribute('data-mjx-error') || e.textContent),
    images: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)};
}"""


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not Path(CHROMIUM).exists():
        pytest.skip(f'{CHROMIUM} is not installed: apt-get install -y chromium')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


def visit(browser, folder, names, look=LOOK):
    "What every page shows, and what went wrong while it loaded."
    page, seen, wrong = browser.new_page(viewport=dict(width=1300, height=900)), {}, []
    page.on('console', lambda m: wrong.append(f'console: {m.text}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: wrong.append(f'error: {e}'))
    page.on('requestfailed', lambda r: wrong.append(f'failed: {r.url}'))
    page.on(
        'request',
        lambda r: (
            wrong.append(f'outside: {r.url}')
            if not r.url.startswith(('file:', 'data:', 'blob:'))
            else None
        ),
    )
    for name in names:
        wrong.clear()
        page.goto((folder / name).as_uri())
        seen[name] = page.evaluate(look) | {'wrong': list(wrong)}
    page.close()
    return seen


def test_every_page_in_a_browser(site, browser):
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    seen = visit(browser, site, names)
    problems = [
        f'{n}: {k}: {v[k]}'
        for n, v in seen.items()
        for k in ('wrong', 'raw', 'errors', 'images', 'empty')
        if v[k]
    ]
    assert not problems, '\n'.join(problems)
    differ = {
        s: (f, seen[html_of(s)]['formulas'])
        for s, nb in NOTEBOOKS.items()
        if (f := formulas_of(nb)) != seen[html_of(s)]['formulas']
    }
    assert not differ, f'formulas in the notebook, in the page: {differ}'
    assert sum(v['formulas'] for v in seen.values()) > 200


def test_the_browser_test_can_fail(site, browser, tmp_path):
    "A page with one of each fault: text left raw, a picture, a script's error, a request, two formulas that are wrong."
    copy = tmp_path / 'copy'
    shutil.copytree(site, copy)
    page = copy / 'nbs/method/07_neural.html'
    faults = (
        r'<p>left $\frac12$ alone</p><img src="none.png"><script>console.error("oh")</script><script src="https://example.org/x.js"></script>'
        r'<span class="math">\(a^b^c\)</span><span class="math">\(\undefinedmacro\)</span>'
    )
    page.write_text(
        page.read_text(encoding='utf-8').replace('</article>', faults + '</article>', 1),
        encoding='utf-8',
    )
    seen = visit(browser, copy, ['nbs/method/07_neural.html'])['nbs/method/07_neural.html']
    assert (
        len(seen['raw']) == 1
        and len(seen['images']) == 1
        and len(set(seen['errors'])) == 2
        and seen['formulas'] == 2 + formulas_of(NOTEBOOKS['method/07_neural'])
    )
    for kind in ('console: oh', 'failed: file:', 'outside: https://example.org/x.js'):
        assert any(w.startswith(kind) for w in seen['wrong']), (kind, seen['wrong'])


def test_search_and_fold_work_in_a_browser(site, browser):
    page = browser.new_page()
    page.goto((site / 'search.html').as_uri() + '?q=teacher')
    page.wait_for_selector('#search-results li a', timeout=60000)
    assert any(
        'teachers' in a.get_attribute('href')
        for a in page.query_selector_all('#search-results li a')
    )
    folded = next(
        (
            s
            for s, nb in NOTEBOOKS.items()
            for c in nb['cells']
            if 'solution' in c['metadata'].get('tags', []) and c['cell_type'] == 'code'
        ),
        None,
    )
    if folded:
        page.goto((site / html_of(folded)).as_uri())
        code = page.locator('div.cell details pre').first
        assert not code.is_visible()
        page.locator('div.cell details summary').first.click()
        assert code.is_visible()
    page.close()
