"Tables of comparisons whose domains have any name, and of those that diverged."
import json

import numpy as np, pandas as pd, pytest
from typer.testing import CliRunner

import odd_runs
from odd_runs import NAMES, SMALL, questions
from test_terminal import render

from libmoe_nb.cli import app
from libmoe_nb.analysis.metrics import expert_allocation_entropy
from libmoe_nb.evaluation.harness import evaluate
from libmoe_nb.experiments.compare import compare, train
from libmoe_nb.experiments.comparison import verdict
from libmoe_nb.experiments.inspect import analyze
from libmoe_nb.experiments.reports import read_comparison
from libmoe_nb.moe.config import recipe, recipes
from libmoe_nb.plots.style import recipe_title
from libmoe_nb.plots.training import plot_curves, plot_perplexity
from libmoe_nb.terminal import comparison_tables

@pytest.fixture
def named(): return odd_runs.named()

@pytest.fixture
def lost(): return odd_runs.lost()

# names

def test_names_of_domains_are_the_users(named):
    data, res = named
    assert set(data.domains) == set(NAMES) == set(res.domain_names)
    t = res.domain_results
    assert len(t) == 3 * len(NAMES) and not t.duplicated(['recipe', 'domain']).any() and t.perplexity.notna().all()
    for r in res.finished:
        assert {d: t.set_index(['recipe', 'domain']).perplexity[r['recipe'], d]
                for d in NAMES} == pytest.approx(r['domains'])
    assert (not {*NAMES} & {*res.results} - {'perplexity', 'perplexity_std', 'recipe', 'rank'}
            and res.results.columns.is_unique)
    # not 1 as a number, not nan as nothing
    assert set(res.loads.domain) == set(NAMES)
    saved = json.loads((res.out/'results.json').read_text())
    assert {r['domain'] for r in saved['domains']} == set(NAMES)
    assert set(pd.read_csv(res.out/'domains.csv', keep_default_na=False, dtype=dict(domain=str)).domain) == set(NAMES)
    assert '&lt;b&gt;' in res.report() and '<b>' not in res.report()
    card = (res.folders[0]/'model'/'README.md').read_text()
    assert '| perplexity |' in card and all(f'| perplexity by domain / {d} |' in card for d in NAMES)

def test_a_run_and_an_evaluation_of_such_domains(named, tmp_path):
    data, res = named
    assert set(train('smoe', data, 'tiny', tmp_path/'one', **SMALL)['domains']) == set(NAMES)
    suite = questions(NAMES)
    assert {t.domain for t in suite.tasks.values()} == set(NAMES) and len(set(suite.tasks)) == len(NAMES)
    e = evaluate(res.folders[1]/'model', suite, progress=False, out=tmp_path/'scores')
    assert set(e.results.task) == set(suite.tasks) and len(res.scores) == 2 and 'Zero-shot' in res.report()

def test_analysis_tells_a_domain_called_all_from_the_whole(named, tmp_path):
    data, res = named
    a = analyze(res.folders[1], data, num_tokens=6000, out=tmp_path/'a', perturb=False)
    whole, parts = a.table('allocation_entropy'), a.table('allocation_entropy_by_domain')
    assert len(whole) == len(a.layers) and set(parts.domain) == set(a.domain_names) and 'all' in a.domain_names
    assert np.allclose(a.by_layer().allocation_entropy, expert_allocation_entropy(a.trace, by_domain=False).entropy)
    for n in a.metrics:
        assert not a.table(n).duplicated([c for c in ('layer', 'domain', 'expert', 'other', 'token', 'intervention')
                                          if c in a.table(n)]).any(), n
    assert json.loads((tmp_path/'a'/'analysis.json').read_text())['domains'].keys() == set(NAMES)

# what diverged

def test_a_diverged_comparison_ends_and_can_be_repeated(lost, undrawn):
    data, suite, out, res = lost
    assert res.runs.diverged.all() and verdict(res.runs) == 'Dense and SMoE diverged. There is nothing to compare.'
    t = res.results.set_index('recipe')
    assert (t['rank'].isna().all() and t.diverged[['dense', 'smoe']].tolist() == [2, 2]
            and t.perplexity[['dense', 'smoe']].isna().all())
    page = res.report()
    assert page.count('diverged') > 3 and '>nan<' not in page and '>inf<' not in page and 'over 0 seeds' not in page
    # traces of a model without numbers
    assert len(res.traces[next(f.name for f in res.folders if f.name.startswith('smoe'))]) >= 2
    json.loads((out/'results.json').read_text(), parse_constant=lambda c: 1 / 0)
    events = []
    again = compare('dense,smoe', data, 'tiny', seeds=2, learning_rate=1e18, out=out, evaluate=suite,
                    **{**SMALL, 'progress': lambda e, *a, **kw: events.append(e)})
    assert 'start' not in events and again.results.equals(res.results)
    shown = CliRunner().invoke(app, ['report', str(out)])
    assert shown.exit_code == 0 and 'Dense and SMoE diverged.' in shown.stdout and 'nan' not in shown.stdout

def test_one_diverged_recipe_among_others(lost, undrawn, tmp_path):
    "As if one recipe had diverged wholly, and one with one of its seeds"
    data, suite, *_ = lost
    res = compare('dense,smoe,xmoe,tcmoe', data, 'tiny', seeds=2, out=tmp_path, evaluate=suite,
                  **SMALL | dict(steps=2))
    for f, r in zip(res.folders, res.finished):
        if r['recipe'] == 'smoe' or r['recipe'] == 'xmoe' and r['seed'] == 1:
            (f/'result.json').write_text(json.dumps(r | dict(perplexity=None, loss=None,
                                                             domains=dict.fromkeys(r['domains']))))
            lines = [json.loads(l) for l in (f/'log.jsonl').read_text().splitlines()]
            (f/'log.jsonl').write_text(''.join(json.dumps(l | ({k: None for k in ('loss', 'perplexity', 'margin')
                                                                    if k in l} if l['step'] else {})) + '\n'
                                                   for l in lines))
    res = read_comparison(tmp_path)
    t = res.results.set_index('recipe')
    assert (sorted(t['rank'].dropna()) == [1, 2] and set(t.index[t['rank'].notna()]) == {'dense', 'tcmoe'}
            and t.diverged[['smoe', 'xmoe']].tolist() == [2, 1])
    says = verdict(res.runs)
    assert (says.startswith('SMoE diverged. XMoE diverged with 1 of 2 seeds, so it has no rank. The best (')
            and 'Over 2 seeds' in says)
    assert (set(res.scores.model) == {'dense', 'tcmoe'} and len(res.score_tests) == 1
            and t.mean_accuracy.isna()[['smoe', 'xmoe']].all())
    page = res.report()
    assert '1 of 2 diverged' in page and '>diverged<' in page
    bars = plot_perplexity(res.runs)
    assert ([x.get_text() for x in bars.texts][0] == 'diverged'
            and any('(1 of 2 diverged)' in x.get_text() for x in bars.texts))
    assert {recipe_title('smoe') + ' (diverged)'} <= {x.get_text()
                                                      for x in plot_curves(res.curves).get_legend().get_texts()}
    assert '1 of 2 diverged' in render(comparison_tables(res, 100))

# folders

def test_a_recipe_may_have_a_name_with_a_hyphen(named, tmp_path):
    "The order of runs is that of their configurations, not that of what their folders' names look like"
    recipe('a-b', title='A-B')(recipes['smoe'].build)
    try: compare('a-b,smoe', named[0], 'tiny', out=tmp_path, **SMALL)
    finally: del recipes['a-b']
    assert read_comparison(tmp_path).recipe_names == ['smoe', 'a-b']

def test_baselines_have_the_names_of_scores(named):
    _, res = named
    chance = res.baseline('chance')
    assert set(chance.index) <= set(res.scores) and chance.between(0, 1).all() and res.baseline('unheard_of') is None
