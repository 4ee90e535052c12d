#!/usr/bin/env python3
"""How far training on two processes is from training on one: every recipe, each way of sharing, every quantity.

    python benchmarks/parity.py --json benchmarks/parity.json    # all of it, some minutes
    python benchmarks/parity.py --recipes smoe tcmoe --ways ep   # a part of it; what a file has of the rest stays there
    python benchmarks/parity.py --show benchmarks/parity.json    # the table again

One process trains each recipe for a few steps. Two processes on CPUs (gloo) then train it from the same weights on the
same batches in each way, and what they come to is held against what the one came to: the largest absolute difference
of the losses of the steps, of the gradients and the weights after the last step, of the expert biases, of the
telemetry of all layers, and of the validation loss. All in float32, with sequences of unequal lengths, in steps of
one part and of two, and with batches that do not divide by two. The optimiser is SGD: Adam divides by the size of a
gradient, which turns a difference in rounding into a step of full length wherever a gradient is almost zero. XMoE's
cosines are of 8 dimensions. With 2, half of the 4 experts, a token comes near zero now and then, where its direction
is all rounding, and gradients differ by up to 1e-5.
"""
import argparse, json, logging, os, subprocess, sys, tempfile, warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

warnings.simplefilter('ignore')
import torch
from fastai.basics import Callback, OptimWrapper
from transformers.utils.logging import disable_progress_bar
from libmoe_nb.core.modes import unwrap
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.training.distributed import *
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.telemetry import RoutingTelemetry

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             sequence_length=16, vocab_size=50)
RECIPES = dict(dense={}, smoe={}, smoe_sigmoid={}, xmoe=dict(router_size=8), sharede_v2={}, sharede_v3={},
               tcmoe=dict(negative_offset=0., null_offset=0.),
               moe_plus_plus=dict(num_zero=1, num_copy=1, num_constant=1))
ROUTED = dict(expert_bias=True, aux_loss_group='global_batch', router_aux_loss_coef=.1, router_z_loss_coef=.01,
              router_init_std=.3)
# name -> how transformers shares the model; None: accelerate does, a copy in each process
WAYS = dict(ddp=None, fsdp=dict(fsdp_size=2), ep=dict(fsdp_size=2, ep_size=2), tp_ep=dict(tp_size=2, ep_size=2))
TITLES = dict(ddp='DDP', fsdp='FSDP2', ep='FSDP2 + experts apart', tp_ep='tensor parallel + experts apart')
# name -> lengths of the sequences of a batch, parts of a step, experts to route to, and whether half of them are idle
CASES = dict(uneven=dict(lengths=(3, 16, 9, 16)), parts=dict(lengths=(3, 16, 9, 16), parts=2),
             odd=dict(lengths=(16, 5, 12)), rare=dict(lengths=(1, 16, 2, 16), experts=16),
             idle=dict(lengths=(3, 16, 9, 16), idle=True))
QUANTITIES = 'loss', 'gradients', 'weights', 'expert bias', 'telemetry', 'validation'

class Texts:
    "Batches of random sequences of these lengths"
    sequence_length = 16
    def __init__(self, lengths): self.lengths = lengths
    def __len__(self): return len(self.lengths)
    def batches(self, batch_size, seed=0, start=0):
        real = torch.arange(16) < torch.tensor(self.lengths)[:, None]
        while True:
            ids = torch.randint(0, 50, (len(self), 17), generator=torch.Generator().manual_seed(start))
            yield dict(input_ids=torch.where(real, ids[:, :16], 0), labels=torch.where(real, ids[:, 1:], -100),
                       domain=torch.where(real, 0, -1))
            start += 1
    def epoch(self, batch_size): return iter([next(self.batches(batch_size, start=99))])

class Gradients(Callback):
    "Keeps the gradients of the last step as they were before clipping, and what each process's routers were given"
    order, uses_routing = -50, True
    def before_step(self):
        self.kept = {n: whole(p.grad) for n, p in unwrap(self.model).named_parameters()
                     if p.grad is not None}
        kept = self.learn.routings.values()
        self.loads = [sum(r.expert_index.flatten().bincount(minlength=r.num_experts + 1) for r, _ in rs) for rs in kept]

def whole(t):
    "A copy of all of a tensor, wherever its pieces are"
    return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()

def build(recipe, experts=4, idle=False, **kwargs):
    "A small model that routes to so many experts; `idle`: those that the second process would have get no token"
    one = recipe.startswith('sharede')                     # expert is shared, and not among those to route to
    sizes = SIZES | dict(num_experts=experts + one, top_k=2 + one) | (ROUTED if recipe != 'dense' else {})
    model = from_scratch(recipe, 'tiny', seed=0, **sizes | RECIPES[recipe])
    for n, b in model.named_buffers():
        if idle and n.endswith('expert_bias'):             # of TC-MoE the negative choices run the same experts
            b.copy_(torch.tensor([100. * (i < 2 * experts and i % experts < experts // 2) for i in range(len(b))]))
    return model

def train(model, lengths, parts=1, distribute=False, steps=3, cbs=(), **kwargs):
    "What a few steps of training come to: quantity -> tensor, or name -> tensor"
    data = SimpleNamespace(train=Texts(lengths), valid=Texts(lengths), domains=['a'], vocab_size=50, sequence_length=16,
                           fingerprint='x')
    told, grads = RoutingTelemetry(every=1), Gradients()
    learn = moe_learner(model, data, preset='tiny', batch_size=4, steps=steps, lr=.5, grad_clip=.5, grad_accum=parts,
                        device='cpu', cbs=[told, grads, *cbs])
    learn.opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))
    if distribute: learn.distribute(cpu=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    state = {n: whole(t) for n, t in learn.model.state_dict().items()}
    biases = {n: t for n, t in state.items() if n.endswith('expert_bias')}
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])) if learn.recorder.values else {}
    return {'loss': torch.stack(learn.recorder.losses), 'gradients': grads.kept, 'expert bias': biases,
            'weights': {n: t for n, t in state.items() if n not in biases},
            'telemetry': torch.tensor(told.table().to_numpy(dtype='float64')),
            'validation': torch.tensor([v for n, v in values.items() if n in ('valid_loss', 'perplexity')]),
            }, grads.loads

def furthest(a, b):
    "Largest absolute difference of two tensors or of two dictionaries of them; None where there is nothing"
    if not torch.is_tensor(a):
        assert sorted(a) == sorted(b), sorted(set(a) ^ set(b))
        return max((furthest(a[n], b[n]) for n in a), default=None)
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item() if a.numel() else None

def spread(folder, recipe, how):
    "The model as two processes have it"
    if how is None: return MoEForCausalLM.from_pretrained(folder/recipe)
    from transformers.distributed import DistributedConfig
    return MoEForCausalLM.from_pretrained(folder/recipe, distributed_config=DistributedConfig(**how))

def can(recipe, how, case):
    "Is there anything to share out, or to be idle?"
    return recipe != 'dense' or not ('ep_size' in (how or {}) or CASES[case].get('idle'))

def rows_of_rank(folder, recipes, ways, cases):
    """On each of two processes: train every recipe in every way, and compare with what one process came to. `on_one`
    and `on_none` count experts, over layers, that one process or none had a token for in the last step; `no_expert`
    counts the choices of that step that run none"""
    disable_progress_bar()
    rows = []
    for case, recipe, way in ((c, r, w) for c in cases for r in recipes for w in ways if can(r, WAYS[w], c)):
        one = torch.load(folder/f'{case}-{recipe}.pt', weights_only=True)
        got, loads = train(spread(folder/case, recipe, WAYS[way]), **CASES[case], distribute=True)
        both = [None, None]
        torch.distributed.all_gather_object(both, [l.tolist() for l in loads])
        pairs = [(a, b) for x, y in zip(*both) for a, b in zip(x[:-1], y[:-1])]
        rows.append(dict(case=case, recipe=recipe, way=way, **{q: furthest(one[q], got[q]) for q in QUANTITIES},
                         moved=furthest(one['weights'], one['start']),
                         on_one=sum((a == 0) != (b == 0) for a, b in pairs), on_none=sum(a + b == 0 for a, b in pairs),
                         no_expert=sum(x[-1] for loads in both for x in loads)))
    return rows

def references(folder, recipes, cases):
    "Train each recipe on one process, and keep the model that it began with and what it came to"
    disable_progress_bar()
    for case in cases:
        for recipe in (r for r in recipes if can(r, None, case)):
            model = build(recipe, **CASES[case])
            model.save_pretrained(folder/case/recipe)
            start = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith('expert_bias')}
            torch.save(train(model, **CASES[case])[0] | dict(start=start), folder/f'{case}-{recipe}.pt')

def show(rows):
    "The largest difference over all cases, for each recipe, way and quantity"
    import pandas as pd
    t = pd.DataFrame(rows).groupby(['recipe', 'way'], sort=False)[[*QUANTITIES]].max()
    print(t.map(lambda v: '' if pd.isna(v) else f'{v:.0e}').to_string())
    print(f'largest of all: {t.max().max():.1e}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in dict(recipes=RECIPES, ways=WAYS, cases=CASES).items():
        p.add_argument(f'--{name}', nargs='+', choices=[*known], default=[*known])
    p.add_argument('--json'); p.add_argument('--show'); p.add_argument('--folder', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.show: return show(json.loads(Path(a.show).read_text())['rows'])
    torch.set_num_threads(1)
    if a.folder:
        torch.distributed.init_process_group('gloo')
        logging.getLogger('torch.distributed.tensor').setLevel(logging.ERROR)   # that a tensor is cut twice
        rows = rows_of_rank(Path(a.folder), a.recipes, a.ways, a.cases)
        if torch.distributed.get_rank() == 0: (Path(a.folder)/'rows.json').write_text(json.dumps(rows))
        torch.distributed.barrier()
        return torch.distributed.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        references(Path(folder), a.recipes, a.cases)
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__,
                        '--folder', folder, '--recipes', *a.recipes, '--ways', *a.ways, '--cases', *a.cases],
                       check=True,
                       env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'))
        rows = json.loads((Path(folder)/'rows.json').read_text())
    show(rows)
    if a.json:
        import transformers
        place = lambda r: ([*CASES].index(r['case']), [*RECIPES].index(r['recipe']), [*WAYS].index(r['way']))
        before = json.loads(Path(a.json).read_text())['rows'] if Path(a.json).exists() else []
        rows = sorted({place(r): r for r in before + rows}.values(), key=place)
        Path(a.json).write_text(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__,
                                                rows=rows), indent=1) + '\n')

if __name__ == '__main__': main()
