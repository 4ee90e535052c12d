"The stages of a vision-language model as folders: reused by name, killed and gone on with, compared."
import json, os, random, shutil, signal
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from processes import run_forked
from libmoe_nb.core.files import file_digest, read_json
from libmoe_nb.experiments import vision
from libmoe_nb.experiments.jobs import Task, side_by_side, values_of
from libmoe_nb.experiments.vision import vision_compare, vision_plan
from libmoe_nb.experiments.vision_stages import (attribute_of, caption_accuracy, shared_stages, stage_folder,
                                                 stage_learner, stage_model, stage_name, stage_samples, train_stage)
from libmoe_nb.models.asking import load_vision_language
from libmoe_nb.training.stages import get_vision_preset, paper_stages

pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('undrawn')]

@pytest.fixture(scope='module')
def few():
    "The tiny preset in a few steps of each stage"
    p = get_vision_preset('tiny-vlm')
    return replace(p, scenes=24, test_scenes=6,
                   stages=tuple(replace(s, steps=3, warmup_steps=1, batch_size=4) for s in p.stages))

@pytest.fixture(scope='module')
def compared(few, tmp_path_factory):
    root = tmp_path_factory.mktemp('vision')
    return root, vision_compare(['smoe', 'sharede_v3', 'moe_plus_plus'], few, root, jobs=1)

def weights(root, name): return file_digest(next(stage_folder(root, name).glob('model/*.safetensors')))

def test_a_comparison_from_nothing(compared):
    root, res = compared
    assert res.results.recipe.tolist() == ['dense', 'smoe', 'sharede_v3', 'moe_plus_plus', 'question_only']
    assert set(res.results.steps) == {3} and res.results.seed.eq(0).all()
    assert set(res.answers.condition) == {'own', 'shuffled', 'blank', 'none'}
    assert set(res.captions) >= {'colour', 'letter', 'digit', 'height'} and res.captions['colour']['n'] > 0
    saved = json.loads((root/'results.json').read_text())
    assert saved == json.loads(json.dumps(res.to_dict())) and (root/'subtasks.csv').exists()
    own = res.answers[res.answers.model == 'smoe']
    assert own[own.condition == 'own'].id.tolist() == own[own.condition == 'shuffled'].id.tolist()

def test_the_page_shows_which_expert_took_which_patch(compared, tmp_path):
    root, res = compared
    page = (root/'report'/'report.html').read_text()
    assert 'Where experts look' in page and 'experts of the tower' in page and 'experts of the projector' in page
    maps = res.expert_maps(pictures=1, recipes=2)
    assert [*maps] == ['experts of the tower', 'experts of the projector']
    assert len(maps['experts of the projector'].axes) == 2 * 2             # a row a recipe: the picture, one layer
    dense = vision.VisionComparison([f for f in res.folders if 'dense' in f.name], tmp_path)
    assert dense.expert_maps() == {}

def test_shared_stages_are_trained_once(compared, few, monkeypatch):
    root, res = compared
    told = []
    again = vision_compare(['smoe', 'xmoe'], few, root, jobs=1,
                           progress=lambda event, name=None, **f: told.append((event, name, f)))
    started = [name for event, name, _ in told if event == 'start']
    assert len(started) == 1 and started[0].startswith('vit-xmoe-0-')
    assert len([f for e, _, f in told if e == 'finish' and f['reused']]) == 4 + 3
    assert again.results.recipe.tolist() == ['dense', 'smoe', 'xmoe', 'question_only']

def test_names_change_with_everything_that_led_to_a_stage(few):
    names = lambda p, **kw: [stage_name(c) for c in vision_plan(['smoe'], p, 'nowhere', **kw).stages]
    base, first, steps = names(few), replace(few.stages[0], learning_rate=1e-4), replace(few.stages[-1], steps=4)
    other = names(replace(few, stages=(first, *few.stages[1:])))
    assert not set(base) & set(other)                                          # everything comes after the first stage
    later = names(replace(few, stages=(*few.stages[:-1], steps)))
    assert base[:4] == later[:4] and not set(base[4:]) & set(later[4:])        # all that is shared stays
    assert names(few, seeds=2)[:4] == base[:4] and set(base) < set(names(few, seeds=2))
    assert not set(base) & set(names(replace(few, scenes=25)))

def test_every_recipe_starts_from_the_dense_model(compared, few):
    root, _ = compared
    plan = vision_plan(['smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3'], few, root, controls=False)
    models = {c['recipe']: stage_model(root, c) for c in plan.last}
    processor = models['dense'][1]
    ids = processor.tokenizer('<image> ' * 16 + 'describe the image .', return_tensors='pt').input_ids
    x = dict(input_ids=ids, pixel_values=torch.rand(1, 3, 32, 32))
    with torch.no_grad(): logits = {n: m.eval()(**x).logits for n, (m, _) in models.items()}
    for n, l in logits.items(): assert torch.allclose(l, logits['dense'], atol=1e-5), n

def test_the_dense_model_is_one_of_transformers(compared):
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
    folder = Path(compared[1].results.folder[0])/'model'
    config = json.loads((folder/'config.json').read_text())
    assert (config['architectures'], config['model_type']) == (['LlavaForConditionalGeneration'], 'llava')
    assert 'auto_map' not in config and not list(folder.glob('*.py')) and 'libmoe' not in json.dumps(config)
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is LlavaForConditionalGeneration

KILLED = '''
import json, os, signal, sys
from libmoe_nb.experiments.vision_stages import train_stage
def tell(event, name=None, **facts):
    if event == 'step' and facts['step'] == 2: os.kill(os.getpid(), signal.SIGKILL)
train_stage(sys.argv[1], json.loads(sys.argv[2]), progress=tell, checkpoint_seconds=0)
'''

def test_killed_in_the_middle_of_a_stage_it_ends_with_the_same_bits(compared, few, tmp_path):
    root, _ = compared
    config = next(c for c in vision_plan(['smoe'], few, root).last if c['recipe'] == 'smoe')
    before = stage_folder(tmp_path, config['start']['stage'])
    shutil.copytree(stage_folder(root, config['start']['stage']), before)
    done = run_forked(KILLED, tmp_path, json.dumps(config))
    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
    folder = stage_folder(tmp_path, stage_name(config))
    assert not (folder/'result.json').exists() and len(list(folder.glob('checkpoints/step-*'))) == 1
    started = []
    train_stage(tmp_path, config,
                progress=lambda event, name=None, **f: started.append(f.get('step')) if event == 'step' else None)
    assert started == [2, 3] or started == [3]
    assert weights(tmp_path, stage_name(config)) == weights(root, stage_name(config))

def test_a_folder_of_another_configuration_is_refused(few, tmp_path):
    config = shared_stages(few)[0]
    folder = stage_folder(tmp_path, stage_name(config))
    folder.mkdir(parents=True)
    (folder/'something').write_text('else')
    with pytest.raises(ValueError, match='neither empty nor the folder of a run'): train_stage(tmp_path, config)

def test_a_control_without_pictures_never_sees_one(few):
    config = vision_plan(['smoe'], few, 'nowhere').last[-1]
    samples, _ = stage_samples(config['data'], 'questions', images=config['images'])
    assert config['images'] is False and not any(s.images or '<image>' in t for s in samples for _, t in s.turns)

def test_pictures_are_squeezed_while_the_papers_projector_learns_and_padded_afterwards(compared):
    from PIL import Image
    assert [s.pad_images for s in paper_stages] == [False, True, True]
    config = read_json(next(compared[0].glob('stages/pt-*/config.json')))['run']
    assert 'pad_images' not in config['stage']      # so that what was trained before keeps its name
    model, processor = load_vision_language(next(compared[0].glob('stages/pt-*/model')))
    wide = Image.new('RGB', (40, 10), 'red')
    for pad in (True, False):
        stage = config['stage'] | ({} if pad else dict(pad_images=False))
        data, _ = stage_learner(dict(config, stage=stage), model, processor)
        seen = data.image_tensor(wide)
        assert (seen == seen[:, :1, :1]).all() != pad

def test_caption_accuracy_counts_each_kind_of_word(compared, few):
    root, _ = compared
    plan = vision_plan(['smoe'], few, root)
    model, processor = load_vision_language(plan.folder(plan.shared[-1])/'model')
    samples = stage_samples(dict(plan.test), 'captions', split='test')[0]
    res = caption_accuracy(model, processor, samples, batch_size=3)
    words = [w.split() for s in samples for w in [s.turns[1][1]]]
    n = sum(1 for ws in words for b, w in zip(['', *ws], ws) if attribute_of(w, b))
    assert sum(c['n'] for c in res.values()) == n
    assert res == caption_accuracy(model, processor, samples, batch_size=8)

def test_bad_plans(few, tmp_path):
    for kw, message in ((dict(recipes=['smo']), "did you mean 'smoe'"),
                        (dict(preset='tiny'), "did you mean 'tiny-vlm'"),
                        (dict(preset='paper-vlm'), "data must be given for preset 'paper-vlm'"),
                        (dict(steps=0), 'steps must be'), (dict(seeds=0), 'seeds must be')):
        with pytest.raises(ValueError, match=message): vision_plan(**dict(dict(preset=few, out=tmp_path), **kw))
    assert not list(tmp_path.iterdir())

@pytest.mark.long
def test_jobs_and_hash_seeds_and_what_ran_before_give_the_same_bits(compared, few, tmp_path, monkeypatch, at_once):
    "Last stages in processes with another order of sets; shared ones here, where generators have moved on"
    root, res = compared
    plan = vision_plan(['smoe'], few, tmp_path/'alone')
    alone = [Task(f'alone {c["stage"]["name"]}', train_stage, dict(root=str(plan.root), config=c))
             for c in plan.shared[:1]]
    def with_more(tasks, **kw):
        done = side_by_side([*alone, *tasks], **kw)
        values_of(done)
        return {t.name: done[t.name] for t in tasks}
    monkeypatch.setattr(vision, 'side_by_side', with_more)
    assert int(run_forked('print(hash("smoe"))').stdout) != hash('smoe') or 'PYTHONHASHSEED' in os.environ
    random.seed(), np.random.seed(), torch.seed()
    both = vision_compare(['sharede_v3', 'moe_plus_plus'], few, tmp_path/'jobs', jobs=2, controls=False)
    assert both.results.recipe.tolist() == ['dense', 'sharede_v3', 'moe_plus_plus']
    names = [f.parent.name for f in (tmp_path/'jobs'/'stages').glob('*/model')]
    assert len(names) == 7
    for n in names: assert weights(tmp_path/'jobs', n) == weights(root, n), n
    assert weights(plan.root, stage_name(plan.shared[0])) == weights(root, stage_name(plan.shared[0]))
    told = ['id', 'condition', 'model', 'answer']
    a, b = (r.answers[told].sort_values(told).reset_index(drop=True) for r in (both, res))
    assert a.equals(b[b.model.isin(a.model)].reset_index(drop=True))
