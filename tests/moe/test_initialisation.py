"How the paper's language models start: the standard deviation of each group of weights."
import math

import pytest, torch
from transformers import LlamaConfig
from likeness import same_logits
from libmoe_nb.moe.config import get_preset, recipes
from libmoe_nb.moe.recipes import build_layer
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.analysis.tracing import moe_layers
from libmoe_nb.models.ffns import find_ffns

L = 3   # layers of the models that are drawn here

def ratio(w, std): return w.detach().double().std().item() / std

# the paper's models have 16 and 18 layers; these are the numbers of its authors' code
PRINTED = {'paper-0.15b': dict(first=.0156, routed=.00385, beside_shared=.00391, shared=.0221, dense=.0111),
           'paper-0.68b': dict(first=.0104, routed=.00256, beside_shared=.00260, shared=.0148, dense=.0074)}

@pytest.mark.parametrize('preset', PRINTED)
def test_the_table_by_its_formula(preset):
    p, t = get_preset(preset), PRINTED[preset]
    spec = {r: p.spec(r) for r in recipes}
    d_e = p.moe_intermediate_size
    for s in spec.values():
        assert (s.router_init_std == pytest.approx(t['first'], rel=5e-3)
                and s.init_stds(1)[0] == pytest.approx(t['first'], rel=5e-3))
    for name, width in dict(routed=66 * d_e, beside_shared=64 * d_e, shared=2 * d_e, dense=8 * d_e).items():
        assert spec['smoe'].init_stds(width)[1] == pytest.approx(t[name], rel=5e-3)

@pytest.fixture(scope='module')
def models():
    return {r: from_scratch(r, 'paper-0.15b', seed=0, num_hidden_layers=L) for r in ('dense', 'smoe', 'sharede_v3')}

def check_base(base, d=512, heads=4 * 82):
    depth, head = (2 / L) ** .5, base.lm_head.weight
    for l in base.model.layers:
        for n in 'qkv':
            assert ratio(getattr(l.self_attn, f'{n}_proj').weight, d**-.5 * depth) == pytest.approx(1, abs=.01)
        assert ratio(l.self_attn.o_proj.weight, heads**-.5 * depth) == pytest.approx(1, abs=.01)
        w = l.self_attn.q_proj.weight
        # cut off at two deviations, and widened for it
        assert w.abs().max() < 2.3 * w.std() and w.abs().max() > 2.2 * w.std()
    assert ratio(base.model.embed_tokens.weight, d**-.5) == pytest.approx(1, abs=.01)
    assert (ratio(head, d**-.5 / math.sqrt(3)) == pytest.approx(1, abs=.01) and head.abs().max() <= d**-.5
            and head.abs().max() > .999 * d**-.5)

def check_ffns(model):
    depth = (2 / L) ** .5
    for f in find_ffns(model.base).values():
        groups = [(f.up_proj.weight, 512), (f.down_proj.weight, 8 * 128)] if model.config.spec.recipe == 'dense' else \
            [(f.router.weight, 512), (f.experts.up_proj, 512), (f.experts.down_proj, f.router.num_experts * 128)]
        if getattr(f, 'shared_experts', None) is not None:
            groups += [(f.shared_experts.up_proj.weight, 512), (f.shared_experts.down_proj.weight, 2 * 128)]
        for w, width in groups: assert ratio(w, width**-.5 * depth) == pytest.approx(1, abs=.02)

@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'sharede_v3'])
def test_each_group_measured(models, recipe):
    check_base(models[recipe].base)
    check_ffns(models[recipe])

def test_outputs_start_alike(models):
    "The dense baseline's FFN is as loud as routed experts that each have the whole budget; nothing starts handicapped"
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): out = {r: next(iter(find_ffns(m.base).values()))(x).std().item() for r, m in models.items()}
    # √(2/L) twice, and a ReLU leaves half of the squares
    assert out['dense'] == pytest.approx((2 / L) * .5**.5, rel=.1)
    assert out['sharede_v3'] > .9 * out['dense']

def test_recipes_share_the_bits_of_the_base(models):
    a, b = ({n: p for n, p in models[r].named_parameters() if '.mlp.' not in n} for r in ('dense', 'sharede_v3'))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

def test_drawn_after_the_meta_device_all_the_same(models):
    with torch.device('meta'): m = MoEForCausalLM(models['sharede_v3'].config)
    m.to_empty(device='cpu').init_weights()
    check_base(m.base)
    check_ffns(m)

def test_only_presets_that_ask_for_it():
    for preset in 'tiny', 'mini':
        p, s = get_preset(preset), get_preset(preset).spec('sharede_v2')
        assert not p.depth_scaled_init and s.init_stds(7) == (.02, .02)
        assert from_scratch('smoe', p, seed=0).config.depth_scaled_init is False
    # as configurations say that were saved before there was a choice
    assert MoEConfig(LlamaConfig()).depth_scaled_init is False

def test_ones_own_deviations_win():
    assert get_preset('paper-0.15b').spec('dense', expert_init_std=(.1, .2)).init_stds(9) == (.1, .2)

def test_named_options():
    e = [build_layer(get_preset('tiny').spec('xmoe', options=dict(embedding_norm=1.5, router_size=n)))
         .router.embeddings.detach() for n in (4, 8)]
    assert (all(torch.allclose(v.norm(dim=-1), torch.full((8,), 1.5)) for v in e)
            and torch.allclose(e[1] @ e[1].T, 1.5**2 * torch.eye(8), atol=1e-5))
    z = build_layer(get_preset('tiny').spec('moe_plus_plus', options=dict(num_constant=30, constant_std=1.,
                                                                          constant_gate_std=.0156))).zero_experts
    assert (ratio(z.constant, 1) == pytest.approx(1, abs=.05)
            and ratio(z.constant_gate, .0156) == pytest.approx(1, abs=.05))

def test_random_experts_of_an_upcycled_model_too():
    dense = from_scratch('dense', 'tiny', seed=0)
    from libmoe_nb.models.upcycling import upcycle
    m = upcycle(dense, 'sharede_v2', 8, 4, num_shared_experts=2, init='random', second_init_scale=2., seed=0)
    for l in moe_layers(m).values():
        h = l.experts.intermediate_size
        assert (ratio(l.experts.down_proj, 2 * (6 * h)**-.5) == pytest.approx(1, abs=.05)
                and ratio(l.shared_experts.down_proj.weight, 2 * (2 * h)**-.5) == pytest.approx(1, abs=.05))


@pytest.mark.parametrize('preset, count', [('paper-0.15b', 157_934_400), ('paper-0.68b', 678_287_168)])
def test_as_many_parameters_as_the_authors_class(preset, count):
    with torch.device('meta'): m = from_scratch('smoe', preset)
    assert sum(p.numel() for p in m.parameters()) == count

def test_released_layout_starts_from_the_identity_and_is_loaded_as_saved(tmp_path):
    m = from_scratch('xmoe', 'paper-faithful', seed=0)
    norm, head = m.base.model.norm, m.base.lm_head
    assert norm(torch.randn(50, 128)).std().item() == pytest.approx(1, abs=.02) and not head.bias.any()
    with torch.device('meta'): again = MoEForCausalLM(m.config)
    again.to_empty(device='cpu').init_weights()
    assert not again.base.model.norm.weight.any() and not again.base.lm_head.bias.any()
    for p in norm.weight, norm.bias, head.bias: torch.nn.init.normal_(p)
    m.save_pretrained(tmp_path)
    x = torch.arange(9)[None]
    assert same_logits(MoEForCausalLM.from_pretrained(tmp_path).eval()(x).logits, m.eval()(x).logits)

def test_presets_are_saved_as_before_and_read_again():
    assert 'released_layout' not in get_preset('mini').to_dict()
    from libmoe_nb.moe.config import Preset, from_saved
    for name in 'mini', 'paper-faithful':
        assert from_saved(Preset, get_preset(name).to_dict(), 'Preset') == get_preset(name)
