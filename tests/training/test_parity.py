"One process, a copy in each of two, FSDP2 and experts apart: every recipe comes to the same, to rounding."
import importlib.util, json
from pathlib import Path

import pytest, torch
from torch.utils.checkpoint import checkpoint
from processes import run_ranks
from transformers.distributed import DistributedConfig
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.models.parallel import check_ep_size, expert_plan
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.moe.recipes import build_layer

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings('ignore::FutureWarning'),
              pytest.mark.skipif('ep_size' not in DistributedConfig.__dataclass_fields__,
                                 reason='this transformers spreads no experts')]
SCRIPT = Path(__file__).resolve().parents[2]/'benchmarks'/'parity.py'
NEWER = 'tcmoe', 'moe_plus_plus'     # whose choices may run no expert
LOAD = '''
import importlib.util, json, sys, torch
from pathlib import Path
spec = importlib.util.spec_from_file_location('parity', {script!r})
spec.loader.exec_module(parity := importlib.util.module_from_spec(spec))
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')
rows, folder = [], Path(sys.argv[1])
for recipes, ways, cases in {todo!r}: rows += parity.rows_of_rank(folder, recipes, ways, cases)
(folder/f'rows{{torch.distributed.get_rank()}}.json').write_text(json.dumps(rows))
{more}
torch.distributed.barrier(); torch.distributed.destroy_process_group()
'''
# what saves a model whose experts are apart, and what refuses to share out what cannot be
MORE = '''
model = parity.spread(folder/'uneven', 'tcmoe', parity.WAYS['ep'])
model.save_pretrained(folder/'again')
errors = {}
for name, recipe in dict(odd='odd', dense='dense').items():
    try: parity.spread(folder/'uneven', recipe, parity.WAYS['ep'])
    except ValueError as e: errors[name] = str(e)
if torch.distributed.get_rank() == 0: (folder/'errors.json').write_text(json.dumps(errors))
'''

@pytest.fixture(scope='module')
def parity():
    spec = importlib.util.spec_from_file_location('parity', SCRIPT)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.fixture(scope='module')
def trained(parity, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp('parity'), torch.get_num_threads()
    todo = [([*parity.RECIPES], ['ep'], ['uneven']), (['dense', 'smoe', 'sharede_v3', *NEWER], ['fsdp'], ['uneven']),
            (NEWER, ['ep'], ['parts', 'odd', 'rare', 'idle']), (NEWER[:1], ['ddp'], ['odd']),
            (NEWER[1:], ['tp_ep'], ['parts'])]
    torch.set_num_threads(1)
    for case in parity.CASES:
        parity.references(folder, {r for rs, _, cs in todo for r in rs if case in cs}, [case])
    torch.set_num_threads(threads)
    from_scratch('smoe', 'tiny', **parity.SIZES | dict(num_experts=7, top_k=2)).save_pretrained(folder/'uneven'/'odd')
    for done in run_ranks(LOAD.format(script=str(SCRIPT), todo=todo, more=MORE), folder):
        assert done.returncode == 0, done.stderr[-3000:]
    a, b = (json.loads((folder/f'rows{r}.json').read_text()) for r in range(2))
    return folder, a, b

def test_two_processes_are_one(parity, trained):
    _, *ranks = trained
    for rows in ranks:
        assert len(rows) == 7 + 5 + 8 + 2
        for row in rows:
            assert row['moved'] > .02, row                        # it did learn something
            for q in parity.QUANTITIES:
                assert (row[q] is None) == (row['recipe'] == 'dense' and q in ('expert bias', 'telemetry')), row
                assert row[q] is None or row[q] < 1e-5, (q, row)
            assert row['expert bias'] in (0, None), row            # steps of one size, up or down: to the bit

def test_the_hard_places_were_met(trained):
    "Experts that one process has no token for, or none has, and choices that run no expert"
    rows = trained[1]
    of = lambda case, key: [r[key] for r in rows if r['case'] == case]
    assert min(of('rare', 'on_one')) > 4 and min(of('idle', 'on_none')) == 4
    assert all((r['no_expert'] > 10) == (r['recipe'] in NEWER) for r in rows if r['case'] != 'idle')

def test_a_model_with_experts_apart_is_saved_whole(trained):
    from safetensors.torch import load_file
    folder = trained[0]
    a, b = (load_file(folder/f/'model.safetensors') for f in ('uneven/tcmoe', 'again'))
    assert sorted(a) == sorted(b) and all(torch.equal(a[n], b[n]) for n in a)

def test_what_cannot_be_shared_out_is_refused(trained):
    told = json.loads((trained[0]/'errors.json').read_text())
    assert told == dict(
        odd='ep_size must be a divisor of the 7 routed experts of base.model.layers.0.mlp, got 2',
        dense='ep_size must be 1 for a MoEForCausalLM without routed experts, got 2')

def test_models_bring_the_plan_along(parity):
    model = from_scratch('smoe', 'tiny', **parity.SIZES, layers=[1], gated=True, bias=True)
    assert sorted(expert_plan(model)) == [f'base.model.layers.*.mlp.experts{p}' for p in (
        '', '.down_proj', '.down_proj_bias', '.gate_up_proj', '.gate_up_proj_bias')]
    with pytest.raises(ValueError, match='divisor of the 8 routed experts'): check_ep_size(model, 3)

# one process: what is computed twice counts once, and what only looks moves nothing

@pytest.mark.parametrize('recipe', ['sharede_v3', *NEWER])
def test_activations_computed_again_count_once(parity, recipe):
    "Gradient checkpointing changes no bit of the losses, the loads, the biases and the telemetry"
    def train(again):
        model = parity.build(recipe)
        if again: model.gradient_checkpointing_enable()
        return parity.train(model, (3, 16, 9, 16), parts=2)
    (a, loads), (b, again) = train(False), train(True)
    assert all(torch.equal(x, y) for x, y in zip(loads, again))
    for q in 'loss', 'expert bias', 'weights', 'telemetry': assert parity.furthest(a[q], b[q]) == 0, q

@pytest.mark.parametrize('recipe', ['smoe', *NEWER])
def test_no_choice_flips_in_a_third_of_a_million_tokens(recipe):
    "Whole numbers as inputs and weights of the router: scores tie everywhere"
    layer = build_layer(MoESpec(recipe, hidden_size=4, num_experts=8, top_k=2, moe_intermediate_size=2))
    with torch.no_grad(): layer.router.weight.copy_(torch.arange(layer.router.weight.numel()).view(-1, 4) % 3 - 1)
    x = torch.randint(-1, 2, (350_000, 4), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    seen = []
    layer.router.register_forward_hook(lambda m, args, r: seen.append(r.top_k_index))
    y = checkpoint(layer, x, use_reentrant=False)
    s = layer.router.score(layer.router.logits(x[:100]))
    assert (s.sort(-1)[0].diff(dim=-1) == 0).any(-1).all()
    y.sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)

def test_validation_moves_no_bias(parity):
    model = parity.build('smoe')
    bias = lambda: torch.stack([b.clone() for n, b in model.named_buffers() if n.endswith('expert_bias')])
    moved = []
    class Watch(parity.Callback):
        order = 90
        def before_validate(self): self.before = bias()
        def after_validate(self): moved.append((bias() - self.before).abs().max().item())
    parity.train(model, (3, 16, 9, 16), steps=2, cbs=[Watch()])
    assert moved == [0.] and bias().abs().max() > 0
