"Made-up results of a campaign: every table that measures write, with the right columns and plausible numbers."
import json

import numpy as np
import pandas as pd

from libmoe_nb.paper.campaign import get_scale

L, N, STEPS = 4, 16, (0, 20, 100, 200, 500, 800, 1200, 1600, 2000)

def frame(value, **columns):
    "A row for each combination of the columns' values"
    t = pd.MultiIndex.from_product(columns.values(), names=list(columns)).to_frame(index=False)
    return t.assign(value=value(t))

def pairs(g):
    experts = list(g.permutation(N)[:15])
    return frame(lambda t: g.uniform(.05, .5, len(t)), step=STEPS[1::3], layer=(1, 3), expert=experts,
                 other=experts).query('expert != other')

def tables_of(recipe, variant, seed):
    "name -> table of one language model"
    g = np.random.default_rng([seed, *map(ord, recipe + variant)])
    lift, n = g.uniform(0, .1), lambda t, s=.005: g.normal(0, s, len(t))
    progress = lambda t: t.assign(progress=t.step / STEPS[-1])
    depth = lambda t: t.assign(depth=(t.layer / (L - 1)).round(4))
    late = lambda t: 1 / (1 + t.step / 200)
    res = dict(
        perplexity=progress(frame(lambda t: np.exp(4.6 + 2.5 * late(t) + lift + n(t)), step=STEPS)),
        training_loss=frame(lambda t: 4.6 + 2 * np.exp(-4 * t.progress) + lift + n(t, .03),
                            progress=np.arange(1, 41) / 40),
        balance_curve=frame(lambda t: 1 + .1 * late(t) + lift + n(t, .002), step=range(10, 2001, 10)),
        imbalance=pd.DataFrame([dict(value=1.5 + lift)]), speed=pd.DataFrame([dict(value=5000 + 100 * lift)]))
    if variant.startswith('init_'): res['balance'] = res['balance_curve'] = res['balance_curve'].assign(
        init_std=float(variant[5:]))
    if recipe == 'dense':
        return {n: t for n, t in res.items() if n not in ('balance_curve', 'imbalance')} | _accuracy(g, variant, lift)
    checkpoints = STEPS[1:]
    res |= dict(
        change_rate=progress(frame(lambda t: .1 + .6 * late(t) + lift + n(t), step=checkpoints)),
        change_rate_defined=progress(frame(lambda t: .15 + .7 * late(t) + lift + n(t), step=checkpoints,
                                           by=('slot', 'vocabulary'))),
        saturation=progress(frame(lambda t: 1 - .6 * late(t) - .05 * (t.k == 'first') - lift + n(t), step=STEPS,
                                  k=('all', 'first'))),
        strongest_pairs=progress(frame(lambda t: 1 - .8 * late(t) + n(t), step=STEPS)),
        margin=depth(frame(lambda t: .05 + .05 * t.layer + lift + n(t), layer=range(L))),
        loads=frame(lambda t: g.dirichlet(np.full(N, 9.), L).reshape(-1) * 4, layer=range(L), expert=range(N)),
        output_similarity=depth(frame(lambda t: .4 + n(t, .05), layer=range(L))),
        allocation_entropy=frame(lambda t: .95 - lift + n(t), domain=('kjv', 'python', 'sotu')),
        weight_entropy=frame(lambda t: .9 - lift + n(t), group=('kjv', 'python', 'sotu')),
        perturbation=frame(lambda t: .3 + lift + n(t, .02), intervention=('drop_top1', 'drop_top12', 'random')),
        ablation=frame(lambda t: g.exponential(.02, len(t)), layer=range(L), expert=range(N)))
    res['saturation_by_vocabulary'] = res['saturation'].assign(value=lambda t: (t.value + .05).clip(upper=1))
    res['margin_of_weights'] = res['margin'].assign(value=lambda t: t.value * 2)
    res['output_similarity_as_released'] = res['output_similarity'].assign(value=lambda t: t.value / 10)
    res['ablation'] = res['ablation'].assign(
        **{c: g.uniform(0, 1, L * N) for c in ('load', 'weight', 'margin', 'partner', 'lift', 'similarity')})
    if variant == 'base' and seed == 0: res['pairs'] = pairs(g)
    return res | _accuracy(g, variant, lift)

def _accuracy(g, variant, lift):
    if variant not in ('base', 'larger', 'faithful', 'control'): return {}
    t = frame(lambda t: 30 + 20 * lift + g.normal(0, .5, len(t)), tau=(.1, 1., 10.), intervention=('none', 'drop_top1'),
              task=('cloze', 'continuation', 'last_word', 'minimal_pairs', 'recall'))
    return dict(accuracy=t[(t.tau == 1) | (t.intervention == 'none')].assign(n=50))

def seen_tables(recipe, seed):
    "name -> table of one vision-language model"
    g = np.random.default_rng([seed, 7, *map(ord, recipe)])
    n = lambda t, s=.005: g.normal(0, s, len(t))
    depth = lambda t: t.assign(depth=(t.layer / (L - 1)).round(4))
    return dict(
        change_rate=frame(lambda t: .5 - .4 * t.progress + n(t), progress=(.05, .1, .3, .6, .8, 1.)),
        allocation_entropy=frame(lambda t: .95 + n(t), domain=('arithmetic', 'colour', 'count')),
        weight_entropy=frame(lambda t: .9 + n(t), group=('coarse', 'fine', 'ocr', 'reasoning')),
        margin=depth(frame(lambda t: .05 + .05 * t.layer + n(t), layer=range(L))),
        output_similarity=depth(frame(lambda t: .4 + n(t, .05), layer=range(L))),
        speed=pd.DataFrame([dict(value=100. + g.normal())]),
        accuracy=frame(lambda t: 40 + n(t, 1.), task=('colour', 'count'), tau=(1.,),
                       intervention=('none', 'drop_top1', 'drop_top12')))

def write_made_results(
    folder,                         # e.g. results/mini
    keep=lambda **who: True,        # is a run of regime, recipe, variant and seed there?
    scale='mini',
):
    "A folder of results as `write_results` leaves one."
    folder.mkdir(parents=True, exist_ok=True)
    tables, runs, scale = {}, [], get_scale(scale)
    for g in scale.groups:
        for who in (dict(regime=g.regime, recipe=r, variant=g.variant, seed=s) for s in g.seeds for r in g.recipes):
            if not keep(**who): continue
            made = seen_tables(who['recipe'], who['seed']) if g.regime == 'vision' else \
                tables_of(who['recipe'], g.variant, who['seed'])
            for name, t in made.items(): tables.setdefault(name, []).append(t.assign(**who))
            runs.append(dict(group=g.name, name='made up', steps=STEPS[-1], perplexity=100., parameters=10**6,
                             active_parameters=10**6, tokens=2 * 10**6, seconds=300.,
                             **{c: who[c] for c in ('variant', 'recipe', 'seed')}))
    for name, ts in tables.items(): pd.concat(ts).to_csv(folder/f'{name}.csv', index=False)
    (folder/'runs.json').write_text(json.dumps(dict(command=f'libmoe reproduce --scale {scale.name}', scale=scale.name,
                                                    written='', versions={}, machine='', data=None, unigram=None,
                                                    missing=[], runs=runs)))
