"A full disk, a log that lost lines, a clock that goes backwards: a run says so, and goes on to the same bits."
import json, resource, time
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from conftest import write_texts
from libmoe_nb import cli
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
