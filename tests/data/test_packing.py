"Blocks and batches of a token stream: nothing lost, nothing doubled, and the same bytes for everyone."
import json, os, signal, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from processes import Forked, Piped
from made_text import decoded, fill, prep, python, stream, words
from libmoe_nb.data import text
from libmoe_nb.data.files import quick_digest
from libmoe_nb.core.files import cache_folder
from libmoe_nb.data.packing import PackedDataset, train_tokenizer, write_tokens

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 60_000), max_size=30), st.integers(0, 3)), min_size=1, max_size=12),
       st.integers(1, 40))
def test_no_token_lost_or_doubled(documents, S):
    tokens = np.array([x for ids,_ in documents for x in [0, *ids]] + [0], np.uint16)
    owner = np.array([d for ids,d in documents for _ in [0, *ids]])
    starts = np.cumsum([0] + [len(ids)+1 for ids,_ in documents])
    ds = PackedDataset(tokens, starts, [d for _,d in documents], S)
    blocks = [ds[i] for i in range(len(ds))]
    for b in blocks:
        assert all(t.dtype == torch.int64 and t.shape == (S,) for t in b.values())
        real = b['labels'] != -100
        assert torch.equal(b['labels'][:-1][real[:-1] & real[1:]], b['input_ids'][1:][real[:-1] & real[1:]])
        assert torch.equal(real, b['domain'] >= 0) and (b['input_ids'][~real] == 0).all() and real[0]
    real = torch.cat([b['labels'] for b in blocks]) != -100
    whole = {k: torch.cat([b[k] for b in blocks])[real].numpy() for k in blocks[0]}
    assert (np.array_equal(whole['input_ids'], tokens[:-1]) and np.array_equal(whole['labels'], tokens[1:])
            and np.array_equal(whole['domain'], owner))
    assert real[:len(owner)].all() and not real[len(owner):].any()
    full = PackedDataset(tokens, starts, [d for _,d in documents], S, drop_last=True)
    assert len(full) == len(owner)//S and all((b['labels'] != -100).all() for b in full)

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 25), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 12))
def test_batches(n, B, seed, start):
    ds = PackedDataset(np.arange(n*2+1), [0, n*2], [0], 2)
    def take(start, k): it = ds.batches(B, seed, start); return [next(it)['input_ids'][:, 0] for _ in range(k)]
    a, b = take(0, start+3), take(start, 3)
    assert all(torch.equal(x, y) for x,y in zip(a[start:], b)) and all(len(x) == B for x in a)
    places = torch.cat(a)
    for e in range(len(places)//n): assert sorted(places[e*n:e*n+n].tolist()) == list(range(0, 2*n, 2))
    assert sorted(i for x in ds.epoch(B) for i in x['input_ids'][:, 0].tolist()) == list(range(0, 2*n, 2))

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=40).filter(lambda s: s.encode('utf-8', 'ignore').decode() == s), min_size=1,
                max_size=8))
def test_text_survives_tokens(tmp_path, texts):
    tok = train_tokenizer(texts + [words(100, 0)]*2, 280)
    raw, at = b''.join(t.encode() for t in texts), np.cumsum([0] + [len(t.encode()) for t in texts])
    starts = write_tokens(tok, 0, raw, list(zip(at[:-1], at[1:])), np.uint16, tmp_path/'x')
    s = np.fromfile(tmp_path/'x', np.uint16)
    assert [tok.decode(s[a+1:b].tolist(), skip_special_tokens=False) for a,b in zip(starts[:-1], starts[1:])] == texts
    assert (s == 0).sum() == len(texts)+1

def test_domain_of_each_token(corpus):
    data = prep(corpus, valid_fraction=.2)
    for ds in (data.train, data.valid):
        dom = torch.cat([b['domain'] for b in ds])
        for (a, b),doc in zip(zip(ds.starts[:-1], ds.starts[1:]), decoded(data, ds)):
            assert (dom[a:b] == data.domains.index(doc[0])).all()
        assert set(dom[dom >= 0].tolist()) == {0, 1, 2}
        first = dom[:len(dom)//2]
        assert all(.2 < (first == d).float().mean() < .5 for d in range(3))    # woven, not one after another

@pytest.mark.parametrize('context', ['fork', pytest.param('spawn', marks=pytest.mark.long)])
def test_data_loader_with_workers(corpus, context):
    from torch.utils.data import DataLoader
    ds = prep(corpus).train
    ds[0]
    plain = [b['labels'] for b in DataLoader(ds, 4)]
    got = [b['labels'] for b in DataLoader(ds, 4, num_workers=2, multiprocessing_context=context)]
    assert all(torch.equal(x, y) for x,y in zip(plain, got, strict=True))

def test_wide_vocabulary_in_four_bytes(tmp_path):
    ds = PackedDataset(np.array([0, 70_000, 0], np.uint32), [0, 2], [0], 2, dtype=np.uint32)
    np.array([0, 70_000, 0], np.uint32).tofile(tmp_path/'t')
    for d in (ds, PackedDataset(tmp_path/'t', [0, 2], [0], 2, dtype='uint32')):
        assert d[0]['labels'].tolist() == [70_000, 0]

def test_sequence_length_is_a_view(corpus):
    a, b = prep(corpus), prep(corpus, sequence_length=7)
    assert a.folder == b.folder and a.fingerprint == b.fingerprint and b.train[0]['labels'].shape == (7,)

# the cache

def test_cache_folder(monkeypatch):
    monkeypatch.delenv('LIBMOE_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/xdg'); assert cache_folder() == Path('/xdg/libmoe-nb')
    monkeypatch.delenv('XDG_CACHE_HOME'); assert cache_folder() == Path.home()/'.cache'/'libmoe-nb'
    monkeypatch.setenv('LIBMOE_CACHE', '~/mine')
    assert cache_folder() == Path.home()/'mine' and cache_folder('/a') == Path('/a')

def test_cache_not_writable(corpus, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='cache_dir=.*cannot be written.*LIBMOE_CACHE'):
        prep(corpus, cache_dir=tmp_path/'file')

def test_disk_full(corpus, tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(text, 'write_tokens', full)
    with pytest.raises(ValueError, match='cannot be written .No space left on device'): prep(corpus)
    assert not [p for p in (tmp_path/'cache'/'text').iterdir() if p.is_dir()]

BUILD = """
import sys
from libmoe_nb.data.text import text_data
d = text_data(sys.argv[1] if len(sys.argv) > 1 else {data!r}, vocab_size=300, sequence_length=32)
print(d.fingerprint, d.train[0]['input_ids'].sum().item(), d.train.tokens.tobytes().hex()[:4000])
"""

def build(data, **env): return python(BUILD.format(data=str(data)), **env)

def folders(tmp_path): return [p for p in (tmp_path/'cache'/'text').iterdir() if p.is_dir()]

@pytest.mark.long
def test_same_bytes_in_two_processes(corpus, tmp_path):
    outs = [build(corpus, LIBMOE_CACHE=str(tmp_path/f'c{i}'), PYTHONHASHSEED=str(i),
                  TOKENIZERS_PARALLELISM=['false', 'true'][i]).communicate() for i in (0, 1)]
    assert outs[0][0] == outs[1][0] != '', outs
    (a,), (b,) = ([p for p in (tmp_path/c/'text').iterdir() if p.is_dir()] for c in ('c0', 'c1'))
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}

def test_two_processes_build_one_cache(corpus, tmp_path):
    outs = [p.communicate() for p in [Forked(BUILD.format(data=str(corpus))) for _ in range(3)]]
    assert len({o for o,_ in outs}) == 1 and outs[0][0], outs
    assert len(folders(tmp_path)) == 1

def test_killed_while_building(corpus, tmp_path):
    slow = "import time; from libmoe_nb.data import text; real = text.write_tokens\n" \
           "def wait(*a):\n    r = real(*a); time.sleep(60); return r\ntext.write_tokens = wait\n"
    p = Forked(slow + BUILD.format(data=str(corpus)))
    end = time.time()+60
    while not list((tmp_path/'cache').glob('text/.*/train.tokens')):
        assert time.time() < end and p.poll() is None, p.communicate(); time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait(); p.communicate()
    left = folders(tmp_path)
    assert len(left) == 1 and left[0].name.startswith('.')
    data = prep(corpus)
    assert folders(tmp_path) == [data.folder]
    assert data.fingerprint == prep(corpus, cache_dir=tmp_path/'fresh').fingerprint

def test_killed_at_random_moments(corpus, tmp_path):
    good = prep(corpus, cache_dir=tmp_path/'good').fingerprint
    code = "from libmoe_nb.data.text import text_data; import sys; print('go', flush=True)\n" \
           f"while True: text_data({str(corpus)!r}, vocab_size=300, sequence_length=32, rebuild=True)"
    for i in range(3):
        p = Piped(code); p.stdout.readline(); time.sleep(.1+.07*i); p.send_signal(signal.SIGKILL); p.communicate()
        assert prep(corpus).fingerprint == good
        assert [f for f in folders(tmp_path) if not f.name.startswith('.')] == [prep(corpus).folder]

@pytest.mark.parametrize('name', ['train.tokens', 'valid.tokens', 'train.starts.npy', 'valid.domain.npy',
                                  'tokenizer.json', 'meta.json'])
@pytest.mark.parametrize('damage', ['cut', 'flip', 'gone', 'empty'])
def test_damaged_cache_is_rebuilt(corpus, name, damage):
    data = prep(corpus)
    before = data.fingerprint, stream(data.train).tolist()
    f = data.folder/name; raw = f.read_bytes()
    if damage == 'gone': f.unlink()
    else: f.write_bytes(dict(cut=raw[:len(raw)//2], empty=b'', flip=raw[:9] + bytes([raw[9]^255]) + raw[10:])[damage])
    again = prep(corpus)
    assert (again.fingerprint, stream(again.train).tolist()) == before and len(again.tokenizer) == 300

def test_a_pickle_in_the_cache_is_never_loaded(corpus, tmp_path):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'boom'),))
    data = prep(corpus)
    f = data.folder/'train.domain.npy'; np.save(f, np.array([Bomb()], dtype=object), allow_pickle=True)
    meta = json.loads((data.folder/'meta.json').read_text()); meta['files'][f.name] = quick_digest(f)
    (data.folder/'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ValueError): prep(corpus)
    assert not (tmp_path/'boom').exists()

def test_changed_content_is_noticed(corpus):
    a = prep(corpus)
    p = corpus/'a'/'0.txt'; t, at = p.read_text(encoding='utf-8'), p.stat()
    p.write_text(t[::-1], encoding='utf-8'); os.utime(p, ns=(at.st_atime_ns, at.st_mtime_ns))
    b = prep(corpus)
    assert a.fingerprint != b.fingerprint
    p.write_text(t, encoding='utf-8'); assert prep(corpus).fingerprint == a.fingerprint

def test_read_only_cache_serves(corpus, monkeypatch):
    a = prep(corpus)
    monkeypatch.setattr('tempfile.mkdtemp', lambda *a, **k: pytest.fail('built again'))
    assert prep(corpus).fingerprint == a.fingerprint
