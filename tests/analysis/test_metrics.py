"""Metrics: symmetries, ranges, and plain loops written from the formulas."""
import math
from dataclasses import replace
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from libmoe_nb.analysis.metrics import *
from libmoe_nb.analysis.metrics import random_trace
from libmoe_nb.analysis.traces import make_trace

sizes = st.tuples(st.integers(1, 40), st.integers(2, 9), st.integers(1, 4),
                  st.integers(0, 10**6)).filter(lambda s: s[2] < s[1])
quick = settings(max_examples=40, deadline=None)


def traces(size, n=2):
    T, N, K, seed = size
    g = np.random.default_rng(seed)
    token, domain = g.integers(0, 5, T), g.integers(0, 3, T)
    return [random_trace(T, N, K, seed=seed + i, token=token, domain=domain, domains=['a', 'b', 'c']) for i in range(n)]


def relabelled(t, perm, order=None):
    order = np.arange(t.num_tokens) if order is None else order
    return make_trace(perm[np.asarray(t.choice)][:, order], t.meta['num_experts'][0], t.meta['top_k'][0],
                      np.asarray(t.weight)[:, order], np.asarray(t.score)[:, order],
                      token=t.token[order], domain=t.domain[order], domains=t.domains)


@quick
@given(sizes)
def test_identical_checkpoints(size):
    t, _ = traces(size)
    for by in ('token', 'vocabulary'):
        for units in ('experts', 'choices'):
            assert expert_change_rate(t, t, units, by).change_rate.eq(0).all()
            assert router_saturation(t, t, units=units, by=by).saturation.eq(1).all()


@quick
@given(sizes)
def test_order_of_tokens_and_names_of_experts_do_not_matter(size):
    a, b = traces(size)
    g = np.random.default_rng(size[3])
    perm, order = g.permutation(size[1]), g.permutation(size[0])
    a2, b2 = relabelled(a, perm, order), relabelled(b, perm, order)
    assert np.isclose(expert_change_rate(a, b).change_rate[0], expert_change_rate(a2, b2).change_rate[0])
    assert np.allclose(router_saturation(a, b).saturation, router_saturation(a2, b2).saturation)
    for f in (expert_allocation_entropy, expert_weight_entropy):
        assert np.allclose(f(a).entropy, f(a2).entropy, atol=1e-6, equal_nan=True)
    assert np.allclose(router_margin(a, by_domain=True).margin, router_margin(a2, by_domain=True).margin, atol=1e-6)
    for c in ('max_over_mean', 'cv'): assert np.allclose(load_imbalance(a)[c], load_imbalance(a2)[c])
    assert (dead_experts(a).dead == dead_experts(a2).dead).all()
    s, s2 = (selection_ratio(x).set_index(['layer', 'expert']).ratio for x in (a, a2))
    assert all(np.isclose(s[l, e], s2[l, perm[e]]) for l, e in s.index)
    c, c2 = (co_activation(x).set_index(['layer', 'expert', 'other']).co_activation for x in (a, a2))
    assert all(np.isclose(c[l, i, j], c2[l, perm[i], perm[j]], equal_nan=True) for l, i, j in c.index)
    d, d2 = (domain_specialisation(x).set_index(['layer', 'expert', 'domain']).share for x in (a, a2))
    assert all(np.isclose(d[l, e, n], d2[l, perm[e], n]) for l, e, n in d.index)


@quick
@given(sizes)
def test_against_plain_loops(size):
    a, b = traces(size)
    T, N, K, _ = size
    A, B = (np.asarray(x.choice)[..., :K] for x in (a, b))
    assert np.isclose(expert_change_rate(a, b).change_rate[0],
                      np.mean([len(set(x) - set(y)) / K for l in range(2) for x, y in zip(A[l], B[l])]))
    for _, r in router_saturation(a, b).iterrows():
        assert np.isclose(r.saturation,
                          np.mean([len(set(x[:r.k]) & set(y[:r.k])) / r.k for x, y in zip(A[r.layer], B[r.layer])]))
    for _, r in expert_allocation_entropy(a).iterrows():
        n = [sum(e in x for x in A[r.layer][a.domain == 'abc'.index(r.domain)]) for e in range(N)]
        assert np.isclose(r.entropy, -sum(c / sum(n) * math.log(c / sum(n)) for c in n if c) / math.log(N))
    for _, r in vocabulary_specialisation(a, top=None, min_count=1).iterrows():
        mine = [r.expert in x for x, v in zip(A[r.layer], a.token) if v == r.token]
        assert np.isclose(r.share, np.mean(mine)) and r.tokens == len(mine)
        overall = np.mean([r.expert in x for x in A[r.layer]])
        assert np.isclose(r.lift, r.share / overall) if overall else np.isnan(r.lift)
    v, rate = sorted(set(a.token)), []
    for l in range(2):
        best = [[sorted(range(N), key=lambda e: (-sum((x == e).sum() for x, i in zip(X[l], a.token) if i == w), e))[:K]
                 for w in v] for X in (A, B)]
        rate += [len(set(x) - set(y)) / K for x, y in zip(*best)]
    assert np.isclose(expert_change_rate(a, b, by='vocabulary').change_rate[0], np.mean(rate))
    for k in range(1, K + 1):   # all K choices of an entry are counted, and the k most frequent kept
        for l, s in enumerate(router_saturation(a, b, k=k, by='vocabulary').saturation):
            best = [[sorted(range(N), key=lambda e: (-sum((x == e).sum() for x, i in zip(X[l], a.token) if i == w),
                                                     e))[:k] for w in v] for X in (A, B)]
            assert np.isclose(s, np.mean([len(set(x) & set(y)) / k for x, y in zip(*best)]))


def test_saturation_by_vocabulary_is_the_authors_example():
    early, late = (make_trace([c], 4, 2, token=[7, 7, 7]) for c in ([[0, 2], [0, 2], [1, 2]], [[2, 0], [2, 1], [2, 3]]))
    assert router_saturation(early, late, k=1, by='vocabulary').saturation.tolist() == [1]
    assert router_saturation(early, late, k=1).saturation.tolist() == [0]


@quick
@given(sizes)
def test_ranges(size):
    a, b = traces(size)
    T, N, K, _ = size
    assert (expert_change_rate(a, b).change_rate.between(0, 1).all()
            and router_saturation(a, b).saturation.between(0, 1).all())
    assert (expert_allocation_entropy(a).entropy.between(0, 1 + 1e-9).all()
            and expert_weight_entropy(a).entropy.dropna().between(0, 1 + 1e-6).all())
    assert (router_margin(a).margin.dropna().between(0, 1).all()
            and co_activation(a).co_activation.dropna().between(0, 1).all())
    assert (load_imbalance(a).max_over_mean.between(1 - 1e-9, N / K + 1e-9).all()
            and load_imbalance(a).cv.between(0, math.sqrt(N)).all())
    assert np.allclose(selection_ratio(a).groupby('layer').ratio.sum(), K)
    own = co_activation(a).groupby(['layer', 'expert']).co_activation.sum(min_count=1).dropna()
    assert np.allclose(own, K - 1)


@pytest.mark.parametrize('N,K', [(8, 2), (16, 4), (66, 8)])
def test_reference_values_of_random_routing(N, K):
    a, b = (random_trace(8000, N, K, num_layers=2, seed=s) for s in (0, 1))
    assert abs(expert_change_rate(a, b).change_rate[0] - (1 - K / N)) < .01
    for k, v in router_saturation(a, b).groupby('k').saturation.mean().items(): assert abs(v - k / N) < .01
    e = expert_allocation_entropy(a).entropy
    assert e.between(1 - (N - 1) / (8000 * K * math.log(N)), 1).all()
    assert abs(router_margin(a).margin - 1 / N).max() < .01
    assert abs(expert_weight_entropy(a).entropy - (sum(1 / i for i in range(2, K + 1))) / math.log(K)).max() < .01
    assert abs(co_activation(a).co_activation.mean() - (K - 1) / (N - 1)) < 1e-3
    assert abs(load_imbalance(a).cv.mean() - math.sqrt((N - K) / (K * 8000))) < .006
    assert dead_experts(a).dead.eq(0).all()


def test_collapse():
    t = make_trace(np.zeros((1, 50, 1), int), num_experts=4, top_k=1)
    assert expert_allocation_entropy(t).entropy[0] == 0 and load_imbalance(t).max_over_mean[0] == 4
    assert dead_experts(t).experts[0] == (1, 2, 3) and abs(load_imbalance(t).cv[0] - 3 ** .5) < 1e-9


def test_units_of_ternary_routing():
    "Two positives and a null: nothing is counted that runs no expert, and an expert chosen twice has the token once"
    t = make_trace([[[0, 2, 4], [1, 5, 4]]], num_experts=2, top_k=3, expert_of=[0, 1, 0, 1, 2, 2, 2],
                   sign_of=[1, 1, -1, -1, 1, 1, 1])
    s = selection_ratio(t)
    assert s.ratio.tolist() == [.5, .5] and s.N.eq(2).all()
    assert selection_ratio(t, units='choices').ratio.tolist() == [.5, .5, .5, 0, 1, .5, 0]
    assert expert_allocation_entropy(t, units='choices').N[0] == 7
    assert co_activation(t).co_activation.tolist() == [0, 0]


def test_bad_arguments():
    a, b = random_trace(10, seed=0), random_trace(11, seed=0)
    with pytest.raises(ValueError, match='tokens of a: 10 there, 11 here'): expert_change_rate(a, b)
    with pytest.raises(ValueError, match="units must be 'experts' or 'choices', got 'neurons'"):
        selection_ratio(a, units='neurons')
    with pytest.raises(ValueError, match='top must be'): expert_allocation_entropy(a, top=9)
    with pytest.raises(ValueError, match="of must be 'score' or 'weight'"): router_margin(a, of='logit')
    with pytest.raises(ValueError, match="by must be"): router_saturation(a, a, by='day')
    with pytest.raises(ValueError, match='k must be'): router_saturation(a, a, k=0)


@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_by_slot_as_the_authors_vision_code_compares(top_k):
    "A loop over ranks; exchanging two ranks is a change, and the sets agree at least as well"
    a, b = (random_trace(200, num_experts=5, top_k=top_k, num_layers=2, seed=s) for s in (1, 2))
    same = np.mean([[x == y for x, y in zip(r, q)] for la, lb in zip(a, b) for r, q in zip(la.chosen, lb.chosen)])
    rate = expert_change_rate(a, b, by='slot').change_rate[0]
    assert np.isclose(rate, 1 - same) and rate >= expert_change_rate(a, b).change_rate[0] - 1e-12
    for k in {1, top_k}:
        want = [np.mean(la.chosen[:, :k] == lb.chosen[:, :k]) for la, lb in zip(a, b)]
        assert np.allclose(router_saturation(a, b, k=k, by='slot').saturation, want)
    turned = replace(a, choice=np.asarray(a.choice)[..., [*range(top_k)][::-1] + [top_k]])
    assert expert_change_rate(a, turned).change_rate[0] == 0
    assert np.isclose(expert_change_rate(a, turned, by='slot').change_rate[0], (top_k - top_k % 2) / top_k)
