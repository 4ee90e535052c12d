"Traces of images: every token at its place, by a second way; text counts in no image; two scales; metrics."
import numpy as np, pytest, torch
from dataclasses import replace
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          PreTrainedTokenizerFast, SiglipVisionConfig)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from libmoe_nb.analysis import metrics, model_metrics
from libmoe_nb.analysis.interventions import drop_top1, random_routing, temperature
from libmoe_nb.analysis.patches import *
from libmoe_nb.analysis.traces import make_trace, read_trace
from libmoe_nb.analysis.tracing import intervene, moe_layers, record_routing
from libmoe_nb.core.modes import seeded
from libmoe_nb.data.conversations import ConversationData, Sample, read_conversations
from libmoe_nb.data.templates import plain_template
from libmoe_nb.data.scenes import Scene, scene_words, write_scenes
from libmoe_nb.models.upcycling import upcycle

WHOLE = ['vision_tower', 'multi_modal_projector', 'language_model']


def word_tokenizer():
    names = ['<pad>', '<s>', '</s>', '<unk>', '<image>', 'USER:', 'ASSISTANT:', *scene_words()]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(['<pad>', '<s>', '</s>', '<image>'])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', bos_token='<s>', eos_token='</s>',
                                   unk_token='<unk>', chat_template=plain_template)

TOK = word_tokenizer()
def pixels(im): return torch.from_numpy(np.asarray(im.resize((32, 32))).copy()).permute(2, 0, 1).float() / 127.5 - 1

def dense(vision=SiglipVisionConfig, head=False, strategy='full', seed=0):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    more = dict(vision_use_head=head) if vision is SiglipVisionConfig else {}
    with seeded(seed):
        return LlavaForConditionalGeneration(LlavaConfig(
            vision_config=vision(**sizes, image_size=32, patch_size=8, **more),
            text_config=LlamaConfig(**sizes, vocab_size=len(TOK), pad_token_id=0), vision_feature_layer=-1,
            image_token_index=TOK.convert_tokens_to_ids('<image>'), vision_feature_select_strategy=strategy)).eval()

def moe(where=WHOLE, recipe='smoe', N=5, K=2, **kw):
    return upcycle(dense(**kw), recipe, N, K, where=where, seed=0, router_init_std=1., noise=.5)


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    found, _ = read_conversations(write_scenes(folder, 6))
    return one_question_each(found)

TEXT = [Sample(f'text {i}', (('user', 'what color is the cat ?'), ('assistant', w)), (), dict(subtask='text'))
        for i, w in enumerate(('red', 'blue'))]

@pytest.fixture(scope='module')
def data(samples): return ConversationData([*samples[:3], TEXT[0], *samples[3:], TEXT[1]], TOK, pixels, 16)

@pytest.fixture(scope='module')
def model(): return moe()

@pytest.fixture(scope='module')
def traces(model, data, tmp_path_factory): return trace_images(model, data, tmp_path_factory.mktemp('t'), batch_size=4)


def test_each_patch_is_where_it_lies(model, data, traces):
    "By a second way: each image alone, its patches read off one by one"
    t, names = traces['tower'], traces['tower'].meta['info']['images']
    assert {*t.columns} == {'modality', 'image', 'scale', 'crop', 'row', 'column'} and not model.training
    paths = {f.name: f for s in data.samples for f in s.images}
    for i, name in enumerate(names):
        with torch.no_grad(), record_routing(model) as records:
            model.model.vision_tower(pixels(Image.open(paths[name]))[None])
        own = t.only(image=i)
        asked = [s for s in data.samples if s.images and s.images[0].name == name]
        assert own.num_tokens == 16 * len(asked)
        for n, l in enumerate(own):
            index = records[t.layers[n]][0].top_k_index.numpy()
            for e, r, q in zip(l.chosen, own.columns['row'], own.columns['column']):
                assert (e == index[4 * r + q]).all()
        assert {own.domains[d] for d in own.domain} == {s.tags['subtask'] for s in asked}


def test_words_and_pieces_of_images_in_the_language_model(model, data, traces):
    t = traces['language_model']
    want = [(i, p) for e in data.encoded for p, i in enumerate(e['input_ids'])]
    assert [*zip(t.token.tolist(), t.position.tolist())] == want
    mark = TOK.convert_tokens_to_ids('<image>')
    assert ((t.token == mark) == (t.columns['modality'] == 1)).all()
    pieces, words = t.only(modality='image'), t.only(modality='text')
    assert all((words.columns[k] == -1).all() for k in ('image', 'scale', 'crop', 'row', 'column'))
    assert (pieces.columns['row'] * 4 + pieces.columns['column']).tolist() == [*range(16)] * (len(data) - 2)
    tower = traces['tower']
    assert (pieces.columns['image'] == tower.columns['image']).all() and (pieces.domain == tower.domain).all()


def test_trap_text_only_samples_count_in_no_statistic_of_images(model, data, traces, tmp_path):
    without = ConversationData([s for s in data.samples if s.images], TOK, pixels, 16)
    clean = trace_images(model, without, tmp_path/'clean', batch_size=4)
    for part in ('tower', 'projector'):
        assert (np.asarray(traces[part].choice) == np.asarray(clean[part].choice)).all()
        d = metrics.expert_allocation_entropy(traces[part])
        assert 'text' not in set(d.domain) and (traces[part].columns['modality'] == 1).all()
    a, b = (t['language_model'].only(modality='image') for t in (traces, clean))
    assert a.num_tokens == b.num_tokens and (np.asarray(a.choice) == np.asarray(b.choice)).all()
    assert 'text' in set(metrics.selection_ratio(traces['language_model'], by_domain=True).domain)
    # nothing but text: no tower runs, and the files of an earlier call go
    only_text = trace_images(model, ConversationData(TEXT, TOK, pixels, 16), tmp_path/'clean')
    assert [*only_text] == ['language_model'] and (only_text['language_model'].columns['modality'] == 0).all()
    assert sorted(f.name for f in (tmp_path/'clean').iterdir()) == ['language_model.safetensors']
    with pytest.raises(ValueError, match="column|labels"): patch_information(only_text['language_model'])


def test_every_metric_works_on_every_part_and_by_every_column(traces):
    for t in traces.values():
        again = read_trace(t.path)
        assert metrics.expert_change_rate(t, again).change_rate[0] == 0
        assert (metrics.router_saturation(t, again).saturation == 1).all()
        for v in (t, t.by('modality'), t.by('row'), t.by('image'), t.by('scale'), t.by('crop'), t.only(domain=0)):
            for f in metrics.trace_metrics.values():
                assert len(f(v, **(dict(min_count=1) if 'min_count' in f.__code__.co_varnames else {})))
    t = traces['language_model']
    d = metrics.load_imbalance(t.by('modality'), by_domain=True).set_index('domain').max_over_mean
    assert np.isclose(d['image'].iloc[0], metrics.load_imbalance(t.only(modality='image')).max_over_mean[0])
    rows = metrics.router_margin(t.by('row'), by_domain=True).domain
    assert set(rows) == {'no row', 'row 0', 'row 1', 'row 2', 'row 3'}


def test_metrics_that_need_the_model(model, data):
    batches = [b for b, _ in zip(data.batches(4), range(4))]
    whole = model_metrics.expert_output_similarity(model, batches)
    assert len(whole) == len(moe_layers(model)) == 5 and whole.similarity.between(0, 1).all()
    assert len(model_metrics.expert_parameter_similarity(model, layers='vision_tower')) == 2 * 10
    patches = 16 * sum(len(b['pixel_values']) for b in batches if 'pixel_values' in b)
    assert whole.tokens[0] == patches and whole.tokens[4] == sum(int(b['attention_mask'].sum()) for b in batches)
    loss = model_metrics.balance_loss(model, batches, layers='vision_tower')
    assert len(loss) == 2 and (loss.balance_loss > .5).all()
    table = model_metrics.routing_perturbation(model, batches, dict(drop=drop_top1, nothing=temperature(1.)),
                                               layers='vision_tower')
    assert table.tokens[0] == sum(int((b['labels'][:, 1:] >= 0).sum()) for b in batches)      # answers alone
    assert table.loss_change[2] == 0 != table.loss_change[1]
    with torch.no_grad():
        want = sum(model(**b).loss.item() * (b['labels'][:, 1:] >= 0).sum() for b in batches) / table.tokens[0]
    assert np.isclose(table.loss[0], want, rtol=1e-5)


@pytest.mark.parametrize('f', [drop_top1, temperature(5.), random_routing()])
def test_interventions_in_the_tower_leave_the_language_side_alone(model, data, f):
    batch = next(b for b in data.batches(3) if 'pixel_values' in b)
    words = {k: batch[k] for k in ('input_ids', 'attention_mask')}
    words['input_ids'] = words['input_ids'].where(words['input_ids'] != 4, 7)
    def run(inputs, **kw):
        with torch.no_grad(), record_routing(model) as said, intervene(model, f, **kw), record_routing(model) as done:
            logits = model(**inputs).logits
        return said, done, logits
    with torch.no_grad(): plain, plain_words = model(**batch).logits, model(**words).logits
    said, done, logits = run(batch, layers='vision_tower')
    assert not torch.equal(logits, plain)
    for n in done:
        same = all(torch.equal(a.top_k_index, b.top_k_index) and torch.equal(a.top_k_weights, b.top_k_weights)
                   for a, b in zip(said[n], done[n]))
        assert same == ('vision_tower' not in n), n
    assert torch.equal(run(words, layers=['vision_tower', 'multi_modal_projector'])[2], plain_words)
    assert torch.equal(logits[:, :2], plain[:, :2])                       # words in front of the image
    with pytest.raises(ValueError, match="layers must be mixture-of-experts layers.*got 'tower of Babel'"):
        intervene(model, f, layers='tower of Babel').__enter__()


def two_scales(m):
    "A stand-in for the class of two scales: the tower sees the image, then nine crops, those of all images in turn"
    def features(pixel_values, **kw):
        n, big = len(pixel_values), torch.nn.functional.interpolate(pixel_values, scale_factor=3, mode='bicubic')
        crops = torch.cat([big[..., 32*r:32*r + 32, 32*q:32*q + 32] for r in range(3) for q in range(3)])
        one, nine = (m.model.vision_tower(x).last_hidden_state for x in (pixel_values, crops))
        seen = one + nine.view(9, n, 16, -1).mean(0)
        return BaseModelOutputWithPooling(pooler_output=list(m.model.multi_modal_projector(seen)))
    m.model.get_image_features = features
    return m


def test_two_scales_and_their_crops(data, tmp_path):
    m = two_scales(moe(['vision_tower', 'multi_modal_projector']))
    t = trace_images(m, data, tmp_path, num_samples=5, batch_size=5)
    tower, n = t['tower'], sum(len(s.images) for s in (data.samples[i * len(data) // 5] for i in range(5)))
    assert tower.num_tokens == 10 * 16 * n and t['projector'].num_tokens == 16 * n and 'language_model' not in t
    assert {*tower.columns['scale']} == {1, 3} and {*tower.only(scale=3).columns['crop']} == {*range(9)}
    image = next(s.images[0] for s in data.samples if s.images)
    i = tower.meta['info']['images'].index(image.name)
    big = torch.nn.functional.interpolate(pixels(Image.open(image))[None], scale_factor=3, mode='bicubic')
    grid = expert_maps(tower, 1, scale=3)[i]
    assert grid.shape == (12, 12) and expert_maps(tower, 1)[i].shape == (4, 4)
    for crop in (0, 2, 5, 8):
        r, q = divmod(crop, 3)
        with torch.no_grad(), record_routing(m) as records:
            m.model.vision_tower(big[..., 32*r:32*r + 32, 32*q:32*q + 32])
        first = records[tower.layers[1]][0].top_k_index[:, 0].reshape(4, 4).numpy()
        assert (grid[4*r:4*r + 4, 4*q:4*q + 4] == first).all(), crop
    d = metrics.expert_allocation_entropy(tower.by('scale'))
    assert {*d.domain} == {'scale 1', 'scale 3'} and {*tower.by('crop').domains} == {f'crop {i}' for i in range(9)}


def test_the_class_of_two_scales(data, tmp_path):
    scales = pytest.importorskip('libmoe_nb.models.vision')
    size = replace(scales.vision_sizes['tiny-vlm'], image_scales=(1, 3))
    m = scales.upcycle_parts(scales.llava_from_scratch(size, TOK, seed=0), 'smoe', ('tower', 'projector'), 4, 2, seed=0)
    t = trace_images(m, data, tmp_path, num_samples=4)
    assert {*t['tower'].columns['scale']} == {1, 3} and expert_maps(t['tower'], 0, scale=3).shape[1:] == (12, 12)


def test_a_class_token_a_pooling_head_and_a_dropped_patch(data, tmp_path):
    m = upcycle(dense(CLIPVisionConfig, strategy='default'), 'smoe', 4, 2, where=WHOLE, seed=0, router_init_std=1.)
    t = trace_images(m, data, tmp_path/'clip', num_samples=4)
    places = np.stack([t['tower'].columns[k][:17] for k in ('row', 'column')]).T
    assert places[0].tolist() == [-1, -1] and places[1].tolist() == [0, 0] and places[16].tolist() == [3, 3]
    assert t['projector'].columns['row'][:2].tolist() == [0, 0] and expert_maps(t['tower'], 0).shape[1:] == (4, 4)
    m = upcycle(dense(head=True), 'smoe', 4, 2, where='vision_tower', seed=0)
    t = trace_images(m, data, tmp_path/'head', num_samples=4)['tower']
    assert len(t.layers) == 2 and t.meta['info']['left_out'] == [n for n in moe_layers(m) if 'head' in n]


@pytest.mark.parametrize('recipe', 'smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe'.split())
def test_recipes(recipe, data, tmp_path):
    t = trace_images(moe(recipe=recipe, N=4), data, tmp_path, num_samples=4)
    assert {*t} == {'tower', 'projector', 'language_model'} and t['tower'].recipe == recipe
    for n in range(2):
        N, maps = t['tower'].meta['num_experts'][n], expert_maps(t['tower'], n)
        assert ((0 <= maps) & (maps <= N)).all()
        for of in ('weight', 'entropy', 'margin', 0): assert np.isfinite(expert_maps(t['tower'], n, of)).all()


def test_several_images_in_a_message_and_broken_ones(model, samples, tmp_path):
    (tmp_path/'broken.png').write_bytes(b'no picture')
    both = Sample('two', (('user', '<image>\n<image>\nwhat shape is there ?'), ('assistant', 'circle')),
                  (samples[0].images[0], samples[-1].images[0]))
    bad = Sample('bad', (('user', '<image>\nis there a cat ?'), ('assistant', 'no')), (tmp_path/'broken.png',))
    d = ConversationData([bad, both, samples[0]], TOK, pixels, 16)
    t = trace_images(model, d, tmp_path/'t')
    assert t['tower'].meta['info']['images'] == [p.name for p in both.images]
    assert t['language_model'].only(modality='image').columns['image'].tolist() == [0] * 16 + [1] * 16 + [0] * 16
    assert {why: [*names] for why, names in d.left_out.names.items()} == {'an image cannot be read': ['bad']}
    with pytest.raises(ValueError, match='data must be .*at least one sample whose images can be read'):
        trace_images(model, ConversationData([bad], TOK, pixels, 16), tmp_path/'none')
    assert not [*(tmp_path/'none').iterdir()]
    with pytest.raises(ValueError, match='with none'): trace_images(dense(), d, tmp_path/'dense')
    with pytest.raises(ValueError, match='num_samples must be at least 1, got 0'):
        trace_images(model, d, tmp_path/'t', num_samples=0)
    with pytest.raises(ValueError, match='folder must be one with tower.safetensors'): read_image_traces(tmp_path)


def test_hostile_and_old_files(traces, tmp_path):
    t = traces['tower']
    with safe_open(t.path, 'np') as f: meta = f.metadata()
    arrays = load_file(t.path)
    def changed(name, arrays, **meta_):
        save_file(arrays, tmp_path/name, {k: v for k, v in (meta | meta_).items() if v is not None})
        return tmp_path/name
    old = {k: v for k, v in arrays.items() if k not in t.columns}
    back = read_trace(changed('old', old, columns=None, names=None))
    assert not back.columns and (np.asarray(back.choice) == np.asarray(t.choice)).all()
    with pytest.raises(ValueError, match="column must be one of token, position, domain, got 'image'"): back.by('image')
    for name, arr, extra in [('short', arrays | dict(row=arrays['row'][:-1]), {}), ('gone', old, {}),
                             ('floats', arrays | dict(row=arrays['row'].astype(np.float32)), {}),
                             ('twice', arrays, dict(columns='["choice"]')),
                             ('kind', arrays, dict(columns='{"row": 1}')),
                             ('names', arrays, dict(names='{"modality": [1]}')), ('none', arrays, dict(names='3'))]:
        with pytest.raises(ValueError, match=f'{name} is a damaged trace'): read_trace(changed(name, arr, **extra))
    far = read_trace(changed('far', arrays | dict(row=arrays['row'] * 2**20)))
    with pytest.raises(ValueError, match='no more places than tokens'): expert_maps(far, 0)  # no terabytes
    up = read_trace(changed('up', arrays, info='{"images": ["../../secret.png", 3]}'))
    assert up.num_tokens == t.num_tokens


def information_trace(what, images=60, side=4, seed=0):
    "A trace whose first expert is a function of place, of content, of both by xor, or of neither"
    g = np.random.default_rng(seed)
    image, row, column = (v.reshape(-1) for v in np.indices((images, side, side)))
    place, content = row // 2 * 2 + column // 2, g.integers(0, 4, len(image))
    e = dict(place=place, content=content, both=place ^ content, neither=g.integers(0, 4, len(image)))[what]
    t = make_trace(np.stack([e, (e + 1) % 4], -1)[None], 4, 1)
    zero = np.zeros_like(image)
    return replace(t, columns=dict(image=image, scale=zero + 1, crop=zero, row=row, column=column)), content


@pytest.mark.parametrize('what, place, given', [('place', 2, 0), ('content', 0, 2), ('both', 0, 2), ('neither', 0, 0)])
def test_information_that_is_known(what, place, given):
    t, content = information_trace(what)
    a, b = patch_information(t, 'place'), patch_information(t, content, given='place')
    for df, want in ((a, place), (b, given)):
        assert abs(df.excess[0] - want) < .06 and df.low[0] - .05 < want < df.high[0] + .05, df
        assert abs(df.shuffled[0]) < .05 and np.isclose(df.entropy[0], 2, atol=.02)
    assert patch_information(t, content, seed=3).equals(patch_information(t, content, seed=3))


def test_intervals_cover_and_shuffling_keeps_what_is_given():
    missed = 0
    for seed in range(20):
        t, content = information_trace('neither', images=40, seed=seed)
        df = patch_information(t, content, shuffles=3)
        missed += not df.low[0] <= 0 <= df.high[0]
    assert missed <= 4
    # content that is a function of the place tells nothing once the place is known
    t, _ = information_trace('place')
    same = t.columns['row'] // 2 * 2 + t.columns['column'] // 2
    assert patch_information(t, same).excess[0] > 1.9
    assert abs(patch_information(t, same, given='place').excess[0]) < 1e-9


def test_scenes_are_known_to_the_patch():
    for seed in range(40):
        s = Scene.draw(seed, 'test')
        shape, colour = (np.array(scene_patches(s, 6, 6, w)) for w in ('shape', 'colour'))
        assert ((shape == 'paper') == (colour == 'paper')).all()
        for t in s.things:
            r, q = divmod(t.place, 3)
            cell = lambda a: {*a[2*r:2*r + 2, 2*q:2*q + 2].flat} - {'paper'}
            assert cell(shape) <= {t.shape} and cell(colour) == {t.colour}
        if s.text:
            assert {*colour.flat} == {s.colour, 'paper', *(t.colour for t in s.things)}
            assert {*shape.flat} == {'text', 'paper', *(t.shape for t in s.things)}
        if s.bars: assert {*colour.flat} - {'paper'} == {c for c, _ in s.bars}
    assert scene_of('a/b/test-000012.jpg') == Scene.draw(12, 'test')


def test_averages_over_images_as_the_paper_takes_them(traces):
    t = traces['tower']
    a = averaged_over(t, metrics.expert_allocation_entropy, top=1)
    each = [metrics.expert_allocation_entropy(t.only(image=i), by_domain=False, top=1).entropy[0]
            for i in range(t.columns['image'].max() + 1)]
    assert np.isclose(a.entropy[0], np.mean(each)) and a.groups[0] == len(each) and a.N[0] == 5
    assert len(averaged_over(t, metrics.router_margin, 'row')) == 2


def test_a_mixture_of_transformers_that_sees_images(tmp_path):
    "Its experts are in the language model alone; the tower is dense"
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
                rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[4, 2, 2]), pad_token_id=0)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=8, spatial_merge_size=2,
                  temporal_patch_size=1, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])
    with seeded(0):
        m = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(
            text_config=text, vision_config=vision, image_token_id=4, vision_start_token_id=60, vision_end_token_id=61))
    turns = ('user', '<image>\nwhat is it ?'), ('assistant', 'cat')
    made = [Sample(str(i), turns, (Image.new('RGB', (32, 32), (i, 0, 0)),)) for i in range(3)]
    m.resize_token_embeddings(len(TOK))
    d = ConversationData(made, TOK, pixels, 4)                               # 4 x 4 patches, merged to 2 x 2
    def run(model, batch):
        x = batch['pixel_values']
        n = len(x)
        patches = (x.reshape(n, 3, 2, 2, 8, 2, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * 16, -1))
        return model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], pixel_values=patches,
                     image_grid_thw=torch.tensor([[1, 4, 4]] * n), mm_token_type_ids=(batch['input_ids'] == 4).int())
    t = trace_images(m, d, tmp_path, run=run)
    assert [*t] == ['language_model'] and t['language_model'].only(modality='image').num_tokens == 12
    assert expert_maps(t['language_model'], 1).shape == (3, 2, 2)
