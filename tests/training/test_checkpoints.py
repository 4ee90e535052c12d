"Checkpoints: killed, damaged and resumed runs, foreign ones, other settings, runs that diverge; and fresh processes."
import json, math, os, shutil, signal
from pathlib import Path

import pytest, torch
from fastai.basics import Callback
from libmoe_nb.moe.config import recipes
from libmoe_nb.data.text import text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.training.log import RunLog, read_log
from libmoe_nb.training import checkpoints as module
from libmoe_nb.training.checkpoints import Checkpoint, StepReporter, TimedCheckpoint, checkpoints, resume
from processes import run_forked
from small_runs import ROOT, SMALL, Stop, assert_same, change_json, fit, make, state

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

# in one process

def killed_and_resumed(recipe, data, folder, at, every=2, how='fit_cosine', model=lambda seed: None, **kwargs):
    with pytest.raises(KeyboardInterrupt):
        fit(make(recipe, data, model=model(0), cbs=[Checkpoint(folder, every), Stop(at)], **kwargs), how)
    torch.manual_seed(123)
    learn = make(recipe, data, seed=7, model=model(7), cbs=[Checkpoint(folder, every)], **kwargs)
    path = resume(learn, folder)
    assert learn.step == at // every * every == int(path.name[5:])
    return fit(learn, how)

@pytest.mark.parametrize('recipe', recipes)
def test_every_recipe_resumes_to_the_same_bits(recipe, data, tmp_path):
    straight = state(fit(make(recipe, data)))
    assert_same(straight, state(killed_and_resumed(recipe, data, tmp_path, at=5)))

@pytest.mark.parametrize('how, at', [('fit_cosine', 1), ('fit_cosine', 3), ('fit_cosine', 8), ('fit_one_cycle', 3),
                                     ('fit_one_cycle', 8), ('fit', 4), ('fit_flat_cos', 5)])
def test_every_schedule_resumes(how, at, data, tmp_path):
    straight = fit(make('smoe', data), how)
    resumed = killed_and_resumed('smoe', data, tmp_path, at, every=1, how=how)
    assert_same(state(straight), state(resumed))
    assert straight.recorder.lrs == resumed.recorder.lrs
    assert straight.recorder.hps == resumed.recorder.hps if hasattr(straight.recorder, 'hps') else how == 'fit'
    assert straight.history().drop(columns='tokens/s').equals(resumed.history().drop(columns='tokens/s'))

@pytest.mark.parametrize('kwargs', [dict(grad_accum=3), dict(bf16=True)], ids=str)
def test_options_resume(kwargs, data, tmp_path):
    assert_same(state(fit(make('smoe', data, **kwargs))),
                state(killed_and_resumed('smoe', data, tmp_path, at=4, **kwargs)))

def test_expert_biases_and_gradient_checkpointing_resume(data, tmp_path):
    def model(seed):
        m = from_scratch('sharede_v3', 'tiny', seed=seed, expert_bias=True, **SMALL)
        m.gradient_checkpointing_enable(dict(use_reentrant=False))
        return m
    straight = fit(make(None, data, model=model(0)))
    biases = {n: t for n, t in straight.model.state_dict().items() if n.endswith('expert_bias')}
    assert len(biases) == 2 and all(t.abs().sum() > 0 for t in biases.values())
    assert_same(state(straight), state(killed_and_resumed(None, data, tmp_path, at=5, model=model)))

def test_a_finished_run_is_not_trained_again(data, tmp_path):
    done = fit(make('smoe', data, cbs=[Checkpoint(tmp_path)]))
    again = make('smoe', data, seed=3, cbs=[Checkpoint(tmp_path)])
    resume(again, tmp_path)
    assert_same(state(done), state(fit(again)))
    assert again.step == 9 and [p.name for p in checkpoints(tmp_path)] == ['step-00000009']

def test_keep_last_and_leftovers(data, tmp_path):
    (tmp_path/'.tmp-1').mkdir(); (tmp_path/'.tmp-1'/'model.safetensors').write_text('half')
    fit(make('smoe', data, cbs=[Checkpoint(tmp_path, every=2, keep_last=3)]))
    assert sorted(os.listdir(tmp_path)) == ['step-00000006', 'step-00000008', 'step-00000009']

def test_nothing_is_pickled(data, tmp_path, monkeypatch):
    import pickle
    def never(*a, **k): raise AssertionError('pickle was used')
    learn = make('smoe', data, cbs=[Checkpoint(tmp_path)])
    for name in ('dump', 'dumps', 'load', 'loads', 'Pickler', 'Unpickler'): monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, 'save', never); monkeypatch.setattr(torch, 'load', never)
    fit(learn, epochs=1)
    resume(make('smoe', data), tmp_path)
    assert {p.suffix for p in checkpoints(tmp_path)[0].iterdir()} == {'.json', '.safetensors'}

def test_a_save_may_stop_anywhere(data, tmp_path, monkeypatch):
    "Whichever file operation of a save is the last one, a valid checkpoint is left"
    learn, calls = make('smoe', data, cbs=[Checkpoint(tmp_path, every=1, keep_last=1), Stop(2)]), [0, None]
    with pytest.raises(KeyboardInterrupt): fit(learn)
    def counted(f):
        def g(*args, **kwargs):
            calls[0] += 1
            if calls[0] == calls[1]: raise KeyboardInterrupt
            return f(*args, **kwargs)
        return g
    for owner, name in [(module, 'flush_to_disk'), (module, 'save_file'), (module, 'save_model'), (Path, 'rename'),
                        (Path, 'mkdir'), (Path, 'write_text'), (shutil, 'rmtree')]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    def save(stop=None):
        calls[:] = 0, stop
        learn.checkpoint.save()
        return calls[0]
    for step in (2, 3):                     # written over, and new
        learn.step = step
        for stop in range(1, save() + 1):
            learn.step = step
            with pytest.raises(KeyboardInterrupt): save(stop)
            calls[1] = None
            other = make('smoe', data)
            assert resume(other, tmp_path) and other.step in (2, 3), stop
            save()
            assert os.listdir(tmp_path) == [f'step-{step:08d}']

# damaged and foreign

@pytest.fixture(scope='module')
def saved(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    fit(make('smoe', data, cbs=[Checkpoint(folder, every=2, keep_last=9)]))
    return folder

def copy(saved, to, *names):
    for n in names: shutil.copytree(saved/f'step-{n:08d}', to/f'step-{n:08d}')
    return to

def damage(path, how):
    if how == 'missing': path.unlink()
    elif how == 'empty': path.write_bytes(b'')
    elif how == 'short': path.write_bytes(path.read_bytes()[:-1])
    elif how == 'long': path.write_bytes(path.read_bytes() + b' ')
    else:
        b = bytearray(path.read_bytes()); b[len(b)//2] ^= 4; path.write_bytes(b)

@pytest.mark.parametrize('file', ['model.safetensors', 'training.safetensors', 'checkpoint.json', 'config.json'])
@pytest.mark.parametrize('how', ['missing', 'empty', 'short', 'long', 'flipped'])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(file, how, saved, data, tmp_path):
    if (file, how) == ('checkpoint.json', 'long'): pytest.skip('a blank after JSON is no damage')
    folder = copy(saved, tmp_path, 6, 8)
    damage(folder/'step-00000008'/file, how)
    learn = make('smoe', data)
    with pytest.warns(UserWarning, match='step-00000008 is .*damaged'): path = resume(learn, folder)
    assert path.name == 'step-00000006' and learn.step == 6

def test_all_damaged_is_an_error_that_names_each(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6, 8)
    for p in checkpoints(folder): damage(p/'model.safetensors', 'flipped')
    with pytest.raises(ValueError, match='step-00000008 is damaged: model.safetensors.*step-00000006 is damaged'):
        resume(make('smoe', data), folder)

def test_foreign_checkpoints_are_refused(saved, data, cache, tmp_path):
    folder = copy(saved, tmp_path, 8)
    for other, what in [(make('xmoe', data), 'model'), (make('smoe', data, batch_size=2), 'batch_size'),
                        (make('smoe', data, steps=5), 'steps'),
                        (make('smoe', text_data('python', vocab_size=300, sequence_length=16, max_bytes=100_000,
                                                cache_dir=cache)), 'sequence_length'),
                        (make('smoe', text_data('python', vocab_size=300, sequence_length=32, max_bytes=90_000,
                                                cache_dir=cache)), 'data')]:
        before = {n: t.clone() for n, t in other.model.state_dict().items()}
        with pytest.raises(ValueError, match=f'of another run: its {what} is'): resume(other, folder)
        assert_same(before, other.model.state_dict())
    (folder/'step-00000009').mkdir(); (folder/'step-00000009'/'checkpoint.json').write_text('{"epoch": 1}')
    with pytest.warns(UserWarning, match='step-00000009 is no libmoe checkpoint'):
        assert resume(make('smoe', data), folder).name == 'step-00000008'

def test_no_checkpoint_is_a_fresh_start(data, tmp_path):
    assert resume(make('smoe', data), tmp_path) is None
    assert resume(make('smoe', data), tmp_path/'missing') is None

# in fresh processes

SCRIPT = r'''
import sys, os, json, signal, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import torch, small_runs as t
from fastai.basics import Callback
from libmoe_nb.data.text import text_data
from libmoe_nb.training import checkpoints as module
from libmoe_nb.training.checkpoints import Checkpoint, resume
from libmoe_nb.training.log import RunLog
from pathlib import Path
args = json.loads(sys.argv[1])
torch.set_num_threads(1)
data = text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=args['cache'])
class Kill(Callback):
    order = 100
    def after_batch(self):
        if self.learn.training and self.learn.step == args.get('kill_at'): os.kill(os.getpid(), signal.SIGKILL)
saves, flush = [], module.flush_to_disk
def killing(path):
    if Path(path).name.startswith('.tmp-'):
        saves.append(path)
        if len(saves) == args.get('kill_in_save'): os.kill(os.getpid(), signal.SIGKILL)
    return flush(path)
module.flush_to_disk = killing
folder = Path(args['folder'])
kw = dict(expert_bias=True) if args['recipe'] in ('sharede_v3', 'smoe_sigmoid') else dict()
model = t.from_scratch(args['recipe'], 'tiny', seed=args.get('seed', 0), **kw, **t.SMALL)
learn = t.make(None, data, model=model, cbs=[RunLog(folder/'log.jsonl'), Checkpoint(folder/'checkpoints', every=2),
                                             Kill()])
path = resume(learn, folder/'checkpoints')
t.fit(learn)
from safetensors.torch import save_file
save_file({{n: x.contiguous().clone() for n, x in t.state(learn).items()}}, folder/'state.safetensors')
print(path and path.name)
'''

def process(tmp_path, **args):
    code = SCRIPT.format(tests=str(ROOT/'tests'/'training'), root=str(ROOT))
    return run_forked(code, json.dumps(args), cwd=tmp_path)

def state_of(folder):
    from safetensors.torch import load_file
    return load_file(folder/'state.safetensors')

@pytest.mark.parametrize('recipe', ['sharede_v3', 'moe_plus_plus'])
def test_sigkill_in_the_middle_and_a_fresh_process(recipe, data, cache, tmp_path):
    args = dict(recipe=recipe, cache=str(cache))
    assert process(tmp_path, folder=str(tmp_path/'a'), **args).returncode == 0
    killed = process(tmp_path, folder=str(tmp_path/'b'), kill_at=5, **args)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path/'b'/'checkpoints')] == ['step-00000004', 'step-00000002']
    resumed = process(tmp_path, folder=str(tmp_path/'b'), seed=9, **args)
    assert resumed.returncode == 0 and resumed.stdout.split()[-1] == 'step-00000004', resumed.stderr
    a, b = state_of(tmp_path/'a'), state_of(tmp_path/'b')
    assert_same(a, b)
    a, b = (read_log(tmp_path/n/'log.jsonl').drop(columns=['seconds', 'tokens_per_second']) for n in 'ab')
    assert a.equals(b)

def test_sigkill_while_saving(data, cache, tmp_path):
    args = dict(recipe='xmoe', cache=str(cache), folder=str(tmp_path/'run'))
    # the second checkpoint, at step 4, is written but not yet renamed
    killed = process(tmp_path, kill_in_save=2, **args)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path/'run'/'checkpoints'
    assert [p.name for p in checkpoints(folder)] == ['step-00000002'] and list(folder.glob('.tmp-*'))
    resumed = process(tmp_path, **args)
    assert resumed.returncode == 0 and resumed.stdout.split()[-1] == 'step-00000002', resumed.stderr
    assert not list(folder.glob('.tmp-*')) and checkpoints(folder)[0].name == 'step-00000009'
    assert_same(state(fit(make('xmoe', data))), state_of(tmp_path/'run'))

# settings of a resumed run

CHANGES = [('lr', dict(lr=1e-4), '0.005, not 0.0001'), ('weight_decay', dict(weight_decay=.5), 'not 0.5'),
           ('betas', dict(betas=(.8, .99)), '0.9, not 0.8'), ('betas', dict(betas=(.9, .5)), 'not 0.5'),
           ('grad_clip', dict(grad_clip=.01), 'not 0.01'), ('warmup_steps', dict(warmup_steps=2), 'not 2'),
           ('final_lr_fraction', dict(final_lr_fraction=.9), 'not 0.9'), ('bf16', dict(bf16=True), 'False, not True')]

@pytest.mark.parametrize('name, kw, said', CHANGES, ids=str)
def test_another_setting_is_refused_or_applied_by_name(name, kw, said, saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    learn = make('smoe', data, **kw)
    resume(learn, folder)
    with pytest.raises(ValueError, match=f'other settings: its {name}.*{said}.*change='): fit(learn)
    assert learn.step == 6 and learn.resumed                  # nothing was done, and it can still go on
    resume(learn, folder, change=name)
    with pytest.warns(UserWarning, match=f'going on from step-00000006 with other settings: {name}'): fit(learn)
    h = learn.opt.hypers[0]
    assert learn.step == 9 and (h['wd'], h['mom'], h['sqr_mom']) == (kw.get('weight_decay', learn.wd),
                                                                     *kw.get('betas', (h['mom'], h['sqr_mom'])))

def killed(data, folder, how):
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[Checkpoint(folder, every=6), Stop(6)]), how)

@pytest.mark.parametrize('how, kw, name',
                         [('fit_cosine', dict(lr=1e-4), 'lr'), ('fit_cosine', dict(wd=.3), 'weight_decay'),
                          ('fit_cosine', dict(warmup_steps=1), 'warmup_steps'), ('fit_one_cycle', {}, 'schedule of'),
                          ('fit', {}, 'lr')])
def test_what_the_fit_is_told_counts_too(how, kw, name, saved, data, tmp_path):
    folder = tmp_path
    if how == 'fit_cosine': copy(saved, tmp_path, 6)
    else: killed(data, tmp_path, how)
    learn = make('smoe', data)
    resume(learn, folder)
    other = dict(kw) if how == 'fit_cosine' else dict(lr_max=1e-4) if how == 'fit_one_cycle' else dict(lr=1e-4)
    with pytest.raises(ValueError, match=f'other settings: its {name}'): fit(learn, how, **other)
    fit(learn, how)                                           # as it was asked at first
    assert learn.step == 9

def test_epochs_losses_and_configuration_are_settings(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    for other, epochs, name in [(make('smoe', data), 4, 'epochs'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', router_aux_loss_coef=.5,
                                                                       **SMALL)), 3, 'model.moe.router_aux_loss_coef'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', top_k=2, **SMALL)),
                                 3, 'model.moe.top_k'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', routed_scaling_factor=2.,
                                                                       **SMALL)), 3, 'model.moe.options')]:
        resume(other, folder)
        with pytest.raises(ValueError, match=name): fit(other, epochs=epochs)

def test_what_changes_roundings_only_is_applied_and_said(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    same, parts = make('smoe', data, dropout=False), make('smoe', data, dropout=False, grad_accum=2)
    for l in (same, parts): resume(l, folder)
    fit(same)
    with pytest.warns(UserWarning, match='grad_accum is 2, was 1'): fit(parts)
    assert all(torch.allclose(a, b, atol=1e-3)
               for a, b in zip(same.model.state_dict().values(), parts.model.state_dict().values()))

def test_checkpoints_without_settings_go_on(saved, data, tmp_path):
    change_json(copy(saved, tmp_path, 6)/'step-00000006', lambda info: info.pop('settings'))
    learn = make('smoe', data)
    resume(learn, tmp_path)
    assert fit(learn).step == 9

# diverged runs

@pytest.mark.parametrize('grad_clip', [0, 1.])
def test_a_diverged_run_stops_and_keeps_its_checkpoints(grad_clip, data, tmp_path):
    class Ruin(Callback):
        order = -50
        def before_batch(self):
            if self.learn.training and self.learn.step == 5:
                with torch.no_grad(): self.learn.model.get_input_embeddings().weight.fill_(math.inf)
    learn = make('smoe', data, grad_clip=grad_clip,
                 cbs=[Ruin(), RunLog(tmp_path/'m.jsonl'), Checkpoint(tmp_path/'c', every=1)])
    with pytest.warns(UserWarning, match='the loss is nan at step 6: training stops here'): fit(learn)
    assert (learn.step == learn.diverged == 6
            and [p.name for p in checkpoints(tmp_path/'c')] == ['step-00000005', 'step-00000004'])
    rows = read_log(tmp_path/'m.jsonl')
    assert (rows[rows.split == 'train'].step.tolist() == [1, 2, 3, 4, 5, 6] and (rows.split == 'valid').sum() == 2
            and rows.loss.isna().sum() == 2)
    again = make('smoe', data, grad_clip=grad_clip, lr=1e-3)
    resume(again, tmp_path/'c', change='lr')
    with pytest.warns(UserWarning, match='lr is 0.001, was 0.005'):
        assert fit(again).step == 9 and again.diverged is None

def test_weights_that_are_no_numbers_push_out_no_checkpoint(data, tmp_path):
    class Ruin(Callback):
        order = 40
        def after_step(self):
            if self.learn.step == 9:
                with torch.no_grad(): self.learn.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.warns(UserWarning, match='no checkpoint was saved at step 9'):
        fit(make('smoe', data, cbs=[Ruin(), Checkpoint(tmp_path, every=3)]))
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000006', 'step-00000003']

# folders of runs, in Python and on the command line

def test_a_folder_says_what_differs(tmp_path):
    from libmoe_nb.experiments import compare as experiments
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts'/'a.txt').write_text('\n\n'.join(f'line {i} ' + 'word ' * (i % 7 + 3) for i in range(3000)))
    small = dict(preset='tiny', out=tmp_path/'run', progress=None, steps=4, batch_size=2, sequence_length=16,
                 hidden_size=16, head_dim=8, vocab_size=300, valid_tokens=256, cache_dir=tmp_path/'cache')
    def killed(**kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        experiments.train('smoe', tmp_path/'texts', **dict(small, progress=lambda what, *a, **k: killed()
                                                           if what == 'step' and k['step'] == 2 else None))
    for kw, told in [(dict(learning_rate=1e-4), 'preset.learning_rate is 0.005, not 0.0001'),
                     (dict(weight_decay=.3), 'preset.weight_decay is .*, not 0.3'),
                     (dict(grad_clip=.2), 'preset.grad_clip is .*, not 0.2'),
                     (dict(warmup_steps=3), 'preset.warmup_steps is .*, not 3'),
                     (dict(bf16=True), 'bf16 is False, not True'),
                     (dict(betas=(.8, .9)), 'preset.betas is .*, not .0.8, 0.9.')]:
        with pytest.raises(ValueError, match=f'another configuration: its {told}'):
            experiments.train('smoe', tmp_path/'texts', **dict(small, **kw))
    assert checkpoints(tmp_path/'run'/'checkpoints')[0].name == 'step-00000002'
    assert experiments.train('smoe', tmp_path/'texts', **small)['tokens'] == 4 * 2 * 16

# by the clock, and told of each step

@pytest.mark.parametrize('seconds, at_end, left', [(0, True, 9), (0, False, 9), (3600, True, 9), (3600, False, None)])
def test_saving_by_the_clock(seconds, at_end, left, data, tmp_path):
    fit(make('smoe', data, cbs=[TimedCheckpoint(tmp_path, seconds, at_end)]))
    assert [p.name for p in checkpoints(tmp_path)] == ([f'step-{left:08d}'] if left else [])

def test_an_interruption_that_is_told_is_saved(data, tmp_path):
    told = []
    def tell(**kw):
        told.append(kw)
        if kw['step'] == 5: raise KeyboardInterrupt
    save = TimedCheckpoint(tmp_path, 3600)
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[save, StepReporter(tell, save)]))
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000005'] and len(told) == 5
    assert set(told[0]) == {'step', 'loss', 'tokens_per_second'} and told[0]['loss'] > 0
    learn = make('smoe', data, seed=9, cbs=[StepReporter(lambda **kw: None)])
    resume(learn, tmp_path)
    assert_same(state(fit(make('smoe', data))), state(fit(learn)))
