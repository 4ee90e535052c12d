"Figures of metrics at the sizes of real models: nothing overlaps, and nothing is cut off."
import numpy as np, pandas as pd, pytest

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

from libmoe_nb.analysis.metrics import *
from libmoe_nb.plots.experts import *
from libmoe_nb.plots.routing import *
from libmoe_nb.plots.style import recipe_looks, recipe_style, recipe_title
from libmoe_nb.plots.training import *

EIGHT = 'dense smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()
DOMAINS = ['python', 'sotu', 'kjv', 'a domain with quite a long name', *(f'subtask {i}' for i in range(10))]

def big(seed=0, N=66, K=8, L=32, T=600):
    return random_trace(T, N, K, L, seed=seed, token=np.arange(T) % 90, domain=np.arange(T) % len(DOMAINS),
                        domains=DOMAINS)

def table(metric, recipes=EIGHT[1:], seeds=2, **kw):
    return pd.concat(metric(big(s + 10*i, L=4), **kw).assign(recipe=r, seed=s) for i, r in enumerate(recipes)
                     for s in range(seeds))

FIGURES = dict(
    by_layer_recipes=lambda: plot_by_layer(table(router_margin), 'margin', random=.015),
    by_layer_deep=lambda: plot_by_layer(router_margin(big()), 'margin'),
    by_layer_domains=lambda: plot_by_layer(expert_weight_entropy(big()), 'entropy'),
    by_layer_steps=lambda: plot_by_layer(over_checkpoints([big(s, L=4) for s in range(12)], router_margin), 'margin',
                                         by='step', random=.015),
    checkpoints=lambda: plot_over_checkpoints(over_checkpoints([big(s, L=4) for s in range(5)], router_saturation,
                                                               'last').assign(recipe='smoe'), 'saturation'),
    checkpoints_layers=lambda: plot_over_checkpoints(over_checkpoints([big(s) for s in range(3)], router_margin),
                                                     'margin', by='layer'),
    allocation=lambda: plot_allocation(table(expert_allocation_entropy)),
    allocation_one=lambda: plot_allocation(expert_allocation_entropy(big(L=2))),
    pairs=lambda: plot_co_activation(co_activation(big(L=1))),
    pairs_all=lambda: plot_co_activation(co_activation(big(L=1)), top=66),
    specialisation=lambda: plot_specialisation(domain_specialisation(big(L=1))),
    similarity=lambda: plot_similarity(pd.DataFrame([dict(layer=0, expert=i, other=j, similarity=.1) for i in range(66)
                                                     for j in range(i + 1, 66)])),
    perturbation=lambda: plot_perturbation(pd.DataFrame([dict(intervention=n, recipe=r, seed=s, loss_change=.1 * s + .2)
                                                         for n in ('none', 'drop_top1', 'drop_top12') for r in EIGHT
                                                         for s in (0, 1)])),
    perplexity=lambda: plot_perplexity(pd.DataFrame([dict(recipe=r, seed=s, perplexity=300. + 10*i + 20*s)
                                                     for i, r in enumerate(EIGHT) for s in (0, 1)]), unigram=391.),
)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def boxes(texts): return [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]

def overlap(a, b): return min(a.x1, b.x1) - max(a.x0, b.x0) > .5 and min(a.y1, b.y1) - max(a.y0, b.y0) > .5

@pytest.mark.parametrize('name', FIGURES)
def test_text_neither_overlaps_nor_is_cut(name):
    fig = FIGURES[name]().figure
    fig.canvas.draw()
    texts = []
    for ax in fig.axes:
        ticks = [t for axis in (ax.xaxis, ax.yaxis) for t in axis._update_ticks()]          # those in view
        texts += [*(l for t in ticks for l in (t.label1, t.label2) if l.get_visible()), ax.xaxis.label, ax.yaxis.label,
                  ax._left_title, *ax.texts]
        if ax.get_legend(): texts += ax.get_legend().get_texts()
    inside = [t for t in texts if t.get_text()]
    assert inside
    for t in inside:
        b = t.get_window_extent()
        assert (b.x0 > -2 and b.y0 > -2 and b.x1 < fig.bbox.x1 + 2
                and b.y1 < fig.bbox.y1 + 2), f'cut off: {t.get_text()!r}'
    found = boxes(inside)
    pairs = [(inside[i].get_text(), inside[j].get_text()) for i in range(len(found))
             for j in range(i) if overlap(found[i], found[j])]
    assert not pairs

@pytest.mark.parametrize('name', ['by_layer_recipes', 'allocation', 'perturbation'])
def test_one_colour_for_a_recipe_everywhere(name):
    ax = FIGURES[name]()
    handles, labels = (ax.get_legend_handles_labels() if name == 'perturbation'
                       else (ax.get_legend().legend_handles, [t.get_text() for t in ax.get_legend().get_texts()]))
    colours = dict(zip(labels, [matplotlib.colors.to_hex(h[0].get_facecolor() if hasattr(h, 'patches')
                                                         else h.get_color()) for h in handles]))
    for r in EIGHT[1:]: assert colours[recipe_title(r)] == recipe_style(r)['color']

ODD = ['cost_$_and_$', 'b']

@pytest.mark.parametrize('draw', [
    lambda: plot_by_layer(expert_weight_entropy(random_trace(60, domain=np.arange(60) % 2, domains=ODD)), 'entropy'),
    lambda: plot_allocation(pd.concat(expert_allocation_entropy(random_trace(60, domain=np.arange(60) % 2, domains=ODD))
                                      .assign(model=m) for m in ODD)),
    lambda: plot_specialisation(domain_specialisation(random_trace(60, domain=np.arange(60) % 2, domains=ODD))),
    lambda: plot_perturbation(pd.DataFrame([dict(intervention=i, model=m, loss_change=.1) for i in ODD for m in ODD])),
    lambda: plot_curves(pd.DataFrame([dict(recipe=r, seed=0, tokens=t, valid_perplexity=9.) for r in ODD
                                      for t in (0, 1)])),
    lambda: plot_perplexity(pd.DataFrame([dict(recipe=r, seed=0, perplexity=9.) for r in ODD])),
    lambda: plot_domains(pd.DataFrame([dict(recipe=r, seed=0, domain=d, perplexity=9.) for r in ODD for d in ODD])),
    lambda: plot_loads(pd.DataFrame([dict(layer=0, domain=d, expert=e, load=1.) for d in ODD for e in (0, 1)]),
                       title=ODD[0])])
def test_names_are_no_formulas(draw, monkeypatch):
    for name in ODD: monkeypatch.setitem(recipe_looks, name, ('#123456', '-', 'o'))       # taken out again afterwards
    fig = draw()
    fig = getattr(fig, 'figure', None) or fig
    fig.canvas.draw()
    said = [t.get_text() for t in fig.findobj(matplotlib.text.Text)]
    assert any('cost_$_and_$' in s for s in said)

@pytest.mark.parametrize('N, K', [(1, 1), (2, 1), (200, 3)])
def test_odd_sizes(N, K):
    t = random_trace(50, N, K, 2, domain=np.zeros(50, int), domains=['all of it'])
    plot_by_layer(router_margin(t), 'margin')
    plot_allocation(expert_allocation_entropy(t)); plot_specialisation(domain_specialisation(t))
    if N > 1: plot_co_activation(co_activation(t))
