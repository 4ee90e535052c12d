"""Routers one by one: scores and weights, groups, the bias, and what a router may never do."""
import math

import pytest, torch
from hypothesis import given, strategies as st
from torch.func import functional_call

import naive
from libmoe_nb.moe.routers import (CosineRouter, ResidualRouter, Router, SigmoidRouter, SoftmaxRouter, TernaryRouter,
                                   update_expert_bias)
from random_layers import quick, rand, router

close = torch.testing.assert_close
ROUTERS = [SoftmaxRouter, SigmoidRouter, CosineRouter, TernaryRouter, ResidualRouter]


# -- choosing ---------------------------------------------------------------------------------------------------


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
    (lambda: SoftmaxRouter(8, 6, 2, n_group=4), 'n_group must be a divisor of the 6 choices of the router, got 4'),
    (lambda: SoftmaxRouter(8, 6, 2, n_group=3, topk_group=4), 'topk_group'),
    (lambda: SoftmaxRouter(8, 6, 4, n_group=3, topk_group=1), 'leave at least top_k=4'),
    (lambda: CosineRouter(8, 4, 2, double_softmax='all'), "double_softmax must be False, True or 'chosen', got 'all'")])
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(')): make()


def test_a_router_needs_scores():
    with pytest.raises(NotImplementedError, match='Router must define score'): Router(4, 4, 2)(torch.zeros(1, 4))
