"gpu_benchmark.ipynb as a user runs it, on the CPU, tiny: no number of it is a result."

import functools
import json
import shutil

import pandas as pd
import pytest
import torch
from notebooks import run_notebook

SMALL = dict(
    device='cpu',
    size='tiny',
    input_size=8,
    batch_size=2,
    steps=5,
    rounds=1,
    dtype='float32',
    modes='eager,cuda-graphs',
)
COLUMNS = (
    'model mode variant round seconds images network_calls gflops_per_call first_call_seconds '
    'difference peak_gib skipped'
)
FILES = [f'gpu_benchmark.{s}' for s in ('csv', 'json', 'md', 'png')]
VARIANTS = {
    'SiT-tiny/2': ['bare', 'ours'],
    'FlowDCN-tiny/2': ['bare', 'ours'],
    'DiT-tiny/2': ['bare', 'diffusers', 'diffusers bare', 'ours'],
}
run = functools.partial(run_notebook, 'studies/gpu_benchmark')


def product(n, a, b):
    "FLOPs of [n, a] times [a, b], two to a multiply-add."
    return 2 * n * a * b


def attention_flops(n, tokens, width):
    scores = product(n, width, tokens)
    return product(n, width, 3 * width) + 2 * scores + product(n, width, width)


def transformer_flops(rows=4, tokens=16, width=160, depth=4, patch=2, channels=4):
    "Of the matrix products of DiT and SiT, written out by hand."
    n = rows * tokens
    mlp = 2 * product(n, width, 4 * width)
    block = attention_flops(n, tokens, width) + mlp + product(rows, width, 6 * width)
    ends = product(n, channels * patch**2, width) + product(n, width, 2 * channels * patch**2)
    time = product(rows, 256, width) + product(rows, width, width)
    return depth * block + ends + product(rows, width, 2 * width) + time


def flowdcn_flops(rows=4, tokens=16, width=160, depth=4, groups=5, points=9):
    "A FlowDCN has linear layers and a gated MLP where a DiT has attention and an MLP."
    n = rows * tokens
    layers = (width, 2 * groups * points, groups * points, groups * points, width)
    gather = sum(product(n, width, out) for out in layers)
    gated = 3 * product(n, width, 2 * 4 * width // 3)
    replaced = attention_flops(n, tokens, width) + 2 * product(n, width, 4 * width)
    return transformer_flops(rows, tokens, width, depth) + depth * (gather + gated - replaced)


@pytest.fixture(scope='module')
def small_run(tmp_path_factory):
    "The folder, the table and the protocol of one run of two rounds."
    folder = tmp_path_factory.mktemp('gpu_benchmark')
    run(reports_dir=folder, **SMALL | dict(rounds=2))
    protocol = json.loads((folder / 'gpu_benchmark.json').read_text())
    return folder, pd.read_csv(folder / 'gpu_benchmark.csv'), protocol


def test_files_table_and_protocol(small_run):
    folder, table, protocol = small_run
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert (folder / 'gpu_benchmark.png').stat().st_size > 1000
    assert table.columns.tolist() == COLUMNS.split()
    assert protocol['peak_tflops'] is None and protocol['hardware']
    assert protocol['solvers']['DiT'][0] == 'dit-xl-2'
    assert protocol['versions']['torch'] == torch.__version__
    lines = (folder / 'gpu_benchmark.md').read_text().splitlines()
    skipped = sum('skipped: CUDA graphs need a GPU' in line for line in lines)
    assert len(lines) == 4 + 8 + 4 and skipped == 4 and 'float32' in lines[0]


def test_every_round_times_every_variant_and_the_order_rotates(small_run):
    table = small_run[1]
    live = table[table.skipped.isna()]
    for r in (0, 1):
        found = live[live['round'] == r].groupby('model').variant
        assert {m: sorted(v) for m, v in found} == VARIANTS
    sit = live[live.model == 'SiT-tiny/2']
    assert [sit[sit['round'] == r].variant.iloc[0] for r in (0, 1)] == ['ours', 'bare']
    assert (live.network_calls == 5).all() and (live.images == 2).all()
    assert (live.seconds > 0).all() and live.peak_gib.isna().all()
    # eager twice is the same
    assert (live.difference.dropna() == 0).all() and live.difference.count() == 8


def test_a_mode_that_cannot_run_is_a_row_with_the_reason(small_run):
    table = small_run[1]
    skipped = table[table.skipped.notna()]
    names = [(m, v) for m in VARIANTS for v in ('ours', 'diffusers') if v in VARIANTS[m]]
    assert list(zip(skipped.model, skipped.variant)) == names
    assert (skipped['mode'] == 'cuda-graphs').all() and skipped.seconds.isna().all()
    assert skipped.skipped.str.contains('GPU').all()


def test_fidelity_of_the_counted_flops(small_run):
    counted = small_run[1].groupby(['model', 'variant']).gflops_per_call.first()
    flops = transformer_flops()
    # diffusers embeds the time again in every block
    again = 4 * (product(4, 256, 160) + product(4, 160, 160))
    expected = {
        ('SiT-tiny/2', 'ours'): flops,
        ('DiT-tiny/2', 'ours'): flops,
        ('DiT-tiny/2', 'diffusers'): flops + again,
        ('FlowDCN-tiny/2', 'ours'): flowdcn_flops(),
    }
    for key, value in expected.items():
        assert counted[key] == pytest.approx(value / 1e9, rel=1e-8), key


def compiled_run(folder, monkeypatch):
    "The compiled rows of a run, its page, and the graphs that were compiled."
    from torch._dynamo.utils import counters

    graphs = []
    reset = torch.compiler.reset
    counters.clear()

    def counted_reset():
        graphs.append(counters['stats']['unique_graphs'])
        reset()

    monkeypatch.setattr(torch.compiler, 'reset', counted_reset)
    change = dict(models='SiT', modes='eager,compiled', peak_tflops=2.0)
    run(reports_dir=folder, **SMALL | change)
    table = pd.read_csv(folder / 'gpu_benchmark.csv')
    assert table.skipped.isna().all() and len(table) == 4 and (table.network_calls == 5).all()
    return table[table['mode'] == 'compiled'], graphs


def test_compiled_whole_and_its_mfu(tmp_path, monkeypatch):
    "No graph break, no compilation for a later step; the C++ of the CPU is left out."
    compile = functools.partial(torch.compile, backend='aot_eager')
    monkeypatch.setattr(torch, 'compile', compile)
    compiled, graphs = compiled_run(tmp_path, monkeypatch)
    assert graphs == [1] and compiled.difference.max() < 1e-5
    last = (tmp_path / 'gpu_benchmark.md').read_text().splitlines()[-1]
    row = [cell.strip() for cell in last.split('|')[1:-1]]
    assert row[:3] == ['SiT-tiny/2', 'compiled', 'bare']
    bare = compiled[compiled.variant == 'bare'].iloc[0]
    mfu = 100 * 5 * bare.gflops_per_call / bare.seconds / 2000
    assert float(row[6]) == pytest.approx(mfu, abs=0.051)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on the CPU')
def test_compiled_by_the_default_backend(tmp_path, monkeypatch):
    "Another order of summation, the same network."
    compiled, graphs = compiled_run(tmp_path, monkeypatch)
    assert graphs == [1] and compiled.difference.max() < 1e-5


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(models='SiT,UNet'), "models='UNet' is not known. Allowed: SiT, FlowDCN, DiT"),
        (dict(models='SiT,SiT'), 'distinct'),
        (dict(size='XXL'), "size='XXL'"),
        (dict(input_size=7), 'input_size=7 is not allowed: patches of side 2'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(steps=3), '5, 6, 7, 8, 9, 10'),
        (dict(steps=5.5), 'steps=5.5'),
        (dict(dtype='float64'), "dtype='float64'"),
        (dict(modes='fast'), "modes='fast'"),
        (dict(modes='cuda-graphs'), "modes='cuda-graphs' is not allowed with device='cpu'"),
        (dict(rounds=0), 'rounds=0'),
        (dict(device='tpu'), "device='tpu'"),
        (dict(peak_tflops=-1.0), 'peak_tflops=-1.0'),
        (dict(tf32=2), 'tf32=2'),
        (dict(tf32=1, dtype='bfloat16'), 'tf32=1 is not allowed with dtype'),
    ],
)
def test_refusal_of_bad_values_before_anything_is_made(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(reports_dir=tmp_path / 'out', **SMALL | change)
    assert not (tmp_path / 'out').exists()


def test_refusal_of_a_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(
        ValueError, match='torch sees no CUDA device here.*-p device cpu -p size tiny'
    ):
        run(reports_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


HALVES = {  # TFLOP/s
    'NVIDIA A100-SXM4-80GB': 312,
    'NVIDIA A100 80GB PCIe': 312,
    'NVIDIA H100 80GB HBM3': 989,
    'NVIDIA H100 PCIe': 756,
    'NVIDIA H200': 989,
    'NVIDIA L40S': 362,
    'NVIDIA GeForce RTX 4090': 165,
}
UNKNOWN = (
    'NVIDIA GH200 480GB',
    'NVIDIA H100 NVL',
    'NVIDIA A100-SXM4-40GB MIG 3g.20gb',
    'NVIDIA GeForce RTX 4090 D',
    'x86_64',
)


def test_fidelity_of_the_peaks(tmp_path):
    "By full name: GH200 is no H200, and a slice of a GPU has no peak here."
    peak = run('def ready', reports_dir=tmp_path, **SMALL)['known_peak']
    for dtype in ('bfloat16', 'float16'):
        assert {name: peak(name, dtype, 0) for name in HALVES} == HALVES
    tensor_cores, plain = (peak('NVIDIA A100-SXM4-80GB', 'float32', tf32) for tf32 in (1, 0))
    assert (tensor_cores, plain) == (156, 19.5)
    assert [peak(name, 'bfloat16', 0) for name in UNKNOWN] == [None] * len(UNKNOWN)
