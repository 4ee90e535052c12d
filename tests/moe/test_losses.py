"""The losses against `naive.py`, their reference values, and who counts in them."""
import copy, itertools, pickle
from dataclasses import replace

import pytest, torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

import naive
from processes import run_ranks
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.moe.layers import aux_loss
from libmoe_nb.moe.recipes import build_layer
from libmoe_nb.moe.losses import load_balancing_loss, null_reward, router_z_loss
from libmoe_nb.moe.routers import TernaryRouter
from libmoe_nb.moe.routing import Routing

close = torch.testing.assert_close
quick = settings(derandomize=True, deadline=None, max_examples=50, database=None)
f64 = torch.float64
SPARSE = ['smoe', 'smoe_sigmoid', 'xmoe', 'sharede_v2', 'sharede_v3', 'tcmoe', 'moe_plus_plus']
GROUPS = ['sequence', 'micro_batch', 'global_batch']


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def record(B=3, S=8, M=5, K=2, seed=0, sigmoid=False):
    "Random logits and what top-k makes of them"
    z = 2 * rand(B * S, M, seed=seed)
    p = z.sigmoid() if sigmoid else z.softmax(-1)
    w, i = p.topk(K)
    return Routing(z, p, i, w / w.sum(-1, keepdim=True), M, shape=(B, S))


def rows(r, keep=None):
    "A record as `naive.py` has it: a list of (logits, scores, chosen, weights)"
    keep = torch.arange(r.num_tokens) if keep is None else keep
    return list(zip(*(t[keep].tolist() for t in (r.router_logits, r.scores, r.top_k_index, r.top_k_weights))))


def take(r, keep, shape):
    "The record of some of the tokens"
    return r.replace(shape=shape,
                     **{k: getattr(r, k)[keep] for k in ('router_logits', 'scores', 'top_k_index', 'top_k_weights')})


def sequences(r):
    return [take(r, torch.arange(b * r.shape[1], (b + 1) * r.shape[1]), (1, r.shape[1])) for b in range(r.shape[0])]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 999)).flatmap(
    lambda t: st.tuples(*map(st.just, t[:3]), st.integers(1, t[2]), st.just(t[3]), st.booleans()))


def drawn(case): return record(*case[:4], seed=case[4], sigmoid=case[5])


# -- values -----------------------------------------------------------------------------------------------------

@quick
@given(sizes)
def test_balance_equals_naive(case):
    r = drawn(case)
    whole = naive.balance(rows(r), r.num_choices, r.top_k)
    each = [naive.balance(rows(s), r.num_choices, r.top_k) for s in sequences(r)]
    assert load_balancing_loss(r, group='micro_batch').item() == pytest.approx(whole)
    assert load_balancing_loss(r, group='global_batch').item() == pytest.approx(whole)
    assert load_balancing_loss(r).item() == pytest.approx(sum(each) / len(each))
    close(load_balancing_loss(r), torch.stack([load_balancing_loss(s) for s in sequences(r)]).mean())
    # no sequences: one group
    assert load_balancing_loss(r.replace(shape=(r.num_tokens,))).item() == pytest.approx(whole)
    assert router_z_loss(r).item() == pytest.approx(naive.z_loss(rows(r)))


@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('N', [1, 2, 5, 8])
def test_one_at_uniform_for_every_k(N, group):
    for K in range(1, N + 1):
        index = (torch.arange(2 * N)[:, None] + torch.arange(K)) % N
        for score in (1 / N, .9):           # softmax; sigmoids that sum to more than 1
            p = torch.full((2 * N, N), score, dtype=f64)
            r = Routing(p.log(), p, index, torch.full((2 * N, K), 1 / K), N, shape=(2, N))
            close(load_balancing_loss(r, group=group), torch.tensor(1., dtype=f64))


@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('N', [1, 2, 5, 66])
def test_n_at_collapse(N, group):
    for e in {0, N - 1}:
        p = torch.eye(N, dtype=f64)[[e] * 12]
        r = Routing(p, p, torch.full((12, 1), e), torch.ones(12, 1), N, shape=(3, 4))
        close(load_balancing_loss(r, group=group), torch.tensor(float(N), dtype=f64))


@quick
@given(sizes, st.data())
def test_padding_counts_for_nothing(case, data):
    r = drawn(case)
    lengths = data.draw(st.lists(st.integers(0, r.shape[1]), min_size=r.shape[0], max_size=r.shape[0]))
    mask = torch.arange(r.shape[1])[None] < torch.tensor(lengths)[:, None]
    real = mask.flatten().nonzero()[:, 0]
    each = [naive.balance(rows(s)[:n], r.num_choices, r.top_k) for s, n in zip(sequences(r), lengths) if n]
    assert load_balancing_loss(r, mask).item() == pytest.approx(sum(each) / max(len(each), 1))
    for other in (mask.long(), mask.double(), mask.flatten()):
        close(load_balancing_loss(r, other), load_balancing_loss(r, mask))
    short = take(r, real, (len(real),))
    assert load_balancing_loss(r, mask, 'micro_batch').item() == pytest.approx(
        naive.balance(rows(r, real), r.num_choices, r.top_k) if len(real) else 0)
    close(load_balancing_loss(r, mask, 'micro_batch'), load_balancing_loss(short, group='micro_batch'))
    close(router_z_loss(r, mask), router_z_loss(short))
    # and what stands there does not matter, not even NaN
    noise = r.replace(scores=torch.where(mask.reshape(-1, 1), r.scores, torch.nan),
                      router_logits=torch.where(mask.reshape(-1, 1), r.router_logits, torch.nan),
                      top_k_index=torch.where(mask.reshape(-1, 1), r.top_k_index, 0))
    for f in (load_balancing_loss, router_z_loss): close(f(noise, mask), f(r, mask))


@quick
@given(sizes)
def test_order_does_not_matter(case):
    r = drawn(case)
    g = torch.Generator().manual_seed(case[4])
    p, e = torch.randperm(r.num_tokens, generator=g), torch.randperm(r.num_choices, generator=g)
    shuffled = take(r, p, r.shape)
    renamed = r.replace(scores=r.scores[:, e], router_logits=r.router_logits[:, e],
                        top_k_index=e.argsort()[r.top_k_index])
    for group in GROUPS:
        if group != 'sequence': close(load_balancing_loss(shuffled, group=group), load_balancing_loss(r, group=group))
        close(load_balancing_loss(renamed, group=group), load_balancing_loss(r, group=group))
    for s in (shuffled, renamed): close(router_z_loss(s), router_z_loss(r))
    within = torch.cat([b * r.shape[1] + torch.randperm(r.shape[1], generator=g) for b in range(r.shape[0])])
    close(load_balancing_loss(take(r, within, r.shape)), load_balancing_loss(r))


@quick
@given(sizes)
def test_balance_is_linear_in_its_weights_and_blind_to_scale(case):
    r = drawn(case)
    eta = rand(r.num_choices, seed=3).abs()
    close(load_balancing_loss(r, choice_weights=eta) + load_balancing_loss(r, choice_weights=1 - eta),
          load_balancing_loss(r))
    want = [naive.balance(rows(s), r.num_choices, r.top_k, eta.tolist()) for s in sequences(r)]
    assert load_balancing_loss(r, choice_weights=eta).item() == pytest.approx(sum(want) / len(want))
    factor = rand(r.num_tokens, 1, seed=4).abs() + .1          # scores are normalised row by row
    close(load_balancing_loss(r.replace(scores=r.scores * factor)), load_balancing_loss(r))


def test_z_loss_values():
    r = record(1, 2, 4)
    for c in (0., 3., -2.):
        close(router_z_loss(r.replace(router_logits=torch.full((2, 4), c))), (torch.tensor(4.).log() + c) ** 2)
    assert router_z_loss(r.replace(router_logits=torch.full((2, 4), 1e4))).isfinite()


# -- TC-MoE and MoE++ -------------------------------------------------------------------------------------------

def ternary(seed=0, **kw):
    r = TernaryRouter(6, 4, 3, init_std=1., **(dict(null_offset=0.) | kw)).double()
    r.weight.data = rand(11, 6, seed=seed)
    return r


def test_ternary_losses():
    r = ternary()(rand(3, 10, 6, seed=1))
    assert all((r.top_k_index.div(4, rounding_mode='floor') == kind).any()
               for kind in (0, 1, 2)), 'the case is not covered'
    each = [naive.balance_ternary(rows(s), 4) for s in sequences(r)]
    assert load_balancing_loss(r, over_experts=True).item() == pytest.approx(sum(each) / 3)
    assert null_reward(r).item() == pytest.approx(naive.null_mass(rows(r), 4))
    mask = torch.arange(10)[None] < torch.tensor([10, 4, 0])[:, None]
    each = [naive.balance_ternary(rows(s)[:n], 4) for s, n in zip(sequences(r), (10, 4))]
    assert load_balancing_loss(r, mask, over_experts=True).item() == pytest.approx(sum(each) / 2)
    assert null_reward(r, mask).item() == pytest.approx(naive.null_mass(rows(r, mask.flatten().nonzero()[:, 0]), 4))


def test_ternary_reference_values():
    "1 at uniform use of the experts, whatever signs and nulls; N at collapse; 0 where nothing was chosen"
    of, sign = ternary().choice_maps('cpu')
    def made(index, p):
        return Routing(p.log(), p, torch.tensor(index), torch.ones(len(index), len(index[0])), 4, of, sign,
                       (len(index),))
    flat = torch.full((4, 11), 1 / 11, dtype=f64)
    for index in ([[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]], [[0, 8, 9], [5, 8, 9], [2, 9, 10], [7, 8, 10]]):
        close(load_balancing_loss(made(index, flat), over_experts=True), torch.tensor(1., dtype=f64))
    half = torch.zeros(4, 11, dtype=f64); half[:, 2] = .4; half[:, 6] = .6          # +2 and -2 are the same expert
    close(load_balancing_loss(made([[2], [6], [6], [2]], half), over_experts=True), torch.tensor(4., dtype=f64))
    assert load_balancing_loss(made([[8, 9, 10]] * 4, flat), over_experts=True) == 0
    close(null_reward(made([[0]] * 4, flat)), torch.tensor(3 / 11, dtype=f64))


def test_ternary_terms_and_their_signs():
    layer = build_layer(MoESpec('tcmoe', hidden_size=6, num_experts=4, top_k=3, options=dict(null_offset=0.),
                                router_z_loss_coef=.001)).double()
    r = layer.router(rand(2, 5, 6))
    total, terms = aux_loss([(layer, r)])
    assert set(terms) == {'load_balancing_loss', 'router_z_loss', 'null_reward'}
    close(total, .01 * load_balancing_loss(r, over_experts=True) + .001 * router_z_loss(r) - 1e-5 * null_reward(r))
    # descending on the reward's term alone raises the null mass
    (layer.losses['null_reward'][0] * terms['null_reward']).backward()
    with torch.no_grad(): layer.router.weight -= 1e5 * layer.router.weight.grad
    assert null_reward(layer.router(rand(2, 5, 6))) > terms['null_reward']


def test_heterogeneous_weights():
    layer = build_layer(MoESpec('moe_plus_plus', hidden_size=6, num_experts=5, top_k=3,
                                options=dict(num_constant=2))).double()
    layer.router.weight.data = rand(9, 6)
    r = layer.router(rand(2, 12, 6, seed=1))
    assert (r.top_k_index >= 5).any()
    eta = [1.] * 5 + [.75] * 4
    want = [naive.balance(rows(s), 9, 3, eta) for s in sequences(r)]
    assert layer.aux_losses(r)['load_balancing_loss'].item() == pytest.approx(sum(want) / 2)
    other = build_layer(replace(layer.spec, options=dict(num_constant=2, zero_expert_weight=.2)))
    want = [naive.balance(rows(s), 9, 3, [1.] * 5 + [.2] * 4) for s in sequences(r)]
    assert other.aux_losses(r)['load_balancing_loss'].item() == pytest.approx(sum(want) / 2)


# -- a model's losses -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SPARSE)
def test_every_term_moves_the_router(name):
    spec = MoESpec(name, hidden_size=6, num_experts=5, top_k=3, num_shared_experts=1, router_z_loss_coef=.001)
    layer, x = build_layer(spec), rand(2, 9, 6).float()
    for p in layer.router.parameters(): p.data.normal_(generator=torch.Generator().manual_seed(1))
    if name == 'tcmoe': layer.router.offsets = -1., 0.
    assert set(layer.losses) == {'load_balancing_loss',
                                 'router_z_loss'} | ({'null_reward'} if name == 'tcmoe' else set())
    for term in layer.losses:
        layer.zero_grad()
        layer.aux_losses(layer.router(x))[term].backward()
        moved = {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {f'router.{n}' for n, p in layer.router.named_parameters() if n != 'gating_residual'}, term
        before, step = layer.aux_losses(layer.router(x))[term].item(), 1e-3
        with torch.no_grad():
            for p in layer.router.parameters():
                if p.grad is not None: p -= step * p.grad
        assert layer.aux_losses(layer.router(x))[term].item() < before, f'{term} does not descend along its gradient'


def test_only_scores_teach():
    "The gradient of the balance loss is N f_i (1/T) through the scores; counts carry none"
    r = record(1, 6, 4, 2, sigmoid=False)
    p = r.scores.clone().requires_grad_()
    load_balancing_loss(r.replace(scores=p)).backward()
    f = r.top_k_index.flatten().bincount(minlength=4) / 12
    want = 4 / 6 * (f - (f * r.scores).sum(-1, keepdim=True))     # rows are normalised, hence the second term
    close(p.grad, want.double())


def layer_of(**kw): return build_layer(MoESpec(hidden_size=6, num_experts=4, top_k=1, **kw))


def collapsed(e, T=8):
    p = torch.eye(4)[[e] * T]
    return Routing(p, p, torch.full((T, 1), e), torch.ones(T, 1), 4, shape=(2, T // 2))


def test_layers_are_averaged_or_summed_but_never_pooled():
    layers, records = [layer_of() for _ in range(4)], [collapsed(e) for e in range(4)]
    total, terms = aux_loss(zip(layers, records))
    assert terms['load_balancing_loss'].item() == pytest.approx(4) and total.item() == pytest.approx(.04)
    total, terms = aux_loss(zip(layers, records), reduction='sum')
    assert terms['load_balancing_loss'].item() == pytest.approx(16) and total.item() == pytest.approx(.16)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"): aux_loss([], reduction='max')


def test_each_layer_has_its_own_weight_and_group():
    a, b = layer_of(router_aux_loss_coef=.5), layer_of(router_aux_loss_coef=.1, aux_loss_group='micro_batch',
                                                       router_z_loss_coef=2.)
    r = record(2, 6, 4, 1)
    want = .5 * load_balancing_loss(r) + .1 * load_balancing_loss(r, group='micro_batch') + 2 * router_z_loss(r)
    close(aux_loss([(a, r), (b, r)], reduction='sum')[0], want)
    close(aux_loss([(a, r), (b, r)])[0], want / 2)
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    close(aux_loss([(a, r)], mask)[0], .5 * load_balancing_loss(r, mask))


def test_refusals():
    r = record(2, 6)
    with pytest.raises(ValueError, match="group must be one of sequence, micro_batch, global_batch, got 'layer'"):
        load_balancing_loss(r, group='layer')
    for f in (load_balancing_loss, router_z_loss, null_reward):
        with pytest.raises(ValueError, match=r'mask must be .* one entry for each of the 12 tokens, got \(2, 5\)'):
            f(r, torch.ones(2, 5, dtype=bool))


# -- several processes ------------------------------------------------------------------------------------------

def rank_record(rank, w):
    "Sequences of very different lengths, so that the ranks have unequal numbers of real tokens"
    x = rand(2, 6, 4, seed=rank) + rank
    z = x.flatten(0, 1) @ w.T
    p = z.softmax(-1)
    i = p.topk(2)[1]
    mask = torch.arange(6)[None] < torch.tensor([[6, 5], [2, 0]][rank])[:, None]
    return Routing(z, p, i, p.gather(1, i), 5, shape=(2, 6)), mask


def worker(rank, world, path):
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=world)
    w, out = rand(5, 4, seed=9).requires_grad_(), {}
    r, mask = rank_record(rank, w)
    for name, m, group in [('plain', None, 'global_batch'), ('padded', mask, 'global_batch'),
                           ('own', mask, 'micro_batch')]:
        loss = load_balancing_loss(r, m, group)
        grad, = torch.autograd.grad(loss, w, retain_graph=True)
        out[name] = loss.item(), grad
    torch.save(out, f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_global_batch_over_two_processes(tmp_path):
    code = "import os, sys; from test_losses import worker; worker(int(os.environ['RANK']), 2, sys.argv[1])"
    for done in run_ranks(code, tmp_path): assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f'{i}.pt') for i in range(2)]
    w = rand(5, 4, seed=9).requires_grad_()
    (a, ma), (b, mb) = rank_record(0, w), rank_record(1, w)
    both = Routing(*(torch.cat([getattr(a, k), getattr(b, k)])
                     for k in ('router_logits', 'scores', 'top_k_index', 'top_k_weights')), 5, shape=(4, 6))
    for name, mask in [('plain', None), ('padded', torch.cat([ma, mb]))]:
        want = load_balancing_loss(both, mask, 'micro_batch')
        assert (ranks[0][name][0] + ranks[1][name][0]) / 2 == pytest.approx(want.item())
        # as data parallelism averages them
        close((ranks[0][name][1] + ranks[1][name][1]) / 2, torch.autograd.grad(want, w, retain_graph=True)[0])
    assert (ranks[0]['own'][0] == pytest.approx(load_balancing_loss(a, ma, 'micro_batch').item())
            != pytest.approx(ranks[0]['padded'][0]))


# -- what the paper's code computes -----------------------------------------------------------------------------

def test_first_choices_alone_by_hand():
    "Three tokens that choose {0, 2}, {0, 1}, {1, 2} of three: f is (2/3, 1/3, 0), with P uniform 1"
    r = replace(record(1, 3, 3, 2), router_logits=torch.zeros(3, 3, dtype=f64),
                scores=torch.full((3, 3), 1/3, dtype=f64),
                top_k_index=torch.tensor([[0, 2], [0, 1], [1, 2]]))
    close(load_balancing_loss(r, first_only=True), torch.tensor(1., dtype=f64))
    r = r.replace(scores=torch.tensor([[.5, .3, .2]], dtype=f64).expand(3, 3))
    close(load_balancing_loss(r, first_only=True), torch.tensor(3 * (2/3 * .5 + 1/3 * .3), dtype=f64))
    close(load_balancing_loss(r), torch.tensor(1., dtype=f64))


def test_raw_sigmoid_scores_of_a_half_give_half_of_it_for_each_expert():
    r = record(2, 4, 6, 2, sigmoid=True)
    r = r.replace(router_logits=torch.zeros_like(r.scores), scores=torch.full_like(r.scores, .5))
    close(load_balancing_loss(r), torch.tensor(1., dtype=f64))
    close(load_balancing_loss(r, share_of='raw'), torch.tensor(3., dtype=f64))
    close(load_balancing_loss(r, share_of='softmax'), torch.tensor(1., dtype=f64))


def test_unknown_share_is_named():
    with pytest.raises(ValueError, match="share_of must be 'scores', 'softmax' or 'raw', got 'logits'"):
        load_balancing_loss(record(), share_of='logits')


@pytest.mark.parametrize('name, logit', [('smoe', 1.), ('xmoe', 1.), ('tcmoe', 1.)])
def test_z_loss_of_plain_logits(name, logit):
    "Whatever offset or temperature: the z-loss of the released vision code sees what came before"
    spec = MoESpec(name, hidden_size=8, num_experts=4, top_k=2, moe_intermediate_size=4, router_init_std=.5,
                   router_z_loss_coef=.1, released_losses='vision')
    layer, x = build_layer(spec), rand(2, 3, 8).float()
    r, router = layer.router(x), layer.router
    flat = x.view(-1, 8)
    if name == 'xmoe':
        z = torch.nn.functional.normalize(flat @ router.proj.T, dim=-1)
        want = 1.5 * z @ torch.nn.functional.normalize(router.embeddings, dim=-1).T
    else: want = flat @ router.weight.T
    close(layer.aux_losses(r)['router_z_loss'], want.logsumexp(-1).square().mean())
    if name != 'smoe': assert (layer.aux_losses(r)['router_z_loss'] - router_z_loss(r)).abs() > .01


@pytest.mark.parametrize('form, names', [('vision', SPARSE), ('language', ['sharede_v3', 'tcmoe'])])
def test_released_losses_differ_where_they_should(form, names):
    for n in SPARSE:
        kw = dict(hidden_size=8, num_experts=6, top_k=3, num_shared_experts=1, moe_intermediate_size=4,
                  router_init_std=.5)
        layers = []
        for released in (None, form):
            torch.manual_seed(0)
            layers.append(build_layer(MoESpec(n, released_losses=released, **kw)))
        x = rand(3, 5, 8).float()
        a, b = (l.aux_losses(l.router(x))['load_balancing_loss'] for l in layers)
        assert (abs(a - b) > 1e-4) == (n in names), n


def test_language_loss_of_the_released_ternary_router():
    "Each sequence of a batch of B is told the counts of all of them, and nothing multiplies by N"
    N, B, S = 6, 3, 5
    layer = build_layer(MoESpec('tcmoe', hidden_size=8, num_experts=N, top_k=2, moe_intermediate_size=4,
                                router_init_std=.5, released_losses='language'))
    r = layer.router(rand(B, S, 8).float())
    assert (r.top_k_index < 2 * N).all()     # no null was chosen
    counts = torch.bincount((r.top_k_index % N).flatten(), minlength=N).float()
    p = r.scores[:, :2 * N] / r.scores[:, :2 * N].sum(-1, keepdim=True)
    p = (p[:, :N] + p[:, N:]).view(B, S, N).mean(1)
    theirs = (counts / (2 * S) * p).sum(-1).mean()
    close(layer.aux_losses(r)['load_balancing_loss'] * B / N, theirs)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['copied', 'pickled'])
def test_layers_and_specs_with_released_losses_can_be_copied(copied):
    for form, n in itertools.product(('vision', 'language'), SPARSE):
        spec = MoESpec(n, hidden_size=8, num_experts=6, top_k=3, num_shared_experts=1, moe_intermediate_size=4,
                       router_init_std=.5, router_z_loss_coef=.1, released_losses=form)
        layer, x = build_layer(spec), rand(3, 5, 8).float()
        assert copied(spec) == spec
        again, there = copied(layer), layer.aux_losses(layer.router(x))
        here = again.aux_losses(again.router(x))
        assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there), (form, n)


def test_a_spec_without_released_losses_is_saved_as_before():
    assert 'released_losses' not in MoESpec('smoe').to_dict()
    assert MoESpec.from_dict(MoESpec('smoe', released_losses='vision').to_dict()).released_losses == 'vision'
    with pytest.raises(ValueError, match='released_losses must be one of vision, language'):
        MoESpec('smoe', released_losses='text')
