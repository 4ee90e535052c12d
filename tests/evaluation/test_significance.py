"Tests of differences: calibration, power, exactness where it can be had, and the words for it."
import itertools, math

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from made_scores import draw, frame, simulate
from libmoe_nb.evaluation.ranking import rank_interval
from libmoe_nb.evaluation.scores import crossed_variances, total_variance
from libmoe_nb.evaluation.significance import (difference_test, holm, paired_test, ranking_verdict, sign_flip,
                                               total_score_change)

@pytest.mark.parametrize('seed', range(3))
def test_sign_flip_is_exact_for_few_documents(seed):
    rng = np.random.default_rng(seed)
    d, w = rng.integers(-2, 3, 9).astype(float), np.full(9, 1/9)
    sums = [abs(np.dot(s, d)) for s in itertools.product([-1, 1], repeat=9)]
    assert math.isclose(sign_flip(d[:, None], w)[0], np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))

def test_sign_flip_agrees_with_scipy():
    d = np.random.default_rng(0).choice([-1., 0, 1], 150, p=[.15, .6, .25])
    theirs = stats.permutation_test((d,), np.sum, permutation_type='samples', n_resamples=20_000,
                                    rng=np.random.default_rng(1)).pvalue
    assert abs(sign_flip(d[:, None], np.ones(150), 20_000)[0] - theirs) < .01

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    q = holm(p)
    assert (q >= np.array(p) - 1e-15).all() and (q <= 1).all() and math.isclose(q.min(), min(1, len(p) * min(p)))
    order = np.argsort(p, kind='stable')
    assert (np.diff(q[order]) >= 0).all()
    slow, top = {}, 0
    for i, k in enumerate(order): top = max(top, min(1, (len(p) - i) * p[k])); slow[k] = top
    np.testing.assert_allclose(q, [slow[k] for k in range(len(p))])

def passed(accuracy, n, docs=60, **kw):
    "Shares of simulations with p below 5 %: with seeds as chance, and over documents only"
    w, task, ps = np.full(2 * docs, .5 / docs), np.repeat([0, 1], docs), []
    for i in range(n):
        x, y = draw(accuracy, docs=docs, seed=i, **kw).reshape(2, -1, 2 * docs).transpose(0, 2, 1)
        p = sign_flip((x.mean(1) - y.mean(1))[:, None], w, 300, i)[0]
        ps.append((difference_test(x, y, w, task, .95, p, [0.])['p'], p))
    return (np.array(ps) < .05).mean(0)

def test_equal_models_are_rarely_told_apart():
    share = passed((.5, .5), 800)[1]
    assert .02 < share < .075                      # 5 % within its own chance; ties make it a little careful

@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_equal_algorithms_are_rarely_told_apart(seeds):
    honest, naive = passed((.5, .5), 500, seeds=seeds, seed_effect=.2)
    assert honest < .08 and naive > .15

def test_power():
    assert passed((.6, .4), 60)[0] > .9
    assert passed((.62, .4), 60, seeds=3, seed_effect=.05)[0] > .85

def test_family_of_true_nulls():
    "Of comparisons of five equal models, few may claim any difference"
    hits = [(paired_test(simulate([.5] * 5, docs=50, seed=i), permutations=300, resamples=5, seed=i).p_holm < .05).any()
            for i in range(60)]
    assert np.mean(hits) < .15

def test_variance_of_crossed_scores():
    rng = np.random.default_rng(0)
    x = [rng.normal(0, 2, 3) + rng.normal(0, 1, (20, 1)) + rng.normal(0, 3, (20, 3)) for _ in range(3000)]
    w, task = np.full(20, .05), np.zeros(20, int)
    true = 4/3 + 1/20 + 9/60
    assert abs(np.var([w @ v.mean(1) for v in x]) - true) < .08
    assert abs(np.mean([s + d - r for s, d, r in (crossed_variances(v, w, task) for v in x)]) - true) < .08
    assert all(total_variance(*crossed_variances(v, w, task)) > 0 for v in x[:50])

def test_intervals_cover():
    inside = 0
    for i in range(150):
        x = draw([.55, .5], docs=80, seed=i)
        t = paired_test(frame(x), permutations=10, resamples=300, seed=i).iloc[0]
        inside += t.low <= .05 <= t.high
    assert .88 <= inside / 150 <= 1

def test_identical_models():
    x = draw([.5])
    df = frame(np.concatenate([x, x, x]))
    t = paired_test(df)
    assert (t.difference == 0).all() and (t.p == 1).all() and (t.p_holm == 1).all()
    two = draw([.5], seeds=2)
    assert (paired_test(frame(np.concatenate([two, two]))).p > .9).all()
    assert (rank_interval(df) == 2).all(axis=None)
    assert 'No two of the 3 models differ' in ranking_verdict(t)

def test_verdict_says_what_the_tests_say():
    t = paired_test(simulate([.9, .5, .49], docs=200, seeds=3))
    says = ranking_verdict(t, names=str.upper)
    assert (says.startswith('A has the highest') and ' 2 of 3 pairs differ by more than chance: A over ' in says
            and 'Not told apart' not in says and 'one seed' not in says)
    assert ' The two differ by more than chance: ' in ranking_verdict(
        paired_test(simulate([.9, .3], docs=200, seeds=3)))
    assert ' All 3 pairs differ by more than chance: ' in ranking_verdict(t.assign(p_holm=0.))
    alone = ranking_verdict(paired_test(simulate([.9, .89, .1], docs=100)))
    assert 'Not told apart from the first: ' in alone and 'one seed' in alone

def test_verdict_of_models_with_unequal_numbers_of_seeds():
    d = simulate([.6, .5, .5], docs=50, seeds=3)
    few = ranking_verdict(paired_test(d[(d.model != d.model.unique()[2]) | (d.seed == 0)]))
    assert 'Some pairs share only one seed' in few and 'Each algorithm' not in few

def test_total_score_change():
    df = simulate([.8, .6], tasks=3, docs=100)
    worse = df.assign(value=df.value * (df.doc % 2), intervention='drop_top1')
    change = total_score_change(pd.concat([df.assign(intervention=None), worse])).set_index('model')
    for m in 'ab':
        a, b = (d[d.model == m].groupby('task').value for d in (df, worse))
        assert math.isclose(change.change[m], 100 * (b.mean() - a.mean()).sum())
        d = (df[df.model == m].value - worse[worse.model == m].value).to_numpy().reshape(3, 100)
        assert math.isclose(change.stderr[m], 100 * math.sqrt((d.var(1, ddof=1) / 100).sum()))
    with pytest.raises(ValueError, match='same tasks'):
        total_score_change(pd.concat([df.assign(intervention='none'), worse[worse.task != 't0']]))
