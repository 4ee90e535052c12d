"""Every recipe for 20,000 small steps: does a loss drift, does memory grow, does a router die, do choices flip?

    python benchmarks/numerics.py --minutes 240 --json benchmarks/numerics.json    # the whole; goes on where it stopped
    python benchmarks/numerics.py --minutes 3 --json benchmarks/numerics.json      # some steps of each

Two parts. `train` gives each recipe in each precision an equal share of the time. Its state is saved in `--state`, and
the same command goes on from there until all have made `--steps` steps. Every `--every` steps, after a collection of
garbage and without the curves that fastai's recorder keeps, it writes down: the mean loss since the last time, the
memory of the process (RSS), the busiest expert's load over the mean, the lowest entropy and the number of dead experts
over routers, steps whose loss was not finite, and the share of tokens that would be routed otherwise in use (see
`MismatchTelemetry`).
A row is as it should be if the mean loss of the last quarter is at most `--drift` above that of the best quarter, no
loss was not finite, no router is dead, and memory grows by at most `--growth` MB in 1,000 steps (the slope of a line
through what each process measured in the second half of its steps). A router is dead if every batch of 128 tokens that
was looked at in the last quarter left some expert out, or if the median of the lowest entropy there is below
`--entropy`.
`ties` routes `--tokens` tokens through layers whose experts come in pairs that score the same, once in a forward pass
and once more when activations are recomputed in the backward pass, and counts tokens whose experts differ."""
import argparse, gc, json, os, platform, statistics, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np, torch
from fastai.basics import CancelFitException

from libmoe_nb.analysis.mismatches import changed_choices
from libmoe_nb.core.files import write_json
from libmoe_nb.data.text import text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import MoESpec, recipes
from libmoe_nb.moe.recipes import build_layer
from libmoe_nb.training.checkpoints import Checkpoint, resume
from libmoe_nb.training.learner import Callback, moe_learner
from libmoe_nb.training.telemetry import MismatchTelemetry, RoutingTelemetry

size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8)


def memory_mb():
    "What this process holds"
    for _ in range(2): gc.collect()
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def forget_curves(learn):
    "What fastai's recorder and scheduler keep of each step, about 0.9 MB in 1,000 steps"
    r = learn.recorder
    r.losses, r.lrs, r.iters = [], [], []
    for cb in learn.cbs:
        if hasattr(cb, 'hps'): cb.hps = {k: [] for k in cb.hps}


class Sampler(Callback):
    "Writes a row down every so many steps, and ends the fit when its time is over"
    order, run_valid = 90, False
    def __init__(self, every, until, session, tell):
        self.every, self.until, self.session, self.tell = every, until, session, tell
        self.rows, self.losses, self.nonfinite = [], [], 0
    def after_batch(self):
        learn, loss = self.learn, float(self.learn.loss)
        if np.isfinite(loss): self.losses.append(loss)
        else: self.nonfinite += 1
        if learn.step % self.every == 0: self.sample()
        if time.monotonic() > self.until: raise CancelFitException()
    def sample(self):
        learn = self.learn
        forget_curves(learn)
        row = dict(step=learn.step, session=self.session, loss=round(statistics.fmean(self.losses), 4) if self.losses
                   else None, nonfinite=self.nonfinite, skipped=sum(len(c.rows) for c in learn.cbs
                                                                    if getattr(c, 'split', '') == 'skipped'))
        seen = [r for r in learn.routing_telemetry.rows if r['step'] == learn.step]
        off = [r for r in learn.mismatch_telemetry.rows if r['step'] == learn.step]
        if seen: row |= dict(load_max_mean=round(max(r['load_max_mean'] for r in seen), 3),
                             entropy=round(min(r['entropy'] for r in seen), 4),
                             dead=sum(r['dead_experts'] for r in seen))
        if off: row |= dict(mismatched=round(max(r['share'] for r in off), 4))
        self.rows.append(row | dict(memory=round(memory_mb(), 2)))
        self.losses = []
        self.tell(self.rows[-1])
    def state(self): return dict(rows=self.rows, losses=self.losses, nonfinite=self.nonfinite)
    def load_state(self, s): self.rows, self.losses, self.nonfinite = s['rows'], s['losses'], s['nonfinite']


def learner(recipe, precision, data, a, sampler, folder):
    model = from_scratch(recipe, 'tiny', seed=0, vocab_size=data.vocab_size, sequence_length=data.sequence_length,
                         **size)
    watch = [RoutingTelemetry(a.every), MismatchTelemetry(a.every), Checkpoint(folder, keep_last=1), sampler]
    return moe_learner(model, data, preset='tiny', batch_size=4, steps=a.steps, lr=a.lr, final_lr_fraction=1.,
                       warmup_steps=min(100, a.steps // 2), valid_steps=1, device=a.device, bf16=precision == 'bf16',
                       fp16=precision == 'fp16', cbs=watch)


def quarters(rows, key):
    "Of each quarter of the steps"
    end = rows[-1]['step']
    return [[r[key] for r in rows if q < 4 * r['step'] / end <= q + 1 and r.get(key) is not None] for q in range(4)]


def growth(rows):
    "MB in 1,000 steps: the median over processes of the slope in the second half of their steps; None: too few"
    found = []
    for s in {r['session'] for r in rows}:
        own = [r for r in rows if r['session'] == s]
        own = own[len(own) // 2:]
        if len(own) >= 4: found.append(np.polyfit([r['step'] / 1e3 for r in own], [r['memory'] for r in own], 1)[0])
    return round(float(np.median(found)), 3) if found else None


def judged(recipe, precision, rows, steps, seconds, a):
    "The row of a recipe in the JSON"
    row = dict(part='train', recipe=recipe, precision=precision, steps=steps, of=a.steps, every=a.every,
               seconds=round(seconds, 1))
    if not rows: return row | dict(ok=True, samples=[])
    losses = [statistics.fmean(q) if q else None for q in quarters(rows, 'loss')]
    entropy = [statistics.median(q) for q in quarters(rows, 'entropy')[-1:] if q]
    known = [l for l in losses if l is not None]
    row |= dict(losses=[None if l is None else round(l, 3) for l in losses], drift=round(losses[-1] - min(known), 3)
                if losses[-1] is not None else None, dead=min(quarters(rows, 'dead')[-1], default=0),
                entropy=min(entropy, default=1.), nonfinite=rows[-1]['nonfinite'], skipped=rows[-1]['skipped'],
                memory_growth=growth(rows),
                mismatched=max((r['mismatched'] for r in rows if 'mismatched' in r), default=0))
    bad = dict(drift=row['drift'] is None or row['drift'] > a.drift, nonfinite=row['nonfinite'] > 0,
               dead=row['dead'] > 0 or row['entropy'] < a.entropy, memory=(row['memory_growth'] or 0) > a.growth)
    return row | dict(ok=not any(bad.values()), bad=[n for n, b in bad.items() if b], samples=rows)


def train(recipe, precision, data, a, seconds, old):
    "Some more steps of a recipe; its row"
    folder = a.state/f'{recipe}-{precision}-{a.steps}-{a.every}'
    before = [r['session'] for r in old.get('samples', [])]
    sampler = Sampler(a.every, time.monotonic() + seconds, max(before, default=-1) + 1,
                      lambda r: print(f'{recipe} {precision}', *(f'{k} {v}' for k, v in r.items()), flush=True))
    learn = learner(recipe, precision, data, a, sampler, folder)
    if resume(learn, folder) and learn.step >= a.steps: return old
    start = time.monotonic()
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    return judged(recipe, precision, sampler.rows, learn.step, old.get('seconds', 0) + time.monotonic() - start, a)


def ties(recipe, a):
    "Tokens whose experts differ when activations are recomputed, of `a.tokens`"
    from torch.utils.checkpoint import checkpoint
    torch.manual_seed(0)
    layer = build_layer(MoESpec(recipe, hidden_size=16, num_experts=8, top_k=3, moe_intermediate_size=4,
                                num_shared_experts=int(recipe.startswith('sharede')), router_init_std=.5)).to(a.device)
    with torch.no_grad():                                       # each second expert scores as the one before it
        for p in layer.router.parameters():
            if p.ndim == 2: p[1::2] = p[:-1:2].clone() if len(p) % 2 == 0 else p[:-1:2][:len(p[1::2])].clone()
    seen, flips, tokens = [], 0, 0
    hook = layer.router.register_forward_hook(lambda m, args, out: seen.append(out))
    while tokens < a.tokens:
        n = min(a.tokens - tokens, 1 << 15)
        x = torch.randn(1, n, 16, device=a.device, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        first, again = seen
        flips, tokens = flips + int((changed_choices(first, again) > 0).sum()), tokens + n
        seen.clear()
    hook.remove()
    return dict(part='ties', recipe=recipe, tokens=tokens, flips=flips, ok=flips == 0)


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--minutes', type=float, default=3, help='of training, shared by all')
    p.add_argument('--steps', type=int, default=20_000); p.add_argument('--every', type=int, default=250)
    p.add_argument('--recipes', nargs='+', choices=list(recipes), default=list(recipes))
    p.add_argument('--precisions', nargs='+', choices=['fp32', 'bf16', 'fp16'], default=['fp32'])
    p.add_argument('--tokens', type=int, default=1_000_000, help='of the part `ties`; 0: without it')
    p.add_argument('--lr', type=float, default=2e-3); p.add_argument('--device', default='cpu')
    p.add_argument('--drift', type=float, default=.1); p.add_argument('--growth', type=float, default=1.)
    p.add_argument('--entropy', type=float, default=.5)
    p.add_argument('--state', type=Path, default=Path(tempfile.gettempdir())/'libmoe-numerics')
    p.add_argument('--json', type=Path)
    a = p.parse_args(args)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    kept = json.loads(a.json.read_text())['rows'] if a.json and a.json.exists() else []
    rows = {(r['part'], r['recipe'], r.get('precision')): r for r in kept}
    machine = dict(torch=torch.__version__, python=platform.python_version(), device=a.device)
    def keep(row):
        rows[row['part'], row['recipe'], row.get('precision')] = row
        if a.json: write_json(a.json, dict(machine=machine, rows=[*rows.values()]))
    for r in [r for r in a.recipes if r != 'dense'] if a.tokens else []:
        if rows.get(('ties', r, None), {}).get('tokens', 0) < a.tokens: keep(ties(r, a)); print(rows['ties', r, None])
    data = text_data('python', vocab_size=300, sequence_length=32, max_bytes=1_000_000, cache_dir=a.state/'cache')
    todo, end = [(r, q) for r in a.recipes for q in a.precisions], time.monotonic() + 60 * a.minutes
    for i, (r, q) in enumerate(todo):
        old = rows.get(('train', r, q), {})
        if (old.get('of'), old.get('every')) != (a.steps, a.every): old = {}
        keep(train(r, q, data, a, max(end - time.monotonic(), 0) / (len(todo) - i), old))
    bad = [r for r in rows.values() if not r['ok']]
    for r in rows.values(): print({k: v for k, v in r.items() if k != 'samples'})
    print(f'{len(rows) - len(bad)} of {len(rows)} rows are as they should be')
    return int(bool(bad))


if __name__ == '__main__': sys.exit(main())
