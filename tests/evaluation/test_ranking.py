"Scores: published ranks, calibration of the tests, invariances, and what is refused."
import itertools, math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import special, stats

from libmoe_nb.evaluation.ranking import (_crossed, _pair, _sheet, _sign_flip, _variance, holm, mean_rank, paired_test,
                                          rank_interval, ranking_verdict, score_table, task_scores, to_latex,
                                          to_markdown, total_score_change)

def draw(accuracy, seeds=1, docs=60, tasks=2, seed_effect=0., doc_effect=1., seed=0):
    "Scores [models, seeds, tasks, docs]"
    rng = np.random.default_rng(seed)
    mean = special.ndtri(np.array(accuracy))[:, None, None, None] * math.sqrt(1 + doc_effect**2)
    z = mean + rng.normal(0, doc_effect, (tasks, docs)) + rng.normal(0, seed_effect, (len(accuracy), seeds, 1, 1))
    return (rng.random(z.shape) < special.ndtr(z)).astype(float)

def frame(x, names='abcdefgh'):
    at = np.indices(x.shape).reshape(4, -1)
    return pd.DataFrame(dict(model=[names[i] for i in at[0]], seed=at[1], task=[f't{i}' for i in at[2]], doc=at[3],
                             value=x.ravel()))

def simulate(*args, **kw): return frame(draw(*args, **kw))

# tables

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2, max_size=6),
       st.randoms(use_true_random=False))
def test_mean_rank_of_permuted_models(rows, random):
    v = pd.DataFrame(rows, index=list('abcdef')[:len(rows)])
    order = list(v.index)
    random.shuffle(order)
    r = mean_rank(v)
    pd.testing.assert_series_equal(mean_rank(v.loc[order]), r.loc[order])
    assert math.isclose(r.mean(), (len(rows) + 1) / 2)
    by_hand = [np.mean([1 + sum(o > x for o in v[c]) + (sum(o == x for o in v[c]) - 1) / 2
                        for c, x in v.loc[m].items()]) for m in v.index]
    np.testing.assert_allclose(r, by_hand)

def test_better_on_every_task_is_first():
    t = score_table(simulate([.9, .5, .1], docs=200)).set_index('model')
    assert t['rank'].tolist() == [1, 2, 3] and (t.rank_low == t.rank_high).all()

@pytest.mark.parametrize('seeds', [1, 3])
def test_permuted_models_and_rows(seeds):
    x = draw([.6, .5, .5, .4], seeds=seeds, seed_effect=.1)
    df, order = frame(x), [2, 0, 3, 1]
    t, p = score_table(df).set_index('model'), score_table(frame(x[order], 'cadb')).set_index('model')
    same = [c for c in t if c not in ('rank_low', 'rank_high')]
    pd.testing.assert_frame_equal(p.loc[list('abcd'), same], t[same])
    shuffled = score_table(df.sample(frac=1, random_state=0)).set_index('model')
    pd.testing.assert_frame_equal(shuffled.loc[list('abcd'), ['mean', 'mean_stderr', 'rank']],
                                  t[['mean', 'mean_stderr', 'rank']])
    a, b = paired_test(df), paired_test(df.sample(frac=1, random_state=1))
    key = lambda d: {frozenset(r[:2]): abs(r.difference) for r in d.itertuples(index=False)}
    assert all(math.isclose(v, key(b)[k], abs_tol=1e-12) for k, v in key(a).items())

def test_results_and_samples_agree():
    df = simulate([.6, .4], seeds=2)
    a, b = score_table(df), score_table(task_scores(df))
    cols = [c for c in b if c not in ('rank',)]
    pd.testing.assert_frame_equal(a[cols], b[cols])

def test_groups_count_once():
    "The mean of a group's subtasks is one task, whatever their number"
    df = simulate([.6, .4], tasks=4)
    grouped = df.assign(group=df.task.map(dict(t0='g', t1='g', t2='g')).fillna(''))
    t = score_table(grouped).set_index('model')
    means = df.groupby(['model', 'task']).value.mean().unstack()
    np.testing.assert_allclose(t.g, means[['t0', 't1', 't2']].mean(axis=1))
    np.testing.assert_allclose(t['mean'], (t.g + means.t3) / 2)
    X, w, _ = _sheet(grouped)
    np.testing.assert_allclose([(w @ X[m]).mean() for m in 'ab'], t['mean'])
    assert math.isclose(paired_test(grouped).difference[0], t['mean']['a'] - t['mean']['b'])

def test_metric_is_the_first_accuracy_or_the_one_named():
    df = pd.concat([simulate([.6, .4]).assign(metric='acc'), simulate([.2, .3]).assign(metric='acc_norm')])
    assert score_table(df)['mean'][0] > .4 > score_table(df, 'acc_norm')['mean'][0]
    with pytest.raises(ValueError, match='metric of t0 must be one of'): score_table(df, 'f1')
    with pytest.raises(ValueError, match='no task has an accuracy'): score_table(df.assign(metric='perplexity'))

def test_refusals():
    df = simulate([.6, .4])
    with pytest.raises(ValueError, match='b has none on t1'): score_table(task_scores(df)[:-1])
    with pytest.raises(ValueError, match='all models must have scored the same documents'): paired_test(df[:-1])
    with pytest.raises(ValueError, match='scored twice'): paired_test(pd.concat([df, df]))
    with pytest.raises(ValueError, match='needs two models'): paired_test(df[df.model == 'a'])
    with pytest.raises(ValueError, match='one document'): paired_test(df[df.doc == 0])
    with pytest.raises(ValueError, match='column model or recipe'): score_table(df.drop(columns='model'))

# tests

@pytest.mark.parametrize('seed', range(3))
def test_sign_flip_is_exact_for_few_documents(seed):
    rng = np.random.default_rng(seed)
    d, w = rng.integers(-2, 3, 9).astype(float), np.full(9, 1/9)
    sums = [abs(np.dot(s, d)) for s in itertools.product([-1, 1], repeat=9)]
    assert math.isclose(_sign_flip(d[:, None], w)[0], np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))

def test_sign_flip_agrees_with_scipy():
    d = np.random.default_rng(0).choice([-1., 0, 1], 150, p=[.15, .6, .25])
    theirs = stats.permutation_test((d,), np.sum, permutation_type='samples', n_resamples=20_000,
                                    rng=np.random.default_rng(1)).pvalue
    assert abs(_sign_flip(d[:, None], np.ones(150), 20_000)[0] - theirs) < .01

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
        p = _sign_flip((x.mean(1) - y.mean(1))[:, None], w, 300, i)[0]
        ps.append((_pair(x, y, w, task, .95, p, [0.])['p'], p))
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
    assert abs(np.mean([s + d - r for s, d, r in (_crossed(v, w, task) for v in x)]) - true) < .08
    assert all(_variance(*_crossed(v, w, task)) > 0 for v in x[:50])

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

# export, interventions

def test_export():
    t = score_table(simulate([.6, .4]))
    t['model'] = ['x_1 & 50%', 'a|b']
    tex, md = to_latex(t, caption='A_b', label='tab:x'), to_markdown(t)
    assert (r'x\_1 \& 50\%' in tex and r'\label{tab:x}' in tex and tex.count(r'\toprule') == 1
            and tex.count('{') == tex.count('}'))
    assert r'a\|b' in md and all(l.replace(r'\|', '').count('|') == md.splitlines()[1].count('|')
                                 for l in md.splitlines())
    body = [l for l in tex.splitlines() if '&' in l]
    assert len({l.replace(r'\&', '').count('&') for l in body}) == 1

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
