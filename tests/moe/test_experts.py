"Experts: what they are made of, what they refuse, and those that compute nothing"
import copy, pickle

import pytest, torch

import libmoe_nb.moe.kernels  # noqa: F401  (registers the fast ones)
from libmoe_nb.moe.experts import Experts, FeedForward, ZeroComputationExperts, auto_kernel, kernels, register_kernel
from processes import run_forked
from random_layers import build, choices, tolerances

COMPILED = """
import torch
from random_layers import build, choices
e, (index, w) = build(), choices(10, 4, 2)
lin = torch.nn.Linear(16, 16)
f = lambda x: e(lin(x).relu(), index, w) * 2
x, graphs = torch.randn(10, 16, requires_grad=True), []
def backend(graph, example):
    graphs.append(graph)
    return graph
y = torch.compile(f, backend=backend)(x)
torch.testing.assert_close(y, f(x))
y.sum().backward()
assert len(graphs) == 2 and x.grad.abs().sum() > 0   # what is before the experts and what is behind them
print('went around')
"""

def test_compile_goes_around():
    assert 'went around' in run_forked(COMPILED).stdout    # other tests of this process may have compiled before

def test_copies_pickles_and_meta():
    e = build(act='gelu_pytorch_tanh', bias=True)
    x, (index, w) = torch.randn(9, 16), choices(9, 4, 2)
    for other in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert torch.equal(other(x, index, w), e(x, index, w))
    with torch.device('meta'): m = Experts(66, 512, 128)
    assert m.up_proj.is_meta and sum(p.numel() for p in m.parameters()) == 66 * 2 * 512 * 128

def test_initialisation_comes_from_the_generator():
    make = lambda: Experts(8, 64, 32, gated=True)
    a, b = make(), make()
    for e in (a, b): e.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(a.gate_up_proj, b.gate_up_proj) and torch.equal(a.down_proj, b.down_proj)
    assert abs(a.gate_up_proj.std() * 64**.5 - 1) < .05 and abs(a.down_proj.std() * 32**.5 - 1) < .05
    a.reset_parameters(up_std=.02, down_std=.01)
    assert abs(a.gate_up_proj.std() / .02 - 1) < .05 and abs(a.down_proj.std() / .01 - 1) < .05
    for m in (a, FeedForward(64, 32, gated=True)):
        m.reset_parameters(down_std=0.)
        assert (not next(p for n, p in m.named_parameters() if 'down_proj' in n).any()
                and all(p.any() for n, p in m.named_parameters() if 'gate_up' in n))
        m.reset_parameters(up_std=0.)
        assert (not next(p for n, p in m.named_parameters() if 'gate_up' in n).any()
                and all(p.any() for n, p in m.named_parameters() if 'down' in n))

def test_bad_arguments():
    e, x, (index, w) = build(), torch.randn(9, 16), choices(9, 4, 2)
    for call, words in [(lambda: Experts(4, 16, 8, 'rleu'), 'hidden_act must be a function or one of '),
                       (lambda: Experts(4, 16, 8, kernel='x'), "kernel must be 'auto' or one of 'loop'"),
                       (lambda: Experts(4, 0, 8), 'hidden_size must be a whole number of at least 1, got 0'),
                       (lambda: e(x[None], index, w), r'hidden_states must be of shape \[tokens, 16\], got shape'),
                       (lambda: e(x, index[:3], w), r'expert_index must be integers of shape \[9, top_k\], got shape'),
                       (lambda: e(x, index.float(), w), r'expert_index must be integers .* dtype torch.float32'),
                       (lambda: e(x, index - 1, w), 'expert_index must be 0 to 4, where 4 means no expert, got -1'),
                       (lambda: e(x, index, w[:, :1]), 'weights must be of the shape of expert_index'),
                       (lambda: e(x.bfloat16(), index, w), 'hidden_states must be of the dtype of .* torch.bfloat16')]:
        with pytest.raises(ValueError, match=words): call()
    e.kernel = 'nothing'
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of .* got 'nothing'"): e(x, index, w)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_zero_computation_experts_equal_their_formula(dtype):
    z, x = ZeroComputationExperts(8, num_zero=1, num_copy=2, num_constant=3).to(dtype), torch.randn(20, 8).to(dtype)
    w = torch.rand(20, 6) * (torch.rand(20, 6) < .5)
    want = torch.zeros(20, 8)
    for t in range(20):
        for c in (1, 2): want[t] += w[t, c] * x[t].float()
        for c in range(3):
            a = (z.constant_gate[c].float() @ x[t].float()).softmax(0)
            want[t] += w[t, 3+c] * (a[0] * x[t].float() + a[1] * z.constant[c].float())
    got = z(x, w)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=tolerances[dtype], atol=tolerances[dtype])

def test_zero_computation_gradcheck_and_empty():
    z = ZeroComputationExperts(4, 1, 1, 2).double()
    x, w = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
           torch.rand(5, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(z, (x, w))
    assert z(x[:0], w[:0]).shape == (0, 4)
    assert ZeroComputationExperts(4, 2, 0, 0)(torch.randn(3, 4), torch.rand(3, 2)).abs().sum() == 0

def test_the_kernel_registered_last_wins_where_its_rule_holds():
    e, x = build(), torch.randn(5, 16)
    assert auto_kernel(e, x) == 'sorted'
    @register_kernel('mine', rule=lambda experts, hidden_states: len(hidden_states) < 4)
    def mine(experts, hidden_states, expert_index, weights): return hidden_states * 0
    try:
        assert [auto_kernel(e, x[:n]) for n in (3, 5)] == ['mine', 'sorted']
        assert not e(x[:3], *choices(3, 4, 2)).any()
        register_kernel('mine')(mine)                         # without a rule it is taken by name alone
        assert auto_kernel(e, x[:3]) == 'sorted'
    finally: kernels.pop('mine')
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of"): Experts(4, 16, 8, kernel='mine')

def test_without_fast_kernels_there_is_the_loop():
    "`experts` alone knows one kernel, and imports no other"
    code = ('import sys, torch\nfrom libmoe_nb.moe.experts import Experts, auto_kernel, kernels\n'
            'assert "libmoe_nb.moe.kernels" not in sys.modules\n'
            'e, x = Experts(4, 8, 8), torch.randn(3, 8)\nprint(list(kernels), auto_kernel(e, x))\n'
            'e(x, torch.tensor([[0], [1], [4]]), torch.ones(3, 1))\n'
            'import libmoe_nb.moe.layers\nprint(list(kernels), auto_kernel(e, x))')
    said = run_forked(code)
    with_ours = "['loop', 'sorted', 'grouped_mm', 'fused'] sorted"
    assert said.stdout.splitlines() == ["['loop'] loop", with_ours], said.stderr
