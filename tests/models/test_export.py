"Native architectures: what plain transformers makes of an exported folder, and what cannot be exported."
import json, os, subprocess, sys
import pytest, torch, transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from libmoe_nb.analysis.adapters import tiny_moe
from libmoe_nb.moe.config import recipes
from libmoe_nb.models.export import from_native, logit_error, natives, save_native, to_dense, to_native
from libmoe_nb.moe.layers import MoELayer
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.counting import count_parameters
from libmoe_nb.analysis.tracing import moe_layers, record_routing
from libmoe_nb.models.upcycling import upcycle

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=None)
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
              v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=3)
BODIES = dict(llama={}, mistral=dict(sliding_window=None), olmo2={}, olmoe=dict(num_experts=1, num_experts_per_tok=1),
              qwen2={}, qwen3=dict(head_dim=8), deepseek_v3=LATENT, deepseek_v2=LATENT | dict(topk_method='greedy'),
              glm4_moe=dict(head_dim=8, first_k_dense_replace=3), dots1=dict(head_dim=8, first_k_dense_replace=3))
GROUPS = dict(num_experts=9, top_k=3, num_shared_experts=1, n_group=2, topk_group=1, routed_scaling_factor=2.5)
# native architecture -> body, recipe, options
CASES = dict(mixtral=('llama', 'smoe', {}), olmoe=('olmoe', 'smoe', dict(norm_topk_prob=False)),
             flex_olmo=('olmo2', 'smoe', {}), qwen3_moe=('qwen3', 'smoe', {}),
             qwen2_moe=('qwen2', 'sharede_v2', dict(shared_gate=True, num_shared_experts=2, top_k=4)),
             deepseek_v3=('deepseek_v3', 'sharede_v3', dict(GROUPS, expert_bias=True)),
             glm4_moe=('glm4_moe', 'sharede_v3', dict(GROUPS, expert_bias=True)),
             dots1=('qwen3', 'smoe_sigmoid', dict(expert_bias=True)),
             deepseek_v2=('deepseek_v2', 'sharede_v2', dict(GROUPS, norm_topk_prob=False)))

def body(name, **kw): return AutoConfig.for_model(name, **SIZES | BODIES[name] | kw)

def make(base, recipe='smoe', layers=None, seed=0, **kw):
    "A model whose every part matters"
    m = from_scratch(recipe, 'tiny', base=base if not isinstance(base, str) else body(base), layers=layers, seed=seed,
                     **dict(gated=True, hidden_act='silu', num_experts=8, top_k=3, moe_intermediate_size=16) | kw)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (.3 if p.dim() > 1 else .1) + (p.dim() < 2))
        for l in moe_layers(m).values():
            if l.router.expert_bias is not None:
                l.router.expert_bias.copy_(torch.randn(l.router.expert_bias.shape, generator=g) * .1)
    return m.eval()

def case(native, **kw):
    b, recipe, options = CASES[native]
    return make(b, recipe, **options | kw)

def ids(B=2, S=40): return torch.randint(1, 96, (B, S), generator=torch.Generator().manual_seed(1))

def close(a, b, tol=1e-4):
    "Relative to the largest logit"
    return (a - b).abs().max() <= tol * b.abs().max()

def padded():
    x, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    return dict(input_ids=x, attention_mask=mask)

def test_every_native_has_a_case(): assert set(CASES) == set(natives)

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
    facts[f.name] = dict(cls=type(m).__name__, model_type=m.config.model_type, loading=sum(map(len, (info['missing_keys'], info['unexpected_keys'], info['mismatched_keys']))),
        error=((got - want['logits'])[real].abs().max() / want['logits'].abs().max()).item(), generated=torch.equal(m.generate(**inputs, max_new_tokens=6, do_sample=False), want['generated']))
assert not [m for m in sys.modules if m.startswith('libmoe_nb')]
print(json.dumps(facts))
'''
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(HF_HUB_OFFLINE='1')
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(d)], capture_output=True, text=True,
                       timeout=300, cwd=d, env=env)
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
    assert type(back) is MoEForCausalLM and torch.equal(back(ids()).logits, ours(ids()).logits)
    ours.train()(ids(), labels=ids()).loss.backward()
    assert all(l.router.weight.grad.abs().sum() > 0 for l in moe_layers(ours).values())

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
    assert made.dtype == loaded.dtype == torch.bfloat16 and torch.equal(loaded(ids()).logits, made(ids()).logits)
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
    next(iter(moe_layers(m).values())).router.top_k = 2
    with pytest.raises(ValueError, match='layers differ'): to_native(m)

def test_a_wrong_result_is_not_returned():
    m = make('llama')
    layer = next(iter(moe_layers(m).values()))
    layer.register_forward_hook(lambda *a: a[-1] * 2)      # nothing that weights show
    with pytest.raises(RuntimeError, match='its logits differ by'): to_native(m)
    assert type(to_native(m, check=False)).__name__ == 'MixtralForCausalLM'

# ---- one network

def naive_shares(m, inputs):
    "Share of real tokens that each expert got, counted one by one"
    with record_routing(m) as records: m(**inputs)
    real, out = inputs['attention_mask'].flatten().bool(), {}
    for n, (r,) in records.items():
        counts = [sum(int(e in row) for row, keep in zip(r.top_k_index.tolist(), real) if keep)
                  for e in range(r.num_experts)]
        out[n] = torch.tensor(counts) / sum(counts)
    return out

@pytest.mark.parametrize('recipe', ['smoe', 'sharede_v2', 'xmoe'])
def test_to_dense_weighs_by_load(recipe):
    m = make('llama', recipe, num_shared_experts=int(recipe == 'sharede_v2'))
    for by, shares in dict(mean={n: torch.full((l.experts.num_experts,), 1 / l.experts.num_experts)
                                 for n, l in moe_layers(m).items()}, load=naive_shares(m, padded())).items():
        d = to_dense(m, by, [padded()])
        for n, l in moe_layers(m).items():
            f, s, d_e = d.get_submodule(n), shares[n], 16
            n_s = l.shared_experts.intermediate_size if l.shared_experts is not None else 0
            gate, up = f.gate_up_proj.weight.chunk(2)
            torch.testing.assert_close(gate[n_s:], sum(p * w[:d_e] for p, w in zip(s, l.experts.gate_up_proj)),
                                       atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(up[n_s:], sum(p * w[d_e:] for p, w in zip(s, l.experts.gate_up_proj)),
                                       atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(f.down_proj.weight[:, n_s:], sum(p * w for p, w in zip(s, l.experts.down_proj)),
                                       atol=1e-5, rtol=1e-4)
            if n_s:
                assert (torch.equal(f.down_proj.weight[:, :n_s], l.shared_experts.down_proj.weight)
                        and torch.equal(gate[:n_s], l.shared_experts.gate_up_proj.weight.chunk(2)[0]))

@pytest.mark.parametrize('recipe', [r for r in recipes if r not in ('dense', 'tcmoe', 'moe_plus_plus')])
@pytest.mark.parametrize('b', ['llama', 'gpt2'])
def test_upcycled_copies_merge_into_the_dense_model(recipe, b, tmp_path):
    dense = AutoModelForCausalLM.from_config(body('llama') if b == 'llama'
                                             else AutoConfig.for_model('gpt2', vocab_size=96, n_embd=32, n_head=4,
                                                                       n_layer=2, n_inner=48)).eval()
    moe = upcycle(dense, recipe, 4, 2 + ('sharede' in recipe), num_shared_experts=int('sharede' in recipe), seed=0)
    for by, data in dict(mean=None, load=[ids()]).items():
        d = to_dense(moe, by, data)
        assert close(d(ids()).logits, dense(ids()).logits)
    if b == 'llama': assert close(to_native(d)(ids()).logits, dense(ids()).logits) and type(to_native(d)) is type(dense)
    d.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids()).logits, d(ids()).logits)

def test_to_dense_of_some_layers_and_in_half_precision():
    dense = AutoModelForCausalLM.from_config(body('llama', tie_word_embeddings=True)).eval()
    moe = upcycle(dense, 'smoe', 4, 2, layers=[1], seed=0)
    d = to_dense(moe)
    assert (d.config.layers == [1] and close(d(ids()).logits, dense(ids()).logits)
            and d.get_output_embeddings().weight is d.get_input_embeddings().weight)
    assert to_dense(moe.to(torch.bfloat16)).dtype == torch.bfloat16

def test_loads_do_not_change_the_model():
    m = case('mixtral').train()
    before = {n: p.clone() for n, p in m.state_dict().items()}
    to_dense(m, 'load', [ids(), padded()])
    assert m.training and all(torch.equal(p, before[n]) for n, p in m.state_dict().items())
    with pytest.raises(ValueError, match='at least one token, got none'): to_dense(m, 'load', [])
