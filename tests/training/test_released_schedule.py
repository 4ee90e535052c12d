"The learning rate of the paper's code, and everything that must not notice that there is a choice."
import warnings
from types import SimpleNamespace

import pytest, torch
from libmoe_nb.experiments.run import run_config, run_name
from libmoe_nb.experiments.vision_stages import from_size, stage_config, stage_name
from libmoe_nb.moe.config import Preset, from_saved, get_preset, presets
from libmoe_nb.training.checkpoints import Checkpoint, checkpoints, resume
from libmoe_nb.training.schedule import warmup_cosine
from libmoe_nb.training.stages import get_vision_preset
from small_runs import Stop, change_json, fit, make

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

def as_released(lr, steps, warmup, fraction):
    "torch's cosine, asked for a step at a time, and a warm-up by hand: what the paper's code is made of"
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps, eta_min=fraction * lr)
    for i in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            cosine.step(max(0, i - warmup))
        rate = opt.param_groups[0]['lr']
        yield rate / warmup * (i + 1) if i < warmup else rate

@pytest.mark.parametrize('steps, warmup', [(50, 0), (50, 7), (3, 1), (1, 0), (9, 9), (9, 20)])
def test_equals_the_schedule_of_the_released_code(steps, warmup):
    rate = warmup_cosine(2.5e-4, steps, warmup, .1, released_schedule=True)
    assert [rate(s) for s in range(steps)] == pytest.approx(list(as_released(2.5e-4, steps, warmup, .1)), rel=1e-12)

def test_presets_of_the_paper_have_it_and_no_other():
    assert {n for n, p in presets.items() if p.released_schedule} == {'paper-faithful', 'paper-0.15b', 'paper-0.68b'}

def test_a_run_is_trained_by_it(data):
    learn = make('smoe', data, released_schedule=True, warmup_steps=3, final_lr_fraction=.2)
    fit(learn)
    wanted = list(as_released(learn.lr, len(learn.recorder.lrs), 3, .2))
    assert learn.recorder.lrs == pytest.approx(wanted, rel=1e-12)
    fit(learn, released_schedule=False)
    assert learn.recorder.lrs[-1] == pytest.approx(.2 * learn.lr, rel=1e-12)

def test_a_checkpoint_of_the_other_schedule_is_refused_and_an_older_one_resumed(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(make('smoe', data, released_schedule=True, cbs=[Checkpoint(tmp_path, every=2), Stop(2)]), epochs=1)
    learn = make('smoe', data)
    resume(learn, tmp_path)
    with pytest.raises(ValueError, match='other settings: its released_schedule is True, not False'):
        fit(learn, epochs=1)
    change_json(checkpoints(tmp_path)[0], lambda info: info['settings'].pop('released_schedule'))
    resume(learn, tmp_path)
    fit(learn, epochs=1)
    assert learn.step == 3

TEXT = SimpleNamespace(fingerprint='0' * 32, domains=['a'], vocab_size=512, sequence_length=64)
NAMES = ['dense-1-2c15936e', 'xmoe-1-7dfa74dc', 'moe_plus_plus-1-16de1103',
         'dense-1-ed4f98e1', 'xmoe-1-5159d94f', 'moe_plus_plus-1-e6534e84']
STAGES = ['tower-e37fb993', 'language-95d900ea', 'pt-1de86a00', 'pft-079b7d77', 'vit-smoe-0-8a936fdc', 'tower-f87d5aba',
          'language-86edc426', 'pt-160cc2ba', 'reading-42fa05e5', 'pft-99cbea7f', 'vit-smoe-0-767492ef']

def test_no_folder_of_a_run_or_stage_has_another_name():
    assert [run_name(run_config(r, 1, get_preset(p), TEXT)) for p in ('tiny', 'mini')
            for r in ('dense', 'xmoe', 'moe_plus_plus')] == NAMES
    assert [stage_name(stage_config(s, from_size(v.size), dict(set='x'), recipe='smoe',
                                    experts=dict(num_experts=4, top_k=2)))
            for v in map(get_vision_preset, ('tiny-vlm', 'mini-vlm')) for s in v.stages] == STAGES

def test_presets_saved_before_there_was_a_choice_are_read_as_they_ran():
    old = {k: v for k, v in get_preset('paper-0.68b').to_dict().items() if k != 'released_schedule'}
    assert from_saved(Preset, old, 'Preset').released_schedule is False
