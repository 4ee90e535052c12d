"Models as Hugging Face models: files, processes, families, trainers. What a reader need not see in the chapter."
import copy, json, pickle
import pytest, torch, transformers
from huggingface_hub import ModelCard
from hub_made import hub_in_place
from processes import run_forked
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from likeness import same_logits, same_weights
from libmoe_nb.moe.config import presets, recipes
from libmoe_nb.models.cards import model_card
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.models.counting import count_flops, count_parameters
from libmoe_nb.analysis.tracing import moe_layers, record_routing

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
RECIPES = 'dense smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()
SPARSE = RECIPES[1:]
SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, num_experts=6,
             top_k=3, moe_intermediate_size=16)
FAMILIES = dict(llama={}, mistral={}, qwen2={}, qwen3=dict(head_dim=16), olmo2={}, gemma=dict(head_dim=16),
                gemma2=dict(head_dim=16),
                gemma3_text=dict(head_dim=16), phi3={}, glm=dict(head_dim=16), stablelm={})

def make(recipe, seed=0, **kw):
    return from_scratch(recipe, 'tiny', seed=seed, **{k: v for k, v in (SMALL | kw).items() if k != 'vocab_size'},
                        vocab_size=kw.get('vocab_size', 96)).eval()

def tokens(B=2, S=10, V=96, seed=0): return torch.randint(1, V, (B, S), generator=torch.Generator().manual_seed(seed))

def family(name, recipe='smoe', **kw):
    base = AutoConfig.for_model(name, **dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=64) | FAMILIES[name] | kw)
    return from_scratch(recipe, 'tiny', base=base, seed=0, num_experts=6, top_k=3, moe_intermediate_size=16).eval()

def grads(m): return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}

def assert_same(a, b, tol=1e-5):
    assert a.keys() == b.keys()
    for n in a:
        if a[n] is None or b[n] is None: assert a[n] is b[n], n
        else: torch.testing.assert_close(a[n], b[n], atol=tol, rtol=tol, msg=lambda m: f'{n}: {m}')

def test_the_recipes_are_all_here(): assert set(RECIPES) <= set(recipes)

# ---- files
@pytest.mark.parametrize('recipe', RECIPES)
def test_save_load_same_bits(recipe, tmp_path):
    m, x = make(recipe), tokens()
    m.save_pretrained(tmp_path)
    for cls in (AutoModelForCausalLM, MoEForCausalLM):
        back, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
        assert same_weights(back, m) and same_logits(back(x).logits, m(x).logits)
        assert not back.training
        assert back.config.spec == m.config.spec

@pytest.mark.long
def test_fresh_process_loads_the_same(tmp_path):
    x = tokens()
    torch.save(x, tmp_path/'x.pt')
    for r in RECIPES:
        m = make(r, seed=3)
        m.save_pretrained(tmp_path/r)
        save_file(dict(logits=m(x).logits.detach(), scratch=m.state_dict()[
            'base.model.layers.1.mlp.' + ('down_proj.weight' if r == 'dense' else 'experts.down_proj')].clone()),
                  tmp_path/f'{r}.safetensors')
    code = '''
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
import libmoe_nb.models.causal
from libmoe_nb.models.causal import from_scratch
from transformers import AutoModelForCausalLM
d, recipes, small = Path(sys.argv[1]), sys.argv[2].split(), eval(sys.argv[3])
x = torch.load(d/'x.pt')
for r in recipes:
    want = load_file(d/f'{r}.safetensors')
    model = AutoModelForCausalLM.from_pretrained(d/r)
    assert torch.allclose(model(x).logits, want['logits'], rtol=1e-5, atol=1e-5), r
    w = from_scratch(r, 'tiny', seed=3, **small).state_dict()
    name = 'down_proj.weight' if r == 'dense' else 'experts.down_proj'
    assert torch.equal(w[f'base.model.layers.1.mlp.{name}'], want['scratch']), r
print('same')
'''
    p = run_forked(code, tmp_path, ' '.join(RECIPES), repr(SMALL))
    assert p.stdout.strip().endswith('same'), p.stderr[-2000:]

@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
def test_sharded(recipe, tmp_path):
    m, x = make(recipe), tokens()
    m.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2 and (tmp_path/'model.safetensors.index.json').exists()
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, m(x).logits)

def test_no_weight_of_a_shard_may_be_missing(tmp_path):
    make('smoe').save_pretrained(tmp_path, max_shard_size='20KB')
    index = json.loads((tmp_path/'model.safetensors.index.json').read_text())
    f = tmp_path/index['weight_map']['base.model.layers.0.mlp.router.weight']
    save_file({n: t for n, t in load_file(f).items() if 'router' not in n}, f, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='base.model.layers.0.mlp.router.weight is missing'):
        AutoModelForCausalLM.from_pretrained(tmp_path)

@pytest.mark.parametrize('recipe,name', [('smoe', 'mlp.experts.down_proj'), ('xmoe', 'mlp.router.proj'),
    ('moe_plus_plus', 'mlp.zero_experts.constant'),
    ('sharede_v2', 'mlp.shared_experts.up_proj.weight'), ('dense', 'mlp.up_proj.weight'),
    ('tcmoe', 'self_attn.q_proj.weight')])
def test_missing_and_misshaped_weights_are_named(recipe, name, tmp_path):
    make(recipe).save_pretrained(tmp_path)
    f, full = tmp_path/'model.safetensors', f'base.model.layers.1.{name}'
    w = load_file(f)
    assert full in w
    save_file({n: t for n, t in w.items() if n != full}, f, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'{full} is missing'): AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file({n: t[:-1].contiguous() if n == full else t for n, t in w.items()}, f, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'{full} has shape'): AutoModelForCausalLM.from_pretrained(tmp_path)
    # asked for: drawn anew, and nothing else is touched
    m = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    for n, t in m.state_dict().items():
        assert t.isfinite().all()
        if n != full: assert torch.equal(t, w[n]), n
    std = {'self_attn.q_proj.weight': 0.02, 'mlp.zero_experts.constant': 32**-0.5}.get(name, 0.02)
    assert m.state_dict()[full].std().item() == pytest.approx(std, rel=0.5)

def test_unexpected_weights_are_named(tmp_path):
    make('sharede_v2', num_shared_experts=1).save_pretrained(tmp_path)
    config = make('smoe', num_experts=5, top_k=2).config
    with pytest.raises(ValueError, match='mlp.shared_experts.down_proj.weight has no place in the model'):
        MoEForCausalLM.from_pretrained(tmp_path, config=config)

def test_without_the_import_transformers_says_so(tmp_path):
    make('smoe').save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    p = run_forked(code, tmp_path, cwd=tmp_path)
    assert (p.returncode == 1 and 'model type `libmoe`' in p.stderr
            and 'does not recognize this architecture' in p.stderr), p.stderr[-2000:]
    # nothing to trust
    assert not list(tmp_path.glob('*.py')) and 'auto_map' not in (tmp_path/'config.json').read_text()

# ---- card and hub
@pytest.mark.parametrize('recipe', RECIPES)
def test_card(recipe, tmp_path):
    m = make(recipe)
    m.config.training = dict(data=['sotu', 'kjv'], steps=12000, optimizer=dict(name='AdamW', lr=1e-3))
    m.save_pretrained(tmp_path)
    card, c = ModelCard.load(tmp_path/'README.md'), count_parameters(m)
    assert card.data.pipeline_tag == 'text-generation' and recipe in card.data.tags and card.data.base_model is None
    for fact in (f'`{recipe}`', f"| total | {c['total']:,} |".replace(',', ',' if c['total'] > 9999 else ''),
                 'import libmoe_nb.models.causal', 'trust_remote_code', '| data | sotu, kjv |',
                 '| steps | 12,000 |', '| optimizer / lr | 0.001 |', 'base | llama'): assert fact in card.text, fact
    assert 'Evaluation' not in card.text and ('router_aux_loss_coef' in card.text) == (recipe != 'dense')

def test_card_names_the_base_model(tmp_path):
    m = make('smoe')
    m.config.base_config._name_or_path = 'HuggingFaceTB/SmolLM2-135M'
    assert model_card(m).data.base_model == 'HuggingFaceTB/SmolLM2-135M'
    m.config.base_config._name_or_path = str(tmp_path)
    assert model_card(m).data.base_model is None

@pytest.fixture
def hub(monkeypatch): return hub_in_place(monkeypatch)

def unpack(hub, folder):
    for n, b in hub.files.items(): (folder/n).write_bytes(b)
    return AutoModelForCausalLM.from_pretrained(folder)

@pytest.mark.parametrize('how', ['push', 'save'])
def test_push_to_hub(how, hub, tmp_path):
    m, x = make('sharede_v2'), tokens()
    if how == 'push':
        m.push_to_hub('mixture', private=True, commit_message='First', revision='dev', max_shard_size='20KB')
    else:
        m.save_pretrained(tmp_path/'saved', push_to_hub=True, repo_id='mixture', private=True, commit_message='First',
                          revision='dev', max_shard_size='20KB')
    (_, name, made), (_, to, sent) = hub.calls
    assert (name, made['private'], to) == ('mixture', True, 'me/mixture')
    assert (sent['commit_message'], sent['revision'], sent['create_pr']) == ('First', 'dev', None)
    assert (set(hub.files) >= {'README.md', 'config.json', 'model.safetensors.index.json', 'generation_config.json'}
            and not [n for n in hub.files if n.endswith('.py')])
    assert b"from_pretrained('mixture')" in hub.files['README.md']
    (tmp_path/'down').mkdir()
    back = unpack(hub, tmp_path/'down')
    assert same_weights(back, m) and same_logits(back(x).logits, m(x).logits)

def test_a_card_on_the_hub_is_kept(hub):
    m = make('smoe')
    hub.card = 'Somebody wrote this'
    m.push_to_hub('mixture')
    assert 'README.md' not in hub.files and 'model.safetensors' in hub.files
    hub.card = model_card(m).content
    m.push_to_hub('mixture')
    assert 'README.md' in hub.files

def test_another_recipes_weights_are_refused(tmp_path):
    make('tcmoe').save_pretrained(tmp_path)
    config = make('smoe').config
    with pytest.raises(ValueError, match='router.weight has shape'):
        MoEForCausalLM.from_pretrained(tmp_path, config=config)

def test_a_dense_checkpoint_has_no_experts(tmp_path):
    make('smoe').base.config.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(make('dense').base.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='mlp.experts.down_proj is missing'):
        MoEForCausalLM.from_pretrained(tmp_path, config=make('smoe').config)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    m, x = make('moe_plus_plus'), tokens()
    m.save_pretrained(tmp_path/'full')
    low = AutoModelForCausalLM.from_pretrained(tmp_path/'full', dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {dtype} and low.dtype == dtype
    assert low(x).logits.isfinite().all()
    low.save_pretrained(tmp_path/'low')
    auto = AutoModelForCausalLM.from_pretrained(tmp_path/'low', dtype='auto')
    assert auto.dtype == dtype
    assert same_weights(auto, low) and same_logits(auto(x).logits, low(x).logits)
    assert {p.dtype for p in AutoModelForCausalLM.from_config(m.config, dtype=dtype).parameters()} == {dtype}

def test_buffers_and_options_survive(tmp_path):
    m = make('sharede_v3', expert_bias=True)
    for l in moe_layers(m).values(): l.router.expert_bias.uniform_()
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(moe_layers(m).values(), moe_layers(back).values()):
        assert torch.equal(a.router.expert_bias, b.router.expert_bias)
    assert same_weights(back, m) and same_logits(back(tokens()).logits, m(tokens()).logits)
    # the non-persistent ones too
    for (n, a), (_, b) in zip(m.named_buffers(), back.named_buffers()): assert torch.equal(a, b), n

def test_some_layers_only(tmp_path):
    base = make('smoe', num_hidden_layers=4).base.config
    m = from_scratch('moe_plus_plus', 'tiny', base=base, seed=0, layers=[1, -1], num_experts=6, top_k=3,
                     moe_intermediate_size=16).eval()
    assert [n.split('.')[3] for n in moe_layers(m)] == ['1', '3']
    m.save_pretrained(tmp_path)
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, m(tokens()).logits)

@pytest.mark.parametrize('device_map', ['cpu', 'auto', 'balanced', 'sequential', {'': 'cpu'}])
def test_device_map(device_map, tmp_path):
    m = make('moe_plus_plus')
    m.save_pretrained(tmp_path, max_shard_size='20KB')
    back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert same_weights(back, m) and same_logits(back(tokens()).logits, m(tokens()).logits)
    assert torch.equal(back.generate(tokens(), max_new_tokens=4, do_sample=False),
                       m.generate(tokens(), max_new_tokens=4, do_sample=False))

@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus', 'sharede_v3'])
def test_offloaded_to_disk(recipe, tmp_path):
    m, x = make(recipe, num_hidden_layers=3), tokens()
    m.save_pretrained(tmp_path/'model')
    places = {'base.model.embed_tokens': 'cpu', 'base.model.rotary_emb': 'cpu', 'base.model.norm': 'cpu',
              'base.lm_head': 'cpu', **{f'base.model.layers.{i}': d for i, d in enumerate(['cpu', 'disk', 'disk'])}}
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'model', device_map=places, offload_folder=tmp_path/'offload')
    assert {p.device.type for p in back.base.model.layers[1].mlp.parameters()} == {'meta'}
    torch.testing.assert_close(back(x).logits, m(x).logits)
    out = back(x, labels=x, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, m(x, output_router_logits=True).aux_loss)

def test_a_layer_is_never_split_over_devices():
    from accelerate import infer_auto_device_map
    m = make('sharede_v2', num_hidden_layers=4)
    assert m._no_split_modules == {'LlamaDecoderLayer'}
    size = lambda m: 4 * sum(p.numel() for p in m.parameters())
    budget = size(m.base.model.embed_tokens) + int(2.5 * size(m.base.model.layers[0]))
    places = infer_auto_device_map(m, max_memory={'cpu': budget, 'disk': 10**9},
                                   no_split_module_classes=list(m._no_split_modules))
    assert set(places.values()) == {'cpu', 'disk'} and not [n for n in places if 'layers' in n and n.count('.') > 3]

@pytest.mark.parametrize('recipe', RECIPES)
def test_copies_and_pickles(recipe):
    m, x = make(recipe), tokens()
    m.train()(x, labels=x)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert same_weights(other, m) and same_logits(other.eval()(x).logits, m.eval()(x).logits)
        with torch.no_grad(): [p.zero_() for p in other.parameters()]
    assert m(x).logits.abs().sum() > 0
    fresh = make(recipe, seed=5)
    fresh.load_state_dict(m.state_dict())
    assert same_weights(fresh, m) and same_logits(fresh(x).logits, m(x).logits)

# ---- initialisation
def test_initialised_from_empty_memory():
    "meta -> empty -> init_weights draws each part as its constructor would"
    spec = dict(num_experts=16, top_k=2, router_init_std=0.3, expert_init_std=(0.7, 0.05), num_hidden_layers=1)
    for r in ('smoe', 'dense', 'moe_plus_plus', 'xmoe'):
        config = make(r, **spec).config
        with torch.device('meta'): m = MoEForCausalLM(copy.deepcopy(config))
        assert {p.device.type for p in m.parameters()} == {'meta'}
        m.to_empty(device='cpu')
        with torch.no_grad(): [p.fill_(float('nan')) for p in [*m.parameters(), *m.buffers()]]
        m.init_weights()
        for made in (m, MoEForCausalLM(copy.deepcopy(config)), AutoModelForCausalLM.from_config(copy.deepcopy(config))):
            std = {n: t.std().item() for n, t in made.state_dict().items()}
            mlp = lambda name: next(v for n, v in std.items() if f'mlp.{name}' in n)
            assert all(t.isfinite().all() for t in [*made.state_dict().values(), *made.buffers()])
            if r == 'dense': want = {'up_proj': 0.7, 'down_proj': 0.05}
            else:
                want = {'experts.up_proj': 0.7, 'experts.down_proj': 0.05,
                        'router.proj' if r == 'xmoe' else 'router.weight': 0.3}
            for n, v in want.items(): assert mlp(n) == pytest.approx(v, rel=0.15), (r, n)
            assert std['base.model.embed_tokens.weight'] == pytest.approx(0.02, rel=0.1)
            assert std['base.model.layers.0.self_attn.q_proj.weight'] == pytest.approx(0.02, rel=0.1)
            assert std['base.model.norm.weight'] == 0
            assert made(tokens()).logits.isfinite().all()

def test_seeds_leave_the_generator_alone():
    torch.manual_seed(7); want = torch.rand(3)
    torch.manual_seed(7); make('xmoe', seed=1); assert torch.equal(torch.rand(3), want)
    torch.manual_seed(7); a = make('xmoe', seed=None); b = make('xmoe', seed=None)
    torch.manual_seed(7); c = make('xmoe', seed=None)
    w = 'base.lm_head.weight'
    assert torch.equal(a.state_dict()[w], c.state_dict()[w]) and not torch.equal(a.state_dict()[w], b.state_dict()[w])

@pytest.mark.parametrize('preset', [pytest.param(p, marks=[pytest.mark.long] * (p == 'paper-0.68b'))
                                    for p in presets])
def test_presets_on_meta(preset):
    for r in RECIPES:
        with torch.device('meta'): m = from_scratch(r, preset, seed=0)
        c = count_parameters(m)
        assert (c['total'] == sum(v for k, v in c.items() if k not in ('total', 'active')) == m.num_parameters()
                and c['other'] == 0)
        assert (0 < c['active'] <= c['total']
                and count_flops(m, presets[preset].sequence_length) > 2 * (c['active'] - 2 * c['embedding']))

# ---- forward
@pytest.mark.parametrize('recipe', RECIPES)
def test_generation_with_and_without_cache(recipe):
    m, x = make(recipe), tokens(B=3, S=5)
    args = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(m.generate(x, **args), m.generate(x, use_cache=False, **args))
    full, past, steps = m(x).logits, None, []
    for t in range(5):
        out = m(x[:, t:t+1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('recipe', RECIPES)
def test_left_padding(recipe):
    m, x = make(recipe), tokens(B=2, S=7)
    padded, mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), x], 1), torch.ones(2, 11, dtype=torch.long)
    mask[:, :4] = 0
    args = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(m.generate(padded, attention_mask=mask, **args)[:, 11:], m.generate(x, **args)[:, 7:])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    a = m(padded, attention_mask=mask, position_ids=positions, output_router_logits=True)
    b = m(x, output_router_logits=True)
    torch.testing.assert_close(a.aux_loss, b.aux_loss, atol=1e-6, rtol=1e-5)
    other = padded.clone(); other[:, :4] = 9  # what stands in the padding changes nothing
    torch.testing.assert_close(m(other, attention_mask=mask, position_ids=positions,
                                 output_router_logits=True).aux_loss, b.aux_loss, atol=1e-6, rtol=1e-5)

def test_cached_decoding_takes_no_mask_for_padding():
    m, x = make('smoe'), tokens()
    first = m(x[:, :-1], use_cache=True)
    out = m(x[:, -1:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(x),
            output_router_logits=True)
    assert out.aux_loss.isfinite() and out.router_logits[0].shape == (2, 6)

@pytest.mark.parametrize('recipe', RECIPES)
def test_outputs(recipe):
    m, x = make(recipe), tokens()
    m.set_attn_implementation('eager')
    out = m(x, labels=x, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2 and len(out.router_logits) == len(moe_layers(m))
    lm = m(x, labels=x)
    torch.testing.assert_close(out.loss, lm.loss + out.aux_loss)
    assert lm.aux_loss is None and lm.router_logits is None
    as_tuple = m(x, labels=x, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], lm.loss) and torch.equal(as_tuple[1], lm.logits)
    embeds = m(inputs_embeds=m.get_input_embeddings()(x), labels=x)
    torch.testing.assert_close(embeds.loss, lm.loss)
    assert m(x, logits_to_keep=1).logits.shape == (2, 1, 96)
    m.config.output_router_logits = True
    assert (m(x).aux_loss is not None) and m(x, output_router_logits=False).aux_loss is None

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_reduction_over_layers(reduction):
    x, m = tokens(), make('smoe')
    m.config.aux_loss_reduction = 'mean'
    mean = m(x, output_router_logits=True).aux_loss
    m.config.aux_loss_reduction = reduction
    torch.testing.assert_close(m(x, output_router_logits=True).aux_loss, mean * (2 if reduction == 'sum' else 1))

# ---- training
@pytest.mark.parametrize('recipe', SPARSE)
def test_aux_loss_reaches_every_router(recipe):
    m, x = make(recipe).train(), tokens(B=4, S=16)
    m(x).aux_loss.backward()
    for n, l in moe_layers(m).items():
        assert sum(p.grad.abs().sum() for p in l.router.parameters() if p.grad is not None) > 0, n
    assert m.get_output_embeddings().weight.grad is None

@pytest.mark.parametrize('recipe', RECIPES)
def test_checkpointing_changes_no_gradient(recipe):
    m, x, y = make(recipe, num_hidden_layers=3, router_aux_loss_coef=1.).train(), tokens(), tokens(seed=1)
    mask = torch.ones_like(x); mask[0, :3] = 0
    for what in ('loss', 'aux_loss'):
        if recipe == 'dense' and what == 'aux_loss': continue
        seen = []
        for on in (False, True):
            m.zero_grad(set_to_none=True)
            (m.activation_checkpointing_enable if on else m.activation_checkpointing_disable)()
            # both alive when the first is differentiated
            first, second = m(x, attention_mask=mask, labels=x), m(y, labels=y)
            getattr(first, what).backward()
            (2 * getattr(second, what)).backward()
            seen.append(grads(m))
        assert_same(*seen)

def test_checkpointing_records_once_in_forward():
    m, x = make('moe_plus_plus').train(), tokens()
    m.activation_checkpointing_enable()
    with record_routing(m) as records: out = m(x, labels=x)
    out.loss.backward()
    assert [len(r) for r in records.values()] == [1, 1]

def test_reentrant_checkpointing_is_refused():
    m = make('smoe')
    for enable in (m.activation_checkpointing_enable, m.gradient_checkpointing_enable):
        with pytest.raises(ValueError, match='use_reentrant must be False'): enable(dict(use_reentrant=True))
    assert not m.is_activation_checkpointing

@pytest.mark.parametrize('recipe', RECIPES)
def test_accumulated_like_one_batch(recipe):
    "num_items_in_batch: micro-batches of unlike numbers of labels add up to the step, auxiliary loss included"
    m, x = make(recipe, router_aux_loss_coef=1.).train(), tokens(B=2, S=12)
    labels = x.clone(); labels[0, :6] = -100
    n = int((labels[:, 1:] != -100).sum())
    share = [int((l[1:] != -100).sum()) / n for l in labels]
    outs = [m(x[i:i+1], labels=labels[i:i+1], num_items_in_batch=torch.tensor(n)) for i in range(2)]
    alone = [m(x[i:i+1], labels=labels[i:i+1]) for i in range(2)]
    torch.testing.assert_close(sum(o.loss for o in outs), sum(s * a.loss for s, a in zip(share, alone)))

@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'moe_plus_plus'])
@pytest.mark.parametrize('checkpointed', [False, True])
def test_trainer(recipe, checkpointed, tmp_path):
    m, x = make(recipe), tokens(B=8, S=12)
    data = [dict(input_ids=r, labels=r, attention_mask=torch.ones_like(r)) for r in x]
    before = {n: p.clone() for n, p in m.named_parameters()}
    key = next(k for k in ('activation_checkpointing', 'gradient_checkpointing')
               if k in TrainingArguments.__dataclass_fields__)
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                             learning_rate=1e-2, report_to=[],
                             use_cpu=True, save_strategy='no', logging_steps=1, disable_tqdm=True,
                             **{key: checkpointed})
    trainer = Trainer(m, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [l['loss'] for l in trainer.state.log_history if 'loss' in l]
    assert len(losses) == 2 and all(3 < l < 6 for l in losses), losses  # about log 96, not its multiple
    for n, p in m.named_parameters():
        if 'gating_residual' not in n: assert not torch.equal(p, before[n]), n
    metrics = trainer.evaluate()
    m.eval()
    torch.testing.assert_close(metrics['eval_loss'], m(x, labels=x).loss.item(), atol=1e-4, rtol=1e-4)
    trainer.save_model(str(tmp_path/'saved'))
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path/'saved')(x).logits, m(x).logits)

@pytest.mark.parametrize('recipe', RECIPES)
def test_autocast(recipe):
    m, x = make(recipe).train(), tokens()
    with torch.autocast('cpu', torch.bfloat16): out = m(x, labels=x)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    assert out.aux_loss.dtype == torch.float32

# ---- families
@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus', 'dense'])
def test_families(name, recipe, tmp_path):
    m, x = family(name, recipe), tokens()
    m.train()
    out = m(x, labels=x)
    out.loss.backward()
    assert out.loss.isfinite() and len(moe_layers(m)) == (0 if recipe == 'dense' else 2)
    m.eval()
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back.base) is type(m.base)
    assert same_weights(back, m) and same_logits(back(x).logits, m(x).logits)
    args = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(back.generate(x, **args), m.generate(x, use_cache=False, **args))
    c = count_parameters(m)
    assert c['total'] == sum(p.numel() for p in m.parameters()) and c['other'] == 0

@pytest.mark.parametrize('name', ['llama', 'gemma', 'gemma3_text', 'qwen3'])
def test_tied_embeddings(name, tmp_path):
    m, x = family(name, tie_word_embeddings=True), tokens()
    tied = lambda m: m.get_input_embeddings().weight is m.get_output_embeddings().weight
    assert tied(m) and count_parameters(m)['head'] == 0 and m.config.tie_word_embeddings
    m.save_pretrained(tmp_path)
    assert 'base.lm_head.weight' not in load_file(tmp_path/'model.safetensors')
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tied(back) and same_logits(back(x).logits, m(x).logits)
    w = load_file(tmp_path/'model.safetensors')
    save_file({n: t for n, t in w.items() if 'embed_tokens' not in n}, tmp_path/'model.safetensors',
              metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='embed_tokens.weight is missing'):
        AutoModelForCausalLM.from_pretrained(tmp_path)

@pytest.mark.parametrize('tie', [False, True])
def test_resizing_embeddings(tie, tmp_path):
    m, x = family('llama', tie_word_embeddings=tie), tokens()
    want = m(x).logits
    m.resize_token_embeddings(100)
    assert (m.config.vocab_size, m.base.config.vocab_size, m.get_input_embeddings().num_embeddings) == (100, 100, 100)
    torch.testing.assert_close(m(x).logits[..., :96], want)
    assert m(torch.full((1, 3), 99), labels=torch.full((1, 3), 99)).loss.isfinite()
    m.save_pretrained(tmp_path)
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, m(x).logits)

def test_attention_implementation(tmp_path):
    m = make('smoe')
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager')
    assert back.base.config._attn_implementation == 'eager'
    assert AutoModelForCausalLM.from_pretrained(tmp_path).base.config._attn_implementation == 'sdpa'
    torch.testing.assert_close(back(tokens()).logits, m(tokens()).logits)

def test_lm_eval_finds_its_way():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(['<end>', '[UNK]', *'abcdefghijklmnopqrstuvwxyz '])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<end>', pad_token='<end>')
    m = make('moe_plus_plus')
    lm = HFLM(pretrained=m, tokenizer=tok, batch_size=2)
    assert lm.max_length == m.config.max_position_embeddings
    pairs = [('a cat', ' sat'), ('no', ' dog at all')]
    got = lm.loglikelihood([Instance('loglikelihood', {}, a, i) for i, a in enumerate(pairs)], disable_tqdm=True)
    for (context, more), (value, _) in zip(pairs, got):
        ids = tok(context + more, return_tensors='pt').input_ids
        logp = m(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, len(context) - 1:, 0].sum()
        assert value == pytest.approx(logp.item(), rel=1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, 'auto'])
def test_expert_bias_stays_in_full_precision(dtype, tmp_path):
    "A step of loss-free balancing is smaller than what half precision can tell apart"
    m = make('sharede_v3', num_shared_experts=1, expert_bias=True)
    for i, l in enumerate(moe_layers(m).values()): l.router.expert_bias.copy_(torch.arange(5) * .3 + 1e-4 * i)
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert back.dtype == (torch.float32 if dtype == 'auto' else dtype)
    for a, b in zip(moe_layers(m).values(), moe_layers(back).values()):
        assert b.router.expert_bias.dtype == torch.float32 and torch.equal(a.router.expert_bias, b.router.expert_bias)
        assert b.router.weight.dtype == back.dtype
    back.save_pretrained(tmp_path/'half')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'half')
    assert all(torch.equal(again.state_dict()[n], t) for n, t in back.state_dict().items())

# ---- bad input
def test_errors():
    mixtral = AutoConfig.for_model('mixtral', vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match='a mixture of experts already: MixtralSparseMoeBlock'):
        from_scratch('smoe', 'tiny', base=mixtral)
    with pytest.raises(ValueError, match='MixtralSparseMoeBlock'):
        count_parameters(AutoModelForCausalLM.from_config(mixtral))
    mamba = AutoConfig.for_model('mamba', vocab_size=96, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match='none was found'): from_scratch('smoe', 'tiny', base=mamba)
    with pytest.raises(ValueError, match="did you mean 'smoe'"): from_scratch('smo', 'tiny')
    with pytest.raises(ValueError, match="did you mean 'tiny'"): from_scratch('smoe', 'tinny')
    with pytest.raises(ValueError, match="did you mean 'num_experts'"): from_scratch('smoe', 'tiny', num_expert=3)
    with pytest.raises(ValueError, match='top_k must be at most num_experts=2, got 3'):
        from_scratch('smoe', 'tiny', num_experts=2, top_k=3, num_shared_experts=0)
    with pytest.raises(ValueError, match='layers must hold indices of the 2 decoder layers, got 5'):
        from_scratch('smoe', 'tiny', layers=[5])
    with pytest.raises(ValueError, match='partial_rotary_factor'):
        from_scratch('smoe', 'tiny', partial_rotary_factor=0.01)
    with pytest.raises(ValueError): MoEConfig(moe=dict(recipe='smoe', num_expert=3))
    with pytest.raises(ValueError, match='aux_loss_reduction'): MoEConfig(aux_loss_reduction='max')
