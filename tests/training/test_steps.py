"A step of the optimiser is the same however it is cut: into processes or parts, by our loop or transformers' Trainer."
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from transformers import Trainer, TrainingArguments
from fastai.basics import OptimWrapper
from processes import run_ranks
from libmoe_nb.training.distributed import *
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.models.causal import from_scratch

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')
ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, moe_intermediate_size=8,
             num_experts=6, top_k=2, sequence_length=64)
LENGTHS = 6, 64, 17, 64
LOSSES = dict(router_aux_loss_coef=.5, router_z_loss_coef=.1)
SEQUENCES, MICRO, GLOBAL = (dict(aux_loss_group=g) for g in ('sequence', 'micro_batch', 'global_batch'))

def model(recipe='smoe', **kw):
    if recipe != 'dense': kw = LOSSES | kw
    return from_scratch(recipe, 'tiny', vocab_size=50, seed=0, router_init_std=.3, **SMALL, **kw)

class Texts:
    "Batches of sequences of these lengths; `labels` are shifted"
    sequence_length = 64
    def __init__(self, lengths=LENGTHS, unlabelled=0): self.lengths, self.unlabelled = lengths, unlabelled
    def __len__(self): return len(self.lengths)
    def batches(self, batch_size, seed=0, start=0):
        while True:
            g, real = (torch.Generator().manual_seed(100 * seed + start),
                       torch.arange(64) < torch.tensor(self.lengths)[:, None])
            ids = torch.randint(0, 50, (len(self), 65), generator=g)
            labels = torch.where(real, ids[:, 1:], -100)
            labels[-1, :self.unlabelled] = -100
            yield dict(input_ids=torch.where(real, ids[:, :64], 0), labels=labels, domain=torch.where(real, 0, -1))
            start += 1
    def epoch(self, batch_size): return iter([next(self.batches(batch_size))])

def texts(**kw):
    return SimpleNamespace(train=Texts(**kw), valid=Texts(**kw), domains=['a'], vocab_size=50, sequence_length=64,
                           fingerprint='x')

def learner(model, data=None, steps=3, sgd=True, **kw):
    data = data or texts()
    learn = moe_learner(model, data, preset='tiny', batch_size=len(data.train), steps=steps, lr=.1,
                          device='cpu', **kw)
    if sgd: learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)     # moments would hide small gradients
    return learn

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def furthest(a, b):
    assert sorted(a) == sorted(b)
    return max((a[n] - b[n]).abs().max().item() for n in a)

# parts of a step, in our loop

CASES = [('dense', {}), ('smoe', SEQUENCES), ('tcmoe', SEQUENCES | dict(null_reward_coef=1.)),
         ('sharede_v3', SEQUENCES | dict(expert_bias=True)), ('moe_plus_plus', SEQUENCES)]

@pytest.mark.parametrize('recipe, kw', CASES, ids=str)
@pytest.mark.parametrize('data', [dict(), dict(lengths=(6, 64, 0, 64), unlabelled=30)], ids=['padded', 'an empty row'])
def test_parts_are_the_whole(recipe, kw, data):
    "Accumulation with unequal numbers of tokens, in 2 and 4 parts"
    whole, *parts = (fit(learner(model(recipe, **kw), texts(**data), grad_accum=k)) for k in (1, 2, 4))
    for p in parts:
        assert furthest(whole.model.state_dict(), p.model.state_dict()) < 1e-6
        assert torch.allclose(torch.stack(whole.recorder.losses), torch.stack(p.recorder.losses), atol=1e-5)
        assert whole.aux_loss.value == pytest.approx(p.aux_loss.value or 0, abs=1e-5) if recipe != 'dense' else True

@pytest.mark.parametrize('kw', [MICRO, GLOBAL], ids=str)
def test_groups_over_sequences_see_parts(kw):
    "What differs then is the balance loss and nothing else"
    whole, parts = (fit(learner(model(**kw), grad_accum=k)).model.state_dict() for k in (1, 4))
    assert furthest(whole, parts) > 1e-5
    whole, parts = (fit(learner(model(**kw, router_aux_loss_coef=0.), grad_accum=k)).model.state_dict() for k in (1, 4))
    assert furthest(whole, parts) < 1e-6

# several processes

TWO = r'''
import sys, os, json, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import torch, test_steps as t
from safetensors.torch import save_file
torch.set_num_threads(1)
{body}
import torch.distributed as dist; dist.barrier(); dist.destroy_process_group()
'''

def two_processes(body, tmp_path):
    code = TWO.format(tests=str(ROOT/'tests'/'training'), root=str(ROOT), body=body)
    for done in run_ranks(code, tmp_path): assert done.returncode == 0, done.stderr[-3000:]

OVER_RANKS = CASES + [('smoe', GLOBAL), ('smoe', MICRO)]
OWN_LOOP = '''
for accum in (1, 2):
    for i, (recipe, kw) in enumerate(t.OVER_RANKS):
        learn = t.learner(t.model(recipe, **kw), grad_accum=accum).distribute(cpu=True)
        assert learn.dls.train.world == 2
        t.fit(learn)
        r = learn.dls.train.rank
        name, state = f'{sys.argv[1]}/{accum}-{i}-{r}', learn.model.state_dict()
        save_file({n: x.contiguous().clone() for n, x in state.items()}, f'{name}.safetensors')
        json.dump([learn.aux_loss.value, *map(float, learn.recorder.losses)], open(f'{name}.json', 'w'))
'''

@pytest.mark.long
def test_two_processes_are_one(tmp_path):
    "The first rank holds sequences of 6 and 17 tokens, the other two of 64"
    from safetensors.torch import load_file
    two_processes(OWN_LOOP, tmp_path)
    for i, (recipe, kw) in enumerate(OVER_RANKS):
        one = fit(learner(model(recipe, **kw)))
        for accum in (1, 2):
            a, b = (load_file(tmp_path/f'{accum}-{i}-{r}.safetensors') for r in range(2))
            assert all(torch.equal(a[n], b[n]) for n in a)
            far, exact = furthest(one.model.state_dict(), a), kw != MICRO and (kw != GLOBAL or accum == 1)
            assert (far < 1e-6) if exact else (far > 1e-5), (recipe, kw, accum, far)
            for r in range(2):
                aux, *losses = json.loads((tmp_path/f'{accum}-{i}-{r}.json').read_text())
                if exact:
                    # the recorded loss is that of the whole batch, on every rank
                    assert losses == pytest.approx([float(x) for x in one.recorder.losses], abs=1e-5)
                    assert recipe == 'dense' or aux == pytest.approx(one.aux_loss.value, abs=1e-5)

# the Trainer of transformers

def rows(lengths=LENGTHS, prompt=0, steps=3):
    b = Texts(lengths).batches(0)
    for _ in range(steps):
        for x, n in zip(next(b)['input_ids'], lengths):
            real = torch.arange(64) < n
            yield dict(input_ids=x, attention_mask=real.long(),
                       labels=torch.where(real & (torch.arange(64) >= prompt), x, -100))

def trained(tmp_path, m, batch_size, accum, lengths=LENGTHS, prompt=0, **kw):
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=batch_size,
                             gradient_accumulation_steps=accum, learning_rate=.1, optim='sgd',
                             lr_scheduler_type='constant',
                             max_grad_norm=0, report_to=[], use_cpu=True, save_strategy='no', logging_steps=1,
                             disable_tqdm=True, **kw)
    class InOrder(Trainer):
        def _get_train_sampler(self, *a, **k): return torch.utils.data.SequentialSampler(self.train_dataset)
    trainer = InOrder(m, args, train_dataset=list(rows(lengths, prompt)))
    trainer.train()
    return m.state_dict(), [l['loss'] for l in trainer.state.log_history if 'loss' in l]

@pytest.mark.parametrize('recipe, kw', [pytest.param(*c, marks=[pytest.mark.long] * (c[0] != 'smoe')) for c in CASES
                                        if 'expert_bias' not in c[1]], ids=str)
@pytest.mark.parametrize('prompt', [pytest.param(0, id='padded'),
                                    pytest.param(4, id='prompts without labels', marks=pytest.mark.long)])
def test_trainer_accumulates_exactly(recipe, kw, prompt, tmp_path):
    whole, losses = trained(tmp_path, model(recipe, **kw), 4, 1, prompt=prompt)
    for B, k in [(2, 2), (1, 4)]:
        parts, others = trained(tmp_path, model(recipe, **kw), B, k, prompt=prompt)
        assert furthest(whole, parts) < 1e-6 and others == pytest.approx(losses, abs=1e-4)

@pytest.mark.long
@pytest.mark.parametrize('kw', [MICRO, GLOBAL], ids=str)
def test_trainer_and_groups_over_sequences(kw, tmp_path):
    far = lambda **more: furthest(*(trained(tmp_path, model(**kw, **more), B, k)[0] for B, k in [(4, 1), (1, 4)]))
    assert far() > 1e-5 and far(router_aux_loss_coef=0.) < 1e-6

def test_trainer_and_our_loop_agree_where_rows_are_of_one_length(tmp_path):
    "One batch by hand: the loss of the Trainer is ours plus the auxiliary loss"
    m, row = model(), list(rows((64, 64, 64, 64), steps=1))
    batch = {k: torch.stack([r[k] for r in row]) for k in row[0]}
    n = (batch['labels'][:, 1:] != -100).sum()
    whole, step = m.train()(**batch), m(**batch, num_items_in_batch=n)
    assert (step.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
            and step.aux_loss.item() == pytest.approx(whole.aux_loss.item(), abs=1e-6))

TRAINER = '''
for i, (recipe, kw) in enumerate(t.OVER_RANKS):
    if 'expert_bias' in kw: continue
    state, losses = t.trained(sys.argv[1], t.model(recipe, **kw), 2, 1)
    state = {n: x.contiguous().clone() for n, x in state.items()}
    save_file(state, f'{sys.argv[1]}/{i}-{os.environ["RANK"]}.safetensors')
'''

@pytest.mark.long
def test_trainer_over_two_processes(tmp_path):
    from safetensors.torch import load_file
    two_processes(TRAINER, tmp_path)
    for i, (recipe, kw) in enumerate(OVER_RANKS):
        if 'expert_bias' in kw: continue
        one, _ = trained(tmp_path, model(recipe, **kw), 4, 1)
        a, b = (load_file(tmp_path/f'{i}-{r}.safetensors') for r in range(2))
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert (furthest(one, a) < 1e-6) == (kw != MICRO), (recipe, kw, furthest(one, a))

def test_a_base_that_ignores_the_number_of_labels(tmp_path):
    "Its loss is a mean, so a trainer has to divide by the number of micro-batches: 4 of equal rows are one of four"
    from transformers import AutoConfig
    base = AutoConfig.for_model('llama', vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                num_attention_heads=2)
    assert from_scratch('smoe', 'tiny', base=base, seed=0).accepts_loss_kwargs
    def old():
        m = model()
        loss = m.base.loss_function
        m.base.loss_function, m.base.accepts_loss_kwargs = lambda *a, num_items_in_batch=None, **k: loss(*a, **k), False
        return m
    whole, losses = trained(tmp_path, old(), 4, 1, lengths=(64,) * 4)
    parts, others = trained(tmp_path, old(), 1, 4, lengths=(64,) * 4)
    assert furthest(whole, parts) < 1e-6 and others == pytest.approx(losses, abs=1e-4)
