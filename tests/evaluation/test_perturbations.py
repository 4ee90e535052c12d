"Names of interventions: each is the function that it says, and what is not understood is refused in one sentence."
import pytest, torch

from libmoe_nb.analysis.interventions import (ban_experts, drop_top, drop_top1, drop_top12, force_experts,
                                              override_top_k, random_routing, temperature)
from libmoe_nb.analysis.tracing import record_routing
from libmoe_nb.evaluation.perturbations import intervention_makers, named_interventions, parse_intervention
from libmoe_nb.models.causal import from_scratch

MEANT = {'drop_top1': drop_top1, 'drop_top12': drop_top12, 'drop_top=3': drop_top(3),
         'temperature=0.1': temperature(.1),
         'top_k=1': override_top_k(1), 'random': random_routing(0), 'random=7': random_routing(7),
         'ban=0+1': ban_experts([0, 1]), 'force=2': force_experts([2])}

@pytest.fixture(scope='module')
def routing():
    model = from_scratch('smoe', 'tiny', vocab_size=64, top_k=3, seed=0).eval()
    with record_routing(model) as records, torch.no_grad(): model(torch.arange(20)[None])
    return next(iter(records.values()))[0]

def test_every_name_is_tried(): assert {n.partition('=')[0] for n in MEANT} == {*intervention_makers}

@pytest.mark.parametrize('name', MEANT)
def test_a_name_is_its_function(name, routing):
    got, want = parse_intervention(f' {name} ')(routing), MEANT[name](routing)
    assert torch.equal(got.top_k_index, want.top_k_index) and torch.equal(got.top_k_weights, want.top_k_weights)
    changed = not torch.equal(got.top_k_index, routing.top_k_index)
    assert changed == (name != 'temperature=0.1')                 # which weighs the same choices otherwise

def test_the_model_as_it_is_comes_first():
    def mine(routing): return routing
    ways = named_interventions([mine, drop_top1, 'top_k=1'])
    assert [*ways] == ['none', 'mine', 'drop_top1', 'top_k=1'] and ways['none'] is None and ways['mine'] is mine
    assert [*named_interventions(drop_top12)] == ['none', 'drop_top12']
    assert named_interventions(dict(none='drop_top1', d=drop_top1)) == dict(none=None, d=drop_top1)

@pytest.mark.parametrize('name, says', [('drop_top', 'needs a value'), ('top_k=x', "must be a number, got 'x'"),
                                        ('drop_top1=1', 'takes no value'), ('heat=1', 'unknown intervention'),
                                        ('temperature=-1', 'tau must be above 0')])
def test_mistakes(name, says):
    for f in parse_intervention, named_interventions:
        with pytest.raises(ValueError, match=says): f(name)
