"Asking a vision-language model: what would go wrong silently"
import json, torch
import pytest
from PIL import Image
from processes import run_forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoProcessor, LlamaConfig, LlamaForCausalLM,
                          LlavaProcessor, PreTrainedTokenizerFast)
from libmoe_nb.data.conversations import Sample, encode, image_token
from libmoe_nb.data.scenes import Scene, scene_words
from libmoe_nb.models import asking
from libmoe_nb.models.asking import (ask, ask_all, end_tokens, image_tensor, load_vision_language, prompt_ids,
                                     small_processor, with_images)
from libmoe_nb.models.vision import llava_from_scratch, upcycle_parts, vision_sizes

def picture(i): return Image.fromarray(Scene.draw(i).pixels(48))

def question(i, *images, words='what color is it ?'):
    return Sample(f'q{i}', (('user', '<image>\n' * len(images) + words), ('assistant', 'red')), images)

SAMPLES = [question(0, picture(0)), question(1, picture(1), picture(2), words='which is large ?'),
           question(2, words='how many ?'), question(3, picture(3), words='is there a red circle left of the text ?'),
           Sample('turns', (('user', '<image>\nwhat color ?'), ('assistant', 'blue'), ('user', 'and the text ?')),
                  (picture(4),))]

@pytest.fixture(scope='module')
def processor(): return small_processor(scene_words(), 32, 8)

@pytest.fixture(scope='module')
def model(processor):
    "A model that says different things: random, with large weights"
    m = llava_from_scratch('tiny-vlm', processor.tokenizer, seed=3)
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() > 1: p.mul_(4)
    return m

@pytest.fixture(scope='module')
def alone(model, processor): return [ask_all(model, processor, [s], max_new_tokens=8)[0] for s in SAMPLES]

def test_answers_differ(alone): assert len(set(alone)) == len(alone), alone

@pytest.mark.parametrize('batch_size', [2, 3, 5])
@pytest.mark.parametrize('cache', [True, False])
def test_padding_a_batch_answers_as_its_samples_alone(model, processor, alone, batch_size, cache):
    assert ask_all(model, processor, SAMPLES, batch_size, max_new_tokens=8, use_cache=cache) == alone

def test_padding_with_a_token_that_is_also_a_word(model, alone):
    p = small_processor(scene_words(), 32, 8)
    p.tokenizer.pad_token = 'red'                                  # which is said in one of the questions
    assert 'red' in SAMPLES[3].turns[0][1]
    assert ask_all(model, p, SAMPLES, 5, max_new_tokens=8) == alone

def test_padding_without_a_padding_token(model, alone):
    p = small_processor(scene_words(), 32, 8)
    p.tokenizer.pad_token = None
    assert ask_all(model, p, SAMPLES, 5, max_new_tokens=8) == alone

def test_right_padding_would_answer_otherwise(model, processor, alone, monkeypatch):
    "The test above can fail"
    plain = asking.collate
    monkeypatch.setattr(asking, 'collate', lambda *a, left: plain(*a, left=False))
    assert ask_all(model, processor, SAMPLES, 5, max_new_tokens=8) != alone

def test_text_alone_runs_no_vision_tower(model, processor, monkeypatch):
    monkeypatch.setattr(model.model, 'get_image_features', lambda *a, **k: pytest.fail('the tower ran'))
    assert ask(model, processor, None, 'how many ?') == ask_all(model, processor, SAMPLES, images='none')[2]

@pytest.mark.parametrize('where', ['tower', 'projector', 'language_model'])
def test_an_upcycled_model_answers_the_same(model, processor, alone, where):
    moe = upcycle_parts(model, 'smoe', (where,), num_experts=4, top_k=2)
    assert ask_all(moe, processor, SAMPLES, 3, max_new_tokens=8) == alone

def test_mode_and_gradients_are_left_as_they_were(model, processor):
    model.train()
    try:
        ask(model, processor, picture(0), 'what ?', max_new_tokens=1)
        assert all(m.training for m in model.modules())
    finally: model.eval()

# the prompt

def bpe(template):
    "A tokenizer of bytes that joins a space to the word behind it, as GPT-2's and Phi's relatives do"
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ['USER: what color is it ? ASSISTANT: red<|end|>', 'is there a circle ? ASSISTANT: blue '] * 40
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens(['<|end|>', '<|endoftext|>', '<image>'])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|endoftext|>', pad_token='<|endoftext|>',
                                   chat_template=template)

PLAIN = ("{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}{{ '<|end|>\n' if m['role'] == 'assistant' "
         "else ' ' }}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt else '' }}")
PARTS = ("{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] if c['type'] == 'image' %}<image>\n"
         "{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
         "{{ '<|end|>\n' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
         "{{ 'ASSISTANT: ' if add_generation_prompt else '' }}")

def with_tokenizer(t, template): return LlavaProcessor(small_processor(['a'], 32, 8).image_processor, t, patch_size=8,
                                                       vision_feature_select_strategy='full', chat_template=template)

def test_a_prompt_is_what_stood_before_the_answer_in_training_where_spaces_join_words():
    t = bpe(PLAIN)
    p = with_tokenizer(t, PLAIN)
    s = question(0, picture(0))
    e = encode(s, t, 4)
    first = next(i for i, l in enumerate(e['labels']) if l != -100)
    assert prompt_ids(p, s.turns, 4) == e['input_ids'][:first]
    naive = t(t.apply_chat_template([dict(role='user', content=s.turns[0][1])], tokenize=False,
                                    add_generation_prompt=True), add_special_tokens=False).input_ids
    assert naive[-1] != prompt_ids(p, s.turns, 4)[-1]               # the space that was never there: this test can fail

def test_a_template_of_parts_writes_the_same_ids():
    plain, parts = (with_tokenizer(bpe(x), x) for x in (PLAIN, PARTS))
    assert prompt_ids(plain, SAMPLES[4].turns, 4) == prompt_ids(parts, SAMPLES[4].turns, 4)

def test_a_template_that_drops_an_image_is_refused():
    lost = "{% for m in messages %}{{ m['content'].replace('<image>', '') }} {% endfor %}"
    with pytest.raises(ValueError, match='the chat template cannot write these turns: it drops some'):
        prompt_ids(with_tokenizer(bpe(lost), lost), SAMPLES[0].turns, 4)

def test_an_answer_ends_with_the_token_of_the_template_too(model):
    t = bpe(PLAIN)
    ends = end_tokens(model, with_tokenizer(t, PLAIN))
    assert {'<|end|>', '<|endoftext|>'} == {*t.convert_ids_to_tokens(ends)}

def test_a_default_end_that_is_a_word_ends_nothing(model, processor, monkeypatch):
    word = processor.tokenizer.convert_tokens_to_ids('red')
    monkeypatch.setattr(model.generation_config, 'eos_token_id', [2, word])
    assert end_tokens(model, processor) == [2]

def test_an_answer_is_cut_at_its_end(model, processor, monkeypatch):
    ids = processor.tokenizer.convert_tokens_to_ids(['red', '</s>', 'blue'])
    said = lambda **k: torch.cat([k['input_ids'], torch.tensor([ids])], 1)
    monkeypatch.setattr(model, 'generate', said)
    assert ask(model, processor, None, 'what ?') == 'red'

# control conditions

def test_shuffled_images_are_never_the_own_and_follow_the_seed():
    a, b = picture(7), picture(8)
    some = [question(0, a), question(1, a, words='how many ?'), question(2, b), question(3)]
    got = with_images(some, 'shuffled')
    assert got[0].images[0] is got[1].images[0] is b and got[2].images[0] is a and got[3].images == ()
    many = [question(i, picture(i)) for i in range(9)]
    orders = {tuple(id(s.images[0]) for s in with_images(many, 'shuffled', seed)) for seed in (0, 0, 1)}
    assert len(orders) == 2

def test_pictures_of_one_path_are_one_picture(tmp_path):
    picture(0).save(f := tmp_path/'a.png'); picture(1).save(g := tmp_path/'b.png')
    got = with_images([question(0, f), question(1, str(f)), question(2, g)], 'shuffled')
    assert [str(s.images[0]) for s in got] == [str(g), str(g), str(f)]

def test_conditions_change_what_is_seen(model, processor, alone):
    for how in 'shuffled', 'blank', 'none':
        assert ask_all(model, processor, SAMPLES, images=how, max_new_tokens=8) != alone

# errors

def test_an_exception_is_never_an_empty_answer(model, processor, monkeypatch):
    def out_of_memory(**kwargs): raise torch.OutOfMemoryError('no memory left')
    monkeypatch.setattr(model, 'generate', out_of_memory)
    with pytest.raises(RuntimeError, match='no answer to q2 and turns: no memory left'):
        ask_all(model, processor, [SAMPLES[2], SAMPLES[4]])

@pytest.mark.parametrize('sample, error', [
    (question('x', b'none'), "sample 'qx' cannot be asked: image"),
    (question('x', 'nowhere.png'), "sample 'qx' cannot be asked: image 'nowhere.png' must be a file"),
    (Sample('x', (('user', 'what ?'),), (picture(0),)), "sample 'x' cannot be asked: has 0 image marks for 1 image"),
    (Sample('x', (('user', '<image><image>what ?'),), (picture(0),)), 'has 2 image marks for 1 image'),
    (Sample('x', ()), "sample 'x' cannot be asked"),
    (question('x', words='what ' * 3000), 'must fit into 2048 tokens')])
def test_a_sample_that_cannot_be_asked_is_named(model, processor, sample, error):
    with pytest.raises(ValueError, match=error): ask_all(model, processor, [SAMPLES[0], sample])

def test_nothing_is_asked_before_all_are_checked(model, processor, monkeypatch):
    monkeypatch.setattr(model, 'generate', lambda **k: pytest.fail('asked'))
    with pytest.raises(ValueError, match='0 image marks'):
        ask_all(model, processor, [SAMPLES[0], Sample('x', (('user', 'what ?'),), (picture(0),))], 1)

def test_turns_must_be_turns(model, processor):
    with pytest.raises(ValueError, match='turns must be of user and assistant in turn'):
        ask(model, processor, None, [('user', 'a'), ('user', 'b')])

# from a folder

@pytest.fixture(scope='module')
def folder(model, processor, tmp_path_factory):
    model.save_pretrained(out := tmp_path_factory.mktemp('vlm'))
    processor.save_pretrained(out)
    return out

def test_a_saved_model_gives_the_same_answers_in_a_fresh_process_and_under_plain_transformers(folder, alone, tmp_path):
    SAMPLES[0].images[0].save(tmp_path/'a.png')
    code = f'''if True:
        import json, sys
        from transformers import AutoModelForImageTextToText, AutoProcessor
        m, p = (c.from_pretrained({str(folder)!r}) for c in (AutoModelForImageTextToText, AutoProcessor))
        from PIL import Image
        message = [dict(role='user', content=[dict(type='image'), dict(type='text', text='what color is it ?')])]
        text = p.apply_chat_template(message, add_generation_prompt=True)
        b = p(images=[Image.open({str(tmp_path/"a.png")!r})], text=text, return_tensors='pt')
        out = m.generate(**b, max_new_tokens=8, do_sample=False)[0, b['input_ids'].shape[1]:]
        assert not any(n.startswith('libmoe') for n in sys.modules)
        from libmoe_nb.models.asking import ask, load_vision_language
        model, processor = load_vision_language({str(folder)!r})
        ours = ask(model, processor, {str(tmp_path/"a.png")!r}, 'what color is it ?', max_new_tokens=8)
        print(json.dumps([p.tokenizer.decode(out, skip_special_tokens=True).strip(), ours]))'''
    out = run_forked(code)
    assert out.returncode == 0, out.stderr[-2000:]
    assert json.loads(out.stdout.splitlines()[-1]) == [alone[0], alone[0]]

@pytest.mark.parametrize('scales', [(1,), (1, 3)])
@pytest.mark.parametrize('recipe', [None, 'smoe'])
def test_folders_of_one_scale_and_two_dense_and_upcycled(processor, tmp_path, scales, recipe):
    import dataclasses
    size = dataclasses.replace(vision_sizes['tiny-vlm'], image_scales=scales)
    m = llava_from_scratch(size, processor.tokenizer, seed=0)
    if recipe: m = upcycle_parts(m, recipe)
    m.save_pretrained(tmp_path); processor.save_pretrained(tmp_path)
    back, its = load_vision_language(tmp_path)
    assert type(back) is type(m) and not back.training
    asked = picture(0), 'what ?'
    assert ask(back, its, *asked, max_new_tokens=4) == ask(m, processor, *asked, max_new_tokens=4)

def test_a_processor_saves_and_loads(folder, processor):
    p = AutoProcessor.from_pretrained(folder)
    assert type(p) is LlavaProcessor and p.chat_template == processor.chat_template
    assert p.tokenizer.chat_template == processor.chat_template and image_token(p.tokenizer) == p.image_token_id
    wide = picture(0).resize((90, 40))
    _, ours = load_vision_language(folder)
    assert image_tensor(ours)(wide).equal(image_tensor(processor)(wide))

def test_a_square_picture_is_bit_by_bit_what_the_processor_makes(processor):
    for im in picture(0), picture(1).resize((77, 77)), Image.new('RGB', (32, 32), 'red'):
        made = processor(images=[im], text='<image>', return_tensors='pt')['pixel_values'][0]
        assert image_tensor(processor)(im).equal(made)

@pytest.mark.parametrize('words', ['the default id of the mark is a word', 'another patch', 'another size',
                                   'no processor', 'a tokenizer alone', 'a text model', 'another tokenizer'])
def test_a_folder_that_does_not_fit_is_refused_with_a_sentence(model, processor, tmp_path, words):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    error = 'must'
    if words.startswith('the default'):
        c = json.loads((tmp_path/'config.json').read_text())
        key = 'image_token_id' if 'image_token_id' in c else 'image_token_index'
        (tmp_path/'config.json').write_text(json.dumps(c | {key: 30}))
        error = "image_token_id of .* must be 4, that of <image> in its processor, got 30"
    elif words == 'another patch':
        small_processor(scene_words(), 32, 16).save_pretrained(tmp_path)
        error = 'patch_size of the processor must be 8'
    elif words == 'another size':
        small_processor(scene_words(), 48, 8).save_pretrained(tmp_path)
        error = 'must make images of 32 x 32 pixels'
    elif words == 'another tokenizer':
        small_processor([*scene_words(), *map(str, range(500, 600))], 32, 8).save_pretrained(tmp_path)
        error = 'it is the tokenizer of another model'
    elif words in ('no processor', 'a tokenizer alone'):
        (tmp_path/'processor_config.json').unlink()
        if words == 'no processor': [f.unlink() for f in tmp_path.glob('token*')]
        error = 'must come with a LlavaProcessor: save one beside it'
    else:
        LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                     vocab_size=9)).save_pretrained(tmp_path)
        error = "must be a LLaVA .* got a model of type 'llama'"
    with pytest.raises(ValueError, match=error): load_vision_language(tmp_path)

def test_the_mark_of_an_image_is_never_said(model, processor, monkeypatch):
    "Without a cache, the next step would look for the image behind it"
    mark, plain = image_token(processor.tokenizer), model.lm_head.forward
    def eager(x):
        logits = plain(x)
        logits[..., mark] = 1e3
        return logits
    monkeypatch.setattr(model.lm_head, 'forward', eager)
    for cache in True, False:
        assert '<image>' not in ask(model, processor, picture(0), 'what ?', max_new_tokens=3, use_cache=cache)
