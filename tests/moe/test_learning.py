"""Every recipe's router is taught by the language loss.

And models saved when one routed expert had the weight 1 compute what they did."""
import dataclasses, warnings

import pytest, torch
from transformers import AutoModelForCausalLM, LlamaConfig

from likeness import same_logits, same_weights
from libmoe_nb.moe.config import MoESpec, get_preset, recipes
from libmoe_nb.experiments.run import run_config
from libmoe_nb.moe.recipes import build_layer, settled
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.analysis.tracing import moe_layers
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.models.wrapping import load_upcycled

SPARSE = [r for r in recipes if r != 'dense']
IDS = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
# every sparse recipe, one or two routed experts a token, with and without shared ones where the recipe has them, from
# scratch or upcycled
SETTINGS = [(r, routed + shared, shared, made) for r in SPARSE for routed in (1, 2) for shared in (0, 1)
            for made in ('scratch', 'upcycled') if shared == ('sharede' in r)]

def tiny(recipe, **kw):
    return from_scratch(recipe, 'tiny', seed=0, **dict(vocab_size=96, hidden_size=32, head_dim=16,
                                                       moe_intermediate_size=16, num_shared_experts=0) | kw)

def dense_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
                                                        num_hidden_layers=2, num_attention_heads=2,
                                                        initializer_range=.2)).eval()

def gradients(m):
    "Largest gradient of each router from the language loss alone"
    m.eval().zero_grad()
    m(IDS, labels=IDS).loss.backward()   # in evaluation no auxiliary loss is added
    return [max(p.grad.abs().max().item() for p in l.router.parameters() if p.grad is not None)
            for l in moe_layers(m).values()]

@pytest.mark.parametrize('recipe, top_k, shared, made', SETTINGS, ids=lambda v: str(v))
def test_the_language_loss_teaches_every_router(recipe, top_k, shared, made):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)   # and nothing is warned of
        # copies of one FFN say the same whoever is chosen; noise stands for the first steps of training
        m = (tiny(recipe, top_k=top_k, num_shared_experts=shared) if made == 'scratch'
             else upcycle(dense_model(), recipe, 4, top_k, noise=.3, seed=0))
    assert all(l.router.top_k == top_k - shared for l in moe_layers(m).values())
    assert min(gradients(m)) > 1e-4

@pytest.mark.parametrize('recipe', SPARSE)
def test_who_asks_for_a_constant_weight_is_told(recipe):
    shared = int('sharede' in recipe)
    with pytest.warns(UserWarning, match=f'router of {recipe} cannot learn from the language loss'):
        m = tiny(recipe, top_k=1 + shared, num_shared_experts=shared, norm_topk_prob=True)
    assert max(gradients(m)) < 1e-5
    with pytest.warns(UserWarning, match='exact=True'): upcycle(dense_model(), recipe, 4, 1 + shared, exact=True)

def test_weights_after_a_softmax_over_the_chosen_one_are_constant_too():
    with pytest.warns(UserWarning, match="options={'double_softmax': 'chosen'}"):
        m = tiny('xmoe', top_k=1, double_softmax='chosen')
    assert max(gradients(m)) < 1e-5

@pytest.mark.parametrize('recipe', SPARSE)
def test_a_model_saved_with_the_constant_weight_is_unchanged(recipe, tmp_path):
    shared = int('sharede' in recipe)
    with pytest.warns(UserWarning, match='cannot learn'):
        m = tiny(recipe, top_k=1 + shared, num_shared_experts=shared, norm_topk_prob=True).eval()
    m.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.config.spec.norm_topk_prob is True and all(l.router.norm_topk_prob for l in moe_layers(back).values())
    with torch.no_grad(): assert same_weights(back, m) and same_logits(back(IDS).logits, m(IDS).logits)
    if recipe not in ('tcmoe', 'moe_plus_plus'):   # there something else can be chosen
        assert all(l.router(torch.randn(9, 32)).top_k_weights.sub(1).abs().max() < 1e-6
                   for l in moe_layers(back).values())

@pytest.mark.parametrize('recipe, top_k, norm', [('smoe', 1, False), ('smoe', 2, True), ('sharede_v3', 2, False),
                                                 ('sharede_v3', 3, True), ('dense', 1, True)])
def test_what_was_left_open_is_saved_outright(recipe, top_k, norm, tmp_path):
    made = [tiny(recipe, top_k=top_k, num_shared_experts=int(top_k > 1)),
            upcycle(dense_model(), recipe, 4, top_k, num_shared_experts=int(top_k > 1)),
            MoEForCausalLM(MoEConfig(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
                                                 num_hidden_layers=2, num_attention_heads=2),
                                     MoESpec(recipe, hidden_size=32, top_k=top_k, num_shared_experts=int(top_k > 1))))]
    for m in made:
        assert m.config.spec.norm_topk_prob is norm
        m.eval().save_pretrained(tmp_path)
        back = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert back.config.spec == m.config.spec
        with torch.no_grad(): assert same_weights(back, m) and same_logits(back(IDS).logits, m(IDS).logits)

def test_an_upcycled_encoder_says_it_outright(tmp_path):
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                num_attention_heads=2)).eval()
    m = upcycle(bert, 'sharede_v2', 4, 2, seed=0)
    assert {s['norm_topk_prob'] for s in m.config.libmoe.values()} == {False}
    m.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(load_upcycled(tmp_path)(IDS)[0], m(IDS)[0])

def test_a_recipe_of_ones_own_is_settled_by_its_router():
    from libmoe_nb.moe.config import recipe
    from libmoe_nb.moe.layers import MoELayer
    from libmoe_nb.moe.recipes import build_router
    from libmoe_nb.moe.routers import SoftmaxRouter
    try:
        recipe('two_beside')(lambda spec: MoELayer(spec, build_router(SoftmaxRouter, spec, 2), 2))
        assert [settled(MoESpec('two_beside', top_k=k)).norm_topk_prob for k in (3, 4)] == [False, True]
    finally: del recipes['two_beside']

class Text:
    fingerprint, domains, vocab_size, sequence_length = 'x', ['x'], 96, 16

def test_runs_of_several_routed_experts_keep_their_configuration():
    "By which a comparison that was begun earlier finds them"
    for r in recipes:
        moe = run_config(r, 0, get_preset('mini'), Text())['moe']
        assert moe['norm_topk_prob'] is True and 'second_init_scale' not in moe and list(moe)[-1] == 'options'
    assert run_config('smoe', 0, dataclasses.replace(get_preset('mini'), top_k=1, num_shared_experts=0),
                      Text())['moe']['norm_topk_prob'] is False

@pytest.mark.parametrize('recipe, top_k',
                         [('smoe', 1), ('smoe_sigmoid', 1), ('xmoe', 1), ('sharede_v2', 2), ('sharede_v3', 2)])
def test_upcycled_to_one_routed_expert_is_near_and_exact_when_asked(recipe, top_k):
    dense = dense_model()
    def error(**kw):
        with torch.no_grad():
            return ((upcycle(dense, recipe, 4, top_k, seed=0, router_init_std=.002,
                             **kw)(IDS).logits - dense(IDS).logits).abs().max() / dense(IDS).logits.abs().max()).item()
    # what scores come to is taken out; XMoE's differ from token to token
    assert 1e-5 < error() < (.3 if recipe == 'xmoe' else .03) < error(rescale=False) - .05
    with pytest.warns(UserWarning, match='cannot learn'): assert error(exact=True) < 1e-5
    with pytest.raises(ValueError, match='norm_topk_prob must be True where exact=True, got False'):
        error(exact=True, norm_topk_prob=False)

def test_nothing_is_said_where_there_is_nothing_to_learn():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        layer = build_layer(MoESpec('smoe_sigmoid', num_experts=1, top_k=1))
    assert layer.router.norm_topk_prob   # a mixture of one expert is a dense network

def test_an_upcycling_that_began_with_the_constant_weight_goes_on_with_it(tmp_path):
    from libmoe_nb.core.files import read_json, write_json
    from libmoe_nb.data.text import text_data
    from libmoe_nb.experiments.upcycle import upcycle_and_train
    pages = tmp_path/'pages'; pages.mkdir()
    for i in range(60):
        (pages/f'{i}.txt').write_text(f'page {i}: ' + ' '.join(f'the {a} saw a {b}.' for a in 'cat dog fox'.split()
                                                               for b in 'hat mat bat'.split()))
    text = text_data(pages, vocab_size=280, sequence_length=16, cache_dir=tmp_path/'cache')
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=280, hidden_size=32, intermediate_size=48,
                                                         num_hidden_layers=1, num_attention_heads=2))
    dense.save_pretrained(tmp_path/'dense'); text.tokenizer.save_pretrained(tmp_path/'dense')
    def run(name, recipe='sharede_v2'):
        args = dict(dense=False, num_experts=4, top_k=2, sequence_length=16, batch_size=2, valid_tokens=64,
                    progress=None, data_options=dict(cache_dir=tmp_path/'cache'))
        upcycle_and_train(tmp_path/'dense', recipe, pages, 1, tmp_path/name, **args)
        return (read_json(tmp_path/name/'config.json'),
                AutoModelForCausalLM.from_pretrained(tmp_path/name/'model').config.spec.norm_topk_prob)
    config, norm = run('new')
    assert norm is False and config['run'].pop('by_score') is True
    # configurations of several routed experts are what they were
    assert 'by_score' not in run('two', 'smoe')[0]['run']
    (tmp_path/'old').mkdir(); write_json(tmp_path/'old'/'config.json', config)
    with pytest.warns(UserWarning, match='cannot learn'): again, norm = run('old')
    assert norm is True and again == config
