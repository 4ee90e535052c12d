"The page of all claims, the figure of verdicts, and statistics of questions, on results that are made up."
import re, runpy
from pathlib import Path

import numpy as np, pandas as pd, pytest
from made_results import write_made_results
from libmoe_nb.paper import claims as _statements  # noqa: F401
from libmoe_nb.paper.campaign import plan_campaign, sparse_recipes
from libmoe_nb.paper.newer import all_claims, claim_label, labelled, newer_of, with_start
from libmoe_nb.paper.pages import Kept, verdict_colours
from libmoe_nb.paper.questions import agreement, harm_table, late_rates, two_by_two
from libmoe_nb.paper.verdicts import claims, correction_table, corrections
from libmoe_nb.plots.verdicts import plot_verdicts, verdict_looks

PAPER = Path(__file__).resolve().parents[2]/'nbs'/'paper'

def vision_partly(regime, recipe, seed, **who):
    "All recipes but one, with every seed"
    return regime == 'language' or recipe != 'tcmoe'

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')/'results'/'mini'
    write_made_results(folder, vision_partly)
    return Kept(folder)

@pytest.fixture(scope='module')
def table(kept): return all_claims(kept)

def test_every_claim_has_one_row_and_a_page_that_exists(table):
    html = table._repr_html_()
    assert {*table.pages} == {*claims}
    for page in {*table.pages.values()}: assert (PAPER/page).with_suffix('.ipynb').exists(), page
    assert html.count('class="word"') == len(claims)
    for c in claims.values():
        if c.newer: assert newer_of(c.name), c.name

def test_a_recipe_that_is_missing_is_said_and_never_crashes(table):
    t = table.table.set_index('claim')
    assert t.verdict['tcmoe_least_even'] == 'not run' and 'tcmoe' in t.why['tcmoe_least_even']
    assert t.verdict['perplexities_close'] != 'not run'

def test_one_seed_of_seven_gives_no_verdict(tmp_path):
    write_made_results(tmp_path/'mini', lambda regime, seed, **who: regime == 'vision' and seed == 0)
    t = all_claims(Kept(tmp_path/'mini'), {}).table.query("regime == 'vision'")
    assert {*t.verdict} <= {'undecided', 'not run'} and (t.seeds <= 1).all()

def test_the_figure_says_each_verdict_once_in_colours_of_the_pages(table):
    fig = plot_verdicts(labelled(table))
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert {w: c for w, (c, _) in verdict_looks.items()} == verdict_colours
    for c in claims: assert claim_label(c) in texts, c
    signs = [t for t in texts if t in {s for _, s in verdict_looks.values()}]
    assert len(signs) == len(claims)

def test_each_corrected_claim_has_a_dagger_and_one_row(kept, table):
    better = correction_table(kept)
    names = [k.claim.name for k in corrections.values()]
    assert {*better.claim} == {*names} and len(better) == len({*names}) < len(names)
    marks = [t.get_text() for t in plot_verdicts(labelled(table)).axes[0].texts if t.get_text().startswith('†')]
    assert len(marks) == len(better)
    for k in corrections.values(): assert better.set_index('claim').flaw[k.claim.name].count(k.why) == 1, k.why

def test_another_start_is_compared_on_the_same_runs(kept):
    t = with_start(kept)
    assert t.claim.is_unique and 'SMoE beats Dense' in {*t.claim} and (t.seeds <= 2).all()
    assert not {'Shared experts not stabler', 'Z-loss brings nothing'} & {*t.claim}     # not all algorithms are there
    assert not len(with_start(kept, 'nobody'))

def test_pages_say_on_which_runs_they_stand():
    for p in [q for where in ('tables/*', 'questions/*', 'figures/*_vision') for q in PAPER.glob(f'{where}.ipynb')]:
        assert re.search(r'verdicts_of\(|stands_on\(', p.read_text()), p

def test_vision_of_the_campaign_is_each_recipe_with_three_seeds(tmp_path):
    last = plan_campaign('table1', 'mini', tmp_path).vision.last
    seen = [(c['recipe'], c['seed']) for c in last if c.get('images', True)]
    assert {*seen} == {(r, s) for r in ('dense', *sparse_recipes) for s in range(3)} and len(seen) == 24
    assert len(last) == len(seen) + 1

def test_harm_is_found_where_it_is_and_not_elsewhere():
    g = np.random.default_rng(1)
    t = pd.DataFrame([dict(regime='vision', variant='base', recipe='smoe', seed=s, layer=l, expert=e, load=g.random(),
                           weight=g.random(), margin=np.nan, partner=g.random(), lift=1., similarity=g.random())
                      for s in range(3) for l in range(4) for e in range(6)])
    h = harm_table(t.assign(value=-t.load)).set_index('statistic')
    assert h.high['load'] < -.99 and h.low['weight'] < 0 < h.high['weight']
    assert not {'margin', 'lift'} & {*h.index}      # nothing is known, or all are alike

def test_orders_and_effects_without_enough_runs():
    none = pd.DataFrame(columns=['recipe', 'seed', 'progress', 'by', 'value'])
    assert not len(late_rates(none, none)) and not len(agreement(late_rates(none, none)))
    with pytest.raises(ValueError, match='wide must be'): two_by_two(pd.DataFrame(dict(base=[1.])), 'a', 'b', 'ab')

def test_the_picture_of_the_home_page_shows_what_the_results_say():
    tool = runpy.run_path(str(PAPER.parents[1]/'tools/verdict_picture.py'))
    assert tool['shown']() == tool['verdicts']()[1], 'python tools/verdict_picture.py draws it anew'
    assert 'images/verdicts.png' in (PAPER.parent/'index.ipynb').read_text()
