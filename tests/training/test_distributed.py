"Several processes: what they train together is what one trains."
import pytest, torch
from processes import run_ranks
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.training.checkpoints import checkpoints
from libmoe_nb.training.log import read_log
from small_runs import ROOT, SMALL, assert_same, fit, make

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

TWO = r'''
import sys, os, json, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import torch, small_runs as t
from libmoe_nb.data.text import text_data
from libmoe_nb.training.checkpoints import Checkpoint
from libmoe_nb.training.distributed import *
from libmoe_nb.training.log import RunLog
from libmoe_nb.training.trackers import LivePlot
from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
data = text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=sys.argv[2])
model = t.from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **t.SMALL)
learn = t.make(None, data, dropout=False, model=model,
               cbs=[Checkpoint(folder/'checkpoints'), RunLog(folder/'log.jsonl'),
                    LivePlot(show=lambda figure: None)]).distribute(cpu=True)
assert learn.processes == learn.dls.train.world == 2
t.fit(learn)
from safetensors.torch import save_file
state = {{n: x.contiguous().clone() for n, x in learn.model.state_dict().items()}}
save_file(state, folder/f'state{{os.environ["RANK"]}}.safetensors')
import torch.distributed as dist; dist.destroy_process_group()
'''

def test_two_processes_train_as_one(data, cache, tmp_path):
    from safetensors.torch import load_file
    code = TWO.format(tests=str(ROOT/'tests'/'training'), root=str(ROOT))
    for done in run_ranks(code, tmp_path, cache): assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_file(tmp_path/f'state{r}.safetensors') for r in range(2))
    assert_same(a, b)
    one = fit(make(None, data, dropout=False,
                   model=from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **SMALL))).model.state_dict()
    assert all(torch.allclose(one[n], a[n], atol=2e-3) for n in a)
    assert [p.name for p in checkpoints(tmp_path/'checkpoints')] == ['step-00000009']
    rows = read_log(tmp_path/'log.jsonl')                           # the first process alone writes
    assert rows[rows.split == 'train'].step.tolist() == list(range(1, 10))
