"The reader of distilled solvers: files as expected, and files of somebody who means harm."

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch

from neuralsolver.distilled import MOST_BYTES, read_distilled
from neuralsolver.paths import DDPMPath, VPPath
from neuralsolver.solvers import Solver, sample

DELTAS = torch.tensor([0.3, 0.3, 0.2, 0.2])
TABLE = torch.tensor([[0.0] * 4, [-1.2, 0, 0, 0], [0.9, -1.5, 0, 0], [0, 0.2, -0.7, 0]])


def written(folder, name='solver.safetensors', **tensors):
    file = folder / name
    safetensors.torch.save_file(tensors, file, metadata={'format': 'pt'})
    return file


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_a_table_of_four_steps_is_read(tmp_path, dtype):
    file = written(tmp_path, t=DELTAS.to(dtype), c=TABLE.to(dtype))
    solver = read_distilled(file)
    assert isinstance(solver, Solver) and solver.nfe == 4 and solver.consistent
    M = solver.weights / solver.span[:, None]
    torch.testing.assert_close(M.tril(-1).float(), TABLE, rtol=0, atol=0.02)
    torch.testing.assert_close(M.sum(1), torch.ones(4, dtype=torch.float64))
    ends = sample(lambda x, t: 0 * x, torch.ones(2, 3, dtype=torch.float64), solver)
    assert ends.isfinite().all()
    assert len(solver.provenance['sha256']) == 64


def test_layouts_of_the_same_table(tmp_path):
    "A folder, another order of the names, rows with their diagonal, raw numbers."
    (tmp_path / 'solver').mkdir()
    written(tmp_path / 'solver', 'diffusion_pytorch_model.safetensors', z=DELTAS, a=TABLE)
    expected = read_distilled(tmp_path)
    full = TABLE + torch.diag(1 - TABLE.sum(1))
    for name, table, deltas, raw in (
        ('full.safetensors', full, DELTAS, False),
        ('raw.safetensors', TABLE, DELTAS.log() + 3, True),
    ):
        found = read_distilled(written(tmp_path, name, t=deltas, c=table), raw=raw)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-5)
    other = read_distilled(tmp_path, DDPMPath('scaled-linear', 0.00085, 0.012))
    assert other.path != VPPath() and other.nfe == 4


def header(entries, data=b''):
    "A file whose header says what one likes."
    text = json.dumps(entries).encode()
    return struct.pack('<Q', len(text)) + text + data


BAD_TENSORS = {
    'nan': (dict(t=DELTAS, c=TABLE * float('nan')), 'not finite'),
    'inf': (dict(t=DELTAS * float('inf'), c=TABLE), 'not finite'),
    'large': (dict(t=DELTAS, c=TABLE * 1e6), 'numbers above'),
    'three': (dict(t=DELTAS, c=TABLE, x=DELTAS.clone()), 'has 3 tensors'),
    'one': (dict(c=TABLE), 'has 1 tensors'),
    'integers': (dict(t=DELTAS, c=TABLE.long()), 'has 2 tensors'),
    'shapes': (dict(t=DELTAS[:3].contiguous(), c=TABLE), 'has shapes'),
    'one step': (dict(t=DELTAS[:1].contiguous(), c=TABLE[:1, :1].contiguous()), 'has shapes'),
    'too many': (dict(t=torch.ones(65) / 65, c=torch.zeros(65, 65)), 'has shapes'),
    'upper': (dict(t=DELTAS, c=TABLE.T.contiguous()), 'not strictly lower triangular'),
    'diagonal': (dict(t=DELTAS, c=TABLE + 0.5 * torch.eye(4)), 'not strictly lower triangular'),
    'negative': (dict(t=DELTAS * torch.tensor([1, -1, 1, 1]), c=TABLE), 'raw=True'),
    'sum': (dict(t=DELTAS * 3, c=TABLE), 'raw=True'),
}


@pytest.mark.parametrize('name', BAD_TENSORS)
def test_numbers_that_are_no_table_are_refused(tmp_path, name):
    tensors, said = BAD_TENSORS[name]
    with pytest.raises(ValueError, match=said) as error:
        read_distilled(written(tmp_path, **tensors))
    assert '\n' not in str(error.value)


class Harm:
    def __reduce__(self):
        return exec, ('raise SystemExit("this code ran")',)


ENTRY = {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}
BAD_BYTES = {
    'pickle': pickle.dumps(Harm()),
    'empty': b'',
    'header beyond the end': struct.pack('<Q', 2**60) + b'{}',
    'no json': struct.pack('<Q', 4) + b'abcd',
    'offsets beyond the end': header({'t': ENTRY | {'data_offsets': [0, 1 << 40]}}),
    'negative offset': header({'t': ENTRY | {'data_offsets': [-16, 0]}}, bytes(16)),
    'shape and size differ': header({'t': ENTRY | {'shape': [1 << 40]}}, bytes(16)),
    'overlap': header({'t': ENTRY, 'c': ENTRY}, bytes(16)),
    'unknown dtype': header({'t': ENTRY | {'dtype': 'PICKLE'}}, bytes(16)),
}


@pytest.mark.parametrize('name', BAD_BYTES)
def test_hostile_bytes_are_refused(tmp_path, name):
    file = tmp_path / 'solver.safetensors'
    file.write_bytes(BAD_BYTES[name])
    with pytest.raises(ValueError, match='solver file holds two floating-point tensors'):
        read_distilled(file)


def test_large_and_other_files_are_refused_before_they_are_read(tmp_path):
    large = tmp_path / 'large.safetensors'
    with large.open('wb') as f:
        f.truncate(1 << 34)  # sparse: 16 GiB that nobody should read
    with pytest.raises(ValueError, match=f'more than {MOST_BYTES}'):
        read_distilled(large)
    for name in ('solver.pt', 'solver.bin', 'solver.pkl'):
        (tmp_path / name).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(ValueError, match='may hold code'):
            read_distilled(tmp_path / name)
    with pytest.raises(ValueError, match='is not there'):
        read_distilled(tmp_path / 'nothing')
