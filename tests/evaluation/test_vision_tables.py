"Tables of answers against the same by hand, and errors against simulation."
import numpy as np, pandas as pd, pytest
from libmoe_nb.evaluation.significance import paired_test
from libmoe_nb.evaluation.vision_tables import (accuracies, against_controls, answer_scores, count_above,
                                                made_answers, table_rows,
                                                vision_table, yes_no_scores, yes_or_no)

GROUPS = dict(existence='coarse', colour='coarse', word='ocr')

def rows(right, image, **more):
    n = len(right)
    return pd.DataFrame(dict(dict(id=[str(i) for i in range(n)], image=image, subtask='a', group='g', kind='open',
                                  condition='own',
                                  intervention='none', right=np.array(right, bool), said='x', answer='y'), **more))

def test_questions_about_one_image_count_as_one_draw():
    "Ten copies of each question change neither score nor error"
    rng = np.random.default_rng(0)
    right = rng.random(50) < .6
    once = accuracies(rows(right, [f'{i}' for i in range(50)])).iloc[0]
    often = accuracies(rows(np.repeat(right, 10), np.repeat([f'{i}' for i in range(50)], 10))).iloc[0]
    assert once.accuracy == pytest.approx(often.accuracy) and once.stderr == pytest.approx(often.stderr)
    assert once.stderr == pytest.approx(right.std(ddof=1) / 50**.5)

def test_the_error_is_the_spread_over_draws():
    rng, means, errors = np.random.default_rng(1), [], []
    for _ in range(150):
        p = rng.beta(2, 2, 40)                                            # images differ; three questions about each
        r = accuracies(rows(rng.random(120) < np.repeat(p, 3), np.repeat([str(i) for i in range(40)], 3))).iloc[0]
        means.append(r.accuracy); errors.append(r.stderr)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=.2)

def test_text_questions_are_images_of_their_own():
    assert accuracies(rows([1, 0, 1, 1], [''] * 4)).images.tolist() == [4]

def mme_by_hand(df):
    "The sum that MME's script makes"
    total = 0
    for _, t in df.groupby('subtask'):
        per_image = [100 * d.right.mean() + 100 * (d.right.sum() == 2) for _, d in t.groupby('image')]
        total += np.mean(per_image)
    return total

def test_yes_and_no_as_mme_scores_them():
    df = made_answers(dict(m=.7), dict(existence='c', spatial='r'), ('existence', 'spatial'), conditions=('own',))
    assert yes_no_scores(df).score.sum() == pytest.approx(mme_by_hand(df))
    free = df.assign(said=[s + w for s, w in zip(df.said, [', of course.', ' .', ''] * len(df))])
    assert yes_no_scores(free).score.tolist() == yes_no_scores(df).score.tolist()
    assert yes_no_scores(df.assign(said='perhaps')).other.tolist() == [100, 100]
    # two to be affirmed
    three = pd.concat([df, df[df.answer == 'yes'].assign(id=lambda d: d.id + 'x')])
    assert yes_no_scores(three).pairs.tolist() == [0, 0] and yes_no_scores(three).both.isna().all()

@pytest.mark.parametrize('said, word',
                         [('Yes', 'yes'), ('no.', 'no'), ('y', 'yes'), ('N', 'no'), ('. yes', 'yes'), ('', 'other'),
                          ('it is yes', 'other'), ('?', 'other')])
def test_answers_are_read_as_mme_reads_them(said, word): assert yes_or_no(said) == word

def test_both_controls_have_to_be_beaten():
    own, low, high = ([1] * 5 + [0] * 5, [1] * 4 + [0] * 6, [1] * 5 + [0] * 5)
    image = [str(i) for i in range(10)]
    df = pd.concat([rows(own, image, model='m', seed=0), rows(low, image, condition='shuffled', model='m', seed=0)])
    assert against_controls(df).beats.tolist() == [True]                                    # by exactly .10
    alone = rows(high, image, condition='none', model='q')
    both = against_controls(df, alone)
    assert both.beats.tolist() == [False] and both.above.tolist() == [0.] and both.question_only.tolist() == [.5]
    # a control that was not asked
    unknown = against_controls(df, alone.assign(subtask='b'))
    assert unknown.beats.tolist() == [False]

def test_a_subtask_counts_in_all_seeds_only_if_each_has_it():
    t = pd.DataFrame([dict(model='m', seed=s, subtask=k, beats=b) for s, bs in enumerate(([1, 1, 0], [0, 1, 1]))
                      for k, b in zip('abc', map(bool, bs))])
    c = count_above(t)
    assert c.above.tolist() == [2, 2, 1] and c.seed.tolist() == [0, 1, 'all'] and c.subtasks.iloc[-1] == 'b'

def test_the_table_is_that_of_the_ranking_and_paired_over_the_same_images():
    df = made_answers(dict(smoe=.75, xmoe=.55), GROUPS, ('existence',), n=80, seeds=2)
    t = vision_table(df, 'group').set_index('model')
    own = df[df.condition == 'own'].groupby(['model', 'seed', 'group',
                                             'subtask']).right.mean().groupby(['model', 'group']).mean()
    assert t.loc['smoe', 'coarse'] == pytest.approx(own['smoe', 'coarse']) and t['rank'].tolist() == [1, 2]
    p = paired_test(answer_scores(df), permutations=500, resamples=200).iloc[0]
    assert p.seeds == 2 and p.p_documents < .01 and p.low < .2 < p.high
    assert p.difference == pytest.approx(t.loc['smoe', 'ocr'] / 3 + 2 * t.loc['smoe', 'coarse'] / 3
                                         - t.loc['xmoe', 'ocr'] / 3 - 2 * t.loc['xmoe', 'coarse'] / 3)
    with pytest.raises(ValueError, match='same documents'):
        paired_test(answer_scores(df[~((df.model == 'xmoe') & (df.image == 'word3.png'))]))

def test_images_with_many_questions_keep_the_mean():
    rng = np.random.default_rng(0)
    image = np.repeat(['a', 'b', 'c', 'd'], [1, 2, 3, 10])
    df = rows(rng.random(16) < .5, image, model='m', seed=0)
    assert answer_scores(df).value.mean() == pytest.approx(df.right.mean())

def test_rows_fit_a_terminal_of_80_columns():
    from libmoe_nb.data.scenes import subtasks
    from libmoe_nb.terminal import fits, fitting_tables
    df = made_answers(dict.fromkeys(('smoe', 'xmoe', 'moe_plus_plus'), .5), subtasks, n=20)
    tables = [*fitting_tables(table_rows(vision_table(df)), width=80)]
    assert len(tables) > 1 and all(fits(t, 80) for t in tables)
    assert [str(c.header) for t in tables for c in t.columns[1:]] == [*(t.replace('_', ' ') for t in subtasks),
                                                                 'mean', 'rank']

def test_two_questions_with_one_answer_are_no_pair():
    df = made_answers(dict(m=1.), dict(existence='c'), ('existence',), n=10, conditions=('own',))
    assert yes_no_scores(df).pairs.tolist() == [10] and yes_no_scores(df).score.tolist() == [200]
    alike = yes_no_scores(df.assign(answer='yes', said='yes'))
    assert alike.pairs.tolist() == [0] and alike.accuracy.tolist() == [100] and alike.score.isna().all()
