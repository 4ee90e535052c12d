"Low-rank adapters through peft: what moves, what is saved, what comes back."
import copy
import numpy as np, pytest, torch, transformers
from processes import run_forked
from transformers import AutoConfig, AutoModelForCausalLM

peft = pytest.importorskip('peft', reason='pip install peft')
from likeness import same_logits
from libmoe_nb.models.lora import add_lora, lora_targets  # noqa: E402
from libmoe_nb.analysis.model_metrics import expert_parameter_similarity  # noqa: E402
from libmoe_nb.models.causal import from_scratch  # noqa: E402
from libmoe_nb.analysis.tracing import moe_layers, record_routing  # noqa: E402
from libmoe_nb.models.upcycling import upcycle  # noqa: E402

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
SPARSE = 'smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()
IDS = torch.randint(1, 96, (2, 10), generator=torch.Generator().manual_seed(0))

def make(recipe='smoe', **kw):
    return from_scratch(recipe, 'tiny', seed=0,
                        **dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                               num_experts=6, top_k=3, moe_intermediate_size=16, router_init_std=.3) | kw).eval()

@torch.no_grad()
def logits(m): return m.eval()(input_ids=IDS).logits

def train(model, steps=3):
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.03)
    for _ in range(steps):
        out = model.train()(input_ids=IDS, labels=IDS)
        out.loss.backward()
        lazy = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not lazy and all(p.grad is None for p in model.parameters() if not p.requires_grad)
        opt.step(); opt.zero_grad()
    return out

def cycle(base, tmp_path, parts, **kw):
    "Add, train, save, reload on the base, merge; what was trained"
    want, before = logits(base), {n: t.clone() for n, t in base.state_dict().items()}
    model = add_lora(copy.deepcopy(base), parts, r=2, **kw)
    assert torch.equal(logits(model), want)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    out = train(model)
    assert out.aux_loss > 0 and all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    after = logits(model)
    assert not torch.allclose(after, want, atol=1e-3)
    model.save_pretrained(tmp_path/'adapter')
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'adapter')
    assert same_logits(logits(back), after)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
                       back.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    with back.disable_adapter(): assert same_logits(logits(back), want)
    with record_routing(model) as records: logits(model)
    assert len(records) == len(moe_layers(base)) and all(len(r) == 1 for r in records.values())
    merged = model.merge_and_unload()
    assert type(merged) is type(base) and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(logits(merged), after, atol=1e-4, rtol=1e-4)
    moved = {n for n, t in merged.state_dict().items() if not torch.equal(t, before[n])}
    merged.save_pretrained(tmp_path/'merged')
    assert same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'merged')), logits(merged))
    return trained, moved

@pytest.mark.parametrize('recipe', SPARSE)
def test_attention_only(recipe, tmp_path):
    trained, moved = cycle(make(recipe), tmp_path, 'attention', lora_dropout=.1)
    assert len(trained) == 16 and all('self_attn' in n and 'lora_' in n for n in trained)
    assert len(moved) == 8 and all('self_attn' in n for n in moved)

@pytest.mark.parametrize('recipe, kw', [*((r, {}) for r in SPARSE), ('smoe', dict(gated=True, hidden_act='silu')),
                                        ('smoe', dict(bias=True))])
def test_fused_experts(recipe, kw, tmp_path):
    trained, moved = cycle(make(recipe, **kw), tmp_path, 'experts')
    up = 'gate_up_proj' if kw.get('gated') else 'up_proj'
    assert len(trained) == 8 and all('experts' in n and 'lora_' in n for n in trained)
    assert moved == {f'base.model.layers.{i}.mlp.experts.{n}' for i in (0, 1) for n in (up, 'down_proj')}

@pytest.mark.parametrize('recipe', ['smoe', 'xmoe', 'tcmoe', 'moe_plus_plus', 'sharede_v3'])
def test_routers_whole(recipe, tmp_path):
    trained, moved = cycle(make(recipe, **dict(expert_bias=True) if recipe == 'sharede_v3' else {}), tmp_path,
                           ['experts', 'routers'])
    assert {n.split('.mlp.')[1].split('.')[0] for n in moved} == {'router', 'experts'}

def test_every_part(tmp_path):
    trained, moved = cycle(make('sharede_v2', shared_gate=True), tmp_path,
                           ['attention', 'experts', 'shared_experts', 'routers'])
    assert {n.split('.')[5] if 'mlp' in n else 'self_attn'
            for n in moved} == {'self_attn', 'experts', 'shared_experts', 'router', 'shared_gate'}

@pytest.mark.parametrize('kernel', ['loop', 'sorted', 'grouped_mm'])
def test_kernels_agree_on_adapters(kernel):
    "Each expert has a difference of its own, and gradients reach it in every kernel"
    def grads(kernel):
        model = add_lora(make(), 'experts', r=2, init_lora_weights=False)
        torch.manual_seed(0)
        for n, p in model.named_parameters():
            if p.requires_grad: torch.nn.init.normal_(p, std=.1)
        for l in moe_layers(model).values(): l.experts.get_base_layer().kernel = kernel
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for (n, a), b in zip(grads(kernel).items(), grads('loop').values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=n)

def test_differences_belong_to_their_expert():
    model = add_lora(make(), 'experts', r=2, init_lora_weights=False)
    layer = next(iter(moe_layers(model).values()))
    wrapper = layer.experts
    while wrapper.parameter_name != 'up_proj': wrapper = wrapper.base_layer
    a, b = wrapper.lora_A['default'].weight.detach(), wrapper.lora_B['default'].weight.detach()
    delta = wrapper.get_delta_weight('default')
    for e in range(6): torch.testing.assert_close(delta[e], 8 * b.reshape(16, 2, 6)[:, :, e] @ a.reshape(6, 2, 32)[e])

@pytest.mark.parametrize('family', ['gpt2', 'gpt_neox', 'llama'])
def test_upcycled_models(family, tmp_path):
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes,
                                                                  **dict(n_inner=48) if family == 'gpt2' else {}))
    for parts in ['attention', 'experts'] if family == 'gpt2' else [('attention', 'experts')]:
        trained, moved = cycle(upcycle(dense, 'smoe', 4, 2, seed=0), tmp_path, parts)
        assert moved and not [n for n in moved if 'lm_head' in n or 'embed' in n or 'router' in n]

def test_bfloat16_and_checkpointing():
    model = add_lora(make().to(torch.bfloat16), r=2)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert train(model).loss.isfinite()

def test_two_adapters():
    model = add_lora(make(), 'experts', r=2)
    train(model)
    one = logits(model)
    model.add_adapter('other', copy.deepcopy(model.peft_config['default']))
    model.set_adapter('other')
    assert torch.equal(logits(model), logits(make()))
    model.set_adapter('default')
    assert torch.equal(logits(model), one)

def test_errors():
    with pytest.raises(ValueError, match="parts must be of attention, experts, shared_experts, routers, got 'mlp'"):
        add_lora(make(), 'mlp')
    with pytest.raises(ValueError, match="must have mixture-of-experts layers for parts='routers'"):
        add_lora(make('dense'), 'routers')
    with pytest.raises(ValueError, match="parts='shared_experts' found no linear layer"):
        lora_targets(make(), 'shared_experts')
    assert lora_targets(make('dense'), 'attention')['target_modules']

def test_peft_is_only_imported_when_needed():
    code = '''
import sys
sys.modules['peft'] = None
import libmoe_nb.models.lora, libmoe_nb.models.causal
from libmoe_nb.models.causal import from_scratch
try: libmoe_nb.models.lora.add_lora(from_scratch('smoe', 'tiny'))
except ImportError as e: print(e)
'''
    p = run_forked(code)
    assert p.stdout.strip() == 'add_lora needs peft: pip install libmoe-nb[peft]', p.stderr

@pytest.mark.parametrize('recipe', ['smoe', 'sharede_v2'])
def test_similarity_of_experts_is_that_of_the_merged_model(recipe):
    "An expert's parameters are its matrices with the adapters' products on them"
    model = add_lora(make(recipe), ['experts', 'routers'], r=2, init_lora_weights=False)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_' in n: p.normal_(0, .1)
    similar = lambda m: expert_parameter_similarity(m).similarity.to_numpy()
    with model.disable_adapter(): off = similar(model)
    on = similar(model)
    np.testing.assert_allclose(off, similar(make(recipe)), atol=1e-6)
    merged = copy.deepcopy(model); merged.merge_adapter()
    for m in merged, model.merge_and_unload(): np.testing.assert_allclose(similar(m), on, atol=1e-6)
    assert abs(on - off).max() > 1e-2

def test_similarity_of_experts_of_another_library():
    from libmoe_nb.analysis.tiny_models import tiny_moe
    for kind, targets in dict(olmoe=dict(target_parameters=['experts.gate_up_proj', 'experts.down_proj']),
                              switch_transformers=dict(target_modules=['wi', 'wo'])).items():
        model = peft.get_peft_model(tiny_moe(kind), peft.LoraConfig(r=2, init_lora_weights=False, **targets))
        on = expert_parameter_similarity(model)
        np.testing.assert_allclose(expert_parameter_similarity(model.merge_and_unload()).similarity,
                                   on.similarity, atol=1e-6)

@pytest.mark.parametrize('kind', ['PromptTuningConfig', 'PromptEncoderConfig', 'PrefixTuningConfig'])
@pytest.mark.parametrize('family', [None, 'gpt2', 'qwen3'])
def test_virtual_tokens(kind, family, tmp_path):
    "Prompt tuning, p-tuning and prefix tuning read sizes off the configuration's dictionary"
    sizes = dict(gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_inner=48),
                 qwen3=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=8))
    base = family and AutoConfig.for_model(family, vocab_size=96, bos_token_id=None, eos_token_id=None, **sizes[family])
    m = make() if family is None else from_scratch('smoe', 'tiny', base=base, seed=0, num_experts=6, top_k=3,
                                                   moe_intermediate_size=16, router_init_std=.3)
    model = peft.get_peft_model(m, getattr(peft, kind)(task_type='CAUSAL_LM', num_virtual_tokens=3))
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    out = train(model)
    assert (out.loss.isfinite() and out.aux_loss > 0 and before
            and any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before))
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(m), tmp_path)
    with torch.no_grad(): assert same_logits(model.eval()(input_ids=IDS).logits, back.eval()(input_ids=IDS).logits)
    # peft 0.21 knows the cache by its old name only, so generation from prefixes fails with transformers 5.24: here by
    # an error, on a Llama in silence
    if kind == 'PrefixTuningConfig': return
    want, got = (x.eval().generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3,
                                   do_sample=False) for x in (model, back))
    assert want.shape == (2, 13) and torch.equal(want, got)
