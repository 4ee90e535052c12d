"The importer of the authors' vision checkpoints, against tiny files made by hand and formulas written out"
import pickle, shutil, torch, torch.nn.functional as F, weakref
import pytest
from PIL import Image
from released_files import N, D_V, D_T, LAYERS, made_by_hand, release
from likeness import same_logits
from libmoe_nb.core.files import read_json, write_json
from libmoe_nb.models.asking import ask, load_vision_language
from libmoe_nb.models.released import (TensorFiles, empty_released, import_released, load_projector, load_released,
                                       published, recipe_of, released_specs, slots_of)

RECIPES = [r for r in published if r != 'smoe_sigmoidgating']
IDS = torch.tensor([[1, 4, 4, 4, 4, 7, 8, 9]])

@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    "Recipe as published -> its tensors, and model, processor and unread tensors"
    made = {}
    def get(r):
        if r not in made:
            t = made_by_hand(r)
            said = 'dense' if r == 'dense' else None
            made[r] = t, *load_released(release(tmp_path_factory.mktemp(r), r, t), recipe=said)
        return made[r]
    return get

def logits(model, ids=IDS):
    g = torch.Generator().manual_seed(5)
    side = model.config.vision_config.image_size
    with torch.no_grad(): return model(input_ids=ids, pixel_values=torch.randn(1, 3, side, side, generator=g)).logits

def by_formula(recipe, t, home, x, first, second, act):
    "What the released code computes for tokens x [T, d], from the file's tensors alone"
    def expert(e):
        p = f'{home}.experts.{e}'
        h = act(x @ t[f'{p}.{first}.weight'].T + t[f'{p}.{first}.bias'])
        return h @ t[f'{p}.{second}.weight'].T + t[f'{p}.{second}.bias']
    gate, K = t[f'{home}.gate.weight'], 3
    logits, sign = x @ gate.T, 1
    outs = [expert(e) for e in range(N)]
    if recipe in ('smoe', 'smoe_share', 'smoe_plus_plus'): p = logits.softmax(-1)
    elif recipe in ('smoe_sigmoid', 'smoe_sharev3'): p = logits.sigmoid()
    elif recipe == 'xmoe':
        z, e = x @ t[f'{home}.inp_reduction.weight'].T, t[f'{home}.expert_embeddings']
        p = (1.5 * F.normalize(z, dim=-1) @ F.normalize(e, dim=-1).T / .3).softmax(-1)
    elif recipe == 'smoe_tcmoe':
        p = (logits + torch.tensor([0.]*N + [-1.]*N + [-10.]*K)).softmax(-1)
        outs, sign = outs + [-o for o in outs] + [torch.zeros_like(outs[0])]*K, p[:, 2*N:].sum(-1, keepdim=True)
    if recipe == 'smoe_plus_plus' and len(gate) == N + 2:
        a = (x @ t[f'{home}.experts.{N + 1}.wg.weight'].T).softmax(-1)
        outs += [torch.zeros_like(x), a[:, :1] * x + a[:, 1:] * t[f'{home}.experts.{N + 1}.constant']]
    shared = recipe in ('smoe_share', 'smoe_sharev3')
    w, i = p.topk(K - shared, -1)
    if recipe == 'xmoe': w = w.softmax(-1)
    elif recipe == 'smoe_tcmoe': w = w * (i < 2*N); w = w / (w.sum(-1, keepdim=True) + sign)
    else: w = w / w.sum(-1, keepdim=True)
    y = sum(w[:, k, None] * torch.stack(outs)[i[:, k], torch.arange(len(x))] for k in range(w.shape[1]))
    return .5 * y + .5 * outs[N - 1] if shared else y

@pytest.mark.parametrize('recipe', RECIPES)
def test_layers_compute_what_the_released_code_does(loaded, recipe):
    t, model, _, names = loaded(recipe)
    x = torch.randn(50, D_V, generator=torch.Generator().manual_seed(1))
    tanh = lambda h: F.gelu(h, approximate='tanh')
    with torch.no_grad():
        for i in range(LAYERS):
            there = f'model.vision_tower.vision_model.encoder.layers.{i}.moelayer'
            ours = model.model.vision_tower.encoder.layers[i].mlp(x)
            torch.testing.assert_close(ours, by_formula(recipe, t, there, x, 'fc1', 'fc2', tanh), rtol=1e-4, atol=1e-5)
        x = torch.cat([x, x.flip(0)], -1)
        ours = model.model.multi_modal_projector(x)
        theirs = by_formula(recipe, t, 'model.mm_projector.moelayer', x, '0', '2', F.gelu)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    kept = {n for n in t if 'gate_transform' in n or recipe == 'xmoe' and n.endswith('gate.weight')}
    assert set(names['unread']) == kept and not names['absent']

class ByFormula(torch.nn.Module):
    "A layer of experts of which nothing is ours"
    def __init__(self, *about): super().__init__(); self.about = about
    def forward(self, x):
        recipe, t, home, *rest = self.about
        return by_formula(recipe, t, home, x.flatten(0, -2), *rest).unflatten(0, x.shape[:-1])

@torch.no_grad()
def whole_by_hand(recipe, t, config, ids, pixels):
    "Logits of the whole released model: transformers' attention and Phi-3, and all else written out"
    from transformers import Phi3ForCausalLM, SiglipVisionModel
    v, side, grid = 'model.vision_tower.vision_model.', 8, 2
    tower = SiglipVisionModel(config.vision_config).eval()
    for i, l in enumerate(tower.encoder.layers):
        l.mlp = ByFormula(recipe, t, f'{v}encoder.layers.{i}.moelayer', 'fc1', 'fc2',
                          lambda h: F.gelu(h, approximate='tanh'))
    dense = {n.removeprefix(v): w for n, w in t.items() if n.startswith(v) and 'moelayer' not in n}
    lost = tower.load_state_dict(dense, strict=False)
    assert not lost.unexpected_keys and {n.split('.')[0] for n in lost.missing_keys} <= {'post_layernorm', 'head'}
    seen = lambda x: tower(x, output_hidden_states=True).hidden_states[-2][0].view(grid, grid, D_V)
    big, mosaic = F.interpolate(pixels, scale_factor=3, mode='bicubic', align_corners=False), torch.zeros(6, 6, D_V)
    for i in range(3):
        for j in range(3):
            crop = big[:, :, side*i:side*i + side, side*j:side*j + side]
            mosaic[grid*i:grid*i + grid, grid*j:grid*j + grid] = seen(crop)
    means = torch.stack([mosaic[3*i:3*i + 3, 3*j:3*j + 3].mean((0, 1)) for i in range(grid) for j in range(grid)])
    x = torch.cat([seen(pixels).flatten(0, 1), means], -1)
    image = by_formula(recipe, t, 'model.mm_projector.moelayer', x, '0', '2', F.gelu)
    phi = Phi3ForCausalLM(config.text_config).eval()
    phi.load_state_dict({n: w for n, w in t.items() if 'vision_tower' not in n and 'mm_projector' not in n})
    words = phi.model.embed_tokens(ids)
    words[ids == 4] = image
    return phi(inputs_embeds=words).logits

@pytest.mark.parametrize('recipe', RECIPES)
def test_a_whole_model_equals_the_released_one_written_out(loaded, recipe):
    t, model, *_ = loaded(recipe)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = whole_by_hand(recipe, t, model.config, IDS, pixels)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)
    flipped = {n: w.flip(0) for n, w in t.items() if 'experts.0' in n}
    other = whole_by_hand(recipe, t | flipped, model.config, IDS, pixels)
    assert not torch.allclose(other, theirs, atol=1e-3)   # the experts have a say in what is compared

def set_by_hand(model, t):
    "The same weights, each written where a person would write it"
    m, v = model.model, 'model.vision_tower.vision_model'
    pairs = {'embeddings.patch_embedding.weight': m.vision_tower.embeddings.patch_embedding.weight,
             'embeddings.patch_embedding.bias': m.vision_tower.embeddings.patch_embedding.bias,
             'embeddings.position_embedding.weight': m.vision_tower.embeddings.position_embedding.weight}
    pairs = {f'{v}.{n}': p for n, p in pairs.items()}
    for i, l in enumerate(m.vision_tower.encoder.layers):
        for n, p in l.named_parameters(): pairs[f'{v}.encoder.layers.{i}.{n}'] = p
    for i, l in enumerate((m.multi_modal_projector.linear_1, m.multi_modal_projector.linear_2)):
        for n, p in l.named_parameters(): pairs[f'model.mm_projector.{2*i}.{n}'] = p
    for n, p in m.language_model.named_parameters(): pairs[f'model.{n}'] = p
    pairs['lm_head.weight'] = model.lm_head.weight
    assert pairs.keys() == t.keys()
    with torch.no_grad():
        for n, p in pairs.items(): p.copy_(t[n])

def test_a_dense_stage_equals_weights_set_by_hand(loaded):
    t, model, _, names = loaded('dense')
    other = type(model)(model.config).eval()
    assert not logits(other).allclose(logits(model))
    set_by_hand(other, t)
    assert same_logits(logits(other), logits(model)) and not names['unread']
    assert model.config.vision_feature_layer == -2 and model.config.image_scales == [1, 3]

@pytest.mark.parametrize('recipe', ['smoe_share', 'smoe_plus_plus'])
def test_kinds_of_files_give_the_same_bits(loaded, recipe, tmp_path):
    t, model, *_ = loaded(recipe)
    expected = logits(model)
    for kind, files in (('safetensors', 3), ('bin', 1), ('bin', 2)):
        other = load_released(release(tmp_path/f'{kind}{files}', recipe, t, kind, files))[0]
        assert same_logits(logits(other), expected), (kind, files)

@pytest.mark.parametrize('recipe', ['xmoe', 'dense'])
def test_one_scale(recipe, tmp_path):
    model, processor, _ = load_released(release(tmp_path, recipe, made_by_hand(recipe, scales=1)),
                                        recipe='dense' if recipe == 'dense' else None)
    assert not hasattr(model.config, 'image_scales') and logits(model).isfinite().all()

@pytest.mark.parametrize('recipe', RECIPES + ['dense'])
def test_a_saved_import_is_the_same_model(loaded, recipe, tmp_path):
    t, model, processor, _ = loaded(recipe)
    found = import_released(release(tmp_path, recipe, t), tmp_path/'out', recipe='dense' if recipe == 'dense' else None)
    assert found['recipe'] == (published | dict(dense='dense'))[recipe] and found['image_scales'] == (1, 3)
    back, its = load_vision_language(tmp_path/'out')
    assert same_logits(logits(back), logits(model))
    question = Image.new('RGB', (9, 12), 'red'), 'what size ?'
    assert ask(back, its, *question, max_new_tokens=3) == ask(model, processor, *question, max_new_tokens=3)

def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    folder, alive, plain = release(tmp_path, 'smoe'), [], TensorFiles.__getitem__
    def watched(self, name):
        assert not any(r() is not None for r in alive), f'another tensor is still held when {name} is read'
        t = plain(self, name)
        alive.append(weakref.ref(t))
        return t
    monkeypatch.setattr(TensorFiles, '__getitem__', watched)
    load_released(folder)
    assert len(alive) == 1 + len(made_by_hand('smoe'))   # the first once more, for its dtype

class Poison:
    def __reduce__(self): return open, ('poisoned', 'w')

@pytest.mark.parametrize('as_zip', [True, False])
def test_a_poisoned_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch, as_zip):
    monkeypatch.chdir(tmp_path)
    folder = release(tmp_path, 'smoe', kind='bin')
    held = made_by_hand('smoe') | dict(more=Poison())
    if as_zip: torch.save(held, folder/'pytorch_model.bin')
    else: (folder/'pytorch_model.bin').write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(ValueError, match='pytorch_model.bin must hold tensors alone'): load_released(folder)
    assert not (tmp_path/'poisoned').exists()

def without(t, *parts): return {n: v for n, v in t.items() if not any(p in n for p in parts)}

def cases():
    t = made_by_hand('smoe')
    fc1 = 'model.vision_tower.vision_model.encoder.layers.1.moelayer.experts.3.fc1.weight'
    yield t | {fc1: torch.zeros(13, D_V)}, {}, 'layers.1.moelayer.experts.3.fc1.weight must have shape .12, 8.'
    yield without(t, fc1), {}, 'lacks 1 tensor of a smoe model: .*layers.1.mlp.experts.up_proj of expert 3'
    yield t | {'model.resampler.weight': torch.zeros(1)}, {}, 'have no place in a smoe model: model.resampler.weight'
    yield t, dict(recipe='xmoe'), "recipe must be smoe or smoe_sigmoid, by the shapes of the experts' gate, got 'xmoe'"
    yield without(t, 'mm_projector'), {}, 'folder must be of a model with a projector'
    yield without(t, 'vision_tower'), {}, 'folder must be of a model with a vision tower'
    yield without(t, 'lm_head'), {}, 'lacks 1 tensor of a smoe model: lm_head.weight'
    wide = t | {f'model.mm_projector.moelayer.experts.{e}.0.weight': torch.zeros(D_T, 3*D_V) for e in range(N)}
    yield wide, {}, 'width of the projector must be 8 for one scale or 16 for two, got 24'

@pytest.mark.parametrize('tensors, given, error', list(cases()), ids=range(8))
def test_what_does_not_fit_is_refused_by_name_before_anything_is_read(tmp_path, monkeypatch, tensors, given, error):
    folder = release(tmp_path, 'smoe', tensors)
    monkeypatch.setattr(TensorFiles, '__getitem__', lambda self, n: pytest.fail(f'{n} was read'))
    with pytest.raises(ValueError, match=error): load_released(folder, **given)

def test_folders_that_are_not_whole(tmp_path):
    folder = release(tmp_path, 'smoe', files=2)
    (folder/'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(ValueError, match='lacks model-00002-of-00002.safetensors, which its model.safetensors.index'):
        load_released(folder)
    index = read_json(folder/'model.safetensors.index.json')['weight_map']
    write_json(folder/'model.safetensors.index.json', dict(weight_map=dict.fromkeys(index, '../away.safetensors')))
    with pytest.raises(ValueError, match='lacks ../away.safetensors'): load_released(folder)
    folder = release(tmp_path/'2', 'smoe')
    (folder/'config.json').unlink()
    with pytest.raises(ValueError, match='one with a config.json'): load_released(folder)
    folder = release(tmp_path/'3', 'smoe')
    shutil.rmtree(folder/'vision_tower')
    with pytest.raises(ValueError, match='tower must be a folder of the vision tower'): load_released(folder)
    folder = release(tmp_path/'4', 'smoe')
    shutil.rmtree(folder/'tokenizer')
    with pytest.raises(ValueError, match='has no tokenizer that can be loaded'): load_released(folder)
    moved = folder.rename(tmp_path/'a name that says nothing')
    with pytest.raises(ValueError, match='recipe must be given, since the tensors of smoe and smoe_sigmoid are'):
        load_released(moved)
    with pytest.raises(ValueError, match='folder must be a folder or a file that is here'): load_released(tmp_path/'no')
    with pytest.raises(ValueError, match='cannot be written'):
        (tmp_path/'file').write_text('x')
        import_released(folder, tmp_path/'file')

def test_top_k_of_tcmoe_is_read_off_its_rows():
    t = {n: tuple(v.shape) for n, v in made_by_hand('smoe_tcmoe').items()}
    assert recipe_of(t) == ('tcmoe', N, 3)

@pytest.mark.parametrize('name', ['mm_projector.bin', 'mm_projector.safetensors'])
def test_a_projector_alone(loaded, tmp_path, name):
    from safetensors.torch import save_file
    t, model, *_ = loaded('dense')
    other = type(model)(model.config)
    alone = {n: v for n, v in t.items() if 'mm_projector' in n}
    (torch.save if name.endswith('bin') else save_file)(alone, tmp_path/name)
    load_projector(other, tmp_path/name)
    for ours, theirs in zip(other.model.multi_modal_projector.parameters(), alone.values()): assert ours.equal(theirs)
    narrow = {n: v for n, v in made_by_hand('dense', scales=1).items() if 'mm_projector' in n}
    torch.save(narrow, tmp_path/'narrow.bin')
    with pytest.raises(ValueError, match=r'model.mm_projector.0.weight must have shape \(24, 16\), got \(24, 8\)'):
        load_projector(other, tmp_path/'narrow.bin')

def test_constants_that_a_file_lacks_are_zero_and_listed(tmp_path):
    t = {n: v for n, v in made_by_hand('smoe_plus_plus').items() if f'experts.{N + 1}.' not in n}
    model, _, names = load_released(release(tmp_path, 'smoe_plus_plus', t))
    layers = [l.mlp.zero_experts for l in model.model.vision_tower.encoder.layers]
    assert len(names['absent']) == 2 * LAYERS and not any(p.any() for l in layers for p in l.parameters())
    assert logits(model).isfinite().all()

def test_the_paper_size_is_counted_without_memory():
    from transformers import Phi3Config, SiglipVisionConfig
    from libmoe_nb.models.vision import joined_config
    tower = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                               image_size=224, patch_size=14, vision_use_head=False)
    text = Phi3Config(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                      num_attention_heads=32)
    for recipe, of_tower, of_projector in (('smoe', 1_752_079_392, 99_141_120),
                                           ('xmoe', 1_752_173_190 - 27 * 6 * 1152, 99_148_050 - 6 * 2304),
                                           ('sharede_v2', 1_752_048_288, 99_138_816),
                                           ('tcmoe', 1_752_359_328, 99_161_856),
                                           # without what nothing reads
                                           ('moe_plus_plus', 1_752_236_640 - 27 * 64, 99_141_120)):
        specs = released_specs(recipe, 6, 3, tower, text, (1, 3))
        model = empty_released(joined_config(tower, text, 32011, -2, (1, 3)), specs)
        count = lambda part: sum(torch.Size(s).numel() for (n, _), s in slots_of(model).items() if f'.{part}.' in n)
        assert all(p.is_meta for p in model.parameters())
        assert (count('vision_tower'), count('multi_modal_projector')) == (of_tower, of_projector), recipe
    assert sum(torch.Size(s).numel() for s in slots_of(model).values()) == of_tower + of_projector + 3_821_079_552
