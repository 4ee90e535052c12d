"Files that users really have: every kind and packing, odd records, damage. Read right, or refused in one sentence."
import collections, gzip, json, os, random
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from made_text import fill, line, pack, plain_words, prep, refused, saved, stream, texts, words
from libmoe_nb.data import files
from libmoe_nb.data.files import cut_place
from libmoe_nb.data.sources import load_documents

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

def refused_file(tmp_path, name, content, *says, **kw):
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
    ('a.jsonl.gz', gzip.compress(b'{"text": "ok"}\n'*1000, mtime=0)[:-20], 'damaged'),
    ('a.jsonl.gz', gzip.compress(b'{"body": "ok"}', mtime=0), "found 'body'"),
    ('a.jsonl.zst', b'no zstd', 'damaged'),
    ('a.parquet', b'PAR1 but not really', 'Parquet'),
    ('one.txt', b'x', 'too few and too short'),
])
def test_refused(tmp_path, name, content, says): refused_file(tmp_path, name, content, says)

def test_zst_cut_off(tmp_path):
    zstd = pytest.importorskip('zstandard')
    z = zstd.ZstdCompressor().compress(b''.join(json.dumps(dict(text=words(50, i))).encode()+b'\n' for i in range(500)))
    refused_file(tmp_path, 'a.jsonl.zst', z[:-9], 'damaged')

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

def test_large_text_file_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_PART', 5000)
    text = ''.join(words(20, i) for i in range(1000))
    (tmp_path/'big.txt').write_text(text, encoding='utf-8')
    parts = [d.text for d in load_documents(tmp_path/'big.txt')]
    assert len(parts) > 10 and ''.join(parts) == text and all(p.endswith('\n') for p in parts)
    (tmp_path/'big.txt').write_bytes(text.encode() + b'\xff')
    with pytest.raises(ValueError, match=f'byte 0xff at offset {len(text.encode())}\\)'):
        list(load_documents(tmp_path/'big.txt'))

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

# packed files

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
    whole = pack(suffix, b''.join(line(plain_words(30, i)) for i in range(300)))
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

# odd records

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
    p.write_bytes(b'{"text": "half \\ud83d", "kind": "\\ud83d!"}\n'*2 + line(plain_words(90, 1), kind='b'))
    assert [d.domain for d in load_documents(p, domain_field='kind')] == ['?!', '?!', 'b']
    for bad, says in [(b'{"text": ["a"]}', 'is a list'), (b'{"text": {"a": 1}}', 'is a dict'),
                      (b'{"text": true}', 'is a bool'), (b'3', 'no field'), (b'{"a"', 'not valid JSON')]:
        p.write_bytes(line('one') + bad); refused(p, f'{p} line 2', says)

# tables

def broken_utf8(n=600, at=(300, 555)):
    import pyarrow as pa
    raw = [plain_words(5, i).encode() for i in range(n)]
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

# folders of `save_to_disk`

def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = [dict(text=plain_words(9, i), meta=dict(kind='ab'[i % 2])) for i in range(40)]
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
    one = Path(saved([dict(text=plain_words(9, i)) for i in range(40)], str(tmp_path/'one')))
    part, = one.glob('data-*.arrow')
    whole = part.read_bytes()
    read = [t.encode() for t in texts(one)]
    part.write_bytes(whole[:len(whole)//2]); refused(one, str(part), 'damaged')
    part.write_bytes(b'nothing of the kind'); refused(one, str(part), 'damaged')
    # an offset that leads out of the file: reading there is a memory fault
    ends = np.cumsum([0, *map(len, read)], dtype='int32')
    assert whole.count(ends.tobytes()) == 1
    for i, far in ((7, 2**30), (40, 2**31 - 1), (3, -5)):
        led = ends.copy(); led[i] = far
        part.write_bytes(whole.replace(ends.tobytes(), led.tobytes())); refused(one, str(part), 'damaged')
    part.unlink(); refused(one, str(part))
    (one/'state.json').write_text('{'); refused(one, 'state.json')

def test_saved_data_that_changes_is_read_again(tmp_path):
    make = lambda k: saved([dict(text=plain_words(60, repr((i, k)))) for i in range(60)], str(tmp_path/'one'))
    a = prep(make(0)).fingerprint
    assert prep(make(1)).fingerprint != a and prep(make(0)).fingerprint == a

# where to cut

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.integers(0, 200))
def test_cut_is_between_characters(text, at):
    data = text.encode('utf-8', 'replace'); i = cut_place(data, min(at, len(data)))
    assert 0 <= i <= min(at, len(data)) and data[:i].decode() + data[i:].decode() == data.decode()
