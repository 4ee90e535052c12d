"Metrics and figures of tokens without a domain and of numbers that are none."
import math

import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest, torch

from libmoe_nb.analysis.interventions import next_ranked
from libmoe_nb.analysis.metrics import *
from libmoe_nb.analysis.traces import make_trace
from libmoe_nb.plots.experts import *
from libmoe_nb.plots.routing import *
from libmoe_nb.plots.training import *
from libmoe_nb.plots.style import figure_uri

def test_tokens_of_no_domain_beside_a_domain_called_unknown():
    t = make_trace([[[0, 1], [1, 0], [2, 0]]], 3, 1, domain=[0, -1, 5], domains=['unknown'])
    assert expert_allocation_entropy(t).domain.tolist() == ['(unknown)', 'unknown', '5']
    assert expert_allocation_entropy(make_trace([[[0, 1], [1, 0]]], 3, 1, domain=[0, 5],
                                                domains=['5'])).domain.tolist() == ['5', '(5)']

def test_next_ranked_of_scores_that_are_no_numbers():
    from libmoe_nb.moe.config import MoESpec
    from libmoe_nb.moe.recipes import build_layer
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
