"Evaluation at scale: killed, damaged, divided among processes, and the paper's protocol from end to end in small."

import io, json, multiprocessing, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
import neuralsolver as ns
from neuralsolver import evaluate as ev
from neuralsolver.data import to_uint8
from neuralsolver.protocol import Protocol
from neuralsolver.checkpoints import Autoencoder, load_weights, save_model
from neuralsolver.models import SiT
from neuralsolver.shards import batch_ranges, read_shard, Shards, shard_ranges
from neuralsolver.utils import import_torchvision, indexed_noise
from test_inception import random_inception

import_torchvision()  # before diffusers

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EIGHT = dict(
    model='fashion-mixture',
    steps=5,
    samples=2000,
    seeds='0',
    solvers='euler,adam2',
    teacher_steps=8,
    batch_size=250,
)  # eight shards a row
SMALL = dict(
    model='fashion-mixture',
    steps=5,
    samples=80,
    seeds='0,1',
    solvers='euler,adam2',
    teacher_steps=8,
    batch_size=10,
    shard_batches=2,
)


def table(p, folder):
    "The CSV that a user gets, but for the times."
    stem = ev.write_reports(p, *ev.evaluate(p, False, folder / 'shards'), folder, folder / 'shards')
    return pd.read_csv(f'{stem}.csv').drop(columns='seconds').to_csv()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Killed


def child(folder, sampling):
    "A run that says when it begins to sample."
    torch.set_num_threads(1)
    shard = ev.Sampler.shard

    def told(self, *args, **kwargs):
        self.field, self.extractor(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)), sampling.set()
        return shard(self, *args, **kwargs)

    ev.Sampler.shard = told
    ev.compute_shards(Protocol(**EIGHT), folder, False)


def test_killed_twenty_times_the_table_is_the_same_to_the_byte(tmp_path, monkeypatch):
    p = Protocol(**EIGHT)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    start = time.time()
    wanted = table(p, whole)
    one_file = (time.time() - start) / 24
    (tmp_path / 'preloaded.py').write_text(
        'import accelerate, neuralsolver.evaluate; neuralsolver.metrics.import_torch_fidelity(); import torch_fidelity.utils'
    )  # children begin at once
    monkeypatch.syspath_prepend(tmp_path)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preloaded'])
    rng, kept, kills = random.Random(0), {}, 0
    for _ in range(20):
        sampling = context.Event()
        process = context.Process(target=child, args=(killed / 'shards', sampling))
        process.start()
        assert sampling.wait(120)
        time.sleep(
            rng.uniform(0, one_file * (1.5 if len(kept) < 12 else 0.2))
        )  # at random, but the twenty must fit into the run
        if kills > 9 and len(kept) < 2:
            time.sleep(2 * one_file)  # a slow machine
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        for f in (killed / 'shards').rglob('[0-9]*.safetensors'):
            read_shard(f)  # never half written
            assert (
                kept.setdefault(f, f.stat().st_mtime_ns) == f.stat().st_mtime_ns
            )  # never made twice
    assert kills == 20 and 2 <= len(kept) < 24, 'the kills must fall into the run'
    assert table(p, killed) == wanted


# Damaged, foreign, missing


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('small')
    return folder, table(Protocol(**SMALL), folder)


def copy_of(folder, tmp_path):
    import shutil

    shutil.copytree(folder / 'shards', tmp_path / 'shards')
    return sorted((tmp_path / 'shards').rglob('*.safetensors'))


@pytest.mark.parametrize(
    'damage', ['missing', 'cut', 'empty', 'flipped', 'longer', 'not a file of ours']
)
def test_a_damaged_shard_is_made_again_and_only_it(small, tmp_path, damage):
    folder, wanted = small
    files = copy_of(folder, tmp_path)
    victim = files[len(files) // 2]
    good = victim.read_bytes()
    before = {f: f.stat().st_mtime_ns for f in files}
    if damage == 'missing':
        victim.unlink()
    else:
        victim.write_bytes(
            {
                'cut': good[: len(good) // 2],
                'empty': b'',
                'flipped': good[:-9] + bytes([good[-9] ^ 16]) + good[-8:],
                'longer': good + b'\0',
                'not a file of ours': b'hello' * 100,
            }[damage]
        )
    assert table(Protocol(**SMALL), tmp_path) == wanted
    assert {f for f in files if f.stat().st_mtime_ns != before[f]} == {victim}


def test_a_shard_of_another_protocol_is_refused_and_kept(small, tmp_path):
    folder, _ = small
    other = Protocol(**SMALL | dict(guidance=1.5))
    ev.evaluate(other, False, tmp_path / 'other')
    files = copy_of(folder, tmp_path)
    name = files[0].name
    foreign = next(
        f
        for f in (tmp_path / 'other').rglob(name)
        if f.parent.name.split('-')[:2] == files[0].parent.name.split('-')[:2]
    )
    files[0].write_bytes(foreign.read_bytes())
    with pytest.raises(
        ValueError, match='belongs to another run .*guidance: 1.5 instead of 2.0.*move it away'
    ):
        ev.evaluate(Protocol(**SMALL), False, tmp_path / 'shards')
    assert files[0].read_bytes() == foreign.read_bytes()


def test_a_shard_under_another_name_is_refused(small, tmp_path):
    folder, _ = small
    files = copy_of(folder, tmp_path)
    files[0].replace(files[1])
    with pytest.raises(ValueError, match='rows 0 to 20'):
        ev.evaluate(Protocol(**SMALL), False, tmp_path / 'shards')


@pytest.mark.parametrize('change', [dict(shard_batches=1), dict(shard_batches=7)])
def test_other_shards_same_bytes(small, tmp_path, change):
    assert table(Protocol(**SMALL | change), tmp_path) == small[1]


def test_a_longer_run_goes_on_from_a_shorter_one(small, tmp_path):
    folder, _ = small
    copy_of(folder, tmp_path)
    made = set((tmp_path / 'shards').rglob('*.safetensors'))
    longer = table(Protocol(**SMALL | dict(samples=160)), tmp_path)
    assert longer == table(
        Protocol(**SMALL | dict(samples=160)), tmp_path / 'fresh'
    ) and made < set((tmp_path / 'shards').rglob('*.safetensors'))


# Many processes


def command(*args, threads='1'):
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'} | (
        {'OMP_NUM_THREADS': threads} if threads else {}
    )
    done = subprocess.run(
        [str(a) for a in args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


FLAGS = [w for k, v in SMALL.items() for w in (f'--{k}', str(v))]


def test_two_processes_of_accelerate_give_the_numbers_of_one(small, tmp_path):
    # accelerate's own launcher starts several processes on CPUs only through MPI; torchrun sets what its PartialState reads, as `accelerate launch` does on GPUs
    command(
        BIN / 'torchrun',
        '--nproc_per_node',
        2,
        '--master_port',
        29517,
        '-m',
        'neuralsolver.evaluate',
        *FLAGS,
        '--reports_dir',
        tmp_path,
    )
    assert (
        pd.read_csv(tmp_path / 'eval_fashion-mixture_5.csv').drop(columns='seconds').to_csv()
        == small[1]
    )
    pids = {
        read_shard(f)[1]['info']['process'] for f in (tmp_path / 'shards').rglob('*.safetensors')
    }
    assert pids == {'0 of 2', '1 of 2'}


def test_two_processes_from_the_notebook(small, tmp_path):
    "With as many threads as torch likes: no process may wait for the threads of its parent."
    command(
        BIN / 'papermill',
        'nbs/eval.ipynb',
        tmp_path / 'executed.ipynb',
        *[
            w
            for k, v in (SMALL | dict(processes=2, reports_dir=tmp_path)).items()
            for w in ('--p', k, str(v))
        ],
        threads=None,
    )
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / 'eval_fashion-mixture_5.csv').drop(columns='seconds'),
        pd.read_csv(io.StringIO(small[1]), index_col=0),
        rtol=1e-4,
    )
    assert {
        read_shard(f)[1]['info']['process'] for f in (tmp_path / 'shards').rglob('*.safetensors')
    } == {'0 of 2', '1 of 2'}


# The paper's profile from end to end, in small: latents, autoencoder, Inception (random weights), a reference batch


@pytest.fixture(scope='module')
def paper(tmp_path_factory):
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp('paper')
    torch.manual_seed(0)
    net = SiT(8, 2, 4, 32, 1, 2, num_classes=1000)
    with torch.no_grad():
        [p.add_(0.2 * torch.randn_like(p)) for p in net.parameters() if p.requires_grad]
    save_model(net, net.state_dict(), folder / 'latent.safetensors', dict(data='none'))
    vae = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.save_pretrained(folder / 'vae')
    random_inception(folder / 'inception.pth')
    with (
        torch.no_grad()
    ):  # the reference: samples of the same model, so that precision and recall lie between 0 and 1
        x = ns.sample(
            ns.Field(net.eval(), guidance=1.375),
            indexed_noise(range(24), (4, 8, 8), 5),
            ns.euler(6),
            torch.arange(24),
        )
        images = to_uint8(vae.eval().decode(x / 0.18215).sample)
    np.savez(folder / 'reference.npz', arr_0=images.permute(0, 2, 3, 1).numpy())
    given = dict(
        profile='paper',
        model=str(folder / 'latent.safetensors'),
        steps=5,
        samples=16,
        batch_size=5,
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
    command(
        BIN / 'papermill',
        'nbs/eval.ipynb',
        folder / 'executed.ipynb',
        *[w for k, v in (given | dict(reports_dir=folder)).items() for w in ('--p', k, str(v))],
    )
    return folder, given


def test_the_papers_profile_writes_the_papers_columns(paper):
    folder, given = paper
    t = pd.read_csv(folder / 'eval_latent_5.csv').set_index('solver')
    card = json.loads((folder / 'eval_latent_5.json').read_text())
    assert (
        list(t.index) == ['sit-xl-2', 'teacher', 'real']
        and (t.guidance.dropna() == 1.375).all()
        and (t.nfe.dropna() == [5, 6]).all()
    )
    measured = t.loc[['sit-xl-2', 'teacher'], ['fid', 'sfid', 'is', 'precision', 'recall', 'rmse']]
    assert (
        measured.notna().all().all()
        and (measured.fid > 0).all()
        and abs(measured.fid['sit-xl-2'] / measured.fid['teacher'] - 1) > 1e-2
    )
    assert t.samples.tolist() == [16, 16, 24]  # of the reference: its own number
    assert (
        t.rmse['teacher'] == 0
        and t.reported_fid['sit-xl-2']
        == pd.read_csv(ROOT / 'data/reported.csv')
        .query("where == 'figure 3a' and steps == 5 and solver == 'Searched on SiT-XL/2'")
        .value.iloc[0]
    )
    assert (
        card['identity']['guided_channels'] == 'all'
        and card['identity']['vae']['scale'] == 0.18215
        and card['identity']['extractor'].startswith('inception-')
        and card['protocol']['protocol'] == 'adm'
    )


def test_the_exported_images_are_those_of_the_sampler(paper):
    folder, given = paper
    images = np.load(folder / 'eval_latent_5_sit-xl-2-0.npz')['arr_0']
    assert images.shape == (16, 64, 64, 3) and images.dtype == np.uint8
    net = load_weights(folder / 'latent.safetensors')
    field = ns.Field(net, guidance=1.375)
    x = ns.sample(
        field, indexed_noise(range(16), (4, 8, 8)), ns.load_solver('sit-xl-2', 5), torch.arange(16)
    )
    from diffusers import AutoencoderKL

    with torch.no_grad():
        pixels = AutoencoderKL.from_pretrained(folder / 'vae').decode(x / 0.18215).sample
    assert (
        torch.from_numpy(images).permute(0, 3, 1, 2).int() - to_uint8(pixels).int()
    ).abs().max() <= 1  # another batch: rounding


def test_fid_and_is_are_those_of_torch_fidelity_on_the_exported_images(paper):
    folder, _ = paper
    from neuralsolver.metrics import import_torch_fidelity

    class images(torch.utils.data.Dataset):
        def __init__(self, file):
            self.array = np.load(folder / file)['arr_0']

        def __len__(self):
            return len(self.array)

        def __getitem__(self, i):
            return torch.from_numpy(self.array[i]).permute(2, 0, 1)

    got = import_torch_fidelity().calculate_metrics(
        input1=images('eval_latent_5_sit-xl-2-0.npz'),
        input2=images('reference.npz'),
        fid=True,
        isc=True,
        isc_splits=1,
        cuda=False,
        verbose=False,
        cache=False,
        feature_extractor_weights_path=str(folder / 'inception.pth'),
        samples_find_deep=False,
    )
    t = pd.read_csv(folder / 'eval_latent_5.csv').set_index('solver').loc['sit-xl-2']
    assert np.isclose(t.fid, got['frechet_inception_distance'], rtol=1e-4) and np.isclose(
        t['is'], got['inception_score_mean'], rtol=1e-5
    )
    from neuralsolver.inception import Inception
    from torch_fidelity.metric_prc import prc_features_to_metric

    extractor = Inception(folder / 'inception.pth')
    f, g = (
        extractor(torch.stack(list(map(images(name).__getitem__, range(len(images(name)))))))[
            'features'
        ]
        for name in ('eval_latent_5_sit-xl-2-0.npz', 'reference.npz')
    )
    theirs = prc_features_to_metric(f, g, prc_neighborhood=3, verbose=False)
    assert (
        np.isclose(t.precision, theirs['precision'], rtol=1e-5)
        and np.isclose(t.recall, theirs['recall'], rtol=1e-5)
        and t.precision + t.recall > 0
    )


@pytest.mark.parametrize('precision', ['bfloat16', 'float16-mixed', 'bfloat16-mixed', 'tf32'])
def test_precisions_stay_near_float32(paper, precision):
    folder, given = paper
    p = Protocol(**given | dict(precision=precision))
    exact = Protocol(**given)
    ends = []
    from tqdm import tqdm

    for q in (exact, p):
        sampler = ev.Sampler(q, torch.device('cpu'), tqdm(disable=True))
        ends.append(sampler.batch(ns.load_solver('sit-xl-2', 5), 0, 0, 4)[0])
    assert ends[1].dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest'
    error = (ends[1] - ends[0]).norm() / ends[0].norm()
    assert error < 0.06 and (error > 0) == (precision != 'tf32')  # on the CPU tf32 changes nothing


def test_an_autoencoder_that_overflows_is_no_grey_image(paper, tmp_path, monkeypatch):
    _, given = paper
    decode = Autoencoder.decode
    monkeypatch.setattr(
        Autoencoder,
        'decode',
        lambda self, z: decode(self, z).index_fill(0, torch.tensor([1]), float('inf')),
    )
    sampler = ev.Sampler(Protocol(**given), torch.device('cpu'), ev.tqdm(disable=True))
    x, images, finite, _ = sampler.batch(ns.euler(2), 0, 0, 3)
    assert (
        x.isfinite().all()
        and finite.tolist() == [True, False, True]
        and images.dtype == torch.uint8
    )


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda f: np.savez(f, x=np.zeros(3)), 'neither arr_0'),
        (
            lambda f: np.savez(f, arr_0=np.zeros((9, 32, 32, 3), np.uint8)),
            '32 x 32, those to be measured 64 x 64',
        ),
    ],
)
def test_a_wrong_reference_is_refused_before_sampling(paper, tmp_path, make, message):
    make(tmp_path / 'bad.npz')
    p = Protocol(**paper[1] | dict(reference=str(tmp_path / 'bad.npz')))
    with pytest.raises(ValueError, match=message):
        ev.compute_shards(p, tmp_path / 'shards', False)
    assert not list(tmp_path.rglob('0*.safetensors'))


def test_weights_that_change_are_another_protocol(tmp_path, capsys):
    torch.manual_seed(0)
    net = SiT(28, 14, 1, 16, 1, 2, num_classes=10, learn_sigma=False)
    file = tmp_path / 'mine.safetensors'
    p = dict(
        model=str(file),
        steps=2,
        samples=16,
        seeds='0',
        solvers='euler',
        teacher_steps=3,
        batch_size=8,
    )
    for scale in (1.0, 3.0):
        with torch.no_grad():
            net.final_layer.linear.weight.fill_(scale / 10)
        save_model(net, net.state_dict(), file, {})
        end = ev.evaluate(Protocol(**p), False, tmp_path / 'shards')[0].rmse[0]
        if scale == 1:
            first = end
    assert end != first and 'computed anew' in capsys.readouterr().out


@pytest.mark.parametrize('mode', ['default'])
def test_a_compiled_network_gives_the_numbers_of_the_plain_one(tmp_path, mode):
    if not __import__('shutil').which('g++'):
        pytest.skip('torch.compile needs a C++ compiler')
    ends = [
        ev.Sampler(
            Protocol('sit-tiny', 2, batch_size=4, compile=c),
            torch.device('cpu'),
            ev.tqdm(disable=True),
        ).batch(ns.adam2(2), 0, 0, n)[0]
        for c in ('none', mode)
        for n in (4,)
    ]
    assert torch.allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize('broken', ['euler', 'teacher'])
def test_a_diverged_row_has_no_metrics_and_a_diverged_teacher_takes_only_the_distances(
    tmp_path, monkeypatch, broken
):
    p = Protocol(**SMALL | dict(solvers='euler'))
    sample, steps = ev.sample, dict(euler=5, teacher=8)[broken]

    def one_sample_gone(field, x, solver, y):
        out = sample(field, x, solver, y)
        return out.index_fill(0, torch.tensor([1]), float('nan')) if solver.steps == steps else out

    monkeypatch.setattr(ev, 'sample', one_sample_gone)
    t, examples = ev.evaluate(p, False, tmp_path)
    t = t.set_index('solver')
    other = dict(euler='teacher', teacher='euler')[broken]
    assert (
        t.loc[broken, ['fd', 'is']].isna().all()
        and t.loc[other, ['fd', 'is']].notna().all()
        and np.isnan(t.rmse['euler'])
        and examples['euler'].shape == (10, 1, 28, 28)
    )
