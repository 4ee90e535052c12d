"Precisions, scaled losses, and steps that are left out."
import math

import pytest, torch
from fastai.basics import Callback
from processes import run_ranks
from libmoe_nb.experiments.run import run_config
from libmoe_nb.moe.config import get_preset
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.training.checkpoints import Checkpoint, resume
from libmoe_nb.training.log import RunLog, read_log
from libmoe_nb.training.precision import LossScaling, SkipsSteps
from libmoe_nb.training.telemetry import MismatchTelemetry
from libmoe_nb.training.trackers import tracked_numbers
from small_runs import ROOT, SMALL, Stop, assert_same, fit, make, state

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

class Bad(Callback):
    "Spoils the logits, or the gradient, of some steps"
    order = 1
    def __init__(self, *steps, by=math.nan, gradient=False): self.steps, self.by, self.gradient = steps, by, gradient
    def after_pred(self):
        if not self.learn.training or self.learn.step not in self.steps or self.gradient: return
        self.learn.pred = self.pred * self.by
    def before_step(self):
        if self.learn.step in self.steps and self.gradient: next(self.learn.model.parameters()).grad[0, 0] = self.by

class Weights(Callback):
    "Those after each step"
    order = 60
    def __init__(self): self.seen = []
    def after_batch(self):
        if self.learn.training:
            self.seen.append({n: t.clone() for n, t in self.learn.model.state_dict().items()})

def biased(): return from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **SMALL)

# a scaled loss

@pytest.mark.parametrize('recipe', ['smoe', 'tcmoe', 'moe_plus_plus'])
def test_float16_trains_as_float32(recipe, data):
    a, b, c = (fit(make(recipe, data, dropout=False, steps=5, **kw), epochs=1)
               for kw in (dict(), dict(fp16=True), dict(bf16=True)))
    far = [max((p - q).abs().max().item() for p, q in zip(a.model.parameters(), x.model.parameters())) for x in (b, c)]
    assert 0 < far[0] < .02 and 0 < far[1] < .02
    assert all(p.dtype == torch.float32 for p in b.model.parameters()) and not b.loss_scaling.rows

def test_a_scale_changes_no_gradient(data):
    "A power of two, which float32 holds exactly"
    def one(scale):
        cbs = [] if scale is None else [LossScaling(scale)]
        return state(fit(make('smoe', data, cbs=cbs), epochs=1))
    assert_same(one(None), {n: t for n, t in one(2.**7).items()})

def test_a_scaled_run_goes_on_bit_for_bit(data, tmp_path):
    def made(seed=0, cbs=()):
        learn = make('smoe', data, seed=seed, fp16=True, cbs=[Checkpoint(tmp_path/'c', every=2), *cbs])
        learn.loss_scaling.scale, learn.loss_scaling.every = 2.**24, 3
        return learn
    straight = make('smoe', data, fp16=True)
    straight.loss_scaling.scale, straight.loss_scaling.every = 2.**24, 3
    whole, scaling = state(fit(straight)), straight.loss_scaling
    with pytest.raises(KeyboardInterrupt): fit(made(cbs=[Stop(5)]))
    again = made(seed=3)
    resume(again, tmp_path/'c')
    again.loss_scaling.every = 3
    assert_same(whole, state(fit(again)))
    assert scaling.rows and again.loss_scaling.rows == scaling.rows
    assert (again.loss_scaling.scale, again.loss_scaling.good) == (scaling.scale, scaling.good)

def test_an_overflow_moves_nothing(data):
    weights = Weights()
    learn = make(None, data, model=biased(), dropout=False, fp16=True,
                 cbs=[weights, Bad(2, by=math.inf, gradient=True)])
    fit(learn, epochs=1)
    assert [r['step'] for r in learn.loss_scaling.rows] == [2] and learn.loss_scaling.scale == 2.**15
    assert_same(weights.seen[0], weights.seen[1])                       # expert biases among them
    assert any(not torch.equal(t, weights.seen[2][n]) for n, t in weights.seen[1].items() if 'expert_bias' in n)

def test_precisions_are_checked(data):
    with pytest.raises(ValueError, match='fp16 must be False where bf16 is True'):
        make('smoe', data, bf16=True, fp16=True)
    with pytest.raises(ValueError, match="the dtype of the model must be float32, as an optimiser loses small steps"):
        make(None, data, model=from_scratch('smoe', 'tiny', **SMALL).half())
    with pytest.raises(ValueError, match="nonfinite must be one of stop, skip, got 'ignore'"):
        make('smoe', data, nonfinite='ignore')

def test_another_precision_is_another_run(data, tmp_path):
    config = lambda **kw: run_config('smoe', 0, get_preset('tiny'), data, **kw)
    assert config(nonfinite='stop', fp16=False) == config() and not {'fp16', 'nonfinite'} & {*config()}
    assert config(fp16=True)['fp16'] and config(nonfinite='skip')['nonfinite'] == 'skip'
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[Checkpoint(tmp_path, every=1), Stop(2)]))
    learn = make('smoe', data, fp16=True)
    resume(learn, tmp_path)
    with pytest.raises(ValueError, match='fp16 is False, not True'): fit(learn)

# steps that are left out

@pytest.mark.parametrize('how, why', [(dict(), 'loss is nan'), (dict(by=math.inf), 'loss is (nan|inf)'),
                                      (dict(by=math.inf, gradient=True), 'gradient is not finite')], ids=str)
def test_a_step_that_is_left_out_is_named(how, why, data, tmp_path):
    weights = Weights()
    learn = make(None, data, model=biased(), dropout=False, nonfinite='skip', grad_accum=2,
                 cbs=[weights, Bad(2, **how), RunLog(tmp_path/'log.jsonl')])
    with pytest.warns(UserWarning, match=f'step 2 was left out, as its {why}. It read batch 1: data.train.batches'):
        fit(learn, epochs=2)
    assert learn.step == 6 and learn.diverged is None
    (row,) = learn.skip_nonfinite.rows
    assert (row['step'], row['batch']) == (2, 1)
    assert_same(weights.seen[0], weights.seen[1])
    log = read_log(tmp_path/'log.jsonl')
    assert log[log.split == 'skipped'][['step', 'batch']].values.tolist() == [[2, 1]]
    assert math.isfinite(learn.history().train_loss.iloc[0]) and math.isfinite(learn.history().aux_loss.iloc[0])
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_nothing_is_left_out_of_a_good_run(data):
    assert_same(state(fit(make('smoe', data))), state(fit(make('smoe', data, nonfinite='skip'))))

def test_too_many_in_a_row_are_the_end(data, monkeypatch):
    monkeypatch.setattr(SkipsSteps, 'most', 3)
    learn = make('smoe', data, steps=8, nonfinite='skip', cbs=[Bad(2, 3, 5, 6, 7)])
    with pytest.warns(UserWarning, match='3 steps in a row were left out, the last because its loss is nan: training'):
        fit(learn, epochs=1)
    assert learn.diverged == learn.step == 7
    one = make('smoe', data, steps=8, nonfinite='skip', cbs=[Bad(2, 3, 5, 6, 8)])
    with pytest.warns(UserWarning): assert fit(one, epochs=1).diverged is None and one.step == 8

def test_a_run_that_stopped_goes_on_without_the_batch(data, tmp_path):
    with pytest.warns(UserWarning, match='the loss is nan at step 5: training stops here'):
        fit(make('smoe', data, cbs=[Bad(5), Checkpoint(tmp_path, every=1)]))
    again = make('smoe', data, nonfinite='skip', cbs=[Bad(5), Checkpoint(tmp_path, every=1)])
    assert resume(again, tmp_path).name == 'step-00000004'
    with pytest.warns(UserWarning, match='step 5 was left out'): fit(again)
    assert again.step == 9 and again.diverged is None

TWO = r'''
import sys, os, json, warnings
warnings.simplefilter('ignore')
sys.path[:0] = {paths!r}
import torch, test_precision as t
from pathlib import Path
from libmoe_nb.data.text import text_data
from libmoe_nb.training.distributed import *
torch.set_num_threads(1)
rank, weights = int(os.environ['RANK']), t.Weights()
data = text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir={cache!r})
learn = t.make(None, data, model=t.biased(), dropout=False, nonfinite='skip', fp16=True,
               cbs=[weights, *([t.Bad(2)] if rank else [])]).distribute(cpu=True)
t.fit(learn, epochs=1)
(row,) = learn.skip_nonfinite.rows
same = all(torch.equal(weights.seen[0][n], weights.seen[1][n]) for n in weights.seen[0])
digest = float(sum(p.double().sum() for p in learn.model.parameters()))
(Path(sys.argv[1])/f'{{rank}}.json').write_text(
    json.dumps([row['step'], row['batch'], same, digest, learn.loss_scaling.scale]))
import torch.distributed as dist; dist.barrier(); dist.destroy_process_group()
'''

def test_ranks_leave_the_same_step_out(data, cache, tmp_path):
    "The loss of one of two processes is no number"
    import json
    code = TWO.format(paths=[str(ROOT/'tests'/'training'), str(ROOT/'tests'), str(ROOT)], cache=str(cache))
    for done in run_ranks(code, tmp_path): assert done.returncode == 0, done.stderr[-3000:]
    a, b = (json.loads((tmp_path/f'{r}.json').read_text()) for r in range(2))
    assert a == b and a[:3] == [2, 1, True] and a[4] == 2.**16

# routing in training and in use

@pytest.mark.parametrize('how', [{}, dict(grad_accum=2), dict(bf16=True), dict(fp16=True)], ids=str)
def test_comparing_passes_changes_no_bit(how, data):
    watch = MismatchTelemetry(2)
    made = lambda *cbs: make('moe_plus_plus', data, cbs=cbs, **how)
    assert_same(state(fit(made())), state(fit(made(watch))))
    t = watch.table()
    assert t.step.tolist() == [s for s in (1, 2, 4, 6, 8) for _ in range(2)]
    assert (t.tokens == 128 // how.get('grad_accum', 1)).all()
    assert (t.kl > 0).all()                                             # dropout, which use has not

def test_the_same_precision_routes_the_same(data):
    for how, other in ((dict(), None), (dict(bf16=True), 'bf16'), (dict(fp16=True), 'fp16')):
        watch = MismatchTelemetry(1, other)
        fit(make('xmoe', data, dropout=False, cbs=[watch], **how), epochs=1)
        t = watch.table()
        assert t.mismatched.sum() == 0 and (t.kl == 0).all() and (t.anywhere == 0).all()
    watch = MismatchTelemetry(1)
    model = from_scratch('smoe', 'tiny', seed=0, router_init_std=.5, **SMALL)
    fit(make(None, data, model=model, dropout=False, bf16=True, cbs=[watch]), epochs=2)
    assert watch.table().mismatched.sum() > 0

def test_a_model_without_routers_has_nothing_to_compare(data):
    watch = MismatchTelemetry(1)
    fit(make('dense', data, steps=2, cbs=[watch]), epochs=1)
    assert watch.rows == [] and watch.table().empty

def test_mismatches_are_logged_and_go_on(data, tmp_path):
    cbs = lambda n: [MismatchTelemetry(2), RunLog(tmp_path/n/'log.jsonl'), Checkpoint(tmp_path/n, every=2)]
    straight = fit(make('smoe', data, bf16=True, cbs=cbs('a')))
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, bf16=True, cbs=[*cbs('b'), Stop(5)]))
    learn = make('smoe', data, bf16=True, cbs=cbs('b'))
    resume(learn, tmp_path/'b'); fit(learn)
    a, b = (read_log(tmp_path/n/'log.jsonl') for n in 'ab')
    rows = a[a.split == 'mismatch'].dropna(axis=1, how='all')
    assert rows.equals(b[b.split == 'mismatch'].dropna(axis=1, how='all')) and len(rows) == 10
    assert straight.mismatch_telemetry.rows == learn.mismatch_telemetry.rows
    told = tracked_numbers([dict(r, split='mismatch') for r in straight.mismatch_telemetry.rows if r['step'] == 2])
    assert {'mismatch/share', 'mismatch/layer_0/share', 'mismatch/layer_1/kl'} <= {*told}

def test_the_command_takes_them(tmp_path, monkeypatch):
    import json
    from typer.testing import CliRunner
    from conftest import write_texts
    from libmoe_nb import cli
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    args = ['train', 'smoe', '--data', str(write_texts(tmp_path/'texts')), '--out', str(tmp_path/'out'),
            *'--preset tiny --steps 4 --batch-size 2 --traces 512 --sequence-length 32'.split(),
            *'--vocab-size 300 --threads 1 --json'.split()]
    run = lambda *more: CliRunner().invoke(cli.app, [*args, *more], prog_name='libmoe')
    both = run('--fp16', '--bf16')
    assert both.exit_code == 2 and 'fp16 must be False where bf16 is True' in both.output
    assert not (tmp_path/'out').exists()
    assert run('--nonfinite', 'ignore').exit_code == 2
    done = run(*'--fp16 --nonfinite skip --mismatches 2'.split())
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path/'out'/'config.json').read_text())['run']
    assert config['fp16'] and config['nonfinite'] == 'skip' and not config['bf16'] and 'mismatches' not in config
    log = read_log(tmp_path/'out'/'log.jsonl')
    assert log[log.split == 'mismatch'].step.tolist() == [s for s in (1, 2, 4) for _ in range(2)]
    assert 'float16' in (tmp_path/'out'/'model'/'README.md').read_text()
    assert run().exit_code == 2                                         # the folder holds a run in float16
