"""Input that nobody should give: an error of one line that names it, or a right result.

Within ten seconds and 2 GiB a case, and without a file outside the folder of the case.
"""

import copy
import inspect
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import neuralsolver as ns
from fault_cases import CASES, GOOD, bounded, lines_of, outcome, verdict, workplace

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='bounds need RLIMIT_AS')


@pytest.mark.parametrize('kind', CASES)
def test_past_faults(kind):
    "Every input that once went wrong."
    with workplace() as (tools, names):
        found = {line: outcome(line, names, tools) for line in lines_of(kind)}
    assert not {line: said for line, said in found.items() if said not in GOOD}


hypothesis = pytest.importorskip('hypothesis')
hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())  # nothing in the clone
from hypothesis import given, settings, strategies as st  # noqa: E402

FAST = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=list(hypothesis.HealthCheck),
)
NAN, INF = math.nan, math.inf
JUNK = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 3, 1.5, NAN, INF, -INF, 1e30, 10**9, 10**400, -(10**20)),
        *('', ' ', 'x', '8', 'nan', '../x', '/x', 'a\0b', 'a\nb', '<b>', 'ü' * 300, b'x'),
        *([], [None], [1, 2], ['a'], {}, {'a': 1}, (), set(), object, object()),
        *(torch.tensor(NAN), torch.zeros(0), torch.ones(2, 2, dtype=torch.complex64)),
    ]
) | st.one_of(st.integers(), st.floats(), st.text(max_size=12), st.lists(st.floats(), max_size=4))


def is_right(value) -> bool:
    "Is a result made of finite numbers?"
    if isinstance(value, ns.Solver):
        return is_right(value.nodes) and is_right(value.weights) and value.nfe <= 1000
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return True


def holds(call, names=()):
    "An error of one line that names one of these, or a right result."
    try:
        with bounded(10, 2.0):
            value = call()
    except Exception as e:
        assert verdict(e) == 'clear line', f'{type(e).__name__}: {e}'
        assert not names or any(name in str(e) for name in names), str(e)
        return None
    assert is_right(value), value
    return value


# public functions: one argument of a valid call is replaced

Z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
VALID = {
    ns.euler: dict(steps=4, grid=None),
    ns.heun: dict(steps=2, grid=None, euler_end=True),
    ns.rk4: dict(steps=2, grid=None),
    ns.adams_bashforth: dict(steps=4, order=2, grid=None, start='rk4'),
    ns.ddim: dict(steps=4, path=ns.VPPath(), spacing='time', t_start=None, t_end=None),
    ns.deis: dict(steps=4, order=2, path=ns.VPPath(), spacing='karras', variable='s'),
    ns.ipndm: dict(steps=4, order=3, path=ns.LinearPath(), spacing='time'),
    ns.dpm_solver_pp: dict(steps=4, order=2, path=ns.VPPath(), singlestep=False, exact=False),
    ns.unipc: dict(steps=4, order=2, path=ns.VPPath(), variant='bh1', corrector=True),
    ns.time_grid: dict(steps=4, path=ns.VPPath(), spacing='karras', rho=7.0, shift=3.0),
    ns.optimized_nodes: dict(steps=3, path=ns.VPPath(), init='time', order=2),
    ns.get_solver: dict(name='ab2@quadratic', steps=4, path=ns.LinearPath()),
    ns.load_solver: dict(name='sit-xl-2', steps=8, rounded=True),
    ns.change_path: dict(solver=ns.ddim(4), path=ns.DDPMPath()),
    ns.VPPath: dict(beta_min=0.1, beta_max=20.0, t_min=1e-3),
    ns.DDPMPath: dict(schedule='linear', beta_start=1e-4, beta_end=0.02, train_steps=1000),
    ns.ShiftedPath: dict(shift=3.0),
    ns.GaussianMixture: dict(centers=Z, std=0.3, labels=None, weights=None, prediction='data'),
    ns.Solver: dict(nodes=[0, 0.5, 1], weights=[[0.5, 0], [0, 0.5]], name='a', steps=2, params=0),
    ns.neural_solver: dict(timedeltas=[0.5, 0.5], coefficients=[[0, 0], [0.5, 0]], t_start=0.0),
    ns.NeuralSolver: dict(steps=4, two_step_tail=None, init=None, family='times', order=2),
    ns.sample: dict(field=lambda x, t: -x, noise=Z, solver=ns.euler(3), trajectory=False),
    ns.guide: dict(cond=Z, uncond=Z, scale=2.0, channels=None),
}


@FAST
@given(st.sampled_from(list(VALID)), st.data(), JUNK)
def test_public_functions(function, data, junk):
    arguments = VALID[function]
    name = data.draw(st.sampled_from(list(arguments)))
    holds(lambda: function(**arguments | {name: junk}))


@pytest.mark.parametrize('function', VALID, ids=lambda f: f.__name__)
def test_the_valid_call(function):
    assert is_right(function(**VALID[function]))


@FAST
@given(JUNK)
def test_fields_that_return_anything(junk):
    value = holds(lambda: ns.sample(lambda x, t: junk, Z, ns.adam2(3)))
    assert value is None or value.shape == Z.shape


# solver files


def changed(content, rng: random.Random, junk):
    "A JSON value with one part replaced, removed or doubled."
    content = copy.deepcopy(content)
    place = content
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.7):
            break
        place = inner
    what = rng.choice(('replace', 'remove', 'add'))
    if what == 'replace':
        place[key] = junk
    elif what == 'remove':
        del place[key]
    elif isinstance(place, dict):
        place['more'] = junk
    else:
        place.insert(key, inner)
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
FILES = [ns.load_solver('sit-xl-2', 5), ns.unipc(4), ns.dpm_solver(4, 2, ns.DDPMPath())]


@FAST
@given(st.sampled_from(FILES), st.integers(0, 2**32), JSON)
def test_solver_files(tmp_path_factory, solver, seed, junk):
    file = tmp_path_factory.getbasetemp() / 'fuzzed.json'
    rng = random.Random(seed)
    text = json.dumps(changed(solver.to_dict(), rng, junk)).encode()
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text))]
    elif rng.random() < 0.2:
        k = rng.randrange(len(text))
        text = text[:k] + bytes([text[k] ^ (1 << rng.randrange(8))]) + text[k + 1 :]
    file.write_bytes(text)
    loaded = holds(lambda: ns.load_solver(file), ['fuzzed.json'])
    if loaded is not None:
        again = ns.Solver.from_dict(json.loads(json.dumps(loaded.to_dict())))
        assert again.digest == loaded.digest
        assert ns.sample(lambda x, t: x * 0, Z, loaded).shape == Z.shape


# schedulers of diffusers


def schedulers():
    from neuralsolver.diffusers import FlowNeuralSolverScheduler, VPNeuralSolverScheduler

    return FlowNeuralSolverScheduler(), VPNeuralSolverScheduler()


@settings(FAST, max_examples=50)
@given(st.booleans(), st.data(), JUNK)
def test_scheduler_configs(flow, data, junk):
    scheduler = schedulers()[not flow]
    key = data.draw(st.sampled_from([k for k in scheduler.config if k[0] != '_']))
    config = dict(scheduler.config) | {key: junk}
    made = holds(lambda: type(scheduler).from_config(config))
    if made is None:
        return
    n = made.smallest_steps
    holds(lambda: made.set_timesteps(max(n, 5)))
    if made.num_inference_steps and made.init_noise_sigma < 1e3:
        step = holds(lambda: made.step(Z, made.timesteps[0], Z).prev_sample)
        assert step is None or step.shape == Z.shape


@settings(FAST, max_examples=60)
@given(st.booleans(), JUNK, st.sampled_from(['num_inference_steps', 'sigmas', 'timesteps', 'mu']))
def test_what_pipelines_hand_over(flow, junk, name):
    scheduler = schedulers()[not flow]
    given_steps = {} if name in ('num_inference_steps', 'sigmas', 'timesteps') else {'n': 8}
    holds(lambda: scheduler.set_timesteps(*given_steps.values(), **{name: junk}))


# parameters of notebooks

ROOT = Path(__file__).resolve().parents[2]


def parameters() -> list[tuple]:
    "Notebook, name and kind of every parameter."
    from neuralsolver.tools import papermill_engine as engine

    found = []
    for file in sorted((ROOT / 'nbs').glob('*.ipynb')) + sorted((ROOT / 'nbs/studies').glob('*')):
        cells = json.loads(file.read_text(encoding='utf-8'))['cells']
        for cell in cells:
            if 'parameters' in cell['metadata'].get('tags', []):
                defined = engine._defined(''.join(cell['source']))
                found += [(file.stem, name, kind) for name, kind in defined.items()]
    return found


PARAMETERS = parameters()
KINDS = dict(int=int, float=(int, float), str=str, bool=bool)


@settings(FAST, max_examples=300)
@given(st.sampled_from(PARAMETERS), JUNK)
def test_notebook_parameters(parameter, junk):
    from neuralsolver.tools.papermill_engine import typed

    _, name, kind = parameter
    value = holds(lambda: typed(name, junk, kind), [name])
    if value is not None:
        assert isinstance(value, KINDS[kind.kind]), (name, value)
        assert not isinstance(value, float) or math.isfinite(value)


def test_every_parameter_has_a_kind():
    assert {kind.kind for _, _, kind in PARAMETERS} <= set(KINDS)


@FAST
@given(JUNK)
def test_checks(junk):
    from neuralsolver import utils

    checks = [f for name, f in vars(utils).items() if name.startswith('check_')]
    for check in checks:
        extra = ['a'] if check is utils.check_choice else []
        arguments = ['given', junk, *extra]
        if check is utils.check_steps:
            arguments = [junk]
        holds(lambda: check(*arguments), ['given', 'steps'])
    for split in (utils.split_names, utils.split_numbers, utils.as_path, utils.as_numbers):
        assert len(inspect.signature(split).parameters) >= 2
        if split is not utils.as_numbers:  # it takes nan: its callers say what they need
            holds(lambda: split('given', junk), ['given'])
