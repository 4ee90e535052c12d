"Published architectures: forms of layers, configurations there and back, reasons."
import pytest
from native_models import CASES, case, make, own_layers
from libmoe_nb.models.native import (Native, NoNativeForm, base_and_ffns, common_form, layer_form, native, native_form,
                                     natives, refuse, sparse_and_dense)

def test_every_native_has_a_case(): assert set(CASES) == set(natives)

@pytest.mark.parametrize('name', CASES)
def test_configurations_there_and_back(name):
    "The body of a published configuration is the body that it was made of"
    m = case(name)
    base, ffns = base_and_ffns(m)
    layers, dense = sparse_and_dense(ffns)
    form, n = common_form(layers), natives[name]
    assert [*layers.values()] == own_layers(m) and dense == [] and n.why_not(base.config, form, dense) == []
    config = n.native_config(base.config, form, dense)
    assert config.model_type == name and config.num_experts_per_tok == form.top_k
    back = n.base_config(config)
    assert back.model_type in n.bodies
    same = 'hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size'.split()
    assert [getattr(back, k) for k in same] == [getattr(base.config, k) for k in same]

def test_the_form_of_a_layer():
    f = layer_form(own_layers(make('llama', 'sharede_v3', num_shared_experts=2, shared_weight=.25,
                                   routed_scaling_factor=2., norm_topk_prob=False))[0])
    assert (f.score, f.norm, f.num_experts, f.top_k, f.shared) == ('sigmoid', False, 6, 1, 2)
    assert f.scale == 1.5 and not f.gate and not f.bias

def test_some_layers_are_dense():
    _, ffns = base_and_ffns(make('llama', layers=[1]))
    layers, dense = sparse_and_dense(ffns)
    assert [n.split('.')[2] for n in layers] == ['1'] and dense == [0, 2]

def test_the_first_that_agrees_is_taken_and_more_can_be_registered(monkeypatch):
    monkeypatch.setattr('libmoe_nb.models.native.natives', {})
    native('mixtral', bodies=dict(mistral=({}, {})), norm=(True,))
    with pytest.raises(NoNativeForm, match="a body of 'llama': bodies that agree are mistral"):
        native_form(make('llama'))
    assert native_form(make('mistral')) == Native('mixtral', dict(mistral=({}, {})), norm=(True,))

def test_a_refusal_is_a_value_error():
    refuse(False, 'x')
    with pytest.raises(ValueError, match='why'): refuse(True, 'why')
