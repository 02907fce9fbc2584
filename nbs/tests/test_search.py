"Searches: the paper's against the code before it was generalised, what each family may change, what may influence a search, kills, and numbers that are none."

import json, os, subprocess, sys
from dataclasses import replace
import pytest, torch
from neuralsolver.dpm_solvers import dpm_solver_pp
from neuralsolver.fields import GaussianMixture
from neuralsolver import solver_search
from neuralsolver.tools import search_runs
from neuralsolver.closed_form import fit_rows, gits
from neuralsolver.neural import get_solver, NeuralSolver
from neuralsolver.paths import LinearPath, VPPath
from neuralsolver.tools.docs import GROUPS
from neuralsolver.tools.search_runs import run_search, Scorer, Search
from neuralsolver.starts import FITTED_MARGIN, PUBLISHED, race_grids, start_candidates
from neuralsolver.losses import heldout_rmse
from neuralsolver.recipes import METHODS, Recipe
from neuralsolver.solver_search import search
from neuralsolver.classical import adams_bashforth, euler
from neuralsolver.solvers import sample, Solver
from neuralsolver.teachers import teacher_solver, teacher_trajectories
from neuralsolver.utils import indexed_noise

CENTRES = torch.tensor(
    [[1.2, -0.4], [-0.8, 1.0], [0.3, 0.9], [-1.1, -1.3], [1.6, 1.1]], dtype=torch.float64
)
POOL = indexed_noise(range(60), (2,), seed=1, dtype=torch.float64)
TRAIN = 48  # the rest is held out
FIELD, VP = GaussianMixture(CENTRES, 0.2), GaussianMixture(CENTRES, 0.2, path=VPPath())
GRADIENT = [name for name, recipe in METHODS.items() if isinstance(recipe, Recipe)]
by_gradient = pytest.mark.parametrize('method', GRADIENT)
TEACHERS = {
    field.path: teacher_trajectories(field, POOL, steps=40, progress=False) for field in (FIELD, VP)
}
TEACHER = TEACHERS[LinearPath()]


def run(field=FIELD, steps=4, noise=POOL, method='ours', **settings):
    "A short search, without a race of starts."
    short = dict(iterations=12, eval_every=4, batch_size=16, race=0) if method in GRADIENT else {}
    return search(
        field,
        steps,
        noise,
        **dict(
            teacher=TEACHERS[getattr(field, 'path', LinearPath())],
            method=method,
            heldout=12,
            progress=False,
        )
        | short
        | settings,
    )


def ratios(solver):
    return solver.weights / solver.span[:, None]  # M


def close(a, b, atol):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=0,
        atol=atol,
    )


def same_solver(a, b, atol):
    close(a.nodes, b.nodes, atol)
    close(a.weights, b.weights, atol)


class Watched:
    "A field that keeps the states it is asked for, and may answer `instead(self, x)`."

    path = LinearPath()

    def __init__(self, instead=lambda self, x: None):
        self.instead, self.calls, self.graded = instead, [], []

    def __call__(self, x, t):
        self.calls.append((t.item(), x.detach().clone(), torch.is_grad_enabled()))
        self.graded += [x.detach()] * torch.is_grad_enabled()
        return FIELD(x, t) if (v := self.instead(self, x)) is None else FIELD(x, t) * v


def nan_at(*iterations, steps=4):
    return lambda self, x: (
        float('nan')
        if torch.is_grad_enabled() and (len(self.graded) - 1) // steps in iterations
        else None
    )


# What commit db3acad (before the recipes) answers: search(field, N, POOL, teacher=40, iterations=120, lr=.004, batch_size=16, seed=3, heldout=12), run once, on 1 and on 2 threads with the same bits.
FROZEN = {  # coefficients of the best iterate in units of lr, its nodes, first and last loss, held-out history
    'linear-5': (
        FIELD,
        [[], [-70], [-70, -70], [0, 0, -70], [0, 0, 0, -70]],
        [0.0, 0.25257232424048687, 0.4678002616067778, 0.6571692895848406, 0.8333830208281646, 1.0],
        [0.21054991555329639, 0.08409787692346354],
        [
            0.11665505897943824,
            0.09923282059733111,
            0.08482456612796573,
            0.0741526662222519,
            0.06492956588249679,
            0.05286199170010793,
            0.03815364449898839,
            0.02576182616383993,
            0.03099464001214795,
            0.04876010769952796,
            0.0647873062912439,
            0.07441647602790072,
            0.06880716110799553,
        ],
    ),
    'linear-7': (
        FIELD,
        [
            [],
            [-20],
            [-20, -20],
            [-20, -20, -20],
            [-20, -20, -20, -20],
            [-12, -10, -8, -8, -2],
            [-2, -2, -2, 0, -6, -20],
        ],
        [
            0.0,
            0.15100707895229715,
            0.3020141579045943,
            0.44944021115800636,
            0.5945262178526145,
            0.7384561668899292,
            0.8713202555808699,
            1.0,
        ],
        [0.14254069952793666, 0.024574761576462184],
        [
            0.10053598521780563,
            0.06761734484555226,
            0.02552507184466528,
            0.027769927848415116,
            0.031068545660964036,
            0.03255052056690885,
            0.03785763935456935,
            0.04433038307405407,
            0.04958092627708411,
            0.045663233934135204,
            0.046829558920971806,
            0.0483985821597311,
            0.046328306550845674,
        ],
    ),
    'vp-6': (
        VP,
        [[], [-50], [-50, -50], [-50, -50, -50], [0, 0, 0, -50], [0, 0, 0, 0, -50]],
        [
            0.999,
            0.811756526790749,
            0.624513053581498,
            0.43726958037224695,
            0.250026107162996,
            0.12451305358149789,
            0.001,
        ],
        [0.2577919649805643, 0.06723967463288263],
        [
            0.15599818106182803,
            0.13296714512263158,
            0.11018806125686008,
            0.0871524970862525,
            0.06504878951478454,
            0.05040299902922583,
            0.056747935207407466,
            0.08301583338112785,
            0.10071574537037531,
            0.09227782437212384,
            0.07658722194371634,
            0.06370710830183983,
            0.07415790122142696,
        ],
    ),
}


@pytest.mark.parametrize('name', FROZEN)
def test_the_papers_search_is_what_it_was_before_there_were_others(name):
    field, units, nodes, losses, rmse = FROZEN[name]
    N = len(units)
    found = search(
        field,
        N,
        POOL,
        teacher=40,
        method='paper',
        iterations=120,
        lr=0.004,
        batch_size=16,
        seed=3,
        heldout=12,
        progress=False,
    )
    M = ratios(found.solver)
    close(
        [v for k in range(N) for v in M[k, :k].tolist()],
        [0.004 * u for row in units for u in row],
        1e-9,
    )
    close(found.solver.nodes, nodes, 1e-9)
    close(found.history['heldout_rmse'], rmse, 1e-9)
    close([found.history['loss'][0], found.history['loss'][-1]], losses, 1e-9)
    assert found.history['iteration'] == [*range(0, 121, 10)]


def test_lion_leaves_its_fingerprint():
    "After k iterations every coefficient is a sum of k steps of +-0.01."
    found = run(steps=7, method='paper', iterations=41, eval_every=41, patience=None)
    k = found.solver.provenance['best_iteration']
    assert k == 41
    units = torch.cat([row[:i] for i, row in enumerate(ratios(found.solver))]) / 0.01
    close(units, units.round(), 1e-6)
    assert (units.round() % 2 == 1).all() and len(units.round().unique()) > 2


STARTS = {
    LinearPath(): adams_bashforth(6, 2),
    VPPath(): dpm_solver_pp(6, 2, t_start=VPPath().t_start),
}
FREE = {
    'times': (True, False, False, False),
    'coefficients': (False, True, False, False),
    'consistent': (True, True, False, False),
    'scaled': (True, True, True, False),
    'non-stationary': (True, True, True, True),
}  # nodes, M, row sums, gains


@pytest.mark.parametrize('family', FREE)
@pytest.mark.parametrize('field', [FIELD, VP], ids=['linear', 'vp'])
def test_a_family_changes_what_it_may_and_nothing_else(field, family):
    start = STARTS[field.path]
    s = run(field, 6, init=start, family=family).solver
    sums = s.weights.sum(1)
    assert s.provenance['best_iteration'] > 0 and (s.path, s.coordinates) == (
        start.path,
        start.coordinates,
    )
    close(s.nodes[[0, -1]], start.nodes[[0, -1]], 1e-12)
    differences = (
        (s.nodes, start.nodes),
        (s.weights / sums[:, None], ratios(start)),
        (sums / s.span, torch.ones(6)),
        (s.gain / (s.scale[1:] / s.scale[:-1]), torch.ones(6)),
    )
    for (a, b), free in zip(differences, FREE[family]):
        gap = (a - b).abs().max().item()
        assert gap > 1e-3 if free else gap < 1e-9
    assert s.consistent == (not FREE[family][2])


@pytest.mark.parametrize('order', [1, 2, 3])
def test_order_bounds_what_a_step_uses(order):
    W = run(steps=6, start='euler', order=order).solver.weights
    assert not W.tril(-order).any() and (W.diagonal(1 - order) != 0).all()


@pytest.mark.parametrize('tail, full', [(True, False), (False, True)])
def test_two_step_tail_bounds_the_last_two_rows_only(tail, full):
    W = run(steps=7, start='euler', two_step_tail=tail).solver.weights
    assert (
        bool(W[5:].tril(3).any()) == full and (W[4, :5] != 0).all() and (W.diagonal(-1) != 0).all()
    )


def test_the_published_rule_for_the_tail_belongs_to_the_papers_method():
    assert [run(steps=n, method='paper').solver.provenance['two_step_tail'] for n in (6, 7)] == [
        True,
        False,
    ] and not run(steps=6, start='euler').solver.provenance['two_step_tail']


@pytest.mark.parametrize('radius', [0.05, 0.01])
def test_noises_move_inside_their_balls(radius):
    field = Watched()
    run(field, method='times', radius=radius, iterations=40)
    begun = torch.cat([x for t, x, grad in field.calls if t == 0 and grad])
    nearest = (
        (begun[:, None] - POOL[:TRAIN]).square().mean(2).sqrt().min(1).values
    )  # root mean square per element
    assert (
        0.5 * radius < nearest.max() <= radius * (1 + 1e-9) and (nearest[:16] == 0).all()
    )  # at first they have not moved


@pytest.mark.parametrize('method', METHODS)
def test_the_held_out_noises_choose_the_iterate_and_nothing_else(tmp_path, method):
    "The same training part beside other held-out noises: the same losses and the same last parameters."
    other = torch.cat([POOL[:TRAIN], indexed_noise(range(12), (2,), seed=9, dtype=torch.float64)])
    T = teacher_trajectories(FIELD, other, steps=40, progress=False)
    a, b = (
        run(method=method, checkpoint=tmp_path / 'a.pt'),
        run(method=method, noise=other, teacher=T, checkpoint=tmp_path / 'b.pt'),
    )
    assert (
        a.history['heldout_rmse'][0] != b.history['heldout_rmse'][0]
        and a.history['loss'] == b.history['loss']
    )
    if method not in GRADIENT:
        assert a.solver.digest == b.solver.digest
        return
    a, b = (torch.load(tmp_path / f, weights_only=True)['module'] for f in ('a.pt', 'b.pt'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    'method', [m for m in GRADIENT if METHODS[m].optimizer != 'l-bfgs' and not METHODS[m].radius]
)
def test_an_epoch_sees_every_training_noise_once_and_no_other(method):
    field = Watched()
    run(field, method=method, iterations=6)
    begun = [x for t, x, grad in field.calls if t == 0 and grad]
    rows = lambda v: sorted(map(tuple, v.tolist()))
    for epoch in (begun[:3], begun[3:]):
        assert rows(torch.cat(epoch)) == rows(POOL[:TRAIN])
    assert rows(begun[0]) != rows(begun[3])


def test_the_seed_chooses_the_batches():
    first = {seed: run(seed=seed, method='paper').history['loss'] for seed in (0, 0, 1, 2)}
    assert (
        len({loss[0] for loss in first.values()}) == 3
        and run(seed=1, method='paper').history['loss'] == first[1]
    )


def begin(field=FIELD, steps=8, **settings):
    return run(field, steps, iterations=1, lr=1e-12, **settings).solver  # the start, to 1e-11


def distance(field, solver):
    T = TEACHERS[field.path][:TRAIN]
    return (
        (sample(field, T.noise, solver) - T.ends).square().mean(1).sqrt().mean().item()
    )  # all that are trained on: fewer than 64


def known(field, steps, published):
    return {
        name: distance(field, s)
        for name, s in start_candidates(steps, field.path, published).items()
    }


def init(solver):
    return solver.provenance['init'].split(' ')[0]


@pytest.mark.parametrize(
    'start, expected',
    [
        ('euler', euler(8)),
        ('ab3', adams_bashforth(8, 3)),
        ('ab4', adams_bashforth(8, 4)),
        ('sit-xl-2', get_solver('sit-xl-2', 8)),
    ],
)
def test_a_search_starts_where_it_is_told(start, expected):
    s = begin(start=start)
    same_solver(
        s, expected, 1e-4 if start == 'sit-xl-2' else 1e-9
    )  # printed time deltas sum to 1 to 4 digits


fields = pytest.mark.parametrize('field', [FIELD, VP], ids=['linear', 'vp'])


@fields
def test_the_best_classical_start_is_the_nearest_classical_rule(field):
    "Mean over samples of the root mean square distance, not the error over all elements; nothing is fitted, no table is tried."
    for steps in (4, 6, 8):
        s, d = begin(field, steps, start='best-classical'), known(field, steps, False)
        name = min(d, key=d.get)
        assert not set(d) & set(PUBLISHED) and init(s) == name
        same_solver(s, get_solver(name, steps, field.path), 1e-9)


@fields
@pytest.mark.parametrize('start', ['best', 'best-published'])
@pytest.mark.parametrize('steps', [4, 6, 8])
def test_a_fitted_start_is_taken_where_it_is_clearly_nearer_and_only_there(field, start, steps):
    "Against rows fitted here, on the nodes of the nearest known solver and on those of the dynamic programming."
    s, d = begin(field, steps, start=start), known(field, steps, start == 'best-published')
    name = min(d, key=d.get)
    pool = TEACHERS[field.path][:TRAIN]
    fit = {
        f'least-squares@{name}': fit_rows(
            field, pool, start_candidates(steps, field.path)[name].nodes
        ),
        'least-squares@dynamic-programming': fit_rows(field, pool, gits(pool, steps).nodes),
    }
    e = {k: distance(field, v) for k, v in fit.items()}
    best = min(e, key=e.get)
    if e[best] * FITTED_MARGIN < d[name]:
        assert init(s) == best
        same_solver(s, fit[best], 1e-6)
    else:
        assert init(s) == name
        same_solver(s, get_solver(name, steps, field.path), 1e-9)
    assert (steps == 8 or field is VP and steps == 6) == init(s).startswith(
        'least-squares@'
    )  # both cases occur


@fields
def test_a_race_is_won_by_the_start_that_is_nearest_after_a_few_iterations(tmp_path, field):
    "Every runner is searched here from its start, as far as the race goes; it is scored on the training part."
    s = run(field, checkpoint=tmp_path / 'c.pt', race=5)
    state = torch.load(tmp_path / 'c.pt', weights_only=True)
    won = Solver.from_dict(state['init'])
    pool = TEACHERS[field.path][:TRAIN]
    d = known(field, 4, False)
    name = min(d, key=d.get)
    fit = lambda nodes: fit_rows(field, pool, nodes)
    runners = {
        name: get_solver(name, 4, field.path),
        f'least-squares@{name}': fit(get_solver(name, 4, field.path).nodes),
        'least-squares@dynamic-programming': fit(gits(pool, 4).nodes),
    } | {f'least-squares@{n}': fit(nodes) for n, nodes in race_grids(4, field.path).items()}
    after = {}
    for i, (n, start) in enumerate(runners.items()):
        found = run(
            field,
            init=start,
            iterations=5,
            schedule='cosine',
            eval_every=5,
            checkpoint=tmp_path / f'{i}.pt',
        )
        module = NeuralSolver(4, False, start)
        module.load_state_dict(torch.load(tmp_path / f'{i}.pt', weights_only=True)['module'])
        with torch.no_grad():
            after[n] = module(
                path=field.path, coordinates=start.coordinates, t_start=field.path.t_start
            )
    best = min(after, key=lambda n: distance(field, after[n]))
    assert s.solver.provenance['init'].startswith(f'{best}, raced')
    same_solver(won, after[best], 1e-6)
    assert (
        s.cost['forward'] == s.cost['backward'] == (12 + 5 * len(runners)) * 16 * 4
    )  # the race is paid for
    again = Watched()
    assert (
        field is VP
        or run(again, checkpoint=tmp_path / 'c.pt', race=5).cost == s.cost
        and not again.graded
    )  # a resume does not race again


@pytest.mark.parametrize(
    'settings',
    [
        dict(steps=8),
        dict(start='best-classical'),
        dict(start='ab2'),
        dict(start='euler'),
        dict(init=adams_bashforth(4, 2)),
    ],
    ids=str,
)
def test_there_is_no_race_where_the_start_is_clear_or_given(settings):
    a, b = run(**settings, race=5), run(**settings)
    assert (
        a.cost == b.cost
        and a.solver.digest == b.solver.digest
        and 'raced' not in a.solver.provenance['init']
    )


def test_published_tables_are_tried_by_best_published_only(monkeypatch):
    offered, choose = {}, solver_search.choose_start
    for start in ('best', 'best-published', 'best-classical'):
        monkeypatch.setattr(
            solver_search,
            'choose_start',
            lambda field, teacher, candidates, **k: (
                offered.setdefault(start, set(candidates)),
                choose(field, teacher, candidates, **k),
            )[1],
        )
        begin(start=start)
    assert (
        offered['best-published'] - offered['best'] == {n for n in PUBLISHED if n != 'dit-xl-2'}
        and offered['best'] == offered['best-classical']
    )  # that one belongs to the other path


def test_a_few_strays_do_not_choose_the_start():
    "Two members on which the nearest rule is the worst by far: the RMSE would choose another."
    T, best, other = TEACHER[:TRAIN], adams_bashforth(8, 2), adams_bashforth(8, 3)
    end = sample(FIELD, T.noise, best)
    end[:2] = sample(FIELD, T.noise[:2], other)  # at `best`, but for two ...
    end[:2] += 1000 * (end[:2] - sample(FIELD, T.noise[:2], best))  # ... that lie beyond `other`
    states = T.states.clone()
    states[-1] = end
    T = replace(T, states=states)
    name, solver, found = solver_search.choose_start(FIELD, T, dict(best=best, other=other))
    rmse = {
        n: heldout_rmse(FIELD, c, T.noise, None, T.ends)
        for n, c in dict(best=best, other=other).items()
    }
    assert name == 'best' and solver is best and rmse['other'] < rmse['best']
    for n, c in dict(best=best, other=other).items():
        assert found[n] == pytest.approx(
            (sample(FIELD, T.noise, c) - end).square().mean(1).sqrt().mean().item(), rel=1e-4
        )


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(start='nonsense'), 'is not known'),
        (dict(start='heun'), 'one a step'),
        (dict(start='rule'), 'is not known'),
        (dict(start='ddim'), 'is not known|LinearPath'),
        (dict(start='ab3', order=2), 'uses more than 2 evaluations'),
        (dict(init=adams_bashforth(4, 3), order=2), 'uses more than 2 evaluations'),
        (dict(init=adams_bashforth(5, 2)), 'has 5 evaluations'),
        (dict(init=dpm_solver_pp(4, 2, t_start=VPPath().t_start)), 'velocity coordinates'),
        (
            dict(init=adams_bashforth(4, 2, torch.linspace(0.1, 1, 5, dtype=torch.float64))),
            'runs from t = 0.1',
        ),
        (dict(steps=7, start='ab4', two_step_tail=True), 'tail|evaluations'),
        (dict(method='least-squares', start='heun'), 'one a step'),
        (dict(method='least-squares', start='nonsense'), 'is not known'),
        (dict(teacher=3), 'teacher=3'),
    ],
)
def test_a_start_outside_the_family_is_refused_before_any_compute(settings, message):
    "The teacher would be made here, on a field that says how often it was asked."
    field = Watched()
    with pytest.raises(ValueError, match=message):
        run(field, **dict(teacher=40) | settings)
    assert not field.calls


@pytest.mark.parametrize('method', ['ours', 'paper', 'least-squares'])
def test_the_evaluation_batch_size_changes_nothing(method):
    a, b = (run(method=method, teacher=20, eval_batch_size=size) for size in (5, 250))
    same_solver(a.solver, b.solver, 1e-8)
    close(a.history['heldout_rmse'], b.history['heldout_rmse'], 1e-8)
    assert a.cost == b.cost


@pytest.mark.parametrize('method', METHODS)
def test_without_progress_nothing_is_printed(capfd, method):
    run(method=method, teacher=20)
    assert capfd.readouterr() == ('', '')


CHILDREN = """
import os, signal, sys, torch
torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])
from test_search import run, run_search, Search, search_runs, SMALL, Watched
def fork(f):
    if child := os.fork(): return child
    try: f(); os._exit(0)
    finally: os._exit(1)
def die(self, x): return os.kill(os.getpid(), signal.SIGKILL) if len(self.graded) == 4 * 10 + 2 else None
for method in ('ours', 'times'):
    child = fork(lambda: run(Watched(die), method=method, checkpoint=f'{sys.argv[2]}/killed/{method}.pt'))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, method
both = sys.argv[2] + '/both'; search_runs.search_pool(Search(**SMALL), both + '/teachers', progress=False)
children = [fork(lambda: run_search(Search(**SMALL), both, progress=False)) for _ in range(2)]
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.fixture(scope='module')
def children(tmp_path_factory):
    "A folder in which other processes have worked: searches that were killed, and one search twice at once. One process forks them all: imports take seconds."
    folder = tmp_path_factory.mktemp('children')
    done = subprocess.run(
        [sys.executable, '-c', CHILDREN, os.path.dirname(__file__), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(children):
    "SIGKILL in the middle of the 11th iteration; the state is of the parameters and, for times, of the noises."
    killed = children / 'killed'
    assert {p.name for p in killed.iterdir()} == {'ours.pt', 'times.pt'}  # no half-written file
    for method in ('ours', 'times'):
        assert torch.load(killed / f'{method}.pt', weights_only=True)['iteration'] == 8
        field = Watched()
        resumed, whole = (
            run(field, method=method, checkpoint=killed / f'{method}.pt'),
            run(method=method, checkpoint=killed / f'{method}-whole.pt'),
        )
        assert (resumed.solver.digest, resumed.history, resumed.cost) == (
            whole.solver.digest,
            whole.history,
            whole.cost,
        ) and len(field.graded) == 4 * 4
        assert [(len(x), grad) for _, x, grad in field.calls[:4]] == [(4, False)] * 3 + [
            (16, True)
        ]  # its identity, then the 9th iteration: the start is not chosen again
        alone = run(method=method)
        assert alone.solver.digest == whole.solver.digest and whole.cost == alone.cost | dict(
            start=alone.cost['start'] + 12
        )  # the identity is counted
        assert [
            a - b for a, b in zip(whole.history['evaluations'], alone.history['evaluations'])
        ] == [12] * 4 and all(
            whole.history[k] == alone.history[k] for k in ('loss', 'heldout_rmse')
        )


def test_a_finished_search_is_found_in_its_checkpoint(tmp_path):
    whole = run(checkpoint=tmp_path / 'c.pt')
    field = Watched()
    again = run(field, checkpoint=tmp_path / 'c.pt')
    assert (
        again.solver.digest == whole.solver.digest
        and again.history == whole.history
        and not field.graded
    )


@pytest.mark.parametrize('method', ['ours', 'paper', 'coefficients'])
def test_a_search_is_resumed_by_a_field_that_rounds_otherwise(tmp_path, method):
    "Another number of threads, another library: the last digits of every answer differ."

    class Stop(Exception):
        pass

    def stop(self, x):
        if len(self.graded) == 4 * 6:
            raise Stop

    with pytest.raises(Stop):
        run(Watched(stop), method=method, checkpoint=tmp_path / 'c.pt')
    found = run(Watched(lambda self, x: 1 + 2**-50), method=method, checkpoint=tmp_path / 'c.pt')
    assert found.iterations == 12
    same_solver(found.solver, run(method=method).solver, 1e-6)


@pytest.mark.parametrize(
    'change, differ',
    [
        (dict(lr=0.02), 'recipe'),
        (dict(seed=1), 'seed'),
        (dict(method='paper'), 'method'),
        (dict(heldout=11), 'train'),
        (dict(init=adams_bashforth(4, 2)), 'init'),
        (dict(noise=POOL.flip(0)), 'noise'),
        (dict(field=Watched(lambda self, x: 1.001)), 'field'),
        (dict(teacher=41), 'solver'),
        (dict(steps=5), 'steps'),
    ],
)
def test_a_checkpoint_of_another_search_is_refused_and_left_alone(tmp_path, change, differ):
    run(checkpoint=tmp_path / 'c.pt', iterations=4)
    before = (tmp_path / 'c.pt').read_bytes()
    if 'noise' in change:
        change = change | dict(
            teacher=teacher_trajectories(FIELD, change['noise'], steps=40, progress=False)
        )
    with pytest.raises(ValueError, match=rf'other settings \(.*{differ}.* differ\)'):
        run(**dict(checkpoint=tmp_path / 'c.pt', iterations=4) | change)
    assert (tmp_path / 'c.pt').read_bytes() == before


def test_a_checkpoint_may_have_any_name(tmp_path):
    first = run(checkpoint=tmp_path / 'first')
    field = Watched()
    assert (
        run(field, checkpoint=tmp_path / 'first').solver.digest == first.solver.digest
        and not field.graded
    )
    assert [p.name for p in tmp_path.iterdir()] == ['first']


def test_a_teacher_of_another_pool_is_refused():
    other = POOL.clone()
    other[31, 1] += 1e-9
    for noise in (POOL.flip(0), other, POOL[:50]):
        with pytest.raises(ValueError, match='teacher belongs to another pool'):
            run(noise=noise)


def test_a_teacher_without_the_conditions_is_refused():
    cond = torch.zeros(60, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'another pool \(noise or cond'):
        run(cond=cond)
    with pytest.raises(ValueError, match=r'another pool \(noise or cond'):
        run(teacher=replace(TEACHER, cond=cond))
    with pytest.raises(ValueError, match=r'another pool \(noise or cond'):
        run(teacher=replace(TEACHER, cond=cond), cond=cond + 1)


def test_a_teacher_of_other_ends_or_of_another_path_is_refused():
    part = teacher_trajectories(
        FIELD,
        POOL,
        solver=euler(10, torch.linspace(0.1, 1, 11, dtype=torch.float64)),
        progress=False,
    )
    with pytest.raises(ValueError, match='teacher runs from t = 0.1 to 1'):
        run(teacher=part)
    with pytest.raises(ValueError, match='teacher runs from t = 0.999'):
        run(teacher=TEACHERS[VP.path])


def test_the_papers_loss_wants_a_uniform_teacher():
    cubic = teacher_trajectories(
        FIELD,
        POOL,
        solver=adams_bashforth(20, 2, torch.linspace(0, 1, 21, dtype=torch.float64) ** 3),
        progress=False,
    )
    with pytest.raises(ValueError, match='uniform grid'):
        run(teacher=cubic, method='paper')
    assert run(teacher=cubic).iterations == 12


@pytest.mark.parametrize('method', [m for m in GRADIENT if m != 'l-bfgs'])
def test_an_iteration_without_numbers_changes_nothing(method):
    found = run(Watched(nan_at(5)), method=method, eval_every=1, start='ab2')
    loss, rmse = (torch.tensor(found.history[k]) for k in ('loss', 'heldout_rmse'))
    assert loss.isnan().nonzero().flatten().tolist() == [5] and rmse.isfinite().all()
    still = (rmse.diff() == 0).nonzero().flatten().tolist()
    assert 5 in still and len(still) <= 2  # the last step of the cosine may be as good as none


@pytest.mark.parametrize('method', [m for m in GRADIENT if m != 'l-bfgs'])
def test_a_search_without_a_single_number_ends_at_its_start(method):
    found = run(Watched(nan_at(*range(99))), method=method, start='ab2', patience=None)
    same_solver(found.solver, adams_bashforth(4, 2), 1e-9)
    assert found.iterations == 12


def test_lbfgs_survives_an_evaluation_without_numbers():
    found = run(
        Watched(
            lambda self, x: (
                float('nan') if torch.is_grad_enabled() and 45 <= len(self.graded) < 60 else None
            )
        ),
        method='l-bfgs',
    )
    assert (
        found.solver.nodes.isfinite().all()
        and found.solver.provenance['heldout_rmse'] < found.history['heldout_rmse'][0]
    )


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('member', [3, 59])  # of the training part, of the held-out one
def test_one_trajectory_without_numbers_is_refused_by_its_name(method, member):
    states = TEACHER.states.clone()
    states[20:, member] = float('nan')
    field = Watched()
    with pytest.raises(ValueError, match=rf'not finite for members \[{member}\]'):
        run(field, method=method, teacher=replace(TEACHER, states=states))
    assert not field.calls


# Runs: the exact mixture of images
SMALL = dict(
    model='fashion-mixture',
    steps=3,
    samples=16,
    heldout=8,
    teacher_steps=10,
    settings=dict(iterations=4, batch_size=8, eval_every=2, race=2),
)
IMAGE = dict(model='fashion-mixture', samples=8, teacher_steps=10)


def test_a_record_comes_back_from_its_file_as_it_was_returned(tmp_path):
    s = Search(**SMALL, label='a.b-c_1')
    record = run_search(s, tmp_path, provenance=dict(note='x'), progress=False)
    file = tmp_path / 'fashion-mixture-3_a.b-c_1_s0.json'
    assert json.loads(file.read_text()) == record == run_search(s, tmp_path, progress=False)
    solver = Solver.from_dict(record['solver'])
    p = solver.provenance
    assert solver.digest == record['digest'] and (p['note'], p['searched_on'], p['guidance']) == (
        'x',
        'fashion-mixture',
        1.0,
    )


def test_every_difference_of_an_identity_is_named(tmp_path):
    run_search(Search(**SMALL), tmp_path, progress=False)
    with pytest.raises(
        ValueError, match=r'\(method, heldout, guidance, teacher_steps, recipe differ\)'
    ):
        run_search(
            Search(
                **SMALL
                | dict(
                    method='paper',
                    label='ours',
                    heldout=9,
                    guidance=2.0,
                    teacher_steps=11,
                    settings=SMALL['settings'] | dict(lr=0.01),
                )
            ),
            tmp_path,
        )


def test_other_weights_of_the_model_are_another_search(tmp_path, monkeypatch):
    run_search(Search(**SMALL), tmp_path, progress=False)
    monkeypatch.setattr(search_runs, 'sha256', lambda file: 'f' * 64)
    with pytest.raises(ValueError, match=r'\(weights differ\)'):
        run_search(Search(**SMALL), tmp_path)


def test_a_default_that_is_given_is_no_difference_and_a_default_that_changes_is_one(
    tmp_path, monkeypatch
):
    "The recipe is kept as a whole, not only what differs from it."
    record = run_search(Search(**SMALL), tmp_path, progress=False)
    same = Search(**SMALL | dict(settings=SMALL['settings'] | dict(lr=METHODS['ours'].lr)))
    assert same.identity == record['identity'] and run_search(same, tmp_path) == record
    monkeypatch.setitem(METHODS, 'ours', replace(METHODS['ours'], lr=0.031))
    with pytest.raises(ValueError, match=r'\(recipe differ\)'):
        run_search(Search(**SMALL), tmp_path)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(teacher_steps=2), 'teacher_steps=2'),
        (dict(settings=dict(batch_size=17)), 'batch_size=17'),
        (dict(settings=dict(start='heun')), 'one a step'),
        (dict(settings=dict(start='dit-xl-2')), 'dit-xl-2'),
        (dict(settings=dict(start='ab3', order=2, batch_size=8)), 'more than 2'),
    ],
)
def test_a_search_that_cannot_be_is_refused_when_it_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Search(**SMALL | change)


def test_the_order_of_the_settings_is_no_difference(tmp_path):
    record = run_search(Search(**SMALL), tmp_path, progress=False)
    assert (
        run_search(
            Search(**SMALL | dict(settings=dict(reversed(SMALL['settings'].items())))), tmp_path
        )
        == record
    )


@pytest.mark.parametrize('seed', [-1, 10_000, True, 1.0, '0'])
def test_a_seed_that_would_reach_the_test_noise_or_is_none_is_refused(seed):
    with pytest.raises(ValueError, match='seed='):
        Search(**SMALL | dict(seed=seed))


def test_seeds_search_on_noises_of_their_own_and_none_on_the_test_noise(tmp_path):
    judge = Scorer(**IMAGE, folder=tmp_path)
    judge.prepare()
    test = judge.plain[1]
    first = [
        search_runs.search_pool(
            Search(
                **SMALL
                | dict(
                    seed=seed,
                    steps=1,
                    samples=1,
                    heldout=1,
                    teacher_steps=1,
                    settings=dict(batch_size=1),
                )
            ),
            tmp_path,
            progress=False,
        )[1].noise[0]
        for seed in (0, 1, 9999)
    ]
    all_of_them = torch.stack([*first, *test]).flatten(1)
    assert torch.cdist(all_of_them, all_of_them).fill_diagonal_(99).min() > 10 and torch.equal(
        judge.guided[1], test
    )


def test_two_processes_at_once_end_with_one_valid_file(tmp_path, children):
    assert {p.name for p in (children / 'both').iterdir()} == {
        'fashion-mixture-3_ours_s0.json',
        'teachers',
    }
    alone, both = (
        run_search(Search(**SMALL), tmp_path, progress=False),
        run_search(Search(**SMALL), children / 'both', progress=False),
    )
    close(both['solver']['nodes'], alone['solver']['nodes'], 1e-6)
    close(both['history']['heldout_rmse'], alone['history']['heldout_rmse'], 1e-6)
    assert both['cost'] == alone['cost']


def test_a_search_with_an_iteration_without_numbers_is_recorded(tmp_path, monkeypatch):
    "The search survives it, so must its file."

    def load(*args):
        net, calls = load_model(*args), []
        net.register_forward_hook(
            lambda m, a, out: (
                (calls.append(1), out * float('nan') if len(calls) == 5 else out)[1]
                if torch.is_grad_enabled()
                else out
            )
        )
        return net

    load_model = search_runs.load_model
    monkeypatch.setattr(search_runs, 'load_model', load)
    record = run_search(
        Search(**SMALL | dict(settings=SMALL['settings'] | dict(start='euler'))),
        tmp_path,
        progress=False,
    )
    assert (
        [v is None for v in record['history']['loss']].count(True) == 1
        and len(record['history']['loss']) == 4
        and json.loads((tmp_path / 'fashion-mixture-3_ours_s0.json').read_text())['digest']
        == record['digest']
    )


def test_scores_do_not_depend_on_the_batch_size(tmp_path):
    a, b = (
        Scorer(**IMAGE, folder=tmp_path / str(size), batch_size=size).score(adams_bashforth(3, 2))
        for size in (3, 250)
    )
    assert a.keys() == b.keys()
    for key in a:
        close(
            a[key], b[key], 0.1 if key == 'fd' else 1e-4
        )  # a Frechet distance (127 here) is of rounded pixels, of which one may fall to the other side; other CPUs pick other kernels by batch size, and a teacher of ten steps carries their rounding on


def test_the_teacher_has_no_distance_to_itself_with_guidance_either(tmp_path):
    score = Scorer(**IMAGE, folder=tmp_path).score(teacher_solver(10))
    assert (
        score['rmse'] == [0.0] * GROUPS == score['rmse_guided'] and min(score['rmse_exact']) > 1e-3
    )


@pytest.mark.parametrize('guided', [None, 8])
def test_the_groups_make_up_the_whole(tmp_path, guided):
    "Mean of squares over the groups, for every kind of distance, and the median, against sampling by hand."
    judge = Scorer(**IMAGE | dict(samples=16, guided_samples=guided), folder=tmp_path)
    score = judge.score(euler(3))
    assert [len(v) for v in judge.plain[1:]] == [16] * 2 and [len(v) for v in judge.guided[1:]] == [
        guided or 16
    ] * 2
    for key, (field, noise, labels) in (('rmse', judge.plain), ('rmse_guided', judge.guided)):
        T = teacher_trajectories(field, noise, labels, 10, progress=False)
        gap = heldout_rmse(field, euler(3), noise, labels, T.ends)
        assert len(score[key]) == GROUPS and sum(
            v * v for v in score[key]
        ) / GROUPS == pytest.approx(gap**2, rel=1e-5)
        if key == 'rmse':
            assert score['median'] == pytest.approx(
                (sample(field, noise, euler(3), labels) - T.ends)
                .flatten(1)
                .square()
                .mean(1)
                .sqrt()
                .median()
                .item(),
                rel=1e-5,
            )


def test_there_are_as_many_groups_whatever_the_number_of_samples(tmp_path):
    judge = Scorer(**IMAGE | dict(samples=9), folder=tmp_path)
    score = judge.score(euler(2))
    assert len(score['rmse']) == GROUPS == len(score['rmse_guided'])
    field, noise, labels = judge.plain
    square = (
        (
            sample(field, noise, euler(2), labels)
            - teacher_trajectories(field, noise, labels, 10, progress=False).ends
        )
        .square()
        .flatten(1)
        .mean(1)
    )
    close(
        score['rmse'],
        [square[a:b].mean().sqrt() for a, b in ((0, 3), (3, 5), (5, 7), (7, 9))],
        1e-6,
    )  # every sample is in one


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(samples=7), 'samples=7'),
        (dict(guided_samples=7), 'guided_samples=7'),
        (dict(guided_samples=9), 'guided_samples=9'),
        (dict(guidance=-1), 'guidance=-1'),
        (dict(teacher_steps=0), 'teacher_steps=0'),
        (dict(batch_size=0), 'batch_size=0'),
    ],
)
def test_a_scorer_that_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Scorer(**IMAGE | change, folder=tmp_path)


def test_scores_lie_in_a_folder_of_their_protocol_and_are_found_there(tmp_path):
    judge = Scorer(**IMAGE, folder=tmp_path)
    score = judge.score(euler(2))
    file = tmp_path / judge.key / f'{euler(2).digest}.json'
    assert (
        judge.key.startswith('fashion-mixture_n8-8_g2_L10_')
        and json.loads(file.read_text()) == score
        and list(tmp_path.rglob('*.json')) == [file]
    )
    again = Scorer(**IMAGE, folder=tmp_path)
    assert again.score(euler(2)) == score and again.ready is None  # nothing was prepared


def record_of(guidance, **score):
    return dict(
        identity=dict(model='m', steps=3, method='ours', seed=0, guidance=guidance, samples=16),
        label='l',
        iterations=4,
        seconds=[1.0, 2.0],
        digest='d',
        cost=dict(teacher=100, start=20, forward=30, backward=30, heldout=7),
        solver=dict(params=6, provenance=dict(init='ab2 (123)')),
    )


@pytest.mark.parametrize('guidance, calls', [(1.0, 1), (2.0, 2)])
def test_a_row_counts_the_calls_of_the_network(guidance, calls):
    "A guided evaluation is two calls; a gradient costs two more of an evaluation that was made."
    row = search_runs.search_row(
        record_of(guidance), dict(rmse=[3.0, 4.0, 0.0, 0.0], median=0.5, fd=7.0)
    )
    assert {
        k: row[f'calls_{k}'] for k in ('teacher', 'start', 'forward', 'backward', 'heldout')
    } == {k: calls * v for k, v in record_of(1)['cost'].items()}
    assert (row['calls'], row['work']) == (calls * 157, calls * (157 + 2 * 30)) and (
        row['start'],
        row['seconds'],
        row['median'],
        row['fd'],
    ) == ('ab2', 2.0, 0.5, 7.0)
    assert (
        row['rmse'] == 2.5
        and row['rmse_sd']
        == pytest.approx(torch.tensor([3.0, 4.0, 0.0, 0.0]).std().item(), rel=1e-6)
        and 'fd_sd' not in row
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(samples=12),
        dict(guidance=3.0),
        dict(teacher_steps=11),
        dict(samples=12, guided_samples=8),
    ],
)
def test_scores_of_other_protocols_are_kept_apart(tmp_path, change):
    a, b = (
        Scorer(**IMAGE, folder=tmp_path).score(euler(2)),
        Scorer(**IMAGE | change, folder=tmp_path).score(euler(2)),
    )
    assert a != b and Scorer(**IMAGE, folder=tmp_path).score(euler(2)) == a
