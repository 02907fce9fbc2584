"The paper's profile from end to end, in small: latents, autoencoder, Inception; precisions."

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_inception import random_inception
from test_search_notebook import in_process
from tqdm import tqdm

import neuralsolver as ns
from neuralsolver.data import to_uint8
from neuralsolver.fashion_features import import_torch_fidelity
from neuralsolver.models import SiT
from neuralsolver.checkpoints import load_weights, save_model
from neuralsolver.protocol import Protocol
from neuralsolver.sampling import Sampler, compute_shards
from neuralsolver.utils import import_torchvision, indexed_noise

import_torchvision()  # before diffusers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_vae(folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.save_pretrained(folder)
    return vae.eval()


def decoded(vae, latents):
    with torch.no_grad():
        return to_uint8(vae.decode(latents / 0.18215).sample)


@pytest.fixture(scope='module')
def paper(tmp_path_factory):
    "The folder of eval.ipynb under the paper's profile, its parameters, its autoencoder."
    folder = tmp_path_factory.mktemp('paper')
    torch.manual_seed(0)
    net = SiT(8, 2, 4, 32, 1, 2, num_classes=1000)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    save_model(net, net.state_dict(), folder / 'latent.safetensors', dict(data='none'))
    vae = tiny_vae(folder / 'vae')
    random_inception(folder / 'inception.pth')
    # samples of the same model as reference, so that precision and recall lie between 0 and 1
    noise = indexed_noise(range(14), (4, 8, 8), 5)
    field = ns.Field(net.eval(), guidance=1.375)
    images = decoded(vae, ns.sample(field, noise, ns.euler(6), torch.arange(14)))
    np.savez(folder / 'reference.npz', arr_0=images.permute(0, 2, 3, 1).numpy())
    given = dict(
        profile='paper',
        model=str(folder / 'latent.safetensors'),
        steps=5,
        samples=10,
        batch_size=3,
        shard_batches=2,
        solvers='sit-xl-2',
        teacher_steps=6,
        device='cpu',
        precision='float32',
        vae=str(folder / 'vae'),
        inception=str(folder / 'inception.pth'),
        reference=str(folder / 'reference.npz'),
        images='sit-xl-2',
    )
    in_process('eval', **given, reports_dir=str(folder))
    return folder, given, vae


def cpu_sampler(p):
    return Sampler(p, torch.device('cpu'), tqdm(disable=True))


# fidelity


def test_the_papers_profile_writes_the_papers_columns(paper):
    t = pd.read_csv(paper[0] / 'eval_latent_5.csv').set_index('solver')
    assert list(t.index) == ['sit-xl-2', 'teacher', 'real']
    assert (t.guidance.dropna() == 1.375).all()
    assert t.nfe.dropna().tolist() == [5, 6]
    assert t.samples.tolist() == [10, 10, 14]  # of the reference: its own number
    assert t.rmse['teacher'] == 0
    metrics = ['fid', 'sfid', 'is', 'precision', 'recall', 'rmse']
    assert t.loc[['sit-xl-2', 'teacher'], metrics].notna().all().all()
    assert t.fid['sit-xl-2'] > 0
    assert abs(t.fid['sit-xl-2'] / t.fid['teacher'] - 1) > 1e-2
    rows = pd.read_csv(ROOT / 'data/reported.csv')
    rows = rows.query("where == 'figure 3a' and steps == 5 and solver == 'Searched on SiT-XL/2'")
    assert t.reported_fid['sit-xl-2'] == rows.value.iloc[0]


def test_the_papers_profile_is_on_the_card(paper):
    card = json.loads((paper[0] / 'eval_latent_5.json').read_text())
    assert card['identity']['guided_channels'] == 'all'
    assert card['identity']['vae']['scale'] == 0.18215
    assert card['identity']['extractor'].startswith('inception-')
    assert card['protocol']['protocol'] == 'adm'


def test_the_exported_images_are_those_of_the_sampler(paper):
    folder, _, vae = paper
    images = np.load(folder / 'eval_latent_5_sit-xl-2-0.npz')['arr_0']
    assert images.shape == (10, 64, 64, 3)
    assert images.dtype == np.uint8
    field = ns.Field(load_weights(folder / 'latent.safetensors'), guidance=1.375)
    noise = indexed_noise(range(10), (4, 8, 8))
    x = ns.sample(field, noise, ns.load_solver('sit-xl-2', 5), torch.arange(10))
    exported = torch.from_numpy(images).permute(0, 3, 1, 2).int()
    assert (exported - decoded(vae, x).int()).abs().max() <= 1  # another batch: rounding


class Images(torch.utils.data.Dataset):
    "The images of an .npz, for torch-fidelity."

    def __init__(self, file):
        self.array = np.load(file)['arr_0']

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return torch.from_numpy(self.array[i]).permute(2, 0, 1)


def test_metrics_are_those_of_torch_fidelity_on_the_exported_images(paper):
    folder = paper[0]
    generated = Images(folder / 'eval_latent_5_sit-xl-2-0.npz')
    real = Images(folder / 'reference.npz')
    theirs = import_torch_fidelity().calculate_metrics(
        input1=generated,
        input2=real,
        fid=True,
        isc=True,
        isc_splits=1,
        prc=True,
        prc_neighborhood=3,
        feature_extractor='inception-v3-compat',  # PRC's own default is VGG16
        cuda=False,
        verbose=False,
        cache=False,
        feature_extractor_weights_path=str(folder / 'inception.pth'),
        samples_find_deep=False,
    )
    ours = pd.read_csv(folder / 'eval_latent_5.csv').set_index('solver').loc['sit-xl-2']
    assert np.isclose(ours.fid, theirs['frechet_inception_distance'], rtol=1e-4)
    assert np.isclose(ours['is'], theirs['inception_score_mean'], rtol=1e-5)
    assert np.isclose(ours.precision, theirs['precision'], rtol=1e-5)
    assert np.isclose(ours.recall, theirs['recall'], rtol=1e-5)
    assert ours.precision + ours.recall > 0


# precision


@pytest.mark.parametrize('precision', ['bfloat16', 'float16-mixed', 'bfloat16-mixed', 'tf32'])
def test_precisions_stay_near_float32(paper, precision):
    solver = ns.load_solver('sit-xl-2', 5)
    exact, rounded = (
        cpu_sampler(Protocol(**paper[1] | dict(precision=p))).batch(solver, 0, 0, 4).end_points
        for p in ('float32', precision)
    )
    assert rounded.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == 'highest'
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.06
    assert (error > 0) == (precision != 'tf32')  # on the CPU tf32 changes nothing


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler')
def test_a_compiled_network_gives_the_numbers_of_the_plain_one():
    plain, compiled = (
        cpu_sampler(Protocol('sit-tiny', 2, batch_size=4, compile=mode))
        .batch(ns.adam2(2), 0, 0, 4)
        .end_points
        for mode in ('none', 'default')
    )
    assert torch.allclose(plain, compiled, atol=1e-4)


# refusal


def test_an_autoencoder_that_overflows_is_no_grey_image(paper):
    class Overflowing:
        def decode(self, latents):
            return torch.zeros(3, 3, 64, 64).index_fill(0, torch.tensor([1]), float('inf'))

    sampler = cpu_sampler(Protocol(**paper[1]))
    sampler.vae = Overflowing()
    batch = sampler.batch(ns.euler(2), 0, 0, 3)
    assert batch.end_points.isfinite().all()
    assert batch.finite.tolist() == [True, False, True]
    assert batch.images.dtype == torch.uint8


@pytest.mark.parametrize(
    'arrays, message',
    [
        (dict(x=np.zeros(3)), 'neither arr_0'),
        (dict(arr_0=np.zeros((9, 32, 32, 3), np.uint8)), '32 x 32, those to be measured 64 x 64'),
    ],
)
def test_a_wrong_reference_is_refused_before_sampling(paper, tmp_path, arrays, message):
    np.savez(tmp_path / 'bad.npz', **arrays)
    p = Protocol(**paper[1] | dict(reference=str(tmp_path / 'bad.npz')))
    with pytest.raises(ValueError, match=message):
        compute_shards(p, tmp_path / 'shards', False)
    assert not list(tmp_path.rglob('0*.safetensors'))
