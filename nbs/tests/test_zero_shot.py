"Pictures of pipelines, and the notebooks zero_shot and pipeline_search with small parameters."

import json
from dataclasses import replace
from functools import wraps

import numpy as np
import pandas as pd
import pytest
from notebooks import run_notebook

import neuralsolver as ns
from neuralsolver.diffusers import FlowNeuralSolverScheduler, VPNeuralSolverScheduler
from neuralsolver.pipelines import load_pipeline
from neuralsolver.zero_shot import Rendering, check_renderings, make_scheduler, picture_files
from neuralsolver.zero_shot import read_image, render

SMALL = dict(pipeline='sit-tiny', prompts='Sneaker; Bag', steps='5')  # of both notebooks
SANA = Rendering('random-sana', ('a', 'b', 'c'), 'sit-xl-2', 5, 4.5)


def read_images(folder, count):
    return np.stack([read_image(f) for f in picture_files(folder, count)])


# schedulers by name


@pytest.mark.parametrize(
    'name, own, shift',
    [
        ('random-flux', 'FlowMatchEuler', 3.0),
        ('random-sana', 'DPMSolverMultistep', 3.0),
        ('sit-tiny', 'DPMSolverMultistep', 1.0),
        ('random-dit', 'DDIM', None),
        ('random-pixart-sigma', 'DPMSolverMultistep', None),
    ],
)
def test_stock_scheduler_keeps_the_family_and_the_shift(name, own, shift, caplog):
    pipe, flow = load_pipeline(name), shift is not None
    assert type(make_scheduler(pipe, 'own')).__name__.startswith(own)
    for other in ('dpm++', 'unipc'):
        config = make_scheduler(pipe, other).config
        assert config.solver_order == 2
        assert (config.prediction_type == 'flow_prediction') == flow
        assert not flow or (config.use_flow_sigmas and config.flow_shift == shift)
        assert config.get('use_dynamic_shifting', False) == (name == 'random-flux')
    ours = make_scheduler(pipe, 'sit-xl-2+shift' if flow else 'dit-xl-2')
    assert isinstance(ours, FlowNeuralSolverScheduler if flow else VPNeuralSolverScheduler)
    assert not flow or ours.config.compose_shift
    assert 'not expected' not in caplog.text
    with pytest.raises(ValueError, match="solver='dpm' is not known"):
        make_scheduler(pipe, 'dpm')


# pictures


def test_resumed_pictures_do_not_depend_on_the_batch(tmp_path):
    pipe = load_pipeline('random-sana')
    r = replace(SANA, prompts=('a', 'b', 'c', 'd', 'e'))
    whole = read_images(render(pipe, r, tmp_path / 'whole', batch_size=5, progress=False), 5)
    call, own, calls = type(pipe).__call__, pipe.scheduler, []

    class Killed(Exception):
        pass

    @wraps(call)
    def dying(self, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return call(self, **kwargs)

    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {'__call__': dying})
    with pytest.raises(Killed):
        render(pipe, r, tmp_path / 'parts', batch_size=2, progress=False)
    assert len(list((tmp_path / 'parts').glob('*.png'))) == 2 and pipe.scheduler is own
    parts = read_images(render(pipe, r, tmp_path / 'parts', batch_size=2, progress=False), 5)
    assert len(calls) == 4
    assert np.abs(whole.astype(int) - parts).max() <= 1  # 8-bit rounding at most


def test_resumed_folder_takes_more_prompts_and_no_other_settings(tmp_path):
    pipe, folder = load_pipeline('random-sana'), tmp_path / 'x'
    render(pipe, replace(SANA, prompts=('a', 'b')), folder, progress=False)
    before = (folder / '000001.png').stat().st_mtime_ns
    for prompts in (('a', 'b', 'c'), ('a',)):
        render(pipe, replace(SANA, prompts=prompts), folder, progress=False)
    assert (folder / '000001.png').stat().st_mtime_ns == before
    assert len(list(folder.glob('*.png'))) == 3
    assert json.loads((folder / 'card.json').read_text())['prompts'] == ['a', 'b', 'c']
    for change, said in (
        (dict(prompts=('a', 'x')), 'prompts'),
        (dict(seed=1), 'seed'),
        (dict(solver='flowdcn-b-2'), 'solver'),
        (dict(guidance=2.0), 'guidance'),
    ):
        with pytest.raises(ValueError, match=f'another rendering .*{said}'):
            render(pipe, replace(SANA, **change), folder, progress=False)


def test_pictures_of_other_weights_or_of_unknown_ones_are_refused(tmp_path):
    render(load_pipeline('random-sana'), SANA, tmp_path, progress=False)
    before = (tmp_path / '000001.png').stat().st_mtime_ns
    with pytest.raises(ValueError, match='another rendering .*content'):
        render(load_pipeline('random-sana', seed=7), SANA, tmp_path, progress=False)
    render(load_pipeline('random-sana'), SANA, tmp_path, progress=False)
    assert (tmp_path / '000001.png').stat().st_mtime_ns == before
    (tmp_path / 'card.json').unlink()
    with pytest.raises(ValueError, match='pictures without a card.json'):
        render(load_pipeline('random-sana'), SANA, tmp_path, progress=False)


def test_refused_before_the_run_what_a_pipeline_cannot_drive():
    "FLUX.1-schnell's static shift, and diffusers' own assertion."
    pipe = load_pipeline('random-flux')
    config = pipe.scheduler.config
    own = pipe.scheduler = type(pipe.scheduler).from_config(config, use_dynamic_shifting=False)
    with pytest.raises(ValueError, match=r'dpm\+\+ with 5 steps does not run in FluxPipeline'):
        check_renderings(pipe, [Rendering('x', ('a',), 'dpm++', 5)])
    assert pipe.scheduler is own
    runs = [Rendering('x', ('a',), name, 5) for name in ('sit-xl-2+shift', 'euler')]
    check_renderings(pipe, runs)


@pytest.mark.parametrize(
    'solver, folder',
    [
        ('sit-xl-2+shift', 'sit-xl-2+shift-5'),
        ('out/my.json', 'out_my-5'),
        ('../a b.json+shift', '.._a_b+shift-5'),
        ('unipc-2@quadratic', 'unipc-2@quadratic-5'),
    ],
)
def test_folder_name_has_no_path_in_it(solver, folder):
    assert Rendering('x', ('a',), solver, 5).folder == folder


# zero_shot


def test_zero_shot_writes_its_files_and_resumes(tmp_path):
    small = dict(per_prompt=1, baselines='euler', solvers='sit-xl-2', reference_steps=6)
    small |= SMALL | dict(reports_dir=str(tmp_path))
    run_notebook('zero_shot', **small)
    table = pd.read_csv(tmp_path / 'zero_shot_sit-tiny.csv').set_index('folder')
    card = json.loads((tmp_path / 'zero_shot_sit-tiny.json').read_text())
    assert sorted(table.index) == ['euler-5', 'sit-xl-2-5']
    assert (table.samples == 2).all() and not card['random_weights']
    folder = tmp_path / 'zero_shot/sit-tiny'
    first, last = (read_images(folder / name, 2) / 255 for name in ('euler-5', 'own-6'))
    expected = np.sqrt(((first - last) ** 2).mean())
    assert table.rmse['euler-5'] == pytest.approx(expected, rel=1e-5)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*.png')}
    run_notebook('zero_shot', **small)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.png')} == before


def test_tables_of_the_model_itself_come_last(tmp_path):
    "With guidance that for guidance, too, if it has all numbers of steps (dit-tiny: 5 to 9)."
    small = dict(prompts='0', per_prompt=1, baselines='euler', reference_steps=6)
    cases = [('sit-cifar', '5', 2.0, ['sit-cifar', 'sit-cifar-guided'])]
    cases += [('sit-cifar', '5', 1.0, ['sit-cifar']), ('dit-tiny', '5,10', 2.0, ['dit-tiny'])]
    for name, steps, guidance, own in cases:
        out = tmp_path / f'{name} {guidance}'
        given = dict(pipeline=name, steps=steps, guidance=guidance, reports_dir=str(out))
        run_notebook('zero_shot', **small | given)
        card = json.loads((out / f'zero_shot_{name}.json').read_text())
        assert [s for s in card['schedulers'] if s.startswith(name)] == own
        assert card['schedulers'][-len(own) :] == own


def test_zero_shot_says_that_weights_are_random(tmp_path):
    small = dict(prompts='a; b', steps='5', per_prompt=1, baselines='euler', reference_steps=6)
    run_notebook('zero_shot', pipeline='random-flux', **small, reports_dir=str(tmp_path))
    card = json.loads((tmp_path / 'zero_shot_random-flux.json').read_text())
    # Flux has a shift: both readings
    assert card['random_weights'] and 'sit-xl-2+shift' in card['schedulers']


def test_refused_parameter_of_zero_shot_is_named(tmp_path):
    for change, said in (
        (dict(steps='4'), 'There are tables for 5, 6, 7, 8, 9, 10 steps'),
        (dict(solvers='dit-xl-2'), 'belongs to VPPath'),
        (dict(steps='x'), 'steps='),
        (dict(prompts='a cat'), 'prompts: .* is no class'),
        (dict(prompts=';'), 'prompts='),
        (dict(prompts='none.txt'), 'prompts file none.txt does not exist'),
        (dict(baselines='dpm'), 'is not known'),
        (dict(solvers='sit-xl-2,sit-xl-2'), 'solvers=.*distinct'),
        (dict(baselines='own', reference_steps=5), 'twice'),
        (dict(dtype='int8'), 'dtype='),
        (dict(pipeline='no-such'), 'pipeline=.*Nothing is fetched'),
        (dict(batch_size=0), 'batch_size='),
        (dict(download='true'), 'download='),
        (dict(size=0), 'size=0'),
    ):
        with pytest.raises(ValueError, match=said):
            run_notebook('zero_shot', **SMALL | dict(reports_dir=str(tmp_path)) | change)
    assert not list(tmp_path.rglob('*.png'))


# pipeline_search

SEARCH = SMALL | dict(
    steps='3,5',
    method='paper',
    options='iterations=4, batch_size=4, eval_every=2, patience=None',
    samples=8,
    heldout=4,
    teacher_steps=10,
)


def test_pipeline_search_makes_a_scheduler_that_loads(tmp_path, monkeypatch):
    pushed = []

    def push(self, repository, **kwargs):
        pushed.append((repository, self.solver_for(3).digest))

    monkeypatch.setattr(FlowNeuralSolverScheduler, 'push_to_hub', push)
    given = SEARCH | dict(gradient_checkpointing=1, push_to_hub='me/solver')
    run_notebook('studies/pipeline_search', **given, reports_dir=str(tmp_path))
    out = tmp_path / 'pipeline_search/sit-tiny'
    loaded = FlowNeuralSolverScheduler.from_pretrained(out / 'scheduler')
    found = {n: ns.load_solver(out / f'sit-tiny-{n}.json') for n in (3, 5)}
    digests = {n: s.digest for n, s in found.items()}
    assert {n: loaded.solver_for(n).digest for n in found} == digests
    assert pushed == [('me/solver', digests[3])]
    command = (
        'papermill nbs/studies/pipeline_search.ipynb -p pipeline sit-tiny '
        f"-p prompts 'Sneaker; Bag' -p steps 5 -p method paper -p options '{SEARCH['options']}' "
    )
    assert found[5].provenance['command'].startswith(command)
    for s in found.values():
        assert (s.provenance['iterations'], s.provenance['method']) == (4, 'paper')
    table = pd.read_csv(out.parent / 'pipeline_search_sit-tiny.csv', index_col=0)
    card = json.loads((out.parent / 'pipeline_search_sit-tiny.json').read_text())
    assert (card['network'], card['method']) == ('TinyTransformer', 'paper')
    assert card['solvers'] == {str(n): digest for n, digest in digests.items()}
    assert (table.searched <= table.euler + 1e-9).all()
    assert np.isnan(table['sit-xl-2'][3]) and table['sit-xl-2'][5] > 0


def test_refused_parameter_of_pipeline_search_is_named(tmp_path):
    for change, said in (
        (dict(steps='5;6'), 'steps='),
        (dict(options='start=dit-xl-2, batch_size=4', steps='5'), 'coordinates on'),
        (dict(method='lion'), "method='lion'"),
        (dict(options=None), 'batch_size='),
        (dict(teacher_steps=4), 'teacher_steps=4'),
        (dict(gradient_checkpointing=2), 'gradient_checkpointing='),
    ):
        with pytest.raises(ValueError, match=said):
            given = SEARCH | dict(reports_dir=str(tmp_path)) | change
            run_notebook('studies/pipeline_search', **given)
