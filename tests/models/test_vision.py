"Vision-language models: the traps of towers, scales and losses, every recipe in every part, and the usual tools."
import copy
import pytest, torch, torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig,
                          LlavaConfig,
                          LlavaForConditionalGeneration, PreTrainedTokenizerFast,
                          SiglipVisionConfig, Trainer,
                          TrainingArguments)
from likeness import same_logits
from libmoe_nb.analysis.tracing import record_routing
from libmoe_nb.data.templates import plain_template
from libmoe_nb.models.cards import model_card
from libmoe_nb.models.loading import load_model
from libmoe_nb.models.lora import add_lora
from libmoe_nb.models.scales import (ScaledLlavaConfig, ScaledLlavaForConditionalGeneration, crops, pixel_side)
from libmoe_nb.models.swapping import own_layers
from libmoe_nb.models.towers import image_places, model_parts, trim_tower, unread_modules
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.models.vision import *
from libmoe_nb.models.wrapping import UpcycledMixin, load_upcycled
from dataclasses import replace
from hub_made import hub_in_place
from processes import run_forked

SPARSE = [r for r in ('smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3', 'tcmoe', 'moe_plus_plus')]
PARTS = 'tower', 'projector', 'language_model'

def words(*more):
    names = ['<pad>', '<s>', '</s>', '<unk>', '<image>', *more, *'abcdefghij']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(['<pad>', '<s>', '</s>', '<image>'])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', bos_token='<s>', eos_token='</s>',
                                   unk_token='<unk>', chat_template=plain_template)

TOK, SIZE = words(), vision_sizes['tiny-vlm']
TWO = replace(SIZE, image_scales=(1, 3), image_size=16, patch_size=4)

def rough(model, std=.15):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * std + (p.dim() < 2))
    return model.eval()

@pytest.fixture(scope='module')
def dense(): return rough(llava_from_scratch(SIZE, TOK, seed=0))
@pytest.fixture(scope='module', params=['enlarged', 'original'])
def scaled(request): return rough(llava_from_scratch(replace(TWO, scale_source=request.param), TOK, seed=0))

def batch(model, images=(1, 1), tail=4, seed=1):
    "A row for each entry of `images`, with so many images, padded on the right"
    g, n, side = torch.Generator().manual_seed(seed), image_places(model), pixel_side(model)
    rows = [torch.cat([torch.full((k * n,), 4), torch.randint(5, 15, (tail,), generator=g)]) for k in images]
    S = max(map(len, rows))
    ids = torch.stack([F.pad(r, (0, S - len(r))) for r in rows])
    mask = torch.stack([F.pad(torch.ones_like(r), (0, S - len(r))) for r in rows])
    labels = ids.where((ids > 4) & (mask > 0), -100)
    pixels = dict(pixel_values=torch.randn(sum(images), 3, side, side, generator=g)) if sum(images) else {}
    return dict(input_ids=ids, attention_mask=mask, labels=labels) | pixels

@torch.no_grad()
def logits(model, b): return model.eval()(**{k: v for k, v in b.items() if k != 'labels'}).logits
def error(a, b, x): return ((logits(a, x) - logits(b, x)).abs().max() / logits(a, x).abs().max()).item()
def idle(model, b):
    model.zero_grad(); model.train()
    out = model(**b)
    (out.loss - (getattr(out, 'aux_loss', None) if getattr(out, 'aux_loss', None) is not None else 0)).backward()
    model.eval()
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]

# towers

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16,
             patch_size=4)
def plain_llava(vision=SiglipVisionConfig, layer=-2, strategy='full'):
    text = LlamaConfig(vocab_size=20, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return rough(LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision(**SMALL), text_config=text, image_token_index=4, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy)))

@pytest.mark.parametrize('vision, strategy', [(SiglipVisionConfig, 'full'), (CLIPVisionConfig, 'default'),
                                              (CLIPVisionConfig, 'full')])
@pytest.mark.parametrize('layer', [-1, -2, -3, 2])
def test_trap_unused_last_layer(vision, strategy, layer, tmp_path):
    "Trimmed: all that is trainable has a gradient, features are those of before, plain LLaVA loads it"
    model = plain_llava(vision, layer, strategy)
    b = batch(model)
    before, lost = logits(model, b), idle(model, b)
    assert ({n.split('.')[2] for n in lost} <= {'encoder', 'head', 'post_layernorm'}
            and any('post_layernorm' in n for n in lost))
    trim_tower(model)
    assert (torch.equal(logits(model, b), before)
            and image_places(model) == (16 + (vision is CLIPVisionConfig and strategy == 'full')))
    still = idle(model, b)
    # a class token that is cut off still reaches the others, but the last layer's queries of it do not matter
    assert still == [] and len(model.model.vision_tower.encoder.layers) == (layer if layer > 0 else 4 + layer)
    model.save_pretrained(tmp_path)
    back, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert (not any(info.values()) and type(back) is LlavaForConditionalGeneration
            and same_logits(logits(back, b), before))
    n = sum(p.numel() for p in model.parameters())
    assert (sum(p.numel() for p in back.parameters()) == n + 32
            and sum(p.numel() for p in trim_tower(back).parameters()) == n)

def test_trap_siglip_has_no_class_token():
    with pytest.raises(ValueError,
                       match="vision_feature_select_strategy must be 'full' for a tower without a class token"):
        image_places(plain_llava(strategy='default'))
    for name in ('tiny-vlm', 'mini-vlm'):
        model = llava_from_scratch(name, TOK, seed=0)
        side = pixel_side(model)
        features = model.get_image_features(torch.zeros(2, 3, side, side), return_dict=True).pooler_output
        assert [len(f) for f in features] == [image_places(model)] * 2 == [vision_sizes[name].image_tokens] * 2
        assert model.config.image_seq_length == image_places(model)

def test_trap_the_placeholder_is_a_token_of_its_own():
    "Phi-3.5's end and padding is 32000, transformers' default image id"
    tok = words(*[f'w{i}' for i in range(40)])
    text = dict(model_type='phi3', vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=2, pad_token_id=2, eos_token_id=2, bos_token_id=1)
    model = llava_from_scratch(replace(SIZE, text=text), tok, seed=0)
    i = model.config.image_token_id
    assert tok.decode([i]) == '<image>' and i not in (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == len(tok) > i
    assert model.generation_config.eos_token_id == tok.eos_token_id != i
    bare = words(); bare.add_special_tokens(dict(eos_token='<image>'))
    with pytest.raises(ValueError, match='tokenizer must have a token <image> of its own'):
        llava_from_scratch(SIZE, bare)
    with pytest.raises(ValueError, match='tokenizer must be given for .tiny-vlm'): llava_from_scratch('tiny-vlm')
    with pytest.raises(ValueError, match="unknown size 'tiny': did you mean 'tiny-vlm'"):
        llava_from_scratch('tiny', TOK)
    big = replace(SIZE, text=SIZE.text | dict(vocab_size=100))
    assert llava_from_scratch(big, TOK).config.text_config.vocab_size == 100

def test_unread_parts_are_not_upcycled():
    model = plain_llava()
    assert unread_modules(model) == ['model.vision_tower.encoder.layers.2', 'model.vision_tower.head']
    with pytest.warns(UserWarning, match=r'layers.2.mlp lie behind the features .* trim_tower'):
        moe = upcycle(model, 'smoe', 4, 2, where='vision_tower')
    assert len(own_layers(moe)) == 3
    with pytest.raises(ValueError, match="where must be of parts that are read"): upcycle(model, where='head')
    with pytest.raises(ValueError, match='model must be a vision-language model'): model_parts(model.model.vision_tower)

# recipes and parts

@pytest.mark.parametrize('recipe', ['dense', *SPARSE])
def test_trap_equal_start_in_all_parts(dense, recipe, tmp_path):
    exact = dict(exact=True) if recipe in ('tcmoe', 'moe_plus_plus') else {}
    moe, b = upcycle_parts(dense, recipe, PARTS, seed=0, router_init_std=.5, **exact), batch(dense)
    assert error(dense, moe, b) < 2e-5 and isinstance(moe, LlavaForConditionalGeneration)
    if recipe == 'dense': return
    assert [n.split('.')[1]
            for n in own_layers(moe)] == ['vision_tower'] * 2 + ['multi_modal_projector'] + ['language_model'] * 2
    assert not any('post_layernorm' in n for n, _ in moe.named_parameters())
    moe.save_pretrained(tmp_path, max_shard_size='60KB')
    back = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert same_logits(logits(back, b), logits(moe, b)) and back.config.specs == moe.config.specs
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in moe.named_parameters()]

@pytest.mark.parametrize('recipe', SPARSE)
def test_experts_and_routers_learn_from_the_language_loss(dense, recipe):
    "Copies that differ, so that routers have a say"
    moe = upcycle_parts(dense, recipe, PARTS, seed=0, noise=.3, router_init_std=.3)
    lost = idle(moe, batch(moe, (1,) * 6, tail=8, seed=3))
    assert lost == []

def test_shared_experts_are_copies_at_half_weight(dense):
    "The paper's SharedE: N 6, K 3, N_s 1, ½ shared and ½ routed, and no matrix is scaled"
    for recipe in ('sharede_v2', 'sharede_v3'):
        layer = upcycle_parts(dense, recipe, seed=0).model.vision_tower.encoder.layers[0].mlp
        fc = dense.model.vision_tower.encoder.layers[0].mlp
        assert layer.shared_weight == .5 and layer.router.num_experts == 5 and layer.router.top_k == 2
        assert torch.equal(layer.shared_experts.down_proj.weight, fc.fc2.weight)
        assert all(torch.equal(w, fc.fc2.weight) for w in layer.experts.down_proj)

def test_places_by_name(dense):
    parts = lambda m: sorted({n.split('.')[1] for n in own_layers(m)})
    assert parts(upcycle_parts(dense, where='tower')) == ['vision_tower']
    assert parts(upcycle_parts(dense, where='CuMo', num_experts=4, top_k=2)) == ['multi_modal_projector',
                                                                                 'vision_tower']
    moe_llava = upcycle_parts(dense, where='MoE-LLaVA', num_experts=4, top_k=2)
    assert list(own_layers(moe_llava)) == ['model.language_model.layers.1.mlp']
    with pytest.raises(ValueError, match="unknown part 'vision': .*tower"): upcycle_parts(dense, where='vision')
    with pytest.raises(ValueError, match='where must be of tower, projector'): upcycle_parts(dense, where=())

def test_recipes_mixed_by_part(dense, tmp_path):
    "Three calls, three recipes: saved, loaded, upcycled no second time"
    moe = dense
    for part, recipe in zip(PARTS, ('moe_plus_plus', 'sharede_v3', 'xmoe')):
        moe = upcycle_parts(moe, recipe, part, seed=0, **dict(exact=True) if part == 'tower' else {})
    b = batch(dense)
    assert error(dense, moe, b) < 2e-5
    moe.save_pretrained(tmp_path)
    back, _, _ = load_model(tmp_path, tokenizer=False)
    assert same_logits(logits(back, b), logits(moe, b)) and back.config.specs == moe.config.specs
    with pytest.raises(ValueError, match='a mixture of experts already: xmoe'):
        upcycle_parts(back, where='language_model')

# losses

def recorded(model, b, **kw):
    with record_routing(model) as records: out = model(**b, output_router_logits=True, **kw)
    return out, records

def balance(r, groups):
    "N times the sum of f P, by hand: `groups` is a list of lists of rows of tokens"
    total = 0
    for rows in groups:
        f = torch.bincount(r.top_k_index[rows].flatten(), minlength=r.num_choices) / r.top_k_index[rows].numel()
        total += r.num_choices * (f * r.scores[rows].mean(0)).sum()
    return total / len(groups)

@pytest.mark.parametrize('group', ['sequence', 'micro_batch'])
def test_trap_balance_groups_of_crop_image_and_batch(scaled, group):
    moe = upcycle_parts(scaled, 'smoe', seed=0, router_init_std=.5, aux_loss_group=group, aux_loss_reduction='parts')
    out, records = recorded(moe, batch(moe, (1, 2)))
    P, B, of = image_places(moe), 3, {'vision_tower': [], 'multi_modal_projector': []}
    for name, rs in records.items():
        part = name.split('.')[1]
        assert [r.num_tokens for r in rs] == ([B * P, 9 * B * P] if part == 'vision_tower' else [B * P])
        for r in rs:        # a crop in the encoder (scale 1: the image), an image in the projector, or the batch
            rows = torch.arange(r.num_tokens).split(P) if group == 'sequence' else [torch.arange(r.num_tokens)]
            of[part].append(balance(r, list(rows)))
    # mean over scales of the mean over layers, and the projector's one router beside them
    by_scale = [sum(of['vision_tower'][s::2]) / 2 for s in (0, 1)]
    want = .01 * (sum(by_scale) / 2 + of['multi_modal_projector'][0])
    torch.testing.assert_close(out.aux_loss, want)
    # the mean over all routers is another number
    assert (want - .01 * sum(sum(v) for v in of.values()) / 5).abs() > 1e-4

def test_composition_of_losses(dense):
    with pytest.raises(ValueError, match="aux_loss_reduction must be 'mean', 'sum' or 'parts', got 'part'"):
        upcycle_parts(dense, aux_loss_reduction='part')
    b, got = batch(dense), {}
    for how in ('mean', 'sum', 'parts'):
        moe = upcycle_parts(dense, 'smoe', PARTS, seed=0, router_init_std=.5, aux_loss_reduction=how,
                            router_z_loss_coef=.001)
        out, records = recorded(moe, b)
        each = {n: sum(w * f(r, None if 'language' not in n else b['attention_mask'].bool())
                       for w, f in l.losses.values())
                for n, l in own_layers(moe).items() for r in records[n]}
        got[how] = out.aux_loss
        part = lambda p: [v for n, v in each.items() if p in n]
        want = dict(sum=sum(each.values()), mean=sum(each.values()) / 5,
                    parts=sum(sum(part(p)) / len(part(p)) for p in ('tower', 'projector', 'language')))[how]
        torch.testing.assert_close(out.aux_loss, want)
        torch.testing.assert_close(out.loss, dense(**b).loss + out.aux_loss, atol=1e-5, rtol=1e-5)
    assert len({round(v.item(), 6) for v in got.values()}) == 3

@pytest.mark.parametrize('recipe', SPARSE)
def test_trap_text_only_samples_touch_no_image_statistic(dense, recipe):
    moe = upcycle_parts(dense, recipe, PARTS, seed=0, router_init_std=.5)
    mixed, pictured = batch(moe, (1, 0, 2, 0)), batch(moe, (1, 2))
    pictured['pixel_values'] = mixed['pixel_values']
    with record_routing(moe) as a: moe(**mixed)
    with record_routing(moe) as b: moe(**pictured)
    for n in own_layers(moe):
        if 'language' in n: continue
        assert a[n][0].num_tokens == 3 * image_places(moe) and torch.equal(a[n][0].router_logits, b[n][0].router_logits)
    text = batch(moe, (0, 0))
    out, records = recorded(moe, text)
    assert 'pixel_values' not in text and not any(records.get(n) for n in own_layers(moe) if 'language' not in n)
    only = upcycle_parts(dense, recipe, seed=0)
    assert recorded(only, text)[0].aux_loss == 0

def test_parts_of_a_step_add_up_by_images(dense, scaled):
    "Micro-batches with other numbers of images, with the shares that a learner knows"
    for model in dense, scaled:
        moe = upcycle_parts(model, 'smoe', seed=0, router_init_std=.5, aux_loss_reduction='parts',
                            router_z_loss_coef=.01)
        rows, all_pixels = [(2,), (0, 1)], torch.randn(3, 3, pixel_side(moe), pixel_side(moe),
                                                       generator=torch.Generator().manual_seed(0))
        total, k = 0, 0
        for images in rows:
            b = batch(moe, images); b['pixel_values'] = all_pixels[k:k + sum(images)]; k += sum(images)
            shares = torch.full((2, len(images)), 1 / 3)
            total += recorded(moe, b, aux_shares=shares,
                              aux_image_shares=torch.full((2, sum(images)), 1 / 3))[0].aux_loss
        b = batch(moe, (2, 0, 1)); b['pixel_values'] = all_pixels
        torch.testing.assert_close(total, recorded(moe, b)[0].aux_loss)

# two scales

def test_scales_by_hand(scaled):
    "Enlarge, cut in the order of reading, put together, average, side by side: with loops"
    c, B = scaled.config, 2
    x = torch.randn(B, 3, pixel_side(scaled), pixel_side(scaled), generator=torch.Generator().manual_seed(5))
    small = x if c.scale_source == 'enlarged' else F.interpolate(x, size=(16, 16), mode='bicubic', antialias=True)
    large = x if c.scale_source == 'original' else F.interpolate(x, size=(48, 48), mode='bicubic')
    tower = scaled.model.vision_tower
    last = lambda y: tower(y, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        got = scaled.get_image_features(x, return_dict=True).pooler_output
        whole = torch.zeros(B, 12, 12, 24)
        for b in range(B):
            for i in range(3):
                for j in range(3):
                    crop = large[b:b+1, :, 16*i:16*i+16, 16*j:16*j+16]
                    whole[b, 4*i:4*i+4, 4*j:4*j+4] = last(crop).view(4, 4, 24)
        mean = torch.stack([whole[:, 3*i:3*i+3, 3*j:3*j+3].mean((1, 2)) for i in range(4) for j in range(4)], 1)
        want = scaled.model.multi_modal_projector(torch.cat([last(small), mean], -1))
    torch.testing.assert_close(torch.stack(got), want, atol=1e-4, rtol=1e-4)
    outer = crops(torch.arange(B).float().view(B, 1, 1, 1).expand(B, 1, 6, 6), 3)[:, 0, 0, 0]
    assert outer.tolist() == [0., 1.] * 9

def test_trap_a_detail_of_one_pixel_is_seen_by_the_true_form_only(scaled):
    "A few grey levels in one pixel of a large picture are lost in eight bits at the small size"
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    big = rng.integers(60, 200, (48, 48, 3), dtype=np.uint8)
    other = big.copy(); other[21, 21] += 4
    side = pixel_side(scaled)
    def features(a):
        im = Image.fromarray(a).resize((side, side), Image.BICUBIC)
        x = torch.from_numpy(np.asarray(im).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad(): return torch.stack(scaled.get_image_features(x, return_dict=True).pooler_output)
    assert torch.equal(features(big), features(other)) is (scaled.config.scale_source == 'enlarged')

def test_scales_of_nonsense():
    for kw, why in ((dict(image_scales=(3, 1)), 'image_scales must be whole numbers that begin with 1'),
                    (dict(image_scales=(1, 3), scale_source='big'),
                     "scale_source must be 'enlarged' or 'original', got 'big'")):
        with pytest.raises(ValueError, match=why): replace(SIZE, **kw)
    model = llava_from_scratch(replace(TWO, scale_source='original'), TOK, seed=0)
    with pytest.raises(ValueError,
                       match=r'pixel_values must be of shape \[images, channels, 48, 48\], got \(1, 3, 16, 16\)'):
        model.get_image_features(torch.zeros(1, 3, 16, 16))
    clip = dict(SIZE.tower, model_type='clip_vision_model')
    model = llava_from_scratch(replace(TWO, tower=clip), TOK, seed=0)
    assert logits(model, batch(model)).shape[0] == 2 and idle(model, batch(model)) == []

@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
def test_two_scales_are_a_class_of_its_own(scaled, recipe, tmp_path):
    scaled.save_pretrained(tmp_path/'dense')
    b = batch(scaled, (1, 2))
    back = AutoModelForImageTextToText.from_pretrained(tmp_path/'dense')
    assert type(back) is ScaledLlavaForConditionalGeneration and back.config.model_type == 'llava_scales'
    assert (same_logits(logits(back, b), logits(scaled, b))
            and type(AutoConfig.from_pretrained(tmp_path/'dense')) is ScaledLlavaConfig)
    moe = upcycle_parts(scaled, recipe, PARTS, seed=0, exact=True)
    assert isinstance(moe, UpcycledMixin) and moe.config.model_type == 'libmoe_llava_scales'
    assert error(scaled, moe, b) < 5e-5
    moe.save_pretrained(tmp_path/'moe', max_shard_size='60KB')
    for load in (load_upcycled, AutoModelForImageTextToText.from_pretrained,
                 lambda f: load_model(f, tokenizer=False)[0]):
        again = load(tmp_path/'moe')
        assert type(again) is type(moe) and same_logits(logits(again, b), logits(moe, b))
    assert again.config.scale_source == scaled.config.scale_source and list(again.config.image_scales) == [1, 3]

FRESH = '''
import sys, torch, transformers, libmoe_nb.models.wrapping
for folder in sys.argv[1:]:
    want = torch.load(folder + '/want.pt')
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad(): got = model(**want['inputs']).logits
    print(type(model).__name__, torch.allclose(got, want['logits'], rtol=1e-5, atol=1e-5))
'''
def test_a_fresh_process_gives_the_same_answers(scaled, tmp_path):
    if scaled.config.scale_source == 'original': pytest.skip('one is enough')
    for name, model in ('moe', upcycle_parts(scaled, 'xmoe', PARTS, seed=0)), ('dense', scaled):
        model.save_pretrained(tmp_path/name)
        b = {k: v for k, v in batch(model).items() if k != 'labels'}
        torch.save(dict(inputs=b, logits=logits(model, b)), tmp_path/name/'want.pt')
    p = run_forked(FRESH, tmp_path/'moe', tmp_path/'dense')
    assert p.stdout.split() == ['MoEScaledLlavaForConditionalGeneration', 'True',
                                'ScaledLlavaForConditionalGeneration', 'True'], p.stderr[-1500:]

# transformers' own tools

def rows_of(model, n=6):
    b = batch(model, (1,) * n, seed=7)
    return [{k: v[i] for k, v in b.items()} for i in range(n)]

def trained(model, folder, steps, resume=None, **kw):
    args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, seed=0,
                             save_steps=2, learning_rate=1e-2, lr_scheduler_type='constant', disable_tqdm=True, **kw)
    Trainer(model, args, train_dataset=rows_of(model)).train(resume_from_checkpoint=resume)
    return model

@pytest.mark.long
@pytest.mark.parametrize('kind', ['two scales', 'tower alone'])
def test_a_trainer_resumes_an_upcycled_model(dense, kind, tmp_path):
    "Weights come back by the names that they have in memory; without them a run would go on from the start, silently"
    model = rough(llava_from_scratch(TWO, TOK, seed=0)) if kind == 'two scales' else dense
    where = 'tower' if kind == 'tower alone' else PARTS
    make = lambda: upcycle_parts(model, 'smoe', where, seed=0, noise=.1)
    straight = trained(make(), tmp_path/'a', 4).state_dict()
    trained(make(), tmp_path/'b', 2)
    checkpoint = tmp_path/'b'/'checkpoint-2'
    resumed = trained(make(), tmp_path/'b', 4, str(checkpoint)).state_dict()
    assert all(torch.equal(t, resumed[n]) for n, t in straight.items())
    assert (checkpoint/'model.safetensors').samefile(checkpoint/'model.libmoe.safetensors')
    assert not torch.equal(load_upcycled(checkpoint).state_dict()[next(reversed(straight))],
                           straight[next(reversed(straight))])
    layer = next(n for n in straight if n.endswith('router.weight'))
    assert not torch.equal(straight[layer], make().state_dict()[layer])

@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'tcmoe', 'moe_plus_plus'])
def test_generate_with_cache_equals_no_cache(dense, recipe):
    moe = upcycle_parts(dense, recipe, PARTS, seed=0, noise=.1, router_init_std=.5)
    b = {k: v[:, :image_places(moe) + 2] if v.dim() == 2 else v for k, v in batch(moe).items() if k != 'labels'}
    out = [moe.generate(**b, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=c) for c in (True, False)]
    assert torch.equal(*out) and out[0].shape[1] == b['input_ids'].shape[1] + 6

@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
@pytest.mark.parametrize('trains', ['projector', 'all'])
def test_trap_gradient_checkpointing_with_frozen_parts(dense, recipe, trains):
    "The same gradients with and without, and the same routing when a layer is run again"
    moe = upcycle_parts(dense, recipe, PARTS, seed=0, noise=.1, router_init_std=.5).train()
    for part, m in model_parts(moe).items(): m.requires_grad_(trains in (part, 'all'))
    b, seen = batch(moe, (1, 2)), []
    for again in (False, True):
        if again: moe.activation_checkpointing_enable(dict(use_reentrant=False))
        moe.zero_grad()
        records, hooks = {}, []
        for n, l in own_layers(moe).items():
            hooks.append(l.router.register_forward_hook(lambda m, args, r, n=n: records.setdefault(n, []).append(r)))
        moe(**b).loss.backward()
        for h in hooks: h.remove()
        seen.append(({n: p.grad for n, p in moe.named_parameters() if p.grad is not None}, records))
    (plain, before), (checked, after) = seen
    assert plain.keys() == checked.keys() and all(('projector' in n) or trains == 'all' for n in plain)
    for n in plain: torch.testing.assert_close(checked[n], plain[n], atol=1e-6, rtol=1e-4)
    twice = [n for n in after if len(after[n]) == 2]
    assert any('language' in n for n in twice) and (trains == 'projector' or any('tower' in n for n in twice))
    for n in before:
        for r in after[n]:
            assert (torch.equal(r.top_k_index, before[n][0].top_k_index)
                    and torch.equal(r.router_logits, before[n][0].router_logits))

@pytest.mark.parametrize('recipe', ['smoe', 'sharede_v2'])
def test_adapters(scaled, recipe, tmp_path):
    peft = pytest.importorskip('peft', reason='pip install peft')
    if scaled.config.scale_source == 'original' and recipe == 'smoe': pytest.skip('once for each recipe and form')
    base = upcycle_parts(scaled, recipe, PARTS, seed=0)
    b, model = batch(base), add_lora(copy.deepcopy(base), ('attention', 'experts', 'routers'), r=2)
    assert torch.equal(logits(model, b), logits(base, b))
    assert {'tower', 'projector', 'language_model'} == set(model_parts(model))
    for n in own_layers(base):
        assert any(n in p and 'lora' in p for p, t in model.named_parameters() if t.requires_grad), n
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.03)
    for _ in range(2): model.train()(**b).loss.backward(); opt.step(); opt.zero_grad()
    after = logits(model, b)
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert same_logits(logits(back, b), after) and not torch.allclose(after, logits(base, b), atol=1e-3)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged, b), after, atol=1e-3, rtol=1e-3)

def test_pushed_as_it_is_saved(scaled, monkeypatch):
    hub, moe = hub_in_place(monkeypatch), upcycle_parts(scaled, seed=0)
    moe.push_to_hub('llava')
    assert hub.calls[-1][:2] == ('upload', 'me/llava') and {'config.json', 'model.libmoe.safetensors'} <= {*hub.files}
    assert b'libmoe ask picture.png' in hub.files['README.md']

def test_a_card_tells_the_recipe_and_the_size_of_each_part(dense):
    moe = upcycle_parts(upcycle_parts(dense, 'smoe', 'tower', seed=0), 'sharede_v3', 'projector', 4, 2, seed=0)
    card, counts = str(model_card(moe, 'me/llava')), count_parts(moe)
    for row in ('| model.vision_tower.encoder.layers | 2 | `smoe` | 6 | 3 | 0 |',
                '| model.multi_modal_projector | 1 | `sharede_v3` | 4 | 2 | 1 |',
                "load_vision_language('me/llava')", "pipeline_tag: image-text-to-text"): assert row in card
    number = lambda n: f'{n:,}' if n > 9999 else str(n)
    for block, part in ('model.vision_tower', 'tower'), ('model.multi_modal_projector', 'projector'), ('all', 'all'):
        assert f"| {block} | {number(counts[part]['total'])} | {number(counts[part]['active'])} |" in card

# the paper's size

def test_paper_counts():
    with torch.device('meta'): model = llava_from_scratch('paper-vlm')
    count = lambda m: {n: sum(p.numel() for p in part.parameters()) for n, part in model_parts(m).items()}
    assert count(model) == dict(tower=412_440_048, projector=16_521_216, language_model=3_821_079_552)
    smoe = upcycle_parts(model, 'smoe')
    assert count(smoe) == dict(tower=1_752_079_392, projector=99_141_120, language_model=3_821_079_552)
    assert sum(p.numel() for p in smoe.parameters()) == 5_672_300_064
    assert {n: c['active'] for n, c in count_parts(smoe).items()} == dict(
        tower=948_407_760, projector=49_577_472, language_model=3_821_079_552, all=4_819_064_784)
