"Native architectures: what plain transformers makes of an exported folder, and what cannot be exported."
import json
import pytest, torch, transformers
from native_models import CASES, SIZES, body, case, close, ids, make, own_layers, padded
from processes import run_forked
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from likeness import same_logits, same_weights
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.models.export import from_native, logit_error, save_native, to_native
from libmoe_nb.models.merging import to_dense
from libmoe_nb.models.native import natives
from libmoe_nb.moe.layers import MoELayer
from libmoe_nb.models.causal import MoEForCausalLM
from libmoe_nb.models.counting import count_parameters
from libmoe_nb.models.upcycling import upcycle

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()

# ---- a folder that plain transformers opens

@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    "What a process that knows nothing of this library gets out of the folders: native -> facts"
    d = tmp_path_factory.mktemp('native')
    torch.save(padded(), d/'inputs.pt')
    for n in CASES:
        m = case(n)
        assert save_native(m, d/n, n) == n
        out = m(**padded()).logits
        torch.save(dict(logits=out.detach(), generated=m.generate(**padded(), max_new_tokens=6, do_sample=False)),
                   d/n/'want.pt')
    code = '''
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
d, facts = Path(sys.argv[1]), {}
inputs = torch.load(d/'inputs.pt')
for f in sorted(p for p in d.iterdir() if p.is_dir()):
    m, info = AutoModelForCausalLM.from_pretrained(f, output_loading_info=True)
    want = torch.load(f/'want.pt')
    with torch.no_grad(): got = m.eval()(**inputs).logits
    real = inputs['attention_mask'].bool()
    generated = m.generate(**inputs, max_new_tokens=6, do_sample=False)
    facts[f.name] = dict(cls=type(m).__name__, model_type=m.config.model_type,
                         loading=sum(len(info[f'{k}_keys']) for k in ('missing', 'unexpected', 'mismatched')),
                         error=((got - want['logits'])[real].abs().max() / want['logits'].abs().max()).item(),
                         generated=torch.equal(generated, want['generated']))
assert not [m for m in sys.modules if m.startswith('libmoe_nb')]
print(json.dumps(facts))
'''
    p = run_forked(code, d, cwd=d)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1])

@pytest.mark.parametrize('native', CASES)
def test_plain_transformers_opens_the_folder(native, opened):
    facts = opened[native]
    assert facts['model_type'] == native and 'libmoe' not in facts['cls'].lower() and facts['loading'] == 0
    assert facts['error'] < 1e-5 and facts['generated']

# ---- out and back

@pytest.mark.parametrize('native', CASES)
def test_out_and_back(native):
    m = case(native)
    made = to_native(m, native)
    assert (type(made).__module__.startswith('transformers.')
            and not any(isinstance(x, MoELayer) for x in made.modules()))
    back = from_native(made)
    for other in (made, back): assert close(other(**padded()).logits[:, 7:], m(**padded()).logits[:, 7:])
    assert back.config.spec.recipe == m.config.spec.recipe
    for k in ['num_experts', 'top_k', 'moe_intermediate_size', 'norm_topk_prob', 'gated', 'hidden_act',
              *['num_shared_experts'] * ('sharede' in back.config.spec.recipe)]:
        assert getattr(back.config.spec, k) == getattr(m.config.spec, k), k
    options = {k: v for k, v in m.config.spec.options.items() if k != 'routed_scaling_factor'
               or natives[native].scaling}
    assert dict(topk_group=1) | back.config.spec.options == dict(topk_group=1) | options
    a, b = m.base.state_dict(), back.base.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('native, kw', [('qwen3_moe', dict(mlp_only_layers=[1])),
    ('deepseek_v3', dict(first_k_dense_replace=1)), ('deepseek_v2', dict(first_k_dense_replace=1)),
    ('deepseek_v3', dict(norm_topk_prob=False, routed_scaling_factor=1.5)), ('olmoe', dict(norm_topk_prob=True)),
    ('qwen2_moe', dict(mlp_only_layers=[0])), ('mixtral', dict(tie_word_embeddings=True)),
    ('qwen3_moe', dict(norm_topk_prob=False))])
def test_published_forms_come_in_and_go_out(native, kw):
    theirs = tiny_moe(native, num_hidden_layers=3, **kw)
    ours = from_native(theirs)
    again = to_native(ours, native)
    assert max(logit_error(theirs, m).max() for m in (ours, again)) < 1e-4
    for k, v in kw.items(): assert getattr(again.config, k) == v

def test_from_a_folder_and_back_to_ours(tmp_path):
    theirs = tiny_moe('qwen2_moe')
    theirs.save_pretrained(tmp_path/'native')
    ours = from_native(tmp_path/'native')
    ours.save_pretrained(tmp_path/'ours')
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'ours')
    assert type(back) is MoEForCausalLM and same_logits(back(ids()).logits, ours(ids()).logits)
    ours.train()(ids(), labels=ids()).loss.backward()
    assert all(l.router.weight.grad.abs().sum() > 0 for l in own_layers(ours))

@pytest.mark.parametrize('b', ['llama', 'mistral', 'olmo2', 'qwen2', 'qwen3'])
def test_upcycled_models_go_out(b):
    dense = AutoModelForCausalLM.from_config(body(b)).eval()
    moe = upcycle(dense, 'smoe', 4, 2, seed=0, router_init_std=.5)
    made = to_native(moe)
    assert close(made(ids()).logits, dense(ids()).logits) and made.config.num_experts_per_tok == 2

def test_windows_of_attention_are_kept():
    "Longer than what the check before returning reads"
    m = make(body('mistral', sliding_window=16))
    made = to_native(m)
    assert made.config.sliding_window == 16 and close(made(ids(1, 100)).logits, m(ids(1, 100)).logits)
    with pytest.raises(ValueError, match='sliding_window must be None, got 16'): to_native(m, 'qwen2_moe')

@pytest.mark.parametrize('rope', [dict(rope_type='llama3', factor=8., low_freq_factor=1.,
                                       high_freq_factor=4., original_max_position_embeddings=32, rope_theta=5000.),
                                  dict(rope_type='linear', factor=2., rope_theta=300.)])
def test_positions_are_kept(rope):
    m = make(body('llama', rope_parameters=rope))
    for native in ('mixtral', 'qwen2_moe'):
        assert close(to_native(m, native)(ids(1, 100)).logits, m(ids(1, 100)).logits)

# ---- dtype and ties

@pytest.mark.parametrize('native', ['mixtral', 'deepseek_v3'])
def test_bfloat16(native, tmp_path):
    m = case(native).to(torch.bfloat16)
    made = to_native(m, native)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.dtype == loaded.dtype == torch.bfloat16 and same_weights(loaded, made)
    assert same_logits(loaded(ids()).logits, made(ids()).logits)
    kinds = lambda m: {n: t.dtype for n, t in m.state_dict().items()}
    # the class says what it keeps in float32: DeepSeek-V3 its router, since transformers 5.24
    assert kinds(made) == kinds(loaded)
    assert {n for n, t in kinds(made).items() if t != torch.bfloat16} == {
        n for n in kinds(made) if any(n.endswith(k) for k in type(made)._keep_in_fp32_modules_strict or ())}
    assert logit_error(m, loaded).median() < 5e-2
    back = from_native(loaded)
    a, b = m.base.state_dict(), back.base.state_dict()
    assert a.keys() == b.keys()
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k

def test_tied_embeddings(tmp_path):
    m = make(body('llama', tie_word_embeddings=True))
    save_native(m, tmp_path)
    assert 'lm_head.weight' not in load_file(tmp_path/'model.safetensors')
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.lm_head.weight is made.model.embed_tokens.weight and close(made(ids()).logits, m(ids()).logits)
    back = from_native(made)
    assert (back.get_output_embeddings().weight is back.get_input_embeddings().weight
            and count_parameters(back)['total'] == count_parameters(m)['total'])

def test_nothing_is_shared_with_what_it_was_made_of():
    m = case('mixtral')
    for made in (to_native(m), to_dense(m)):
        assert not {p.data_ptr() for p in m.parameters()} & {p.data_ptr() for p in made.parameters()}

def test_mode_and_generation_config_come_along():
    m = case('mixtral').train()
    m.generation_config.max_new_tokens = 3
    made = to_native(m)
    assert made.training and m.training and made.generation_config.max_new_tokens == 3 and from_native(made).training
    assert made.eval().generate(ids(1, 4)).shape == (1, 7)

# ---- single layers

@pytest.mark.parametrize('b, native, layers', [('qwen3', 'qwen3_moe', [0, 2]), ('qwen2', 'qwen2_moe', [1]),
                                               ('deepseek_v3', 'deepseek_v3', [1, 2]), ('glm4_moe', 'glm4_moe', [2])])
def test_some_layers(b, native, layers):
    recipe = 'smoe' if 'qwen' in b else 'sharede_v3'
    m = make(b, recipe, layers, num_shared_experts=int(recipe == 'sharede_v3'))
    made = to_native(m, native)
    back = from_native(made)
    assert (close(made(ids()).logits, m(ids()).logits) and back.config.layers == layers
            and close(back(ids()).logits, m(ids()).logits))

@pytest.mark.parametrize('b, native, layers, why',
                         [('llama', 'mixtral', [0, 2], 'no layer can be dense'),
                          ('olmo2', None, [1], 'flex_olmo .no layer can be dense'),
                          ('deepseek_v3', 'deepseek_v3', [0], r'only the first layers can be dense, not \[1, 2\]'),
                          ('qwen3', 'dots1', [0, 1],
                           'scores are a sigmoid, not a softmax; only the first layers can be dense')])
def test_some_layers_refused(b, native, layers, why):
    recipe = 'sharede_v3' if b == 'deepseek_v3' else 'smoe'
    with pytest.raises(ValueError, match=why):
        to_native(make(b, recipe, layers, num_shared_experts=int(recipe == 'sharede_v3')), native)

def test_dense_layers_must_be_of_the_same_kind():
    for why, kw in {'mlp_bias must be False, got True': dict(mlp_bias=True),
                    'hidden_act must be silu, got gelu': dict(hidden_act='gelu')}.items():
        with pytest.raises(ValueError, match=f'where layers are dense {why}'):
            to_native(make(body('llama', **kw), layers=[1]), 'qwen2_moe')
    m = make(body('llama', mlp_bias=True))  # all layers are swapped: none has biases
    assert close(to_native(m)(ids()).logits, m(ids()).logits)

# ---- what cannot be said

@pytest.mark.parametrize('recipe, kw, why', [('xmoe', {}, 'CosineRouter are neither a softmax nor a sigmoid'),
    ('tcmoe', {}, 'TernaryRouter are not experts alone'), ('moe_plus_plus', {}, 'zero-computation experts'),
    ('smoe', dict(gated=False, hidden_act='relu'),
     "native experts are gated .three matrices., these have two and the activation 'relu'"),
    ('smoe', dict(bias=True), 'native experts have no biases'),
    ('smoe', dict(expert_bias=True), 'no bias steers the choice'),
    ('smoe', dict(n_group=2), 'mixtral .choices are not limited to groups'),
    ('smoe_sigmoid', dict(norm_topk_prob=False, expert_bias=True, hidden_act='mish'), None),
    ('sharede_v3', dict(shared_gate=True), 'shared experts have no gate')])
def test_refusals_say_why(recipe, kw, why):
    m = make('llama', recipe, num_shared_experts=int('sharede' in recipe), **kw)
    if why is None: assert close(to_native(m)(ids()).logits, m(ids()).logits)
    else:
        with pytest.raises(ValueError, match=why): to_native(m)

def test_bodies_without_a_native_form():
    with pytest.raises(ValueError, match="body of 'gpt_neox': bodies that agree are .*llama"):
        to_native(make(AutoConfig.for_model('gpt_neox',
                                            **{k: v for k, v in SIZES.items() if k != 'num_key_value_heads'})))
    with pytest.raises(ValueError, match='in a llama body attention_bias must be False, got True'):
        to_native(make(body('llama', attention_bias=True)))
    with pytest.raises(ValueError, match='registered native architecture .mixtral.*got .gpt_oss'):
        from_native(tiny_moe('gpt_oss'))
    with pytest.raises(ValueError, match="did you mean 'mixtral'"): to_native(make('llama'), 'mixtrall')

def test_unlike_layers_are_refused():
    m = make('llama')
    own_layers(m)[0].router.top_k = 2
    with pytest.raises(ValueError, match='layers differ'): to_native(m)

def test_a_wrong_result_is_not_returned():
    m = make('llama')
    layer = own_layers(m)[0]
    layer.register_forward_hook(lambda *a: a[-1] * 2)      # nothing that weights show
    with pytest.raises(RuntimeError, match='its logits differ by'): to_native(m)
    assert type(to_native(m, check=False)).__name__ == 'MixtralForCausalLM'
