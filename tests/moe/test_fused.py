"The fused kernel where it could break: builds that fail, meet or are damaged, other processors, borrowed experts."
import copy, os, pickle, subprocess, sys, types
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from libmoe_nb.moe import fused
from libmoe_nb.moe.experts import Experts, auto_kernel, kernels

def python(code, **env):
    return subprocess.Popen([sys.executable, '-c', code], env=os.environ | env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

def said(process): return (*process.communicate(), process.returncode)

LAYER = '''
import torch
from libmoe_nb.moe.layers import *
from libmoe_nb.moe.experts import Experts, auto_kernel
experts, x = Experts(4, 8, 16), torch.ones(5, 8)
print(auto_kernel(experts, x), experts(x, torch.zeros(5, 1, dtype=int), torch.ones(5, 1)).shape)
'''

WARNING = 'UserWarning: the fused kernel could not be built'

@pytest.fixture
def back(monkeypatch):
    "What this process decided is forgotten after the test"
    monkeypatch.setattr(fused, '_state', {})

def exact(experts, kernel, x, index, w):
    experts.kernel = kernel
    experts.zero_grad()
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = experts(x, index, w)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), x.grad, w.grad, *(p.grad.clone() for p in experts.parameters())]

def close(ours, reference, eps):
    for a, b in zip(ours, reference, strict=True): assert (a - b).norm() <= eps * b.norm() + 1e-12

@pytest.fixture(scope='module')
def built():
    if not fused._built(): pytest.skip('no C++ compiler here')
    return fused._find()

def test_without_a_compiler_the_sorted_kernel_goes_on(tmp_path):
    out, err, code = said(python(LAYER, CXX='/no/such/compiler', LIBMOE_CACHE=str(tmp_path), LIBMOE_FUSED='1',
                                 PYTHONWARNINGS='default'))
    assert code == 0 and out == 'sorted torch.Size([5, 8])\n'
    assert err.count(WARNING) == 1 and '/no/such/compiler: not found' in err and 'libmoe-nb[fused]' in err
    assert not list(tmp_path.rglob('*.so'))

def test_where_nothing_can_be_written(built, tmp_path):
    "The sorted kernel goes on, and one that lies there is used"
    (file := tmp_path/'file').write_text('')
    out, err, code = said(python(LAYER, LIBMOE_CACHE=str(file), LIBMOE_FUSED='1', PYTHONWARNINGS='default'))
    assert code == 0 and out == 'sorted torch.Size([5, 8])\n' and err.count(WARNING) == 1
    (folder := tmp_path/'fused').mkdir()
    (folder/built.name).write_bytes(built.read_bytes())
    (folder/'.lock').mkdir()                    # it cannot be locked either
    assert said(python(LAYER, LIBMOE_CACHE=str(tmp_path), LIBMOE_FUSED='1')) == ('fused torch.Size([5, 8])\n', '', 0)

def test_threads_that_ask_at_once(built):
    code = ('from concurrent.futures import ThreadPoolExecutor\nfrom libmoe_nb.moe import fused\n'
            'with ThreadPoolExecutor(8) as pool: print({*pool.map(lambda i: fused.use_fused(), range(8))})')
    assert said(python(code)) == ('{True}\n', '', 0)

def test_without_onednn_for_a_while(built):
    both_precisions()
    with torch.backends.mkldnn.flags(enabled=False): both_precisions()

def test_ids_that_no_expert_has(built):
    e = Experts(3, 4, 4)
    borrowed = types.SimpleNamespace(kernel='fused', stacked=e.stacked, gated=False, act=e.act)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f'expert_index must be 0 to 3, got {wrong}'):
            fused.fused_kernel(borrowed, torch.ones(2, 4), torch.full((2, 1), wrong), torch.ones(2, 1))

def test_a_copy_is_as_fast():
    for act in fused._acts: assert copy.deepcopy(act) in fused._acts and pickle.loads(pickle.dumps(act)) in fused._acts

def test_nobody_builds_unasked(tmp_path):
    out, err, code = said(python(LAYER, LIBMOE_CACHE=str(tmp_path)))
    assert (out, err, code) == ('sorted torch.Size([5, 8])\n', '', 0) and not list(tmp_path.iterdir())

def test_a_command_takes_it(built):
    out, err, code = said(python(LAYER, LIBMOE_FUSED='1'))
    assert (out, err, code) == ('fused torch.Size([5, 8])\n', '', 0)

@pytest.mark.long
def test_builds_that_meet_where_a_damaged_one_lies(built, tmp_path):
    (folder := tmp_path/'fused').mkdir()
    (folder/built.name).write_bytes(built.read_bytes()[:5000])
    env = dict(LIBMOE_CACHE=str(tmp_path), LIBMOE_FUSED='1')
    for out, err, code in [said(p) for p in [python(LAYER, **env) for _ in range(2)]]:
        assert (out, err, code) == ('fused torch.Size([5, 8])\n', '', 0)
    assert len(found := list(folder.glob('*'))) == 2 + ('.lock' in {f.name for f in found})  # one was built
    assert {f.name[:16] for f in folder.glob('*.so')} == {built.name[:16]}
    assert said(python(LAYER, **env | dict(CXX='/no/such/compiler'))) == ('fused torch.Size([5, 8])\n', '', 0)

@pytest.mark.parametrize('isa', ['AVX2', 'AVX512_CORE'])
def test_products_without_pairs(built, isa):
    "oneDNN told to do without what it finds: bfloat16 is then multiplied as it is"
    code = ('import sys; sys.path[:0] = ["tests/moe", "tests"]; import test_fused as t, torch\n'
            'assert t.fused.use_fused(); t.both_precisions()')
    assert said(python(code, ONEDNN_MAX_CPU_ISA=isa))[1:] == ('', 0)

def both_precisions():
    torch.manual_seed(0)
    for dtype, eps in {torch.float32: 1e-5, torch.bfloat16: 2e-2}.items():
        experts = Experts(6, 32, 24, 'silu', gated=True, bias=True).to(dtype)
        x, index, w = torch.randn(130, 32).to(dtype), torch.rand(130, 7).topk(3).indices, torch.rand(130, 3)
        reference = exact(experts.double(), 'loop', x.double(), index, w.double())
        close(exact(experts.to(dtype), 'fused', x, index, w), reference, eps)

def test_products_with_pairs(built): both_precisions()

def test_auto_asks_whether_it_pays(built, back, monkeypatch):
    calls = []
    monkeypatch.setattr(fused._Fused, 'apply', lambda x, *args: calls.append(len(x)) or x)
    fused.use_fused()
    def run(T, N=4, d=8, kernel='auto'):
        Experts(N, d, 2*d, kernel=kernel)(torch.ones(T, d), torch.zeros(T, 2, dtype=int), torch.ones(T, 2))
    run(256); run(255); run(255, kernel='fused')
    assert calls == [256, 255]
    run(128, 2, 1025)                            # 2 · 1025 · 1025 numbers are too many, 2 · 1024 · 1024 are not
    run(128, 2, 1024)
    assert calls == [256, 255, 128]

def test_where_it_gives_way(built, back):
    "Activations of one's own, half and double precision, odd sizes: the sorted kernel, to the bit"
    x, index, w = torch.randn(20, 6), torch.rand(20, 5).topk(2).indices, torch.rand(20, 2)
    for dtype, act, h in [(torch.float32, lambda v: v.cos(), 8), (torch.float64, 'relu', 8), (torch.float16, 'relu', 8),
                          (torch.bfloat16, 'relu', 7), (torch.float32, 'relu2', 8)]:
        experts = Experts(5, 6, h, act).to(dtype)
        given = x.to(dtype), index, w.to(dtype)
        for a, b in zip(exact(experts, 'fused', *given), exact(experts, 'sorted', *given)): assert torch.equal(a, b)

@pytest.mark.parametrize('frozen', ['none', 'all', 'up', 'x'])
def test_only_what_is_wanted_gets_a_gradient(built, frozen):
    experts, x = Experts(5, 8, 12, 'gelu', bias=True, kernel='fused'), torch.randn(30, 8)
    index, w = torch.rand(30, 5).topk(2).indices, torch.rand(30, 2)
    for name, p in experts.named_parameters(): p.requires_grad_(frozen not in ('all', name.split('_')[0]))
    x.requires_grad_(frozen != 'x')
    y = experts(x, index, w.requires_grad_())
    assert torch.equal(y.detach(), experts(x.detach(), index, w.detach()))  # kept for a pass backward or not
    y.sum().backward()
    for p in (x, *experts.parameters()): assert (p.grad is not None) == p.requires_grad

@pytest.mark.parametrize('index', [torch.int32, torch.uint8])
def test_any_integers_and_strides(built, index):
    experts, w = Experts(5, 8, 12), torch.rand(2, 30).T
    x, e = torch.randn(8, 30).T, torch.rand(30, 5).topk(2).indices.to(index)
    close(exact(experts, 'fused', x, e, w), exact(experts, 'loop', x, e, w), 1e-5)

def test_autocast_and_threads(built):
    experts, x = Experts(5, 8, 12), torch.randn(40, 8)
    index, w = torch.rand(40, 5).topk(2).indices, torch.rand(40, 2)
    reference = exact(experts, 'loop', x, index, w)
    with torch.autocast('cpu', torch.bfloat16): close(exact(experts, 'fused', x, index, w), reference, 2e-2)
    with ThreadPoolExecutor(4) as pool:  # buffers belong to a thread
        layers = [Experts(5, 8, 12, kernel='fused') for _ in range(8)]
        ys = list(pool.map(lambda l: torch.stack([l(x, index, w).detach() for _ in range(20)]), layers))
    for l, y in zip(layers, ys):
        assert (y == y[0]).all() and torch.allclose(y[0], kernels['loop'](l, x, index, w), atol=1e-5)

@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe', 'nemotron_h', 'gpt_oss'])
@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_experts_of_transformers(built, back, monkeypatch, kind, dtype, tol):
    from libmoe_nb.analysis.tiny_models import tiny_moe
    from test_dispatch_classes import inputs, run, same
    calls, apply = [], fused._Fused.apply
    monkeypatch.setattr(fused._Fused, 'apply', lambda *args: calls.append(args) or apply(*args))
    fused.use_fused()
    m = next(m for m in tiny_moe(kind).modules() if hasattr(m, 'has_gate') and hasattr(m, 'down_proj')).to(dtype)
    args = inputs(m, 128 * len(m.down_proj) // 3 + 1, dtype)
    for train in (True, False): same(run(m, 'libmoe', *args, train), run(m, 'eager', *args, train), tol)
    usual = kind in ('mixtral', 'qwen3_moe')     # the others have a gate or an activation of their own
    assert len(calls) == 2 * usual

def test_training_with_it(built, back):
    "A model trains to the same losses, up to rounding"
    from libmoe_nb.models.causal import from_scratch
    def losses():
        torch.manual_seed(0)
        model = from_scratch('moe_plus_plus', 'tiny', vocab_size=64)
        ids, o = torch.randint(64, (4, 32)), torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward(); o.step(); o.zero_grad()
            yield loss.item()
    before = list(losses())
    assert fused.use_fused() and auto_kernel(Experts(2, 4, 4), torch.ones(1, 4)) == 'fused'
    assert before == pytest.approx(list(losses()), rel=1e-4) and before[-1] < before[0]
