"The Triton kernel of the deformable operator, interpreted, against the official one, PyTorch and autograd; compiled for GPUs that need not be here."

import functools, importlib.util, json, os, subprocess, sys, traceback
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file
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
    return [
        t.to(dtype)
        for t in (
            torch.randn(B, H, W, G, C, generator=g),
            offsets,
            torch.randn(B, H, W, G, K, generator=g),
        )
    ]


def with_gradients(operator, inputs, seed=9):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = operator(*leaves)
    out.backward(
        torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
        / 8
    )  # exact in every dtype
    return [out.detach(), *(t.grad for t in leaves)]


# Run in a process of its own: Triton reads TRITON_INTERPRET when it is imported. A case fails by raising.

CASES = {}


def case(*args):
    def register(f):
        for a in args or ((),):
            CASES[
                '-'.join(
                    [
                        f.__name__,
                        *('x'.join(map(str, v)) if isinstance(v, tuple) else str(v) for v in a),
                    ]
                )
            ] = functools.partial(f, *a)
        return f

    return register


@case(('op',), ('op_border',), ('inter/blocks.0.op',))
def official(part):
    g = load_file(GOLDEN)
    v, o, w, out = (
        g[part + ('_' if 'inter' in part else '/') + k]
        for k in ('value', 'offsets', 'weights', 'out')
    )
    if part == 'op_border':
        assert torch.equal(kernel(v, o, w), out)
    close(kernel(v, o, w), out)


SHAPES = [
    (2, 5, 7, 4, 16, 9),
    (1, 3, 5, 1, 5, 4),
    (2, 1, 6, 3, 4, 2),
    (1, 6, 1, 2, 72, 3),
    (1, 1, 1, 1, 64, 5),
    (3, 4, 3, 2, 1, 1),
    (1, 2, 3, 1, 1100, 2),
]


@case(*((s,) for s in SHAPES))
def result_and_gradients(
    shape,
):  # sums of up to thousands of terms of size 1: 1e-5 relative to the largest
    inputs = draw(*shape)
    for found, wanted in zip(
        with_gradients(kernel, inputs), with_gradients(deformable_gather, inputs)
    ):
        close(found, wanted, 1e-5 * max(1, wanted.abs().max().item()))


@case()
def gradients_on_integers():
    "Where the rule jumps, too, the gradient is autograd's: that of the side where the fraction is 0."
    inputs = draw(2, 4, 3, 2, 8, 6)
    inputs[1].round_().clamp_(-9, 9)
    for found, wanted in zip(
        with_gradients(kernel, inputs), with_gradients(deformable_gather, inputs)
    ):
        close(found, wanted, 1e-4)


@case(
    (torch.bfloat16, 2**-7), (torch.float16, 2**-11)
)  # 2^-8 on a GPU: the interpreter of Triton 3.9 rounds to bfloat16 by cutting off
def half_precision(dtype, eps):
    "All is float32 inside: the float32 operator on the same inputs, rounded once, and that of the dtype up to its own roundings."
    inputs = draw(2, 4, 5, 2, 24, 9, spread=2.0, dtype=dtype)
    found = with_gradients(kernel, inputs)
    assert [t.dtype for t in found] == [dtype] * 4
    for f, exact, low in zip(
        found,
        with_gradients(deformable_gather, [t.float() for t in inputs]),
        with_gradients(deformable_gather, inputs),
    ):
        close(f.float(), exact, 1e-5 * max(1, exact.abs().max().item()), eps)
        assert (f - low).float().square().mean().sqrt() < 4 * eps * exact.square().mean().sqrt()


@case()
def every_input_has_its_dtype_and_layout():
    v, o, w = draw(2, 4, 5, 2, 6, 3, spread=2.0)
    inputs = [v.bfloat16(), o, w.half()]
    found = with_gradients(kernel, inputs)
    assert [t.dtype for t in found] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float16,
    ]
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
    net.load_state_dict(
        {k.removeprefix('params/'): v for k, v in g.items() if k.startswith('params/')}
    )
    x, t, y = g['x'], g['t'], g['y']
    grads = []
    for operator in (kernel, deformable_gather):
        calls = []
        flowdcn.deformable_gather = lambda *a: (calls.append(a), operator(*a))[1]
        with torch.no_grad():
            close(net(x, t, y), g['forward'], 5e-5)
        net.zero_grad()
        net(x[:1], t[:1], y[:1]).square().mean().backward()
        assert len(calls) == 6  # three blocks, twice
        grads.append({k: p.grad for k, p in net.named_parameters() if p.requires_grad})
    for k, grad in grads[1].items():
        close(grads[0][k], grad, 1e-4 * max(1, grad.abs().max().item()))


@case()
def registered_as_pytorch_wants_it():
    inputs = [t.requires_grad_() for t in draw(1, 3, 4, 2, 5, 3)]
    ops = torch.ops.neuralsolver
    torch.library.opcheck(ops.deformable_gather.default, inputs)
    torch.library.opcheck(
        ops.deformable_gather_backward.default,
        [torch.randn(1, 3, 4, 2, 5), *(t.detach() for t in inputs)],
    )


@case()
def compiles_without_a_graph_break():
    step = torch.compile(
        lambda v, o, w: kernel(v.sin(), 2 * o, w).cos(), backend='aot_eager', fullgraph=True
    )
    inputs = draw(1, 3, 4, 2, 5, 3)
    for found, wanted in zip(
        with_gradients(step, inputs),
        with_gradients(lambda v, o, w: deformable_gather(v.sin(), 2 * o, w).cos(), inputs),
    ):
        close(found, wanted, 1e-4)


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
    env = (
        {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
        | {'OMP_NUM_THREADS': '1'}
        | env
    )
    done = subprocess.run(
        [sys.executable, *map(str, args)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def interpreted():
    return python(__file__, TRITON_INTERPRET='1')


@needs_triton
@pytest.mark.parametrize('name', CASES)
def test_in_the_interpreter(interpreted, name):
    if interpreted[name] is None:
        pytest.skip('data/golden is not carried by the wheel')
    assert not interpreted[name], interpreted[name]


# Compiled, without a GPU

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from neuralsolver.kernels import _backward_kernel, _forward_kernel
found = []
for target in (GPUTarget('cuda', 80, 32), GPUTarget('cuda', 90, 32), GPUTarget('hip', 'gfx942', 64)):
    for dtype in ('fp32', 'bf16'):
        for kernel in (_forward_kernel(), _backward_kernel()):
            names = kernel.arg_names[:kernel.arg_names.index('count')]
            types = {n: '*fp32' if n == 'to_value' else f'*{dtype}' for n in names} | {'count': 'i64'}
            types |= dict.fromkeys('HWG', 'i32') | dict.fromkeys('CKRL', 'constexpr')
            aligned = {(i,): [['tt.divisibility', 16]] for i in range(len(names))} # as any tensor of PyTorch
            asm = triton.compile(ASTSource(kernel, types, dict(C=72, K=9, R=8, L=128), aligned), target=target).asm
            ptx = asm.get('ptx', ''); size = len(asm.get('cubin') or asm.get('hsaco') or '')
            found.append([target.backend, kernel.__name__, size, 'ld.global.v4' in ptx, 'red.global' in ptx or 'atom.global' in ptx])
print(json.dumps(found))"""


@needs_triton
def test_both_kernels_compile_for_nvidia_and_amd(tmp_path):
    found = python('-c', COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 12 and all(size > 0 for _, _, size, *_ in found)
    for (
        backend,
        name,
        _,
        vector,
        adds,
    ) in found:  # values are read 16 bytes at a time with the 72 channels of FlowDCN-XL; only the backward kernel adds to memory
        if backend == 'cuda':
            assert vector and adds == (name == 'backward')


# Without Triton


def test_the_module_neither_imports_triton_nor_needs_it():
    code = """
import json, sys
if sys.argv[1] == 'missing': sys.modules['triton'] = None # as if it were not installed
import torch
from neuralsolver.kernels import deformable_gather
inputs = torch.ones(1, 2, 3, 1, 4), torch.zeros(1, 2, 3, 1, 2, 2), torch.ones(1, 2, 3, 1, 2)
out, error = deformable_gather(*inputs).tolist(), ''
try: deformable_gather(*inputs, backend='triton')
except ValueError as e: error = str(e)
print(json.dumps([bool(sys.modules.get('triton')), out, error]))"""
    ones = torch.full((1, 2, 3, 1, 4), 2.0).tolist()
    for state in ('missing', 'as it is'):
        imported, out, error = python('-c', code, state)
        assert not imported and out == ones and "backend='triton' cannot run here" in error
        if state == 'missing':
            assert 'pip install triton' in error


def test_errors_about_backends_and_shapes(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(kernels, '_TRITON', True)
    v, o, w = draw(1, 2, 3, 1, 4, 2)
    with pytest.raises(
        ValueError, match="backend='cuda' is not known. Allowed: auto, torch, triton"
    ):
        deformable_gather(v, o, w, 'cuda')
    with pytest.raises(
        ValueError, match=r"it takes CUDA tensors, not \['cpu', 'cpu', 'cpu'\].*TRITON_INTERPRET=1"
    ):
        kernel(v, o, w)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(ValueError, match='float32, bfloat16 and float16, not .*float64'):
        kernel(v.double(), o, w)
    for wrong in (
        (v[0], o, w),
        (v, o[:, :1], w),
        (v, o, w[..., :1]),
        (v, o[..., :1], w),
        (v.expand(2, -1, -1, -1, -1), o, w),
    ):
        for backend in ('auto', 'torch', 'triton'):  # a kernel would read beyond the end
            with pytest.raises(ValueError, match=r'do not fit: give \[B, H, W, G, C\]'):
                deformable_gather(*wrong, backend)


def test_auto_takes_the_kernel_for_cuda_tensors(monkeypatch):
    "Tensors without data stand for those of a GPU."
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = lambda value, offsets, weights: ('torch', value)

    def used(device='cuda', dtypes=[torch.float32] * 3, **kwargs):
        shapes = (1, 2, 3, 1, 4), (1, 2, 3, 1, 2, 2), (1, 2, 3, 1, 2)
        with FakeTensorMode():
            out = deformable_gather(
                *(torch.zeros(s, device=device, dtype=d) for s, d in zip(shapes, dtypes)), **kwargs
            )
        if isinstance(out, tuple):
            return out[0]
        assert out.shape == (1, 2, 3, 1, 4) and out.device.type == device and out.dtype == dtypes[0]
        return 'triton'

    monkeypatch.setattr(kernels, '_gather_torch', plain)
    monkeypatch.setattr(kernels, '_TRITON', True)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert used() == used(dtypes=[torch.bfloat16, torch.float32, torch.float16]) == 'triton'
    assert (
        used('cpu')
        == used(dtypes=[torch.float32, torch.float64, torch.float32])
        == used(backend='torch')
        == 'torch'
    )
    with monkeypatch.context() as m:
        m.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
        assert used() == 'torch' and used(backend='triton') == 'triton'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert used('cpu') == 'torch' and used() == 'triton'
    monkeypatch.setattr(kernels, '_TRITON', False)
    assert used() == 'torch'


if __name__ == '__main__':
    run_cases()
