"""A solver has one digest on every processor.

exp and log differ in their last bits, identities must not.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from neuralsolver import change_path, euler, list_solvers, load_solver, sample
from neuralsolver.neural import classical_names, get_solver
from neuralsolver.paths import DDPMPath, LinearPath, VPPath

KNOWN = {
    ('flowdcn-b-2', 5): 'ed5727348023',
    ('sit-xl-2', 8): 'f77749c66a64',
    ('dit-xl-2', 8): '39a141da464e',
    ('dit-xl-2', 10): 'bae0fd707f7c',
}


def every_solver():
    "Every shipped table, and every classical rule on every grid."
    for name, counts in list_solvers().items():
        yield from (load_solver(name, n) for n in counts)
    for path in (LinearPath(), DDPMPath(), VPPath()):
        for name in classical_names(path):
            yield from (get_solver(name, n, path) for n in (5, 8, 10))


def printed(solvers) -> str:
    return '\n'.join(f'{s.name} {s.nfe} {s.digest}' for s in solvers)


@pytest.fixture(scope='module')
def solvers():
    "As this process makes them."
    return list(every_solver())


def digests_under(capability: str) -> str:
    "As a process of this vector width makes them; ATen falls back to what the processor has."
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    script = f'import runpy; runpy.run_path({__file__!r}, run_name="__main__")'
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize('name, steps', KNOWN)
def test_published_digests_stay(name, steps):
    assert load_solver(name, steps).digest == KNOWN[name, steps]


def test_digests_are_equal_under_three_vector_widths(solvers):
    "That of this process, by default the widest, and the two others in processes of their own."
    here = os.environ.get('ATEN_CPU_CAPABILITY', 'avx512')
    known = printed(solvers)
    assert len(known.splitlines()) > 300
    for capability in {'default', 'avx2', 'avx512'} - {here}:
        assert digests_under(capability) == known, capability


def test_last_bits_do_not_change_a_digest_and_the_ninth_digit_does(solvers):
    g = torch.Generator().manual_seed(0)
    for solver in solvers:
        if not solver.gain.all():  # ends at the data in data coordinates: no gains of its own
            continue
        bits = 1 + 4e-16 * torch.randn(solver.nodes.shape, generator=g, dtype=torch.float64)
        free = replace(solver, gains=solver.gain)
        near = replace(solver, nodes=solver.nodes * bits, gains=solver.gain)
        assert near.digest == free.digest
    solver = load_solver('sit-xl-2', 8)
    moved = solver.nodes.clone()
    moved[3] += 2e-8
    free = replace(solver, gains=torch.ones(8))
    assert replace(free, nodes=moved).digest != free.digest


def test_digests_tell_paths_coordinates_and_gains_apart():
    solver = euler(4)
    free = replace(solver, gains=torch.ones(4))
    other = change_path(solver, VPPath())
    flow = replace(free, coordinates='flow')
    assert len({s.digest for s in (solver, free, other, flow)}) == 4
    assert replace(solver, name='another').digest == solver.digest


def test_solvers_of_one_digest_are_one_sampler_in_float32():
    solver = load_solver('sit-xl-2', 8)
    near = replace(solver, nodes=solver.nodes * (1 + 1e-15), gains=torch.ones(8))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def field(x, t):
        return (1 - t) * x

    torch.testing.assert_close(sample(field, noise, solver), sample(field, noise, near))


if __name__ == '__main__':
    print(printed(every_solver()))
