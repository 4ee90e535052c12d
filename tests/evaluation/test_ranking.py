"Scores and ranks: published ones, invariances, and what is refused."
import math

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from made_scores import draw, frame, simulate
from libmoe_nb.evaluation.ranking import score_table, to_latex, to_markdown
from libmoe_nb.evaluation.scores import mean_rank, sample_sheet, task_scores
from libmoe_nb.evaluation.significance import paired_test

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
    X, w, _ = sample_sheet(grouped)
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

# export

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
