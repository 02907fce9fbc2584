"search.ipynb and benchmark.ipynb as a user runs them, with small parameters."
import json, os, subprocess, sys
from pathlib import Path
import matplotlib.pyplot, pandas as pd, pytest, torch
from neuralsolver.neural import load_solver
from neuralsolver.solvers import adam2, euler

NBS = Path(__file__).resolve().parent.parent
SMALL = dict(model='fashion-mixture', steps=3, iterations=6, batch_size=4, teacher_steps=10, samples=12, heldout=4)

def papermill(notebook, output, **parameters):
    options = [word for key, value in parameters.items() for word in ('-p', key, str(value))]
    command = [sys.executable, '-m', 'papermill', NBS / f'{notebook}.ipynb', output / f'{notebook}.ipynb', '--log-level', 'ERROR', *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})

def in_process(notebook, **parameters):
    "Run the code cells here, the parameters set after their cell as papermill does: papermill itself is slow to start."
    nb, space = json.loads((NBS / f'{notebook}.ipynb').read_text(encoding='utf-8')), {'__name__': '__main__'}
    with matplotlib.rc_context({'backend': 'agg'}):
        for cell in nb['cells']:
            if cell['cell_type'] != 'code': continue
            exec(''.join(cell['source']), space)
            if 'parameters' in cell['metadata'].get('tags', []): space.update(parameters)
        matplotlib.pyplot.close('all')

def test_search_writes_its_files_and_resumes(tmp_path):
    "Three iterations by papermill, then six in all."
    run = papermill('search', tmp_path, reports_dir=tmp_path, **SMALL | {'iterations': 3})
    assert run.returncode == 0, run.stderr[-2000:]
    out = tmp_path / 'search'; first = pd.read_csv(out / 'fashion-mixture-3_history.csv', index_col=0)
    assert first['loss'].count() == 3 and load_solver(out / 'fashion-mixture-3.json').provenance['iterations'] == 3
    in_process('search', reports_dir=str(tmp_path), **SMALL)
    history = pd.read_csv(out / 'fashion-mixture-3_history.csv', index_col=0)
    assert history['loss'].count() == 6 and history['loss'][:4].equals(first['loss'])
    assert history['heldout_rmse'].dropna().index.tolist() == [0, 3, 6] # 3: where the first run ended; a fresh run would not stop there
    solver = load_solver(out / 'fashion-mixture-3.json', 3); p = solver.provenance
    assert (solver.nfe, solver.params, p['searched_on'], p['iterations']) == (3, 6, 'fashion-mixture', 6)
    assert (p['teacher'], p['unique_samples'], p['heldout_samples'], p['seed'], p['batch_size']) == ('euler-10', 12, 4, 0, 4)
    assert (out / 'fashion-mixture-3.png').stat().st_size > 1000
    assert torch.load(out / 'fashion-mixture-3_s0.ckpt', weights_only=True)['iteration'] == 6
    assert not [p for p in out.iterdir() if p.name.startswith('.')] # no temporary file stays behind

def test_a_search_may_start_from_a_classical_solver(tmp_path):
    in_process('search', reports_dir=str(tmp_path), **SMALL | dict(init='adam2', iterations=1))
    found = load_solver(tmp_path / 'search' / 'fashion-mixture-3.json'); start = adam2(3)
    assert found.provenance['init'] == f'adam2 ({start.digest})' and found.provenance['command'].endswith('-p init adam2')
    assert (found.weights - start.weights).abs().max() < .05 # one step of Lion away at most, not at Euler
    assert (found.weights - euler(3).weights).abs().max() > .1

def test_a_bad_value_ends_papermill_with_an_error(tmp_path):
    run = papermill('search', tmp_path, reports_dir=tmp_path, **SMALL | {'steps': 0})
    assert run.returncode != 0 and 'ValueError: steps=0 is not allowed: give integers >= 1' in run.stderr
    assert not (tmp_path / 'search').exists()

@pytest.mark.parametrize('change, message', [
    (dict(steps=2.5), 'steps=2.5 is not allowed: give integers >= 1'), (dict(steps='8,8'), 'distinct'),
    (dict(steps='8;9'), 'steps=.8;9. is not allowed'),
    (dict(model='sit-xxl'), "model='sit-xxl' is not known. Allowed: fashion-mixture"), (dict(iterations=0), 'iterations=0'),
    (dict(init='unipc-2'), "solver='unipc-2' is not known. Allowed: euler"), (dict(init='heun'), 'one a step'),
    (dict(batch_size=13), 'batch_size=13'), (dict(seed=-1), 'seed=-1'), (dict(heldout=0), 'heldout=0'), (dict(lr=-.01), 'lr=-0.01')])
def test_search_refuses_bad_values_before_it_writes(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): in_process('search', reports_dir=str(tmp_path), **SMALL | change)
    assert not (tmp_path / 'search').exists()

def test_benchmark_writes_its_files(tmp_path):
    small = dict(model='fashion-mixture', steps=2, batch_size=4, repeats=3, solvers='euler,rk4', imports=1, latents='1,4,8,8', samples=8)
    in_process('benchmark', reports_dir=str(tmp_path), **small)
    times, protocol = pd.read_csv(tmp_path / 'benchmark.csv'), json.loads((tmp_path / 'benchmark.json').read_text())
    assert times.groupby('group')['variant'].nunique().to_dict() == {'sample': 4, 'guidance': 2, 'import': 3, 'evaluation': 2, 'flow scheduler': 4, 'VP scheduler': 4}
    assert len(times) == 3 * (4 + 2 + 4 + 4) + 3 * 2 + 3 and (times['seconds'] > 0).all()
    whole = times[times['group'] == 'evaluation'].pivot(index='repeat', columns='variant', values='seconds'); assert (whole['network'] < whole['all']).all()
    assert times[times['variant'] == 'rk4']['evaluations'].unique().tolist() == [8]
    assert protocol['nfe'] == {'euler': 2, 'rk4': 8} and protocol['hardware']
    assert protocol['versions']['torch'] == torch.__version__
    assert (tmp_path / 'benchmark.png').stat().st_size > 1000
    bad = ((dict(solvers='dit-xl-2', steps=8), 'belongs to VPPath'), (dict(repeats=2), 'repeats=2'), (dict(guidance=1), 'guidance=1'), (dict(latents='8x8'), 'latents='), (dict(samples=4), 'samples=4'))
    for change, message in bad:
        with pytest.raises(ValueError, match=message): in_process('benchmark', reports_dir=str(tmp_path / 'bad'), **change)
    assert not (tmp_path / 'bad').exists()
