"""Each family of transformers: its own router logits, an identity that changes no bit, interventions held to an
independent computation."""
import importlib, sys
import pytest, torch, transformers
from libmoe_nb.analysis.families import moe_classes
from libmoe_nb.analysis.tiny_models import tiny_config, tiny_moe
from libmoe_nb.analysis.tracing import check_rules
from libmoe_nb.analysis.interventions import ban_experts, drop_top1, override_top_k, temperature
from libmoe_nb.analysis.tracing import adapter_of, intervene, moe_layers, record_routing, swap_routers

transformers.logging.set_verbosity_error()
# model type -> how an independent implementation weighs chosen experts: (scores, renormalised?)
FAMILIES = dict(mixtral=('softmax', True), olmoe=('softmax', False), qwen2_moe=('softmax', False),
    qwen3_moe=('softmax', None), qwen3_next=('softmax', True),
    qwen3_5_moe_text=('softmax', True), flex_olmo=('softmax', False), mellum=('softmax', None),
    jamba=('softmax', False), hunyuan_v1_moe=('softmax', True), minimax=('softmax', True),
    gpt_oss=('softmax', True), granitemoe=('softmax', True), granitemoeshared=('softmax', True),
    granitemoehybrid=('softmax', True), granitemoe_swa=('softmax', True),
    aria_text=('softmax', True), ernie4_5_moe=('softmax', True), llama4_text=('sigmoid', False),
    deepseek_v2=('softmax', False), deepseek_v3=('sigmoid', None),
    deepseek_v32=('sigmoid', None), glm4_moe=('sigmoid', None), glm4_moe_lite=('sigmoid', None),
    glm_moe_dsa=('sigmoid', None), dots1=('sigmoid', None), exaone_moe=('sigmoid', None),
    solar_open=('sigmoid', None), axk1=('sigmoid', None), hy_v3=('sigmoid', None), hy_v4=('sigmoid', None),
    minimax_m2=('sigmoid', True), lfm2_moe=('sigmoid', None), laguna=('sigmoid', True),
    afmoe=('sigmoid', None), cohere2_moe=None, longcat_flash=('softmax', False), nemotron_h=('sigmoid', None),
    phimoe=None, gemma4_text=None,
    dbrx=('softmax', True), jetmoe=('softmax', True), deepseek_v4=None, switch_transformers=('softmax', False),
    axk2=('sigmoid', None), beam=('sigmoid', None), flint=('sigmoid', None),
    inkling_text=None, kolibri1=None, muse_spark_text=('sigmoid', True), openai_privacy_filter=None,
    zaya=('softmax', False),
    lara_mini=('softmax', None), hy_v4_vl_text=('sigmoid', None), inkling2_loop_text=('sigmoid', True))
# passes through each layer in one forward pass, where it is not one
VISITS = dict(inkling2_loop_text=[1, 3])
NO_LOGITS = 'dbrx openai_privacy_filter hy_v4_vl_text'.split()          # return none, or not all of them


def installed(name): return name in transformers.CONFIG_MAPPING

def call(model, ids, **kwargs):
    return model(input_ids=ids, **(dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}), **kwargs)

def outputs(model, ids):
    out = call(model, ids)
    return out.logits if 'logits' in out else out.last_hidden_state

def own_logits(name, out, n):
    "What the model itself says of its `n` learned routers, one entry for each time that it passed one"
    if name == 'switch_transformers': return [*out.encoder_router_logits, *out.decoder_router_logits]
    own = out.get('router_logits') or ()
    # before each come those of attention: twice until transformers 5.23, then once
    if name == 'jetmoe' and (each := len(own) // n): own = own[each - 1::each]
    return list(own)


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
    if not installed(request.param): pytest.skip('not in this transformers')
    model = tiny_moe(request.param, seed=1)
    for layer in moe_layers(model).values():          # a bias that matters, where the family has one
        for m in layer.modules():
            for n in ('e_score_correction_bias', 'expert_bias', 'balancing_biases'):
                if torch.is_tensor(b := getattr(m, n, None)):
                    b.data.copy_(.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0)))
    return request.param, model, torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_records_are_the_models_own(family):
    name, model, ids = family
    with record_routing(model) as records: out = call(model, ids, output_router_logits=True)
    assert records and [len(rs) for rs in records.values()] == VISITS.get(name, [1] * len(records))
    learned = [r for n, rs in records.items()
               if 'Hash' not in type(adapter_of(moe_layers(model)[n]).router(moe_layers(model)[n])).__name__
               for r in rs]
    own = own_logits(name, out, len(learned))
    assert name in NO_LOGITS or len(own) == len(learned)
    for logits, r in [] if name in NO_LOGITS else zip(own, learned):
        if name == 'gemma4_text': logits = logits.log()                  # it returns probabilities
        torch.testing.assert_close(r.router_logits, logits.reshape(-1, logits.shape[-1]).float())
    for r in [r for rs in records.values() for r in rs]:
        assert r.shape == (2, 7) and r.top_k_index.shape == r.top_k_weights.shape and r.num_tokens == 14
        assert ((r.top_k_index.sort(-1)[0].diff() > 0).all()
                and r.router_logits.dtype == r.top_k_weights.dtype == torch.float32)
    assert check_rules(model, ids,
                       **(dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {})) == len(records)


@torch.no_grad()
def test_identity_changes_no_bit(family):
    name, model, ids = family
    y = outputs(model, ids)
    with intervene(model, lambda r: r.replace()), record_routing(model): assert torch.equal(outputs(model, ids), y)
    same = lambda r: r.replace(top_k_index=r.top_k_index.clone(), top_k_weights=r.top_k_weights.clone())
    with intervene(model, same): torch.testing.assert_close(outputs(model, ids), y, atol=1e-4, rtol=1e-4)
    for f in (drop_top1, temperature(5), override_top_k(1), ban_experts([0])):
        with intervene(model, f): z = outputs(model, ids)
        assert z.isfinite().all() and (f is drop_top1) <= (not torch.allclose(z, y))
    assert torch.equal(outputs(model, ids), y)


@torch.no_grad()
def test_drop_top1_equals_an_independent_computation(family):
    name, model, ids = family
    if FAMILIES[name] is None: pytest.skip('weights of its own, held to its own code by check_rules')
    score, norm = FAMILIES[name]
    layer_name, layer = next(iter(moe_layers(model).items()))
    seen, adapter = [], adapter_of(layer)
    # their sum of experts is inside the layer
    routed = layer if name in ('llama4_text', 'jetmoe') else layer.experts
    h = routed.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    xs = []
    with record_routing(model) as records, adapter.expert_inputs(layer, xs): call(model, ids)
    with intervene(model, drop_top1, [layer_name]): call(model, ids)
    h.remove()
    assert len(seen) == 2
    r, x = records[layer_name][0], xs[0]
    p = r.router_logits.softmax(-1) if score == 'softmax' else r.router_logits.sigmoid()
    rank = p + r.router.expert_bias if r.router.expert_bias is not None else p
    if norm is None:
        norm = adapter.router(layer).norm_topk_prob if hasattr(adapter.router(layer), 'norm_topk_prob') else True
    factor = next((float(getattr(adapter.router(layer), n))
                   for n in ('routed_scaling_factor', 'route_scale', 'router_scaling_factor')
                   if hasattr(adapter.router(layer), n)), 1.)
    def mixed(sets):
        rows = []
        for t, chosen in enumerate(sets):
            w = {e: p[t, e] for e in chosen}
            total = sum(w.values()) if norm else 1.
            rows.append(sum(run(e, t, w[e] / total * factor) for e in chosen))
        return torch.stack(rows)
    def run(e, t, w):
        if e >= r.num_experts: return w * x[t] * (name == 'longcat_flash')   # identity experts there, nothing in ZAYA
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
    with record_routing(model) as records, intervene(model, drop_top1):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert all([r.shape for r in rs] == [(2, 5), (2, 1), (2, 1)] for rs in records.values())
    a, b = moe_layers(model)
    y = model(input_ids=ids).logits
    with swap_routers(model, {a: b, b: a}), record_routing(model) as records:
        assert not torch.allclose(model(input_ids=ids).logits, y)
    assert all(r[0].shape == (2, 5) for r in records.values())


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'deepseek_v3', 'gpt_oss', 'llama4_text'])
@torch.no_grad()
def test_bfloat16(name):
    model, ids = tiny_moe(name).to(torch.bfloat16), torch.randint(96, (2, 5))
    y = model(input_ids=ids).logits
    with intervene(model, lambda r: r.replace()), record_routing(model) as records:
        assert torch.equal(model(input_ids=ids).logits, y)
    assert all(r[0].top_k_weights.dtype == torch.float32 for r in records.values())
    with intervene(model, drop_top1): assert model(input_ids=ids).logits.dtype == torch.bfloat16


def test_gradients_flow_through_records():
    model = tiny_moe('mixtral').train()
    with record_routing(model) as records: model(input_ids=torch.randint(96, (2, 5)))
    sum(r[0].router_logits.logsumexp(-1).square().mean() for r in records.values()).backward()
    assert all(l.gate.weight.grad.abs().sum() > 0 for l in moe_layers(model).values())


def test_unknown_families_are_named():
    class NewMoE(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = torch.nn.Bilinear(4, 4, 4), torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"no adapter knows how NewMoE routes: register its router with "
                       r"libmoe_nb.analysis.adapters.register_moe\('Bilinear'"):
        moe_layers(NewMoE())


def test_dense_models_have_no_layers():
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2)
    assert moe_layers(transformers.LlamaForCausalLM(config)) == {}


# every class of the installed transformers, on its own

MORE = {'ernie4_5_vl_moe': dict(moe_intermediate_size=[16, 16]), 'glm5_next': dict(index_kpool=4, qk_rope_head_dim=0),
        'dots3_note': dict(adapter_in_dim=32, num_hidden_layers=42), 'step3p7': dict(pad_token_id=0)}
# their layers need more than hidden states; the first two are tested above as models, the third has the router of the
# second
WHOLE = {'deepseek_v4', 'gemma4', 'diffusion_gemma'}
ALL = moe_classes()
CLASSES = [r for r in ALL if r['adapter']]         # what transformers gains has a note, and is no failure

def sized(cls, model):
    "A small configuration of the class, with what the model's own layers need"
    fields = set(cls().to_dict()) | set(getattr(cls, 'attribute_map', {}))
    config = tiny_config(cls, **{k: v for k, v in MORE.get(model, {}).items() if k in fields})
    if not hasattr(config, 'shared_expert_intermediate_size'): config.shared_expert_intermediate_size = 16
    return config

def tiny_block(model, layer):
    "The layer alone, made of the first configuration of its module that fits, and its hidden size"
    module, errors = importlib.import_module(f'transformers.models.{model}.modeling_{model}'), []
    configs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, transformers.PreTrainedConfig)
               and c is not transformers.PreTrainedConfig]
    for c in sorted(configs, key=lambda c: ('Vision' in layer) != ('Vision' in c.__name__) or 'Text' not in c.__name__):
        for extra in {'ernie4_5_vl_moe': [(16,)], 'dots3_note': [(), (25,)]}.get(model, [(), (0,)]):
            try:
                config = sized(c, model)
                block = getattr(module, layer)(config, *extra).eval()
            except Exception as e: errors.append(e)
            else:
                for p in block.parameters(): torch.nn.init.normal_(p, std=.2)
                return block, config.hidden_size
    raise errors[-1]

def test_every_class_is_known_or_has_a_reason():
    assert len(CLASSES) > 60 and [r['layer'] for r in ALL if not r['adapter'] and not r['note']] == []

def test_a_class_that_transformers_gains_is_no_failure(monkeypatch, tmp_path):
    folder = tmp_path/'models'/'later'
    folder.mkdir(parents=True)
    layer = ('class {0}(nn.Module):\n    def __init__(self, config):\n        self.gate = {1}(config)\n        '
             'self.experts = LaterExperts(config)\n')
    (folder/'modeling_later.py').write_text(layer.format('LaterMoE', 'LaterTopKRouter')
                                            + layer.format('OddMoE', 'nn.Linear')
                                            + layer.format('UsualMoE', 'MixtralTopKRouter'))
    # what `import` gives now: loading a model may put another module in this place
    monkeypatch.setattr(sys.modules['transformers'], '__file__', str(tmp_path/'__init__.py'))
    later, odd, usual = moe_classes()
    assert (later['note'] == "not known yet: register its router with "
            "libmoe_nb.analysis.adapters.register_moe('LaterTopKRouter', ...)" and not later['adapter'])
    assert odd['note'].startswith('not known yet: ') and usual['adapter'] and not usual['note']

@pytest.mark.parametrize('row', [r for r in CLASSES if r['model'] not in WHOLE], ids=lambda r: r['layer'])
@torch.no_grad()
def test_each_class_alone(row):
    torch.manual_seed(0)
    block, d = tiny_block(row['model'], row['layer'])
    x, first = torch.randn(2, 5, d), lambda o: o[0] if isinstance(o, tuple) else o
    y = first(block(x))
    with record_routing(block) as records, intervene(block, lambda r: r.replace()):
        assert torch.equal(first(block(x)), y)
    (r,), = records.values()
    assert r.shape == (2, 5) and torch.equal(r.router.choose(r.scores).sort(-1)[0], r.top_k_index.sort(-1)[0])
    torch.testing.assert_close(r.router.weigh(r.scores, r.top_k_index), r.top_k_weights, atol=1e-5, rtol=1e-5)
    with intervene(block, drop_top1): assert not torch.allclose(first(block(x)), y)
    assert torch.equal(first(block(x)), y)
    adapter, (name, layer) = adapter_of(block), *moe_layers(block).items()
    xs = []
    with adapter.expert_inputs(layer, xs): block(x)
    out = adapter.run_expert(layer, xs[0].reshape(-1, xs[0].shape[-1])[:4], torch.tensor([0, 1, 1, r.num_experts - 1]))
    assert len(out) == 4 and out.isfinite().all() and all(len(p) == r.num_experts
                                                          for p in adapter.expert_parameters(layer).values())

@torch.no_grad()
def test_nllb_is_refused_for_what_it_does():
    model = tiny_moe('nllb-moe')
    with pytest.raises(ValueError, match='NllbMoeSparseMLP cannot be recorded'): moe_layers(model)
    ids = torch.randint(2, 96, (2, 7))
    y = call(model, ids).logits
    for n, p in model.named_parameters():
        if any(f'expert_{i}.' in n for i in range(2, 8)): p.zero_()
    if not torch.equal(call(model, ids).logits, y):
        pytest.skip('mended in this transformers: it can have an adapter now')

@torch.no_grad()
def test_a_switch_that_drops_tokens():
    layer = next(iter(moe_layers(tiny_moe('switch_transformers')).values()))
    layer.router.expert_capacity = 1
    x = torch.randn(3, 6, 32)
    with record_routing(layer) as records: y = layer(x)
    r, run = records[''][0], adapter_of(layer).run_expert
    torch.testing.assert_close(y.view(18, 32), r.top_k_weights * run(layer, x.view(18, 32), r.top_k_index[:, 0]),
                               atol=1e-5, rtol=1e-5)
    assert (r.top_k_weights == 0).any() and (r.top_k_weights > 0).any()
    with intervene(layer, lambda r: r.replace(top_k_weights=r.top_k_weights.clone())):
        torch.testing.assert_close(layer(x), y)
    with intervene(layer, override_top_k(2)), record_routing(layer) as records: z = layer(x)
    r = records[''][0]
    want = sum(r.top_k_weights[:, k, None] * run(layer, x.view(18, 32), r.top_k_index[:, k]) for k in range(2))
    torch.testing.assert_close(z.view(18, 32), want, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', ['dbrx', 'jetmoe', 'switch_transformers', 'zaya', 'deepseek_v4'])
@torch.no_grad()
def test_nested_interventions_see_each_other(name):
    model, ids = tiny_moe(name), torch.randint(96, (2, 5))
    with record_routing(model) as before, intervene(model, drop_top1), record_routing(model) as after: call(model, ids)
    for n in list(before)[:1]:
        a, b = before[n][0], after[n][0]
        assert (a.top_k_index[:, 0] != b.top_k_index[:, 0]).any() and not (a.top_k_index[:, :1] == b.top_k_index).any()
    a, b = list(before)[:2]
    y = outputs(model, ids)
    with swap_routers(model, {a: a}): torch.testing.assert_close(outputs(model, ids), y, atol=1e-4, rtol=1e-4)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with record_routing(model): pass
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
