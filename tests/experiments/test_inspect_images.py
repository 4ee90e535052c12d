"`libmoe analyze` on a model that sees images: every part, questions of one's own, and each mistake in one sentence."
import json, re, shlex, shutil

import numpy as np, pandas as pd, pytest
from typer.testing import CliRunner

from libmoe_nb.analysis.metrics import expert_allocation_entropy
from libmoe_nb.analysis.model_metrics import routing_perturbation
from libmoe_nb.analysis.interventions import drop_top1
from libmoe_nb.analysis.patches import image_batches, read_image_traces
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.cli import app
from libmoe_nb.data.scenes import scene_words, write_scenes
from libmoe_nb.experiments.image_analysis import measure_groups, measure_places
from libmoe_nb.experiments.inspect import analyze
from libmoe_nb.models.asking import ask_all, load_vision_language, small_processor
from libmoe_nb.models.vision import VisionLanguageSize, llava_from_scratch, upcycle_parts, vision_size

pytestmark = pytest.mark.usefixtures('undrawn')
FEW = ['--tokens', 500, '--threads', 1]


def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res


def refused(says, *args):
    res = libmoe('analyze', *args)
    last = res.stderr.strip().splitlines()[-1]
    assert (res.exit_code, res.stdout) == (2, ''), res.stderr
    assert says in last and last.startswith('libmoe: ') and 'Traceback' not in res.stderr, res.stderr


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    box, processor = tmp_path_factory.mktemp('models'), small_processor(scene_words(), 32, 8)
    dense = llava_from_scratch('tiny-vlm', processor.tokenizer, seed=0)
    kw = dict(num_experts=4, top_k=2, seed=0, router_init_std=1., noise=.5)
    made = dict(dense=dense, mute=upcycle_parts(dense, **kw),
                all=upcycle_parts(dense, where=('tower', 'projector', 'language_model'), **kw))
    for n, m in made.items():
        m.save_pretrained(box/n)
        if n != 'mute': processor.save_pretrained(box/n)
    tiny_moe('mixtral').save_pretrained(box/'text')
    write_scenes(box/'scenes', 12, 'test')
    return box


@pytest.fixture(scope='module')
def out(folders, tmp_path_factory):
    "A folder, and what was printed as JSON"
    out = tmp_path_factory.mktemp('out')/'a'
    res = libmoe('analyze', folders/'all', '--out', out, '--json', *FEW)
    assert res.exit_code == 0, res.stderr
    return out, json.loads(res.stdout)


def test_every_part(out):
    out, d = out
    traces = read_image_traces(out/'traces')
    assert [*traces] == [*d['parts']] == ['tower', 'projector', 'language_model'] and d['own_data'] and d['held_out']
    assert traces['language_model'].num_tokens == d['tokens'] and 300 < d['tokens'] < 700
    for p, t in traces.items():
        value = {r['metric']: r['value'] for r in d['summary'] if r['part'] == p}
        assert np.isclose(value['allocation entropy'], expert_allocation_entropy(t, by_domain=False).entropy.mean())
        assert {'perplexity', 'loss change: drop top-1', 'output similarity', 'parameter similarity'} <= {*value}
        assert (len(pd.read_csv(out/p/'co_activation.csv')) == 12 * len(t.layers)
                and len(d['parts'][p]['left_out']) == 0)
    assert {r['modality'] for r in d['by_modality'] if r['part'] == 'language_model'} == {'text', 'image'}
    assert {r['subtask'] for r in d['by_subtask']} == {*traces['tower'].domains}
    assert {'own', 'shuffled', 'drop top-1', 'random routing'} <= {*d['scores'][0]}
    assert (out/'tower'/'place_specialisation.csv').is_file()
    assert not (out/'tower'/'vocabulary_specialisation.csv').exists()


def test_the_page(out):
    page = (out[0]/'report.html').read_text()
    heads = re.findall(r'<h2>(.*?)</h2>', page)
    assert heads == ['In numbers', 'What was analysed', 'Answers', 'Experts over images', 'Vision tower', 'Projector',
                     'Language model']
    assert [page.count(f'<h3>{s}</h3>') for s in ('In numbers', 'Over depth', 'Who takes what', 'By subtask',
                                                  'Place and content')] == [3] * 5
    assert page.count('<h3>By modality</h3>') == page.count('<h3>Text, coloured by expert</h3>') == 1
    assert 'src="http' not in page and '<script' not in page and 'nan' not in re.sub(r'base64,[^"]*', '', page).split()


@pytest.mark.long
def test_the_command_makes_it_again(folders, out, tmp_path):
    words = shlex.split(out[1]['command'])
    assert words == ['libmoe', 'analyze', str(folders/'all'), '--tokens', '500', '--out', str(out[0])]
    again = analyze(str(folders/'all'), num_tokens=500, perturb=False)
    for p, t in read_image_traces(out[0]/'traces').items():
        assert (np.asarray(again.parts[p].trace.choice) == np.asarray(t.choice)).all()
    assert again.command().endswith('--tokens 500 --no-perturb')
    again.save(tmp_path/'b')
    assert {*read_image_traces(tmp_path/'b'/'traces')} == {*again.parts}


def test_questions_of_ones_own(folders, tmp_path):
    "What cannot be used is left out by name; a text counts in no image; the printed tables name the parts"
    entries = json.loads((folders/'scenes'/'conversations.json').read_text())
    shutil.copytree(folders/'scenes'/'images', tmp_path/'pictures')
    (tmp_path/'pictures'/entries[0]['image']).write_bytes(b'torn')
    entries[1] = dict(id='words', conversations=[{'from': 'human', 'value': 'is there a cat ?'},
                                                 {'from': 'gpt', 'value': 'no'}])
    entries[2]['conversations'] = entries[2]['conversations'][1:]                        # begins with an answer
    (tmp_path/'mine.json').write_text(json.dumps(entries))
    res = libmoe('analyze', folders/'all', '--data', tmp_path/'mine.json', '--images', tmp_path/'pictures', '--out',
                 tmp_path/'out', '--no-perturb', '--tokens', 5000, '--threads', 1)
    assert res.exit_code == 0, res.stderr
    assert [*filter({'Vision tower', 'Projector', 'Language model'}.__contains__, res.stdout.splitlines())] == [
        'Vision tower', 'Projector', 'Language model']
    d = json.loads((tmp_path/'out'/'analysis.json').read_text())
    assert not d['own_data'] and not d['held_out'] and d['images'] == 9 and sum(d['left_out'].values()) >= 2
    assert 'not known: what it answers is not a score' in (tmp_path/'out'/'report.html').read_text()
    assert {*d['scores'][0]} & {'own', 'shuffled', 'drop top-1'} == {'own', 'shuffled'}
    tower = read_image_traces(tmp_path/'out'/'traces')['tower']
    assert (tower.columns['modality'] == 1).all() and tower.columns['image'].max() == 8
    assert shlex.split(d['command'])[3:7] == ['--data', str(tmp_path/'mine.json'), '--images', str(tmp_path/'pictures')]


def test_losses_and_answers_are_those_of_the_model(folders, tmp_path):
    "By a second way: the loss of the answers with one part changed, and what was said"
    model, processor = load_vision_language(folders/'all', device='cpu')
    found = analyze(folders/'all', str(folders/'scenes'/'conversations.json'), num_tokens=400, device='cpu')
    batches = [b for b, _ in image_batches(found.probe.data, 8)]
    where = dict(tower='vision_tower', projector='multi_modal_projector', language_model='language_model')
    for p, layers in where.items():
        want = routing_perturbation(model, batches, {'drop top-1': drop_top1}, layers)
        got = found.parts[p].metrics['perturbation']
        assert np.allclose(got.loss[:2], want.loss) and got.tokens[0] == want.tokens[0]
    some = found.probe.data.samples[:6]
    said = found.answers.query("condition == 'own' and intervention == 'none'").set_index('id').said
    longest = max(len(processor.tokenizer(s.tags['answer']).input_ids) for s in found.probe.data.samples)
    assert [said[s.id] for s in some] == ask_all(model, processor, some, max_new_tokens=longest + 2)


def test_two_scales():
    processor = small_processor(scene_words(), 32, 8)
    size = VisionLanguageSize(**{k: v for k, v in vars(vision_size('tiny-vlm')).items() if k != 'image_scales'},
                              image_scales=(1, 2))
    m = upcycle_parts(llava_from_scratch(size, processor.tokenizer, seed=0), num_experts=4, top_k=2, seed=0)
    a = analyze(m, num_tokens=300, tokenizer=processor, perturb=False)
    t = a.parts['tower'].trace
    assert {*t.columns['scale']} == {1, 2} and a.command() is None and [*a.parts] == ['tower', 'projector']
    assert measure_places(t)['information'].tokens[0] == len(a.probe.images) * 16 * 5


def test_groups_are_those_of_the_metrics(out):
    t = read_image_traces(out[0]/'traces')['language_model']
    df = measure_groups(t, 'modality').set_index(['layer', 'modality'])
    for m in ('text', 'image'):
        own = t.only(modality=m)
        want = expert_allocation_entropy(own, by_domain=False).entropy
        assert np.allclose(df.xs(m, level=1).allocation_entropy, want)
        assert (df.xs(m, level=1).tokens == own.num_tokens).all()


# bad input

@pytest.mark.parametrize('name, more, says', [
    ('mute', (), 'must come with a LlavaProcessor'), ('dense', (), 'has no mixture-of-experts layers (LlavaFor'),
    ('text', ('--images', 'scenes'), 'images must be left out for a model that sees none'),
    ('all', ('--images', 'scenes'), 'images must be given with the conversations'),
    ('all', ('--data', 'nowhere.json'), 'data must be a JSON file of conversations about images'),
    ('all', ('--data', 'scenes/conversations.json', '--images', 'none'), 'images must be a folder of images'),
    ('all', ('--data', 'words.json'), 'data must be of conversations of which at least one has an image'),
    ('all', ('--data', 'torn.json'), 'cannot be read'), ('all', ('--data', 'list.json'), 'at least one has an image'),
    ('all', ('--tokens', '0'), 'num_tokens must be a whole number'),
    ('all', ('--sequence-length', '64'), 'sequence_length must be left out where questions are asked')])
def test_bad_input(name, more, says, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    (folders/'words.json').write_text(json.dumps([dict(id=1, conversations=[{'from': 'human', 'value': 'is it ?'},
                                                                            {'from': 'gpt', 'value': 'no'}])]))
    (folders/'torn.json').write_text('[{"id": 1,')
    (folders/'list.json').write_text('[1, 2]')
    refused(says, name, *more, '--out', tmp_path/'out')
    assert not (tmp_path/'out'/'report.html').exists()


def test_images_that_cannot_be_read(folders, tmp_path):
    (tmp_path/'images').mkdir()
    shutil.copy(folders/'scenes'/'conversations.json', tmp_path)
    refused('at least one whose images can be read', folders/'all', '--data', tmp_path/'conversations.json', '--out',
            tmp_path/'out')
