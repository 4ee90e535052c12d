"""The eight recipes once more, token by token and expert by expert in plain Python, from the formulas alone.

Nothing here knows of the library: a layer is a dict of parameters and a dict of options. Slow on purpose. Numbers are
Python floats."""
import math

ACTS = {
    'relu': lambda v: max(v, 0.),
    'silu': lambda v: v / (1 + math.exp(-v)),
    'gelu': lambda v: v * .5 * (1 + math.erf(v / math.sqrt(2))),
    'gelu_pytorch_tanh': lambda v: .5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + .044715 * v ** 3)))}


def matvec(W, x, b=None): return [sum(w * v for w, v in zip(row, x)) + (b[i] if b else 0.) for i, row in enumerate(W)]
def add(x, y, c=1.): return [a + c * b for a, b in zip(x, y)]
def scale(x, c): return [a * c for a in x]
def norm(x): return math.sqrt(sum(a * a for a in x))
def sigmoid(v): return 1 / (1 + math.exp(-v))


def softmax(z):
    m = max(z)
    e = [math.exp(v - m) for v in z]
    return [v / sum(e) for v in e]


def logsumexp(z): return max(z) + math.log(sum(math.exp(v - max(z)) for v in z))


def top(scores, k):
    "The k best, best first; of equals the one with the lower index"
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def ffn(p, x, act='relu', gated=False):
    "One feed-forward network; `p` holds `up`, `down` and maybe `up_bias`, `down_bias`; gated: `up` stacks gate over up"
    h = matvec(p['up'], x, p.get('up_bias'))
    if gated:
        n = len(h) // 2
        h = [ACTS[act](g) * u for g, u in zip(h[:n], h[n:])]
    else: h = [ACTS[act](v) for v in h]
    return matvec(p['down'], h, p.get('down_bias'))


def normalised(w): return [v / sum(w) for v in w]


# -- routing one token: (logits, scores, chosen, weights) -------------------------------------------------------

def within_groups(key, n_group, topk_group, per_group):
    "Only the best `topk_group` of `n_group` groups can be chosen; a group is worth its `per_group` best added up"
    size = len(key) // n_group
    worth = [sum(sorted(key[g * size:(g + 1) * size], reverse=True)[:per_group]) for g in range(n_group)]
    keep = top(worth, topk_group)
    return [v if i // size in keep else -math.inf for i, v in enumerate(key)]


def pick(scores, k, o, per_group=1):
    key = add(scores, o['expert_bias']) if o.get('expert_bias') else scores
    if o.get('n_group', 1) > 1: key = within_groups(key, o['n_group'], o['topk_group'], per_group)
    chosen = top(key, k)
    w = [scores[i] for i in chosen]
    if o.get('norm_topk_prob', True): w = normalised(w)
    return chosen, scale(w, o.get('routed_scaling_factor', 1.))


def route_softmax(p, x, k, o):
    z = matvec(p['router'], x)
    s = softmax(z)
    return z, s, *pick(s, k, o)


def route_sigmoid(p, x, k, o):
    z = matvec(p['router'], x)
    s = [sigmoid(v) for v in z]
    return z, s, *pick(s, k, o, per_group=2)


def route_cosine(p, x, k, o):
    z = matvec(p['reduce'], x)
    cos = [sum(a * b for a, b in zip(z, e)) / (norm(z) * norm(e)) for e in p['embeddings']]
    logits = [p.get('g', 1.5) * c / p.get('tau', .3) for c in cos]
    s = softmax(logits)
    double = o.get('double_softmax', False)
    if double is True: s = softmax(s)
    chosen, w = pick(s, k, o)
    if double == 'chosen': w = softmax([s[i] for i in chosen])
    return logits, s, chosen, w


def route_ternary(p, x, k, o):
    z = matvec(p['router'], x)
    n = (len(z) - k) // 2
    z = [v - (0 if i < n else 1 if i < 2 * n else 10) for i, v in enumerate(z)]
    s = softmax(z)
    chosen = top(s, k)
    S = sum(s[i] for i in chosen if i < 2 * n) + sum(s[2 * n:])
    return z, s, chosen, [s[i] / S for i in chosen]


def route_residual(p, x, k, o, previous=None):
    z = matvec(p['router'], x)
    if previous is not None: z = add(z, matvec(p['gating_residual'], previous))
    s = softmax(z)
    return z, s, *pick(s, k, o)


# -- one token through a layer ----------------------------------------------------------------------------------

def experts_sum(p, x, pairs, o):
    y = [0.] * len(x)
    for i, w in pairs: y = add(y, ffn(p['experts'][i], x, o.get('hidden_act', 'relu'), o.get('gated', False)), w)
    return y


def zero_computation(p, j, x):
    "Expert j of those without a feed-forward network: zeros, then copies, then constants"
    if j < p['num_zero']: return [0.] * len(x)
    j -= p['num_zero']
    if j < p['num_copy']: return x
    j -= p['num_copy']
    a = softmax(matvec(p['constant_gate'][j], x))
    return add(scale(x, a[0]), p['constant'][j], a[1])


def token(recipe, p, x, k, o, previous=None):
    "-> (output, (logits, scores, chosen, weights)) of one token"
    if recipe == 'dense': return ffn(p['ffn'], x, o.get('hidden_act', 'relu'), o.get('gated', False)), None
    if recipe == 'moe_plus_plus':
        r = _, _, chosen, w = route_residual(p, x, k, o, previous)
        n = len(p['experts'])
        y = experts_sum(p, x, [(i, v) for i, v in zip(chosen, w) if i < n], o)
        for i, v in zip(chosen, w):
            if i >= n: y = add(y, zero_computation(p, i - n, x), v)
        return y, r
    if recipe == 'tcmoe':
        r = _, _, chosen, w = route_ternary(p, x, k, o)
        n = len(p['experts'])
        return experts_sum(p, x, [(i % n, v if i < n else -v) for i, v in zip(chosen, w) if i < 2 * n], o), r
    route = dict(smoe=route_softmax, smoe_sigmoid=route_sigmoid, xmoe=route_cosine, sharede_v2=route_softmax,
                 sharede_v3=route_sigmoid)[recipe]
    r = _, _, chosen, w = route(p, x, k, o)
    y = experts_sum(p, x, zip(chosen, w), o)
    if 'shared' in p:
        a = o.get('shared_weight')
        s = ffn(p['shared'], x, o.get('hidden_act', 'relu'), o.get('gated', False))
        y = add(y, s) if a is None else add(scale(y, 1 - a), s, a)
    return y, r


# -- losses: lists of routed tokens in, a number out ------------------------------------------------------------

def balance(tokens, n, k, eta=None):
    "One group of tokens: N times the sum over experts of share of the K|G| assignments times mean normalised score"
    G, total = len(tokens), 0.
    for i in range(n):
        f = sum(c == i for _, _, chosen, _ in tokens for c in chosen) / (k * G)
        P = sum(s[i] / sum(s) for _, s, _, _ in tokens) / G
        total += (eta[i] if eta else 1.) * f * P
    return n * total


def balance_ternary(tokens, n):
    "Over the N experts, positive and negative added; neither assignments nor mass of nulls count"
    G, total = len(tokens), 0.
    real = [c % n for _, _, chosen, _ in tokens for c in chosen if c < 2 * n]
    for i in range(n):
        f = real.count(i) / max(len(real), 1)
        P = sum((s[i] + s[i + n]) / sum(s[:2 * n]) for _, s, _, _ in tokens) / G
        total += f * P
    return n * total


def null_mass(tokens, n): return sum(sum(s[2 * n:]) for _, s, _, _ in tokens) / len(tokens)
def z_loss(tokens): return sum(logsumexp(z) ** 2 for z, _, _, _ in tokens) / len(tokens)
