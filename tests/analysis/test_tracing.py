"""Recording and intervening where it is hard: nesting, exceptions, generation with a cache, padding, checkpointing,
compiled code."""
import copy, sys, subprocess, pickle
import pytest, torch
from libmoe_nb.analysis.interventions import drop_top, drop_top1, override_top_k, random_routing, temperature
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.tracing import intervene, moe_layers, record_routing, swap_routers

RECIPES = 'smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()


@pytest.fixture(scope='module', params=['smoe', 'moe_plus_plus'])
def model(request): return from_scratch(request.param, 'tiny', seed=0).eval()


@pytest.fixture
def ids(): return torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_nothing_is_left_behind(model, ids):
    before, keys = hooks(model), {n: set(vars(m)) for n, m in model.named_modules()}
    y = model(input_ids=ids).logits
    with pytest.raises(KeyError), record_routing(model), intervene(model, drop_top1), swap_routers(model, {}):
        model(input_ids=ids)
        raise KeyError
    def fails(r): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), intervene(model, fails): model(input_ids=ids)
    assert hooks(model) == before and keys == {n: set(vars(m)) for n, m in model.named_modules()}
    assert torch.equal(model(input_ids=ids).logits, y)


@torch.no_grad()
def test_nested_blocks_may_end_in_any_order(model, ids):
    a, b = record_routing(model), record_routing(model)
    first, second = a.__enter__(), b.__enter__()
    model(input_ids=ids)
    a.__exit__(None, None, None)
    model(input_ids=ids)
    b.__exit__(None, None, None)
    assert {len(r) for r in first.values()} == {1} and {len(r) for r in second.values()} == {2}


@pytest.mark.parametrize('recipe', RECIPES)
@torch.no_grad()
def test_identity_changes_no_bit_and_interventions_do(recipe, ids):
    m = from_scratch(recipe, 'tiny', seed=0, router_init_std=.5).eval()
    y = m(input_ids=ids).logits
    with intervene(m, lambda r: r.replace()): assert torch.equal(m(input_ids=ids).logits, y)
    for f in (drop_top1, temperature(3), override_top_k(1), random_routing()):
        with intervene(m, f): z = m(input_ids=ids).logits
        assert z.isfinite().all() and not torch.equal(z, y)


@torch.no_grad()
def test_generation_with_the_cache_routes_as_one_pass_does(model, ids):
    with record_routing(model) as steps:
        out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with record_routing(model) as whole: model(input_ids=out[:, :-1])
    for n, rs in steps.items():
        assert [r.shape for r in rs] == [(2, 12)] + [(2, 1)] * 4
        together = torch.cat([r.top_k_index.view(2, -1, r.top_k) for r in rs], 1)
        assert torch.equal(together.sort(-1)[0], whole[n][0].top_k_index.view(2, -1, together.shape[-1]).sort(-1)[0])


@torch.no_grad()
def test_an_intervention_acts_on_every_generated_token(model, ids):
    with intervene(model, drop_top1), record_routing(model) as done:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    again = ids
    for _ in range(4):
        with intervene(model, drop_top1):
            again = torch.cat([again, model(input_ids=again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)
    assert all(len(rs) == 4 for rs in done.values())


@pytest.mark.parametrize('recipe', RECIPES)
@torch.no_grad()
def test_padding_changes_no_real_tokens_record(recipe, ids):
    m = from_scratch(recipe, 'tiny', seed=0).eval()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    with record_routing(m) as plain: m(input_ids=ids)
    with record_routing(m) as left:
        m(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for n in plain:
        a, b = plain[n][0], left[n][0]
        torch.testing.assert_close(a.scores.view(2, 12, -1), b.scores.view(2, 15, -1)[:, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('recipe', ['smoe', 'moe_plus_plus'])
@pytest.mark.parametrize('inside', [True, False])
def test_gradient_checkpointing(recipe, inside, ids):
    def run(checkpointing, f=None):
        m = from_scratch(recipe, 'tiny', seed=0).train()
        if checkpointing: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        with record_routing(m) as records, intervene(m, f or (lambda r: None)):
            loss = m(input_ids=ids, labels=ids).loss
            if inside or f: loss.backward()
        if not (inside or f): loss.backward()
        return loss, [len(r) for r in records.values()], [p.grad for p in m.parameters()]
    for f in (None, drop_top1, random_routing(3)):
        a, b = run(False, f), run(True, f)
        assert a[0] == b[0] and a[1] == b[1] == [1] * len(a[1])
        for x, y in zip(a[2], b[2]): assert (x is None and y is None) or torch.allclose(x, y, atol=1e-6)


def test_compiled_models(ids):
    m = from_scratch('smoe', 'tiny', seed=0).eval()
    with torch.no_grad():
        y = m(input_ids=ids).logits
        with intervene(m, drop_top1): z = m(input_ids=ids).logits
        torch._dynamo.reset()
        c = torch.compile(m, backend='eager')
        torch.testing.assert_close(c(input_ids=ids).logits, y)
        with record_routing(m) as records, intervene(c, drop_top1):
            torch.testing.assert_close(c(input_ids=ids).logits, z)
        assert all(len(r) == 1 for r in records.values())
        torch.testing.assert_close(c(input_ids=ids).logits, y)


@torch.no_grad()
def test_swapped_routers(model, ids):
    names = list(moe_layers(model))
    with swap_routers(model, dict(zip(names, reversed(names)))), record_routing(model) as records:
        y = model(input_ids=ids).logits
    swapped = copy.deepcopy(model)
    a, b = (moe_layers(swapped)[n] for n in (names[0], names[-1]))
    if not a.router.uses_previous_logits:
        a.router, b.router = b.router, a.router
        torch.testing.assert_close(swapped(input_ids=ids).logits, y)
    assert all(r[0].shape == (2, 12) for r in records.values()) and not torch.allclose(model(input_ids=ids).logits, y)


def test_records_pickle_without_their_router(model, ids):
    with torch.no_grad(), record_routing(model) as records: model(input_ids=ids)
    r = next(iter(records.values()))[0]
    again = pickle.loads(pickle.dumps(r))
    assert again.router is None and torch.equal(again.scores, r.scores)
    with pytest.raises(ValueError, match='knows its router'): drop_top(1)(again)


def test_own_models_need_no_transformers():
    code = ('import sys, torch\nfrom libmoe_nb.moe.config import MoESpec\nfrom libmoe_nb.moe.recipes import '
            'build_layer\nfrom libmoe_nb.analysis.tracing import *\nfrom libmoe_nb.analysis.interventions import *\n'
            'm = build_layer(MoESpec(hidden_size=8, num_experts=4, top_k=2, moe_intermediate_size=4))\n'
            'with record_routing(m) as r, intervene(m, drop_top1): m(torch.randn(3, 8))\n'
            'import libmoe_nb.analysis.adapters\n'
            'assert len(r[""]) == 1 and not {"transformers", "pandas", "fastai"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
