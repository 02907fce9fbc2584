"start.ipynb and play.ipynb in a real JupyterLab, in a real browser: a reader's session."

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
import pandas as pd
import pytest
from neuralsolver.neural import get_solver

ROOT = Path(__file__).resolve().parents[2]
NBS, CHROMIUM = ROOT / 'nbs', shutil.which('chromium') or '/usr/bin/chromium'
FLAGS = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]

PLAYWRIGHT = importlib.util.find_spec('playwright') is not None
pytestmark = [  # test_reading.py checks the same without a browser
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason='no chromium: apt-get install chromium'),
    pytest.mark.skipif(not PLAYWRIGHT, reason='no playwright: pip install playwright'),
]


def copy_of_the_repository(folder):
    "What the two notebooks need."
    caches = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'neuralsolver', folder / 'neuralsolver', ignore=caches)
    shutil.copy(ROOT / 'settings.ini', folder)
    (folder / 'data').symlink_to(ROOT / 'data')
    (folder / 'nbs').mkdir()
    for name in ('start', 'play'):
        shutil.copy(NBS / f'{name}.ipynb', folder / 'nbs')


def write_settings(folder):
    "No question about news; all cells in the page, not only those in sight."
    contents = {
        'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
        'notebook-extension/tracker': dict(windowingMode='none'),
    }
    for file, content in contents.items():
        file = folder / '@jupyterlab' / f'{file}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


def wait_for(server, address, log):
    "Until the server answers, one minute at most."
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(address, timeout=2)
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f'JupyterLab did not start:\n{log.read_text()[-2000:]}')


@contextlib.contextmanager
def jupyterlab(folder):
    "JupyterLab on a copy of the repository, with settings and a token of its own; its address."
    repo, home, log = folder / 'repo', folder / 'home', folder / 'jupyterlab.log'
    copy_of_the_repository(repo)
    write_settings(home / 'settings')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root']
    options = {
        'ServerApp.port': port,
        'ServerApp.port_retries': 0,
        'ServerApp.ip': '127.0.0.1',
        'IdentityProvider.token': token,
        'ServerApp.root_dir': repo / 'nbs',
        'LabApp.user_settings_dir': home / 'settings',
        'LabApp.workspaces_dir': home / 'workspaces',
    }
    command += [f'--{name}={value}' for name, value in options.items()]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(repo)}
    env |= {f'JUPYTER_{n}_DIR': str(home / n.lower()) for n in ('CONFIG', 'DATA', 'RUNTIME')}
    env |= {'IPYTHONDIR': str(home / 'ipython')}
    streams = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    with open(log, 'w') as f:
        server = subprocess.Popen(command, stdout=f, env=env, start_new_session=True, **streams)
    address = f'http://127.0.0.1:{port}'
    try:
        wait_for(server, f'{address}/api?token={token}', log)
        yield f'{address}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={token}', repo
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
FINISHED = """() => {
    const prompts = '.jp-Notebook .jp-CodeCell .jp-InputPrompt';
    const last = [...document.querySelectorAll(prompts)].pop();  // folded cells have none
    const failed = document.querySelector('.jp-RenderedText[data-mime-type$="jupyter.error"]');
    return failed || last && /\\[\\d+\\]:/.test(last.innerText);
}"""
PICTURE = """async () => {
    const answer = await fetch(document.querySelector('img.play-picture').src);
    return [...new Uint8Array(await answer.arrayBuffer())];
}"""


def run_all(page, address, timeout):
    "Open a notebook, Run All, wait for the last cell; the seconds from the click on."
    page.goto(address)
    page.locator('.jp-Notebook .jp-CodeCell').first.wait_for(timeout=60_000)
    # with no kernel yet, Run All asks which
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=60_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    clock = time.perf_counter()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_function(FINISHED, timeout=timeout * 1000)
    assert page.locator(ERROR).count() == 0
    return time.perf_counter() - clock


def picture(page):  # hash of the widget's picture
    return hashlib.sha256(bytes(page.evaluate(PICTURE))).hexdigest()


def changed(page, old, act, seconds=60):
    "Act, and wait for another picture; its hash and the seconds."
    clock = time.perf_counter()
    act()
    while time.perf_counter() - clock < seconds:
        if (new := picture(page)) != old:
            return new, time.perf_counter() - clock
        time.sleep(0.05)
    raise AssertionError('the picture did not change')


@pytest.fixture
def session(tmp_path):
    "A page in JupyterLab; READING_SHOTS names a folder for pictures of it."
    from playwright.sync_api import sync_playwright

    with jupyterlab(tmp_path) as (address, repo), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        try:
            yield browser.new_page(viewport=dict(width=1400, height=1000)), address, repo
        finally:
            browser.close()


def shot(page, name):
    if folder := os.environ.get('READING_SHOTS'):
        page.screenshot(path=f'{folder}/{name}.png')


def test_start_in_jupyterlab(session):
    page, address, repo = session
    run_all(page, address.format('start'), 300)
    images = page.locator('.jp-Notebook .jp-RenderedImage img')
    assert images.count() == 5
    for k in range(5):
        images.nth(k).scroll_into_view_if_needed()
        shot(page, f'start_{k}')
        assert images.nth(k).evaluate('i => i.complete && i.naturalWidth > 180')
    assert page.locator('.jp-Notebook table.dataframe tr').count() >= 8
    said = page.locator('.jp-Notebook .jp-RenderedMarkdown', has_text='to the teacher than Euler')
    assert said.count() >= 1
    table = pd.read_csv(repo / 'reports/start.csv').set_index(['solver', 'evaluations'])
    error = table.rmse_teacher  # the defaults of the notebook, computed here and now
    assert error['searched', 6] < 0.6 * error['ab2', 6] < 0.6 * error['euler', 6]
    assert error['searched', 6] < error['euler', 24]


def drag(page, handle, old):
    "A slider dragged for 2 seconds: the picture follows; its last hash."
    box, pictures = handle.bounding_box(), {old}
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
    page.mouse.down()
    for k in range(20):
        page.mouse.move(box['x'] + 2 * k, box['y'] + 5)
        page.wait_for_timeout(100)
        pictures.add(picture(page))
    page.mouse.up()
    page.wait_for_timeout(500)
    print(len(pictures) - 1, 'pictures in 20 moves')
    assert len(pictures) > 4
    return picture(page)


def test_play_in_jupyterlab(session):
    "A slider by the keyboard, the buttons, another start."
    page, address, _ = session
    run_all(page, address.format('play'), 200)
    page.locator('img.play-picture').wait_for(timeout=60_000)
    page.locator('img.play-picture').scroll_into_view_if_needed()
    grid, first = page.locator('.play-grid'), picture(page)
    shot(page, 'play_0')
    handles = grid.locator('.noUi-handle')
    assert handles.count() == 4 + 6
    assert grid.get_by_text('0.000 to 0.250').count() == 1
    handles.nth(0).focus()
    moved, _ = changed(page, first, lambda: page.keyboard.press('ArrowRight'))
    grid.get_by_text('0.000 to 0.257').wait_for(timeout=30_000)  # 0.26 : 0.25 : 0.25 : 0.25
    moved = drag(page, handles.nth(4), moved)
    for name in ('gradient step', 'search from here', 'reset'):
        moved, _ = changed(page, moved, page.get_by_role('button', name=name).click)
        shot(page, f'play {name}')
    assert moved == first
    page.get_by_label('start', exact=True).select_option('sit-tiny')
    table, _ = changed(page, first, lambda: None)
    page.wait_for_timeout(1500)  # its numbers have more digits than a slider shows
    nodes = get_solver('sit-tiny', 4).nodes
    assert grid.get_by_text(f'{nodes[1]:.3f} to {nodes[2]:.3f}').count() == 1
    assert picture(page) == table
