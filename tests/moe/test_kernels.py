"Kernels against the loop, over random sizes, dtypes and routings; and what surrounds a layer in real training"
import copy, sys, threading
from types import SimpleNamespace

import pytest, torch
from torch.utils.checkpoint import checkpoint
from hypothesis import given, settings, strategies as st

from libmoe_nb.moe import kernels as module
from libmoe_nb.moe.experts import Experts, FeedForward, auto_kernel, ffn, kernels
from libmoe_nb.moe.kernels import free_workspaces
from random_layers import build, choices, tolerances

fast = [k for k in kernels if k != 'loop']

def results(experts, kernel, x, index, w):
    "Output and gradients"
    experts.kernel = kernel
    experts.zero_grad()
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = experts(x, index, w)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return dict(y=y.detach(), x=x.grad, weights=w.grad) | {n: p.grad.clone() for n, p in experts.named_parameters()}

def same(a, b, tol):
    "Equal up to rounding, which in half precision is measured against terms of order one: sums may cancel"
    assert a.keys() == b.keys()
    floor = .5 if tol > 1e-3 else 1e-3
    for n in a:
        assert a[n].shape == b[n].shape and a[n].dtype == b[n].dtype, n
        assert (a[n].double() - b[n].double()).norm() <= tol * (b[n].double().norm() + floor * b[n].numel()**.5), n

@settings(max_examples=120, deadline=None, derandomize=True)
@given(T=st.sampled_from([0, 1, 2, 17, 64, 333, 1500]), N=st.integers(1, 40), K=st.integers(1, 8),
       d=st.sampled_from([8, 16, 40]), h=st.sampled_from([8, 24]),
       act=st.sampled_from(['relu', 'silu', 'gelu', 'gelu_pytorch_tanh', 'relu2', 'quick_gelu', 'mish']),
       gated=st.booleans(), bias=st.booleans(),
       dtype=st.sampled_from(list(tolerances)), skew=st.sampled_from([0., .5, 1.5, 4.]),
       cap=st.sampled_from([None, 64, 1100]), seed=st.integers(0, 99))
def test_kernels_equal_the_loop(T, N, K, d, h, act, gated, bias, dtype, skew, cap, seed):
    # a bias added before or behind the rounding moves ReLU's kink
    if act == 'relu' and bias and dtype.itemsize == 2: act = 'silu'
    e = build(N, d, h, act, gated, bias, dtype, seed)
    x, (index, w) = torch.randn(T, d).to(dtype), choices(T, N, min(K, N+1), skew, seed)
    w = w.to(dtype if seed % 2 else torch.promote_types(dtype, torch.float32))
    want = results(e, 'loop', x, index, w)
    original = module.slots_per_block
    if cap: module.slots_per_block = lambda *a: (cap, seed)
    try:
        for kernel in fast:
            if kernel == 'grouped_mm' and dtype == torch.float64: continue
            same(results(e, kernel, x, index, w), want, tolerances[dtype])
    finally: module.slots_per_block = original

@pytest.mark.parametrize('kernel', fast)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_expert_of_many_tokens_is_cut(kernel, dtype):
    e = build(3, dtype=dtype)
    x, index, w = torch.randn(5000, 16).to(dtype), torch.zeros(5000, 1, dtype=torch.long), torch.rand(5000, 1)
    index[:3] = 2
    original, module.slots_per_block = module.slots_per_block, lambda *a: (1024, 8)
    try: same(results(e, kernel, x, index, w), results(e, 'loop', x, index, w), tolerances[dtype] * 2)
    finally: module.slots_per_block = original

@pytest.mark.parametrize('kernel', list(kernels))
def test_everything_skipped(kernel):
    e, x = build(bias=True), torch.randn(6, 16)
    for n, v in results(e, kernel, x, torch.full((6, 2), 4), torch.randn(6, 2)).items(): assert v.abs().sum() == 0, n

@pytest.mark.parametrize('kernel', list(kernels))
def test_one_expert_is_the_dense_ffn_and_all_experts_are_their_sum(kernel):
    e, x = build(1, act='silu', gated=True, bias=True), torch.randn(6, 16)
    e.kernel = kernel
    ff = FeedForward(16, 24, 'silu', gated=True, bias=True)
    ff.load_state_dict({'gate_up_proj.weight': e.gate_up_proj[0], 'gate_up_proj.bias': e.gate_up_proj_bias[0],
                        'down_proj.weight': e.down_proj[0], 'down_proj.bias': e.down_proj_bias[0]})
    torch.testing.assert_close(e(x, torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1)), ff(x))
    e = build(3)
    e.kernel = kernel
    want = sum(ffn(x, u, v) for u, v in zip(e.up_proj, e.down_proj))
    torch.testing.assert_close(e(x, torch.arange(3).expand(6, 3), torch.ones(6, 3)), want)

@pytest.mark.parametrize('kernel', list(kernels))
def test_experts_without_tokens_get_zero_gradients(kernel):
    e, x = build(5, bias=True), torch.randn(8, 16)
    got = results(e, kernel, x, torch.tensor([[1, 3]]).expand(8, 2), torch.rand(8, 2))
    for n, _ in e.named_parameters():
        assert got[n][[0, 2, 4]].abs().sum() == 0
        assert (got[n][[1, 3]].flatten(1).norm(dim=1) > 0).all()

@pytest.mark.parametrize('kernel', list(kernels))
def test_strided_inputs_and_the_same_expert_twice(kernel):
    e = build()
    x, w, index = torch.randn(16, 9).T, torch.randn(3, 9).T, torch.tensor([[0, 0, 2]]).expand(9, 3)
    same(results(e, kernel, x, index, w), results(e, 'loop', x.contiguous(), index.contiguous(), w.contiguous()), 1e-5)
    y = e(x, index.int(), w)
    y.t().sum().backward()   # a gradient that is not contiguous either

@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('wanted', [('x',), ('w',), ('up',), ('down',), ('x', 'w'), ('up_bias',), ('down_bias', 'w')])
def test_gradients_of_a_subset(gated, wanted):
    e = build(act='gelu', gated=gated, bias=True)
    x, (index, w) = torch.randn(30, 16), choices(30, 4, 2)
    want = results(e, 'loop', x, index, w)
    tensors = dict(zip(('up', 'down', 'up_bias', 'down_bias'), e.stacked), x=x.clone(), w=w.clone())
    for n, t in tensors.items(): t.requires_grad_(n in wanted)
    e.zero_grad()
    y = e(tensors['x'], index, tensors['w'])
    e.kernel = 'sorted'
    y = e(tensors['x'], index, tensors['w'])
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    names = {id(p): n for n, p in e.named_parameters()} | {id(tensors['x']): 'x', id(tensors['w']): 'weights'}
    for n, t in tensors.items():
        if n in wanted: torch.testing.assert_close(t.grad, want[names[id(t)]], rtol=1e-4, atol=1e-4)
        else: assert t.grad is None

@pytest.mark.parametrize('act', ['relu', 'silu', 'gelu', 'gelu_pytorch_tanh', 'tanh', 'relu2'])
@pytest.mark.parametrize('gated', [False, True])
def test_gradcheck(act, gated):
    e = build(5, 4, 6, act, gated, bias=True, dtype=torch.float64)
    e.kernel = 'sorted'
    names, params = zip(*e.named_parameters())
    x, (index, w) = torch.randn(9, 4, dtype=torch.float64), choices(9, 5, 3)
    f = lambda x, w, *ps: torch.func.functional_call(e, dict(zip(names, ps)), (x, index, w))
    assert torch.autograd.gradcheck(f, [t.detach().requires_grad_() for t in (x, w.double(), *params)])

def test_second_derivatives_are_refused_clearly_and_the_loop_has_them():
    e = build(act='silu')
    x, (index, w) = torch.randn(5, 16, requires_grad=True), choices(5, 4, 2)
    e.kernel = 'sorted'
    g, = torch.autograd.grad(e(x, index, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()
    e.kernel = 'loop'
    g, = torch.autograd.grad(e(x, index, w).square().sum(), x, create_graph=True)
    g.sum().backward()

def test_backward_twice_through_a_kept_graph():
    e = build()
    e.kernel = 'sorted'
    x, (index, w) = torch.randn(50, 16, requires_grad=True), choices(50, 4, 2)
    y = e(x, index, w).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    e(torch.randn(80, 16), *choices(80, 4, 2, seed=1)).sum().backward()   # the buffers are used in between
    x.grad = None
    y.backward()
    assert torch.equal(x.grad, first)

@pytest.mark.parametrize('kernel', list(kernels))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nan_tokens_keep_to_themselves(kernel, dtype):
    e = build(bias=True, dtype=dtype)
    x, (index, w) = torch.randn(200, 16).to(dtype), choices(200, 4, 2)
    bad = torch.arange(200) % 2 == 0
    x[bad] = torch.nan
    bad &= (index < 4).any(1)
    got = results(e, kernel, x, index, w)
    assert torch.equal(got['y'].isnan().any(1), bad)
    assert not got['x'][~bad].isnan().any() and not got['weights'][~bad].isnan().any()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_bits_twice(dtype):
    e = build(12, dtype=dtype)
    x, (index, w) = torch.randn(900, 16).to(dtype), choices(900, 12, 4, 1.)
    a = results(e, 'sorted', x, index, w)
    results(e, 'sorted', torch.randn(3000, 16).to(dtype), *choices(3000, 12, 4))
    b = results(e, 'sorted', x, index, w)
    for n in a: assert torch.equal(a[n], b[n]), n

@pytest.mark.parametrize('kernel', list(kernels))
def test_autocast(kernel):
    e, x, (index, w) = build(act='silu', gated=True, bias=True), torch.randn(60, 16), choices(60, 4, 2)
    exact = results(e, 'loop', x, index, w)
    with torch.autocast('cpu', torch.bfloat16):
        got = results(e, kernel, x, index, w)
        assert e(x.bfloat16(), index, w).dtype == torch.bfloat16
    assert got.pop('y').dtype == torch.bfloat16
    for n, v in got.items():
        assert v.dtype == torch.float32
        assert (v - exact[n]).norm() < .03 * exact[n].norm(), n

def test_gradient_checkpointing():
    e, x, (index, w) = build(), torch.randn(60, 16), choices(60, 4, 2)
    want = results(e, 'sorted', x, index, w)
    for reentrant in (False, True):
        e.zero_grad()
        x = x.detach().requires_grad_()
        y = checkpoint(e, x, index, w, use_reentrant=reentrant)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        assert torch.equal(x.grad, want['x']) and torch.equal(e.up_proj.grad, want['up_proj'])

def test_inference_mode_and_then_training():
    free_workspaces()
    e, x, (index, w) = build(), torch.randn(60, 16), choices(60, 4, 2)
    with torch.inference_mode(): y = e(x, index, w)
    got = results(e, 'sorted', x, index, w)
    assert torch.equal(got['y'], y)

def test_threads_have_their_own_buffers():
    e, jobs = build(), [(torch.randn(n, 16), *choices(n, 4, 2, seed=n)) for n in (100, 300, 500, 700)]
    want, got = [results(copy.deepcopy(e), 'sorted', *j) for j in jobs], [None]*4
    def work(i):
        mine = copy.deepcopy(e)
        for _ in range(10): got[i] = results(mine, 'sorted', *jobs[i])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for g, w in zip(got, want): same(g, w, 1e-5)

def test_what_is_saved_for_backward():
    N, d, h, K, T = 6, 32, 16, 3, 400
    e, x, (index, w) = (build(N, d, h), torch.randn(T, 32, requires_grad=True),
                     (torch.rand(T, N).topk(K).indices, torch.rand(T, K)))
    known, kept = {t.untyped_storage().data_ptr() for t in (x, w, *e.parameters())}, {}
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in known: kept[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): e(x, index, w)
    assert sum(kept.values()) <= 1.3 * (T*K*h*4 + T*K*8 + T*4)   # pre-activations and plan, some padding

def test_benchmark_runs_and_writes_rows(tmp_path, monkeypatch):
    import json, pathlib, runpy
    script = pathlib.Path(__file__).parents[2] / 'benchmarks/experts.py'
    monkeypatch.setattr(sys, 'argv', [str(script), '--quick', '--shapes', 'C', '--routings', 'balanced', '--dtypes',
                                      'float32', '--threads', '1', '--json', str(tmp_path/'r.json')])
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): monkeypatch.setenv(name, '1')
    monkeypatch.setattr(sys, 'path', [*sys.path])
    threads = torch.get_num_threads()
    try: runpy.run_path(str(script), run_name='__main__')
    finally: torch.set_num_threads(threads)
    rows = json.loads((tmp_path/'r.json').read_text())
    assert {'shape', 'routing', 'dtype', 'mode', 'implementation', 'ratio', 'milliseconds'} <= set(rows[0])
    assert {'dense', 'loop', 'sorted', 'transformers_grouped'} <= {r['implementation'] for r in rows}

@pytest.mark.parametrize('gated, bias', [(False, False), (True, True)])
@pytest.mark.parametrize('o', [4, 24])
def test_output_size(gated, bias, o):
    "Widths that differ: every kernel, forth and back, with skipped choices and idle experts"
    torch.manual_seed(0)
    e = Experts(5, 8, 16, 'silu', gated, bias, kernel='loop', output_size=o)
    for p in e.parameters(): torch.nn.init.normal_(p, std=.3)
    x, index, w = torch.randn(40, 8), torch.randint(0, 6, (40, 3)), torch.randn(40, 3)
    index[index == 2] = 5                                  # expert 2 has no tokens, 5 is none
    def run(kernel):
        e.kernel = kernel
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        y = e(inputs[0], index, inputs[1])
        assert y.shape == (40, o)
        return [y, *torch.autograd.grad((y * torch.arange(o)).sum(), [*inputs, *e.parameters()])]
    want = run('loop')
    naive = sum(w[:, k, None] * torch.stack([ffn(x[t], *(None if p is None else p[i] for p in e.stacked), e.act, gated)
                                             if (i := index[t, k]) < 5 else torch.zeros(o) for t in range(40)])
                for k in range(3))
    torch.testing.assert_close(want[0], naive, atol=1e-5, rtol=1e-5)
    for kernel in ('sorted', 'grouped_mm'):
        for a, b in zip(run(kernel), want): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    f = FeedForward(8, 16, 'silu', gated, bias, output_size=o)
    assert f(x).shape == (40, o)

@pytest.mark.parametrize('N, dtype, capability, kernel',
                         [(66, torch.bfloat16, (9, 0), 'grouped_mm'), (66, torch.bfloat16, (7, 5), 'loop'),
                          (66, torch.float32, (9, 0), 'loop'), (8, torch.bfloat16, (9, 0), 'loop')])
def test_what_auto_takes_on_a_gpu(N, dtype, capability, kernel, monkeypatch):
    "Asked of a stand-in, since most machines that run the tests have none"
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    x = SimpleNamespace(dtype=dtype, device=torch.device('cuda', 0))
    assert auto_kernel(Experts(N, 64, 64), x) == kernel
