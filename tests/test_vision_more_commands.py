"`libmoe vlm import`, `libmoe ask` with pictures of all kinds, easy-vqa as a last stage, and a tower's features kept."
import json, sys
from collections import Counter
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from cli_runner import libmoe
sys.path.insert(0, str(Path(__file__).parent/'models'))
from released_files import made_by_hand, release

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A model and its processor, saved; and pictures"
    from libmoe_nb.data.scenes import Scene, scene_words
    from libmoe_nb.models.asking import small_processor
    from libmoe_nb.models.vision import llava_from_scratch
    root = tmp_path_factory.mktemp('tiny')
    processor = small_processor(scene_words(), 32, 8)
    model = llava_from_scratch('tiny-vlm', processor.tokenizer, seed=0).eval()
    model.save_pretrained(root/'model'); processor.save_pretrained(root/'model')
    Image.fromarray(Scene.draw(9_000_001).pixels(48)).save(root/'scene.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(root/'noise.jpg')
    Image.new('RGBA', (9, 6), (255, 0, 0, 0)).save(root/'clear.png')
    Image.new('RGB', (1, 1)).save(root/'one.png'); Image.new('RGB', (3, 1)).save(root/'three.png')
    (root/'text.png').write_text('no picture')
    return root, model, processor

def test_import_writes_a_model_that_answers(tmp_path, tiny):
    f = release(tmp_path/'Phi3.5-Siglip-smoe_share-665K', 'smoe_share', made_by_hand('smoe_share'))
    found = json.loads(libmoe('vlm', 'import', f, tmp_path/'a', '--json'))
    assert (found['recipe'], found['top_k'], found['out']) == ('sharede_v2', 3, str(tmp_path/'a'))
    out = libmoe('vlm', 'import', f, tmp_path/'b')
    assert 'sharede_v2' in out and f'libmoe ask IMAGE "question" --model {tmp_path/"b"}' in out
    assert libmoe('ask', tiny[0]/'scene.png', 'what ?', '--model', tmp_path/'a', '--max-new-tokens', 2).count('\n') == 1
    assert 'OUT must be a new or an empty folder' in libmoe('vlm', 'import', f, tmp_path/'a', code=2)
    assert 'FOLDER must be a folder' in libmoe('vlm', 'import', tmp_path/'no', tmp_path/'c', code=2)
    assert '--tower must be a folder' in libmoe('vlm', 'import', f, tmp_path/'c', '--tower', 'siglip', code=2)
    assert "did you mean 'smoe'" in libmoe('vlm', 'import', f, tmp_path/'c', '--recipe', 'smo', code=2)
    assert 'recipe must be sharede_v2 or sharede_v3' in libmoe('vlm', 'import', f, tmp_path/'c', '--recipe',
                                                               'smoe', code=2)
    assert not (tmp_path/'c').exists()

def test_imported_specs_train_on_with_the_released_losses(tmp_path):
    from libmoe_nb.models.released import load_released
    for r in ('smoe', 'smoe_sharev3', 'smoe_tcmoe', 'smoe_plus_plus'):
        m, p, _ = load_released(release(tmp_path/f'Phi3.5-Siglip-{r}-665K', r, made_by_hand(r)))
        assert {s.released_losses for s in m.config.specs.values()} == {'vision'}
        ids = torch.tensor([[1, 4, 4, 4, 4, 7, 8, 9]])
        side = m.config.vision_config.image_size * max(getattr(m.config, 'image_scales', (1,)))
        loss = m.train()(input_ids=ids, pixel_values=torch.zeros(1, 3, side // max(m.config.image_scales),
                                                                 side // max(m.config.image_scales)), labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss)

def test_ask_takes_any_picture_and_several(tiny, tmp_path):
    root, how = tiny[0], ('--model', tiny[0]/'model', '--max-new-tokens', 3)
    for f in ('scene.png', 'noise.jpg', 'clear.png', 'one.png', 'three.png'):
        assert libmoe('ask', root/f, 'what color is the circle ?', *how).count('\n') == 1, f
    said = json.loads(libmoe('ask', root/'scene.png', root/'noise.jpg', 'what ?', *how, '--json'))
    assert said['image'] == [str(root/'scene.png'), str(root/'noise.jpg')]
    for f, why in (('text.png', 'cannot be read'), ('', 'IMAGE must be a file')):
        said = libmoe('ask', root/f, 'what ?', *how, code=2)
        assert why in said and said.count('\n') == 1 and 'Traceback' not in said
    assert 'is a folder without a config.json' in libmoe('ask', root/'scene.png', 'what ?', '--model', tmp_path, code=2)

def test_what_cannot_be_asked_is_left_out_by_name_and_counted(tiny):
    from libmoe_nb.data.conversations import LeftOut, Sample
    from libmoe_nb.data.images import BadImage
    from libmoe_nb.models.asking import ask_all
    root, model, processor = tiny
    some = [Sample(f, (('user', '<image>\nwhat ?'),), (root/f,))
            for f in ('text.png', 'scene.png', 'gone.png', 'one.png')]
    with pytest.raises(BadImage, match="'text.png' cannot be asked"): ask_all(model, processor, some, max_new_tokens=2)
    told, left = [], LeftOut()
    for size in (1, 4):
        res = ask_all(model, processor, some, size, 2, left_out=left, progress=told.append)
        assert [r is None for r in res] == [True, False, True, False] and told[-1] == 2
    assert (len(left), [*left.names['an image is missing']]) == (2, ['gone.png'])

def test_easy_vqa_is_turned_and_joins_the_shared_stages_of_the_scenes(tmp_path, tiny):
    from libmoe_nb.data.images import read_image
    from libmoe_nb.data.scenes import scene_words
    from libmoe_nb.data.vision import easy_vqa_turns, turned
    from libmoe_nb.experiments.vision import estimated_seconds, test_questions as asked_of, vision_plan
    from libmoe_nb.experiments.vision_stages import set_data
    found = easy_vqa_turns(1)
    asked = [t for s in found for r, t in s.turns if r == 'user']
    assert len(asked) == 38_575 and all(t.startswith('<image>\n') == (i == 0) for s in found[:500]
                                        for i, (_, t) in enumerate(s.turns[::2]))
    assert len({s.id for s in found}) == len(found) and max(len(s.turns) for s in found) == 6
    corners = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60)
    assert len({turned(corners, k).tobytes() for k in range(8)}) == 8
    assert read_image(found[0].images[0]).size == (64, 64) and found[0].images[0]().tobytes() in {
        turned(found[0].images[0].args[0], k).tobytes() for k in range(8)}
    known = {*scene_words(easy_vqa=True), '<image>'}
    assert {w for s in found for _, t in s.turns for w in t.split()} <= known
    scenes, easy = (vision_plan(['dense'], 'tiny-vlm', tmp_path, **kw) for kw in
                    ({}, dict(data=dict(vit=set_data()), test=set_data())))
    assert easy.shared == scenes.shared and easy.last[0]['data'] == set_data()
    assert estimated_seconds(easy) > 0
    few = vision_plan(['dense'], 'tiny-vlm', tmp_path, data=dict(vit=set_data()), test=set_data(), steps=7)
    assert few.shared == scenes.shared and {c['stage']['steps'] for c in few.last} == {7}     # of the last stage alone
    assert easy.last[0]['stage']['steps'] > few.last[0]['stage']['steps'] != scenes.last[0]['stage']['steps']
    asked = asked_of(tmp_path, easy.test, 3)
    assert len(asked) == 18 and {q.tags['group'] for q in asked} == {'open', 'yes_no'}
    assert all(w in known for q in asked for w in q.tags['question'].split())
    assert "did you mean 'easy-vqa'" in str(pytest.raises(ValueError, set_data, 'easyvqa').value)
    assert '--data must be a file or easy-vqa' in libmoe('vlm', 'finetune', 'dense', '--data', 'easyvqa', '--out',
                                                         tmp_path, code=2)

def test_new_words_leave_the_old_ones_where_they_were(tiny):
    from libmoe_nb.models.asking import ask, small_processor, with_words
    from libmoe_nb.models.vision import llava_from_scratch
    p = small_processor(['what', 'color', '?'], 32, 8)
    m = llava_from_scratch('tiny-vlm', p.tokenizer, seed=0).eval()
    image, state = Image.open(tiny[0]/'scene.png'), torch.get_rng_state()
    before = m.get_input_embeddings().weight.detach().clone()
    more = with_words(m, p, ['what', 'teal', 'gray'])
    assert torch.equal(torch.get_rng_state(), state) and len(more.tokenizer) == len(p.tokenizer) + 2
    assert m.config.text_config.vocab_size == len(more.tokenizer)
    assert torch.equal(m.get_input_embeddings().weight[:len(before)], before)
    assert isinstance(ask(m, more, image, 'what teal ?', max_new_tokens=2), str)

def test_a_learner_reads_features_and_the_tower_does_not_run(tiny, tmp_path):
    from libmoe_nb.data.conversations import ConversationData, as_sample
    from libmoe_nb.data.scenes import Scene, conversation
    from libmoe_nb.models.asking import image_tensor
    from libmoe_nb.models.frozen import feature_cache
    from libmoe_nb.models.towers import image_places, model_parts
    from libmoe_nb.training.stages import Stage, vision_learner
    import copy
    root, model, p = tiny
    samples = [as_sample(dict(conversation(s, f'{i}', 'caption'), image=Image.fromarray(s.pixels(32))))
               for i in range(12) for s in [Scene.draw(i)]]
    stage = Stage(name='pt', train=('projector',), data='captions', sequence_length=256, batch_size=4, steps=4,
                  learning_rate=1e-3)
    ended, ran = {}, Counter()
    for kind in ('pixels', 'features'):
        m = copy.deepcopy(model)
        made = lambda: feature_cache(m, p, tmp_path/'kept') if kind == 'features' else None
        if kind == 'features':
            list(zip(range(3), ConversationData(samples, p.tokenizer, image_tensor(p), image_places(m),
                                                features=made()).batches(4)))
        data = ConversationData(samples, p.tokenizer, image_tensor(p), image_places(m), features=made())
        model_parts(m)['tower'].register_forward_hook(lambda *_: ran.update([kind]))
        learn = vision_learner(m, data, stage)
        with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
        ended[kind] = m.model.multi_modal_projector.linear_1.weight.detach().clone()
    assert ran['pixels'] >= 4 and ran['features'] == 0
    torch.testing.assert_close(ended['pixels'], ended['features'], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match='without the tower where features are kept'):
        vision_learner(m, data, Stage(name='x', train=('tower',), sequence_length=256, batch_size=4, steps=1,
                                      learning_rate=1e-3))
