"""Routers one by one: choosing and its ties, the record, the bias, and what a router may never do."""
import math

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.func import functional_call

import naive
from libmoe_nb.moe.routers import (CosineRouter, ResidualRouter, Router, Routing, SigmoidRouter, SoftmaxRouter,
                               TernaryRouter, stable_topk,
                               tokens_per_expert, update_expert_bias)

close = torch.testing.assert_close
quick = settings(derandomize=True, deadline=None, max_examples=60, database=None)
ROUTERS = [SoftmaxRouter, SigmoidRouter, CosineRouter, TernaryRouter, ResidualRouter]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def router(cls, *args, seed=0, dtype=torch.float64, **kw):
    r = cls(*args, **kw).to(dtype)
    for i, p in enumerate(r.parameters()): p.data.copy_(rand(*p.shape, seed=seed + i))
    return r


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


@quick
@given(st.sampled_from([SoftmaxRouter, SigmoidRouter]),
       st.sampled_from([(8, 2, 1, 3), (8, 4, 2, 3), (12, 3, 2, 5), (6, 6, 3, 2), (6, 1, 1, 4)]), st.integers(0, 9))
def test_group_limited(cls, sizes, seed):
    M, n_group, topk_group, k = sizes
    r = router(cls, 5, M, k, seed=seed, n_group=n_group, topk_group=topk_group)
    x = rand(20, 5, seed=seed + 50, dtype=torch.float64)
    chosen = r(x).top_k_index
    for t, row in enumerate(x.tolist()):
        assert len({c // (M // n_group) for c in chosen[t].tolist()}) <= topk_group
        route = naive.route_softmax if cls is SoftmaxRouter else naive.route_sigmoid
        assert chosen[t].tolist() == route(dict(router=r.weight.tolist()), row, k,
                                           dict(n_group=n_group, topk_group=topk_group))[2]


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


# -- scores and weights -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('cls', ROUTERS)
@pytest.mark.parametrize('size', [1e-30, 1e-3, 1., 1e3, 1e12])
def test_numbers_of_any_size(cls, size):
    "Finite records and gradients from tiny to huge hidden states; weights in 0..1"
    r = router(cls, 8, 6, 3, dtype=torch.float32)
    x = (rand(2, 9, 8) * size).requires_grad_()
    out = r(x)
    for t in (out.router_logits, out.scores, out.top_k_weights): assert t.isfinite().all()
    assert (out.scores >= 0).all() and (out.top_k_weights >= 0).all() and (out.top_k_weights <= 1 + 1e-6).all()
    if cls is not TernaryRouter: close(out.top_k_weights.sum(-1), torch.ones(18))
    out.top_k_weights.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in r.parameters() if p.grad is not None)


def test_sigmoids_that_underflow():
    r = SigmoidRouter(2, 4, 2)
    r.weight.data.fill_(-1)
    out = r(torch.full((3, 2), 1e4))
    assert not out.top_k_weights.any() and out.top_k_index.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize('cls', [SoftmaxRouter, SigmoidRouter, ResidualRouter, TernaryRouter])
def test_unnormalised(cls):
    r = router(cls, 5, 6, 2, norm_topk_prob=False)(rand(9, 5, dtype=torch.float64))
    assert torch.equal(r.top_k_weights, r.scores.gather(-1, r.top_k_index))
    twice = router(cls, 5, 6, 2, norm_topk_prob=False, routed_scaling_factor=2.)(rand(9, 5, dtype=torch.float64))
    close(twice.top_k_weights, 2 * r.top_k_weights)


def test_ternary_weights_share_out_what_was_not_left_to_nulls():
    "w = p / S with S = chosen non-null + all null mass: the chosen and all null mass over S make 1"
    r = router(TernaryRouter, 5, 4, 3, null_offset=0.)(rand(200, 5, dtype=torch.float64))
    null, real = r.scores[:, 8:].sum(-1), r.top_k_index < 8
    S = (r.scores.gather(-1, r.top_k_index) * real).sum(-1) + null
    close((r.top_k_weights * real).sum(-1) + null / S, torch.ones(200, dtype=torch.float64))
    unchosen = real.all(-1)     # nulls that were not chosen take their share, too
    assert unchosen.any() and ((r.top_k_weights * real).sum(-1)[unchosen] < 1 - 1e-3).any() and (~real).any()


def test_cosine_router():
    r, x = router(CosineRouter, 12, 8, 3), rand(40, 12, dtype=torch.float64)
    assert r.proj.shape == (4, 12) and r.embeddings.shape == (8, 4) and CosineRouter(4, 66, 8).router_size == 33
    out = r(x)
    assert out.router_logits.abs().max() <= 5 + 1e-9
    close(r(1000 * x).scores, out.scores)
    r.embeddings.data *= torch.rand(8, 1) + .5                  # only directions count
    close(r(x).scores, out.scores)
    twice = router(CosineRouter, 12, 8, 3, double_softmax=True)(x)
    assert (torch.equal(twice.top_k_index, out.top_k_index)
            and (twice.top_k_weights[:, 0] / twice.top_k_weights[:, -1]).max() <= math.e)
    over = router(CosineRouter, 12, 8, 3, double_softmax='chosen')(x)
    close(over.scores, out.scores)
    close(over.top_k_weights, out.scores.gather(-1, out.top_k_index).softmax(-1))


@pytest.mark.parametrize('cls', ROUTERS)
def test_starting_weights(cls):
    torch.manual_seed(0)
    for std in (.02, .5):
        for p in cls(200, 60, 4, init_std=std).parameters():
            assert abs(p.std() / std - 1) < .1 and abs(p.mean()) < .1 * std
    torch.manual_seed(1); a = cls(8, 6, 2)
    torch.manual_seed(1); b = cls(8, 6, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('cls', ROUTERS)
def test_scores_are_float32_of_the_rounded_parameters(cls):
    low = cls(16, 6, 2, init_std=1.).bfloat16()
    x = rand(30, 16).bfloat16()
    out, exact = low(x), low.float()(x.float())
    for k in ('router_logits', 'scores', 'top_k_weights', 'top_k_index'):
        assert torch.equal(getattr(out, k), getattr(exact, k)), k


def test_a_choice_has_no_gradient_but_weights_have():
    "The gradient of the sum of renormalised weights is zero; of one weight it is not, and the left out get none of it"
    r, x = router(SoftmaxRouter, 4, 5, 2), rand(1, 4, dtype=torch.float64)
    assert r(x).top_k_weights.sum().requires_grad
    g, = torch.autograd.grad(r(x).top_k_weights.sum(), r.weight)
    assert g.abs().max() < 1e-12
    g, = torch.autograd.grad(r(x).top_k_weights[0, 0], r.weight)
    out = [i for i in range(5) if i not in r(x).top_k_index[0]]
    assert g[out].abs().max() < 1e-12 and g.abs().max() > 1e-3   # renormalised softmax: a softmax over the chosen alone


# -- the expert bias --------------------------------------------------------------------------------------------

def test_bias_update_by_hand():
    r = SoftmaxRouter(4, 4, 2, expert_bias=True)
    for load, want in [([10, 2, 4, 0], [-1, 1, 0, 1]), ([5, 5, 5, 5], [0, 0, 0, 0]), ([0, 0, 0, 1], [1, 1, 1, -1])]:
        before = r.expert_bias.clone()
        update_expert_bias(r, torch.tensor(load))
        close(r.expert_bias, before + .001 * torch.tensor(want, dtype=torch.float32), atol=1e-9, rtol=0)
    r.expert_bias.zero_(); update_expert_bias(r, torch.tensor([3., 1, 2, 2]), rate=.5)
    assert r.expert_bias.tolist() == [-.5, .5, 0, 0]
    with pytest.raises(ValueError, match='expert_bias=True'): update_expert_bias(SoftmaxRouter(4, 4, 2), torch.ones(4))


@pytest.mark.parametrize('cls', ROUTERS)
def test_bias_is_a_buffer_that_forward_never_writes(cls):
    r = router(cls, 4, 6, 2, expert_bias=True)
    assert ('expert_bias' in r.state_dict() and 'expert_bias' not in dict(r.named_parameters())
            and 'expert_bias' not in cls(4, 6, 2).state_dict())
    r.expert_bias.copy_(rand(len(r.expert_bias)))
    before = r.expert_bias.clone()
    for mode in (True, False): r.train(mode)(rand(50, 4, dtype=torch.float64)).top_k_weights.sum().backward()
    assert torch.equal(r.expert_bias, before) and r.expert_bias.grad is None


@pytest.mark.parametrize('cls', ROUTERS)
def test_bias_moves_choices_alone(cls):
    r, x = router(cls, 4, 6, 2, expert_bias=True), rand(50, 4, dtype=torch.float64)
    plain = r(x)
    M = plain.num_choices
    r.expert_bias[3] = 100
    out = r(x)
    assert ((out.top_k_index[:, 0] == 3).all() and torch.equal(out.scores, plain.scores)
            and torch.equal(out.router_logits, plain.router_logits))
    assert out.top_k_weights.max() <= 1 + 1e-9
    r.expert_bias.fill_(7.5)    # the same bias for all is none
    assert torch.equal(r(x).top_k_index, plain.top_k_index) and torch.equal(r(x).top_k_weights, plain.top_k_weights)
    f = lambda b: functional_call(r, dict(r.named_parameters(), expert_bias=b), (x,)).top_k_weights.sum()
    b = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(f(b), b, allow_unused=True)[0] is None


def test_bias_stays_precise_in_small_formats():
    for dtype in (torch.bfloat16, torch.float16):
        r = SigmoidRouter(4, 4, 2, expert_bias=True)
        r.expert_bias.copy_(torch.tensor([.7, -.7, .1234567, 0.]))
        before = r.expert_bias.clone()
        r = torch.nn.Sequential(r).to(dtype)[0]
        assert r.weight.dtype == dtype and torch.equal(r.expert_bias, before)
        for _ in range(100): update_expert_bias(r, torch.tensor([9., 0, 0, 0]))
        close(r.expert_bias, before + .1 * torch.tensor([-1., 1, 1, 1]), atol=1e-5, rtol=0)
    assert r.double().expert_bias.dtype == torch.float64


# -- refusals ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, says', [
    (lambda: SoftmaxRouter(8, 4, 5), 'top_k must be at most the 4 choices of the router, got 5'),
    (lambda: SoftmaxRouter(8, 6, 2, n_group=4), 'n_group must divide the 6 choices of the router, got 4'),
    (lambda: SoftmaxRouter(8, 6, 2, n_group=3, topk_group=4), 'topk_group'),
    (lambda: SoftmaxRouter(8, 6, 4, n_group=3, topk_group=1), 'leave at least top_k=4'),
    (lambda: CosineRouter(8, 4, 2, double_softmax='all'), "double_softmax must be False, True or 'chosen', got 'all'")])
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(')): make()


def test_a_router_needs_scores():
    with pytest.raises(NotImplementedError, match='Router must define score'): Router(4, 4, 2)(torch.zeros(1, 4))
