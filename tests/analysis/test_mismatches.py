"Routers compute in float32 whatever is around them, and tokens that are routed otherwise are counted exactly."
import copy

import pytest, torch
from transformers import AutoModelForCausalLM
from libmoe_nb.analysis.interventions import drop_top
from libmoe_nb.analysis.mismatches import (changed_choices, compare_passes, computed_choices, replaying,
                                           routing_mismatches)
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.analysis.tracing import intervene, moe_layers, record_routing
from libmoe_nb.core.modes import autocast
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import recipes
from libmoe_nb.training.batches import next_token_loss

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             vocab_size=300, router_init_std=.4)
SPARSE = [r for r in recipes if r != 'dense']
IDS = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
BATCH = dict(input_ids=IDS)
MANY = dict(input_ids=torch.randint(0, 300, (32, 32), generator=torch.Generator().manual_seed(1)))

@pytest.fixture(scope='module', params=SPARSE)
def recipe(request): return request.param

@pytest.fixture(scope='module')
def model(recipe):
    bias = dict(expert_bias=True) if recipe in ('smoe_sigmoid', 'sharede_v3') else {}
    made = from_scratch(recipe, 'tiny', seed=0, **SMALL, **bias).eval()
    for l in moe_layers(made).values():
        if l.router.expert_bias is not None: l.router.expert_bias.normal_(0, .05)
    return made

# routers in float32

def routers_seen(model, ids):
    "What each router was given and what it decided"
    seen, handles = [], []
    for l in moe_layers(model).values():
        handles.append(l.router.register_forward_hook(lambda m, args, out: seen.append((m, args, out))))
    with torch.no_grad(): model(ids)
    for h in handles: h.remove()
    return seen

def assert_in_float32(seen, dtype):
    for router, (x, *previous), out in seen:
        assert x.dtype == dtype
        assert out.router_logits.dtype == out.scores.dtype == out.top_k_weights.dtype == torch.float32
        previous = [p if p is None else p.float() for p in previous]
        alone = copy.deepcopy(router).float()(x.float(), *previous)
        assert torch.equal(out.router_logits, alone.router_logits)
        assert torch.equal(out.top_k_index, alone.top_k_index) and torch.equal(out.top_k_weights, alone.top_k_weights)

@pytest.mark.parametrize('half', [(True, False), (False, True)], ids=['bf16', 'fp16'])
def test_routers_are_float32_under_autocast(model, half):
    with autocast(IDS.device, *half): seen = routers_seen(model, IDS)
    assert len(seen) == 3
    # a norm gives float32 under autocast, whose products were in half precision
    assert_in_float32(seen, seen[0][1][0].dtype)
    plain = routers_seen(model, IDS)
    assert any(not torch.equal(a[1][0].float(), b[1][0]) for a, b in zip(seen, plain))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_routers_are_float32_in_models_loaded_in_half_precision(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for l in moe_layers(loaded).values():
        assert l.router.expert_bias is None or l.router.expert_bias.dtype == torch.float32
    assert_in_float32(routers_seen(loaded, IDS), dtype)

@pytest.mark.parametrize('name', ['mixtral', 'olmoe', 'deepseek_v3', 'qwen3_moe'])
def test_models_of_transformers_in_bfloat16_are_counted(name):
    "Their records are what they computed with, so the same pass again is the same"
    plain, half = tiny_moe(name), tiny_moe(name).bfloat16()
    ids = IDS.clamp(max=plain.config.vocab_size - 1)[:2, :16]
    batch = dict(input_ids=ids)
    assert compare_passes(half, [batch], precisions=(None, None)).layers.mismatched.sum() == 0
    assert compare_passes(plain, [batch], half, precisions=(None, None), replay=True).layers.mismatched.sum() == 0
    res = compare_passes(plain, [batch], half, precisions=(None, None))
    assert 0 < res.effect['kl'] < .1 and len(res.layers) == len(moe_layers(plain))

# counting

def test_the_same_pass_twice_is_the_same(model):
    res = compare_passes(model, [BATCH, BATCH], precisions=(None, None))
    assert res.layers.mismatched.sum() == 0 and (res.layers.tokens == 2 * IDS.numel()).all()
    assert res.effect['anywhere'] == res.effect['kl'] == res.effect['logprob_gap'] == 0

def by_hand(a, b):
    "Tokens of which what is computed differs, with loops: each choice is an expert, with its sign, or nothing"
    def does(r, t):
        res = []
        for i in r.top_k_index[t].tolist():
            none = r.sign_of is not None and int(r.expert_of[i]) == r.num_experts
            res.append('none' if none else i)
        return sorted(res, key=str)
    return sum(does(a, t) != does(b, t) for t in range(a.num_tokens))

def test_flips_are_counted_one_by_one(model):
    with record_routing(model) as a, torch.no_grad(): model(IDS)
    with record_routing(model) as b, torch.no_grad(), autocast(IDS.device, True): model(IDS)
    table = routing_mismatches(a, b)
    assert table.mismatched.tolist() == [by_hand(x, y) for (x,), (y,) in zip(a.values(), b.values())]
    assert (table.share == table.mismatched / IDS.numel()).all()
    mask = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < .5
    masked = routing_mismatches(a, b, mask)
    off = [(changed_choices(x, y) > 0) & mask.flatten() for (x,), (y,) in zip(a.values(), b.values())]
    assert masked.mismatched.tolist() == [int(o.sum()) for o in off] and (masked.tokens == int(mask.sum())).all()

def test_flips_that_were_made_are_counted(model):
    "Seven tokens of the second layer get the next choice in the place of their best"
    name = [*moe_layers(model)][1]
    def some(r):
        new, keep = drop_top(1)(r), torch.arange(r.num_tokens) < 7
        return r.replace(top_k_index=torch.where(keep[:, None], new.top_k_index, r.top_k_index))
    with record_routing(model) as a, torch.no_grad(): model(IDS)
    with intervene(model, some, name), record_routing(model) as b, torch.no_grad(): model(IDS)
    (x,), (y,) = a[name], b[name]
    made = sum(sorted(p) != sorted(q) for p, q in zip(computed_choices(x).tolist(), computed_choices(y).tolist()))
    table = routing_mismatches(a, b)
    assert 0 < made <= 7 and table.mismatched.tolist()[:2] == [0, made]
    turned = {n: [r.replace(top_k_index=r.top_k_index.flip(-1)) for r in rs] for n, rs in a.items()}
    assert routing_mismatches(a, turned).mismatched.sum() == 0              # an order is no choice

def test_those_that_flip_were_close(model):
    res = compare_passes(model, [MANY]).layers
    flipped = res[res.mismatched > 0]
    assert len(flipped) and (flipped.margin_mismatched < flipped.margin / 2).all()

def test_other_tokens_are_refused(model):
    with record_routing(model) as a, torch.no_grad(): model(IDS)
    with record_routing(model) as b, torch.no_grad(): model(IDS[:2])
    with pytest.raises(ValueError, match=r'b must be choices of the tokens of a, \(128, \d\), got \(64, \d\)'):
        routing_mismatches(a, b)
    with pytest.raises(ValueError, match='b must be as many as a, 3, got'):
        routing_mismatches(a, dict([*b.items()][:1]))

# activations that are recomputed

@pytest.mark.parametrize('half', [False, True], ids=['fp32', 'bf16'])
def test_recomputed_activations_route_as_before(recipe, half):
    "Pairs of experts score the same, so that any difference would show"
    made = from_scratch(recipe, 'tiny', seed=0, **SMALL).train()
    made.gradient_checkpointing_enable(dict(use_reentrant=False))
    seen = {}
    for n, l in moe_layers(made).items():
        with torch.no_grad():
            for p in l.router.parameters():
                if p.ndim == 2 and len(p) % 2 == 0: p[1::2] = p[::2]
        l.router.register_forward_hook(lambda m, args, out, n=n: seen.setdefault(n, []).append(out))
    with autocast(IDS.device, half): loss = next_token_loss(made(IDS, use_cache=False).logits, IDS)
    assert [len(rs) for rs in seen.values()] == [1] * 3
    loss.backward()
    assert [len(rs) for rs in seen.values()] == [2] * 3
    first, again = ({n: rs[i] for n, rs in seen.items()} for i in range(2))
    assert routing_mismatches(first, again).mismatched.sum() == 0
    assert all(torch.equal(first[n].top_k_index, again[n].top_k_index) for n in first)

# replay

def test_replay_leaves_rounding_alone(model):
    own, replayed = (compare_passes(model, [MANY], replay=r) for r in (False, True))
    assert own.layers.mismatched.sum() > 0 and replayed.layers.mismatched.sum() == 0
    assert 0 < replayed.effect['kl'] < own.effect['kl']

def test_replaying_own_choices_changes_nothing(model):
    with record_routing(model) as records, torch.no_grad(): plain = model(IDS).logits
    with replaying(model, records), torch.no_grad(): assert torch.allclose(model(IDS).logits, plain, atol=1e-6)
    with replaying(model, records): next_token_loss(model(IDS).logits, IDS).backward()
    grads = {n: p.grad.norm().item() for n, p in model.named_parameters() if '.router.' in n}
    model.zero_grad()
    assert grads and all(g > 0 for g in grads.values())
