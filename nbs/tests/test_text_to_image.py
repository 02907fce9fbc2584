"Scores of tables 4 and 5, and the notebook text_to_image with small parameters."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_inception import random_inception
from notebooks import run_notebook

from neuralsolver import text_to_image
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
