"The record, counting it, and a choice of the best that is the same every time."
import math

import pytest, torch
from hypothesis import given, strategies as st

import naive
from libmoe_nb.moe.routers import ResidualRouter, SoftmaxRouter, TernaryRouter
from libmoe_nb.moe.routing import Routing, stable_topk, tokens_per_expert
from random_layers import quick, rand, router

# -- choosing ---------------------------------------------------------------------------------------------------

few = st.sampled_from([0., -0., 1., -1., 1 + 2**-23, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf, .1])

@quick
@given(st.integers(1, 70).flatmap(lambda m: st.tuples(st.lists(st.lists(few, min_size=m, max_size=m), min_size=1,
                                                               max_size=3), st.integers(1, m))))
def test_top_k_is_a_stable_sort(case):
    rows, k = case
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor(rows, dtype=dtype)
        assert stable_topk(scores, k).tolist() == [naive.top(row, k) for row in scores.tolist()]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_top_k_of_every_dtype(dtype):
    scores = rand(40, 33).mul(3).round().to(dtype)
    assert stable_topk(scores, 7).tolist() == [naive.top(row, 7) for row in scores.tolist()]

def test_top_k_of_nan():
    "NaN of either sign comes first; indices stay in range and differ"
    nan = float('nan')
    for dtype in (torch.float32, torch.float64):
        s = torch.tensor([[1., nan, 2., -nan, math.inf], [nan] * 5, [-nan] * 5, [0., 1., 2., 3., -nan]], dtype=dtype)
        s[2] = -s[1]
        assert stable_topk(s, 3).tolist() == [[1, 3, 4], [0, 1, 2], [0, 1, 2], [4, 3, 2]]

def test_top_k_of_nothing(): assert stable_topk(torch.zeros(0, 5), 3).shape == (0, 3)

def test_ties_do_not_depend_on_the_batch():
    scores = rand(64, 66).mul(2).round()
    alone = torch.cat([stable_topk(row[None], 8) for row in scores])
    assert torch.equal(stable_topk(scores, 8), alone) and torch.equal(stable_topk(scores.repeat(50, 1), 8)[-64:], alone)

# -- the record -------------------------------------------------------------------------------------------------

@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_runs_of_a_ternary_record(N, K, seed):
    "Whatever was chosen: each expert runs at most once, with the signed sum of its weights"
    K = min(K, N)
    M, T = 2 * N + K, 12
    index = torch.stack([torch.randperm(M, generator=torch.Generator().manual_seed(seed * T + t))[:K]
                         for t in range(T)])
    e_of, sign = router(TernaryRouter, 3, N, K).choice_maps('cpu')
    r = Routing(torch.zeros(T, M), torch.zeros(T, M), index, rand(T, K, seed=seed).abs(), N, e_of, sign, (T,))
    e, w = r.expert_index, r.expert_weights
    for t in range(T):
        want = {}
        for c, v in zip(index[t].tolist(), r.top_k_weights[t].tolist()):
            if c < 2 * N: want[c % N] = want.get(c % N, 0.) + (v if c < N else -v)
        got = [(i, v) for i, v in zip(e[t].tolist(), w[t].tolist()) if i < N]
        assert len(got) == len(want) and dict(got) == pytest.approx(want, abs=1e-6)
        assert all(v == 0 for i, v in zip(e[t].tolist(), w[t].tolist()) if i == N)
    counts = [sum(any(c < 2 * N and c % N == i for c in index[t].tolist()) for t in range(T)) for i in range(N)]
    assert tokens_per_expert(r).tolist() == counts

@quick
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.data())
def test_counting(B, S, M, data):
    K = data.draw(st.integers(1, M))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * S, max_size=B * S))).view(B, S)
    r = SoftmaxRouter(4, M, K, init_std=1.)(rand(B, S, 4))
    real = [row for row, m in zip(r.top_k_index.tolist(), mask.flatten().tolist()) if m]
    assert tokens_per_expert(r, mask).tolist() == [sum(i in row for row in real) for i in range(M)]
    assert tokens_per_expert(r).sum() == B * S * K

def test_zero_computation_choices_are_no_experts():
    r = router(ResidualRouter, 4, 3, 2, num_zero_computation_experts=2)(rand(50, 4, dtype=torch.float64))
    e = r.expert_index
    assert (torch.equal(e, r.top_k_index.clamp(max=3)) and (e == 3).any()
            and torch.equal(r.expert_weights, r.top_k_weights))
    assert torch.equal(tokens_per_expert(r), tokens_per_expert(r, choices=True)[:3])
