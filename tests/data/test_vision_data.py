"Samples from every kind of source, in the very layouts of the known sets, without a network."

import json

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from libmoe_nb.data import vision
from libmoe_nb.data.images import BadImage, read_image
from libmoe_nb.data.vision import Samples, StreamedSamples, easy_vqa, vision_data, vision_sets


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def save(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new('RGB', size, colour).save(path)


def llava(image, *turns, **kw):
    said = [{'from': 'human' if i % 2 == 0 else 'gpt', 'value': t} for i, t in enumerate(turns)]
    return dict(**kw, **(dict(image=image) if image else {}), conversations=said)


def colours(samples):
    return [[read_image(f).getpixel((0, 0)) for f in s.images] for s in samples]


RED, BLUE = (255, 0, 0), (0, 0, 255)

# the known sets, as they lie on disk


def pretrain(root):
    "LLaVA-558K: one file and an archive of numbered folders"
    save(root / 'images' / '00453' / '004539375.jpg', RED)
    save(root / 'images' / '00223' / '002239345.jpg', BLUE)
    (root / 'blip_laion_cc_sbu_558k.json').write_text(
        json.dumps(
            [
                llava(
                    '00453/004539375.jpg',
                    'Render a clear and concise summary of the photo.\n<image>',
                    'select luxury furniture',
                    id='004539375',
                ),
                llava(
                    '00223/002239345.jpg',
                    '<image>\nWrite a terse but informative summary.',
                    'a grey watch',
                    id='002239345',
                ),
            ]
        )
    )
    return root / 'images'


def mix(root):
    "LLaVA-665K: ids that are text and numbers, five folders, text alone"
    names = [
        'coco/train2017/000000033471.jpg',
        'gqa/images/2354786.jpg',
        'ocr_vqa/images/140031996.jpg',
        'textvqa/train_images/011e7e629fb9ae7b.jpg',
        'vg/VG_100K/2.jpg',
        'vg/VG_100K_2/1.jpg',
    ]
    for n in names:
        save(root / n, RED)
    (root / 'llava_v1_5_mix665k.json').write_text(
        json.dumps(
            [
                *(
                    llava(
                        n,
                        '<image>\nWhat?\nAnswer the question using a single word or phrase.',
                        'Red',
                        'Sure?',
                        'Yes',
                        id=n.split('/')[-1][:-4],
                    )
                    for n in names
                ),
                llava(None, 'Who are you?', 'A model.', id='wgByO4Y_0', model=''),
                llava(names[0], '<image>\nWhy?', 'So.', id=7),
            ]
        )
    )
    return root


def allava(root):
    "ALLaVA-4V captions: two files, whose names of pictures start above them"
    save(root / 'allava_laion' / 'images' / '100277305.jpeg', RED)
    save(root / 'allava_vflan' / 'images' / 'images_191task_1k' / 'PACS+guitar.png', BLUE)
    (root / 'allava_laion' / 'ALLaVA-Caption-LAION-4V.json').write_text(
        json.dumps(
            [
                llava(
                    'allava_laion/images/100277305.jpeg',
                    '<image>\nPlease depict the image in words.',
                    'A ring.',
                    id='allava_laion_cap_100277305',
                    original_caption='Ring',
                    url='https://example.org/a.jpg',
                )
            ]
        )
    )
    (root / 'allava_vflan' / 'ALLaVA-Caption-VFLAN-4V.json').write_text(
        json.dumps(
            [
                llava(
                    'allava_vflan/images/images_191task_1k/PACS+guitar.png',
                    '<image>\nDescribe it.',
                    'A guitar.',
                    id='allava_vflan_cap_100000',
                )
            ]
        )
    )
    return root


def onevision(root):
    "LLaVA-OneVision: parts with brackets in their names, pictures in a column, some rows without"
    features = Features(
        dict(
            id=Value('string'),
            image=Image(),
            data_source=Value('string'),
            conversations=List({'from': Value('string'), 'value': Value('string')}),
        )
    )
    parts = {'ai2d(gpt4v)': [('a', RED), ('b', BLUE), ('e', RED)], 'magpie_pro(l3_80b_st)': [('c', None), ('d', None)]}
    for name, rows in parts.items():
        (root / name).mkdir(parents=True)
        Dataset.from_list(
            [
                llava(None, '<image>\nWhat?' if c else 'What?', 'This.', id=i, data_source=name)
                | dict(image=c and PILImage.new('RGB', (8, 8), c))
                for i, c in rows
            ],
            features=features,
        ).to_parquet(root / name / 'train-00000-of-00001.parquet')
    configs = '\n'.join(f'- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/train-*' for n in parts)
    (root / 'README.md').write_text(f'---\nconfigs:\n{configs}\n---\n')
    return root


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize(
    'name, make, ids, first',
    [
        (
            'llava-558k',
            pretrain,
            ['004539375', '002239345'],
            '<image>\nRender a clear and concise summary of the photo.',
        ),
        ('llava-665k', mix, None, '<image>\nWhat?\nAnswer the question using a single word or phrase.'),
        (
            'allava-4v',
            allava,
            ['allava_laion_cap_100277305', 'allava_vflan_cap_100000'],
            '<image>\nPlease depict the image in words.',
        ),
    ],
)
def test_sets_with_pictures_apart(tmp_path, name, make, ids, first, streaming):
    found = vision_data(name, images=make(tmp_path), streaming=streaming)
    assert isinstance(found, StreamedSamples if streaming else Samples)
    got = list(found)
    assert len(found.left_out) == 0 and got[0].turns[0][1] == first and colours(got)[0][0][0] > 200
    if ids:
        assert [s.id for s in got] == ids
    else:
        assert len(got) == 8 and got[6].images == () and got[7].id == '7' and len(got[0].turns) == 4
    assert list(found) == got


def test_onevision(tmp_path, monkeypatch):
    from dataclasses import replace

    root = onevision(tmp_path / 'ov')
    for n in ('llava-onevision', 'llava-onevision-25'):
        monkeypatch.setitem(vision_sets, n, replace(vision_sets[n], hub=str(root)))
    for streaming in (False, True):
        got = list(vision_data('llava-onevision', streaming=streaming))
        # in turns, so that no part comes alone while there are others
        assert [s.id for s in got] == ['a', 'c', 'b', 'd', 'e']
        assert colours(got) == [[RED], [], [BLUE], [], [RED]] and got[0].tags == dict(data_source='ai2d(gpt4v)')
        assert [s.id for s in vision_data('llava-onevision', config='ai2d(gpt4v)', streaming=streaming)] == [
            'a',
            'b',
            'e',
        ]
    assert len(vision_data('llava-onevision-25')) < 5
    assert [s.id for s in vision_data(root)] == ['a', 'c', 'b', 'd', 'e']
    assert len(vision_data(next(root.glob('ai2d*/*.parquet')))) == 3


def test_a_share_is_the_same_each_time_and_about_its_size():
    rows = [dict(id=str(i), question='?', answer='!') for i in range(4_000)]
    some = [s.id for s in vision_data(rows, share=0.25)]
    assert 900 < len(some) < 1_100 and some == [
        s.id for s in vision_data(lambda: iter(rows), streaming=True, share=0.25)
    ]
    # and it is spread over the whole
    assert all(180 < sum(k * 1_000 <= int(i) < (k + 1) * 1_000 for i in some) < 320 for k in range(4))


def test_the_registry_names_what_there_is():
    assert {s.hub for s in vision_sets.values()} == {
        'liuhaotian/LLaVA-Pretrain',
        'liuhaotian/LLaVA-Instruct-150K',
        'FreedomIntelligence/ALLaVA-4V',
        'lmms-lab/LLaVA-OneVision-Data',
        'easy-vqa',
    }
    assert vision_sets['llava-onevision-25'].share == 0.25 and all(s.name == n for n, s in vision_sets.items())


# datasets


def rows():
    pic = lambda c: PILImage.new('RGB', (4, 4), c)
    return dict(image=[pic('red'), pic('blue'), None], question=['a?', 'b?', 'c?'], answer=['x', 'y', 'z'])


@pytest.mark.parametrize('streaming', [False, True])
def test_image_columns(streaming, tmp_path):
    ds = Dataset.from_dict(rows()).cast_column('image', Image())
    ds.save_to_disk(tmp_path / 'saved')
    want = [[RED], [BLUE], []]
    for source in (
        ds,
        ds.to_iterable_dataset(),
        DatasetDict(train=ds),
        ds.cast_column('image', Image(decode=False)),
        list(ds),
        tmp_path / 'saved',
    ):
        got = list(vision_data(source, streaming=streaming))
        assert colours(got) == want and [s.turns[0][1] for s in got] == ['<image>\na?', '<image>\nb?', 'c?']


@pytest.mark.parametrize('later', [False, True])
def test_lists_of_images_and_messages(later):
    pic = lambda c: PILImage.new('RGB', (4, 4), c)
    ds = Dataset.from_dict(
        dict(
            images=[[pic('red'), pic('blue')], []],
            messages=[
                [dict(role='user', content='<image><image>Which?'), dict(role='assistant', content='Both.')],
                [dict(role='user', content='Hi'), dict(role='assistant', content='Ho')],
            ],
        )
    ).cast_column('images', List(Image()))
    got = list(vision_data(ds.to_iterable_dataset() if later else ds))
    assert colours(got) == [[RED, BLUE], []] and got[0].turns[0][1] == '<image>\n<image>\nWhich?'


def test_a_broken_picture_does_not_end_the_loop_over_a_dataset():
    ds = Dataset.from_dict(
        dict(image=[dict(bytes=b'no picture', path=None), dict(bytes=None, path='gone.png')], caption=['a', 'b'])
    ).cast_column('image', Image())
    got = vision_data(ds)
    assert len(got) == 2
    for s in got:
        with pytest.raises(BadImage):
            read_image(s.images[0])


def test_pictures_of_a_dataset_are_not_held_in_memory():
    ds = Dataset.from_dict(rows()).cast_column('image', Image())
    assert all(callable(f) for s in vision_data(ds) for f in s.images)


# folders


def test_a_folder_of_ones_own(tmp_path):
    save(tmp_path / 'a.png', RED)
    save(tmp_path / 'sub' / 'b.png', BLUE)
    (tmp_path / 'metadata.jsonl').write_text(
        '{"file_name": "a.png", "text": "red"}\n\n{"file_name": "sub/b.png", "caption": "blue"}\n'
    )
    got = vision_data(tmp_path)
    assert colours(got) == [[RED], [BLUE]] and [s.turns for s in got] == [
        (('user', '<image>'), ('assistant', w)) for w in ('red', 'blue')
    ]


@pytest.mark.parametrize('place', ['', 'images', 'elsewhere'])
def test_pictures_are_found_beside_the_file_or_where_told(tmp_path, place):
    save(tmp_path / place / 'a.png', RED)
    (tmp_path / 'any.json').write_text(json.dumps([llava('a.png', '<image>', 'red')]))
    told = dict(images=tmp_path / place) if place == 'elsewhere' else {}
    for source in (tmp_path, tmp_path / 'any.json', str(tmp_path / 'any.json')):
        assert colours(vision_data(source, **told)) == [[RED]]


BAD = dict(
    no_mark=llava('a.png', 'what?', 'that', id='no_mark'),
    no_image=llava(None, '<image> what?', 'that', id='no_image'),
    more_marks=llava('a.png', '<image><image>', 'that', id='more_marks'),
    empty=llava('a.png', '<image>', ' ', id='empty'),
    unanswered=llava('a.png', '<image>', id='unanswered'),
    nobody=dict(id='nobody', conversations=[{'from': 'cat', 'value': 'meow'}]),
    nothing=dict(id='nothing'),
    number=7,
    in_answer=llava('a.png', '<image>', 'see <image>', id='in_answer'),
)


@pytest.mark.parametrize('streaming', [False, True])
def test_bad_entries_are_left_out_by_name_and_nothing_else(streaming):
    good = [llava(None, f'{i}?', 'yes', id=f'good{i}') for i in range(3)]
    entries = [good[0], *BAD.values(), *good[1:]]
    found = vision_data(entries, streaming=streaming)
    assert [s.id for s in found] == ['good0', 'good1', 'good2']
    told = {n for names in found.left_out.names.values() for n in names}
    assert told == {k for k in BAD if k != 'number'} | {'#8'} and len(found.left_out) == len(BAD)


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda d: d / 'none.json', 'is no file or folder here'),
        (lambda d: 'easyvqa', "did you mean 'easy-vqa'"),
        (lambda d: None, 'source must be'),
        (lambda d: 'nobody/no-such-set', 'nobody/no-such-set'),
    ],
)
def test_what_is_no_source(tmp_path, make, said):
    with pytest.raises(ValueError, match=said):
        vision_data(make(tmp_path))


def test_a_set_that_is_not_there_says_what_belongs_where(tmp_path):
    with pytest.raises(ValueError, match='images must be a folder with coco/train2017, gqa/images'):
        vision_data('llava-665k')
    with pytest.raises(ValueError, match='needs llava_v1_5_mix665k.json of liuhaotian/LLaVA-Instruct-150K'):
        vision_data('llava-665k', images=tmp_path)


def test_two_files_in_a_folder_are_not_guessed(tmp_path):
    for n in 'ab':
        (tmp_path / f'{n}.json').write_text('[]')
    with pytest.raises(ValueError, match='one of its files: a.json and b.json'):
        vision_data(tmp_path)


# easy-vqa


def test_easy_vqa_is_the_package_s_own_split():
    test = easy_vqa('test')
    assert len(test) == 9_673 and read_image(test[0].images[0]).size == (64, 64)
    kinds = {(s.tags['group'], s.tags['subtask']) for s in test}
    assert kinds == {
        ('open', 'shape'),
        ('open', 'colour'),
        *(('yes_no', f'{h}_{w}') for h in ('has', 'lacks') for w in ('shape', 'colour')),
    }
    for s in test[::50]:
        negated = s.tags['subtask'].startswith('lacks')
        assert negated == ((' not ' in s.turns[0][1]) or ' no ' in s.turns[0][1])
    together = easy_vqa('test', together=5)
    assert all(len(s.turns) <= 10 and s.turns[0][1].count('<image>') == 1 for s in together)
    assert sum(len(s.turns) // 2 for s in together) == 9_673


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vision.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'libmoe-nb\[vision\]'"):
        vision_data('easy-vqa')

def test_a_dataset_names_pictures_wherever_they_are(tmp_path):
    "Its user made it, or the library has put its files into a cache"
    import datasets
    from PIL import Image
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    ds = datasets.Dataset.from_list([dict(image=str(tmp_path/'a.png'), question='which ?', answer='red')])
    sample, = vision_data(ds.cast_column('image', datasets.Image()))
    assert sample.turns[1] == ('assistant', 'red')
