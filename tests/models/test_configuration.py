"Models whose layers have budgets of their own: built, saved, loaded, counted, trained, and upcycled in two steps."
import copy, json
from dataclasses import replace
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from test_upcycling import IDS, causal, error
from likeness import same_logits, same_weights
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.moe.experts import FeedForward
from libmoe_nb.moe.layers import MoELayer, aux_loss
from libmoe_nb.models.cards import model_card
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.models.counting import count_flops, count_parameters
from libmoe_nb.models.swapping import own_layers
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.analysis.tracing import record_routing

SPEC = MoESpec('smoe', hidden_size=32, num_experts=8, top_k=2, num_shared_experts=1, moe_intermediate_size=24)
OTHER = replace(SPEC, recipe='sharede_v3', num_experts=4, top_k=3, moe_intermediate_size=12)

def base(**kw):
    return LlamaConfig(**dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                              num_attention_heads=4, num_key_value_heads=2, pad_token_id=0) | kw)

def mixed():
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig(base(), {'layers.[01]': SPEC, 'model.layers.1.mlp': OTHER.to_dict()}))

def test_a_map_is_built_saved_and_loaded(tmp_path):
    model = mixed().eval()
    assert list(own_layers(model)) == [f'base.model.layers.{i}.mlp' for i in (0, 1)]
    assert [s.recipe for s in model.config.specs.values()] == ['smoe', 'sharede_v3'] and model.config.layers == [0, 1]
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path/'config.json').read_text())
    assert list(said['moe']) == ['model.layers.0.mlp', 'model.layers.1.mlp'] and '_bound' not in said
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(): assert same_weights(back, model) and same_logits(back(IDS).logits, model(IDS).logits)
    assert back.config.specs == model.config.specs == AutoConfig.from_pretrained(tmp_path).specs
    assert back.config.to_diff_dict()['moe'] == model.config.to_diff_dict()['moe']

def test_one_spec_is_a_map_too(tmp_path):
    model = from_scratch('xmoe', 'tiny', seed=0, layers=[-1])
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path/'config.json').read_text())['moe']) == ['model.layers.1.mlp']
    assert model.config.spec == AutoConfig.from_pretrained(tmp_path).spec and model.config.layers == [1]

def test_an_older_configuration_opens(tmp_path):
    "One spec and indices, as version 0.1 wrote it"
    old = dict(model_type='libmoe', base_config=base().to_dict(), moe=SPEC.to_dict(), layers=[0, 2])
    (tmp_path/'config.json').write_text(json.dumps(old))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.spec == SPEC and config.layers == [0, 2]
    assert {n: s.recipe for n, s in config.specs.items()} == {f'model.layers.{i}.mlp': 'smoe' for i in (0, 2)}
    assert list(own_layers(MoEForCausalLM(config))) == [f'base.model.layers.{i}.mlp' for i in (0, 2)]

def test_the_one_spec():
    model = mixed()
    with pytest.raises(ValueError, match='spec must be one for all layers, got 2 specs that differ'):
        getattr(model.config, 'spec')
    text = model.config.get_text_config()
    assert not hasattr(text, 'num_experts') and not hasattr(text, 'num_experts_per_tok')
    like = MoEConfig(base(), {'layers.0': SPEC, 'layers.1': replace(SPEC, recipe='dense', num_experts=6)})
    assert like.get_text_config().num_experts == 8   # a dense layer has no experts to tell
    both = copy.deepcopy(model.config)
    assert both.specs == model.config.specs

@pytest.mark.parametrize('moe, why', [({'layers.7': SPEC}, 'moe must be names of feed-forward networks of'),
                                      ({'layers.0': replace(SPEC, hidden_size=16)}, 'hidden_size of the spec must be'),
                                      ({'layers.0': replace(SPEC, output_size=16)}, 'output_size must be that of the')])
def test_maps_that_do_not_fit(moe, why):
    with pytest.raises(ValueError, match=why): MoEForCausalLM(MoEConfig(base(), moe))

def test_layers_beside_a_map():
    with pytest.raises(ValueError, match=r'layers must be \[0\] or None'):
        MoEForCausalLM(MoEConfig(base(), {'layers.0': SPEC}, layers=[1]))
    assert MoEForCausalLM(MoEConfig(base(), {'layers.0': SPEC}, layers=[0])).config.layers == [0]

def test_counting_and_cards():
    model = mixed()
    counts, (first, second) = count_parameters(model), own_layers(model).values()
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert counts['experts'] == size(first.experts) + size(second.experts)
    # two of eight are active; one shared and two of three
    assert counts['total'] - counts['active'] == size(first.experts) * 6 // 8 + size(second.experts) // 3
    more = MoEForCausalLM(MoEConfig(base(), {'layers.[01]': SPEC}))
    assert count_flops(model, 8) != count_flops(more, 8)
    text = model_card(model).text
    for fact in ('the recipe `smoe` (SMoE) and the recipe `sharede_v3` (SharedE-V3)',
                 '| model.layers.1.mlp (1 layer) / num_experts | 4 |',
                 '2 of its 3 feed-forward networks'):
        assert fact in text, fact

def test_auxiliary_loss_of_unlike_layers():
    model = mixed()
    with record_routing(model) as records: out = model.train()(IDS, labels=IDS)
    want, _ = aux_loss([(l, r) for n, l in own_layers(model).items() for r in records[n]])
    torch.testing.assert_close(out.aux_loss, want)
    out.loss.backward()
    assert all(l.router.weight.grad.abs().sum() > 0 for l in own_layers(model).values())

def test_layers_are_drawn_by_their_own_specs():
    specs = {'layers.0': replace(SPEC, expert_init_std=(.7, .05)), 'layers.1': replace(SPEC, expert_init_std=(.1, .3))}
    with torch.device('meta'): model = MoEForCausalLM(MoEConfig(base(), specs))
    model.to_empty(device='cpu').init_weights()
    stds = [l.experts.up_proj.std() for l in own_layers(model).values()]
    assert .6 < stds[0] < .8 and .08 < stds[1] < .12

def test_upcycled_twice(tmp_path):
    "Some layers by one recipe, then others by another: saved, loaded and still exact"
    dense = causal('gpt2', num_hidden_layers=3)
    first = upcycle(dense, 'smoe', 6, 3, layers=[1], seed=0)
    both = upcycle(first, 'sharede_v2', 4, 3, where='h.0', seed=1)
    assert list(both.config.specs) == ['transformer.h.0.mlp', 'transformer.h.1.mlp']
    assert both.config.layers == [0, 1] and error(dense, both, input_ids=IDS) < 2e-5
    assert len(own_layers(first)) == 1 and len(own_layers(both)) == 2
    both.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert same_weights(back, both) and same_logits(back(IDS).logits, both(IDS).logits)
    with pytest.raises(ValueError, match='h.0.mlp.c_fc is a mixture of experts already: sharede_v2'):
        upcycle(both)

@pytest.mark.parametrize('order', [(0, 2, 1), (2, 1, 0)])
def test_linked_layers_in_any_order(order, tmp_path):
    "MoE++ layers put in one after another see the same predecessors as after loading"
    dense = model = causal('llama', num_hidden_layers=3)
    for i in order: model = upcycle(model, 'moe_plus_plus', 4, 2, layers=[i], exact=True, seed=i)
    assert error(dense, model, input_ids=IDS) < 2e-5
    layers = list(own_layers(model).values())
    assert [l._previous for l in layers] == [(), (layers[0],), (layers[1],)]
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert same_weights(back, model) and same_logits(back(IDS).logits, model(IDS).logits)

def test_dense_layers_of_ours_may_stay():
    model = MoEForCausalLM(MoEConfig(base(), {'layers.0': SPEC, 'layers.1': replace(SPEC, recipe='dense')}))
    assert [type(l.mlp) for l in model.base.model.layers[:2]] == [MoELayer, FeedForward]
    assert model.base.model.layers[1].mlp.intermediate_size == 48
