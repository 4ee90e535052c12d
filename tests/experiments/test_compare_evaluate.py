"Evaluation in comparisons: what it adds, and that it changes nothing else."
import json, random, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from processes import run_forked
from typer.testing import CliRunner

from libmoe_nb.cli import app
from libmoe_nb.data.text import text_data
from libmoe_nb.experiments.compare import compare, train
from libmoe_nb.experiments.reports import read_comparison
from libmoe_nb.experiments.run import SuiteCallback
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.evaluation.suites import make_suite
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.log import RunLog, read_log

pytestmark = pytest.mark.usefixtures('undrawn')
SMALL = dict(steps=10, hidden_size=32, batch_size=4, warmup_steps=1, progress=None)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return text_data('python', vocab_size=512, sequence_length=128, max_bytes=250_000,
                     cache_dir=tmp_path_factory.mktemp('cache'))

@pytest.fixture(scope='module')
def suite(data): return make_suite(data, ['cloze', 'bracket'], num_examples=8)

@pytest.fixture(scope='module')
def runs(data, suite, tmp_path_factory):
    "Two recipes, two seeds, evaluated"
    out = tmp_path_factory.mktemp('runs')
    return compare('dense,smoe', data, 'tiny', seeds=2, out=out, evaluate=suite, **SMALL)

def diary(folder, *drop):
    return read_log(folder/'log.jsonl').drop(columns=['seconds', 'tokens_per_second', *drop])

def test_tables_and_report(runs, suite):
    assert set(runs.scores.model) == {'dense', 'smoe'} and {'cloze', 'minimal_pairs', 'mean', 'mean_stderr', 'rank',
                                                            'rank_low', 'perplexity'} <= set(runs.scores)
    assert runs.scores['rank'].sum() == pytest.approx(3)
    r = runs.results.set_index('recipe')
    by_hand = runs.samples[runs.samples.metric == 'acc'].groupby(['recipe', 'seed',
                                                                  'task']).value.mean().groupby('recipe').mean()
    assert r.mean_accuracy['smoe'] == pytest.approx(by_hand['smoe'], abs=1e-5) and 0 < r.mean_accuracy['unigram'] < 1
    assert len(runs.score_tests) == 1 and runs.score_tests.seeds[0] == 2
    page = (runs.out/'report.html').read_text()
    for s in ('Zero-shot scores', 'Guessing', 'n-gram', 'mean rank', 'mean accuracy over training', 'All pairs',
              'more than chance', '--evaluate --examples 8'):
        assert s in page, s
    saved = json.loads((runs.out/'results.json').read_text())
    assert saved['suite']['fingerprint'] == suite.fingerprint and len(saved['scores']) == 2
    assert {'mean_accuracy', 'mean_rank'} <= set(pd.read_csv(runs.out/'results.csv'))

def test_scores_over_training(runs, suite):
    c = runs.score_curves
    assert sorted(c.step.unique()) == [1, 3, 6, 10] and len(c) == 16 and c.mean_accuracy.between(0, 1).all()
    rows = diary(runs.folders[0])
    rows = rows[rows.split == 'eval']
    assert len(rows) == 3 * len(suite.tasks) and set(rows.n) == {2} and not rows.duplicated(['step', 'task']).any()

def test_evaluation_changes_nothing(data, suite, runs, tmp_path):
    plain = compare('smoe', data, 'tiny', out=tmp_path, **SMALL)
    # the same hash: evaluation is no part of it
    asked = next(f for f in runs.folders if f.name == plain.folders[0].name)
    a, b = diary(plain.folders[0]), diary(asked)
    b = b[b.split != 'eval'].reset_index(drop=True)[a.columns]
    pd.testing.assert_frame_equal(a, b)
    x, y = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (_model(plain.folders[0]), _model(asked)))
    assert torch.equal(x, y)
    assert not plain.evaluations and 'mean_accuracy' not in plain.results and 'Zero-shot' not in plain.report()
    later = compare('smoe', data, 'tiny', out=tmp_path, evaluate=suite, **SMALL)
    # no scores during training, and none invented
    assert len(later.score_curves) == len(later.score_tests) == 0 and 'Zero-shot scores' in later.report()

def _model(folder):
    from libmoe_nb.models.causal import MoEForCausalLM
    return MoEForCausalLM.from_pretrained(folder/'model')

def test_finished_runs_are_evaluated_without_training(data, suite, runs, tmp_path):
    shutil.copytree(runs.out, tmp_path/'runs')
    for p in [*tmp_path.glob('runs/*/evaluation.json'), *tmp_path.glob('runs/*/samples.csv')]: p.unlink()
    events = []
    again = lambda: compare('dense,smoe', data, 'tiny', out=tmp_path/'runs', evaluate=suite,
                            **{**SMALL, 'progress': lambda e, *a, **kw: events.append(e)})
    # from the folder as from the live model
    for f in again().folders: assert (f/'samples.csv').read_text() == (runs.out/f.name/'samples.csv').read_text()
    assert 'start' not in events and events.count('evaluate') == 2
    events.clear()
    assert len(again().evaluations) == 2 and not {'start', 'evaluate'} & set(events)

def test_runs_of_different_suites_are_not_compared(runs, tmp_path):
    shutil.copytree(runs.out, tmp_path/'runs')
    path = next(tmp_path.glob('runs/*/evaluation.json'))
    path.write_text(path.read_text().replace(runs.evaluations[0]['suite']['fingerprint'], 'another'))
    for mixed in (True, False):                              # then: one run was not evaluated at all
        c = read_comparison(tmp_path/'runs')
        assert (len(c.folders) == 4 and c.evaluations == []
                and len(c.samples) == len(c.scores) == len(c.score_tests) == 0 and 'mean_accuracy' not in c.results)
        assert 'Zero-shot' not in c.report()
        if mixed: path.unlink()

def test_killed_run_goes_on_with_the_same_diary(data, suite, runs, tmp_path):
    def stop(event, *args, step=None, **kw):
        if event == 'step' and step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        compare('smoe', data, 'tiny', out=tmp_path, evaluate=suite, **{**SMALL, 'progress': stop})
    resumed = compare('smoe', data, 'tiny', out=tmp_path, evaluate=suite, **SMALL)
    whole = next(f for f in runs.folders if f.name == resumed.folders[0].name)
    pd.testing.assert_frame_equal(diary(resumed.folders[0]), diary(whole))

def test_callback_leaves_random_state_and_mode(data, suite, tmp_path):
    model = from_scratch('smoe', 'tiny', vocab_size=data.vocab_size, hidden_size=32, seed=0)
    learn = moe_learner(model, data, preset='tiny', batch_size=4, steps=2,
                        cbs=[RunLog(tmp_path/'m.jsonl'), SuiteCallback(suite, data.tokenizer, {0, 2}, 3)])
    point, seen = SuiteCallback.point, []
    def watched(self):
        state = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
                         self.learn.model.training)
        before = state()
        point(self)
        seen.append(before == state())
    with pytest.MonkeyPatch.context() as m, learn.no_bar(), learn.no_logging():
        m.setattr(SuiteCallback, 'point', watched)
        learn.fit_cosine()
    assert seen == [True, True]
    rows = read_log(tmp_path/'m.jsonl')
    assert sorted(rows[rows.split == 'eval'].step.unique()) == [0, 2]

def test_train_and_refusals(data, suite, tmp_path):
    res = train('smoe', data, 'tiny', tmp_path/'one', evaluate=suite, **SMALL)
    assert res['evaluation']['suite']['fingerprint'] == suite.fingerprint and (tmp_path/'one'/'samples.csv').exists()
    with pytest.raises(ValueError,
                       match='evaluate must be True, a number of examples of at least 2, or a Suite, got 1'):
        compare('smoe', data, 'tiny', out=tmp_path/'x', evaluate=1, **SMALL)
    assert not (tmp_path/'x').exists()
    compare('dense', data, 'tiny', out=tmp_path/'y', keep_models=False, **SMALL)
    with pytest.raises(ValueError, match='holds no model to evaluate'):
        compare('dense', data, 'tiny', out=tmp_path/'y', evaluate=suite, **SMALL)
    # scored before it is thrown away
    kept = compare('smoe', data, 'tiny', out=tmp_path/'z', keep_models=False, evaluate=suite, **SMALL)
    assert len(kept.evaluations) == 1

def test_command(tmp_path, data, monkeypatch):
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    args = ('--data python --max-bytes 250000 --preset tiny --steps 3 --batch-size 4 --sequence-length 128 '
            '--vocab-size 512 --threads 1 --examples 4'.split())
    res = CliRunner().invoke(app, ['compare', *args, '--recipes', 'dense,smoe', '--out', str(tmp_path/'runs')])
    assert res.exit_code == 0, res.output
    assert ('accuracy %' in res.stdout and 'mean rank' in res.stdout and 'highest mean accuracy' in res.stdout
            and 'making tasks' in res.stderr)
    res = CliRunner().invoke(app, ['train', 'smoe', *args, '--evaluate', '--out', str(tmp_path/'one')])
    assert res.exit_code == 0 and 'bracket_python' in res.stdout, res.output
    bad = CliRunner().invoke(app, ['compare', '--evaluate', '--examples', '1', '--out', str(tmp_path/'no')])
    assert (bad.exit_code == 2 and 'examples must be a whole number of at least 2, got 1' in bad.stderr
            and not (tmp_path/'no').exists())

def test_lm_eval_only_when_asked():
    "Neither making runs nor reading them imports lm-eval; only asking a model does"
    code = ('import sys, libmoe_nb.experiments.compare, libmoe_nb.experiments.upcycle, libmoe_nb.evaluation.ranking; '
            'assert "torch" in sys.modules; print("lm_eval" in sys.modules)')
    done = run_forked(code)
    assert done.stdout.strip() == 'False', done.stderr
