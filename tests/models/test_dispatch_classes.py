"transformers' mixtures run by our kernel in each dtype and situation, against their own loop"
import sys, types
import pytest, torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.models import dispatch

KINDS = ('mixtral olmoe qwen3_moe deepseek_v3 gpt_oss nemotron_h glm4_moe phimoe granitemoe ernie4_5_moe aria_text '
         'jamba').split()

@pytest.fixture(scope='module', params=KINDS)
def experts(request):
    "The experts of one layer: gates and none, biases, transposed, interleaved, each with its class's own `eager`"
    model = tiny_moe(request.param)
    return next(m for m in model.modules() if hasattr(m, 'has_gate') and hasattr(m, 'down_proj'))

def inputs(m, T, dtype, K=3, seed=0):
    g, d = torch.Generator().manual_seed(seed), m.down_proj.shape[-1 if m.is_transposed else 1]
    w = torch.rand(T, K, generator=g).to(dtype)
    return torch.randn(T, d, generator=g).to(dtype), torch.rand(T, len(m.down_proj), generator=g).topk(K)[1], w

def run(m, how, x, index, w, train=True):
    "Output and gradients, by name"
    m.config._experts_implementation_internal = how
    m.zero_grad()
    if not train:
        with torch.no_grad(): return dict(y=m(x, index, w))
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = m(x, index, w)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return dict(y=y.detach(), x=x.grad, w=w.grad) | {n: p.grad.clone() for n, p in m.named_parameters()}

def same(got, want, tol):
    assert got.keys() == want.keys()
    for n, b in want.items():
        a = got[n]
        assert a.dtype == b.dtype and a.shape == b.shape, n
        floor = .2 * b.numel()**.5 if tol > 1e-3 else 1e-3          # bfloat16: sums of terms of order one may cancel
        assert (a.double() - b.double()).norm() <= tol * (b.double().norm() + floor), n

@pytest.fixture
def kernel(monkeypatch):
    "The calls of our kernel"
    calls, original = [], dispatch.sorted_kernel
    monkeypatch.setattr(dispatch, 'sorted_kernel', lambda *a: calls.append(a) or original(*a))
    return calls

@pytest.mark.parametrize('T', [1, 5, 60])
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=['float32', 'bfloat16'])
def test_as_eager_in_training_and_inference(experts, kernel, T, dtype, tol):
    m = experts.to(dtype)
    args = inputs(m, T, dtype)
    for train in (True, False): same(run(m, 'libmoe', *args, train), run(m, 'eager', *args, train), tol)
    if T >= 60: assert len(kernel) == 2

@pytest.mark.parametrize('T', [1, 4, 90])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_absent_experts_add_nothing(experts, T, dtype):
    m = experts.to(dtype)
    x, index, w = inputs(m, T, dtype)
    index[::2, 1] = m.num_experts          # as expert parallelism marks those of other processes
    zero = w.clone(); zero[::2, 1] = 0
    present = index.clone(); present[::2, 1] = 0
    for train in (True, False):
        got, want = run(m, 'libmoe', x, index, w, train), run(m, 'libmoe', x, present, zero, train)
        if train: assert not got['w'][::2, 1].any(); want['w'][::2, 1] = 0
        same(got, want, 1e-5 if dtype == torch.float32 else 2e-2)
    assert not run(m, 'libmoe', x, torch.full_like(index, m.num_experts), w, False)['y'].any()

def test_sentinels_as_grouped_mm_under_expert_parallelism(experts):
    m = experts.float()
    x, index, w = inputs(m, 90, torch.float32)
    index[1::3, 0] = m.num_experts; w[1::3, 0] = 0
    m._is_expert_parallel = True
    try: same(run(m, 'libmoe', x, index, w), run(m, 'grouped_mm', x, index, w), 1e-5)
    finally: m._is_expert_parallel = False

def test_no_tokens(experts):
    m = experts.float()
    x, index, w = inputs(m, 0, torch.float32)
    assert run(m, 'libmoe', x, index, w, False)['y'].shape == x.shape

def test_frozen_experts_and_adapters_get_only_the_gradients_that_are_wanted(experts):
    m = experts.float()
    x, index, w = inputs(m, 60, torch.float32)
    m.down_proj.requires_grad_(False)
    try:
        for how in ('eager', 'libmoe'):
            m.config._experts_implementation_internal = how; m.zero_grad()
            m(x, index, w).sum().backward()
            assert {n for n, p in m.named_parameters() if p.grad is None} == {'down_proj'}
    finally: m.down_proj.requires_grad_()

def test_few_tokens_are_grouped_mm_s_unless_sizes_are_odd(kernel):
    for hidden, calls in ((32, 0), (33, 1)):                        # grouped_mm wants rows of whole 16 bytes
        m = next(m for m in tiny_moe('mixtral', hidden_size=hidden, head_dim=8).modules() if hasattr(m, 'down_proj'))
        args = inputs(m, 5, torch.float32)
        same(run(m, 'libmoe', *args), run(m, 'eager', *args), 1e-5)
        assert len(kernel) == calls

def test_in_half_precision_two_tokens_an_expert_are_ours(kernel):
    m = next(m for m in tiny_moe('mixtral', hidden_size=32, intermediate_size=16, head_dim=8).modules()
             if hasattr(m, 'down_proj')).to(torch.bfloat16)
    for more, calls in ((-1, 0), (0, 1)):                           # each token goes to two experts
        args = inputs(m, m.num_experts + more, torch.bfloat16, K=2)
        same(run(m, 'libmoe', *args), run(m, 'eager', *args), 2e-2)
        assert len(kernel) == calls

def test_loaded_by_name(tmp_path):
    model = tiny_moe('qwen3_moe')
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation='libmoe')
    assert loaded.config._experts_implementation == 'libmoe'
    ids = torch.arange(1, 9)[None]
    with torch.no_grad(): torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    out = loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.tolist() == model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()

def test_autocast_as_eager():
    model, ids = tiny_moe('mixtral'), torch.arange(1, 61)[None]
    logits = []
    for how in ('eager', 'libmoe'):
        model.set_experts_implementation(how)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): logits.append(model(ids).logits.float())
    assert (logits[0] - logits[1]).norm() < .03 * logits[0].norm()

def test_an_old_transformers_is_told_of_kindly(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers.integrations.moe', types.ModuleType('moe'))
    monkeypatch.setattr(dispatch.transformers, '__version__', '4.57.0')
    words = 'needs transformers 5.16 or later.* got 4.57.0: pip install'
    with pytest.raises(ImportError, match=words): dispatch._registry()

def test_the_name_is_in_the_registry(): assert ALL_EXPERTS_FUNCTIONS['libmoe'] is dispatch.libmoe_experts
