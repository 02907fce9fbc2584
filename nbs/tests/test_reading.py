"The reader's way in: start.ipynb and play.ipynb run, show what is so, and work in a real JupyterLab, in a real browser."

import contextlib, hashlib, importlib.util, json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from scipy.integrate import solve_ivp
from neuralsolver.neural import get_solver, load_solver
from neuralsolver.utils import indexed_noise

ROOT = Path(__file__).resolve().parents[2]
NBS, CHROMIUM = ROOT / 'nbs', shutil.which('chromium') or '/usr/bin/chromium'
FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()


def text(cell):
    return ''.join(cell['source'])


def cells(name):
    return json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def papermill(name, folder, extra, **parameters):
    "Run a notebook with a cell appended; the text that this cell printed."
    nb = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))
    nb['cells'].append(
        dict(
            cell_type='code',
            id='appended',
            metadata={},
            execution_count=None,
            outputs=[],
            source=extra,
        )
    )
    (folder / f'{name}.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    options = [word for key, value in parameters.items() for word in ('-p', key, str(value))]
    command = [
        sys.executable,
        '-m',
        'papermill',
        folder / f'{name}.ipynb',
        folder / f'{name}_out.ipynb',
        '--log-level',
        'ERROR',
        '--no-progress-bar',
        *options,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads((folder / f'{name}_out.ipynb').read_text(encoding='utf-8'))['cells']
    return ''.join(''.join(o['text']) for o in out[-1]['outputs'] if o.get('name') == 'stdout'), out


def steps_by_hand(velocity, x, nodes, M):
    "Eq. 16 in NumPy: all states."
    states, v = [x], []
    for i, row in enumerate(M):
        v.append(velocity(x, nodes[i]))
        x = x + (nodes[i + 1] - nodes[i]) * sum(m * w for m, w in zip(row, v))
        states.append(x)
    return np.stack(states)


WEIGHTS = """
import json
print(json.dumps([[p.tolist() for p in (m.weight, m.bias)] for m in field.net if hasattr(m, 'weight')]))
"""


def test_start_writes_a_table_that_is_true(tmp_path):
    "Small; the network is evaluated and integrated again in NumPy."
    printed, out = papermill(
        'start',
        tmp_path,
        WEIGHTS,
        steps=3,
        train_steps=150,
        iterations=10,
        pool=64,
        fresh=40,
        seed=5,
        reports_dir=tmp_path,
    )
    layers = [[np.array(a) for a in pair] for pair in json.loads(printed)]

    def velocity(x, t):
        h = np.concatenate(
            [
                x,
                np.full((len(x), 1), t),
                *(
                    np.full((len(x), 1), f(k * np.pi * t))
                    for f in (np.sin, np.cos)
                    for k in (1, 2, 4)
                ),
            ],
            1,
        )
        for W, b in layers[:-1]:
            h = h @ W.T + b
            h = h / (1 + np.exp(-h))
        return h @ layers[-1][0].T + layers[-1][1]

    protocol, table = (
        json.loads((tmp_path / 'start.json').read_text()),
        pd.read_csv(tmp_path / 'start.csv'),
    )
    assert protocol['parameters'] == dict(
        steps=3, seed=5, train_steps=150, iterations=10, pool=64, fresh=40
    )
    assert protocol['noise_seeds'] == dict(searches=[5, 6, 7], tests=[1005, 1006, 1007])
    assert list(zip(table.solver, table.evaluations)) == [
        ('euler', 3),
        ('ab2', 3),
        ('ab3', 3),
        ('searched', 3),
        ('euler', 6),
        ('euler', 12),
        ('euler', 24),
        ('teacher', 100),
    ]
    rows = table.set_index(['solver', 'evaluations'])
    euler = lambda n: (np.linspace(0, 1, n + 1), np.eye(n))
    ab2 = np.eye(3)
    ab2[1, :2] = ab2[2, 1:] = -0.5, 1.5
    for key, (nodes, M) in {
        ('euler', 3): euler(3),
        ('ab2', 3): (np.linspace(0, 1, 4), ab2),
        ('euler', 12): euler(12),
        ('teacher', 100): euler(100),
    }.items():
        found = []
        for seed in protocol['noise_seeds']['tests']:
            x = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)).double().numpy()
            ends = [
                steps_by_hand(velocity, x, nodes, M)[-1],
                steps_by_hand(velocity, x, *euler(100))[-1],
                solve_ivp(
                    lambda t, y: velocity(y.reshape(x.shape), t).ravel(),
                    (0, 1),
                    x.ravel(),
                    rtol=1e-8,
                    atol=1e-9,
                )
                .y[:, -1]
                .reshape(x.shape),
            ]
            found.append([np.sqrt(np.square(ends[0] - e).mean()) for e in ends[1:]])
        found = np.array(found)
        expected = np.stack([found.mean(0), found.std(0, ddof=1)], 1).ravel()
        assert rows.loc[key].to_numpy() == pytest.approx(expected, rel=2e-3, abs=3e-6), key
    solver = load_solver(tmp_path / 'start_solver.json')
    assert (
        solver.digest == protocol['digests']['searched'][0]
        and len(set(protocol['digests']['searched'])) == 3
        and (solver.nfe, solver.params) == (3, 6)
    )
    with np.load(tmp_path / 'start_samples.npz') as f:  # what is drawn
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1005)).double().numpy()
        states = steps_by_hand(
            velocity, x, solver.nodes.numpy(), (solver.weights / solver.span[:, None]).numpy()
        )
        assert (
            np.abs(f['searched_ends'] - states[-1]).max() < 1e-4
            and np.abs(f['searched_paths'] - states[:, :16, 0]).max() < 1e-4
        )
    gain = re.search(r'(\d+\.\d) times nearer to the teacher than Euler', json.dumps(out))[1]
    assert float(gain) == pytest.approx(
        rows.rmse_teacher['euler', 3] / rows.rmse_teacher['searched', 3], abs=0.06
    )
    assert {p.name for p in tmp_path.glob('start*')} == {
        'start.ipynb',
        'start_out.ipynb',
        'start.csv',
        'start.json',
        'start.png',
        'start_samples.npz',
        'start_solver.json',
    }


def test_start_shows_the_interface_that_is_there():
    "The code in its prose is run as it stands, on fewer noises and iterations."
    import neuralsolver as ns

    prose = '\n'.join(text(c) for c in cells('start') if c['cell_type'] == 'markdown')
    (code,) = re.findall(r'```python\n(.*?)```', prose, re.S)
    small = code.replace('320', '24').replace(
        'steps=5', 'steps=2, iterations=2, teacher=4, race=0, batch_size=8, progress=False'
    )
    assert small.count('24') == 2
    space = dict(ns=ns, torch=torch)
    exec(small, space)
    assert space['result'].solver.nfe == 2
    (call,) = re.findall(r'`(ns\.Field\(net, path=.*?\))`', prose)
    field = eval(call, dict(ns=ns, net=lambda x, t, y: x * t.view(-1, 1)))
    assert (
        ns.sample(
            field,
            torch.randn(3, 2),
            ns.ddim(4, path=ns.DDPMPath()),
            torch.zeros(3, dtype=torch.long),
        )
        .isfinite()
        .all()
    )


ACTIONS = """
import json
def drawn():
    table, _, errors = playground.fig.axes
    lines = {l.get_label().split(':')[0]: [np.asarray(l.get_xdata()).tolist(), np.asarray(l.get_ydata()).tolist()] for l in errors.lines}
    ends = {t.get_text().split(': ')[0]: float(t.get_text().split(': ')[1]) for t in errors.get_legend().get_texts() if ': ' in t.get_text()}
    return dict(field=playground.field.value, M=np.nan_to_num(np.ma.filled(table.images[0].get_array(), 0)).tolist(), lines=lines, ends=ends, diagonal=[d.value for d in playground.diagonal],
                times=[w.value for w in playground.times], start=playground.start.value, status=playground.status.value, picture=hash(playground.picture.value))
log = {'first': drawn()}
def then(name): log[name] = drawn()
playground.sliders[2, 0].value = .7; then('coefficient')
playground.delta_sliders[0].value = .5; then('delta')
playground.descend.click(); then('descended')
playground.search.click(); then('searched')
playground.reset.click(); then('reset')
playground.steps.value = 5; then('five')
playground.start.value = 'sit-xl-2'; then('published')
playground.field.value = 'line'; then('line')
playground.steps.value = 3; then('three')
playground.start.value = 'searched'; then('found')
print(json.dumps(log))
"""

CENTRES = {
    'ring': 1.6 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1),
    'line': np.array([[-1.6], [0.1], [1.0]]),
}


def mixture_velocity(centres, std):
    "E[x_1 - x_0 | x_t] for Gaussians of equal weight, from Bayes' rule."

    def velocity(x, t):
        var = (t * std) ** 2 + (1 - t) ** 2
        gap = x[:, None] - t * centres
        p = np.exp(-(gap**2).sum(2) / (2 * var))
        p /= p.sum(1, keepdims=True)
        return (p[..., None] * (centres + (t * std**2 - (1 - t)) / var * gap)).sum(1)

    return velocity


def test_play_draws_what_the_sliders_say(tmp_path):
    "Widgets are changed as a user would; every number drawn is computed again, without the package's fields, sampling and teachers."
    printed, out = papermill('play', tmp_path, ACTIONS, noises=40)
    log = json.loads(printed)
    assert (
        sum('image/png' in o.get('data', {}) for c in out for o in c.get('outputs', [])) == 2
    )  # what a reader without widgets sees
    for key, s in log.items():
        velocity, noise = (
            mixture_velocity(CENTRES[s['field']], 0.15),
            indexed_noise(range(40), CENTRES[s['field']].shape[1:], 0, torch.float64).numpy(),
        )
        for who in ('Euler', 'yours'):
            M = np.array(s['M']) if who == 'yours' else np.eye(len(s['M']))
            nodes = np.array([0, *s['lines'][who][0]])
            if who == 'Euler':
                assert nodes == pytest.approx(np.linspace(0, 1, len(M) + 1))
            right = solve_ivp(
                lambda t, y: velocity(y.reshape(noise.shape), t).ravel(),
                (0, 1),
                noise.ravel(),
                t_eval=nodes.clip(0, 1),
                rtol=1e-7,
                atol=1e-8,
            ).y.T.reshape(-1, *noise.shape)
            error = np.sqrt(
                np.square(steps_by_hand(velocity, noise, nodes, M) - right).mean((1, 2))
            )[1:]
            assert s['lines'][who][1] == pytest.approx(error, rel=0.02, abs=5e-4), (key, who)
            assert s['ends'][who] == pytest.approx(s['lines'][who][1][-1], abs=6e-5)
        assert [float(d) for d in s['diagonal']] == pytest.approx(
            np.diag(s['M']), abs=0.006
        ) and np.sum(s['M'], 1) == pytest.approx(np.ones(len(s['M'])))
        assert [float(t.split(' to ')[1]) for t in s['times']] == pytest.approx(
            s['lines']['yours'][0], abs=6e-4
        )
    table = np.eye(4) * 1.5 - np.eye(4, k=-1) / 2
    table[0, 0] = 1
    assert np.array(log['first']['M']) == pytest.approx(table)
    table[2, 0], table[2, 2] = 0.7, 0.8
    assert np.array(log['coefficient']['M']) == pytest.approx(table) and np.array(
        log['delta']['M']
    ) == pytest.approx(table)
    assert log['coefficient']['lines']['yours'][0] == pytest.approx([0.25, 0.5, 0.75, 1]) and log[
        'delta'
    ]['lines']['yours'][0] == pytest.approx([0.4, 0.6, 0.8, 1])  # 0.5 : 0.25 : 0.25 : 0.25
    before, after = map(
        float, re.findall(r'pool (\S+) before, (\S+) after', log['descended']['status'])[0]
    )
    assert after < before
    assert (
        log['searched']['ends']['yours'] < log['delta']['ends']['yours'] / 2
        and log['searched']['ends']['start'] == log['first']['ends']['yours']
    )
    assert {k: v for k, v in log['reset'].items() if k != 'status'} == {
        k: v for k, v in log['first'].items() if k != 'status'
    }  # the picture as well
    assert (
        log['five']['start'] == 'ab2'
        and log['three']['start'] == 'ab2'
        and len(log['three']['M']) == 3
    )  # the published table has no 3 steps
    published = get_solver('sit-xl-2', 5)
    assert np.array(log['published']['M']) == pytest.approx(
        (published.weights / published.span[:, None]).numpy(), abs=1e-3
    )
    assert (
        log['found']['ends']['yours']
        < min(log['three']['ends']['yours'], log['found']['ends']['Euler'])
        and len({s['picture'] for s in log.values()}) == len(log) - 1
    )


def test_play_is_committed_without_widgets():
    "nbdev_clean keeps the state of widgets, 100 kB that no reader can use: drop it, and the widget's output, after running it. The static pictures stay."
    nb = json.loads((NBS / 'play.ipynb').read_text(encoding='utf-8'))
    outputs = [o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])]
    assert (
        set(nb['metadata']) == {'kernelspec', 'neuralsolver'}
        and [sorted(d) for d in outputs] == [['image/png', 'text/plain']] * 2
    )


def test_play_refuses_what_it_does_not_have(tmp_path):
    with pytest.raises(
        AssertionError, match=r"start='sit-xl-2' is not known. Allowed: euler, ab2, ab3"
    ):
        papermill('play', tmp_path, '', start='sit-xl-2')


@contextlib.contextmanager
def jupyterlab(folder):
    "JupyterLab on a copy of the repository, with settings and a token of its own; its address."
    repo, home = folder / 'repo', folder / 'home'
    shutil.copytree(
        ROOT / 'neuralsolver', repo / 'neuralsolver', ignore=shutil.ignore_patterns('__pycache__')
    )
    shutil.copy(ROOT / 'settings.ini', repo)
    (repo / 'data').symlink_to(ROOT / 'data')
    (repo / 'nbs').mkdir()
    for name in ('start', 'play'):
        shutil.copy(NBS / f'{name}.ipynb', repo / 'nbs')
    settings = (
        home / 'settings/@jupyterlab'
    )  # no question about news; all cells in the page, not only those in sight
    for file, content in (
        ('apputils-extension/notification', dict(fetchNews='false', checkForUpdates=False)),
        ('notebook-extension/tracker', dict(windowingMode='none')),
    ):
        (settings / file).parent.mkdir(parents=True, exist_ok=True)
        (settings / f'{file}.jupyterlab-settings').write_text(json.dumps(content))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token, log = secrets.token_hex(16), folder / 'jupyterlab.log'
    command = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        f'--ServerApp.port={port}',
        '--ServerApp.port_retries=0',
        '--ServerApp.ip=127.0.0.1',
        f'--IdentityProvider.token={token}',
        f'--ServerApp.root_dir={repo / "nbs"}',
        f'--LabApp.user_settings_dir={home / "settings"}',
        f'--LabApp.workspaces_dir={home / "workspaces"}',
    ]
    env = os.environ | {
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(repo),
        **{f'JUPYTER_{n}_DIR': str(home / n.lower()) for n in ('CONFIG', 'DATA', 'RUNTIME')},
        'IPYTHONDIR': str(home / 'ipython'),
    }
    with open(log, 'w') as f:
        server = subprocess.Popen(
            command, stdout=f, stderr=f, env=env, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        for _ in range(300):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={token}', timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise AssertionError(f'JupyterLab did not start:\n{log.read_text()[-2000:]}')
        assert server.poll() is None, log.read_text()[-2000:]
        yield f'http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={token}', repo
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def run_all(page, address, timeout):
    "Open a notebook, Run All, wait for the last cell; the seconds from the click on."
    page.goto(address)
    page.locator('.jp-Notebook .jp-CodeCell').first.wait_for(timeout=60_000)
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(
        timeout=60_000
    )  # with no kernel yet, Run All asks which
    page.get_by_role('menuitem', name='Run', exact=True).click()
    clock = time.perf_counter()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_function(
        """() => { const p = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(e => e.innerText.trim());
        return document.querySelector('.jp-Notebook .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg, .jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]') || p.length && p.every(t => /\\[\\d+\\]:/.test(t)); }""",
        timeout=timeout * 1000,
    )
    return time.perf_counter() - clock


def picture(page):  # bytes of the widget's picture
    return hashlib.sha256(
        bytes(
            page.evaluate(
                "async () => [...new Uint8Array(await (await fetch(document.querySelector('img.play-picture').src)).arrayBuffer())]"
            )
        )
    ).hexdigest()


def changed(page, old, act, seconds=60):
    "Act, and wait for another picture; its hash and the seconds."
    clock = time.perf_counter()
    act()
    while time.perf_counter() - clock < seconds:
        if (new := picture(page)) != old:
            return new, time.perf_counter() - clock
        time.sleep(0.05)
    raise AssertionError('the picture did not change')


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason='no chromium: apt-get install chromium')
@pytest.mark.skipif(
    importlib.util.find_spec('playwright') is None, reason='no playwright: pip install playwright'
)
def test_both_in_jupyterlab(tmp_path, capsys):
    "A reader's session: Run All on start; Run All on play, a slider by the keyboard, the buttons. READING_SHOTS names a folder for pictures of it."
    from playwright.sync_api import sync_playwright

    shots = os.environ.get('READING_SHOTS')

    def shot(page, name):
        if shots:
            page.screenshot(path=f'{shots}/{name}.png')

    with jupyterlab(tmp_path) as (address, repo), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        try:
            page = browser.new_page(viewport=dict(width=1400, height=1000))
            seconds = {}
            seconds['start, Run All'] = run_all(page, address.format('start'), 300)
            images = page.locator('.jp-Notebook .jp-RenderedImage img')
            assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
            assert (
                images.count() == 4
                and all(
                    images.nth(k).evaluate('i => i.complete && i.naturalWidth > 300')
                    for k in range(4)
                )
                and page.locator('.jp-Notebook table.dataframe tr').count() >= 8
            )
            assert (
                page.locator(
                    '.jp-Notebook .jp-RenderedMarkdown',
                    has_text='times nearer to the teacher than Euler',
                ).count()
                >= 1
            )
            table = (
                pd.read_csv(repo / 'reports/start.csv')
                .set_index(['solver', 'evaluations'])
                .rmse_teacher
            )  # the defaults of the notebook, computed here and now
            assert (
                table['searched', 6] < 0.6 * table['ab2', 6] < 0.6 * table['euler', 6]
                and table['searched', 6] < table['euler', 24]
            )
            shot(page, 'start_0')
            for k in range(4):
                images.nth(k).scroll_into_view_if_needed()
                shot(page, f'start_{k + 1}')

            seconds['play, Run All'] = run_all(page, address.format('play'), 200)
            assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
            page.locator('img.play-picture').wait_for(timeout=60_000)
            page.locator('img.play-picture').scroll_into_view_if_needed()
            first = picture(page)
            shot(page, 'play_0')
            handles = page.locator('.play-grid .noUi-handle')
            assert handles.count() == 4 + 6
            assert page.locator('.play-grid').get_by_text('0.000 to 0.250').count() == 1
            handles.nth(0).focus()
            moved, seconds['slider'] = changed(
                page, first, lambda: page.keyboard.press('ArrowRight')
            )  # the first time delta
            page.locator('.play-grid').get_by_text('0.000 to 0.257').wait_for(
                timeout=30_000
            )  # 0.26 : 0.25 : 0.25 : 0.25
            moved, seconds['gradient step'] = changed(
                page, moved, lambda: page.get_by_role('button', name='gradient step').click()
            )
            shot(page, 'play_1')
            moved, seconds['search from here'] = changed(
                page, moved, lambda: page.get_by_role('button', name='search from here').click()
            )
            shot(page, 'play_2')
            back, _ = changed(page, moved, lambda: page.get_by_role('button', name='reset').click())
            assert back == first
            page.get_by_label('start', exact=True).select_option('sit-tiny')
            table, _ = changed(page, first, lambda: None)
            page.wait_for_timeout(1500)  # its numbers have more digits than a slider shows
            nodes = get_solver('sit-tiny', 4).nodes
            assert (
                page.locator('.play-grid').get_by_text(f'{nodes[1]:.3f} to {nodes[2]:.3f}').count()
                == 1
                and picture(page) == table
            )
            shot(page, 'play_3')
        finally:
            browser.close()
    with capsys.disabled():
        print('\n' + ', '.join(f'{k}: {v:.1f} s' for k, v in seconds.items()))
