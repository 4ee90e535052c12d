"The trackers themselves: what they stored is read back, after a whole run and after one that was killed and resumed."
import contextlib, importlib.util, json, math, os, sqlite3, struct
import pytest
from processes import run_forked

needs = lambda name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f'{name} is not installed')

ALL = [n for n in ('tensorboard', 'trackio', 'wandb') if importlib.util.find_spec(n)]
RUN = '''
import contextlib, json, sys, warnings
warnings.filterwarnings('ignore')
from pathlib import Path
import transformers
from libmoe_nb.data.text import text_data
from libmoe_nb.training.trackers import TelemetryLogger
from libmoe_nb.models.causal import from_scratch
from fastai.basics import Callback
from libmoe_nb.training.checkpoints import Checkpoint, resume
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.log import RunLog
from libmoe_nb.training.telemetry import RoutingTelemetry
transformers.logging.set_verbosity_error()
folder, trackers = Path(sys.argv[1]), sys.argv[2:]
data = text_data('python', vocab_size=512, sequence_length=32, max_bytes=200_000)
class Kill(Callback):
    order = 90
    def after_batch(self):
        if self.learn.step == 8: raise KeyboardInterrupt('killed')
def learner(*cbs):
    model = from_scratch('smoe', 'tiny', vocab_size=data.vocab_size, seed=0)
    logs = [TelemetryLogger(t, folder/t, 'moe', config=dict(a=1), **(dict(mode='offline') if t == 'wandb' else {}))
            for t in trackers]
    return moe_learner(model, data, preset='tiny', batch_size=2, steps=10, valid_steps=1, domains=True,
                       cbs=[RoutingTelemetry(5), RunLog(folder/'log.jsonl'), Checkpoint(folder/'ckpt', every=6), *logs,
                            *cbs])
for more in [Kill()], []:
    learn = learner(*more)
    if not more: print(resume(learn, folder/'ckpt'), file=sys.stderr)
    with learn.no_bar(), learn.no_logging(), contextlib.suppress(KeyboardInterrupt): learn.fit_cosine()
'''

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run that was killed in step 8 and resumed from step 6, told to all trackers; its folder and what its log says"
    folder = tmp_path_factory.mktemp('run')
    env = dict(os.environ, PYTHONWARNINGS='ignore', TRACKIO_DIR=str(folder/'trackio'),
               **{f'WANDB_{k}': str(folder/'w') for k in ('DIR', 'CACHE_DIR', 'CONFIG_DIR', 'DATA_DIR')})
    done = run_forked(RUN, folder, *ALL, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ''
    return folder, [json.loads(l) for l in (folder/'log.jsonl').read_text().splitlines()]

def expected(rows):
    "name -> {step: value} that a tracker must hold, as the log has it"
    want = {}
    for r in rows:
        prefix = {'routing': f"routing/layer_{r.get('layer')}"}.get(r['split'], r['split'])
        for k, v in r.items():
            if isinstance(v, (int, float)) and k not in ('step', 'epoch', 'layer', 'tokens'):
                want.setdefault(f'{prefix}/{k}', {})[r['step']] = v
    for k in ('load_max_mean', 'margin', 'entropy', 'dead_experts'):
        steps = {r['step'] for r in rows if r['split'] == 'routing'}
        want[f'routing/{k}'] = {s: sum(v := [r[k] for r in rows if r['split'] == 'routing' and r['step'] == s]) / len(v)
                                for s in steps}
    return want

TIMES = ('seconds', 'per_second')

def check(points, rows):
    "points: name -> list of (step, value)"
    want = expected(rows)
    assert {'train/loss', 'train/aux_loss', 'train/tokens_per_second', 'valid/perplexity', 'valid/perplexity_python',
            'routing/load_max_mean', 'routing/dead_experts', 'routing/margin',
            'routing/layer_1/entropy', 'routing/layer_0/load_balancing_loss'} <= set(points)
    assert set(want) <= set(points)
    for name, values in want.items():
        got = points[name]
        assert [s for s, _ in got] == sorted(values), name                       # each step once, in order
        if name.endswith(TIMES): continue                                        # a step made again takes another time
        assert all(math.isclose(v, values[s], rel_tol=1e-5, abs_tol=1e-7) for s, v in got), name

@needs('tensorboard')
def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, rows = run
    events = EventAccumulator(str(folder/'tensorboard'), size_guidance=dict(scalars=0)).Reload()
    check({n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()['scalars']}, rows)
    assert any('config' in t for t in events.Tags()['tensors'])

@needs('trackio')
def test_trackio(run):
    folder, rows = run
    (db,) = (folder/'trackio').glob('moe*.db')
    points, names = {}, set()
    with contextlib.closing(sqlite3.connect(db)) as c:
        for step, name, metrics in c.execute('select step, run_name, metrics from metrics order by id'):
            names.add(name)
            for k, v in json.loads(metrics).items():
                if isinstance(v, (int, float)): points.setdefault(k, []).append((step, v))
    assert names == {'trackio'}
    check(points, rows)

def records(path):
    "The records of a .wandb file: blocks of 32 KiB; a record has checksum, length, part (1: whole, 2: first, 4: last)"
    data, i, parts = path.read_bytes(), 7, b''
    while i + 7 <= len(data):
        if 32768 - i % 32768 < 7: i += 32768 - i % 32768
        _, n, kind = struct.unpack('<IHB', data[i:i + 7])
        if not kind: break
        parts, i = parts + data[i + 7:i + 7 + n], i + 7 + n
        if kind in (1, 4): yield parts; parts = b''

@needs('wandb')
def test_wandb_offline(run):
    from wandb.proto.wandb_internal_pb2 import Record
    folder, rows = run
    points, ids, configs = {}, set(), []
    for f in sorted((folder/'wandb').rglob('run-*.wandb'), key=lambda p: p.stat().st_mtime):
        for data in records(f):
            kind = (record := Record.FromString(data)).WhichOneof('record_type')
            if kind == 'run':
                ids.add(record.run.run_id)
                configs += [i.key for i in record.run.config.update]
            if kind != 'history': continue
            values = {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for k, v in values.items():
                if not k.startswith('_'): points.setdefault(k, []).append((values['_step'], v))
    assert len(ids) == 1 and 'a' in configs
    check(points, rows)

def test_without_a_package_training_does_not_begin(monkeypatch, tmp_path):
    from libmoe_nb.training.trackers import TelemetryLogger
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None)
    with pytest.raises(ValueError, match=r"to='wandb' needs the package wandb: pip install 'libmoe-nb\[wandb\]'"):
        TelemetryLogger('wandb', tmp_path)
    with pytest.raises(ValueError, match="'tensorbord'"): TelemetryLogger('tensorbord', tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_learner_without_a_log_is_told():
    from libmoe_nb.training.trackers import LivePlot
    from libmoe_nb.training.learner import moe_learner
    from libmoe_nb.data.text import text_data
    from libmoe_nb.models.causal import from_scratch
    data = text_data('python', vocab_size=512, sequence_length=32, max_bytes=200_000)
    learn = moe_learner(from_scratch('smoe', 'tiny', vocab_size=data.vocab_size), data, preset='tiny', batch_size=2,
                        steps=2, cbs=LivePlot())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='RunLog'): learn.fit_cosine()

def test_nothing_is_imported_before_it_is_used():
    code = ('import sys, libmoe_nb.training.trackers; print(*({"tensorboard", "trackio", "wandb", '
            '"torch.utils.tensorboard"} & set(sys.modules)))')
    done = run_forked(code)
    assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr
