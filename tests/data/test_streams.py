"A stream of shards: each document once an epoch, wherever it is interrupted and whoever goes on."
import gzip
import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from libmoe_nb.data.lanes import Place, TokenStream, count_lanes, deal_shards
from libmoe_nb.data.shards import find_shards, read_shard
from libmoe_nb.data.splitting import document_digest
from libmoe_nb.data.text_streams import read_text, stream_data
from libmoe_nb.training.batches import TrainBatches

SIZES = 13, 4, 31, 9, 22  # documents of the shards
STARTS = np.cumsum([0, *SIZES])
TOTAL = sum(SIZES)


def text_of(i):
    "Document i says its number, 1 to 5 times"
    return ' '.join([str(i)] * (i % 5 + 1))


def rows_of(k):
    return [dict(more=1, text=text_of(i)) for i in range(STARTS[k], STARTS[k + 1])]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "Shards of three kinds; the Parquet one of several groups of rows"
    folder = tmp_path_factory.mktemp('corpus')
    for k in range(len(SIZES)):
        name = f'part-{k:05}-of-{len(SIZES):05}'
        lines = ''.join(f'{json.dumps(r)}\n' + '\n' * (i % 3 == 0) for i, r in enumerate(rows_of(k))).encode()
        if k == 2:
            pq.write_table(pa.Table.from_pylist(rows_of(k)), folder / f'{k}.parquet', row_group_size=7)
        elif k == 3:
            (folder / f'{name}.jsonl.gz').write_bytes(gzip.compress(lines))
        else:
            (folder / f'{k}.jsonl').write_bytes(lines)
    (folder / f'part-00003-of-{len(SIZES):05}.jsonl.gz').rename(folder / '3.jsonl.gz')
    return folder


@pytest.fixture(scope='module')
def words():
    tok = Tokenizer(models.WordLevel({'<end>': 0} | {f'{i}': i + 1 for i in range(TOTAL)}, unk_token='<end>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return tok


def stream_of(corpus, words, **kw):
    shards = find_shards(corpus)
    return TokenStream(shards, words, 0, 8, [shards[0].domain], **{'buffer': 5, **kw})


def read(stream, batches, world=1, places=None, B=4):
    "So many whole batches, put together of what each process takes, and the places behind them"
    whole, after = [torch.zeros(B, 2, 8, dtype=torch.long) for _ in range(batches)], 0
    for r in range(world):
        for n, (b, p) in enumerate(islice(stream.parts(B, 3, 0, places, r, world), batches)):
            whole[n][r::world] = torch.stack([b['input_ids'], b['labels']], 1)
        after = after + p
    return whole, after.tolist()


def documents(whole, lane, lanes):
    "Numbers of the documents that begin in a lane's rows, in order"
    rows = [r for b in whole for r in b[lane::lanes]]
    return [int(label) - 1 for ids, labels in rows for i, label in zip(ids, labels) if i == 0]


def dealt_documents(stream, epoch, lanes):
    "Of each lane, the numbers of its documents in an epoch"
    dealt = next(islice(deal_shards([s.size for s in stream.shards], lanes, 3), epoch, None))
    return [sorted(i for n in d for i in range(STARTS[n], STARTS[n + 1])) for d in dealt]


def check_epochs(stream, whole, lanes, epochs=2):
    for lane in range(lanes):
        seen = documents(whole, lane, lanes)
        for e in range(epochs):
            due = dealt_documents(stream, e, lanes)[lane]
            now, seen = seen[: len(due)], seen[len(due) :]
            assert sorted(now) == due
    assert sorted(sum(dealt_documents(stream, 0, lanes), [])) == [*range(TOTAL)]


@pytest.fixture(scope='module')
def uninterrupted(corpus, words):
    return read(stream_of(corpus, words), 60)[0]


@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_interrupted_epoch_has_each_document_once(corpus, words, uninterrupted, world, workers):
    stream, whole, places, stops = stream_of(corpus, words, workers=workers), [], None, []
    for n in (3, 1, 6, 50):  # stopped in the middle of shards, windows and documents
        now, places = read(stream, n, world, json.loads(json.dumps(places)))
        whole, stops = whole + now, stops + places
    assert all(any(p[k] for p in stops) for k in range(6))
    check_epochs(stream, whole, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, uninterrupted, strict=True))


def test_others_go_on_in_any_number(corpus, words, uninterrupted):
    whole, places = [], None
    for n, world, workers in ((2, 4, 0), (3, 1, 2), (5, 2, 1), (4, 1, 0)):
        now, places = read(stream_of(corpus, words, workers=workers), n, world, places)
        whole += now
    assert all(torch.equal(a, b) for a, b in zip(whole, uninterrupted))


def test_every_batch_is_a_place_to_go_on_from(corpus, words, uninterrupted):
    stream = stream_of(corpus, words)
    for n, (_, places) in enumerate(islice(stream.parts(4, 3), 30), 1):
        assert torch.equal(read(stream, 1, 1, places)[0][0], uninterrupted[n])
    assert torch.equal(next(islice(stream.batches(4, 3, start=7), 1))['labels'], uninterrupted[7][:, 1])


@pytest.mark.parametrize('B, world, lanes', [(6, 2, 3), (6, 3, 3), (7, 7, 1), (10, 2, 5)])
def test_lanes_that_processes_share(corpus, words, B, world, lanes):
    "Few shards: two processes read one lane, each takes its rows"
    stream = stream_of(corpus, words)
    assert count_lanes(B, len(stream.shards)) == lanes
    alone, places = read(stream, 12, 1, B=B)
    shared, same = read(stream, 12, world, B=B)
    assert places == same and all(torch.equal(a, b) for a, b in zip(alone, shared))
    check_epochs(stream, read(stream, 160, B=B)[0], lanes, 1)


def test_a_process_opens_its_own_shards_alone(corpus, words, monkeypatch):
    import libmoe_nb.data.lanes as lanes

    opened = {}

    def reading(shard, *args):
        opened.setdefault(now, set()).add(shard.name)
        return read_shard(shard, *args)

    monkeypatch.setattr(lanes, 'read_shard', reading)
    stream = stream_of(corpus, words)
    for now in range(2):
        list(islice(stream.parts(4, 3, rank=now, world=2), 4))
    assert opened[0] and opened[1] and not opened[0] & opened[1]


def test_order_depends_on_seed_and_epoch_and_mixes(corpus, words):
    stream = stream_of(corpus, words, buffer=16)
    rows = lambda seed: [torch.stack([x['input_ids'], x['labels']], 1) for x in islice(stream.batches(1, seed), 60)]
    a, b = (documents(rows(seed), 0, 1) for seed in (0, 1))
    assert sorted(a[:TOTAL]) == sorted(b[:TOTAL]) == [*range(TOTAL)] and a[:TOTAL] != b[:TOTAL]
    assert a[:TOTAL] != a[TOTAL : 2 * TOTAL] and sum(x + 1 == y for x, y in zip(a, a[1:])) < TOTAL / 4


def test_what_is_held_out_never_comes(corpus, words):
    out = {document_digest(text_of(i).encode()) for i in range(0, TOTAL, 7)}
    stream = stream_of(corpus, words, held_out=out)
    seen = [i for lane in range(4) for i in documents(read(stream, 60)[0], lane, 4)]
    assert {*seen} == {i for i in range(TOTAL) if i % 7}


def test_stores_and_datasets_give_the_same_documents(corpus, words):
    store = fsspec.filesystem('memory')
    for p in corpus.iterdir():
        store.pipe(f'/stored/{p.name}', p.read_bytes())
    texts = lambda data: sorted(t for s in find_shards(data) for t, *_ in read_shard(s))
    due = sorted(text_of(i).encode() for i in range(TOTAL))
    places = str(corpus), f'file://{corpus}', 'memory://stored', f'{corpus}/*.jsonl*,{corpus}/*.parquet'
    assert all(texts(p) == due for p in places)
    for kind in ('jsonl', 'parquet'):  # as the hub gives them
        assert texts(f'hf:{one_kind(corpus, kind)}') == due
    for s in find_shards('memory://stored'):
        all_of_it = [*read_shard(s)]
        for k in (0, len(all_of_it) // 2, len(all_of_it) - 1):
            assert [*read_shard(s, *all_of_it[k][1:])] == all_of_it[k + 1 :]


def one_kind(corpus, kind):
    (folder := corpus.parent / kind).mkdir(exist_ok=True)
    for k in range(len(SIZES)):
        if kind == 'parquet':
            pq.write_table(pa.Table.from_pylist(rows_of(k)), folder / f'{k}.parquet')
        else:
            (folder / f'{k}.jsonl').write_text('\n'.join(map(json.dumps, rows_of(k))))
    return folder


def test_a_dataset_goes_on_in_the_middle(corpus, words):
    folder = f"hf:{one_kind(corpus, 'parquet')}"
    whole = read(stream_of(folder, words), 12)[0]
    first, places = read(stream_of(folder, words), 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + read(stream_of(folder, words), 8, 1, places)[0]))


@pytest.mark.parametrize('workers', [0, 2])
def test_damage_is_named_with_file_and_row(tmp_path, words, workers):
    for k in range(2):
        (tmp_path / f'{k}.jsonl').write_text('\n'.join(map(json.dumps, rows_of(k))))
    lines = (tmp_path / '0.jsonl').read_text().split('\n')
    (tmp_path / '0.jsonl').write_text('\n'.join([*lines[:7], lines[7][:-5], *lines[8:]]))
    with pytest.raises(ValueError, match=r'^[^\n]*0\.jsonl row 8 is not valid JSON[^\n]*$'):
        read(stream_of(tmp_path, words, workers=workers), 60)


@pytest.mark.parametrize('kind', ['cut', 'field', 'gone', 'table'])
def test_other_damage(tmp_path, words, kind):
    path, rows = tmp_path / 'a.jsonl.gz', [dict(text=f'{random.Random(i).random()}') for i in range(500)]
    path.write_bytes(gzip.compress('\n'.join(map(json.dumps, rows)).encode()))
    if kind == 'table':
        path.unlink()
        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / 'a.parquet', row_group_size=100)
        data = bytearray(path.read_bytes())
        at = pq.ParquetFile(path).metadata.row_group(3).column(0).dictionary_page_offset
        data[at : at + 40] = b'\xff' * 40
        path.write_bytes(bytes(data))
    if kind == 'cut':
        path.write_bytes(path.read_bytes()[:-500])
    (shard,) = find_shards(path)
    if kind == 'gone':
        path.unlink()
    told = dict(cut=r'a\.jsonl\.gz is damaged .* after row \d+: ',
                field="row 1 has no field text_field='body': found 'text'",
                gone='is missing, and was there', table=r'a\.parquet is damaged .*after row 300: ')[kind]
    with pytest.raises(ValueError, match=told):
        list(read_shard(shard, text_field='body' if kind == 'field' else 'text'))


def test_missing_shards_are_named(tmp_path):
    for k in (0, 1, 4):
        (tmp_path / f'x-{k:05}-of-00005.jsonl').write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r'lacks 2 of 5 shards \(x-00002-of-00005.jsonl, x-00003-of-00005.jsonl\)'):
        find_shards(tmp_path)
    assert len(find_shards(tmp_path / 'x-00004-of-00005.jsonl')) == 1
    with pytest.raises(ValueError, match='needs another package: .*s3fs'):
        find_shards('s3://bucket/corpus')
    with pytest.raises(ValueError, match="'hf://.*cannot be listed"):
        find_shards('hf://datasets/nobody/nothing/*.parquet')
    with pytest.raises(ValueError, match='add stream=True'):
        read_text('s3://bucket/corpus')


def test_shards_without_text_end_with_an_error(tmp_path, words):
    for k in range(2):
        (tmp_path / f'{k}.jsonl').write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match='no text'):
        read(stream_of(tmp_path, words), 1)
    with pytest.raises(ValueError, match='holds text'):
        stream_data(str(tmp_path), cache_dir=tmp_path / 'cache')


def test_a_long_document_is_no_longer_read_for_each_block(tmp_path, words):
    (tmp_path / 'a.jsonl').write_text(json.dumps(dict(text='7 ' * 60_000)) + '\n' + json.dumps(dict(text='1 2')))
    whole, places = read(stream_of(tmp_path, words), 1500)
    assert Place(*places[0]).used > 40_000
    after = read(stream_of(tmp_path, words), 1501)[0][-1]
    assert torch.equal(read(stream_of(tmp_path, words), 1, 1, places)[0][0], after)


def test_two_processes_share_one_bookmark_and_one_goes_on(corpus, words, tmp_path):
    "Each with a worker of its own"
    here = Path(__file__)
    own = dict(os.environ, PYTHONPATH=str(here.parents[2]), OMP_NUM_THREADS='1')
    command = [sys.executable, str(here.with_name('stream_process.py'))]
    ps = [subprocess.Popen([*command, str(r), '2', str(corpus), str(tmp_path / 'store'), '1'], stdout=subprocess.PIPE,
                           text=True, env=own) for r in range(2)]
    (a, mark), (b, same) = (json.loads(p.communicate(timeout=240)[0].splitlines()[-1]) for p in ps)
    alone = TrainBatches(stream_of(corpus, words), 4, 6, seed=3)
    whole = [y for _, y, *_ in alone]
    assert mark == same == [*alone.bookmark] and mark[0] == 6
    assert [y[0::2].tolist() for y in whole] == a and [y[1::2].tolist() for y in whole] == b
    on = TrainBatches(stream_of(corpus, words), 4, 2, seed=3)
    on.position, on.bookmark = mark[0], mark
    assert all(torch.equal(x[1], y[1]) for x, y in zip(on, alone))
