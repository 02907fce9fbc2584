"""A solver has one digest on every processor: exp and log differ in their last bits, identities must not."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from neuralsolver import change_path, euler, list_solvers, load_solver, sample, VPPath
from neuralsolver.neural import classical_names, get_solver
from neuralsolver.paths import DDPMPath, LinearPath

KNOWN = {
    ('flowdcn-b-2', 5): 'ed5727348023',
    ('sit-xl-2', 8): 'f77749c66a64',
    ('dit-xl-2', 8): '39a141da464e',
    ('dit-xl-2', 10): 'bae0fd707f7c',
}
PRINT_ALL = """
from neuralsolver import get_solver, list_solvers, load_solver
from neuralsolver.neural import classical_names
from neuralsolver.paths import DDPMPath, LinearPath
for name, steps in list_solvers().items():
    for n in steps:
        print(name, n, load_solver(name, n).digest)
for path in (LinearPath(), DDPMPath()):
    for name in classical_names(path):
        for n in (5, 8, 10):
            print(name, n, get_solver(name, n, path).digest)
"""


def digests_under(capability: str) -> str:
    "The digests that a process of this vector width prints; ATen falls back to what the processor has."
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    command = [sys.executable, '-c', PRINT_ALL]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize('name, steps', KNOWN)
def test_published_digests_stay(name, steps):
    assert load_solver(name, steps).digest == KNOWN[name, steps]


def test_digests_are_equal_under_three_vector_widths():
    "Every shipped table, and every classical rule on every grid."
    default, avx2, avx512 = map(digests_under, ('default', 'avx2', 'avx512'))
    assert default == avx2 == avx512
    assert len(default.splitlines()) > 300


def all_solvers():
    for name, steps in list_solvers().items():
        yield from (load_solver(name, n) for n in steps)
    for path in (LinearPath(), DDPMPath()):
        yield from (get_solver(name, n, path) for name in classical_names(path) for n in (5, 8))


def test_last_bits_do_not_change_a_digest_and_the_ninth_digit_does():
    g = torch.Generator().manual_seed(0)
    for solver in all_solvers():
        bits = 1 + 4e-16 * torch.randn(solver.nodes.shape, generator=g, dtype=torch.float64)
        assert (
            replace(solver, nodes=solver.nodes * bits, gains=solver.gain).digest
            == replace(solver, gains=solver.gain).digest
        )
    solver = load_solver('sit-xl-2', 8)
    moved = solver.nodes.clone()
    moved[3] += 2e-8
    free = replace(solver, gains=torch.ones(8))
    assert replace(free, nodes=moved).digest != free.digest


def test_digests_tell_paths_coordinates_and_gains_apart():
    solver = euler(4)
    free = replace(solver, gains=torch.ones(4))
    other = change_path(solver, VPPath())
    assert (
        len({solver.digest, free.digest, other.digest, replace(free, coordinates='flow').digest})
        == 4
    )
    assert replace(solver, name='another').digest == solver.digest


def test_solvers_of_one_digest_are_one_sampler_in_float32():
    solver = load_solver('sit-xl-2', 8)
    near = replace(solver, nodes=solver.nodes * (1 + 1e-15), gains=torch.ones(8))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def field(x, t):
        return (1 - t) * x

    torch.testing.assert_close(sample(field, noise, solver), sample(field, noise, near))
