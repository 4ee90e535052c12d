"The log of a run: resumed, cut, told to listeners, and under the names that older runs gave it."
import json, math

import pytest, torch
from libmoe_nb.training.telemetry import RoutingTelemetry
from libmoe_nb.training.log import RunLog, read_log, run_log_path
from libmoe_nb.training.checkpoints import Checkpoint, checkpoints, resume
from small_runs import Stop, change_json, fit, make

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

def test_metrics_of_a_resumed_run_are_those_of_a_straight_one(data, tmp_path):
    def cbs(name):
        return [RoutingTelemetry(2), RunLog(tmp_path/name/'log.jsonl'),
                Checkpoint(tmp_path/name, every=2)]
    fit(make('smoe', data, cbs=cbs('a')))
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[*cbs('b'), Stop(5)]))
    with open(tmp_path/'b'/'log.jsonl', 'a') as f: f.write('{"step": 5, "split": "tr')
    learn = make('smoe', data, cbs=cbs('b'))
    resume(learn, tmp_path/'b'); fit(learn)
    a, b = (read_log(tmp_path/n/'log.jsonl').drop(columns=['seconds', 'tokens_per_second']) for n in 'ab')
    assert a.equals(b)
    assert len(learn.routing_telemetry.table()) == (a.split == 'routing').sum() == 2 * 5

def test_metrics_lines_are_json_even_where_the_loss_is_not_a_number(data, tmp_path):
    learn = make('smoe', data, cbs=[RunLog(tmp_path/'m.jsonl')])
    with torch.no_grad(): next(learn.model.parameters()).fill_(math.nan)
    with pytest.warns(UserWarning, match='the loss is nan at step 1: training stops here'): fit(learn, epochs=2)
    def never(c): raise AssertionError(c)
    rows = [json.loads(line, parse_constant=never) for line in open(tmp_path/'m.jsonl')]
    assert ([r['loss'] for r in rows] == [None] * 2 and [r['split'] for r in rows] == ['train', 'valid']
            and learn.diverged == 1)

# what older runs wrote

def rename_log(info):
    "In the list of (name, state) of callbacks"
    (log,) = (pair for pair in dict(info['dict'])['callbacks']['dict'] if pair[0] == 'run_log')
    log[0] = 'metrics_writer'

def test_an_older_run_goes_on_in_its_own_file(data, tmp_path):
    "Its file is `metrics.jsonl`, and its checkpoint knows the log as `metrics_writer`"
    def cbs(name): return [RoutingTelemetry(2), RunLog(run_log_path(tmp_path/name)), Checkpoint(tmp_path/name, every=2)]
    fit(make('smoe', data, cbs=cbs('straight')))
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[*cbs('old'), Stop(5)]))
    (tmp_path/'old'/'log.jsonl').rename(tmp_path/'old'/'metrics.jsonl')
    for path in checkpoints(tmp_path/'old'): change_json(path, rename_log)
    assert '"metrics_writer"' in (path/'checkpoint.json').read_text()
    learn = make('smoe', data, cbs=cbs('old'))
    resume(learn, tmp_path/'old'); fit(learn)
    assert not (tmp_path/'old'/'log.jsonl').exists()
    a, b = (read_log(run_log_path(tmp_path/n)).drop(columns=['seconds', 'tokens_per_second'])
            for n in ('straight', 'old'))
    assert a.equals(b)
