"""What stands beside an FFN's matrices: each family with each kind of extra, kept to the number or refused by name; and
models that come back from disk in a process that never saw them."""
import re
import pytest, torch, torch.nn.functional as F
from processes import run_forked
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from test_upcycling import CAUSAL, ENCODERS, IDS, SMALL, T5, causal, encoder, error, inputs_of, rough, tiny_llava, WHOLE
from libmoe_nb.models.causal import MoEForCausalLM
from libmoe_nb.moe.config import MoESpec
from libmoe_nb.analysis.tracing import moe_layers
from libmoe_nb.models.ffns import ffn_families, ffn_report
from libmoe_nb.models.swapping import moeify
from libmoe_nb.models.upcycling import upcycle

class Act(nn.Module):
    def forward(self, x): return F.gelu(x)

class Scaled(nn.Module):
    "An activation that learns a factor, 1 as yet"
    def __init__(self): super().__init__(); self.alpha = nn.Parameter(torch.ones(()))
    def forward(self, x): return F.gelu(x) * self.alpha

class Norm(nn.LayerNorm): pass
class Adapter(nn.Module):
    def __init__(self, d): super().__init__(); self.a, self.b = nn.Linear(d, 2), nn.Linear(2, d)
    def forward(self, x): return self.b(self.a(x))

def place(root, path, m):
    *parents, last = path.split('.')
    for p in parents:
        if not hasattr(root, p): setattr(root, p, nn.Module())
        root = getattr(root, p)
    setattr(root, last, m)

class FFN(nn.Module):
    "An FFN of `family`, with extras"
    def __init__(self, family, extras=(), d=32, h=48):
        super().__init__()
        self.family, self.extras = ffn_families[family], extras
        f = self.family
        for path, (i, o) in {f.up: (d, h * (1 + f.fused)), f.gate: (d, h), f.down: (h, d)}.items():
            if path: place(self, path, nn.Linear(i, o))
        place(self, f.act if isinstance(f.act, str) else 'act_fn',
              Scaled() if 'learned activation' in extras else Act())
        if 'norm before' in extras: self.norm = Norm(d)
        if 'norm between' in extras: self.norm = Norm(h)
        if 'norm after' in extras: self.norm = Norm(d)
        if 'adapter' in extras: self.adapter = Adapter(d)
        if 'unused child' in extras: self.spare = Adapter(d)
        if 'parameter' in extras: self.gamma = nn.Parameter(torch.ones(d))
        if 'buffer' in extras: self.register_buffer('seen', torch.zeros(3))
        if 'dropout' in extras: self.dropout = nn.Dropout(.5)
        if 'dropout rate' in extras: self.hidden_dropout = .5
    def forward(self, x):
        f, e, part = self.family, self.extras, self.get_submodule
        y, act = self.norm(x) if 'norm before' in e else x, part(f.act if isinstance(f.act, str) else 'act_fn')
        h = part(f.up)(y)
        if f.fused: g, h = h.chunk(2, -1); h = act(g) * h
        else: h = act(part(f.gate)(y)) * h if f.gate else act(h)
        if 'inner residual' in e: h = h + F.pad(y, (0, h.shape[-1] - y.shape[-1]))
        if 'norm between' in e: h = self.norm(h)
        y = part(f.down)(h)
        if 'factor' in e: y = y * 1.7
        if 'norm after' in e: y = self.norm(y)
        if 'adapter' in e: y = y + self.adapter(x)
        if 'parameter' in e: y = y * self.gamma
        if 'residual' in e: y = y + x
        return F.dropout(y, .5, self.training) if 'dropout' in e or 'dropout rate' in e else y

def with_extras(family, *extras):
    dense = causal('llama')
    torch.manual_seed(1)
    for l in dense.model.layers: l.mlp = FFN(family, extras).eval()
    return rough_but(dense)

def rough_but(dense):
    for n, p in dense.named_parameters():
        if p.dim() > 1 and 'mlp' in n: p.data.mul_(2.)
    return dense

FAMILIES = [f for f in ffn_families]
GATED = [f for f in FAMILIES if ffn_families[f].gate or ffn_families[f].fused]
# (extras, what a gated family is refused for, what a family of two matrices is refused for); None: kept
EXTRAS = {'norm before': ('holds', None), 'norm between': ('holds', 'computes'), 'norm after': ('holds', None),
          'adapter': ('holds', None), 'unused child': ('holds', None), 'parameter': ('holds', None),
          'buffer': ('holds', None),
          'residual': ('computes', 'computes'), 'inner residual': ('computes', 'computes'),
          'factor': ('computes', 'computes'), 'learned activation': ('holds', 'holds'), 'dropout': (None, None),
          'dropout rate': (None, None),
          'dropout+factor': ('computes', None), 'dropout+residual': ('computes', None),
          'dropout+inner residual': ('computes', 'computes'), 'dropout rate+factor': ('computes', None)}
NAMES = {'norm before': 'norm .Norm.', 'norm between': 'norm .Norm.', 'norm after': 'norm .Norm.',
         'adapter': 'adapter .Adapter.', 'unused child': 'spare .Adapter.', 'parameter': 'gamma .Parameter.',
         'buffer': 'seen .Tensor.', 'learned activation': 'alpha .Parameter.'}

@pytest.mark.parametrize('family', FAMILIES)
def test_nothing_beside_the_matrices_is_dropped_in_silence(family):
    "Kept exactly, extras and all, or refused with the module's name and what is extra"
    f = ffn_families[family]
    plain = with_extras(family)
    assert error(plain, upcycle(plain, 'smoe', 4, 2, seed=0), input_ids=IDS) < 2e-5
    for kind, reasons in EXTRAS.items():
        extras = kind.split('+')
        dense = with_extras(family, *extras)
        nested, dropped = '.' in f.up, any('dropout' in e for e in extras)
        why = reasons[0] if family in GATED else reasons[1]
        # parts inside of other modules: what is around them stays
        if family not in GATED and nested and why == 'computes' and kind in ('residual', 'factor'): why = None
        # a family that goes as a whole, with its dropout
        if f.whole and family not in GATED: why = EXTRAS[kind][0]
        if why:
            found = ffn_report(dense)[0]
            assert found['swap'] == 'refused' and found['name'] == 'model.layers.0.mlp', (family, kind)
            with pytest.raises(ValueError, match=rf"layer model.layers.0.mlp .FFN. "
                               rf".*{dict(holds='would be lost', computes='computes something else')[why]}") as e:
                upcycle(dense, 'smoe', 4, 2)
            if kind in NAMES: assert re.search(NAMES[kind], str(e.value)), (family, kind, str(e.value))
            assert not moe_layers(dense)
            continue
        moe = upcycle(dense, 'smoe', 4, 2, seed=0)
        assert error(dense, moe, input_ids=IDS) < 2e-5, (family, kind)
        names = [n for n, _ in moe.named_parameters()] + [n for n, _ in moe.named_buffers()]
        for extra, name in dict(parameter='mlp.gamma', buffer='mlp.seen', adapter='mlp.adapter.a.weight',
                                **{'norm before': 'mlp.norm.weight', 'norm after': 'mlp.norm.weight',
                                   'unused child': 'mlp.spare.a.weight'}).items():
            if extra in extras: assert any(n.endswith(name) for n in names), (family, kind)
        if dropped and not f.whole:
            mlp, x = moe.base.model.layers[0].mlp, torch.randn(2, 50, 32)
            assert not torch.equal(mlp.train()(x), mlp(x)) and torch.equal(mlp.eval()(x), mlp(x)), (family, kind)

def test_a_family_that_looks_like_another_is_refused_by_moeify_too():
    "A norm between the matrices of a module that stays would meet outputs in the place of neurons"
    spec = MoESpec('smoe', 32, num_experts=4, top_k=2, moe_intermediate_size=16)
    dense = with_extras('gpt2', 'norm between')
    with pytest.raises(ValueError, match='layer model.layers.0.mlp .FFN. has the parts of family .gpt2., but computes '
                       'something else'):
        moeify(dense, spec)
    assert not moe_layers(dense) and moe_layers(moeify(with_extras('gpt2', 'norm after'), spec))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_checks_hold_in_every_precision(dtype):
    "A residual dwarfs what an FFN adds, and half precision rounds: neither hides a norm"
    for family, extras in (('llama', ('residual',)), ('gpt2', ('dropout', 'inner residual')),
                           ('clip', ('norm between',))):
        with pytest.raises(ValueError, match='layer model.layers.0.mlp .FFN.'):
            upcycle(with_extras(family, *extras).to(dtype), 'smoe', 4, 2)
    for family, extras in (('llama', ()), ('gpt2', ('dropout', 'residual')), ('t5', ())):
        assert moe_layers(upcycle(with_extras(family, *extras).to(dtype), 'smoe', 4, 2))

def test_published_gated_families():
    "BitNet's norm is refused, SeedOSS keeps its dropout, in eval and out of it"
    sizes = {k: v for k, v in SMALL.items() if k != 'pad_token_id'}
    build = lambda kind, **kw: rough(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **kw)))
    with pytest.raises(ValueError, match='layer model.layers.0.mlp .BitNetMLP. holds more than family .llama. reads, '
                       'which would be lost: ffn_sub_norm .BitNetRMSNorm.'):
        upcycle(build('bitnet'), 'smoe', 4, 2)
    dense = build('seed_oss', head_dim=8, residual_dropout=.4, attention_dropout=0.)
    moe = upcycle(dense, 'smoe', 4, 2, seed=0)
    assert error(dense, moe, input_ids=IDS) < 2e-5 and [r['swap'] for r in ffn_report(dense)] == ['whole'] * 2
    assert .3 < (moe.base.model.layers[0].mlp.train()(torch.randn(2, 50, 32)) == 0).float().mean() < .5

# back from disk, in another process

LOADER = '''
import sys, torch, transformers
from pathlib import Path
import libmoe_nb.models.causal
from libmoe_nb.models.upcycling import load_upcycled
torch.use_deterministic_algorithms(True, warn_only=True)   # what nobody initialises is NaN
for d in sorted(Path(sys.argv[1]).iterdir()):
    want = torch.load(d/'want.pt')
    try:
        model = (load_upcycled if want['special'] else transformers.AutoModelForCausalLM.from_pretrained)(d).eval()
        have = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        told = want['tensors']
        bad = [n for n in have.keys() | told.keys()
               if n not in have or n not in told or not torch.equal(have[n], told[n])]
        with torch.no_grad(): out = model(**want['inputs'])[0]
        right = not bad and torch.allclose(out, want['out'], rtol=1e-5, atol=1e-5)
        print('same' if right else 'WRONG', d.name, *sorted(bad)[:3])
    except Exception as e: print('WRONG', d.name, repr(e)[:300])
'''
MORE = dict(falcon_h1=dict(head_dim=8, mamba_d_state=4, mamba_d_conv=2, mamba_n_heads=4, mamba_d_head=8,
                           mamba_d_ssm=32, mamba_expand=1, mamba_n_groups=1, ssm_multipliers=[.5, 1.5, .7, 1.2, .9]),
    seed_oss=dict(head_dim=8), gemma3_text=dict(head_dim=8),
    **{k: dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1,
               encoder_attention_heads=4, encoder_ffn_dim=48) for k in ('pegasus', 'bart', 'marian', 'mvp')},
    whisper=dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                 encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, bos_token_id=1, eos_token_id=2,
                 decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None))

@pytest.mark.long
def test_every_family_comes_back_to_the_bit_in_a_fresh_process(tmp_path):
    "All parameters, all buffers (those that are in no file too), and what the model computes"
    recipes = ['smoe', 'xmoe', 'sharede_v2', 'moe_plus_plus', 'tcmoe', 'smoe_sigmoid', 'dense']
    models = [(f, causal(f), dict(input_ids=IDS)) for f in CAUSAL]
    models += [(f, rough(AutoModelForCausalLM.from_config(AutoConfig.for_model(f, **SMALL | kw))), dict(input_ids=IDS))
               for f, kw in MORE.items()]
    models += [(f'encoder_{f}', m, inputs_of(m)) for f in ENCODERS for m in [encoder(f)]]
    models += [(f'{f}_{act}',
                rough(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(f, **T5, feed_forward_proj=act))),
                dict(input_ids=IDS, decoder_input_ids=IDS)) for f in ('t5', 'umt5') for act in ('relu', 'gated-gelu')]
    models += [('llava', *tiny_llava(width=32))]
    for i, (name, dense, inputs) in enumerate(models):
        where = ['encoder', 'decoder'] if 't5' in name else WHOLE if name == 'llava' else None
        # two routed experts
        moe = upcycle(dense, recipes[i % len(recipes)], 4, 3 if 'sharede' in recipes[i % len(recipes)] else 2, seed=0,
                      where=where).eval()
        moe.save_pretrained(tmp_path/name)
        with torch.no_grad(): out = moe(**inputs)[0]
        if recipes[i % len(recipes)] in ('smoe', 'xmoe', 'sharede_v2', 'dense'):
            assert error(dense, moe, **inputs) < 2e-5, name
        tensors = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
        torch.save(dict(special=type(moe) is not MoEForCausalLM, inputs=inputs, out=out,
                        tensors={n: t.detach() for n, t in tensors.items()}), tmp_path/name/'want.pt')
    p = run_forked(LOADER, tmp_path, timeout=500)
    said = [l for l in p.stdout.splitlines() if l.startswith(('same', 'WRONG'))]
    assert not p.returncode and len(said) == len(models), p.stderr[-2000:]
    assert not [l for l in said if l.startswith('WRONG')]
