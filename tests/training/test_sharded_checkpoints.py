"A model in pieces: what two processes save, two, one and two again go on from, and nobody sees half of it."
import json, shutil, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from fastai.basics import Callback, OptimWrapper
from processes import run_ranks
from safetensors.torch import load_file
from launch_settings import told_by
from small_runs import Stop
from transformers.distributed import DistributedConfig
from typer.testing import CliRunner
from libmoe_nb.cli import app
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from libmoe_nb.models.causal import MoEForCausalLM, from_scratch
from libmoe_nb.training.checkpoints import (Checkpoint, checkpoints, consolidate, resume, save_checkpoint,
                                            StepReporter, TimedCheckpoint)
from libmoe_nb.training.distributed import *
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.pieces import is_sharded, stored_pieces, whole_tensors
from libmoe_nb.training.telemetry import RoutingTelemetry

pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:going on from'),
              pytest.mark.skipif('ep_size' not in DistributedConfig.__dataclass_fields__,
                                 reason='this transformers spreads no experts')]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             sequence_length=16, vocab_size=50, num_experts=4, top_k=2, expert_bias=True, router_init_std=.3,
             aux_loss_group='global_batch', router_aux_loss_coef=.1)
# name -> recipe, and how transformers shares the model; None: as `fsdp2.yaml` says
KINDS = dict(fsdp=('smoe', None), ep=('tcmoe', dict(fsdp_size=2, ep_size=2)))

class Texts:
    "Batches of random sequences, of which the number of the batch says which"
    sequence_length = 16
    def __len__(self): return 4
    def batches(self, batch_size, seed=0, start=0):
        while True:
            ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(start))
            yield dict(input_ids=ids[:, :16], labels=ids[:, 1:], domain=torch.zeros_like(ids[:, 1:]))
            start += 1
    def epoch(self, batch_size): return iter([next(self.batches(batch_size, start=99))])

class Draws(Callback):
    "Keeps what each process draws in each step; the second one draws more often, so that their generators differ"
    order = -20
    def __init__(self): self.drawn = []
    def before_batch(self):
        if not self.training: return
        group = torch.distributed.is_initialized()
        for _ in range(1 + (group and torch.distributed.get_rank())): x = torch.rand(()).item()
        self.drawn.append(x)

def spread(folder, kind):
    how = KINDS[kind][1]
    more = {} if how is None else dict(distributed_config=DistributedConfig(**how))
    return MoEForCausalLM.from_pretrained(folder/kind, **more)

def learner(model, checkpoint=None, stop=None, distribute=False, dropout=0., more=()):
    "AdamW that divides by no tiny number, so that rounding stays rounding"
    for m in model.modules():
        if hasattr(m, 'attention_dropout'): m.attention_dropout = dropout
    data = SimpleNamespace(train=Texts(), valid=Texts(), domains=['a'], vocab_size=50, sequence_length=16,
                           fingerprint='x')
    draws = Draws()
    cbs = [RoutingTelemetry(every=1), draws, *([Checkpoint(checkpoint, every=1, keep_last=9)] if checkpoint else []),
           *([Stop(stop)] if stop else []), *more]
    learn = moe_learner(model, data, preset='tiny', batch_size=4, steps=3, lr=.02, device='cpu', cbs=cbs,
                        warmup_steps=1)
    learn.opt_func = partial(OptimWrapper, opt=partial(torch.optim.AdamW, eps=1e-2))
    if distribute: learn.distribute(cpu=True)
    return learn

def run(learn, folder=None):
    "Go on from `folder`, to the end or to where a `Stop` kills the run; what it came to"
    path = folder and resume(learn, folder)
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_cosine(2)
    except KeyboardInterrupt: pass
    whole = lambda t: (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()
    return dict({n: whole(t) for n, t in learn.model.state_dict().items()},
                losses=torch.stack(list(learn.recorder.losses)),
                telemetry=torch.tensor(learn.routing_telemetry.table().to_numpy(dtype='float64')),
                drawn=torch.tensor(learn.draws.drawn[-2:])), path and path.name

def furthest(a, b, but=('drawn',)):
    assert sorted(a) == sorted(b)
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a if n not in but)

def begun(folder):
    "On each of two processes: two runs that are not interrupted, one that is killed after two steps, then one goes on"
    told = {}
    for kind in KINDS:
        start = lambda **kw: learner(spread(folder, kind), distribute=True, **kw)
        straight, _ = run(start(dropout=.2))
        run(start(checkpoint=folder/f'{kind}-killed', stop=4, dropout=.2))
        torch.manual_seed(99 + torch.distributed.get_rank())
        learn = start(checkpoint=folder/f'{kind}-killed', dropout=.2)
        again, name = run(learn, folder/f'{kind}-killed')
        told[kind] = dict(sharded=is_sharded(learn.model), layers=sum('FSDP' in type(m).__name__ for m in
                          learn.model.modules()), name=name, different=furthest(straight, again, ()))
        run(start(checkpoint=folder/kind/'run', stop=2))
    told['full'] = refused = []
    write, learn = HuggingFaceStorageWriter.write_data, learner(spread(folder, 'ep'), distribute=True, stop=1)
    run(learn)
    def full(self, *args):
        if torch.distributed.get_rank() == 1: raise OSError(28, 'No space left on device')
        return write(self, *args)
    HuggingFaceStorageWriter.write_data = full
    try: save_checkpoint(learn, folder/'full')
    except OSError as e: refused.append(str(e).replace(str(folder), '...'))
    HuggingFaceStorageWriter.write_data = write
    # the first process's clock says when to save, and who interrupts it stops both
    steps, save = [], TimedCheckpoint(folder/'timed', 3600 * torch.distributed.get_rank())
    def tell(step, **facts):
        steps.append(step)
        if step == 2: raise KeyboardInterrupt
    learn = learner(spread(folder, 'ep'), distribute=True, more=[save, StepReporter(tell, save)])
    run(learn)
    told['interrupted'] = steps, learn.step
    return told

def ended(folder):
    "On each of two processes: go on with what one process went on with"
    told = {}
    for kind in KINDS:
        learn = learner(spread(folder, kind), distribute=True)
        told[kind], name = run(learn, folder/kind/'run')
        assert name == 'step-00000004' and is_sharded(learn.model), name
    return told

def saved(folder):
    "On each of two processes: two steps"
    run(learner(spread(folder, 'ep'), distribute=True, checkpoint=folder/'ep'/'run', stop=2))
    return {}

LOAD = '''
import json, logging, os, sys, time, torch, warnings
from pathlib import Path
warnings.simplefilter('ignore')
os.environ.update({env!r})
sys.path[:0] = {paths!r}
import test_sharded_checkpoints as t
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')
logging.getLogger('torch.distributed.tensor').setLevel(logging.ERROR)
folder, r = Path(sys.argv[1]), torch.distributed.get_rank()
for what in {todo!r}:
    torch.save(getattr(t, what)(folder), folder/f'{{what}}{{r}}.tmp')
    (folder/f'{{what}}{{r}}.tmp').rename(folder/f'{{what}}{{r}}.pt')
    while what == 'begun' and not (folder/'go on').exists(): time.sleep(.05)
torch.distributed.barrier(); torch.distributed.destroy_process_group()
'''

def on_two(folder, *todo):
    here = Path(__file__).resolve()
    paths = [str(here.parents[i]) for i in range(3)]
    for done in run_ranks(LOAD.format(env=told_by('fsdp2'), paths=paths, todo=todo), folder):
        assert done.returncode == 0, done.stderr[-3000:]

def told(what, folder): return [torch.load(folder/f'{what}{r}.pt', weights_only=True) for r in range(2)]

def go_on_alone(folder):
    "One process takes each run from its second step to its fourth; what was there before"
    saved = {kind: {p.name: sorted(q.relative_to(p).as_posix() for q in p.rglob('*') if q.is_file())
                    for p in checkpoints(folder/kind/'run')} for kind in KINDS}
    for kind in KINDS:
        learn = learner(MoEForCausalLM.from_pretrained(folder/kind), checkpoint=folder/kind/'run', stop=4)
        assert run(learn, folder/kind/'run')[1] == 'step-00000002'
    return saved

def made(folder, kind):
    "A model in the folder of its kind, and what one process makes of it"
    recipe = KINDS[kind][0]
    options = dict(negative_offset=0., null_offset=0.) if recipe == 'tcmoe' else {}
    model = from_scratch(recipe, 'tiny', seed=0, **SIZES | options)
    model.save_pretrained(folder/kind)
    return run(learner(model))[0]

def test_two_processes_save_and_one_goes_on(tmp_path):
    whole = made(tmp_path, 'ep')
    on_two(tmp_path, 'saved')
    path = tmp_path/'ep'/'run'/'step-00000002'
    assert len([*path.glob('*/shard-*')]) == 4
    a, name = run(learner(MoEForCausalLM.from_pretrained(tmp_path/'ep'), checkpoint=path.parent), path.parent)
    assert name == path.name and furthest(a, whole) < 1e-4
    at_two, model = whole_tensors(path/'model'), MoEForCausalLM.from_pretrained(consolidate(path, tmp_path/'model'))
    assert all(torch.equal(at_two[n], t) for n, t in model.state_dict().items())

@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    "Two processes begin, one goes on while they wait, and they end it; and one that does all of it"
    folder, threads = tmp_path_factory.mktemp('pieces'), torch.get_num_threads()
    torch.set_num_threads(1)
    whole = {kind: made(folder, kind) for kind in KINDS}
    with ThreadPoolExecutor(1) as pool:
        both = pool.submit(on_two, folder, 'begun', 'ended')
        try:
            while not all((folder/f'begun{r}.pt').exists() for r in range(2)) and not both.done(): time.sleep(.05)
            if both.done(): both.result()
            saved = go_on_alone(folder)
        finally: (folder/'go on').touch()
        both.result()
    torch.set_num_threads(threads)
    return SimpleNamespace(folder=folder, whole=whole, first=told('begun', folder), saved=saved,
                           last=told('ended', folder))

@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_go_on_bit_for_bit(chain, kind):
    "With dropout, and with other numbers drawn in each process"
    for both in chain.first:
        t = both[kind]
        assert t['sharded'] and t['layers'] >= 3 and t['name'] == 'step-00000004' and t['different'] == 0, t

@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_two_begin_one_goes_on_two_end(chain, kind):
    a, b = (both[kind] for both in chain.last)
    assert furthest(a, b) == 0
    assert len(a['losses']) == len(chain.whole[kind]['losses']) == 6
    assert furthest(a, chain.whole[kind]) < 1e-4
    biases = [n for n in a if n.endswith('expert_bias')]
    assert len(biases) == 2 and all(torch.equal(a[n], chain.whole[kind][n]) and a[n].any() for n in biases)

@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_each_process_writes_its_own(chain, kind):
    assert chain.saved[kind]['step-00000002'] == [
        'checkpoint.json', 'config.json', *[f'{d}/shard-0000{r}-model-00001-of-00001.safetensors' for d in
                                            ('model', 'optimizer') for r in (1, 2)], 'training.safetensors']
    path = chain.folder/kind/'run'/'step-00000002'
    sizes = [p.stat().st_size for p in sorted((path/'model').iterdir())]
    assert max(sizes) < .6 * sum(sizes)                       # nobody has all
    held = stored_pieces(path/'optimizer')
    assert {n.rpartition('.')[2] for n in held} == {'exp_avg', 'exp_avg_sq'}
    begins = {p.read_bytes()[:4] for p in path.rglob('*') if p.is_file()}
    assert not [b for b in begins if b == b'PK\x03\x04' or b[:1] == b'\x80']               # no pickle

@pytest.mark.long
def test_if_one_process_cannot_write_all_raise_and_nothing_is_there(chain):
    for both in chain.first:
        error, = both['full']
        assert error.startswith('process 1 could not write to .../full/.tmp-') and 'No space left' in error, error
    assert checkpoints(chain.folder/'full') == []

@pytest.mark.long
def test_one_clock_and_one_interruption_for_all(chain):
    assert [both['interrupted'] for both in chain.first] == [([1, 2], 2), ([], 2)]
    assert [p.name for p in checkpoints(chain.folder/'timed')] == ['step-00000002']

def fresh(chain, kind='ep'): return learner(MoEForCausalLM.from_pretrained(chain.folder/kind))

@pytest.mark.long
def test_damage_is_refused_and_the_one_before_is_used(chain, tmp_path):
    shutil.copytree(chain.folder/'ep-killed', tmp_path/'run')
    newest, before = checkpoints(tmp_path/'run')[:2]
    shard = next((newest/'optimizer').glob('shard-00002*'))
    data = bytearray(shard.read_bytes()); data[-1] ^= 1; shard.write_bytes(data)
    with pytest.warns(UserWarning, match=r'damaged: optimizer/shard-00002.* is not what was written; using step-'):
        assert resume(fresh(chain), tmp_path/'run') == before
    for p in checkpoints(tmp_path/'run')[1:]: shutil.rmtree(p)
    shard.unlink()
    with pytest.raises(ValueError, match='optimizer/shard-00002.* is not what was written'):
        resume(fresh(chain), tmp_path/'run')

@pytest.mark.long
def test_a_checkpoint_of_another_model_is_refused(chain):
    with pytest.raises(ValueError, match='of another run: its model is'):
        resume(fresh(chain, 'fsdp'), chain.folder/'ep'/'run')

@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_consolidated_to_one_model(chain, kind, tmp_path):
    path = chain.folder/kind/'run'/'step-00000002'
    model = MoEForCausalLM.from_pretrained(consolidate(path, tmp_path/'model'))
    held = load_file(tmp_path/'model'/'model.safetensors')
    assert sorted(p.name for p in (tmp_path/'model').iterdir()) == ['config.json', 'model.safetensors']
    assert sorted(held) == sorted(model.state_dict())
    resumed = fresh(chain, kind)
    assert resume(resumed, path.parent).name == 'step-00000004'            # the newest, of one process
    at_two = whole_tensors(path/'model')
    assert all(torch.equal(at_two[n], t) for n, t in model.state_dict().items())
    whole = MoEForCausalLM.from_pretrained(consolidate(path.parent, tmp_path/'newest'))
    assert all(torch.equal(t, resumed.model.state_dict()[n]) for n, t in whole.state_dict().items())
    with pytest.raises(ValueError, match='out must be the name of a folder that is not there yet'):
        consolidate(path, tmp_path/'model')
    assert not [*tmp_path.glob('.*')]

@pytest.mark.long
def test_the_command_says_where_the_model_is_or_what_is_wrong(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say = lambda *args: CliRunner().invoke(app, ['consolidate', *map(str, args)], prog_name='libmoe')
    done = say(chain.folder/'ep'/'run'/'step-00000002', '--json')
    assert json.loads(done.stdout) == dict(model='consolidated/step-00000002'), done.output
    assert MoEForCausalLM.from_pretrained('consolidated/step-00000002').num_parameters() > 1000
    for args, why in (((tmp_path/'nowhere',), 'checkpoint must be the folder of a checkpoint, or one that holds some'),
                      ((chain.folder/'ep'/'run'/'step-00000002',), 'out must be the name of a folder that is not')):
        done = say(*args)
        assert done.exit_code == 2 and why in ' '.join(done.output.split()), done.output
