"gpu_benchmark.ipynb as a user runs it, on the CPU, tiny: no number of it is a result."

import json, os, shutil, subprocess, sys
from pathlib import Path
import matplotlib.pyplot, pandas as pd, pytest, torch

NOTEBOOK = Path(__file__).resolve().parent.parent / 'studies/gpu_benchmark.ipynb'
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
COLUMNS = [
    'model',
    'mode',
    'variant',
    'round',
    'seconds',
    'images',
    'network_calls',
    'gflops_per_call',
    'first_call_seconds',
    'difference',
    'peak_gib',
    'skipped',
]
FILES = [f'gpu_benchmark.{s}' for s in ('csv', 'json', 'md', 'png')]


def in_process(stop=None, **parameters):
    "Run the code cells here, or those before the one with the text `stop`; returns their names."
    nb, space = json.loads(NOTEBOOK.read_text(encoding='utf-8')), {'__name__': '__main__'}
    with matplotlib.rc_context({'backend': 'agg'}), torch.random.fork_rng():
        for cell in nb['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code':
                continue
            if stop and stop in source:
                break
            exec(source, space)
            if 'parameters' in cell['metadata'].get('tags', []):
                space.update(parameters)
        matplotlib.pyplot.close('all')
    return space


def transformer_flops(rows, tokens, width, depth, patch, channels, mlp=4, frequencies=256):
    "Of the matrix products of DiT and SiT, two to a multiply-add, written out by hand."
    product = lambda n, a, b: 2 * n * a * b  # [n, a] times [a, b]
    n = rows * tokens
    block = (
        product(n, width, 3 * width)
        + 2 * product(n, width, tokens)
        + product(n, width, width)
        + 2 * product(n, width, mlp * width)
        + product(rows, width, 6 * width)
    )
    ends = (
        product(n, channels * patch**2, width)
        + product(n, width, 2 * channels * patch**2)
        + product(rows, width, 2 * width)
    )
    return depth * block + ends + product(rows, frequencies, width) + product(rows, width, width)


def test_papermill_writes_the_files(tmp_path):
    options = [
        word
        for key, value in (SMALL | dict(rounds=2, reports_dir=tmp_path)).items()
        for word in ('-p', key, str(value))
    ]
    run = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            str(NOTEBOOK),
            str(tmp_path / 'out.ipynb'),
            '--log-level',
            'ERROR',
            *options,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, 'out.ipynb'])
        and (tmp_path / 'gpu_benchmark.png').stat().st_size > 1000
    )
    table, protocol = (
        pd.read_csv(tmp_path / 'gpu_benchmark.csv'),
        json.loads((tmp_path / 'gpu_benchmark.json').read_text()),
    )
    assert table.columns.tolist() == COLUMNS
    live, skipped = table[table.skipped.isna()], table[table.skipped.notna()]
    variants = {
        'SiT-tiny/2': ['bare', 'ours'],
        'FlowDCN-tiny/2': ['bare', 'ours'],
        'DiT-tiny/2': ['bare', 'diffusers', 'diffusers bare', 'ours'],
    }
    for r in (0, 1):
        assert {
            m: sorted(g.variant) for m, g in live[live['round'] == r].groupby('model')
        } == variants
    first = {
        r: live[(live.model == 'SiT-tiny/2') & (live['round'] == r)].variant.iloc[0] for r in (0, 1)
    }
    assert first == {0: 'ours', 1: 'bare'}  # the order rotates
    assert (
        (live.network_calls == 5).all()
        and (live.images == 2).all()
        and (live.seconds > 0).all()
        and live.peak_gib.isna().all()
    )
    assert (
        live.difference.dropna() == 0
    ).all() and live.difference.count() == 8  # eager twice is the same
    assert list(zip(skipped.model, skipped['mode'], skipped.variant)) == [
        (m, 'cuda-graphs', v)
        for m, v in (
            ('SiT-tiny/2', 'ours'),
            ('FlowDCN-tiny/2', 'ours'),
            ('DiT-tiny/2', 'ours'),
            ('DiT-tiny/2', 'diffusers'),
        )
    ]
    assert skipped.seconds.isna().all() and skipped.skipped.str.contains('GPU').all()
    flops = transformer_flops(rows=4, tokens=16, width=160, depth=4, patch=2, channels=4) / 1e9
    counted = table.groupby(['model', 'variant']).gflops_per_call.first()
    assert (
        counted['SiT-tiny/2', 'ours']
        == counted['DiT-tiny/2', 'ours']
        == pytest.approx(flops, rel=1e-8)
    )
    assert counted['DiT-tiny/2', 'diffusers'] == pytest.approx(
        flops + 4 * 2 * 4 * (256 * 160 + 160 * 160) / 1e9, rel=1e-8
    )  # embeds the time again in every block
    gather = (
        ['v', 'qk_deformables', 'qk_scales', 'qk_weights', 'out'],
        [160, 5 * 9 * 2, 5 * 9, 5 * 9, 160],
    )
    hidden = 2 * 640 // 3
    rows = 4 * 16
    mix = 2 * rows * 160 * sum(gather[1]) + 3 * 2 * rows * 160 * hidden + 2 * 4 * 160 * 6 * 160
    attention = transformer_flops(4, 16, 160, 1, 2, 4) - transformer_flops(4, 16, 160, 0, 2, 4)
    assert counted['FlowDCN-tiny/2', 'ours'] == pytest.approx(
        flops + 4 * (mix - attention) / 1e9, rel=1e-8
    )
    assert (
        protocol['peak_tflops'] is None
        and protocol['hardware']
        and protocol['solvers']['DiT'][0] == 'dit-xl-2'
        and protocol['versions']['torch'] == torch.__version__
    )
    lines = (tmp_path / 'gpu_benchmark.md').read_text().splitlines()
    assert (
        len(lines) == 4 + 8 + 4
        and sum('skipped: CUDA graphs need a GPU' in line for line in lines) == 4
        and 'float32' in lines[0]
    )


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on the CPU')
def test_compiled_mode_and_mfu(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    graphs, reset = [], torch.compiler.reset
    counters.clear()
    monkeypatch.setattr(
        torch.compiler,
        'reset',
        lambda: (graphs.append(counters['stats']['unique_graphs']), reset()),
    )
    in_process(
        reports_dir=str(tmp_path),
        **SMALL | dict(models='SiT', modes='eager,compiled', peak_tflops=2.0),
    )
    table = pd.read_csv(tmp_path / 'gpu_benchmark.csv')
    compiled = table[table['mode'] == 'compiled']
    assert table.skipped.isna().all() and len(table) == 4 and (table.network_calls == 5).all()
    assert graphs == [1]  # compiled once, whole: no graph break, no compilation for a later step
    assert compiled.difference.max() < 1e-5  # another order of summation, the same network
    row = [
        c.strip()
        for c in (tmp_path / 'gpu_benchmark.md').read_text().splitlines()[-1].split('|')[1:-1]
    ]
    last = compiled.iloc[-1]
    assert row[:3] == ['SiT-tiny/2', 'compiled', 'bare'] and float(row[6]) == pytest.approx(
        100
        * 5
        * last.gflops_per_call
        / compiled[compiled.variant == 'bare'].seconds.iloc[0]
        / 2000,
        abs=0.051,
    )


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
def test_bad_values_are_refused_before_anything_is_made(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        in_process(reports_dir=str(tmp_path / 'out'), **SMALL | change)
    assert not (tmp_path / 'out').exists()


def test_a_missing_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(
        ValueError, match='torch sees no CUDA device here.*-p device cpu -p size tiny'
    ):
        in_process(reports_dir=str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_known_peaks(tmp_path):
    "By full name: GH200 is no H200, and a slice of a GPU has no peak here."
    peak = in_process('def ready', reports_dir=str(tmp_path), **SMALL)['known_peak']
    halves = {
        'NVIDIA A100-SXM4-80GB': 312,
        'NVIDIA A100 80GB PCIe': 312,
        'NVIDIA H100 80GB HBM3': 989,
        'NVIDIA H100 PCIe': 756,
        'NVIDIA H200': 989,
        'NVIDIA L40S': 362,
        'NVIDIA GeForce RTX 4090': 165,
    }
    assert (
        {name: peak(name, 'bfloat16', 0) for name in halves}
        == halves
        == {name: peak(name, 'float16', 0) for name in halves}
    )
    assert (
        peak('NVIDIA A100-SXM4-80GB', 'float32', 1),
        peak('NVIDIA A100-SXM4-80GB', 'float32', 0),
    ) == (156, 19.5)
    for name in (
        'NVIDIA GH200 480GB',
        'NVIDIA H100 NVL',
        'NVIDIA A100-SXM4-40GB MIG 3g.20gb',
        'NVIDIA GeForce RTX 4090 D',
        'x86_64',
    ):
        assert peak(name, 'bfloat16', 0) is None
