"Answers about images: what is asked, under which image, and that nothing is lost on the way."
from dataclasses import replace
import pandas as pd, pytest
from PIL import Image
from libmoe_nb.data.conversations import LeftOut, Sample, read_conversations
from libmoe_nb.data.scenes import write_scenes
from libmoe_nb.evaluation.answers import (answer_questions, answer_table, answers_of, blank_images, read_answers,
                                          readable_questions, shuffle_images, single_questions, without_images,
                                          write_answers)
from llava_made import small_llava

@pytest.fixture(scope='module')
def questions(tmp_path_factory):
    samples, _ = read_conversations(write_scenes(tmp_path_factory.mktemp('scenes'), 60, 'test', size=16))
    return single_questions(samples)

def ask_yes(samples): return ['yes'] * len(samples)

@pytest.mark.parametrize('seed', range(5))
def test_trap_image_really_used_shuffled_images_are_never_the_own_ones(questions, seed):
    put = shuffle_images(questions, seed)
    assert [q.id for q in put] == [q.id for q in questions] and [q.turns for q in put] == [q.turns for q in questions]
    subtasks_of = {}
    for q in questions: subtasks_of.setdefault(q.tags['image'], set()).add(q.tags['subtask'])
    for q, o in zip(questions, put):
        assert o.images != q.images and o.tags['shown'] == o.images[0].name
        assert q.tags['subtask'] in subtasks_of[o.tags['shown']]
        assert o.tags['answer'] == q.tags['answer']
    for t in {q.tags['subtask'] for q in questions}:                         # a circle: no image is shown more often
        shown = {q.tags['image']: o.tags['shown'] for q, o in zip(questions, put) if q.tags['subtask'] == t}
        assert sorted(shown) == sorted(shown.values())

def test_a_subtask_with_one_image_borrows_another_one():
    q = single_questions([Sample(str(i), (('user', '<image>\nx ?'), ('assistant', 'a')), (f'{i}.png',), dict(subtask=t))
                          for i, t in enumerate('aab')])
    assert shuffle_images(q)[2].tags['shown'] in ('0.png', '1.png')
    text = single_questions([Sample('t', (('user', 'x ?'), ('assistant', 'a')))])
    assert shuffle_images([*q, *text])[-1].images == ()
    several = single_questions([Sample(str(i), (('user', '<image>\n<image>\nx ?'), ('assistant', 'a')),
                                       (f'{i}a', f'{i}b'))
                                for i in range(2)])
    assert {len(q.images) for q in shuffle_images(several)} == {2}

def test_images_of_one_file_name_in_two_folders_are_two():
    one = single_questions([Sample(str(i), (('user', '<image>\nx ?'), ('assistant', 'a')), (f'{f}/1.png',))
                            for i, f in enumerate('ab')])
    assert [q.tags['image'] for q in one] == ['a/1.png', 'b/1.png']
    assert [q.images[0] for q in shuffle_images(one)] == ['b/1.png', 'a/1.png']
    live = single_questions([Sample(str(i), (('user', '<image>\nx ?'), ('assistant', 'a')), (Image.new('RGB', (4, 4)),))
                             for i in range(2)])
    assert [q.tags['image'] for q in live] == ['0#0', '1#0']

def test_blank_images_keep_the_size_and_no_image_leaves_no_mark(questions):
    assert blank_images(questions[:1])[0].images[0].size == (16, 16)
    bare = without_images(questions)
    assert all(not q.images and '<image>' not in q.turns[-1][1] and q.turns[-1][1] for q in bare)

@pytest.mark.parametrize('said, answer, right',
                         [('Yes.', 'yes', True), ('', '', False), (' ', '.', False), ('..', '..', True),
                          ('top  LEFT', 'top left', True), ('the cat', 'cat', False)])
def test_exact_match(said, answer, right):
    q = single_questions([Sample('a', (('user', 'x ?'), ('assistant', answer)))])
    assert answer_table(q, [said]).right.tolist() == [right]

def test_an_exception_is_never_an_empty_answer(questions):
    def broken(samples): raise RuntimeError('no memory')
    with pytest.raises(RuntimeError, match='no memory'): answers_of(broken, questions[:3])
    for said in ([None, 'a', 'b'], [float('nan'), 'a', 'b']):
        with pytest.raises(ValueError, match=f'the answer to {questions[0].id} must be a text'):
            answer_table(questions[:3], said)
    with pytest.raises(ValueError, match='one text a question'): answers_of(lambda s: ['a'], questions[:3])

def test_bad_image_is_left_out_by_name_under_every_condition(questions, tmp_path):
    (tmp_path/'broken.png').write_bytes(b'no picture')
    bad = replace(questions[0], id='bad', images=(tmp_path/'broken.png',),
                  tags=questions[0].tags | dict(image='broken.png'))
    left = LeftOut()
    ask = lambda model, processor, samples, **kw: ask_yes(samples)
    from torch import nn
    df = answer_questions(nn.Identity(), None, [bad, *questions[:9]], ('own', 'shuffled', 'none', 'blank'), ask=ask,
                          left_out=left)
    assert df.groupby('condition').id.apply(list).map(lambda ids: ids == [q.id for q in questions[:9]]).all()
    assert len(left) == 1 and 'broken.png' in repr(left) and 'bad' in repr(left)
    with pytest.raises(ValueError, match='hold at least one whose images can be read'): readable_questions([bad])

def test_text_survives_the_disk(questions, tmp_path):
    said = ['NA', 'None', '', 'a\nb', 'say "no", please', 'null', ' x ', 'ü\r\n<b>', 'True']
    df = answer_table(questions[:9], said)
    assert read_answers(write_answers(tmp_path/'m', df, 'smoe', 3)).said.tolist() == said
    assert read_answers(tmp_path/'m').right.tolist() == df.right.tolist()
    with pytest.raises(ValueError, match='holds answers.csv'): read_answers(tmp_path)
    (tmp_path/'m'/'answers.csv').write_text((tmp_path/'m'/'answers.csv').read_text().replace('False', 'maybe'))
    with pytest.raises(ValueError, match='does not hold whole answers'): read_answers(tmp_path/'m')

def test_tags_must_fit_the_questions():
    s = Sample('s1', (('user', 'x ?'), ('assistant', 'a')), tags=dict(subtasks=['a', 'b']))
    with pytest.raises(ValueError, match='subtasks of sample s1 must be a list of 1 name'): single_questions([s])

def test_trap_padding_answers_in_batches_equal_those_one_by_one(questions):
    model, processor = small_llava()
    some = [q for i, q in enumerate(questions) if i % 8 == 0]
    one, many = (answer_questions(model, processor, some, ('own', 'none'), batch_size=n, max_new_tokens=4)
                 for n in (1, 7))
    pd.testing.assert_frame_equal(one, many)
    assert many.said.nunique() > 1

def test_interventions_reach_the_vision_routers_alone(questions):
    from libmoe_nb.models.upcycling import upcycle
    from libmoe_nb.analysis.tracing import moe_layers
    model, processor = small_llava()
    model = upcycle(model, 'smoe', num_experts=4, top_k=2, where='vision_tower')
    assert moe_layers(model) and all('vision' in n for n in moe_layers(model))
    seen = []
    def look(r): seen.append(r.num_tokens); return r.replace(top_k_weights=0 * r.top_k_weights)
    df = answer_questions(model, processor, questions[:12], interventions=dict(silent=look), batch_size=4,
                          max_new_tokens=4)
    assert sum(seen) == len(moe_layers(model)) * 12 * 4 and df.intervention.tolist() == ['none'] * 12 + ['silent'] * 12
    own, silent = (df[df.intervention == i].said.tolist() for i in ('none', 'silent'))
    assert own != silent
    # all hooks are gone
    assert own == answer_questions(model, processor, questions[:12], max_new_tokens=4).said.tolist()
