"`libmoe vlm` and `libmoe ask`, with scenes and with folders of real classes."
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner
from cli_runner import libmoe
from libmoe_nb import cli

pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('undrawn')]

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "A SigLIP model and a Phi-3 with random weights, as the hub has them, and conversations in LLaVA's layout"
    from transformers import Phi3Config, Phi3ForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel
    from libmoe_nb.data.scenes import scene_words, write_scenes
    from libmoe_nb.models.asking import small_processor
    root = tmp_path_factory.mktemp('real')
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    SiglipModel(SiglipConfig(text_config=dict(sizes, vocab_size=50),
                             vision_config=dict(sizes, image_size=32, patch_size=8))).save_pretrained(root/'siglip')
    SiglipImageProcessorPil(size=dict(height=32, width=32)).save_pretrained(root/'siglip')
    tokenizer = small_processor(scene_words(), 32, 8).tokenizer
    Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1,
                               eos_token_id=2)).save_pretrained(root/'phi3')
    tokenizer.save_pretrained(root/'phi3')
    for what in ('caption', 'questions'): write_scenes(root/what, 12, what=what, size=32)
    with_bad_ones(root/'questions')
    return root

def with_bad_ones(folder):
    "The same conversations and some that cannot be used, in bad.json"
    entries = json.loads((folder/'conversations.json').read_text())
    picture = entries[0]['image']
    (folder/'images'/'corrupt.png').write_bytes((folder/'images'/picture).read_bytes()[:60])
    def bad(name, image, question, answer='red'):
        turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
        return dict(id=name, image=image, conversations=turns, subtasks=['color'])
    asked = '<image>\nwhat color is it ?'
    entries += [bad('corrupt', 'corrupt.png', asked), bad('gone', 'gone.png', asked), bad('empty', picture, asked, ''),
                bad('no mark', picture, 'what color is it ?'), bad('two marks', picture, f'<image> {asked}'),
                bad('too long', picture, asked + ' what' * 5000)]
    (folder/'bad.json').write_text(json.dumps(entries))

def test_the_papers_stages_on_folders_of_real_classes(real, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    where = ('--preset', 'paper-vlm', '--out', tmp_path, '--tower', real/'siglip', '--language-model', real/'phi3')
    data = [a for s, f in (('pt', 'caption'), ('pft', 'caption'), ('vit', 'questions'))
            for a in ('--data', f'{s}={real/f/"conversations.json"}')]
    res = json.loads(libmoe('vlm', 'pretrain', *where, *data, '--json'))
    assert [(s['stage'], s['steps']) for s in res['stages']] == [('pt', 1), ('pft', 1)]    # one epoch of 12 samples
    moe = ('--num-experts', 4, '--top-k', 2)
    data[-1] = f"vit={real/'questions'/'bad.json'}"
    r = CliRunner().invoke(cli.app, [*map(str, ('vlm', 'finetune', 'smoe', *where, *data, *moe, '--test',
                                                real/'questions'/'bad.json', '--json'))])
    assert r.exit_code == 0, r.output
    res, said = json.loads(r.stdout), ' '.join(r.stderr.split())
    for why in ('an answer is empty (empty)', '0 image marks for 1 image (no mark)',
                '2 image marks for 1 image (two marks)', 'an image cannot be read (corrupt)',
                'an image is missing (gone)', 'no answer begins within max_length=2048 (too long)',
                'question and answer must fit into 4096 tokens'):
        assert f'1 sample left out: {why}' in said, why
    names = json.loads((Path(res['stages'][0]['model']).parent/'left_out.json').read_text())
    assert sorted(n for some in names.values() for n in some) == ['corrupt', 'empty', 'gone', 'no mark', 'too long',
                                                                  'two marks']
    assert (res['results'][0]['recipe'] == 'smoe'
            and res['stages'][0]['parameters'] > res['stages'][0]['active_parameters'])
    picture, model = next((real/'questions'/'images').glob('*.png')), res['stages'][0]['model']
    said = json.loads(libmoe('ask', picture, 'how many objects are there ?', '--model', model, '--max-new-tokens',
                             3, '--json'))
    assert said['model'] == model and isinstance(said['answer'], str)
    assert 'finished already' in CliRunner().invoke(cli.app,
                                                    [str(a) for a in ('vlm', 'pretrain', *where, *data)]).stderr

def test_mistakes_are_sentences_before_any_work(real, tmp_path):
    f = real/'caption'/'conversations.json'
    for args, message in (
            (('pretrain', '--preset', 'tiny'), "did you mean 'tiny-vlm'"),
            (('pretrain', '--preset', 'paper-vlm'), "--tower must be given for preset 'paper-vlm'"),
            (('pretrain', '--tower', real/'siglip'), '--language-model must be given too'),
            (('pretrain', '--language-model', real/'phi3'), '--tower must be given too'),
            (('pretrain', '--tower', real/'siglip', '--language-model', real/'phi3'), '--data must be given'),
            (('pretrain', '--tower', './nowhere', '--language-model', real/'phi3', '--data', f),
             'which does not exist'),
            (('pretrain', '--data', 'pf=x.json', '--tower', real/'siglip', '--language-model', real/'phi3'),
             "unknown stage in --data 'pf'"),
            (('pretrain', '--data', 'x.json', '--tower', real/'siglip', '--language-model', real/'phi3'),
             '--data must be a file'),
            (('pretrain', '--steps', '0'), 'steps must be'), (('finetune', 'smo'), "did you mean 'smoe'"),
            (('finetune', 'smoe', '--seed', '-1'), 'seed must be'),
            (('compare', '--recipes', 'smoe,xmo'), "did you mean 'xmoe'"),
            (('compare', '--seeds', '0'), 'seeds must be'), (('compare', '--jobs', '0'), 'jobs must be'),
            (('pretrain', '--fp16', '--bf16'), 'fp16 must be False where bf16 is True'),
            (('pretrain', '--nonfinite', 'ignore'), 'nonfinite must be one of stop, skip'),
            (('pretrain', '--device', 'gpu'), 'device must be'), (('pretrain', '--out', f), 'it is a file')):
        assert (message in libmoe('vlm', *args, '--out', tmp_path/'out', code=2) if '--out' not in args
                else libmoe('vlm', *args, code=2)), args
    assert not (tmp_path/'out').exists()

@pytest.mark.long
def test_stages_in_float16_that_leave_out_a_step_without_a_loss(tmp_path, monkeypatch):
    from libmoe_nb.experiments import vision_stages
    from libmoe_nb.training.stages import vision_presets
    p, learners, make = vision_presets['tiny-vlm'], [], vision_stages.vision_learner
    monkeypatch.setitem(vision_presets, 'tiny-vlm', replace(p, scenes=16))
    monkeypatch.setattr(vision_stages, 'vision_learner',
                        lambda *a, **kw: learners.append(make(*a, **kw)) or learners[-1])
    libmoe('vlm', 'pretrain', '--preset', 'tiny-vlm', '--steps', 1, '--fp16', '--nonfinite', 'skip', '--out', tmp_path)
    n = len(learners)
    assert n >= 4 and all(l.fp16 and not l.bf16 and l.skip_nonfinite.rows == [] for l in learners)
    libmoe('vlm', 'pretrain', '--preset', 'tiny-vlm', '--steps', 1, '--out', tmp_path)
    assert len(learners) >= n + 4 and not any(l.fp16 for l in learners[n:])                # stages of their own

def test_mistakes_in_a_question(real, tmp_path):
    picture = next((real/'questions'/'images').glob('*.png'))
    assert 'IMAGE must be a file' in libmoe('ask', 'nowhere.png', 'what ?', '--model', real, code=2)
    assert 'QUESTION must be text' in libmoe('ask', picture, ' ', '--model', real, code=2)
    assert 'which does not exist' in libmoe('ask', picture, 'what ?', '--model', './nowhere', code=2)
    assert 'must be a LLaVA' in libmoe('ask', picture, 'what ?', '--model', real/'phi3', code=2)
    assert '--max-new-tokens must be at least 1' in libmoe('ask', picture, 'what ?', '--model', real,
                                                           '--max-new-tokens', 0, code=2)

@pytest.mark.long
def test_tables_of_80_columns(tmp_path, monkeypatch):
    from libmoe_nb.training.stages import vision_presets
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setitem(vision_presets, 'tiny-vlm', replace(vision_presets['tiny-vlm'], scenes=16, test_scenes=6))
    out = libmoe('vlm', 'compare', '--recipes', 'smoe', '--preset', 'tiny-vlm', '--steps', 2, '--out', tmp_path,
                 '--jobs', 1)
    assert 'question only' in out and 'accuracy by subtask' in out
    assert max(len(l.rstrip()) for l in out.splitlines() if 'model:' not in l and 'ask it' not in l
               and 'Not shown' not in l) <= 80
