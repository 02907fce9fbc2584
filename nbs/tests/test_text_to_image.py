"Scores of tables 4 and 5, the notebook text_to_image, and the reader of distilled solvers."

import json
import pickle
import struct

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from notebooks import run_notebook
from PIL import Image
from test_inception import random_inception

from neuralsolver import text_to_image
from neuralsolver.distilled import MOST_BYTES, read_distilled
from neuralsolver.paths import DDPMPath, VPPath
from neuralsolver.solvers import Solver, sample
from neuralsolver.text_to_image import _Pictures, image_scores, reported_scores
from neuralsolver.utils import data_file
from neuralsolver.zero_shot import picture_files


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Random ones: the real file cannot be downloaded here."
    return random_inception(tmp_path_factory.mktemp('inception') / 'weights.pth')


def folder_of(path, arrays):
    path.mkdir()
    for i, a in enumerate(arrays):
        Image.fromarray(a).save(path / f'{i:06d}.png')
    return path


def frechet(f, g):
    "Of few rows: tr (S1 S2)^(1/2) is the sum of singular values of the product of centred rows."
    one, two = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (f, g))
    means = ((f.mean(0) - g.mean(0)) ** 2).sum()
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    return means + (one**2).sum() + (two**2).sum() - 2 * cross


@torch.no_grad()
def features_of(weights, arrays):
    "Pool features and the first seven channels of Mixed_6d in ADM's order, by torch-fidelity."
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = dict(feature_extractor_weights_path=str(weights))
    net = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'], **path)
    seen = []
    net.Mixed_6d.register_forward_hook(lambda m, i, o: seen.append(o))
    pool = net(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))[0].double().numpy()
    spatial = np.moveaxis(seen[0][:, :7].double().numpy(), 1, 3)
    return pool, spatial.reshape(len(arrays), -1)


@pytest.mark.slow
def test_fidelity_of_image_scores_to_torch_fidelity(weights, tmp_path):
    rng = np.random.default_rng(0)
    ours = [rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(12)]
    real = [np.clip(rng.normal(100, 20, (24, 24, 3)), 0, 255).astype(np.uint8) for _ in range(12)]
    a, b = folder_of(tmp_path / 'a', ours), folder_of(tmp_path / 'b', real)
    scores = image_scores(picture_files(a, 12), b, weights, batch_size=5)
    assert set(scores) == {'FID', 'sFID', 'IS', 'PR', 'Recall'}
    pairs = zip(features_of(weights, ours), features_of(weights, real))
    for name, (f, g) in zip(('FID', 'sFID'), pairs):
        assert scores[name] == pytest.approx(frechet(f, g), rel=1e-4) and frechet(f, g) > 1
    same = image_scores(picture_files(a, 12), a, weights)
    assert abs(same['FID']) < 1e-3 and same['PR'] == same['Recall'] == 1


def test_fidelity_of_the_heads_to_torch_fidelity(weights, tmp_path):
    "What the scores are computed from, whatever the batches."
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(3)]
    files = picture_files(folder_of(tmp_path / 'a', arrays), 3)
    heads = text_to_image._heads(_Pictures(files), text_to_image.Inception(weights), 2)
    for name, expected in zip(('features', 'spatial'), features_of(weights, arrays)):
        np.testing.assert_allclose(heads[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_real_images_of_other_sizes_are_fitted(tmp_path):
    arrays = [np.full((40, 60, 3), 7, np.uint8), np.full((90, 30), 9, np.uint8)]
    real = folder_of(tmp_path / 'b', arrays)
    pictures = _Pictures(picture_files(real, 2), (24, 24))
    assert [tuple(p.shape) for p in pictures] == [(3, 24, 24)] * 2


@pytest.mark.parametrize('where, rows, columns', [('table 4', 24, 4), ('table 5', 45, 5)])
def test_reported_scores_are_in_the_file(where, rows, columns):
    table = pd.read_csv(data_file('reported.csv'))
    assert (table['where'] == where).sum() == rows
    assert reported_scores(where, 'sit-xl-2', 8) == {}
    assert len(reported_scores(where, 'dit-xl-2', 8)) == columns


# the notebook


def test_text_to_image_renders_then_reads_scores(tmp_path):
    entries = [dict(tag='position', prompt='a'), dict(tag='colors', prompt='b')]
    file = tmp_path / 'prompts.jsonl'
    file.write_text('\n'.join(map(json.dumps, entries)))
    small = dict(prompts=str(file), solvers='dit-xl-2', steps='5', per_prompt=2, run='try')
    small['reports_dir'] = str(tmp_path)
    run_notebook('studies/text_to_image', **small)
    out = tmp_path / 'text_to_image/try/geneval-dit-xl-2-5'
    assert len(list(out.rglob('*.png'))) == 4
    assert json.loads((out / '00001/metadata.jsonl').read_text())['tag'] == 'colors'
    judged = [('position', True), ('position', False), ('colors', True), ('colors', True)]
    lines = [json.dumps(dict(tag=tag, correct=correct)) for tag, correct in judged]
    (out / 'results.jsonl').write_text('\n'.join(lines))
    run_notebook('studies/text_to_image', **small)
    scores = pd.read_csv(tmp_path / 'text_to_image_geneval_try.csv').set_index('metric')
    assert scores.measured['Pos'] == 50 and scores.measured['Overall'] == 0.75
    assert scores.reported.isna().all()  # random weights are not compared with the paper
    for change, said in (
        (dict(table='table 4'), 'table='),
        (dict(reference='nowhere'), 'reference='),
        (dict(solvers='sit-xl-2'), 'belongs to'),
    ):
        with pytest.raises(ValueError, match=said):
            run_notebook('studies/text_to_image', **small | change)


COCO = dict(table='coco', solvers='dit-xl-2', steps='5', per_prompt=1)


def test_text_to_image_scores_the_samples_named(weights, tmp_path, monkeypatch):
    "A folder may hold more samples than this run's prompts."
    seen = []

    def count(files, *args, **kwargs):
        seen.append(len(files))
        return {'FID': 1.0}

    monkeypatch.setattr(text_to_image, 'image_scores', count)
    small = COCO | dict(prompts='a; b; c', reports_dir=str(tmp_path))
    small |= dict(reference=str(tmp_path), weights=str(weights))
    run_notebook('studies/text_to_image', **small)
    run_notebook('studies/text_to_image', **small, limit=2)
    assert seen == [3, 2]


@pytest.mark.slow
def test_text_to_image_scores_coco(tmp_path, weights):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (40, 50, 3), dtype=np.uint8) for _ in range(10)]
    real = folder_of(tmp_path / 'real', arrays)
    captions = [dict(id=i, image_id=100 - i, caption=f'picture {i}') for i in range(10)]
    (tmp_path / 'c.json').write_text(json.dumps(dict(annotations=captions)))
    small = COCO | dict(prompts=str(tmp_path / 'c.json'), reports_dir=str(tmp_path))
    run_notebook('studies/text_to_image', **small, reference=str(real), weights=str(weights))
    scores = pd.read_csv(tmp_path / 'text_to_image_coco_random-pixart-sigma.csv')
    measured = scores.set_index('metric').measured
    assert set(measured.index) == {'FID', 'sFID', 'IS', 'PR', 'Recall'} and measured['FID'] > 0


# The reader of distilled solvers: files as expected, and files of somebody who means harm.

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
