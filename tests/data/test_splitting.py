"The two sides, and what a cap keeps: disjoint, complete, and a fair sample."
import collections, json, random, re, warnings
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from made_text import decoded, fill, line, pack, plain_words, prep, saved, words
from libmoe_nb.data import sources
from libmoe_nb.data.splitting import Spooled, split_spool
from libmoe_nb.data.text import text_data

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

def test_split_is_disjoint_and_complete(tmp_path):
    texts = [words(30, i) for i in range(60)]
    copies = texts[:20] + [t + '\n\n' for t in texts[5:10]]
    for d,ts in dict(one=texts[:40]+copies, two=texts[30:]+copies).items():
        (tmp_path/'in'/d).mkdir(parents=True)
        for i,t in enumerate(ts): (tmp_path/'in'/d/f'{i}.txt').write_text(t, encoding='utf-8')
    for seed in range(5):
        data = prep(tmp_path/'in', seed=seed, valid_fraction=.2)
        a, b = ([t.strip() for t in decoded(data, ds)] for ds in (data.train, data.valid))
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
        (tmp_path/f'd{i}'/'x.txt').write_text(''.join(words(4, repr((i, j))) for j in range(n//20)),
                                              encoding='utf-8')
    src = tmp_path/'one'; src.mkdir()
    for i in range(len(sizes)): (tmp_path/f'd{i}'/'x.txt').rename(src/f'{i}.txt')
    data = prep(src, valid_fraction=.1)
    whole = [p.read_text(encoding='utf-8') for p in src.iterdir()]
    a, b = decoded(data, data.train), decoded(data, data.valid)
    assert len(b) == 1 and len(a) == len(whole) and all(t.endswith('\n') for t in a)
    assert any(t + b[0] in whole for t in a)
    assert .05 < len(b[0].encode())/sum(len(t.encode()) for t in whole) < .15

class Letters:
    "Stands for a text of any length: as many bytes of short words as are asked for"
    def __getitem__(self, part): return (b'ab ' * part.stop)[:part.stop - part.start]

@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.floats(.001, .9), st.integers(0, 99))
def test_share_of_the_bytes_that_validates(sizes, fraction, seed):
    n = len(sizes)
    spooled = Spooled(np.cumsum([0, *sizes]), np.zeros(n, int), [bytes([i]) for i in range(n)], ['a'])
    try: sides = split_spool(spooled, Letters(), seed, fraction)
    except ValueError as e:
        assert 'too few and too short' in str(e) and min(max(sizes), fraction*sum(sizes)) < 10
        return
    size = {side: sum(b - a for a,b,*_ in pieces) for side,pieces in sides.items()}
    assert sum(size.values()) == sum(sizes) and all(sides.values())
    if len(sides['train']) + len(sides['valid']) == n:
        assert fraction/2 <= size['valid']/sum(sizes) <= 1.5*fraction + 1e-9
    else: assert len(sides['valid']) == 1 and len(sides['train']) == n       # the longest is on both sides

# under a cap

def test_reads_no_more_than_the_cap(tmp_path, monkeypatch):
    "Of a stream; a file is read whole, since what it is sorted by is not known"
    rows = [dict(text=words(50, i)) for i in range(200)]
    def stream(spec): yield from rows; pytest.fail('read on')
    monkeypatch.setattr(sources, '_hf_rows', stream)
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

def bytes_by_domain(data):
    res = collections.Counter()
    for r in data.info: res[r['domain']] += r['bytes']
    return res

def by_domain(path, counts, n=40, order=sorted):
    rows = order([(d, i) for d,k in counts.items() for i in range(k)])
    data = b''.join(line(f'{d}{i} ' + plain_words(n, f'{d}{i}'), kind=d, at=i) for d,i in rows)
    path.write_bytes(data if path.suffix == '.jsonl' else pack(path.suffix, data))
    return path

@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'saved'])
def test_a_cap_keeps_every_domain_of_a_sorted_file(name, tmp_path):
    counts = dict(a=800, b=200, c=100, d=6)
    rows = [dict(text=f'{d}{i} ' + plain_words(40, f'{d}{i}'), kind=d) for d,k in counts.items() for i in range(k)]
    if name == 'a.parquet':
        pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        pq.write_table(pa.Table.from_pylist(rows), tmp_path/name)
    elif name == 'saved': saved(rows, str(tmp_path/name))
    else: by_domain(tmp_path/name, counts)
    data = prep(tmp_path/name, domain_field='kind', max_bytes=30_000)
    got = bytes_by_domain(data)
    assert set(got) == set(counts) and 27_000 < sum(got.values()) <= 30_000
    assert .6 < got['a']/sum(got.values()) < .8 and .1 < got['b']/sum(got.values()) < .25      # as in the whole
    # of six records, as many as every domain is sure of
    assert got['d'] > .8*30_000//64
    assert data.fingerprint == prep(tmp_path/name, domain_field='kind', max_bytes=30_000, rebuild=True).fingerprint

def test_a_sample_is_spread_over_the_file(tmp_path):
    by_domain(tmp_path/'a.jsonl', dict(a=3000), order=list)
    data = prep(tmp_path/'a.jsonl', max_bytes=60_000)
    from_where = sorted(int(re.match(r'a(\d+) ', data.tokenizer.decode(np.asarray(ds.tokens[a+1:b]).tolist()))[1])
                        for ds in (data.train, data.valid) for a,b in zip(ds.starts[:-1], ds.starts[1:]))
    assert len(from_where) > 150 and max(np.diff([0, *from_where, 3000])) < 60
    assert not data.left_out

def test_a_cap_that_nothing_reaches_changes_nothing(tmp_path):
    by_domain(tmp_path/'a.jsonl', dict(a=50, b=50), order=lambda r: random.Random(0).sample(r, len(r)))
    a, b = (prep(tmp_path/'a.jsonl', domain_field='kind', max_bytes=n) for n in (None, 10**6))
    assert a.fingerprint == b.fingerprint and a.domains == b.domains

def test_many_rare_domains(tmp_path):
    by_domain(tmp_path/'a.jsonl', {f'd{i:03}': 3 for i in range(300)} | dict(z=3000), n=10)
    data = prep(tmp_path/'a.jsonl', domain_field='kind', max_bytes=100_000)
    assert len(data.domains) == 301 and sum(bytes_by_domain(data).values()) <= 100_000

def test_a_cap_reads_of_every_file(tmp_path):
    "Seven files of seven kinds, each larger than the cap"
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    (tmp_path/'in').mkdir()
    for i,n in enumerate(['a.txt', 'b.md', 'c.py', 'd.jsonl', 'e.jsonl.gz', 'f.jsonl.zst', 'g.parquet']):
        t = [f'{n[0]}{j} {plain_words(20, repr((i, j)))}\n' for j in range(400)]
        if n == 'g.parquet': pq.write_table(pa.table(dict(text=t)), tmp_path/'in'/n)
        else:
            (tmp_path/'in'/n).write_bytes(pack(Path(n).suffix if i > 3 else '',
                                               b''.join(map(line, t)) if i > 2 else ''.join(t).encode()))
    with pytest.warns(UserWarning, match='beginning') as w: data = prep(tmp_path/'in', max_bytes=20_000)
    seen = {m for ds in (data.train, data.valid)
            for m in re.findall(r'\b([a-g])\d+ ', data.tokenizer.decode(np.asarray(ds.tokens).tolist()))}
    assert seen == set('abcdefg') and sum(bytes_by_domain(data).values()) <= 20_000
    said, = [str(x.message) for x in w if 'beginning' in str(x.message)]
    assert all(n in said for n in ('a.txt', 'b.md', 'c.py', '20000')) and data.left_out == [said]
    # from the cache, too
    with pytest.warns(UserWarning, match='beginning'): prep(tmp_path/'in', max_bytes=20_000)

def test_a_cap_on_long_texts_reads_of_each(tmp_path):
    (tmp_path/'in').mkdir()
    for n in 'abc':
        lines = (f'{n}{j} {plain_words(9, repr((n, j)))}\n' for j in range(999))
        (tmp_path/'in'/f'{n}.txt').write_text(''.join(lines))
    with pytest.warns(UserWarning, match='beginning of 3 texts'): data = prep(tmp_path/'in', max_bytes=20_000)
    seen = collections.Counter(m for ds in (data.train, data.valid)
                               for m in re.findall(r'\b([a-c])\d+ ',
                                                   data.tokenizer.decode(np.asarray(ds.tokens).tolist())))
    assert set(seen) == set('abc') and max(seen.values()) < 1.3*min(seen.values())

def test_a_single_text_says_that_it_was_cut(tmp_path):
    (tmp_path/'a.txt').write_text(''.join(plain_words(9, i) + '\n' for i in range(999)))
    with pytest.warns(UserWarning, match='a.txt.*beginning.*max_bytes=20000'): prep(tmp_path/'a.txt', max_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        prep(tmp_path/'a.txt', max_bytes=None)
        prep(tmp_path/'a.txt', max_bytes=10**7); text_data('python', vocab_size=300, max_bytes=20_000)

def test_a_stream_says_that_it_was_cut(tmp_path, monkeypatch):
    "What comes from a hub is read from its beginning alone; an end that is reached is no cut"
    rows = [dict(text=plain_words(30, i)) for i in range(400)]
    monkeypatch.setattr(sources, '_hf_rows', lambda spec: iter(rows))
    with pytest.warns(UserWarning, match=r'org/set.*beginning.*max_bytes=20000'): prep('org/set', max_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        prep('org/set', max_bytes=10**7)
