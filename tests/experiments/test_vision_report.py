"The page of a vision comparison: what it shows, what it escapes, what may be missing."
import re
import numpy as np, pandas as pd, pytest
from PIL import Image
from libmoe_nb.data.conversations import Sample
from libmoe_nb.evaluation.answers import answers_of, single_questions, write_answers
from libmoe_nb.experiments.vision_report import (best_model, chosen_answers, picture_uri, read_vision_results,
                                                 recipe_scores,
                                                 vision_report, write_vision_report)

@pytest.fixture(scope='module')
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i in range(12): Image.new('RGB', (8, 8), (20 * i, 0, 0)).save(folder/f'{i}.png')
    evil = '<script>alert(1)</script> & "x"'
    return single_questions([Sample(str(i), (('user', f'<image>\n{evil} {t} ?'), ('assistant', a)),
                                    (folder/f'{i}.png',),
                                    dict(subtask=t, group='g'))
                             for i in range(12) for t, a in (('colour', 'red'), ('text', f'<b>{i}</b>'))]), folder

def knows(share, seed):
    rng = np.random.default_rng(seed)
    return lambda samples: [s.tags['answer'] if rng.random() < share else '<i>' for s in samples]

def made(folder, questions, recipes=('smoe', 'xmoe'), conditions=('own', 'shuffled'), **info):
    for n, r in enumerate(recipes):
        t = pd.concat([answers_of(knows(.8 - .4 * n if c == 'own' else .1, n), questions[0], c) for c in conditions])
        write_answers(folder/r, t, r, images=str(questions[1]), **info)
    return folder

def test_text_of_models_and_data_is_escaped(questions, tmp_path):
    page = vision_report(made(tmp_path, questions))
    assert '<script>alert' not in page and '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert '<b>1</b>' not in page and '<i>' not in page

def test_the_page_loads_nothing_and_has_its_pictures(questions, tmp_path):
    page = write_vision_report(made(tmp_path, questions), tmp_path/'out', pictures=6).read_text()
    assert page.count('src="data:image/png') == 6 and not re.search(r'(src|href)="(?!data:)', page)
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'report.html', 'subtasks.csv', 'groups.csv',
                                                            'accuracies.csv', 'controls.csv', 'above.csv'}

@pytest.mark.parametrize('recipes, conditions', [(('smoe',), ('own',)), (('smoe',), ('own', 'shuffled', 'blank')),
                                                 (('smoe', 'xmoe'), ('own',))])
def test_what_is_missing_is_left_out(questions, tmp_path, recipes, conditions):
    page = write_vision_report(made(tmp_path, questions, recipes, conditions), tmp_path/'out').read_text()
    assert (('What is learned from the image' in page) == ('shuffled' in conditions) and 'The gate' not in page
            and 'Recipes' in page)
    assert 'decides nothing' in page if 'blank' in conditions else 'decides nothing' not in page

def test_controls_are_no_recipes_and_the_gate_is_shown_once(questions, tmp_path):
    made(tmp_path, questions, gate=dict(colour=1., digits=.59))
    write_answers(tmp_path/'alone', answers_of(knows(.3, 5), questions[0], 'none'), 'question_only', control=True)
    r = read_vision_results(tmp_path)
    assert (recipe_scores(r).model.tolist() == ['smoe', 'xmoe']
            and r.controls.model.unique().tolist() == ['question_only'])
    page = vision_report(r, maps={'layer 1 of SMoE': questions[1]/'3.png'})
    assert ('trained without images' in page and page.count('59.0') == 1 and 'layer 1 of SMoE' in page
            and best_model(r) == 'smoe')

def test_images_that_are_gone_leave_the_answer(questions, tmp_path):
    made(tmp_path, questions, ('smoe',))
    info = (tmp_path/'smoe'/'results.json')
    info.write_text(info.read_text().replace(str(questions[1]), 'nowhere'))
    page = vision_report(tmp_path)
    assert 'src="data:image/png' not in page and '0.png' in page
    assert picture_uri(tmp_path/'no.png') == ''

def test_pictures_show_right_and_wrong_of_each_subtask(questions, tmp_path):
    df = read_vision_results(made(tmp_path, questions)).answers
    d = chosen_answers(df[df.model == 'xmoe'], 4)
    assert {*zip(d.subtask, d.right)} == {(t, r) for t in ('colour', 'text') for r in (True, False)}
    assert chosen_answers(df[df.model == 'xmoe'], 4).id.tolist() == d.id.tolist()

def test_folders_that_cannot_be_a_report_are_named(questions, tmp_path):
    with pytest.raises(ValueError, match='folder must be one with answers.csv'): read_vision_results(tmp_path)
    write_answers(tmp_path/'alone', answers_of(knows(.3, 5), questions[0], 'none'), 'question_only', control=True)
    with pytest.raises(ValueError, match='one with a model that is not a control'): read_vision_results(tmp_path)
    made(tmp_path, questions, ('smoe',))
    write_answers(tmp_path/'twice', answers_of(knows(.3, 5), questions[0]), 'smoe')
    with pytest.raises(ValueError, match='answers of smoe, seed 0 must be in one folder'): read_vision_results(tmp_path)

def test_a_subtask_of_one_image_is_named_and_the_page_is_written(questions, tmp_path):
    few = [q for q in questions[0] if q.tags['subtask'] == 'colour' or q.tags['image'] == '3.png']
    for n, r in enumerate(('smoe', 'xmoe')):
        t = answers_of(knows(.8 - .4 * n, n), few, 'own')
        write_answers(tmp_path/r, pd.concat([t, t.assign(intervention='random')]), r, images=str(questions[1]))
    page = vision_report(tmp_path)
    assert page.count('Not counted, with one image each: text.') == 2 and 'Recipes' in page
    assert 'Not counted' not in vision_report(made(tmp_path, questions))
