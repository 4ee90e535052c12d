"Several at once: none harms another, all end with the process that began them, and every interruption is told."
import os, signal, subprocess, sys, time
from pathlib import Path

import job_functions as f
import pytest

from libmoe_nb.core import machine
from libmoe_nb.experiments import jobs
from libmoe_nb.experiments.jobs import Task, TasksFailed, share_cores, side_by_side, values_of

HERE = Path(__file__).parent

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.02)
    assert true()

def test_results_come_in_the_order_of_the_tasks(capfd):
    told = []
    res = side_by_side([Task(str(n), f.square, dict(n=n)) for n in range(5)], jobs=2, threads=3,
                       progress=lambda event, name, **facts: told.append((name, facts)))
    assert [*res] == [*map(str, range(5))] and values_of(res) == [0, 1, 4, 9, 16]
    assert sorted(n for n, _ in told) == [*res]
    assert {(x['threads'], x['torch']) for _, x in told} == {('3', False)}
    assert 1 <= len({x['pid'] for _, x in told}) <= 2 and os.getpid() not in {x['pid'] for _, x in told}
    said = capfd.readouterr()
    assert said.out == '' and said.err.count('this must not disturb') == 5

def test_a_failure_harms_no_other():
    tasks = [Task('bad', f.fail), Task('killed', f.kill_itself), Task('odd', f.return_a_function),
             *(Task(str(n), f.square, dict(n=n)) for n in range(4))]
    res = side_by_side(tasks, jobs=2, threads=1)
    assert [res[str(n)].value for n in range(4)] == [0, 1, 4, 9]
    assert res['bad'].error == 'RuntimeError: no such luck' and 'in fail' in res['bad'].details
    assert 'was killed' in res['killed'].error and 'ickle' in res['odd'].error
    with pytest.raises(TasksFailed, match='3 of 7 runs failed.*bad: RuntimeError: no such luck; killed: ') as e:
        values_of(res, 'runs')
    assert e.value.outcomes is res

def test_one_job_is_this_process():
    pids = []
    res = side_by_side([Task('bad', f.fail), Task('a', f.square, dict(n=2))], jobs=1, threads=1,
                       progress=lambda event, name, pid, **facts: pids.append(pid))
    assert pids == [os.getpid()] and res['a'].value == 4 and res['bad'].error == 'RuntimeError: no such luck'

def test_warnings_of_ours_are_passed_on():
    with pytest.warns(UserWarning) as w: side_by_side([Task('a', f.warn), Task('b', f.warn)], jobs=2, threads=1)
    assert {str(x.message) for x in w} == {'ours'}

@pytest.mark.parametrize('jobs_', [1, 2])
def test_an_interruption_lets_all_save(jobs_, tmp_path):
    def stop_at_five(event, name=None, step=0, **facts):
        if step == 5: raise KeyboardInterrupt
    tasks = [Task(n, f.steps, dict(folder=str(tmp_path), name=n)) for n in 'ab'[:jobs_]] + [Task('never', f.fail)]
    with pytest.raises(KeyboardInterrupt): side_by_side(tasks, jobs=jobs_, threads=1, progress=stop_at_five)
    saved = {p.name: int(p.read_text()) for p in tmp_path.iterdir()}
    assert saved and {*saved} <= {*'ab'[:jobs_]}      # the other of two may not have begun yet
    assert all(0 < s < 1000 for s in saved.values())
    assert values_of(side_by_side([Task(n, f.steps, dict(folder=str(tmp_path), name=n, n=saved[n] + 1)) for n in saved],
                                  jobs=jobs_, threads=1)) == [s + 1 for s in saved.values()]

PARENT = """
import sys; sys.path[:0] = {path!r}
import job_functions as f
from libmoe_nb.experiments.jobs import Task, side_by_side
def tell(event, name, step=None, pid=None):
    if pid: print('pid', pid, flush=True)
    if step == 3: print('step', flush=True)
try: side_by_side([Task(n, f.steps, dict(folder={folder!r}, name=n)) for n in 'ab'], jobs=2, threads=1, progress=tell)
except KeyboardInterrupt: print('interrupted', flush=True)
"""

@pytest.mark.parametrize('how', ['kill', 'ctrl-c'])
def test_workers_end_with_the_process_that_began_them(how, tmp_path):
    code = PARENT.format(path=[str(HERE), str(HERE.parents[1])], folder=str(tmp_path))
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    pids, steps = [], 0
    while steps < 2:
        word, *n = p.stdout.readline().split()
        pids += map(int, n)
        steps += word == 'step'
    assert all(map(alive, pids)) and len({*pids}) == 2
    # a terminal sends Ctrl-C to the workers, too
    if how == 'kill': p.kill()
    else: os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=30)
    wait_until(lambda: not any(map(alive, pids)))
    assert err == '' and ('interrupted' in out) == (how == 'ctrl-c')
    assert {x.name for x in tmp_path.iterdir()} == (set() if how == 'kill' else {'a', 'b'})

def test_shares(monkeypatch):
    for n in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS': monkeypatch.delenv(n, raising=False)
    monkeypatch.setattr(jobs, 'available_memory', lambda: 10e9)
    def shares(cores, tasks, **kw):
        monkeypatch.setattr(jobs, 'available_cores', lambda: cores)
        return share_cores(tasks, **kw)
    assert [shares(2, n) for n in (1, 2, 8)] == [(1, 2), (2, 1), (2, 1)]
    assert [shares(8, n) for n in (1, 2, 8, 20)] == [(1, 8), (2, 4), (8, 1), (7, 1)]
    assert shares(8, 8, memory=4e9) == (2, 4) and shares(8, 8, memory=40e9) == (1, 8)
    assert shares(2, 8, jobs=5) == (5, 1) and shares(8, 3, jobs=5) == (3, 2)
    assert shares(8, 8, threads=4) == (2, 4) and shares(1, 8, threads=4) == (1, 4)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert shares(8, 8) == (4, 2) and shares(8, 8, threads=1) == (8, 1)

@pytest.mark.parametrize('kw, says', [(dict(jobs=0), 'jobs must be a whole number of at least 1, got 0'),
                                      (dict(threads=0), 'threads must be a whole number of at least 1, got 0'),
                                      (dict(jobs=2, memory=1e15), 'jobs must be at most 1 with the memory')])
def test_what_cannot_be(kw, says):
    if machine.available_memory() is None and 'memory' in kw: pytest.skip('this system does not tell its memory')
    with pytest.raises(ValueError, match=says): side_by_side([Task(n, f.square, dict(n=1)) for n in 'ab'], **kw)
