"Small runs that the tests of training share: a learner, a fit, a stand-in for a killed process, and their state."
import json
from hashlib import blake2b
from pathlib import Path

import torch
from fastai.basics import Callback
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.training.learner import moe_learner

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             vocab_size=300)

def make(recipe, data, *, seed=0, dropout=True, steps=3, batch_size=4, cbs=(), model=None, **kwargs):
    model = model or from_scratch(recipe, 'tiny', seed=seed, **SMALL)
    for m in model.modules():
        if dropout and hasattr(m, 'attention_dropout'): m.attention_dropout = .2
    return moe_learner(model, data, preset='tiny', batch_size=batch_size, steps=steps, valid_steps=2,
                       cbs=list(cbs), **kwargs)

def fit(learn, how='fit_cosine', epochs=3, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, **kwargs)
    return learn

class Stop(Callback):
    "Ends the fit after a step, as a killed process would: nothing runs after it"
    order = 100
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.training and self.learn.step == self.at: raise KeyboardInterrupt

def state(learn):
    "All tensors that training goes on from, and its curve"
    opt = {f'{i}.{k}': torch.as_tensor(v) for i, s in learn.opt.state_dict()['state'].items() for k, v in s.items()}
    return dict(learn.model.state_dict(), **opt, losses=torch.stack(learn.recorder.losses), rng=torch.get_rng_state())

def assert_same(a, b):
    assert sorted(a) == sorted(b)
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert not different

def change_json(checkpoint, change):
    "Let `change` edit the JSON of a checkpoint, as another version might have written it, and seal it again"
    info = json.loads((checkpoint/'checkpoint.json').read_text())
    del info['seal']
    change(info)
    seal = blake2b(json.dumps(info, sort_keys=True).encode(), digest_size=16).hexdigest()
    (checkpoint/'checkpoint.json').write_text(json.dumps(dict(info, seal=seal)))
