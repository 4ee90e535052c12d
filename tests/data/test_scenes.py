"Scenes: the same for everyone, train and test apart, and no answer to be had without the picture."
import json
from collections import Counter
from hashlib import blake2b
import numpy as np, pytest
from PIL import Image
from libmoe_nb.data import scenes
from libmoe_nb.data.conversations import read_conversations
from libmoe_nb.data.scenes import Scene, conversation, kinds, scene_words, side, subtasks, write_scenes, yes_no

@pytest.fixture(scope='module')
def train(): return [Scene.draw(i, 'train') for i in range(800)]

@pytest.fixture(scope='module')
def asked(train): return [(s, q) for i, s in enumerate(train) for q in s.questions(i)]

def test_the_same_pixels_captions_and_questions_everywhere():
    h = blake2b(digest_size=8)
    for i in range(100):
        s = Scene.draw(i, 'test')
        h.update(s.pixels().tobytes() + s.pixels(33).tobytes() + (s.caption() + repr(s.questions(i))).encode())
    assert h.hexdigest() == '926b26a260b420ea'

def test_train_and_test_share_no_content(train):
    say = lambda s: (s.kind, frozenset(map(str, s.things)), s.text, s.colour, frozenset(s.bars))
    test = [Scene.draw(i, 'test') for i in range(800)]
    assert not {*map(say, train)} & {*map(say, test)}
    assert {*map(side, test)} == {'test'} and {*map(side, train)} == {'train'}
    pictures = lambda ss: {s.pixels(24).tobytes() for s in ss}
    assert not pictures(train) & pictures(test)

@pytest.mark.parametrize('kind', kinds)
def test_test_scenes_of_each_kind_are_many(kind):
    "A subtask is not tested on a handful of pictures"
    assert len({Scene.draw(i, 'test', kind).pixels(24).tobytes() for i in range(300)}) > 250

def test_at_least_twelve_subtasks_in_four_groups(asked):
    count = Counter(q.subtask for _, q in asked)
    assert {*count} == {*subtasks} and len(subtasks) >= 12 and min(count.values()) > 100
    assert {*subtasks.values()} == {'coarse', 'fine', 'ocr', 'reasoning'}

def test_yes_and_no_come_in_pairs(train):
    for i, s in enumerate(train[:800]):
        answers = {n: Counter(q.answer for q in s.questions(i, most=4) if q.subtask == n) for n in yes_no}
        assert all(c in ({}, {'yes': 1, 'no': 1}) for c in answers.values())

def test_the_words_of_a_question_do_not_give_its_answer(asked):
    "The best rule from a question's words to its answer, found on one half, is poor on the other"
    half, right = len(asked) // 2, {}
    votes = {}
    for _, q in asked[:half]: votes.setdefault(q.text, Counter())[q.answer] += 1
    common = {n: Counter(q.answer for _, q in asked[:half] if q.subtask == n).most_common(1)[0][0] for n in subtasks}
    for _, q in asked[half:]:
        guess = votes[q.text].most_common(1)[0][0] if q.text in votes else common[q.subtask]
        right.setdefault(q.subtask, []).append(guess == q.answer)
    for n, r in right.items(): assert np.mean(r) < (.62 if n in (*yes_no, 'size') else .42), (n, np.mean(r))

def test_a_question_has_one_answer(train):
    for i, s in enumerate(train[:500]):
        found = {}
        for seed in range(6):
            for q in s.questions(seed): assert found.setdefault(q.text, q.answer) == q.answer

def test_each_phrase_is_about_one_place(train):
    for s in train[:500]:
        shown = [p.split()[0] for p in s.parts() if p.split()[0] in scenes.places]
        assert len(shown) == len(set(shown)) == len(s.things) + len(s.text) + len(s.bars)
        assert s.caption() == ' . '.join(s.parts()) + ' .'

def test_a_place_without_a_phrase_is_empty_and_one_with_a_phrase_is_not(train):
    for s in (s for s in train[:500] if s.kind != 'chart'):
        shown, pixels = {p.split()[0] for p in s.parts()}, s.pixels()
        for i, name in enumerate(scenes.places):
            y, x = (16 * v for v in divmod(i, 3))
            assert (pixels[y:y + 16, x:x + 16] != scenes._paper).any() == (name in shown)

@pytest.mark.parametrize('extra', [False, True])
def test_no_word_is_unknown(train, asked, extra):
    known = {*scene_words(extra)}
    assert {w for s in train for w in s.caption().split()} | {w for _, q in asked
                                                              for w in f'{q.text} {q.answer}'.split()} <= known

def test_words_of_easy_vqa():
    data = pytest.importorskip('easy_vqa')
    from pathlib import Path
    said = {*scene_words(easy_vqa=True)}
    for split in 'train', 'test':
        for q, a, _ in json.loads((Path(data.__file__).parent/'data'/split/'questions.json').read_text()):
            assert {*q.split(), *q.replace('?', ' ?').split(), a} <= said

def test_a_written_folder_is_llavas_layout(tmp_path):
    path = write_scenes(tmp_path, 20, 'test', size=32)
    samples, left = read_conversations(path)
    assert len(samples) == 20 and not len(left)
    for i, s in enumerate(samples):
        assert np.array_equal(np.asarray(Image.open(s.images[0])), Scene.draw(i, 'test').pixels(32))
        assert len(s.tags['subtasks']) == len(s.turns) // 2

def test_bad_arguments_are_named():
    for f in (lambda: Scene.draw(0, 'valid'), lambda: Scene.draw(0, kind='photo'),
              lambda: conversation(Scene.draw(0), 'a.png', 'all')):
        with pytest.raises(ValueError, match='must be'): f()
