"Upcycling: every family with every recipe, what is read and swapped, saving, and a real model."

import copy, json
import pytest, torch
from processes import run_forked
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertModel,
                          AutoModelForSequenceClassification, CLIPVisionConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlamaConfig, SiglipVisionConfig)

from likeness import same_logits, same_weights
from libmoe_nb.moe.config import recipes
from libmoe_nb.moe.experts import Experts
from libmoe_nb.moe.layers import MoELayer, aux_loss
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.models.counting import count_parameters
from libmoe_nb.analysis.tracing import moe_layers, record_routing
from libmoe_nb.models.ffns import FFNWeights, ffn_families, ffn_weights, find_ffns, register_ffn
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.models.wrapping import load_upcycled

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0)
CAUSAL = dict(llama={}, smollm3={}, mistral={}, qwen2={}, qwen3=dict(head_dim=8), olmo2={}, gemma=dict(head_dim=8),
              gemma2=dict(head_dim=8), phi3={}, phi={}, gpt2=dict(n_inner=48),
              gpt_neo=dict(attention_types=[[['global', 'local'], 1]], num_layers=2), gpt_neox={},
              gptj=dict(n_inner=48, rotary_dim=8), codegen=dict(n_inner=48, rotary_dim=8), bloom={},
              falcon=dict(ffn_hidden_size=48),
              mpt=dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64), opt=dict(ffn_dim=48, word_embed_proj_dim=32),
              starcoder2={}, stablelm={}, nemotron={},
              glm=dict(head_dim=8), cohere={}, granite={}, biogpt={}, bert=dict(is_decoder=True),
              roberta=dict(is_decoder=True))
ENCODERS = dict(bert={}, roberta={}, electra={}, distilbert=dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4),
                vit=dict(image_size=16, patch_size=8), deit=dict(image_size=16, patch_size=8),
                dinov2=dict(image_size=16, patch_size=8, mlp_ratio=2),
                clip_vision_model=dict(image_size=16, patch_size=8),
                siglip_vision_model=dict(image_size=16, patch_size=8))
EXACT = ['dense', 'smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3']

def rough(model):
    "Random weights, biases and norms that make every part of a model matter"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (.3 if p.dim() > 1 else .1) + (p.dim() < 2))
    return model.eval()

def causal(family, **kw):
    return rough(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | CAUSAL[family] | kw)))
def encoder(family):
    return rough(AutoModel.from_config(AutoConfig.for_model(family, **{k: v for k, v in SMALL.items() if k
                                                                       != 'num_key_value_heads'} | ENCODERS[family])))
def inputs_of(model):
    return (dict(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
            if model.main_input_name == 'pixel_values' else dict(input_ids=IDS))

IDS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))

@torch.no_grad()
def error(dense, moe, **inputs):
    a, b = moe.eval()(**inputs)[0], dense.eval()(**inputs)[0]
    return ((a - b).abs().max() / b.abs().max()).item()

# families

@pytest.mark.parametrize('family', CAUSAL)
def test_causal_families_are_exact_and_survive_saving(family, tmp_path):
    dense = causal(family)
    before = {n: p.clone() for n, p in dense.state_dict().items()}
    for recipe in EXACT:
        moe = upcycle(dense, recipe, 6, 3, seed=0, router_init_std=.5)
        assert type(moe) is MoEForCausalLM
        assert error(dense, moe, input_ids=IDS) < 2e-5, recipe
    for recipe in ('tcmoe', 'moe_plus_plus'):
        moe = upcycle(dense, recipe, 6, 3, seed=0, router_init_std=.5, exact=True)
        assert error(dense, moe, input_ids=IDS) < 2e-5, recipe
    assert all(torch.equal(p, before[n]) for n, p in dense.state_dict().items()) and not moe_layers(dense)
    moe.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same_weights(back, moe) and same_logits(back(IDS).logits, moe(IDS).logits)
    assert count_parameters(moe)['total'] == sum(p.numel() for p in moe.parameters())

@pytest.mark.parametrize('family', ENCODERS)
@pytest.mark.parametrize('recipe', ['smoe_sigmoid', 'sharede_v2'])
def test_encoders_are_exact(family, recipe):
    dense = encoder(family)
    moe = upcycle(dense, recipe, 6, 3, seed=0, router_init_std=.5)
    assert isinstance(moe, type(dense)) and len(moe_layers(moe)) >= 2
    assert error(dense, moe, **inputs_of(dense)) < 2e-5

def test_encoders_train_and_their_state_goes_into_a_twin():
    dense = encoder('bert')
    moe, twin = (upcycle(dense, 'smoe', 4, 2, seed=s).train() for s in (0, 1))
    with record_routing(moe) as records: out = moe(IDS).last_hidden_state
    loss = out.square().mean() + aux_loss([(l, r) for n, l in moe_layers(moe).items() for r in records[n]])[0]
    loss.backward()
    for l in moe_layers(moe).values():
        assert l.router.weight.grad.abs().sum() > 0 and l.experts.up_proj.grad.abs().sum() > 0
    twin.load_state_dict(moe.state_dict())
    assert torch.equal(twin.eval()(IDS).last_hidden_state, moe.eval()(IDS).last_hidden_state)

def test_heads_stay():
    dense = rough(AutoModelForSequenceClassification.from_config(AutoConfig.for_model('distilbert', vocab_size=97,
                                                                                      **ENCODERS['distilbert'])))
    assert error(dense, upcycle(dense, 'smoe', 4, 2), input_ids=IDS) < 2e-5

@pytest.mark.parametrize('vision', [SiglipVisionConfig, CLIPVisionConfig])
def test_vision_language(vision):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                 patch_size=8)
    config = LlavaConfig(vision_config=vision(**sizes), text_config=LlamaConfig(**SMALL), image_token_index=96,
                         vision_feature_layer=-1, vision_feature_select_strategy='full')
    dense = rough(LlavaForConditionalGeneration(config))
    tokens = 4 + (vision is CLIPVisionConfig)
    inputs = dict(input_ids=torch.cat([torch.full((1, tokens), 96), IDS[:1] % 96], 1),
                  pixel_values=torch.randn(1, 3, 16, 16))
    for where, n in dict(vision_tower=2, language_model=2).items():
        moe = upcycle(dense, 'smoe', 6, 3, where=where, seed=0)
        assert (len([m for m in moe_layers(moe) if where in m]) >= n
                and [n for n in find_ffns(dense, where) if n not in moe_layers(moe)]
                == ['model.vision_tower.head.mlp'] * (where == 'vision_tower' and vision is SiglipVisionConfig))
        assert error(dense, moe, **inputs) < 2e-5
    text_only = upcycle(dense, 'smoe', 6, 3)
    assert all('language_model' in n for n in moe_layers(text_only))

def tiny_llava(vision=SiglipVisionConfig, width=24, text_width=32):
    sizes = dict(hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                 patch_size=8)
    dense = rough(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision(**sizes), text_config=LlamaConfig(
        **SMALL | dict(hidden_size=text_width)), image_token_index=96, vision_feature_layer=-1,
                                                            vision_feature_select_strategy='full')))
    return dense, dict(input_ids=torch.cat([torch.full((1, 4 + (vision is CLIPVisionConfig)), 96), IDS[:1] % 96], 1),
                       pixel_values=torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)))

WHOLE = ['vision_tower', 'multi_modal_projector', 'language_model']

@pytest.mark.parametrize('recipe', EXACT)
def test_projectors_between_widths(recipe, tmp_path):
    "Every layer of a LLaVA, and its projector from one width to another, there and back from disk"
    dense, inputs = tiny_llava()
    moe = upcycle(dense, recipe, 6, 3, where=WHOLE, seed=0, router_init_std=.5)
    layer = moe.model.multi_modal_projector
    assert error(dense, moe, **inputs) < 2e-5 and isinstance(moe, LlavaForConditionalGeneration)
    if recipe != 'dense':
        assert (layer.spec.hidden_size, layer.spec.output_size,
                layer.experts.down_proj.shape) == (24, 32, (layer.experts.num_experts, 32, 32))
    moe.save_pretrained(tmp_path)
    back = load_upcycled(tmp_path)
    assert same_weights(back, moe)
    with torch.no_grad(): assert same_logits(back.eval()(**inputs).logits, moe.eval()(**inputs).logits)
    assert (isinstance(back, LlavaForConditionalGeneration) and type(back) is type(moe)
            and back.state_dict().keys() == moe.state_dict().keys())
    if recipe in ('smoe', 'sharede_v3'):
        # copies that differ, for routers to have a say
        moe = upcycle(dense, recipe, 6, 3, where=WHOLE, seed=0, router_init_std=.5, noise=.1)
        moe.train()(**inputs, labels=inputs['input_ids'].where(inputs['input_ids'] < 96, -100)).loss.backward()
        for n, l in moe_layers(moe).items():
            if 'vision' not in n:
                assert l.experts.down_proj.grad.abs().sum() > 0 and l.router.weight.grad.abs().sum() > 0

def test_split_projector_and_copy_experts():
    dense, inputs = tiny_llava()
    assert error(dense, upcycle(dense, 'smoe', 4, 4, where='multi_modal_projector', init='split', router_init_std=0.),
                 **inputs) < 2e-5
    narrow = upcycle(dense, 'moe_plus_plus', 6, 3, where='multi_modal_projector', num_copy=1, seed=0)
    layer = narrow.model.multi_modal_projector
    assert layer.zero_experts is None and layer.router.num_choices == 6 and error(dense, narrow, **inputs) < 2e-5
    square, inputs = tiny_llava(width=32)
    # residuals go from layer to layer within a stack, not from tower to language model
    moe = upcycle(square, 'moe_plus_plus', 6, 3, where=WHOLE, exact=True, seed=0)
    assert error(square, moe, **inputs) < 2e-5
    firsts = [n for n, l in moe_layers(moe).items() if not l._previous]
    assert [n.split('.')[1:3] for n in firsts] == [['vision_tower', 'encoder'], ['multi_modal_projector'],
                                                   ['language_model', 'layers']]
    assert not any('layers.1' in n for n in firsts)

T5 = dict(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, pad_token_id=0,
          decoder_start_token_id=0)

@pytest.mark.parametrize('family', ['t5', 'mt5', 'umt5'])
@pytest.mark.parametrize('act', ['relu', 'gated-gelu', 'gated-silu'])
def test_t5(family, act, tmp_path):
    dense = rough(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **T5, feed_forward_proj=act)))
    inputs = dict(input_ids=IDS, decoder_input_ids=IDS.flip(1))
    for recipe in ('smoe', 'sharede_v2'):
        moe = upcycle(dense, recipe, 6, 3, where=['encoder', 'decoder'], seed=0, router_init_std=.5)
        assert len(moe_layers(moe)) == 4 and error(dense, moe, **inputs) < 2e-5
    assert torch.equal(moe.generate(IDS, max_new_tokens=4, do_sample=False),
                       dense.generate(IDS, max_new_tokens=4, do_sample=False))
    moe.save_pretrained(tmp_path)
    back = load_upcycled(tmp_path).eval()
    with torch.no_grad(): assert same_weights(back, moe) and same_logits(back(**inputs).logits, moe(**inputs).logits)
    moe.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(l.experts.down_proj.grad.abs().sum() > 0 for l in moe_layers(moe).values())
    linked = upcycle(dense, 'moe_plus_plus', 4, 2, where=['encoder', 'decoder'], exact=True)
    # encoder and decoder see different tokens
    assert error(dense, linked, input_ids=IDS, decoder_input_ids=IDS[:, :3]) < 2e-5

def test_t5_half_precision_keeps_its_second_matrix_apart(tmp_path):
    dense = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model('t5', **T5))
    dense.save_pretrained(tmp_path)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    moe = upcycle(half, 'smoe', 4, 2, where=['encoder', 'decoder'])
    assert wo.weight.dtype == torch.float32 and {p.dtype for l in moe_layers(moe).values()
                                                 for p in l.parameters()} == {torch.float16}

def test_opt_balances_each_sequence():
    "Its layers see sequences laid end to end; the loss is that of the sequences"
    moe = upcycle(causal('opt'), 'smoe', 6, 3, seed=0, router_init_std=.5)
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
    both = moe(IDS, attention_mask=mask, output_router_logits=True).aux_loss
    each = [moe(IDS[i:i+1], attention_mask=mask[i:i+1], output_router_logits=True).aux_loss for i in range(2)]
    torch.testing.assert_close(both, sum(each) / 2)
    with record_routing(moe) as records: moe(IDS)
    assert all(len(r.shape) == 1 for rs in records.values() for r in rs)

# saving what is no causal language model

@pytest.mark.parametrize('family', ENCODERS)
def test_encoders_are_saved_and_loaded(family, tmp_path):
    dense = encoder(family)
    moe = upcycle(dense, 'tcmoe', 6, 3, seed=0, layers=[1], exact=True)
    moe.save_pretrained(tmp_path, max_shard_size='20KB')
    back = load_upcycled(tmp_path)
    with torch.no_grad(): assert torch.equal(back.eval()(**inputs_of(dense))[0], moe.eval()(**inputs_of(dense))[0])
    assert list(moe_layers(back)) == list(moe_layers(moe)) and back.config.libmoe == moe.config.libmoe
    back.save_pretrained(tmp_path/'again')
    copied = copy.deepcopy(back)
    with torch.no_grad(): next(copied.parameters()).add_(1.)
    copied.save_pretrained(tmp_path/'copy')
    a, b = (load_upcycled(tmp_path/n).state_dict() for n in ('again', 'copy'))
    assert (all(torch.equal(a[n], t) for n, t in back.state_dict().items())
            and not all(torch.equal(a[n], b[n]) for n in a))

@pytest.mark.long
def test_nobody_else_loads_them(tmp_path):
    moe = upcycle(encoder('bert'), 'smoe', 4, 2)
    moe.save_pretrained(tmp_path)
    code = 'import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])'
    p = run_forked(code, tmp_path)
    assert p.returncode and 'libmoe_bert' in p.stderr
    with pytest.raises(OSError, match='no file named model.safetensors'): BertModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='a mixture of experts already: smoe'): upcycle(tmp_path)

def test_damaged_folders_are_refused(tmp_path):
    moe = upcycle(encoder('bert'), 'smoe', 4, 2)
    moe.save_pretrained(tmp_path)
    f = tmp_path/'model.libmoe.safetensors'
    w = load_file(f)
    name = 'encoder.layer.0.intermediate.dense.experts.down_proj'
    for change, why in ((lambda n, t: None, 'missing_keys'), (lambda n, t: t[:-1].contiguous(), 'mismatched_keys')):
        new = {n: change(n, t) if n == name else t for n, t in w.items()}
        save_file({n: t for n, t in new.items() if t is not None}, f, metadata=dict(format='pt'))
        with pytest.raises(ValueError, match=f'{why}: {name}'): load_upcycled(tmp_path)
    encoder('bert').save_pretrained(tmp_path/'dense')
    with pytest.raises(ValueError, match='name must be of a model that upcycle made.*a bert'):
        load_upcycled(tmp_path/'dense')
    config = tmp_path/'config.json'
    said = json.loads(config.read_text())
    for architectures in None, [], ['NoSuchModel']:
        config.write_text(json.dumps(said | dict(architectures=architectures)))
        with pytest.raises(ValueError, match='whose configuration names a class of transformers'):
            load_upcycled(tmp_path)

def test_only_the_main_process_writes_the_configuration(tmp_path):
    moe = upcycle(encoder('bert'), 'smoe', 4, 2)
    moe.save_pretrained(tmp_path)
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    moe.save_pretrained(tmp_path, is_main_process=False)
    assert ((tmp_path/'config.json').stat().st_mtime_ns == files['config.json']
            and {p.name for p in tmp_path.iterdir()} == set(files))

@pytest.mark.parametrize('recipe, undo', [('tcmoe', dict(expert_bias=False)), ('tcmoe', dict(null_offset=0.)),
                                          ('moe_plus_plus', dict(expert_bias=False))])
def test_what_undoes_exact_is_refused(recipe, undo):
    with pytest.raises(ValueError, match=f'{next(iter(undo))} must be .* where exact=True'):
        upcycle(causal('llama'), recipe, 4, 2, exact=True, **undo)

# reading and swapping

def test_weights_say_what_modules_compute():
    for family in CAUSAL:
        for name, m in find_ffns(causal(family)).items(): assert isinstance(ffn_weights(m, name), FFNWeights)

def test_dropout_of_the_module_is_kept():
    moe = upcycle(causal('gpt2', resid_pdrop=.5), 'smoe', 4, 2, seed=0)
    mlp = moe.base.transformer.h[0].mlp
    assert type(mlp).__name__ == 'GPT2MLP' and isinstance(mlp.c_fc, MoELayer) and isinstance(mlp.c_proj, nn.Identity)
    x = torch.randn(2, 3, 32)
    assert (mlp.train()(x) == 0).float().mean() > .3 and not (mlp.eval()(x) == 0).any()

def test_partial_layers():
    dense = causal('llama', num_hidden_layers=5)
    for layers, where in {'every 2nd': [1, 3], 'last 2': [3, 4], (0, -1): [0, 4]}.items():
        moe = upcycle(dense, 'smoe', 4, 2, layers=layers if isinstance(layers, str) else list(layers))
        assert moe.config.layers == where and list(moe_layers(moe)) == [f'base.model.layers.{i}.mlp' for i in where]
        assert error(dense, moe, input_ids=IDS) < 2e-5
    moe = upcycle(dense, 'smoe', 4, 2, where='layers.[13]')
    assert moe.config.layers == [1, 3]

def test_inplace_uses_the_models_own_parts():
    dense = causal('llama')
    embed, logits = dense.model.embed_tokens.weight, dense(IDS).logits
    moe = upcycle(dense, 'smoe', 4, 2, inplace=True)
    assert moe.base is dense and moe.base.model.embed_tokens.weight is embed
    torch.testing.assert_close(moe(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    other = upcycle(causal('llama'), 'smoe', 4, 2)
    assert other.base.model.embed_tokens.weight is not embed

def test_copies_share_nothing():
    dense = causal('llama')
    moe = upcycle(dense, 'smoe', 4, 2)
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in moe.parameters()}

def test_tied_embeddings_stay_tied(tmp_path):
    moe = upcycle(causal('llama', tie_word_embeddings=True), 'smoe', 4, 2)
    assert moe.base.lm_head.weight is moe.base.model.embed_tokens.weight
    moe.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (back.base.lm_head.weight is back.base.model.embed_tokens.weight
            and same_logits(back(IDS).logits, moe(IDS).logits))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtypes(dtype, tmp_path):
    dense = causal('phi3').to(dtype)
    moe = upcycle(dense, 'sharede_v2', 4, 3, num_shared_experts=1)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    assert error(dense, moe, input_ids=IDS) < (5e-2 if dtype == torch.bfloat16 else 1e-12)
    if dtype == torch.bfloat16:
        moe.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype

def test_same_seed_same_bits_and_the_generator_is_left_alone():
    dense, state = causal('llama'), torch.random.get_rng_state()
    a, b, c = (upcycle(dense, 'xmoe', 4, 2, init='drop', seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)

def test_from_a_folder(tmp_path):
    dense = causal('gpt_neox')
    dense.save_pretrained(tmp_path)
    moe = upcycle(tmp_path, 'smoe', 4, 2, seed=0)
    assert error(dense, moe, input_ids=IDS) < 2e-5
    bert = encoder('bert')
    bert.save_pretrained(tmp_path/'bert')

def test_our_own_dense_model_and_shared_only(tmp_path):
    "SharedE-Upcyc: shared experts from a dense model of ours, the routed ones from nothing"
    dense = from_scratch('dense', 'tiny', seed=0).eval()
    ids = IDS % dense.config.vocab_size
    moe = upcycle(dense, 'sharede_v2', 8, 4, init='shared_only', num_shared_experts=1,
                  expert_init_std=(.02, 0.), seed=0)
    assert error(dense, moe, input_ids=ids) < 2e-5
    assert error(dense, upcycle(dense, 'smoe', 8, 4), input_ids=ids) < 2e-5
    assert 'model.layers.0.mlp' in find_ffns(dense.base)
    with pytest.raises(ValueError, match='a mixture of experts already: smoe'): upcycle(from_scratch('smoe', 'tiny'))
    half = upcycle(dense, layers=[0], seed=0)
    assert ([s.recipe for s in half.config.specs.values()] == ['smoe', 'dense']
            and error(dense, half, input_ids=ids) < 2e-5)
    half.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert same_weights(back, half) and same_logits(back(ids).logits, half(ids).logits)

def test_other_mixtures_are_refused():
    sizes = {k: v for k, v in SMALL.items() if k != 'pad_token_id'}
    for family, kw in dict(mixtral=dict(num_local_experts=2),
                           qwen2_moe=dict(num_experts=2, num_experts_per_tok=1,
                                          moe_intermediate_size=16, shared_expert_intermediate_size=16),
                           olmoe=dict(num_experts=2, num_experts_per_tok=1)).items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | kw))
        with pytest.raises(ValueError, match='a mixture of experts already'): upcycle(model)

def test_unlike_sizes(tmp_path):
    "Each layer has a spec of its own width, and all of it is saved"
    dense = causal('llama')
    dense.model.layers[1].mlp = rough(type(dense.model.layers[1].mlp)(LlamaConfig(**SMALL
                                                                                  | dict(intermediate_size=24))))
    moe = upcycle(dense, seed=0)
    assert {s.moe_intermediate_size for s in moe.config.specs.values()} == {48, 24} and not moe_layers(dense)
    assert error(dense, moe, input_ids=IDS) < 2e-5
    moe.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert same_weights(back, moe) and same_logits(back(IDS).logits, moe(IDS).logits)

class Odd(nn.Module):
    def __init__(self, d=32, h=48):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)
    def forward(self, x): return self.c(torch.tanh(self.a(x)) * self.b(x))

def test_unknown_ffns_are_named_and_can_be_registered():
    dense = causal('llama')
    for l in dense.model.layers: l.mlp = Odd()
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp \(Odd\) is an FFN of no known family; it holds a "
                       r"\(Linear\), b \(Linear\), c \(Linear\).*register_ffn"):
        upcycle(dense)
    try:
        register_ffn('odd', up='b', gate='a', down='c', act=torch.tanh)
        moe = upcycle(dense, 'smoe', 4, 2)
        assert error(dense, moe, input_ids=IDS) < 2e-5 and moe.config.spec.hidden_act == 'tanh'
        register_ffn('odd', up='a', gate='b', down='c', act=torch.tanh)
        with pytest.raises(ValueError, match="layer model.layers.0.mlp .Odd. has the parts of family 'odd', but "
                           "computes something else"):
            upcycle(dense)
    finally: ffn_families.pop('odd', None)

# initialisations

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'opt'])
@pytest.mark.parametrize('recipe', EXACT)
def test_virtual_groups_are_exact(family, recipe):
    dense = causal(family)
    moe = upcycle(dense, recipe, 12, 6, init='virtual_group', moe_intermediate_size=16, num_shared_experts=3,
                  router_init_std=.5, seed=0)
    assert error(dense, moe, input_ids=IDS) < 2e-5
    assert moe.config.spec.moe_intermediate_size == 16

@pytest.mark.parametrize('family', ['llama', 'gpt2'])
@pytest.mark.parametrize('recipe', list(recipes))
def test_split_with_all_experts_and_even_weights_is_exact(family, recipe):
    dense = causal(family)
    moe = upcycle(dense, recipe, 6, 6, init='split', router_init_std=0., exact=True, seed=0)
    assert error(dense, moe, input_ids=IDS) < 2e-5
    total, extra = (sum(p.numel() for p in moe.parameters()),
                    sum(p.numel() for l in moe_layers(moe).values() for m in (l.router, l.zero_experts) if m is not None
                        for p in m.parameters()))
    biases = sum(l.experts.down_proj_bias.numel() + (32 if l.shared_experts is not None else 0) - 32
                 for l in moe_layers(moe).values() if isinstance(l.experts, Experts) and l.experts.bias)
    assert total - extra - biases == sum(p.numel() for p in dense.parameters())  # no weight is there twice

def test_split_scale_is_right_on_average():
    "Over random choices of K of N pieces the output is the dense FFN's in the mean"
    dense = causal('llama')
    layer, f = (upcycle(dense, 'smoe', 6, 3, init='split', router_init_std=0.).base.model.layers[0].mlp,
                dense.model.layers[0].mlp)
    x, g = torch.randn(1, 32).expand(20000, 32), torch.Generator().manual_seed(0)
    index = torch.rand(20000, 6, generator=g).argsort(-1)[:, :3]
    mean = layer.experts(x, index, torch.full((20000, 3), 1/3)).mean(0)
    assert (mean - f(x[0])).abs().max() < .1 * f(x[0]).abs().max()

def test_noise_is_as_large_as_asked():
    dense = causal('llama')
    w = dense.model.layers[0].mlp.up_proj.weight
    e = upcycle(dense, 'smoe', 4, 2, noise=.1, seed=0).base.model.layers[0].mlp.experts.gate_up_proj[:, 48:]
    for i in range(4): assert .08 < ((e[i] - w).std() / w.std()) < .12
    assert not torch.equal(e[0], e[1])
    errors = [error(dense, upcycle(dense, 'smoe', 4, 2, noise=n, seed=0), input_ids=IDS) for n in (0., .001, .01)]
    assert errors[0] < 2e-5 < errors[1] < errors[2]

@pytest.mark.parametrize('ratio', [0., .25, .5, 1.])
def test_drop_redraws_its_share(ratio):
    dense = causal('llama')
    mlp = dense.model.layers[0].mlp
    moe = upcycle(dense, 'smoe', 3, 2, init='drop', drop_ratio=ratio, seed=0)
    e, kept = moe.base.model.layers[0].mlp.experts, round(48 * (1 - ratio))
    for i in range(3):
        same = [(e.gate_up_proj[i, :48] == mlp.gate_proj.weight).all(1),
                (e.gate_up_proj[i, 48:] == mlp.up_proj.weight).all(1), (e.down_proj[i] == mlp.down_proj.weight).all(0)]
        assert all(torch.equal(same[0], s) for s in same) and same[0].sum() == kept  # whole neurons
    if ratio == 0: assert error(dense, moe, input_ids=IDS) < 2e-5
    if ratio == 1: assert abs(e.down_proj.std() / mlp.down_proj.weight.std() - 1) < .1

def test_shared_only_and_random():
    dense = causal('gpt2')
    moe = upcycle(dense, 'sharede_v3', 6, 4, init='shared_only', num_shared_experts=2, shared_weight=.5,
                  expert_init_std=(.02, 0.), seed=0)
    assert error(dense, moe, input_ids=IDS) < 2e-5
    layer = upcycle(dense, 'smoe', 6, 4, init='random', expert_init_std=(.5, .1), seed=0).base.transformer.h[0].mlp.c_fc
    assert (abs(layer.experts.up_proj.std() - .5) < .02 and abs(layer.experts.down_proj.std() - .1) < .01
            and not layer.experts.up_proj_bias.any())

@pytest.mark.parametrize('options',
                         [dict(routed_scaling_factor=2.5), dict(n_group=2, topk_group=1), dict(expert_bias=True)])
def test_router_options_are_scaled_out(options):
    dense = causal('llama')
    for recipe in ('smoe', 'sharede_v3'):
        assert error(dense, upcycle(dense, recipe, 9 if recipe == 'sharede_v3' else 8, 3, num_shared_experts=1,
                                    router_init_std=.5, **options), input_ids=IDS) < 2e-5

def test_every_recipe_trains_from_copies():
    dense = causal('llama')
    for recipe in recipes:
        moe = upcycle(dense, recipe, 6, 3, seed=0).train()
        moe(IDS, labels=IDS).loss.backward()
        for l in moe_layers(moe).values():
            assert next(l.router.parameters()).grad.abs().sum() > 0 and l.experts.down_proj.grad.abs().sum() > 0
