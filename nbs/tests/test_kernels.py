"The Triton kernel of the deformable operator, interpreted and compiled for GPUs not here."

import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from neuralsolver import flowdcn, kernels
from neuralsolver.kernels import deformable_gather
from neuralsolver.utils import data_root

GOLDEN = data_root() / 'golden/flowdcn_small.safetensors'
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='the package triton is not installed'
)
kernel = functools.partial(deformable_gather, backend='triton')


def close(a, b, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def draw(B, H, W, G, C, K, seed=0, spread=3.0, dtype=torch.float32):
    "Value, offsets, weights: points inside, on integers, beyond every border and far away."
    g = torch.Generator().manual_seed(seed)
    offsets = spread * torch.randn(B, H, W, G, K, 2, generator=g)
    pick = torch.rand(B, H, W, G, K, 2, generator=g)
    offsets = torch.where(pick < 0.3, offsets.round(), offsets)
    far = 1e10 if dtype == torch.float32 else 1e3  # 1e10 is no int32
    offsets = torch.where(pick > 0.97, offsets * far, offsets)
    value = torch.randn(B, H, W, G, C, generator=g)
    weights = torch.randn(B, H, W, G, K, generator=g)
    return [t.to(dtype) for t in (value, offsets, weights)]


def with_gradients(operator, inputs, seed=9):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = operator(*leaves)
    g = torch.Generator().manual_seed(seed)
    eighths = torch.randint(-8, 9, out.shape, generator=g)  # exact in every dtype
    out.backward(eighths.to(out.dtype) / 8)
    return [out.detach(), *(t.grad for t in leaves)]


# Run in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
# A case fails by raising.

CASES = {}


def case(*args):
    "Register a function with its arguments, under a name that tells them."

    def register(f):
        for values in args or ((),):
            words = ['x'.join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
            CASES['-'.join([f.__name__, *words])] = functools.partial(f, *values)
        return f

    return register


def agree(inputs, atol):
    "Result and gradients of the kernel and of the PyTorch formulation, relative to the largest."
    wanted = with_gradients(deformable_gather, inputs)
    for found, w in zip(with_gradients(kernel, inputs), wanted):
        close(found, w, atol * max(1, w.abs().max().item()))


@case(('op',), ('op_border',), ('inter/blocks.0.op',))
def official(part):
    g = load_file(GOLDEN)
    joint = '_' if 'inter' in part else '/'
    v, o, w, out = (g[f'{part}{joint}{k}'] for k in ('value', 'offsets', 'weights', 'out'))
    if part == 'op_border':
        assert torch.equal(kernel(v, o, w), out)
    close(kernel(v, o, w), out)


SHAPES = [  # the first has a full block of 64 rows and a tail
    (2, 3, 7, 2, 16, 4),
    (1, 3, 5, 1, 5, 4),
    (2, 1, 6, 3, 4, 2),
    (1, 6, 1, 2, 72, 3),
    (1, 1, 1, 1, 64, 5),
    (3, 4, 3, 2, 1, 1),
    (1, 2, 3, 1, 1100, 2),
]


@case(*((s,) for s in SHAPES))
def result_and_gradients(shape):
    "Sums of up to thousands of terms of size 1: 1e-5 relative to the largest."
    agree(draw(*shape), 1e-5)


@case()
def gradients_on_integers():
    "Where the rule jumps, the gradient is that of the side where the fraction is 0."
    inputs = draw(2, 4, 3, 2, 8, 6)
    inputs[1].round_().clamp_(-9, 9)
    wanted = with_gradients(deformable_gather, inputs)
    for found, w in zip(with_gradients(kernel, inputs), wanted):
        close(found, w, 1e-4)


# 2^-8 on a GPU: the interpreter of Triton 3.9 rounds to bfloat16 by cutting off
@case((torch.bfloat16, 2**-7), (torch.float16, 2**-11))
def half_precision(dtype, eps):
    "The float32 operator on the same inputs, rounded once; that of the dtype up to its roundings."
    inputs = draw(1, 4, 5, 2, 24, 5, spread=2.0, dtype=dtype)
    found = with_gradients(kernel, inputs)
    exact = with_gradients(deformable_gather, [t.float() for t in inputs])
    low = with_gradients(deformable_gather, inputs)
    assert [t.dtype for t in found] == [dtype] * 4
    for f, e, same in zip(found, exact, low):
        close(f.float(), e, 1e-5 * max(1, e.abs().max().item()), eps)
        assert (f - same).float().square().mean().sqrt() < 4 * eps * e.square().mean().sqrt()


@case()
def every_input_has_its_dtype_and_layout():
    v, o, w = draw(2, 4, 5, 2, 6, 3, spread=2.0)
    inputs = [v.bfloat16(), o, w.half()]
    found = with_gradients(kernel, inputs)
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    assert [t.dtype for t in found] == dtypes
    close(found[0].float(), deformable_gather(*(t.float() for t in inputs)), 1e-5, 2**-7)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, o, w)]
    assert not any(t.is_contiguous() for t in apart)
    assert torch.equal(kernel(*apart), kernel(v, o, w))
    expanded = kernel(v[:1].expand(2, -1, -1, -1, -1), o, w)
    close(expanded, deformable_gather(v[:1].expand(2, -1, -1, -1, -1), o, w))


@case()
def nothing_in_nothing_out():
    for shape in ((0, 3, 3, 2, 4, 5), (1, 3, 3, 2, 4, 0)):
        out, *grads = with_gradients(kernel, draw(*shape))
        assert out.shape == shape[:5] and not out.any() and not any(g.any() for g in grads)


@case()
def a_coordinate_that_is_no_number_is_not_hidden():
    v, o, w = draw(1, 3, 3, 1, 4, 2)
    o[0, 1, 1, 0, 0, 0] = torch.nan
    out = kernel(v, o, w)
    assert out[0, 1, 1].isnan().all() and out.isnan().sum() == 4


@case()
def the_network():
    g = load_file(GOLDEN)
    with safe_open(GOLDEN, 'pt') as f:
        net = flowdcn.FlowDCN(**json.loads(f.metadata()['config'])).eval()
    net.load_state_dict({k[7:]: v for k, v in g.items() if k.startswith('params/')})
    two = g['x'][:2], g['t'][:2], g['y'][:2]
    grads = []
    for operator in (kernel, deformable_gather):
        calls = []

        def counted(*args):
            calls.append(args)
            return operator(*args)

        flowdcn.deformable_gather = counted
        with torch.no_grad():
            close(net(*two), g['forward'][:2], 5e-5)
        net.zero_grad()
        net(*(v[:1] for v in two)).square().mean().backward()
        assert len(calls) == 6  # three blocks, twice
        grads.append({k: p.grad for k, p in net.named_parameters() if p.requires_grad})
    for k, grad in grads[1].items():
        close(grads[0][k], grad, 1e-4 * max(1, grad.abs().max().item()))


@case()
def registered_as_pytorch_wants_it():
    inputs = [t.requires_grad_() for t in draw(1, 3, 4, 2, 5, 3)]
    detached = [t.detach() for t in inputs]
    ops = torch.ops.neuralsolver
    torch.library.opcheck(ops.deformable_gather.default, inputs)
    grad = torch.randn(1, 3, 4, 2, 5)
    torch.library.opcheck(ops.deformable_gather_backward.default, [grad, *detached])


@case()
def compiles_without_a_graph_break():
    def step(operator, v, o, w):
        return operator(v.sin(), 2 * o, w).cos()

    inputs = draw(1, 3, 4, 2, 5, 3)
    ours = functools.partial(step, kernel)
    compiled = torch.compile(ours, backend='aot_eager', fullgraph=True)
    wanted = with_gradients(functools.partial(step, deformable_gather), inputs)
    for found, w in zip(with_gradients(compiled, inputs), wanted):
        close(found, w, 1e-4)


def run_cases():
    torch.set_num_threads(1)
    failures = {}
    for name, f in CASES.items():
        if not GOLDEN.exists() and f.func in (official, the_network):
            failures[name] = None
            continue
        try:
            f()
            failures[name] = ''
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


def python(*args, **env):
    known = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env = known | {'OMP_NUM_THREADS': '1'} | env
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def interpreted():
    return python(__file__, TRITON_INTERPRET='1')


@needs_triton
@pytest.mark.parametrize('name', CASES)
def test_fidelity_in_the_interpreter(interpreted, name):
    if interpreted[name] is None:
        pytest.skip('data/golden is not carried by the wheel')
    assert not interpreted[name], interpreted[name]


# Compiled, without a GPU

COMPILE = """
import json, sys
from neuralsolver.kernels import _backward_kernel, _forward_kernel
assert 'triton' not in sys.modules # only looked for
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, target, dtype):
    names = kernel.arg_names[: kernel.arg_names.index('count')]
    types = {n: '*fp32' if n == 'to_value' else f'*{dtype}' for n in names} | {'count': 'i64'}
    types |= dict.fromkeys('HWG', 'i32') | dict.fromkeys('CKRL', 'constexpr')
    sizes = dict(C=72, K=9, R=8, L=128) # 72 channels: FlowDCN-XL
    aligned = {(i,): [['tt.divisibility', 16]] for i in range(len(names))} # as any PyTorch tensor
    asm = triton.compile(ASTSource(kernel, types, sizes, aligned), target=target).asm
    ptx = asm.get('ptx', '')
    adds = 'red.global' in ptx or 'atom.global' in ptx
    size = len(asm.get('cubin') or asm.get('hsaco') or '')
    return [target.backend, kernel.__name__, size, 'ld.global.v4' in ptx, adds]

found = []
for words in sys.argv[1:]:
    backend, arch, warp, dtype = words.split(',')
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    for kernel in (_forward_kernel(), _backward_kernel()):
        found.append(compiled(kernel, target, dtype))
print(json.dumps(found))"""
TARGETS = ('cuda,80,32,fp32', 'cuda,90,32,bf16', 'hip,gfx942,64,bf16')
MORE = ('cuda,80,32,bf16', 'cuda,90,32,fp32', 'hip,gfx942,64,fp32')


@needs_triton
@pytest.mark.parametrize('targets', [TARGETS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_both_kernels_compile_for_nvidia_and_amd(tmp_path, targets):
    "Values are read 16 bytes at a time; only the backward kernel adds to memory."
    found = python('-c', COMPILE, *targets, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 6 and all(size > 0 for _, _, size, *_ in found)
    for backend, name, _, vector, adds in found:
        if backend == 'cuda':
            assert vector and adds == (name == 'backward')


# Without Triton


WITHOUT = """
import json, sys
sys.modules['triton'] = None # as if it were not installed
import torch
from neuralsolver.kernels import deformable_gather
inputs = torch.ones(1, 2, 3, 1, 4), torch.zeros(1, 2, 3, 1, 2, 2), torch.ones(1, 2, 3, 1, 2)
error = ''
try:
    deformable_gather(*inputs, backend='triton')
except ValueError as e:
    error = str(e)
print(json.dumps([deformable_gather(*inputs).tolist(), error]))"""


def test_the_module_works_without_triton():
    out, error = python('-c', WITHOUT)
    assert out == torch.full((1, 2, 3, 1, 4), 2.0).tolist()
    assert "backend='triton' cannot run here" in error and 'pip install triton' in error


# refusal, and which backend is used


def test_refusal_of_a_backend(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(kernels, '_TRITON', True)
    v, o, w = draw(1, 2, 3, 1, 4, 2)
    said = "backend='cuda' is not known. Allowed: auto, torch, triton"
    with pytest.raises(ValueError, match=said):
        deformable_gather(v, o, w, 'cuda')
    said = r"it takes CUDA tensors, not \['cpu', 'cpu', 'cpu'\].*TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=said):
        kernel(v, o, w)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(ValueError, match='float32, bfloat16 and float16, not .*float64'):
        kernel(v.double(), o, w)


@pytest.mark.parametrize('backend', ['auto', 'torch', 'triton'])
def test_refusal_of_shapes_that_do_not_fit(backend):
    "A kernel would read beyond the end."
    v, o, w = draw(1, 2, 3, 1, 4, 2)
    expanded = v.expand(2, -1, -1, -1, -1)
    wrong = ((v[0], o, w), (v, o[:, :1], w), (v, o, w[..., :1]), (v, o[..., :1], w))
    for tensors in (*wrong, (expanded, o, w)):
        with pytest.raises(ValueError, match=r'do not fit: give \[B, H, W, G, C\]'):
            deformable_gather(*tensors, backend)


def used(device='cuda', dtypes=(torch.float32,) * 3, **kwargs):
    "The backend that a call takes; tensors without data stand for those of a GPU."
    shapes = (1, 2, 3, 1, 4), (1, 2, 3, 1, 2, 2), (1, 2, 3, 1, 2)
    with FakeTensorMode():
        tensors = [torch.zeros(s, device=device, dtype=d) for s, d in zip(shapes, dtypes)]
        out = deformable_gather(*tensors, **kwargs)
    if out == 'torch':
        return out
    assert out.shape == shapes[0] and out.device.type == device and out.dtype == dtypes[0]
    return 'triton'


def test_auto_takes_the_kernel_for_cuda_tensors(monkeypatch):
    monkeypatch.setattr(kernels, '_gather_torch', lambda *tensors: 'torch')
    monkeypatch.setattr(kernels, '_TRITON', True)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert used() == 'triton'
    assert used(dtypes=[torch.bfloat16, torch.float32, torch.float16]) == 'triton'
    assert used('cpu') == used(backend='torch') == 'torch'
    assert used(dtypes=[torch.float32, torch.float64, torch.float32]) == 'torch'
    with monkeypatch.context() as m:
        m.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
        assert used() == 'torch' and used(backend='triton') == 'triton'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert used('cpu') == 'torch' and used() == 'triton'
    monkeypatch.setattr(kernels, '_TRITON', False)
    assert used() == 'torch'


if __name__ == '__main__':
    run_cases()
