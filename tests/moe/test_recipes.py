"""The eight recipes against `naive.py`, and what must hold of every one of them."""
import copy, io, pickle
from dataclasses import replace

import pytest, torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import naive
from libmoe_nb.moe.config import MoESpec, recipes
from libmoe_nb.moe.experts import FeedForward
from libmoe_nb.moe.layers import MoELayer, aux_loss, link_layers
from libmoe_nb.moe.recipes import build_layer
from libmoe_nb.analysis.tracing import intervene, record_routing

NAMES = ['dense', 'smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3', 'tcmoe', 'moe_plus_plus']
SPARSE = NAMES[1:]
SPEC = MoESpec(hidden_size=6, num_experts=5, top_k=3, num_shared_experts=1, moe_intermediate_size=4)
close = torch.testing.assert_close


def spec(name, **kw):
    options = kw.pop('options', {})
    return replace(SPEC, recipe=name, options=options, **kw)


def made(name, seed=0, dtype=torch.float64, **kw):
    "A layer of random parameters that are large enough for every part to matter"
    g = torch.Generator().manual_seed(seed)
    layer = build_layer(spec(name, **kw)).to(dtype)
    with torch.no_grad():
        for n, p in layer.named_parameters():
            if 'log_temperature' not in n: p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype))
    return layer


def tokens(*shape, seed=1, dtype=torch.float64, d=6):
    return torch.randn(*shape, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ffn_params(up, down, up_bias=None, down_bias=None):
    p = dict(up=up.tolist(), down=down.tolist())
    return p if up_bias is None else p | dict(up_bias=up_bias.tolist(), down_bias=down_bias.tolist())


def dense_params(m):
    up = m.gate_up_proj if m.gated else m.up_proj
    return ffn_params(up.weight, m.down_proj.weight, up.bias, m.down_proj.bias)


def naive_params(layer):
    "A layer's parameters, by name from its state dict, as `naive.py` wants them"
    if isinstance(layer, FeedForward): return dict(ffn=dense_params(layer))
    sd, up = layer.state_dict(), 'gate_up_proj' if layer.experts.gated else 'up_proj'
    e = [sd.get(f'experts.{n}') for n in (up, 'down_proj', up + '_bias', 'down_proj_bias')]
    p = dict(experts=[ffn_params(*(None if t is None else t[i] for t in e)) for i in range(len(e[0]))])
    names = {'weight': 'router', 'gating_residual': 'gating_residual', 'proj': 'reduce', 'embeddings': 'embeddings'}
    p |= {names[k]: sd[f'router.{k}'].tolist() for k in names if f'router.{k}' in sd}
    if 'router.log_temperature' in sd: p['tau'] = sd['router.log_temperature'].exp().item()
    if layer.shared_experts is not None: p['shared'] = dense_params(layer.shared_experts)
    if (z := layer.zero_experts) is not None:
        p |= dict(num_zero=z.num_zero, num_copy=z.num_copy, constant=z.constant.tolist(),
                  constant_gate=z.constant_gate.tolist())
    return p


def naive_options(layer):
    if isinstance(layer, FeedForward): return {}
    s = layer.spec
    routed = s.top_k - s.num_shared_experts * (s.recipe in ('sharede_v2', 'sharede_v3'))
    norm = routed > 1 if s.norm_topk_prob is None else s.norm_topk_prob
    o = dict(s.options, norm_topk_prob=norm, hidden_act=s.hidden_act, gated=s.gated)
    if layer.router.expert_bias is not None: o['expert_bias'] = layer.router.expert_bias.tolist()
    return o


def run_naive(name, layer, x, o=None, previous=None):
    "Outputs [..., d] and one (logits, scores, chosen, weights) per token"
    p, k = naive_params(layer), None
    if isinstance(layer, MoELayer):
        k = layer.spec.top_k - (layer.spec.num_shared_experts if name in ('sharede_v2', 'sharede_v3') else 0)
    o = naive_options(layer) if o is None else o
    flat = x.reshape(-1, x.shape[-1]).tolist()
    out = [naive.token(name, p, t, k, o, *(() if previous is None else (previous[i],))) for i, t in enumerate(flat)]
    return torch.tensor([y for y, _ in out], dtype=torch.float64).reshape(x.shape), [r for _, r in out]


def check(name, layer, x, o=None):
    want, told = run_naive(name, layer, x, o)
    close(layer(x), want, atol=1e-10, rtol=1e-10)
    if told[0] is None: return told
    r = layer.router(x)
    close(r.router_logits, torch.tensor([t[0] for t in told], dtype=torch.float64), atol=1e-11, rtol=1e-11)
    close(r.scores, torch.tensor([t[1] for t in told], dtype=torch.float64), atol=1e-11, rtol=1e-11)
    assert r.top_k_index.tolist() == [t[2] for t in told]
    close(r.top_k_weights, torch.tensor([t[3] for t in told], dtype=torch.float64), atol=1e-11, rtol=1e-11)
    return told


# -- each recipe equals the naive one ---------------------------------------------------------------------------

def test_all_recipes_are_here(): assert set(NAMES) <= set(recipes)


@pytest.mark.parametrize('kernel', ['auto', 'loop'])
@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('name', NAMES)
def test_equals_naive(name, seed, kernel):
    layer, x = made(name, seed), tokens(4, 5, seed=seed)
    if name != 'dense': layer.experts.kernel = kernel
    check(name, layer, x)


@pytest.mark.parametrize('form', [dict(hidden_act='silu', gated=True), dict(hidden_act='gelu', bias=True),
                                  dict(hidden_act='gelu_pytorch_tanh', gated=True, bias=True)],
                         ids=['swiglu', 'gelu-bias', 'geglu-bias'])
@pytest.mark.parametrize('name', NAMES)
def test_equals_naive_with_other_experts(name, form):
    check(name, made(name, 3, **form), tokens(12), form)


BIG = dict(num_experts=9, top_k=4)   # sharede: 8 routed, 3 chosen
OPTIONS = [(n, dict(kw), o) for n, kw, o in [
    *[(n, dict(norm_topk_prob=False), {}) for n in SPARSE if n != 'tcmoe'],
    *[('xmoe', {}, dict(double_softmax=d)) for d in (True, 'chosen')],
    ('xmoe', {}, dict(learnable_temperature=True)),
    *[(n, BIG, dict(shared_weight=.2)) for n in ('sharede_v2', 'sharede_v3')],
    *[(n, BIG, dict(routed_scaling_factor=2.5)) for n in ('sharede_v2', 'sharede_v3')],
    *[(n, BIG, dict(n_group=4, topk_group=2)) for n in ('sharede_v2', 'sharede_v3')],
    *[(n, BIG | dict(norm_topk_prob=False), dict(n_group=2, topk_group=1, routed_scaling_factor=16.))
      for n in ('sharede_v2', 'sharede_v3')]]]


@pytest.mark.parametrize('name, kw, options', OPTIONS,
                         ids=lambda v: v if isinstance(v, str) else '-'.join(v) or 'default')
def test_equals_naive_with_options(name, kw, options):
    layer = made(name, 5, options=options, **kw)
    if options.get('learnable_temperature'): layer.router.log_temperature.data.fill_(-.5)
    plain = made(name, 5, **kw) if options else made(name, 5)
    x = tokens(30)
    check(name, layer, x)
    if options != dict(learnable_temperature=True): plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x), plain(x)), 'the option does nothing'


@pytest.mark.parametrize('name', ['smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3', 'moe_plus_plus'])
def test_bias_chooses_but_never_weighs(name):
    layer = made(name, 2, options=dict(expert_bias=True))
    x, r0 = tokens(25), None
    r0 = layer.router(x)
    layer.router.expert_bias.copy_(torch.randn(r0.num_choices, generator=torch.Generator().manual_seed(0)))
    check(name, layer, x)
    r = layer.router(x)
    assert (r.top_k_index.sort().values != r0.top_k_index.sort().values).any()
    close(r.scores, r0.scores, atol=0, rtol=0)
    w = r.scores.gather(1, r.top_k_index)
    close(r.top_k_weights, w / w.sum(-1, keepdim=True))


def test_groups_are_ranked_with_the_bias():
    layer = made('sharede_v3', 4, options=dict(expert_bias=True, n_group=4, topk_group=2), **BIG)
    layer.router.expert_bias.copy_(torch.linspace(-1, 1, 8))
    check('sharede_v3', layer, tokens(40))


def test_ternary_in_every_situation():
    "Nulls chosen, negatives chosen, +E and -E of one token"
    layer, x = made('tcmoe', 7, options=dict(null_offset=0.)), tokens(60)
    layer.router.weight.data[10:] *= 1.5
    with torch.no_grad(): layer.router.weight[5:10] += .6 * layer.router.weight[:5]
    naive_layer = copy.deepcopy(layer); naive_layer.router.weight.data = layer.router.weight.data.clone()
    # the formula's offset of the nulls is -10; give it back through a hidden unit that is always 1
    x = torch.cat([x[:, :5], torch.ones(60, 1, dtype=x.dtype)], 1)
    naive_layer.router.weight.data[10:, 5] += 10
    want, told = run_naive('tcmoe', naive_layer, x)
    close(layer(x), want, atol=1e-10, rtol=1e-10)
    kinds = [sorted(c if c < 10 else 'null' for c in t[2]) if not any(c >= 10 for c in t[2]) else 'null' for t in told]
    assert kinds.count('null') > 3, 'the case is not covered'
    both = [t for t, (_, _, chosen, _) in enumerate(told) if any(c + 5 in chosen for c in chosen if c < 5)]
    assert len(both) > 3 and any(5 <= c < 10 for _, _, chosen, _ in told for c in chosen)
    r = layer.router(x)
    for t in range(60):   # no expert runs twice for a token, and none for a null
        runs = [e for e in r.expert_index[t].tolist() if e < 5]
        assert len(runs) == len(set(runs)) == len({c % 5 for c in told[t][2] if c < 10})
    all_null = copy.deepcopy(layer); all_null.router.weight.data[10:, 5] += 100
    assert all_null.router(x).expert_index.eq(5).all() and not all_null(x).any()


def test_ternary_default_offsets():
    layer, x = made('tcmoe', 8), tokens(40)
    layer.router.weight.data[10:] *= 6    # so that some tokens choose nulls in spite of -10
    told = check('tcmoe', layer, x)
    assert any(c >= 10 for t in told for c in t[2]) and any(c < 5 for t in told for c in t[2])


@pytest.mark.parametrize('zeros', [(1, 1, 3), (2, 0, 1), (0, 2, 0), (0, 0, 2), (1, 0, 0)])
def test_zero_computation_experts(zeros):
    layer, x = made('moe_plus_plus', 9, options=dict(zip(('num_zero', 'num_copy', 'num_constant'), zeros))), tokens(40)
    told = check('moe_plus_plus', layer, x)
    Z, chosen = sum(zeros), {c for t in told for c in t[2]}
    assert chosen == set(range(5 + Z)), 'not every expert was covered'


def test_gating_residual_over_layers():
    chain, x = nn.Sequential(*(made('moe_plus_plus', s) for s in (1, 2, 3))), tokens(3, 4)
    link_layers(chain)
    with record_routing(chain) as records: y = chain(x)
    h, previous = x, None
    for i, layer in enumerate(chain):
        h, told = run_naive('moe_plus_plus', layer, h, previous=previous)
        previous = [t[0] for t in told]
        close(records[str(i)][0].router_logits, torch.tensor(previous, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    close(y, h, atol=1e-9, rtol=1e-9)
    lone, _ = run_naive('moe_plus_plus', chain[2], chain[1](chain[0](x)))
    assert not torch.allclose(y, lone)


def test_gating_residual_skips_dense_layers_and_survives_copies():
    model = nn.Sequential(made('moe_plus_plus', 1), made('dense', 2), made('moe_plus_plus', 3))
    link_layers(model)
    x = tokens(7)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(): model[0].router.weight.mul_(2)     # a copy reads its own first layer, not the original's
        assert torch.equal(twin(x), y)
        with torch.no_grad(): model[0].router.weight.div_(2)
        assert twin[2]._previous[0] is twin[0]


@pytest.mark.parametrize('name', NAMES)
def test_ties_go_to_the_lowest_index(name):
    layer, x = made(name, 1), tokens(9)
    if name == 'dense': return
    rows = layer.router.embeddings if name == 'xmoe' else layer.router.weight
    rows.data.copy_(rows.data[:1].expand_as(rows))
    told = check(name, layer, x)
    assert all(t[2] == list(range(layer.router.top_k)) for t in told)
    # in float32 with rows of which one number is not 0: equal columns of a product need not come out equal to the bit
    rows.data.zero_()[:, 0] = 1
    assert layer.float().router(x.float()).top_k_index.tolist() == [t[2] for t in told]


@pytest.mark.parametrize('name', SPARSE)
def test_ties_in_part(name):
    "Two pairs of experts with the same router rows: of each pair the first goes first"
    layer = made(name, 3)
    rows = layer.router.embeddings if name == 'xmoe' else layer.router.weight
    with torch.no_grad(): rows[2], rows[3] = rows[0], rows[1]
    told = check(name, layer, tokens(50))
    for _, _, chosen, _ in told:
        for a, b in ((0, 2), (1, 3)):
            if b in chosen: assert a in chosen and chosen.index(a) < chosen.index(b)
    assert any(2 in t[2] for t in told)


# -- gradients --------------------------------------------------------------------------------------------------

def with_params(module, x):
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()))
    return (lambda x, *ps: functional_call(module, dict(zip(names, ps)), (x,)),
            (x.clone().requires_grad_(), *values), names)


def margins(model, x):
    "Smallest gap between the last chosen and the first left out, so that no finite difference crosses it"
    with record_routing(model) as records: model(x)
    gaps = [r.scores.sort(-1, descending=True)[0].diff(dim=-1)[:, r.top_k - 1].abs().min().item()
            for rs in records.values() for r in rs if r.top_k < r.num_choices]
    return min(gaps, default=1.)


GRAD = [(n, {}, {}) for n in NAMES] + [
    ('xmoe', {}, dict(learnable_temperature=True)), ('xmoe', {}, dict(double_softmax=True)),
    ('xmoe', {}, dict(double_softmax='chosen')),
    ('tcmoe', {}, dict(null_offset=0., negative_offset=0.)),
    ('sharede_v3', dict(num_experts=5), dict(expert_bias=True, n_group=2, topk_group=1, shared_weight=.3)),
    ('smoe', dict(hidden_act='silu', gated=True, bias=True), {}),
    ('tcmoe', dict(hidden_act='gelu', bias=True), dict(null_offset=0.)),
    ('smoe_sigmoid', dict(norm_topk_prob=False), {})]


@pytest.mark.parametrize('name, kw, options', GRAD,
                         ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v)) or '.')
def test_gradcheck(name, kw, options):
    kw = dict(hidden_size=3, num_experts=4, moe_intermediate_size=2, top_k=2 if name[:6] != 'shared' else 3) | kw
    layers = [made(name, s, options=options, **kw) for s in ((0, 1) if name == 'moe_plus_plus' else (0,))]
    model = nn.Sequential(*layers)
    link_layers(model)
    x = next(t for s in range(99) if margins(model, t := tokens(5, seed=s, d=3)) > 1e-4)
    f, inputs, names = with_params(model, x)
    assert gradcheck(f, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)
    grads = dict(zip(('x', *names), torch.autograd.grad(f(*inputs).square().sum(), inputs, allow_unused=True)))
    idle = {n for n, g in grads.items() if g is None or not g.any()}
    assert not idle, f'no gradient for {idle}'


# -- symmetries -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_permuting_tokens_permutes_outputs(name):
    layer, x = made(name, 4), tokens(30)
    p = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    close(layer(x[p]), layer(x)[p], atol=1e-12, rtol=1e-12)


def permuted(layer, p):
    "The same layer with its experts in another order: parameter i is the old parameter p[i]"
    new, N = copy.deepcopy(layer), layer.experts.num_experts
    choices = dict(TernaryRouter=torch.cat([p, N + p]), ResidualRouter=p).get(type(layer.router).__name__, p)
    M = layer.router(tokens(1)).num_choices
    # nulls and zero-computation experts stay where they are
    choices = torch.cat([choices, torch.arange(len(choices), M)])
    with torch.no_grad():
        for n, q in new.experts.named_parameters(): q.copy_(q[p].clone())
        for n, q in new.router.named_parameters():
            if n in ('weight', 'embeddings'): q.copy_(q[choices].clone())
            # the previous layer's choices are renamed too
            if n == 'gating_residual': q.copy_(q[choices][:, choices].clone())
        if new.router.expert_bias is not None: new.router.expert_bias.copy_(new.router.expert_bias[choices].clone())
    return new, choices


@pytest.mark.parametrize('name', SPARSE)
def test_permuting_experts_changes_nothing(name):
    options = {} if name == 'tcmoe' else dict(expert_bias=True)
    layers, x = [made(name, s, options=options) for s in (1, 2)], tokens(3, 20)
    for l in layers:
        if options: l.router.expert_bias.copy_(.1 * torch.arange(len(l.router.expert_bias)))
    model = nn.Sequential(*layers)
    link_layers(model)
    p = torch.randperm(layers[0].experts.num_experts, generator=torch.Generator().manual_seed(3))
    assert (p != torch.arange(len(p))).any()
    new, choices = nn.Sequential(*(permuted(l, p)[0] for l in layers)), permuted(layers[0], p)[1]
    link_layers(new)
    with record_routing(model) as a, record_routing(new) as b: y, z = model(x), new(x)
    close(z, y, atol=1e-9, rtol=1e-9)
    for ra, rb in zip(a.values(), b.values()):
        assert torch.equal(choices[rb[0].top_k_index], ra[0].top_k_index)
    for l, m, ra, rb in zip(model, new, a.values(), b.values()):   # and no loss knows the experts' names
        for n, v in l.aux_losses(ra[0]).items(): close(m.aux_losses(rb[0])[n], v)


# -- sizes at the edge ------------------------------------------------------------------------------------------

def dense_of(up, down):
    ffn = FeedForward(up.shape[1], up.shape[0]).double()
    ffn.load_state_dict({'up_proj.weight': up, 'down_proj.weight': down})
    return ffn


@pytest.mark.parametrize('name', SPARSE)
def test_one_expert_is_the_dense_ffn(name):
    kw = dict(num_experts=1, top_k=1, num_shared_experts=0)
    if name[:6] == 'shared': kw = dict(num_experts=2, top_k=2, num_shared_experts=1)   # one shared, one routed
    options = dict(tcmoe=dict(null_offset=-1e4),
                   moe_plus_plus=dict(num_zero=0, num_copy=0, num_constant=0)).get(name, {})
    # it has three choices for its one expert, and weighs by score unless told
    if name == 'tcmoe': kw['norm_topk_prob'] = True
    layer, x = made(name, options=options, **kw), tokens(4, 5)
    # +E beats -E by its offset, everywhere
    if name == 'tcmoe': layer.router.weight.data[1] = layer.router.weight.data[0]
    up, down = layer.experts.up_proj[0], layer.experts.down_proj[0]
    if name[:6] == 'shared':
        s = layer.shared_experts
        up, down = torch.cat([s.up_proj.weight, up]), torch.cat([s.down_proj.weight, down], 1)
    y = dense_of(up, down)(x)
    if name == 'tcmoe':   # the one choice competes with -E, which was not chosen: p+ / (p+ + nulls) = 1
        close(layer.router(x).top_k_weights, torch.ones(20, 1, dtype=torch.float64))
    close(layer(x), y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('name', SPARSE)
def test_all_experts_chosen(name):
    "K = N: a mixture of all; for softmax scores it needs no renormalisation"
    layer, x = made(name, num_experts=4, top_k=4), tokens(15)
    check(name, layer, x)
    if name in ('smoe', 'xmoe', 'sharede_v2'):
        close(layer.router(x).top_k_weights.sort()[0], layer.router(x).scores.sort()[0])


@pytest.mark.parametrize('name', SPARSE)
def test_experts_without_tokens(name):
    "Their parameters get a gradient of zeros, everything else is as ever"
    layer, x = made(name), tokens(3, 4).abs()
    rows = layer.router.embeddings if name == 'xmoe' else layer.router.weight
    if name == 'xmoe':
        layer.router.proj.data.abs_()
        rows.data[-1] = -1.
    else: rows.data[-1] = -9. if name not in ('tcmoe', 'moe_plus_plus') else rows.data[-1]
    if name in ('tcmoe', 'moe_plus_plus'): rows.data[[4, 9] if name == 'tcmoe' else [4]] = -9.
    check(name, layer, x)
    idle = layer.experts.num_experts - 1
    assert not (layer.router(x).expert_index == idle).any()
    layer(x).square().sum().backward()
    for p in layer.experts.parameters():
        assert p.grad is not None and not p.grad[idle].any() and p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize('shape', [(), (1,), (7,), (1, 1), (2, 3), (2, 1, 3), (0,), (0, 4), (3, 0), (2, 2, 2, 2)],
                         ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_all_shapes(name, shape):
    layer, x = made(name, hidden_size=6), tokens(*shape).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    close(y.reshape(-1, 6), layer(x.reshape(-1, 6)), atol=1e-12, rtol=1e-12)
    if name == 'dense': return
    r = layer.router(x)
    assert r.shape == shape and r.num_tokens == x[..., 0].numel()
    for value in layer.aux_losses(r).values(): assert value.shape == () and value.isfinite()
    sum(layer.aux_losses(r).values()).backward()


@pytest.mark.parametrize('name', NAMES)
def test_not_contiguous(name):
    layer, x = made(name), tokens(6, 5)
    close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), atol=1e-12, rtol=1e-12)
    close(layer(x[::2, 1:4]), layer(x)[::2, 1:4], atol=1e-12, rtol=1e-12)


# -- number formats ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('name', NAMES)
def test_low_precision(name, dtype):
    "Routing is decided in float32 from the rounded parameters; outputs are near the exact ones and keep the dtype"
    layer, x = made(name, dtype=dtype, hidden_size=16, moe_intermediate_size=8), tokens(4, 8, d=16, dtype=dtype)
    with torch.no_grad():
        for n, p in layer.named_parameters():
            if not n.startswith('router'): p.mul_(.3)
    y, exact = layer(x), copy.deepcopy(layer).double()
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in layer.parameters())
    want, ok = exact(x.double()), torch.ones(32, dtype=bool)
    if name != 'dense':
        r, r64 = layer.router(x), exact.router(x.double())
        assert ({r.router_logits.dtype, r.scores.dtype, r.top_k_weights.dtype} == {torch.float32}
                and r.top_k_index.dtype == torch.int64)
        close(r.scores.double(), r64.scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(r.top_k_index, r64.top_k_index)
        close(aux_loss([(layer, r)])[0].double(), aux_loss([(exact, r64)])[0], atol=1e-4, rtol=1e-4)
    eps = torch.finfo(dtype).eps
    assert (y.double() - want).norm() < 4 * eps * want.norm()


@pytest.mark.parametrize('name', NAMES)
def test_autocast(name):
    layer, x = made(name, dtype=torch.float32, hidden_size=16), tokens(4, 8, d=16, dtype=torch.float32)
    y = layer(x)
    with torch.autocast('cpu', torch.bfloat16): z, r = layer(x), layer.router(x) if name != 'dense' else None
    assert z.dtype == torch.bfloat16 and (z.float() - y).norm() < .03 * y.norm()
    z.float().square().mean().backward()
    for n, p in layer.named_parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()), n
    if r is None: return
    for k in ('router_logits', 'scores', 'top_k_index', 'top_k_weights'):
        assert torch.equal(getattr(r, k), getattr(layer.router(x), k))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('nan')], ids=['nan', 'inf', '-nan'])
@pytest.mark.parametrize('name', NAMES)
def test_a_nan_token_hurts_itself_alone(name, bad, dtype):
    layer, x = made(name, dtype=dtype), tokens(2, 10, dtype=dtype)
    y = layer(x)
    broken = x.clone()
    broken[:, ::2] = bad
    z = layer(broken)
    close(z[:, 1::2], y[:, 1::2], atol=torch.finfo(dtype).eps * 50, rtol=torch.finfo(dtype).eps * 50)
    assert not z[:, ::2].isfinite().any(-1).all() and z.shape == y.shape
    if name == 'dense': return
    r = layer.router(broken)
    assert 0 <= r.top_k_index.min() and r.top_k_index.max() < r.num_choices
    good = torch.zeros(2, 10, dtype=bool); good[:, 1::2] = True
    for n, v in layer.aux_losses(r, good).items(): close(v, layer.aux_losses(layer.router(x), good)[n])
    z.sum().backward()   # gradients are NaN, but no kernel falls over


# -- behaviour as a module --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_purity(name):
    "Two forwards give the same bits and write nothing, in training and in evaluation, with gradients and without"
    model = nn.Sequential(made(name, 1, dtype=torch.float32), made(name, 2, dtype=torch.float32))
    link_layers(model)
    x, before = tokens(2, 9, dtype=torch.float32), copy.deepcopy(model.state_dict())
    seen = []
    for mode in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad): seen.append(model.train(mode)(x).detach())
    rng = torch.get_rng_state()
    model(tokens(3, 9, dtype=torch.float32)); seen.append(model(x).detach())   # another batch in between
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(seen[0], s) for s in seen[1:])
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize('name', NAMES)
def test_state_dict_round_trip(name):
    options = {} if name == 'dense' else dict(expert_bias=True)
    a, b, x = made(name, 1, options=options), made(name, 2, options=options), tokens(11)
    if options: a.router.expert_bias.copy_(.2 * torch.arange(len(a.router.expert_bias)))
    file = io.BytesIO(); torch.save(a.state_dict(), file); file.seek(0)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(a(x), b(x))
    assert torch.equal(copy.deepcopy(a)(x), a(x))
    assert (name == 'dense') or 'router.expert_bias' in a.state_dict()


META = [(n, {}) for n in NAMES] + [('xmoe', dict(learnable_temperature=True)), ('smoe', dict(expert_bias=True))]


@pytest.mark.parametrize('name, options', META, ids=str)
def test_meta_device(name, options):
    with torch.device('meta'): layer = build_layer(spec(name, options=options))
    assert all(t.is_meta for t in layer.state_dict().values())
    twin = build_layer(spec(name, options=options))
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    layer.to_empty(device='cpu').load_state_dict(twin.state_dict())
    x = tokens(8, dtype=torch.float32)
    close(layer(x), twin(x))
    if name != 'dense': close(aux_loss([(layer, layer.router(x))])[0], aux_loss([(twin, twin.router(x))])[0])


def flops(layer, x):
    with FlopCounterMode(display=False) as counter: layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize('name', ['tcmoe', 'moe_plus_plus'])
def test_choices_without_computation_cost_nothing(name):
    layer, x = made(name, dtype=torch.float32, moe_intermediate_size=64), tokens(32, dtype=torch.float32)
    cheap = torch.arange(10, 13) if name == 'tcmoe' else torch.arange(5, 8)   # nulls; zero, copy, constant
    costly = torch.arange(3)

    def cost(share):
        t = (torch.arange(32) < 32 * share)[:, None]
        def force(r): return r.replace(top_k_index=torch.where(t, cheap, costly))
        with intervene(layer, force): return flops(layer, x)
    all_computed, half, none = cost(0), cost(.5), cost(1)
    one = 2 * 2 * 6 * 64                       # two matrix products of one token and one expert
    assert all_computed - none >= 32 * 3 * one
    assert abs((all_computed - half) - (half - none)) <= .1 * (all_computed - none)
    assert none < .05 * all_computed            # what is left: the router, and the constant experts' two small products
    assert one * 32 * 3 <= all_computed < 1.3 * one * 32 * 3


def test_equal_signs_run_an_expert_once():
    layer, x = made('tcmoe', dtype=torch.float32, moe_intermediate_size=64), tokens(32, dtype=torch.float32)
    def force(*chosen): return lambda r: r.replace(top_k_index=torch.tensor([chosen]).expand(32, 3))
    with intervene(layer, force(0, 5, 12)): twice = flops(layer, x)
    with intervene(layer, force(0, 11, 12)): once = flops(layer, x)
    assert twice == once


@pytest.mark.parametrize('name', SPARSE)
def test_intervention_reaches_the_experts(name):
    layer, x = made(name), tokens(10)
    with intervene(layer, lambda r: r.replace(top_k_weights=2 * r.top_k_weights)): y = layer(x)
    shared = layer.shared_experts(x) if layer.shared_experts is not None else 0
    close(y, 2 * (layer(x) - shared) + shared, atol=1e-10, rtol=1e-10)


def test_a_linked_layer_alone():
    "The first layer of a chain runs alone; a later one says what it misses when its predecessor saw other tokens"
    model = nn.Sequential(made('moe_plus_plus', 1), made('moe_plus_plus', 2))
    link_layers(model)
    model(tokens(12))
    assert model[0](tokens(5)).shape == (5, 6)
    model(tokens(12))
    with pytest.raises(ValueError, match=r'previous_logits must be of shape \(5, 8\)'): model[1](tokens(5))


@pytest.mark.parametrize('name', SPARSE)
def test_activation_checkpointing(name):
    "Recomputing each layer in backward gives the same gradients, the gating residual's too, and the same records"
    model, x = nn.Sequential(*(made(name, s) for s in (1, 2, 3))), tokens(12)
    link_layers(model)

    def grads(run):
        model.zero_grad()
        with record_routing(model) as records: y = run(x)
        (y.square().mean() + aux_loss([(l, records[str(i)][0]) for i, l in enumerate(model)])[0]).backward()
        assert all(len(r) == 1 for r in records.values())
        return [p.grad.clone() for p in model.parameters()]

    def recomputed(h):
        for layer in model: h = checkpoint(layer, h, use_reentrant=False)
        return h
    for a, b in zip(grads(model), grads(recomputed)): close(a, b)
