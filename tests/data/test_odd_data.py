"Files that users really have: other packings, odd records, damage, samples under a cap. Each is read right, or one sentence says where it is wrong."
import bz2, collections, gzip, json, lzma, os, random, re, warnings
import numpy as np, pytest
from pathlib import Path
from libmoe_nb.data import text as T
from libmoe_nb.data.sources import load_documents
from libmoe_nb.data.text import text_data

def words(n, seed):
    r = random.Random(seed)
    return ' '.join(r.choice('the of light darkness Zürich 三 river walked under over tree'.split()) for _ in range(n))
def line(text, **kw): return json.dumps(dict(text=text, **kw)).encode() + b'\n'
def texts(data, **kw): return [d.text for d in load_documents(data, **kw)]
def refused(data, *says, **kw):
    with pytest.raises(ValueError) as e: texts(data, **kw)
    assert ('\n' not in str(e.value) and not isinstance(e.value, UnicodeError)
            and all(s in str(e.value) for s in says)), repr(e.value)

@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

def prep(data, **kw): return text_data(data, **{**dict(vocab_size=300, sequence_length=32), **kw})
def bytes_by_domain(data):
    res = collections.Counter()
    for r in data.info: res[r['domain']] += r['bytes']
    return res

# --- packed files -----------------------------------------------------------------------------------------------------
def pack(suffix, data):
    if suffix != '.zst':
        return {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}[suffix](data)
    return pytest.importorskip('zstandard').ZstdCompressor().compress(data)

@pytest.mark.parametrize('suffix', ['', '.gz', '.bz2', '.xz', '.zst'])
def test_every_packing_of_every_kind(suffix, tmp_path):
    lines = line('one') + line('two')
    (tmp_path/f'a.jsonl{suffix}').write_bytes(pack(suffix, lines) + (pack(suffix, line('three')) if suffix else b''))
    assert texts(tmp_path/f'a.jsonl{suffix}') == ['one', 'two', *(['three'] if suffix else [])]
    for kind in ('.txt', '.md', '.py'):
        (tmp_path/f'b{kind}{suffix}').write_bytes(pack(suffix, '\ufeffnaïve\nx = 1'.encode()))
        assert texts(tmp_path/f'b{kind}{suffix}') == ['naïve\nx = 1']
    assert [d.domain for d in load_documents(tmp_path/f'a.jsonl{suffix}')][0] == 'a'

@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zst'])
@pytest.mark.parametrize('kind', ['.jsonl', '.txt'])
def test_damaged_packings(suffix, kind, tmp_path):
    whole = pack(suffix, b''.join(line(words(30, i)) for i in range(300)))
    for name, data in dict(cut=whole[:-9], flipped=whole[:len(whole)//2]
                           + bytes(b ^ 255 for b in whole[len(whole)//2:len(whole)//2 + 40])
                           + whole[len(whole)//2 + 40:], other=b'plain').items():
        (p := tmp_path/f'{name}{kind}{suffix}').write_bytes(data)
        refused(p, str(p), 'damaged or not what its name says')

@pytest.mark.parametrize('log', [28, 31])
def test_long_zst_window(tmp_path, log):
    z = pytest.importorskip('zstandard')
    params = z.ZstdCompressionParameters(window_log=log, enable_ldm=True, compression_level=1)
    with open(tmp_path/'a.jsonl.zst', 'wb') as f, z.ZstdCompressor(compression_params=params).stream_writer(f) as w:
        w.write(line('one') + line('two'))
    assert z.get_frame_parameters((tmp_path/'a.jsonl.zst').read_bytes()).window_size == 1 << log
    assert texts(tmp_path/'a.jsonl.zst') == ['one', 'two']

def test_seekable_zst_and_a_long_line(tmp_path):
    "A skippable frame in front, as pzstd writes, and one line over many chunks"
    z = pytest.importorskip('zstandard').ZstdCompressor()
    long = ''.join(random.Random(0).choices('abcdefgh ', k=3_000_000))
    (tmp_path/'a.jsonl.zst').write_bytes(b'\x50\x2a\x4d\x18\x04\0\0\0abcd' + z.compress(line(long))
                                         + z.compress(line('end')))
    assert texts(tmp_path/'a.jsonl.zst') == [long, 'end']

# --- odd records ------------------------------------------------------------------------------------------------------
def test_records_that_were_tracebacks(tmp_path):
    p = tmp_path/'a.jsonl'
    p.write_bytes(b'{"text": "one", "n": ' + b'9'*5000 + b', "m": -' + b'1'*5000 + b'}\n' + line('two'))
    assert texts(p) == ['one', 'two']
    p.write_bytes(line('one') + b'{"text": ' + b'9'*5000 + b'}\n')
    refused(p, f'{p} line 2', "text_field='text'", 'expected a string')
    p.write_bytes(line('one') + b'{"text": "two", "x": ' + b'['*100_000 + b']'*100_000 + b'}\n')
    refused(p, f'{p} line 2', 'nested too deep')
    p.write_bytes(line('one') + b'[' * 1_000_000); refused(p, f'{p} line 2')

def test_odd_lines(tmp_path):
    p = tmp_path/'a.jsonl'
    p.write_bytes(b'\xef\xbb\xbf' + line('one') + b'\r\n  \n' + line('a\0b \u2028 c') + line('x'*5_000_000)
                  + b'{"text": "no end"}')
    assert texts(p) == ['one', 'a\0b \u2028 c', 'x'*5_000_000, 'no end']
    p.write_bytes(line('one') + b'\0'*20); refused(p, f'{p} line 2', 'zero byte')
    p.write_bytes('{"text": "one"}\n'.encode('utf-16')); refused(p, str(p), 'zero byte')
    p.write_bytes(b'{"text": "half \\ud83d", "kind": "\\ud83d!"}\n'*2 + line(words(90, 1), kind='b'))
    assert [d.domain for d in load_documents(p, domain_field='kind')] == ['?!', '?!', 'b']
    for bad, says in [(b'{"text": ["a"]}', 'is a list'), (b'{"text": {"a": 1}}', 'is a dict'),
                      (b'{"text": true}', 'is a bool'), (b'3', 'no field'), (b'{"a"', 'not valid JSON')]:
        p.write_bytes(line('one') + bad); refused(p, f'{p} line 2', says)

def test_names_of_fields(tmp_path):
    (tmp_path/'a.jsonl').write_bytes(line('one'))
    for kw, says in [(dict(text_field=None), 'text_field=None is a NoneType'),
                     (dict(text_field=3), 'text_field=3 is a int'),
                     (dict(domain_field=['a']), "domain_field=['a'] is a list")]:
        refused(tmp_path/'a.jsonl', says, **kw)

# --- tables -----------------------------------------------------------------------------------------------------------
def broken_utf8(n=600, at=(300, 555)):
    import pyarrow as pa
    raw = [words(5, i).encode() for i in range(n)]
    for i in at: raw[i] = b'abc\xff\xfe'
    offsets = np.cumsum([0, *map(len, raw)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b''.join(raw))])

def test_broken_utf8_in_a_table(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table(dict(text=broken_utf8(), other=['x']*600)), tmp_path/'a.parquet')
    refused(tmp_path/'a.parquet', f"{tmp_path/'a.parquet'} row 301", 'is not UTF-8', "'text'")
    assert texts(tmp_path/'a.parquet', text_field='other') == ['x']*600

def test_kinds_of_columns(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    p, want = tmp_path/'a.parquet', ['naïve', '', 'b']
    for column in [pa.array(want), pa.array(want, pa.large_string()), pa.array(want).dictionary_encode(),
                   pa.array([w.encode() for w in want]), pa.array(want, pa.string_view())]:
        pq.write_table(pa.table(dict(text=column)), p); assert texts(p) == want, column.type
    pq.write_table(pa.table({'a.b': want, 'meta': [dict(text=w, n=1) for w in want]}), p)
    assert texts(p, text_field='a.b') == texts(p, text_field='meta.text') == want
    pq.write_table(pa.table(dict(text=pa.array([b'one', b'\xff']))), p); refused(p, f'{p} row 2', 'not UTF-8')
    for column, says in [([['a']], 'is a list'), ([1.5], 'is a float'), ([None], None), ([dict(a=1)], 'is a dict')]:
        pq.write_table(pa.table(dict(text=column)), p)
        if says: refused(p, f'{p} row 1', says)
        else: assert texts(p) == ['']
    pq.write_table(pa.table(dict(text=pa.array([], pa.string()))), p)
    with pytest.raises(ValueError, match='holds no text'): prep(p)

# --- folders of `save_to_disk` ----------------------------------------------------------------------------------------
def saved(rows, path, **kw):
    datasets = pytest.importorskip('datasets')
    datasets.Dataset.from_list(rows).save_to_disk(path, **kw)
    return path

def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = [dict(text=words(9, i), meta=dict(kind='ab'[i % 2])) for i in range(40)]
    one = saved(rows, str(tmp_path/'one'), num_shards=3)
    assert texts(one) == texts(f'hf:{one}') == [r['text'] for r in rows]
    assert ({d.domain for d in load_documents(one)} == {'one'}
            and {d.domain for d in load_documents(one, domain_field='meta.kind')} == {'a', 'b'})
    (tmp_path/'one'/'cache-123.arrow').write_bytes(b'left by map, no part of it')
    assert len(texts(one)) == 40
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows),
                         test=datasets.Dataset.from_list(rows[:3])).save_to_disk(str(tmp_path/'two'))
    with pytest.warns(UserWarning, match="leaves out.*test"): assert texts(tmp_path/'two') == [r['text'] for r in rows]
    assert texts(f"hf:{tmp_path/'two'}::test") == [r['text'] for r in rows[:3]]
    refused(f"hf:{tmp_path/'two'}::dev", 'dev', 'test', 'train')
    refused(one, 'row 1', "text_field='body'", text_field='body')
    saved(rows[:5], str(tmp_path/'box'/'wiki'))
    saved([dict(text='else')], str(tmp_path/'box'/'books'))
    (tmp_path/'box'/'books2').mkdir(); (tmp_path/'box'/'books2'/'x.txt').write_text('plain')
    assert collections.Counter(d.domain for d in load_documents(tmp_path/'box')) == dict(wiki=5, books=1, books2=1)

def test_save_to_disk_damaged(tmp_path):
    one = Path(saved([dict(text=words(9, i)) for i in range(40)], str(tmp_path/'one')))
    part, = one.glob('data-*.arrow')
    whole = part.read_bytes()
    part.write_bytes(whole[:len(whole)//2]); refused(one, str(part), 'damaged')
    part.write_bytes(b'nothing of the kind'); refused(one, str(part), 'damaged')
    part.unlink(); refused(one, str(part))
    (one/'state.json').write_text('{'); refused(one, 'state.json')

def test_saved_data_that_changes_is_read_again(tmp_path):
    make = lambda k: saved([dict(text=words(60, (i, k).__repr__())) for i in range(60)], str(tmp_path/'one'))
    a = prep(make(0)).fingerprint
    assert prep(make(1)).fingerprint != a and prep(make(0)).fingerprint == a

# --- what is left out of a folder is said -----------------------------------------------------------------------------
def test_left_out_by_name_and_count(tmp_path):
    for i,n in enumerate(['a.txt', 'b.md', 'law/c.py', 'd.jsonl', 'e.txt.gz', 'x.pdf', 'law/y.pdf', 'z.csv', 'LICENSE',
                          '.hidden.csv']):
        (tmp_path/'in'/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'in'/n).write_bytes(line(n) if n == 'd.jsonl' else gzip.compress(n.encode()) if n.endswith('gz')
                                      else n.encode())
    (tmp_path/'in'/'void.txt').touch(); os.symlink('/nowhere/at/all.txt', tmp_path/'in'/'gone.txt')
    with pytest.warns(UserWarning) as w: assert len(texts(tmp_path/'in')) == 5
    said, = [str(x.message) for x in w]
    for s in ("in'", '6 files', '2 .pdf (law/y.pdf, x.pdf)', '1 .csv (z.csv)', '1 without suffix (LICENSE)',
              '1 empty (void.txt)', '1 link to nowhere (gone.txt)'):
        assert s in said, said
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in ('x.pdf', 'law/y.pdf', 'z.csv', 'LICENSE', 'void.txt', 'gone.txt'): (tmp_path/'in'/n).unlink()
        assert len(texts(tmp_path/'in')) == 5

def test_many_left_out_stay_one_line(tmp_path):
    (tmp_path/'a.txt').write_text('a')
    for i in range(500): (tmp_path/f'{i:03}.png').touch(); (tmp_path/f'{i:03}.png').write_bytes(b'x')
    with pytest.warns(UserWarning, match=r'500 \.png \(000\.png, 001\.png, 002\.png \.\.\.\)') as w: texts(tmp_path)
    assert len(str(w[0].message)) < 400

def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    for d in 'ab': (tmp_path/'in'/d).mkdir(parents=True); (tmp_path/'in'/d/'x.txt').write_text(d)
    real = os.scandir
    def scan(p):
        if str(p).endswith('in/b'): raise PermissionError(13, 'Permission denied', str(p))
        return real(p)
    monkeypatch.setattr(os, 'scandir', scan)
    refused(tmp_path/'in', 'in/b', 'cannot be read: Permission denied')

def test_links_in_circles_and_odd_names(tmp_path):
    os.symlink(tmp_path/'b.txt', tmp_path/'a.txt'); os.symlink(tmp_path/'a.txt', tmp_path/'b.txt')
    refused(tmp_path/'a.txt', 'link to nowhere')
    (tmp_path/'c.txt').write_text('c')
    with pytest.warns(UserWarning, match='2 links to nowhere'): assert texts(tmp_path) == ['c']
    refused('~no-such-user-here/x.txt', 'does not exist')
    refused('a\0b.txt', 'does not exist'); refused('x'*300 + '.txt', 'does not exist')
    with open(os.fsencode(tmp_path) + b'/caf\xe9.txt', 'w') as f: f.write('d')
    name, = {d.domain for d in load_documents(os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.txt'))}
    assert name.encode() == b'caf?'

# --- samples under a cap ----------------------------------------------------------------------------------------------
def by_domain(path, counts, n=40, order=sorted):
    rows = order([(d, i) for d,k in counts.items() for i in range(k)])
    data = b''.join(line(f'{d}{i} ' + words(n, f'{d}{i}'), kind=d, at=i) for d,i in rows)
    path.write_bytes(data if path.suffix == '.jsonl' else pack(path.suffix, data))
    return path

@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'saved'])
def test_a_cap_keeps_every_domain_of_a_sorted_file(name, tmp_path):
    counts = dict(a=800, b=200, c=100, d=6)
    rows = [dict(text=f'{d}{i} ' + words(40, f'{d}{i}'), kind=d) for d,k in counts.items() for i in range(k)]
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
        t = [f'{n[0]}{j} {words(20, (i, j).__repr__())}\n' for j in range(400)]
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
        (tmp_path/'in'/f'{n}.txt').write_text(''.join(f'{n}{j} {words(9, (n, j).__repr__())}\n' for j in range(999)))
    with pytest.warns(UserWarning, match='beginning of 3 texts'): data = prep(tmp_path/'in', max_bytes=20_000)
    seen = collections.Counter(m for ds in (data.train, data.valid)
                               for m in re.findall(r'\b([a-c])\d+ ',
                                                   data.tokenizer.decode(np.asarray(ds.tokens).tolist())))
    assert set(seen) == set('abc') and max(seen.values()) < 1.3*min(seen.values())

def test_a_single_text_says_that_it_was_cut(tmp_path):
    (tmp_path/'a.txt').write_text(''.join(words(9, i) + '\n' for i in range(999)))
    with pytest.warns(UserWarning, match='a.txt.*beginning.*max_bytes=20000'): prep(tmp_path/'a.txt', max_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        prep(tmp_path/'a.txt', max_bytes=None)
        prep(tmp_path/'a.txt', max_bytes=10**7); text_data('python', vocab_size=300, max_bytes=20_000)

def test_a_stream_says_that_it_was_cut(tmp_path, monkeypatch):
    "What comes from a hub is read from its beginning alone; an end that is reached is no cut"
    rows = [dict(text=words(30, i)) for i in range(400)]
    monkeypatch.setattr(T, '_hf_rows', lambda spec: iter(rows))
    with pytest.warns(UserWarning, match=r'org/set.*beginning.*max_bytes=20000'): prep('org/set', max_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        prep('org/set', max_bytes=10**7)
