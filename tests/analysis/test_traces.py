"""Traces: memory, faults, foreign files, and metrics computed by hand from the raw file."""
import json, os, pickle, re, signal, subprocess, sys, textwrap
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st, HealthCheck
from processes import Piped
from safetensors.numpy import load_file, save_file
from libmoe_nb.analysis import metrics, model_metrics
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.traces import read_trace, write_trace
from libmoe_nb.analysis.tracing import moe_layers, record_routing

RECIPES = 'smoe smoe_sigmoid xmoe sharede_v2 sharede_v3 tcmoe moe_plus_plus'.split()


def probe(n=3, B=2, S=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        mask = torch.arange(S) < torch.randint(S // 2, S + 1, (B, 1), generator=g)
        yield dict(input_ids=torch.randint(3, 90, (B, S), generator=g), attention_mask=mask.long(),
                   domain=torch.randint(0, 3, (B,), generator=g))


@pytest.fixture(scope='module')
def models(): return [from_scratch('smoe', 'tiny', seed=s, router_init_std=.3) for s in (0, 1)]


@pytest.fixture(scope='module')
def files(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp('traces')
    for i, m in enumerate(models):
        write_trace(m, probe(), folder/f'{i}.safetensors', domains=['x', 'y', 'z'], info=dict(step=i))
    return [folder/f'{i}.safetensors' for i in (0, 1)]


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_trace_is_what_routers_chose(recipe, tmp_path):
    m = from_scratch(recipe, 'tiny', seed=0, router_init_std=.3)
    t = write_trace(m, probe(), tmp_path/'t', extra=2)
    m.eval()
    at = 0
    for b in probe():
        keep = b['attention_mask'].reshape(-1).bool()
        with torch.no_grad(), record_routing(m) as records:
            m(input_ids=b['input_ids'], attention_mask=b['attention_mask'])
        n = int(keep.sum())
        for i, (r,) in enumerate(records.values()):
            l = t.layer(i)
            assert (l.chosen[at:at + n] == r.top_k_index[keep].numpy()).all()
            np.testing.assert_allclose(l.weight[at:at + n, :l.top_k], r.top_k_weights[keep].numpy(),
                                       rtol=2e-3, atol=1e-4)
            assert (l.expert[at:at + n] == (r.top_k_index if r.expert_of is None
                                            else r.expert_of[r.top_k_index])[keep].numpy()).all()
            left = r.scores[keep].scatter(-1, r.top_k_index[keep], -1)
            assert (l.choice[at:at + n, l.top_k:] == left.sort(dim=-1, descending=True,
                                                               stable=True)[1][:, :2].numpy()).all()
        at += n
    assert at == t.num_tokens and t.recipe == recipe and m.training is False


def test_the_example_by_hand_runs(tmp_path, monkeypatch):
    cells = json.loads((Path(__file__).parents[2]/'nbs/analysis/traces.ipynb').read_text(encoding='utf-8'))['cells']
    code, = re.findall(r'```python\n(.*?)```',
                       '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), re.S)
    t = write_trace(from_scratch('tcmoe', 'tiny', seed=0, router_init_std=.3), probe(), tmp_path/'trace.safetensors')
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert (names['expert'] == t.layer(0).expert).all()


def test_next_ranks_follow_the_bias(tmp_path):
    m = from_scratch('smoe_sigmoid', 'tiny', seed=0, expert_bias=True)
    for l in moe_layers(m).values(): l.router.expert_bias.copy_(torch.linspace(1, -1, len(l.router.expert_bias)))
    l = write_trace(m, probe(), tmp_path/'t').layer(0)
    assert (l.choice == np.arange(l.top_k + 1)).all()          # the bias outweighs all scores
    assert (np.diff(l.score, axis=-1) > 0).any()


def test_padding_and_positions(files):
    t, batches = read_trace(files[0]), list(probe())
    want = [(i.item(), s, d.item()) for b in batches
            for row, mask, d in zip(b['input_ids'], b['attention_mask'], b['domain'])
            for s, i in enumerate(row[mask.bool()])]
    assert [tuple(x) for x in zip(t.token.tolist(), t.position.tolist(), t.domain.tolist())] == want


def test_by_hand_from_the_raw_file(files):
    "Only what the documentation of the file says is used: no function of this library on the left"
    a, b = (load_file(f) for f in files)
    K = 4 if a['choice'].shape[-1] == 5 else a['choice'].shape[-1] - 1
    L, T, _ = a['choice'].shape
    N = int(a['expert_of'].max()) + 1
    ca, cb = a['choice'][..., :K], b['choice'][..., :K]
    changed = np.mean([[len(set(ca[l, t]) - set(cb[l, t])) / K for t in range(T)] for l in range(L)])
    ta, tb = (read_trace(f) for f in files)
    assert np.isclose(metrics.expert_change_rate(ta, tb).change_rate[0], changed)
    first = np.mean(ca[0, :, 0] == cb[0, :, 0])
    assert np.isclose(metrics.router_saturation(ta, tb, k=1).saturation[0], first)
    d = a['domain'] == 1
    f = np.bincount(ca[1][d].ravel(), minlength=N) / (d.sum() * K)
    e = metrics.expert_allocation_entropy(ta)
    assert np.isclose(e[(e.layer == 1) & (e.domain == 'y')].entropy.iloc[0],
                      -(f[f > 0] * np.log(f[f > 0])).sum() / np.log(N))
    w = a['weight'][0, :, :K].astype(float)
    w /= w.sum(-1, keepdims=True)
    assert np.isclose(metrics.expert_weight_entropy(ta, by_domain=False).entropy[0],
                      (-(w * np.log(np.where(w > 0, w, 1))).sum(-1) / np.log(K)).mean(), atol=1e-5)
    s = a['score'][0].astype(float)
    assert np.isclose(metrics.router_margin(ta).margin[0], (s[:, 0] - s[:, 1]).mean(), atol=1e-5)
    has = lambda i: (ca[0] == i).any(-1)
    c = metrics.co_activation(ta).set_index(['layer', 'expert', 'other']).co_activation
    assert all(np.isclose(c[0, i, j], (has(i) & has(j)).sum() / has(i).sum()) for i in range(N)
               for j in range(N) if i != j and has(i).any())


@pytest.mark.parametrize('name', ['mixtral', 'deepseek_v3', 'gpt_oss', 'llama4_text'])
def test_transformers_models(name, tmp_path):
    m = tiny_moe(name)
    t = write_trace(m, probe(), tmp_path/'t', domains=['x', 'y', 'z'])
    assert t.meta['num_experts'] == [8, 8] and t.meta['model'] == type(m).__name__
    for f in metrics.trace_metrics.values():
        assert len(f(t, **(dict(min_count=1) if 'min_count' in f.__code__.co_varnames else {})))
    assert model_metrics.expert_output_similarity(m, probe()).similarity.between(0, 1).all()
    assert len(model_metrics.expert_parameter_similarity(m)) == 2 * 28
    assert model_metrics.balance_loss(m, probe()).balance_loss.ge(.5).all()


@pytest.mark.long
def test_a_million_tokens_need_the_memory_of_a_batch(tmp_path):
    code = textwrap.dedent('''
        import resource, sys, torch
        from torch import nn
        from libmoe_nb.moe.config import MoESpec
        from libmoe_nb.moe.recipes import build_layer
        from libmoe_nb.analysis.traces import write_trace
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(10, 4)
                spec = MoESpec(hidden_size=4, num_experts=4, top_k=1, moe_intermediate_size=1)
                self.l = nn.ModuleList(build_layer(spec) for _ in range(2))
            def forward(self, input_ids, attention_mask=None):
                x = self.e(input_ids)
                for l in self.l: x = l(x)
        n, B = int(sys.argv[1]), 16384
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        m = M()
        batch = lambda: dict(input_ids=torch.zeros(16, B // 16, dtype=torch.long))
        write_trace(m, [batch()] * 2, sys.argv[2])
        before = peak()
        t = write_trace(m, (batch() for _ in range(n // B)), sys.argv[2])
        print(t.num_tokens, peak() - before)''')
    out = subprocess.run([sys.executable, '-c', code, str(1 << 20), str(tmp_path/'t')], capture_output=True, text=True,
                         timeout=300, check=True).stdout.split()
    assert int(out[0]) == 1 << 20
    assert (tmp_path/'t').stat().st_size > 30e6
    # MB; the columns of tokens that reading opens are 10 of them
    assert float(out[1]) < 30


def test_killed_while_writing(files, tmp_path):
    target = tmp_path/'t.safetensors'
    target.write_bytes(files[0].read_bytes())
    code = textwrap.dedent(f'''
        import sys, time, torch
        from libmoe_nb.models.causal import from_scratch
        from libmoe_nb.analysis.traces import write_trace
        def batches():
            for i in range(1000):
                yield dict(input_ids=torch.randint(3, 90, (2, 16)))
                print('batch', flush=True)
                time.sleep(.05)
        write_trace(from_scratch('smoe', 'tiny'), batches(), {str(target)!r})''')
    p = Piped(code)
    p.stdout.readline(); p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    assert p.wait(60) == -signal.SIGKILL
    assert target.read_bytes() == files[0].read_bytes()
    read_trace(target)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_never_passes_for_a_trace(files, tmp_path, data):
    good = files[0].read_bytes()
    n = int.from_bytes(good[:8], 'little') + 8
    bad, path = bytearray(good), tmp_path/'bad'
    if data.draw(st.booleans()): bad = bad[:data.draw(st.integers(0, len(bad) - 1))]
    else: bad[data.draw(st.integers(0, n - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(bad))
    try: t = read_trace(path)
    except ValueError as e: assert str(path) in str(e)
    else:
        assert t.choice.shape == read_trace(files[0]).choice.shape
        list(t), repr(t)


def test_foreign_files(tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/exploded',)
    (tmp_path/'pickle').write_bytes(pickle.dumps(Bomb()))
    torch.save({'x': 1}, tmp_path/'torch')
    save_file({'w': np.zeros(3)}, tmp_path/'weights')
    np.save(tmp_path/'array.npy', np.zeros(3))
    for n in ('pickle', 'torch', 'weights', 'array.npy'):
        with pytest.raises(ValueError, match=f'{n} is no trace'): read_trace(tmp_path/n)
    with pytest.raises(ValueError, match='a folder'): read_trace(tmp_path)
    assert not (tmp_path/'exploded').exists()


def test_same_bytes_for_the_same_model(models, files, tmp_path):
    write_trace(models[0], probe(), tmp_path/'t', domains=['x', 'y', 'z'], info=dict(step=0))
    assert (tmp_path/'t').read_bytes() == files[0].read_bytes()


def test_bad_arguments(models, tmp_path):
    with pytest.raises(ValueError, match='existing folder'): write_trace(models[0], probe(), tmp_path/'no'/'t')
    with pytest.raises(ValueError, match='at least one token'): write_trace(models[0], [], tmp_path/'t')
    with pytest.raises(ValueError, match='extra'): write_trace(models[0], probe(), tmp_path/'t', extra=-1)
    with pytest.raises(ValueError, match='mixture-of-experts'):
        write_trace(from_scratch('dense', 'tiny'), probe(), tmp_path/'t')
    assert not list(tmp_path.iterdir())
