"""Each family of transformers: its own router logits, an identity that changes no bit, interventions held to an independent computation."""
import pytest, torch, transformers
from libmoe_nb.adapters import check_rules, tiny_moe
from libmoe_nb.interventions import ban_experts, drop_top1, override_top_k, temperature
from libmoe_nb.tracing import adapter_of, intervene, moe_layers, record_routing, swap_routers

transformers.logging.set_verbosity_error()
# model type -> how an independent implementation weighs chosen experts: (scores, renormalised?)
FAMILIES = dict(mixtral=('softmax', True), olmoe=('softmax', False), qwen2_moe=('softmax', False), qwen3_moe=('softmax', None), qwen3_next=('softmax', True),
    qwen3_5_moe_text=('softmax', True), flex_olmo=('softmax', False), mellum=('softmax', None), jamba=('softmax', False), hunyuan_v1_moe=('softmax', True), minimax=('softmax', True),
    gpt_oss=('softmax', True), granitemoe=('softmax', True), granitemoeshared=('softmax', True), granitemoehybrid=('softmax', True), granitemoe_swa=('softmax', True),
    aria_text=('softmax', True), ernie4_5_moe=('softmax', True), llama4_text=('sigmoid', False), deepseek_v2=('softmax', False), deepseek_v3=('sigmoid', None),
    deepseek_v32=('sigmoid', None), glm4_moe=('sigmoid', None), glm4_moe_lite=('sigmoid', None), glm_moe_dsa=('sigmoid', None), dots1=('sigmoid', None), exaone_moe=('sigmoid', None),
    solar_open=('sigmoid', None), axk1=('sigmoid', None), hy_v3=('sigmoid', None), hy_v4=('sigmoid', None), minimax_m2=('sigmoid', True), lfm2_moe=('sigmoid', None), laguna=('sigmoid', True),
    afmoe=('sigmoid', None), cohere2_moe=None, longcat_flash=('softmax', False), nemotron_h=('sigmoid', None), phimoe=None, gemma4_text=None)


def installed(name): return name in transformers.CONFIG_MAPPING


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
    if not installed(request.param): pytest.skip('not in this transformers')
    model = tiny_moe(request.param, seed=1)
    for layer in moe_layers(model).values():          # a bias that matters, where the family has one
        for m in layer.modules():
            for n in ('e_score_correction_bias', 'expert_bias'):
                if torch.is_tensor(b := getattr(m, n, None)): b.data.copy_(.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0)))
    return request.param, model, torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_records_are_the_models_own(family):
    name, model, ids = family
    with record_routing(model) as records: out = model(input_ids=ids, output_router_logits=True)
    assert records and all(len(rs) == 1 for rs in records.values())
    own = out.get('router_logits') or []
    assert len(own) == len(records)
    for logits, (r,) in zip(own, records.values()):
        if name == 'gemma4_text': logits = logits.log()                  # it returns probabilities
        torch.testing.assert_close(r.router_logits, logits.reshape(-1, logits.shape[-1]).float())
        assert r.shape == (2, 7) and r.top_k_index.shape == r.top_k_weights.shape and r.num_tokens == 14
        assert (r.top_k_index.sort(-1)[0].diff() > 0).all() and r.router_logits.dtype == r.top_k_weights.dtype == torch.float32
    assert check_rules(model, ids) == len(records)


@torch.no_grad()
def test_identity_changes_no_bit(family):
    name, model, ids = family
    y = model(input_ids=ids).logits
    with intervene(model, lambda r: r.replace()), record_routing(model): assert torch.equal(model(input_ids=ids).logits, y)
    same = lambda r: r.replace(top_k_index=r.top_k_index.clone(), top_k_weights=r.top_k_weights.clone())
    with intervene(model, same): torch.testing.assert_close(model(input_ids=ids).logits, y, atol=1e-4, rtol=1e-4)
    for f in (drop_top1, temperature(5), override_top_k(1), ban_experts([0])):
        with intervene(model, f): z = model(input_ids=ids).logits
        assert z.isfinite().all() and (f is drop_top1) <= (not torch.allclose(z, y))
    assert torch.equal(model(input_ids=ids).logits, y)


@torch.no_grad()
def test_drop_top1_equals_an_independent_computation(family):
    name, model, ids = family
    if FAMILIES[name] is None: pytest.skip('weights of its own, held to its own code by check_rules')
    score, norm = FAMILIES[name]
    layer_name, layer = next(iter(moe_layers(model).items()))
    seen, adapter = [], adapter_of(layer)
    routed = layer if name == 'llama4_text' else layer.experts                # their sum of experts is inside the layer
    h = routed.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    xs = []
    with record_routing(model) as records, adapter.expert_inputs(layer, xs): model(input_ids=ids)
    with intervene(model, drop_top1, [layer_name]): model(input_ids=ids)
    h.remove()
    assert len(seen) == 2
    r, x = records[layer_name][0], xs[0]
    p = r.router_logits.softmax(-1) if score == 'softmax' else r.router_logits.sigmoid()
    rank = p + r.router.expert_bias if r.router.expert_bias is not None else p
    if norm is None: norm = adapter.router(layer).norm_topk_prob if hasattr(adapter.router(layer), 'norm_topk_prob') else True
    factor = next((float(getattr(adapter.router(layer), n)) for n in ('routed_scaling_factor', 'route_scale', 'router_scaling_factor') if hasattr(adapter.router(layer), n)), 1.)
    def mixed(sets):
        rows = []
        for t, chosen in enumerate(sets):
            w = {e: p[t, e] for e in chosen}
            total = sum(w.values()) if norm else 1.
            rows.append(sum(run(e, t, w[e] / total * factor) for e in chosen))
        return torch.stack(rows)
    def run(e, t, w):
        if e >= r.num_experts: return w * x[t]                            # LongCat's identity experts
        one = lambda v: adapter.run_expert(layer, v[None], torch.tensor([e]))[0]
        return one(w * x[t]) if name == 'llama4_text' else w * one(x[t])
    before = [row.tolist() for row in r.top_k_index]
    after = []
    for t, chosen in enumerate(before):
        rest = [e for e in rank[t].argsort(descending=True).tolist() if e not in chosen]
        best = max(chosen, key=lambda e: rank[t, e].item())
        after.append([e for e in chosen if e != best] + rest[:1])
    change = mixed(after) - mixed(before)
    torch.testing.assert_close((seen[1] - seen[0]).reshape(change.shape), change, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize('name', ['mixtral', 'deepseek_v3', 'gpt_oss', 'llama4_text'])
@torch.no_grad()
def test_generation_and_swaps(name):
    model, ids = tiny_moe(name), torch.randint(96, (2, 5))
    model.config.use_cache = True
    with record_routing(model) as records, intervene(model, drop_top1): model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert all([r.shape for r in rs] == [(2, 5), (2, 1), (2, 1)] for rs in records.values())
    a, b = moe_layers(model)
    y = model(input_ids=ids).logits
    with swap_routers(model, {a: b, b: a}), record_routing(model) as records: assert not torch.allclose(model(input_ids=ids).logits, y)
    assert all(r[0].shape == (2, 5) for r in records.values())


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'deepseek_v3', 'gpt_oss', 'llama4_text'])
@torch.no_grad()
def test_bfloat16(name):
    model, ids = tiny_moe(name).to(torch.bfloat16), torch.randint(96, (2, 5))
    y = model(input_ids=ids).logits
    with intervene(model, lambda r: r.replace()), record_routing(model) as records: assert torch.equal(model(input_ids=ids).logits, y)
    assert all(r[0].top_k_weights.dtype == torch.float32 for r in records.values())
    with intervene(model, drop_top1): assert model(input_ids=ids).logits.dtype == torch.bfloat16


def test_gradients_flow_through_records():
    model = tiny_moe('mixtral').train()
    with record_routing(model) as records: model(input_ids=torch.randint(96, (2, 5)))
    sum(r[0].router_logits.logsumexp(-1).square().mean() for r in records.values()).backward()
    assert all(l.gate.weight.grad.abs().sum() > 0 for l in moe_layers(model).values())


@pytest.mark.parametrize('name', ['jetmoe', 'deepseek_v4'])
def test_unknown_families_are_named(name):
    if not installed(name): pytest.skip('not in this transformers')
    with pytest.raises(ValueError, match=r'no adapter knows how \w+ routes: register its router'): moe_layers(tiny_moe(name))


def test_dense_models_have_no_layers():
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert moe_layers(transformers.LlamaForCausalLM(config)) == {}
