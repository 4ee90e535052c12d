"A full disk, a dead data worker, a log that lost lines, a clock that goes backwards: a run says so, and goes on."
import json, os, re, resource, signal, time
from functools import partial
from contextlib import contextmanager

import pytest
from torch.utils.data import DataLoader, IterableDataset
from typer.testing import CliRunner

from conftest import write_texts
from libmoe_nb import cli
from libmoe_nb.data.packing import PackedDataset
from libmoe_nb.experiments import compare as experiments
from libmoe_nb.training.checkpoints import Checkpoint, checkpoints, resume
from libmoe_nb.training.log import RunLog, read_log
from small_runs import Stop, assert_same, fit, make, state

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

@contextmanager
def files_of_at_most(size):
    "The system refuses to make files larger than that, as a full disk would"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def test_a_full_disk_keeps_the_checkpoint_before(data, tmp_path):
    save = Checkpoint(tmp_path/'c', every=2, keep_last=1)
    learn = make('smoe', data, cbs=[save, Stop(4)])
    with pytest.raises(KeyboardInterrupt): fit(learn)
    with files_of_at_most(20_000), pytest.raises(Exception): save.save()
    learn.step = 5
    with files_of_at_most(20_000), pytest.raises(Exception): save.save()
    assert [p.name for p in checkpoints(tmp_path/'c')] == ['step-00000004']
    again = make('smoe', data, seed=3, cbs=[Checkpoint(tmp_path/'c', every=2)])
    assert resume(again, tmp_path/'c') and again.step == 4
    assert_same(state(fit(make('smoe', data))), state(fit(again)))
    assert not list((tmp_path/'c').glob('.tmp-*'))

def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    args = ['train', 'smoe', '--data', str(write_texts(tmp_path/'texts')),
            *'--preset tiny --steps 4 --batch-size 2 --traces 0'.split(),
            *'--sequence-length 32 --vocab-size 300 --threads 1 --json --out'.split()]
    run = lambda out: CliRunner().invoke(cli.app, [*args, str(tmp_path/out)], prog_name='libmoe')
    whole = run('whole')
    assert whole.exit_code == 0, whole.output
    with files_of_at_most(60_000): full = run('full')
    assert full.exit_code == 1 and 'Traceback' not in full.output, full.output
    told = full.stderr.strip().splitlines()[-1]
    assert told.startswith('libmoe: ') and 'What is finished is kept' in told
    assert not (tmp_path/'full'/'result.json').exists()
    again = run('full')
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)['perplexity'] == json.loads(whole.stdout)['perplexity']

class ReadElsewhere(IterableDataset):
    "Batches that another process reads, which gets SIGKILL where a file says so, once"
    def __init__(self, batches, dies): self.read, self.dies = batches, dies
    def __iter__(self):
        for n, b in enumerate(self.read()):
            if self.dies.exists() and n == int(self.dies.read_text()):
                self.dies.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield b

def test_a_data_worker_that_dies_is_one_sentence_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(experiments, 'RunOptions', partial(experiments.RunOptions, checkpoint_seconds=0))
    plain, dies = PackedDataset.batches, tmp_path/'dies'
    def batches(self, batch_size, seed=0, start=0):
        read = ReadElsewhere(partial(plain, self, batch_size, seed, start), dies)
        yield from DataLoader(read, batch_size=None, num_workers=1, prefetch_factor=1)
    args = ['train', 'smoe', '--data', str(write_texts(tmp_path/'texts')),
            *'--preset tiny --steps 6 --batch-size 2 --traces 0'.split(),
            *'--sequence-length 32 --vocab-size 300 --threads 1 --json --out'.split()]
    run = lambda out: CliRunner().invoke(cli.app, [*args, str(tmp_path/out)], prog_name='libmoe')
    whole = run('whole')
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr(PackedDataset, 'batches', batches)
    dies.write_text('4')                                                # the fifth batch
    dead = run('dead')
    assert dead.exit_code == 1 and not dies.exists() and 'Traceback' not in dead.output
    told = dead.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r'libmoe: a process that reads data, number \d+, (was ended by a signal \(Killed\)|ended): '
                        r"memory may have run out\. What is finished is kept; give the same command again to go on "
                        r"from here\.",
                        told)
    kept, *older = checkpoints(tmp_path/'dead'/'checkpoints')           # death may come between a save and its tidying
    assert len(older) <= 1 and kept.name in ('step-00000003', 'step-00000004')
    assert not (tmp_path/'dead'/'result.json').exists()
    again = run('dead')
    assert again.exit_code == 0, again.output
    same = lambda r: {k: v for k, v in json.loads(r.stdout).items() if k in ('perplexity', 'loss', 'domains', 'tokens')}
    assert same(again) == same(whole)
    weights = [(tmp_path/n/'model'/'model.safetensors').read_bytes() for n in ('dead', 'whole')]
    assert weights[0] == weights[1]

def test_a_log_that_lost_lines_is_told(data, tmp_path):
    cbs = lambda: [RunLog(tmp_path/'log.jsonl'), Checkpoint(tmp_path/'c', every=2)]
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[*cbs(), Stop(5)]))
    rows = (tmp_path/'log.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path/'log.jsonl').write_bytes(b''.join(rows[:2]) + rows[2][:9])
    learn = make('smoe', data, cbs=cbs())
    with pytest.warns(UserWarning, match='log.jsonl has 2 of the 5 lines that it had at the checkpoint: its curves'):
        resume(learn, tmp_path/'c')
    fit(learn)
    steps = read_log(tmp_path/'log.jsonl').query('split == "train"').step.tolist()
    assert steps == [1, 2, 5, 6, 7, 8, 9]

def test_a_clock_that_goes_backwards_changes_nothing(data, tmp_path, monkeypatch):
    straight = state(fit(make('smoe', data)))
    now = iter(range(10**9, 0, -60))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[Checkpoint(tmp_path, every=2), Stop(5)]))
    learn = make('smoe', data, seed=3, cbs=[Checkpoint(tmp_path, every=2)])
    assert resume(learn, tmp_path).name == 'step-00000004'
    assert_same(straight, state(fit(learn)))
