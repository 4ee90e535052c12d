"Telemetry: values by hand."
import math

import pytest, torch
from fastai.basics import Callback
from libmoe_nb.moe.routing import Routing
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.tracing import record_routing
from libmoe_nb.training.telemetry import RoutingTelemetry, routing_stats
from small_runs import SMALL, make, fit

pytest_plugins = ['small_data']
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.usefixtures('one_thread')]

def test_telemetry_by_hand(data):
    rows, model = [], from_scratch('smoe', 'tiny', seed=1, router_init_std=.3, **SMALL)
    telemetry = RoutingTelemetry(every=2)
    class Look(Callback):
        order = -50
        def before_batch(self):
            if not self.learn.training: return
            with torch.no_grad(), record_routing(self.learn.model) as records:
                self.learn.model(self.learn.xb[0]['input_ids'], use_cache=False)
            for i, (r,) in enumerate(records.values()):
                f = torch.zeros(8)
                for t in range(r.num_tokens):
                    for e in r.top_k_index[t].tolist(): f[e] += 1
                p = f / f.sum()
                top = r.scores.sort(-1, descending=True).values
                s = r.scores.view(4, 32, 8).mean(1)
                counts = torch.stack([torch.bincount(x.flatten(), minlength=8)
                                      for x in r.top_k_index.view(4, 32, 4)]) / 128
                rows.append([i, (f.max() / f.mean()).item(), (f == 0).sum().item(),
                             -sum(x * math.log(x) for x in p.tolist() if x) / math.log(8),
                             (top[:, 0] - top[:, 1]).mean().item(), 1., (8 * (counts * s).sum(-1)).mean().item()])
    fit(make(None, data, model=model, dropout=False, steps=3, grad_accum=2, cbs=[Look(), telemetry]), epochs=1)
    expected = [r for i, r in enumerate(rows) if i // 2 + 1 in (1, 2)]
    table = telemetry.table()
    assert list(table.step) == [1, 1, 2, 2] and list(table.tokens) == [128, 128, 256, 256]
    got = (table['layer load_max_mean dead_experts entropy margin weight_sum load_balancing_loss'.split()]
           .values.tolist())
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)

def test_telemetry_leaves_padding_out():
    scores = torch.tensor([[.7, .2, .1], [.1, .2, .7], [.1, .2, .7]])
    r = Routing(scores.log(), scores, scores.argmax(-1, keepdim=True), torch.ones(3, 1), 3, shape=(1, 3))
    s = routing_stats(r, torch.tensor([[True, True, False]]))
    assert (s['dead_experts'] == 1 and abs(s['load_max_mean'] - 1.5) < 1e-6
            and abs(s['entropy'] - math.log(2)/math.log(3)) < 1e-6)
