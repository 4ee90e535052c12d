"Scores of one model: averages and errors worked out by hand, and a folder that holds all of them or none."
import math

import numpy as np, pandas as pd, pytest

from libmoe_nb.evaluation.results import Evaluation, standard_error

def result(task, value, stderr=.1, metric='acc', intervention='none', **kw):
    "A row of results"
    return dict(task=task, metric=metric, value=value, stderr=stderr, n=10, higher_is_better=True, group='', chance=.5,
                intervention=intervention) | kw

def answers(task, values, intervention='none', group='', metric='acc'):
    "Rows of samples"
    return [dict(task=task, doc=i, metric=metric, value=float(v), group=group, intervention=intervention)
            for i, v in enumerate(values)]

@pytest.fixture
def evaluation():
    "Two subtasks of a benchmark and a perplexity, as the model is and without its best experts"
    names = dict(none=([1, 1, 0, 0], [1, 0]), drop_top1=([1, 0, 0, 0], [1, 1]))
    results, samples = [], []
    for way, (a, b) in names.items():
        for task, values in dict(part_a=a, part_b=b).items():
            results.append(result(task, np.mean(values), intervention=way, group='parts'))
            samples += answers(task, values, way, 'parts')
        results.append(result('text', 12.345678, .25, 'perplexity', way, chance=math.nan))
        samples += answers('text', [12., 13.], way, metric='perplexity')
    asked = [dict(task='part_a', doc=0, arguments=[['q', ' a']], intervention='none')]
    return Evaluation(pd.DataFrame(results), pd.DataFrame(samples), asked, dict(model='a model', seed=0))

def test_subtasks_are_averaged(evaluation):
    s = evaluation.scores().set_index(['intervention', 'task'])
    assert s.value['none', 'parts'] == .5 and s.value['drop_top1', 'parts'] == pytest.approx((.25 + 1) / 2)
    assert s.stderr['none', 'parts'] == pytest.approx(math.sqrt(.1**2 + .1**2) / 2) and s.n['none', 'parts'] == 20
    assert s.value['none', 'text'] == pytest.approx(12.345678) and len(s) == 4

def test_changes_are_those_of_the_same_documents(evaluation):
    c = evaluation.score_change().loc['drop_top1']
    assert list(c.index) == ['parts', 'total', 'stderr'] and c.parts == c.total == pytest.approx((-25 + 50) / 2)
    a, b = np.array([0, -100, 0, 0]), np.array([0, 100])
    assert c.stderr == pytest.approx(math.sqrt(a.var(ddof=1) / 4 + b.var(ddof=1) / 2) / 2)

def test_tables_to_look_at(evaluation):
    t = evaluation.table()
    assert t.columns.tolist() == ['metric', 'n', 'chance', 'score', 'drop_top1']
    assert t.loc['parts'].tolist() == ['acc', 20, '50.0', '50.0 ± 7.1', '62.5 ± 7.1']
    assert t.loc['text'].tolist() == ['perplexity', 10, '', '12.35 ± 0.25', '12.35 ± 0.25']
    assert '62.5 ± 7.1' in repr(evaluation) and '<table' in evaluation._repr_html_()
    unknown = Evaluation(pd.DataFrame([result('t', math.nan, math.nan), result('u', 1., math.nan)]), pd.DataFrame())
    assert unknown.table().score.tolist() == ['–', '100.0']

def test_an_intervention_may_be_called_like_a_column():
    e = Evaluation(pd.DataFrame([result('t', 1., intervention=i) for i in ('none', 'n', 'score')]), pd.DataFrame())
    assert e.table().columns.tolist() == ['metric', 'n', 'chance', 'score', '(n)', '(score)']

def test_standard_errors():
    values = np.random.default_rng(0).normal(size=500).tolist()
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(500))
    assert standard_error(values, np.mean) == pytest.approx(standard_error(values), rel=.15)
    assert standard_error(values, np.median, seed=1) == standard_error(values, np.median, seed=1)
    assert math.isnan(standard_error([1.])) and math.isnan(standard_error([], np.mean))

def test_a_folder_holds_everything(evaluation, tmp_path):
    evaluation.documents[0]['arguments'] = 'a line\u2028and a line'
    back = Evaluation.load(evaluation.save(tmp_path/'new'/'folder'))
    pd.testing.assert_frame_equal(back.results, evaluation.results)
    pd.testing.assert_frame_equal(back.samples, evaluation.samples)
    assert (back.documents, back.info) == (evaluation.documents, evaluation.info)
    assert len(list((tmp_path/'new'/'folder').iterdir())) == 3

def test_results_are_written_last(evaluation, tmp_path, monkeypatch):
    "Where results.json is, the rest is; what is missing or damaged is told"
    def killed(path, o): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('libmoe_nb.evaluation.results.write_json', killed)
        evaluation.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'samples.csv', 'documents.jsonl'}
    with pytest.raises(ValueError, match='must hold results.json'): Evaluation.load(tmp_path)
    evaluation.save(tmp_path)
    for name, says in (('samples.csv', 'not hold a whole evaluation'),
                       ('documents.jsonl', 'not hold a whole evaluation'),
                       ('results.json', 'results.json cannot be read')):
        whole = (tmp_path/name).read_text()
        (tmp_path/name).write_text(whole[:len(whole) // 2] if name != 'samples.csv' else '')
        with pytest.raises(ValueError, match=says): Evaluation.load(tmp_path)
        (tmp_path/name).write_text(whole)
