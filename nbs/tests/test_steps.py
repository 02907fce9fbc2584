"The predictions that a scheduler keeps between steps."

import threading

import pytest
import torch
from tiny_pipelines import F64, VP, Flow, rand, relative

from neuralsolver import _steps
from neuralsolver.solvers import sample

CLASSES = pytest.mark.parametrize('cls', [Flow, VP])


def net(x, t):
    return torch.sin(2 * x) + (t / 1000).to(x.dtype)


def states(scheduler, steps, x, network=net):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


@CLASSES
@pytest.mark.parametrize('shape', [(2, 3), (2, 4, 5, 6), (1, 2, 3, 4, 5)])
def test_memory_of_a_run_serves_the_next(cls, shape):
    "Of another shape, dtype, solver, in other threads, nested: always as if it were the first."
    x = rand(*shape)
    expected = states(cls(), 8, x)
    for other in (x[:1], x.double(), rand(3, 7), x):
        states(cls(), 10, other)
        assert torch.equal(states(cls(), 8, x), expected)
    assert _steps._spare.kept.shape[1:] == x.shape

    def nested(x, t):
        states(cls(), 8, rand(*shape, seed=5))
        return net(x, t)

    assert torch.equal(states(cls(), 8, x, nested), expected)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(states(cls(), 8, x))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(r, expected) for r in results)


@CLASSES
def test_states_are_not_the_memory_of_predictions(cls):
    s = cls()
    first = states(s, 8, rand(2, 3))
    copy = first.clone()
    states(s, 8, rand(2, 3, seed=1))
    assert torch.equal(first, copy)


@CLASSES
def test_gradients_pass_through_the_steps(cls):
    s, x = cls(), rand(2, 3, dtype=F64).requires_grad_()
    path = []
    for run in (lambda: states(s, 6, x), lambda: states(s, 6, x)):
        path.append(torch.autograd.grad(run().square().sum(), x)[0])
    with torch.no_grad():
        states(s, 6, x)  # leaves its memory
    path.append(torch.autograd.grad(states(s, 6, x).square().sum(), x)[0])
    assert torch.equal(path[0], path[1]) and torch.equal(path[0], path[2])
    e = 1e-6 * rand(2, 3, seed=1, dtype=F64)
    with torch.no_grad():
        slope = (states(s, 6, x + e).square().sum() - states(s, 6, x - e).square().sum()) / 2
    assert relative((path[0] * e).sum(), slope) < 1e-5


@CLASSES
def test_modes_may_change_within_a_run(cls):
    s, x = cls(), rand(2, 3)
    expected = states(s, 8, x)
    s.set_timesteps(8)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    for i, t in enumerate(s.timesteps):
        with modes[i % 4]():
            output = net(x, t)
            x = s.step(output, t, x).prev_sample
        x = x.clone()
    assert relative(x, expected) < 1e-6


@CLASSES
def test_autocast_does_not_round_the_state(cls):
    s, x = cls(), rand(2, 3, 8, 8)
    expected = states(s, 8, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(states(s, 8, x), expected)


@CLASSES
def test_layout_of_the_state_does_not_matter(cls):
    s, x = cls(), rand(2, 4, 6, 6)
    expected = states(s, 8, x)
    assert torch.equal(states(s, 8, x.to(memory_format=torch.channels_last)), expected)
    turned = states(s, 8, x.transpose(1, 3)).transpose(1, 3)
    assert relative(turned, expected) < 1e-6


def test_shape_that_changes_within_a_run_is_named():
    s = Flow('ab2')
    s.set_timesteps(4)
    x = s.step(rand(2, 3), s.timesteps[0], rand(2, 3)).prev_sample
    with pytest.raises(ValueError, match=r'changed its shape from \[2, 3\] to \[1, 3\]'):
        s.step(x[:1], s.timesteps[1], x[:1])


@pytest.mark.parametrize('begin', [0, 2, 5])
@pytest.mark.parametrize('name, steps', [('sit-xl-2', 8), ('sit-xl-2', 5), ('ab2', 7), ('ab4', 9)])
def test_rows_in_a_ring_are_the_rows_of_the_table(name, steps, begin):
    s = Flow(name)
    begin = min(begin, steps - 1)
    solver = s.solver_for(steps)
    expected = sample(
        lambda x, t: -torch.sin(x), rand(2, 3, dtype=F64), _steps.from_node(solver, begin)
    )
    s.set_timesteps(steps)
    s.set_begin_index(begin)
    x = rand(2, 3, dtype=F64)
    for t in s.timesteps[begin:]:
        x = s.step(torch.sin(x), t, x).prev_sample
    assert relative(x, expected) < 1e-12
